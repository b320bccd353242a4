"""From photos to a report: the commands of scripts/README.md, one after another, with few photos."""

import shlex
from pathlib import Path

import pytest
from helpers.commands import ROOT, run

SMALLER = {
    "scripts/synthesize.py": "--identities 6 --images 6 --pairs 20 --pair-identities 6",
    "main.py": "-b 12 --epochs 1 --warmup-epochs 0 --lr-milestones 1 -j 0",
    "scripts/audit.py": "-j 0",
    "valid.py": "-j 0 --batch-size 32",
}


def commands() -> list[list[str]]:
    section = (ROOT / "scripts" / "README.md").read_text().split("## From photos to a report\n")[1].split("\n## ")[0]
    block = section.split("```bash\n")[1].split("```")[0].replace("\\\n", " ")
    return [shlex.split(line) for line in block.splitlines() if not line.startswith("#")]


@pytest.mark.slow
def test_from_photos_to_a_report(tmp_path: Path) -> None:
    steps = commands()
    assert [step[1] for step in steps] == [
        "scripts/synthesize.py", "scripts/align.py", "main.py", "scripts/audit.py", "main.py", "valid.py",
        "scripts/report.py"]
    for python, program, *arguments in steps:
        assert python == "python3"
        run(ROOT / program, *arguments, *shlex.split(SMALLER.get(program, "")), cwd=tmp_path)
    work = tmp_path / "work"
    assert len(list((work / "faces" / "train").rglob("*.jpg"))) == 36
    assert (work / "audit" / "exclude.txt").read_text().startswith("# proposed by scripts/audit.py")
    assert "FAR asked for" in (work / "clean" / "report" / "report.html").read_text()
    comparison = (work / "comparison.html").read_text()
    assert "> run<" in comparison and "> clean<" in comparison
