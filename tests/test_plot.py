"""scripts/plot.py: what it reads, what it draws, and its errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import run
from PIL import Image

from scripts import plot
from utils.errors import UserError


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    """`command(*arguments)`: plot.py in this process."""

    def call(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
        plot.main()

    return call


def height(path: Path) -> int:
    with Image.open(path) as picture:
        assert picture.width > 600
        return picture.height


def test_training_curve_with_an_incomplete_last_line(tmp_path: Path, command) -> None:
    rows = [{"step": step, "epoch": 0, "loss": 10 / step, "lr": 0.1} for step in range(1, 60)]
    rows[9] |= {"top1": 1.0, "top5": 4.0}
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 60, "lo')
    command("--metrics", metrics, "--output", tmp_path / "curve.png")
    plain = height(tmp_path / "curve.png")

    with metrics.open("a") as file:
        file.write('ss": 1.0, "epoch": 0, "lr": 0.1}\n')  # completes the last line
        for step, accuracy in ((20, 0.6), (60, 0.7)):
            sets = {"lfw": {"accuracy": accuracy}, "agedb": {"accuracy": 0.5}}
            file.write(json.dumps({"step": step, "epoch": 0, "val": sets}) + "\n")
    with pytest.raises(UserError, match="--output .*curve.png: exists"):
        command("--metrics", metrics, "--output", tmp_path / "curve.png")
    command("--metrics", metrics, "--output", tmp_path / "curve.png", "--force")
    assert height(tmp_path / "curve.png") > plain + 200  # one more panel

    metrics.write_text("no\n" + json.dumps(rows[0]) + "\n")
    with pytest.raises(UserError, match="--metrics .*metrics.jsonl: line 1 "):
        command("--metrics", metrics, "--output", tmp_path / "other.png")


def test_smooth_ignores_what_is_not_finite() -> None:
    np.testing.assert_allclose(plot.smooth(np.array([1.0, np.nan, 3.0, 5.0]), 3), [1, 2, 4, 4])
    assert np.isnan(plot.smooth(np.full(5, np.nan), 3)).all()


def test_roc_of_two_results(tmp_path: Path, command) -> None:
    rates = np.linspace(0, 1, 50)
    for name, power in (("good", 0.2), ("poor", 0.9)):
        result = {"accuracy": 0.8, "auc": 0.9, "fpr": rates.tolist(), "tpr": (rates**power).tolist()}
        content = result if name == "good" else {"sets": {"lfw": result, "agedb": result}}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    command("--roc", f"{tmp_path / 'good.json'}=trained", "--roc", tmp_path / "poor.json",
            "--output", tmp_path / "roc.png")
    height(tmp_path / "roc.png")
    assert [curve.label for curve in plot.read_roc(str(tmp_path / "poor.json"))] == ["poor, lfw", "poor, agedb"]
    assert [curve.label for curve in plot.read_roc(f"{tmp_path / 'good.json'}=trained")] == ["trained"]


@pytest.mark.parametrize("arguments, message", [
    (("--output", "x.png"), "--metrics FILE or --roc FILE"),
    (("--metrics", "a", "--roc", "b", "--output", "x.png"), "--metrics FILE or --roc FILE"),
    (("--metrics", "absent.jsonl", "--output", "x.png"), "--metrics absent.jsonl: "),
    (("--roc", "absent.json", "--output", "x.png"), "--roc absent.json: "),
    (("--metrics", "a", "--output", "x.exe"), "--output x.exe: .*png"),
    (("--metrics", "a", "--output", "none/x.png"), "--output none/x.png: .*no directory"),
])
def test_mistakes(tmp_path: Path, monkeypatch, command, arguments: tuple[str, ...], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        command(*arguments)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_mistake_is_one_line_and_exit_status_2(tmp_path: Path) -> None:
    message = run("scripts/plot.py", "--output", "x.png", status=2, cwd=tmp_path)
    assert message.startswith("error:") and message.count("\n") == 1
