"""scripts/gpu_check.sh without a GPU: its report, what it does with parts that fail, and its parts in a dry run."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import ROOT

from scripts import gpu_questions, gpu_report

COMMON = {"device": "NVIDIA H200", "capability": "9.0", "driver": "580.1", "torch": "2.11.0", "cuda": "13.0",
          "commit": "abc", "dry_run": False}


def write_rows(directory: Path, *rows: dict[str, Any], date: str = "2026-11-26T00:00:00+00:00") -> None:
    with open(directory / "rows.jsonl", "a") as file:
        file.writelines(json.dumps({**row, **COMMON, "date": date}) + "\n" for row in rows)


def row(question: str, case: str, **values: Any) -> dict[str, Any]:
    return {"question": question, "case": case, **values}


def classifier_rows(seconds: float) -> list[dict[str, Any]]:
    common: dict[str, Any] = dict(classes=1_000_000, rows=1024, precision="bf16")
    return [
        row("classifier", "1000000 bf16 products", seconds=0.0045, floor="products", **common),
        row("classifier", "1000000 bf16 kept memory", seconds=0.0031, floor="memory", kind="kept", **common),
        row("classifier", "1000000 bf16 kept triton", seconds=seconds, form="triton", kind="kept", **common),
        row("classifier", "1000000 bf16 kept eager", seconds=0.03, form="eager", kind="kept", **common),
        row("classifier", "launches kept triton", launches=300, gib=26.0, waits={}, form="triton", kind="kept"),
        row("classifier", "launches kept eager", launches=3001, gib=64.0, waits={}, form="eager", kind="kept"),
        row("predict", "classifier: 1000000 bf16 kept triton", seconds=0.0056, bound="arithmetic"),
        row("predict", "classifier: 1000000 bf16 kept eager", seconds=0.024, bound="memory"),
    ]


def report_of(directory: Path) -> dict[str, list[str]]:
    """{first cell of a line of a table: the other cells}; of equal ones the first."""
    gpu_report.write_report(str(directory))
    cells: dict[str, list[str]] = {}
    for line in (directory / "report.md").read_text().splitlines():
        if line.startswith("| "):
            first, *others = line[2:-2].split(" | ")
            cells.setdefault(first, others)
    return cells


def test_the_report_answers_the_acceptance_figures(tmp_path):
    write_rows(tmp_path, row("machine", "memory", total_mib=143_000.0), *classifier_rows(0.0112),
               row("modes", "base", ok=True, losses=[1.0]), row("modes", "fp16", ok=False, error="waits", at="a.py:1"),
               row("step", "bf16, ours", run="bf16", way="ours", images=256, images_per_second=3000.0, seconds=0.085,
                   peak_mib=9.0, speedup=3.1),
               row("largest", "trained", ok=True, classes=29_000_000, total_mib=143_000.0))
    cells = report_of(tmp_path)
    over = cells["classifier, bf16, as a multiple of its floor"]
    assert over[0].startswith("2.49: 11.2 ms, 1,000,000 classes, 1,024 rows") and over[-1] == "reached"
    assert cells["launches of a classifier step, triton"][-1] == "reached"
    assert cells["launches of a classifier step, eager"] == ["3,001", "at most 3,000", "not reached"]
    assert cells["steps without a wait, in each mode"] == ["1 of 2; not: fp16", "all", "not reached"]
    assert cells["whole step, as a multiple of the published script's"][-1] == "reached"
    assert cells["classes on one H200, fused update"] == ["29,000,000", "at least 30,000,000", "not reached"]
    # case: Triton, eager, walk, products, memory, over the floor, and for both: predicted, over that
    assert cells["1000000 bf16 kept"] == ["11.2 ms", "30 ms", "-", "4.5 ms", "3.1 ms", "2.49", "5.6 ms", "2.00",
                                          "24 ms", "1.25"]
    assert cells["modes"] == ["fp16", "error waits, at a.py:1"]


def test_the_last_answers_to_a_question_count(tmp_path):
    write_rows(tmp_path, *classifier_rows(0.01), row("step", "all", left_out="torchshard is missing"))
    write_rows(tmp_path, *classifier_rows(0.0113)[:3], date="2026-11-27T00:00:00+00:00")
    cells = report_of(tmp_path)
    assert cells["classifier, bf16, as a multiple of its floor"][-1] == "not reached"
    assert cells["launches of a classifier step, triton"][-1] == "not measured"  # the later process did not say
    assert cells["step"] == ["all", "left out: torchshard is missing"]


def test_what_was_not_measured_is_said(tmp_path):
    left_out = [row(question, "all", left_out="torchshard is missing") for question in gpu_questions.QUESTIONS
                if question not in ("machine", "kernels", "largest")]
    write_rows(tmp_path, row("machine", "software", ok=True), *left_out,
               row("largest", "trained", ok=True, classes=17_000_000, total_mib=81_000.0))
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('{"question": "part", "case": "kernels", "ok": false, "seconds": 50, "failed": "ran out of 50 s"}\n')
        file.write('{"question": "classifier", "ca')  # a process that was killed
    cells = report_of(tmp_path)
    for figure in ("classifier, bf16, as a multiple of its floor", "launches of a classifier step, triton",
                   "steps without a wait, in each mode", "whole step, as a multiple of the published script's",
                   "classes on one H200, fused update"):
        assert cells[figure][-1] == "not measured"
    assert cells["step"] == ["all", "left out: torchshard is missing"]
    assert "ran out of 50 s" in cells["part"][1] and cells["kernels"] == ["50 s", "**failed**"]
    assert "1 lines" in (tmp_path / "report.md").read_text()


def test_predictions_are_for_the_gpu_of_the_rows(tmp_path):
    assert gpu_report.data_sheet(gpu_report.read_rows(str(tmp_path))[0], False) == (None, 0.0)  # no row yet
    write_rows(tmp_path, row("machine", "memory", total_mib=143_000.0))
    rows, _ = gpu_report.read_rows(str(tmp_path))
    assert gpu_report.data_sheet(rows, False) == ("h200", 143_000.0)
    assert gpu_report.data_sheet(rows, True)[0] == "h100"


@pytest.mark.parametrize(("device", "name"), [
    ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA RTX A1000", None),
    ("NVIDIA GH200 480GB", None)])
def test_a_gpu_with_a_longer_name_is_another_one(device, name):
    assert gpu_report.data_sheet({("machine", "software"): {"device": device, "capability": "9.0"}}, False)[0] == name


def test_a_question_without_its_package_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the dry run sets it
    monkeypatch.setitem(gpu_questions.QUESTIONS, "machine", ("gpu_questions", ("torch", "no_such_package")))
    monkeypatch.setattr(sys, "argv", ["gpu_questions.py", "machine", "--dry-run", "--out", str(tmp_path)])
    gpu_questions.main()
    (found,) = gpu_report.read_rows(str(tmp_path))[0].values()
    assert found["left_out"] == "no_such_package is missing" and found["dry_run"] and found["torch"]


def test_a_case_that_fails_in_another_process_fails_the_question(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the dry run sets it
    monkeypatch.setattr(gpu_questions, "machine", lambda check: copy.deepcopy(check).add("a case", ok=False))
    monkeypatch.setattr(sys, "argv", ["gpu_questions.py", "machine", "--dry-run", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        gpu_questions.main()
    assert ended.value.code == 1 and "failed: a case" in capsys.readouterr().err


def check(*flags: object, status: int = 0, **environment: str) -> str:
    """What gpu_check.sh prints, on both streams."""
    finished = subprocess.run(["bash", "scripts/gpu_check.sh", *map(str, flags)], cwd=ROOT, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env={"PYTHON": sys.executable, **os.environ, **environment})
    assert finished.returncode == status, finished.stdout
    return finished.stdout


@pytest.mark.parametrize(("flags", "words"), [
    (["--steps", "3"], "error: --steps: unknown"), (["--dry-run", "--out"], "error: --out: give it a value"),
    (["--dry-run", "--only", "machine,kernel"], "error: --only kernel: unknown"),
    (["--dry-run", "--wheels", "scripts"], "error: --wheels scripts: has no *.whl"),
])
def test_a_mistake_is_one_line(flags, words):
    printed = check(*flags, status=1 if "--wheels" in flags else 2)
    assert words in printed and printed.count("\n") == 1


def test_a_part_that_fails_is_named_and_the_others_run(tmp_path):
    """With an interpreter that asks no question."""
    python = tmp_path / "python3"
    python.write_text(f"""#!/bin/sh
case "$*" in
    *"gpu_questions.py kernels"*) echo a cause; exit 3 ;;
    *"gpu_questions.py predict"*) exit 1 ;;
    *"gpu_questions.py "*) echo "$PYTHONPATH" > "{tmp_path}/path"; cat "${{PYTHONPATH%%:*}}"/own.py ;;
    "-c import torch;"*) echo 0 ;;
    *) exec "{sys.executable}" "$@" ;;
esac
""")
    python.chmod(0o755)
    (tmp_path / "wheels").mkdir()
    for name in ("own", "pytest"):
        with zipfile.ZipFile(tmp_path / "wheels" / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "")
    out = tmp_path / "out"
    printed = check("--dry-run", "--out", out, "--wheels", tmp_path / "wheels", status=1, PYTHON=str(python))
    assert "unpacked own-1.0" in printed and "unpacked pytest" not in printed
    assert "a cause" in printed and sorted(printed.splitlines()[-1].split()) == ["failed:", "kernels", "predict"]
    rows, broken = gpu_report.read_rows(str(out))
    assert broken == 0
    assert {case for question, case in rows if question == "part"} == set(gpu_questions.QUESTIONS)
    assert sorted(case for (_, case), found in rows.items() if not found["ok"]) == ["kernels", "predict"]
    assert "exit status 3" in (out / "report.md").read_text()


@pytest.mark.slow
def test_a_dry_run(tmp_path):
    """Some of the parts. All of them take about two minutes."""
    check("--dry-run", "--out", tmp_path, "--only", "machine,predict,classifier,modes")
    rows, broken = gpu_report.read_rows(str(tmp_path))
    assert broken == 0 and {question for question, _ in rows} == {"machine", "predict", "classifier", "modes", "part"}
    for found in rows.values():
        assert found.get("ok") is not False and "left_out" not in found, found
        assert found["question"] == "part" or found["dry_run"] and found["date"] and found["device"]
    text = (tmp_path / "report.md").read_text()
    assert "Dry run" in text and "## 4. The classifier" in text
    answers = [line for line in text.splitlines() if line.endswith((" reached |", " not measured |"))]
    assert len(answers) == 6, text
    guess = rows["predict", "classifier: 90 bf16 kept eager"]
    assert guess["seconds"] > 0 and rows["classifier", "90 bf16 kept eager"]["seconds"] > 0
