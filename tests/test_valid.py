"""valid.py as its users see it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.commands import ROOT
from helpers.evaluation import pack, write_pairs
from PIL import Image

import valid
from data.pairs import PairImages, PairList
from models import build_backbone
from utils.errors import UserError
from utils.evaluation.lfw import evaluate

FOUR_LINES = (
    r"Accuracy: \d\.\d{5}\+-\d\.\d{5}\n"
    r"Validation rate: \d\.\d{5}\+-\d\.\d{5} @ FAR=\d\.\d{5}\n"
    r"Area Under Curve \(AUC\): \d\.\d{3}\n"
    r"Equal Error Rate \(EER\): \d\.\d{3}\n$"
)


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("faces"))


def arguments(faces: Path, *more: str) -> list[str]:
    return ["--imgs-root", str(faces / "imgs"), "--pair-list", str(faces / "pair.list"), "--device", "cpu", *more]


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *argv: str) -> tuple[str, str]:
    """valid.py in this process: (stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["valid.py", *argv])
    valid.main()
    return capsys.readouterr()


def script(cwd: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
        [sys.executable, *argv], cwd=cwd, env=environment, text=True, capture_output=True, timeout=300
    )


@pytest.mark.slow
def test_the_published_command(faces: Path, tmp_path: Path) -> None:
    """Verbatim except for the paths. It imports neither torchshard nor the losses."""
    result = script(
        tmp_path, "-X", "importtime", str(ROOT / "valid.py"), "--batch-size", "1024", "-workers", "16",
        "--imgs-root", str(faces / "imgs"), "--pair-list", str(faces / "pair.list"),
        "--resume", str(faces / "checkpoint.pth.tar"), "--json", "result.json",
    )
    assert result.returncode == 0, result.stderr
    assert re.search(FOUR_LINES, result.stdout)
    assert f"mobilefacenet of {faces}/checkpoint.pth.tar" in result.stdout
    assert f"20 pairs of {faces}/pair.list, 10 of them same, 24 images" in result.stdout
    assert "embedded 24/24 images" in result.stdout and "=> evaluated in " in result.stdout
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert "utils.evaluation.lfw" in imported
    assert not {name for name in imported if name.split(".")[0] in ("torchshard", "losses")}
    noise = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert noise == []
    assert os.listdir(tmp_path) == ["result.json"]

    written = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert f"Accuracy: {written['accuracy']:.5f}" in result.stdout


def test_the_numbers_are_those_of_the_backbone(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "result.json"
    run(capsys, monkeypatch, *arguments(
        faces, "--resume", str(faces / "checkpoint.pth.tar"), "-j", "0", "-b", "5", "--flip", "--json", str(output)
    ))

    pairs = PairList(str(faces / "imgs"), str(faces / "pair.list"))
    torch.manual_seed(3)
    backbone = build_backbone("mobilefacenet").eval()
    images = torch.stack([PairImages(pairs)[i][0] for i in range(len(pairs.paths))]).float().div(127.5).sub(1)
    with torch.no_grad():
        embeddings = (backbone(images) + backbone(images.flip(3))).numpy()
    expected = evaluate(embeddings[pairs.index1], embeddings[pairs.index2], pairs.is_same)
    written = json.loads(output.read_text())
    assert written["accuracy"] == pytest.approx(expected.accuracy, abs=0.051)  # one pair that rounding moved
    assert written["auc"] == pytest.approx(expected.auc, abs=0.02)


@pytest.mark.slow
def test_untrained_baseline(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seed decides; seed 3 is what the checkpoint of these tests holds."""
    written = []
    for i, source in enumerate(([*MODEL, "--seed", "3"],
                                ["--resume", str(faces / "checkpoint.pth.tar")])):
        output = tmp_path / f"{i}.json"
        out, _ = run(capsys, monkeypatch, *arguments(faces, "--workers", "1", *source, "--json", str(output)))
        assert ("untrained mobilefacenet, seed 3" in out) == (i == 0)
        written.append(output.read_text())
    assert written[0] == written[1]


def test_json_replaces_the_old_file_whole_or_not_at_all(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "result.json"
    output.write_text("old")
    command = arguments(faces, "--untrained", "-a", "mobilefacenet", "-j", "0", "--json", str(output))

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="--json .*result.json: .*No space"):
        patch.setattr(os, "fsync", fail)
        run(capsys, patch, *command)
    assert re.search(FOUR_LINES, capsys.readouterr().out)  # the result is not lost with the file
    assert output.read_text() == "old" and os.listdir(tmp_path) == ["result.json"]
    run(capsys, monkeypatch, *command)
    assert json.loads(output.read_text()) and os.listdir(tmp_path) == ["result.json"]


@pytest.mark.slow
def test_several_sets_pictures_and_processes(faces: Path, tmp_path: Path) -> None:
    """A list and a .bin of the same pairs, by two processes: the same numbers, headed by the sets' names."""
    pack(faces, tmp_path / "packed.bin")
    result = script(
        tmp_path, str(ROOT / "valid.py"), *arguments(faces, "--bin", "packed.bin"),
        "--resume", str(faces / "checkpoint.pth.tar"), "-j", "2", "-b", "5", "--multiprocessing-distributed",
        "--nproc-per-node", "2", "--json", "both.json", "--plot", "roc.png", "--montage", "worst.png",
    )
    assert result.returncode == 0 and result.stderr == "", result.stderr
    four = FOUR_LINES.removesuffix("$")
    assert re.search(f"^{re.escape(faces.name)}\n{four}packed\n{four}$", result.stdout, re.MULTILINE), result.stdout
    assert "2 processes, each cpu" in result.stdout and result.stdout.count("embedded 12/12 images of rank 0, ") == 2
    sets = json.loads((tmp_path / "both.json").read_text(), parse_constant=pytest.fail)["sets"]
    assert list(sets) == [faces.name, "packed"] and sets[faces.name] == sets["packed"]
    assert result.stdout.count(f"Accuracy: {sets['packed']['accuracy']:.5f}") == 2
    for name in ("roc.png", "worst.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 800


@pytest.mark.slow
def test_a_bin_alone_gives_the_numbers_of_its_pairs(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(faces, tmp_path / "packed.bin")
    model = ("--resume", str(faces / "checkpoint.pth.tar"), "--device", "cpu", "-j", "0")
    sources = (["--bin", str(tmp_path / "packed.bin")], arguments(faces))
    outputs = [run(capsys, monkeypatch, *source, *model, "--json", str(tmp_path / f"{i}.json"))[0]
               for i, source in enumerate(sources)]
    results = [re.search(FOUR_LINES, output) for output in outputs]
    assert results[0] and results[1] and results[0].group() == results[1].group()
    assert (tmp_path / "0.json").read_text() == (tmp_path / "1.json").read_text()
    details = r"=> packed: accuracy at exact thresholds \d\.\d{5}\+-\d\.\d{5}; TAR at FAR 1e-1 \d\.\d{5}\n"
    assert re.search(details, outputs[0])


MODEL = ["--untrained", "-a", "mobilefacenet"]
MISTAKES = [
    ([*MODEL, "--bin", "none.bin"], "none.bin: "),
    ([*MODEL, "--bin", "a/x.bin,a/x.bin"], "--bin a/x.bin: given twice"),
    ([*MODEL, "--json", "a", "--plot", "a"], "--plot a: .*--json"),
    ([*MODEL, "--bin", "a.bin,"], "--bin: 'a.bin,'"),
    ([*MODEL, "--bin", "{faces}/pair.list"], "pair.list: "),
    ([*MODEL, "--bin", "a.bin", "--pair-list", ""], "--pair-list: is empty"),
    ([*MODEL, "--nproc-per-node", "2"], "--nproc-per-node 2: .*--multiprocessing-distributed"),
    ([*MODEL, "--nproc-per-node", "0"], "--nproc-per-node 0: .*at least 1"),
    ([*MODEL, "--plot", "roc.gif"], "--plot roc.gif: .*.png, .svg or .pdf"),
    ([*MODEL, "--montage", "x.svg"], "--montage x.svg: .*.png or .jpg"),
    ([*MODEL, "--plot", "/nowhere/x.png"], "--plot /nowhere/x.png: there is no directory"),
    ([*MODEL, "--montage", "/nowhere/x.png"], "--montage /nowhere/x.png: there is no dir"),
    (["--resume", ""], "--resume: is empty"),
    ([], "--resume is missing: .* --untrained"),
    (["--resume", "nothing.pth.tar"], "--resume nothing.pth.tar: no such file"),
    (["--resume", "{faces}/checkpoint.pth.tar", "--untrained", "-a", "iresnet18"], "--untrained with --resume "),
    (["--untrained"], "--untrained: .*-a "),
    (["--untrained", "-a", "vgg"], "--arch vgg.*iresnet18, .*mobilefacenet"),
    (["--resume", "{faces}/checkpoint.pth.tar", "-a", "iresnet18"], "iresnet18"),
    (["--resume", "{faces}/pair.list"], "pair.list"),
    (["--resume", "{faces}"], "directory"),
    ([*MODEL, "-b", "0"], "--batch-size 0: .*at least 1"),
    ([*MODEL, "-j", "-1"], "--workers -1: .*at least 0"),
    ([*MODEL, "-p", "0"], "--print-freq 0"),
    ([*MODEL, "--seed", "-1"], "--seed -1"),
    ([*MODEL, "--seed", str(2**63)], "--seed 9223372036854775808"),
    ([*MODEL, "-b", "many"], "-b/--batch-size: 'many': give a whole number"),
    ([*MODEL, "--batch", "8"], "unrecognized arguments: --batch 8"),
    ([*MODEL, "--json", "{faces}/none/result.json"], "--json .*: there is no directory"),
    ([*MODEL, "--json", "{faces}"], "--json .*: is not a file"),
    ([*MODEL, "--json", "/dev/null"], "--json /dev/null: is not a file"),
    ([*MODEL, "--json", "{faces}/pair.list"], "pair.list: is the same file as .*pair.list, which is read"),
    ([*MODEL, "--device", "cuda"], "--device cuda: PyTorch sees no GPU"),
    ([*MODEL, "--device", "tpu"], "--device.*tpu"),
    ([*MODEL, "--imgs-root", ""], "--imgs-root: is empty"),
    ([*MODEL, "--pair-list", ""], "--pair-list: is empty"),
    ([*MODEL, "--imgs-root", "/nowhere"], "--imgs-root /nowhere: no such directory"),
    ([*MODEL, "--pair-list", "/nowhere"], "--pair-list /nowhere: "),
    ([*MODEL, "--imgs-root", "{faces}"], r"pair\.list:1: "),
]


@pytest.mark.parametrize("argv, message", MISTAKES, ids=[str(i) for i in range(len(MISTAKES))])
def test_mistakes_are_found_before_anything_is_embedded(
    argv: list[str], message: str, faces: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(valid, "evaluate_set", lambda *_, **__: pytest.fail("embedded"))
    monkeypatch.setattr(valid, "build_backbone", lambda *_: pytest.fail("built a backbone"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message) as caught:
        run(capsys, monkeypatch, *arguments(faces), *(part.format(faces=faces) for part in argv))
    assert "\n" not in str(caught.value)


def test_pair_mistakes_are_found_before_the_checkpoint_is_read(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(valid, "open_weights", lambda *_: pytest.fail("read the checkpoint"))
    (tmp_path / "pair.list").write_text("0/0.jpg 0/1.jpg 1\n1/0.jpg 1/1.jpg\n")
    with pytest.raises(UserError, match=r"pair\.list:2: "):
        run(capsys, monkeypatch, "--imgs-root", str(faces / "imgs"), "--pair-list", str(tmp_path / "pair.list"),
            "--resume", str(faces / "checkpoint.pth.tar"))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--multiprocessing-distributed", "--nproc-per-node", "2"]], ids=["one", "two"])
def test_a_mistake_is_one_line_and_exit_status_2(tmp_path: Path, flags: list[str]) -> None:
    bad = tmp_path
    (bad / "0").mkdir(parents=True)
    for image in range(4):
        Image.new("RGB", (112, 112 - image // 3)).save(bad / "0" / f"{image}.png")
    (bad / "pair.list").write_text("0/0.png 0/1.png 1\n0/1.png 0/2.png 1\n0/0.png 0/3.png 0\n0/1.png 0/3.png 0\n")
    result = script(
        ROOT, "valid.py", "--imgs-root", str(bad), "--pair-list", str(bad / "pair.list"), "--device", "cpu",
        "--untrained", "-a", "mobilefacenet", "-workers", "2", *flags,
    )
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if not line.startswith("warning: too few pairs")]
    assert len(errors) == 1 and re.match(r"error: .*3\.png: .*112x111", errors[0])
