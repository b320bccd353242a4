"""Reports: what valid.py --report and --calibration write, and what scripts/report.py and embed.py make of it."""

from __future__ import annotations

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.evaluation import ALONE, Pixels, pack, save_checkpoint, write_pairs
from torch import nn

import valid
from models import build_backbone
from scripts import embed
from scripts import report as program
from utils.checkpoint.weights import open_weights, weights_fingerprint
from utils.errors import UserError
from utils.evaluation import svg
from utils.evaluation.calibration import read_calibration
from utils.evaluation.operating_points import PairScores
from utils.evaluation.protocol import Result
from utils.evaluation.report import RunReport, SetReport, _read_set, encode_page, read_json, render, summarise, to_json
from utils.evaluation.sets import Source, evaluate_set, open_sets

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>\udcff\x1b[2J'
VOID = {"meta", "link", "img", "path", "polyline", "polygon", "circle"}


class Checked(HTMLParser):
    """A page whose elements are closed in order, and which refers to nothing outside it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []
        assert "script" not in self.tags and not re.search(r"https?:|url\(|@import", text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on") and "\x1b" not in (value or "")
            assert name not in ("src", "href", "xlink:href") or value.startswith("data:")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("faces"))


def result_of(faces: Path, backbone: nn.Module) -> Result:
    eval_set, = open_sets([Source("pairs", str(faces / "pair.list"), "--pair-list", str(faces / "imgs"))])
    result = evaluate_set(backbone, eval_set, ALONE, batch_size=24, workers=0)
    assert result is not None
    return result


@pytest.fixture(scope="module")
def summary(faces: Path) -> SetReport:
    return summarise("lfw", result_of(faces, Pixels()), [0.1, 0.01])


def run_files(directory: Path, summary: SetReport | None, rows: list[dict] | None = None) -> Path:
    """The files of a run: metrics.jsonl of `rows`, and report/report.json."""
    directory.mkdir(parents=True)
    if summary is not None:
        (directory / "report").mkdir()
        settings = {"lr": 0.1, "loss": directory.name, "resume": None, "loss_settings": {"margin": 0.3}}
        (directory / "report/report.json").write_bytes(to_json(RunReport("", "a model", settings, sets=[summary])))
    if rows is not None:
        (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


ROWS = [*({"step": step, "epoch": 0, "loss": None if step == 7 else 9 / step, "lr": 0.1, "nonfinite": step == 7,
           **({"top1": float(step)} if step % 10 == 0 else {})} for step in range(1, 41)),
        {"step": 20, "epoch": 0, "val": {"lfw": {"accuracy": 0.8}}},
        {"step": 40, "epoch": 0, "val": {"lfw": {"accuracy": 0.85}}}]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    def call(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
        program.main()

    return call


def test_the_page_of_one_evaluation(summary: SetReport) -> None:
    page = Checked(render([RunReport("mine", "mobilefacenet of x", {"lr": 0.1}, sets=[summary])]))
    for words in ("Report: mine", "mobilefacenet of x", "10 same and 10 different pairs of 8 identities", "0.1",
                  "FAR 0.01 cannot be estimated: it needs 100 different pairs or more, and the set has 10",
                  "false accepts", "false rejects", "Calibrated on these pairs"):
        assert words in page.text, words
    assert page.tags.count("svg") == 3 and page.tags.count("img") == 2 * sum(len(s.pairs) for s in summary.montage) > 0


def test_names_from_files_have_no_effect(summary: SetReport) -> None:
    hostile = SetReport(**{**vars(summary), "name": HOSTILE, "text": HOSTILE, "pairs": HOSTILE})
    rows = [{**row, "val": {HOSTILE: row["val"]["lfw"]}} if "val" in row else row for row in ROWS]
    steps = [{**row, "loss": row["loss"] or np.nan} for row in rows if "val" not in row]
    evaluations = [{"step": row["step"], "accuracy": {HOSTILE: 0.5}} for row in rows if "val" in row]
    runs = [RunReport(HOSTILE + str(i), HOSTILE, {HOSTILE: HOSTILE + str(i), "x": (HOSTILE,)}, steps, evaluations,
                      [hostile]) for i in range(3)]
    for some in (runs, runs[:1]):
        page = encode_page(render(some)).decode()
        assert "alert(1)" in Checked(page).text
    assert read_like(hostile, HOSTILE).name.startswith('"><script>')


def read_like(summary: SetReport, name: str) -> SetReport:
    content = json.loads(to_json(RunReport(name, "", {}, sets=[summary])))
    return _read_set(content["sets"][0])


def test_report_json_keeps_all_but_the_pictures_quality(summary: SetReport, tmp_path: Path) -> None:
    run_files(tmp_path / "a", summary)
    read = read_json(str(tmp_path / "a/report/report.json"), "a")
    assert read.settings["loss_settings"] == {"margin": 0.3} and read.model == "a model"
    one, = read.sets
    plain = [render([RunReport("x", sets=[SetReport(**{**vars(s), "montage": ()})])]) for s in (one, summary)]
    assert plain[0] == plain[1]
    for before, after in zip(summary.montage, one.montage):
        assert before.title == after.title
        for (first, _, caption), (kept, _, kept_caption) in zip(before.pairs, after.pairs):
            assert caption == kept_caption and np.abs(first.astype(int) - kept.astype(int)).mean() < 12


def test_a_set_whose_embeddings_are_not_numbers(faces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.full((len(images), 4), float("nan"))

    one = summarise("lfw", result_of(faces, Broken()), [0.1])
    assert "20 of 20 pairs lack a usable embedding" in capsys.readouterr().err
    assert one.calibration is None and one.points[0].threshold is None
    for report in (one, read_like(one, "x")):
        text = Checked(render([RunReport("broken", sets=[report])])).text
        assert "20 pairs have no usable embedding and count as errors" in text and "cannot be reached" in text


def test_a_set_without_scores_of_pairs() -> None:
    result = Result(0.5, "", {}, "Rank 1: 0.5", "", {})
    one = summarise("tiny", result, [0.1])
    assert one.describe_points() == "tiny: has no scores of pairs, so no FAR"
    pairs = PairScores(np.array([0.5, 0.1]), np.array([True, False]), np.array([0, 0]), np.array([0, 1]), "made up")
    assert summarise("ijb", Result(0.5, "", {}, "", "", {}, scores=lambda: pairs), [0.1]).threshold is None
    assert "Rank 1: 0.5" in Checked(render([RunReport("x", sets=[one])])).text


def test_pages_of_runs(summary: SetReport, tmp_path: Path, command, capsys: pytest.CaptureFixture[str]) -> None:
    first = run_files(tmp_path / "arcface", summary, ROWS)
    second = run_files(tmp_path / "cosface", SetReport(**{**vars(summary), "counts": (9, 9)}), ROWS[:30])
    third = run_files(tmp_path / "only-log", None, ROWS)
    command(first)
    page = Checked((first / "report.html").read_text())
    assert "1 steps have a loss that is inf or NaN" in page.text and page.tags.count("svg") == 3 + 4
    assert "margin" in page.text and "loss-settings" not in page.text
    with pytest.raises(UserError, match="report.html: exists.*--force"):
        command(first)
    command(first, second, third, "--output", tmp_path / "all.html")
    page = Checked((tmp_path / "all.html").read_text())
    assert "85.00 % at step 40" in page.text and "different pairs: do not compare them" in page.text
    assert page.text.count("cosface") >= 5
    command(first, tmp_path / "cosface/report", "--output", tmp_path / "two.html")  # the directory of a report


@pytest.mark.parametrize("arguments, message", [
    (["{root}/none"], "none: no such directory"),
    (["{root}/empty"], "empty: has neither metrics.jsonl nor report.json"),
    (["{root}/log", "{root}/log", "--output", "x.html"], "log: given twice"),
    (["{root}/log", "{root}/empty"], "--output is missing"),
    (["{root}/log", "--output", "x.png"], "--output x.png: the name must end in .html"),
    (["{root}/log", "--output", "/nowhere/x.html"], "--output /nowhere/x.html: there is no directory"),
    (["{root}/torn"], "torn/metrics.jsonl: line 2 has no step, loss and lr"),
    (["{root}/digits"], "digits/metrics.jsonl: line 1 has no step"),
    (["{root}/deep"], "deep/metrics.jsonl: line 1 "),
    (["{root}/json"], "json/report.json: is no report of valid.py, or a damaged one"),
    (["{root}/version"], "version/report.json: was written by another version"),
])
def test_mistakes(arguments: list[str], message: str, tmp_path: Path, command) -> None:
    for name, file, content in (
            ("log", "metrics.jsonl", json.dumps(ROWS[0])), ("torn", "metrics.jsonl", f"{json.dumps(ROWS[0])}\nx\n{{}}"),
            ("digits", "metrics.jsonl", f'{{"step": {"1" * 400}, "loss": 1, "lr": 1}}\n{json.dumps(ROWS[0])}'),
            ("deep", "metrics.jsonl", "[" * 100_000 + "\n" + '{"step": 1e999, "loss": 1, "lr": 1}\nx'),
            ("json", "report.json", '{"report": 1, "sets": 3}'), ("version", "report.json", '{"report": 2}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(content)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        command(*(part.format(root=tmp_path) for part in arguments))
    assert "\n" not in str(caught.value)


def test_damaged_reports_are_one_error(summary: SetReport, tmp_path: Path) -> None:
    """Any value in report.json may be of another kind, or missing."""
    path = run_files(tmp_path / "a", summary) / "report/report.json"
    content, refused = json.loads(path.read_bytes()), 0
    one = content["sets"][0]
    for name in list(one):
        for value in (None, 3, "x", [], [[]], {}, {"far": [0], "tar": [1], "low": [1], "high": [1]}, [[1], [1], [1]],
                      [[0, 1], [None], [1]], [[0, 1], [1], [float("inf")]],
                      [{"title": "t", "pairs": [["AAAA", "AAAA", "c"]]}], float("inf")):
            path.write_text(json.dumps({**content, "sets": [{**one, name: value}]}))
            try:
                Checked(render([read_json(str(path), "a")]))
            except UserError as error:
                assert str(error).endswith("write it again")
                refused += 1
    assert refused > 40
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match="damaged"):
        read_json(str(path), "a")


def test_a_run_with_a_report_needs_no_metrics(summary: SetReport, tmp_path: Path, command, capsys) -> None:
    run_files(tmp_path / "a", summary)
    (tmp_path / "a" / "metrics.jsonl").touch()  # as a run that was killed at once leaves it
    command(tmp_path / "a", "--output", tmp_path / "page.html")
    assert "warning" in capsys.readouterr().err and "svg" in Checked((tmp_path / "page.html").read_text()).tags


def test_charts() -> None:
    axis = svg.axis_of("x", [np.array([1e-5, np.nan, 0.3])])
    assert axis.log and (axis.low, axis.high) == (1e-5, 1.0)
    assert [label for _, label in axis.ticks()] == ["10⁻⁵", "10⁻⁴", "10⁻³", "10⁻²", "10⁻¹", "1"]
    np.testing.assert_allclose(axis.place([1e-5, 1e-3, 1, 0, np.nan]), [0, 0.4, 1, 0, np.nan])
    assert [label for _, label in svg.Axis("x", 0, 2_500_000).ticks()][:2] == ["0", "500k"]
    assert [value for value, _ in svg.Axis("x", -0.3, 0.9).ticks()] == pytest.approx([-0.2, 0, 0.2, 0.4, 0.6, 0.8])
    for values in ([], [3.0], [np.nan], [0.0, 0.0], [1e-300, 1e300], [-5e-324, 0]):
        chart = svg.Chart("t", svg.axis_of("x", [np.array(values)]), svg.axis_of("y", [np.array(values)]))
        chart.line(values, values, 0)
        assert "nan" not in chart.render() and "inf" not in chart.render()
    chart = svg.Chart("t", svg.Axis("x", 0, 100), svg.Axis("y", 0, 1))
    chart.line(range(100), [np.nan if i in (20, 21, 50) else 0.5 for i in range(100)], 7)
    assert chart.render().count("<polyline") == 3 and "stroke-dasharray" in chart.render()


def valid_main(faces: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    monkeypatch.setattr(sys, "argv", ["valid.py", "--imgs-root", str(faces / "imgs"), "--pair-list",
                                      str(faces / "pair.list"), "--device", "cpu", "-j", "0", *more])
    valid.main()


@pytest.mark.slow
def test_valid_and_embed(faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                         monkeypatch: pytest.MonkeyPatch) -> None:
    """valid.py writes a report and a calibration; embed.py applies it to the same weights only."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(faces / "checkpoint.pth.tar", run)
    (run / "metrics.jsonl").write_text("no\nlog\n")
    checkpoint, fitted = str(run / "checkpoint.pth.tar"), tmp_path / "calibration.json"
    valid_main(faces, monkeypatch, "--resume", checkpoint, "--report", str(tmp_path / "report"), "--calibration",
               str(fitted), "--far", "0.1,0.001", "--flip")
    output, errors = capsys.readouterr()
    assert "metrics.jsonl: line 1 has no step, loss and lr: no; the report has no curves" in errors
    point = re.search(r"FAR 0\.1: threshold (-?\d\.\d{4}) \[.*\], TAR \d\.\d{4} \[.*\], 1 of 10 different", output)
    assert point and "FAR 0.001: cannot be estimated" in output
    assert "with mirrored images" in Checked((tmp_path / "report/report.html").read_text()).text
    calibration = read_calibration(str(fitted), "--calibration")
    assert calibration.flip and calibration.weights == weights_fingerprint(open_weights(checkpoint).backbone)
    assert [far for far, _, _ in calibration.thresholds] == [0.1]

    def embed_main(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["embed.py", str(faces / "imgs/0/0.jpg"), str(faces / "imgs/0/1.jpg"),
                                          "--device", "cpu", "-j", "0", *more])
        embed.main()
        return capsys.readouterr().out

    lines = embed_main("--resume", checkpoint, "--calibration", str(fitted), "--flip").splitlines()
    cosine, threshold = float(lines[0].split()[-1]), float(point[1])
    expected = 1 / (1 + np.exp(-(calibration.slope * cosine + calibration.intercept)))
    assert float(lines[2].split()[4]) == pytest.approx(expected, abs=1e-5)
    assert lines[3].startswith(f"FAR 0.1: {'accepted' if cosine > threshold else 'rejected'} (threshold {point[1]} [")
    with pytest.raises(UserError, match="--calibration .*: was fitted with --flip; add the flag"):
        embed_main("--resume", checkpoint, "--calibration", str(fitted))
    torch.manual_seed(9)
    save_checkpoint(build_backbone("mobilefacenet"), tmp_path / "other.pth.tar")
    with pytest.raises(UserError, match="was fitted with other weights than those of .*other.pth.tar"):
        embed_main("--resume", str(tmp_path / "other.pth.tar"), "--calibration", str(fitted), "--flip")
    with pytest.raises(UserError, match="--calibration .*: is for the similarity of two images"):
        embed_main("--resume", checkpoint, "--calibration", str(fitted), "--output", str(tmp_path / "x.npy"))


@pytest.mark.parametrize("flags, message", [
    (["--far", "0.1,1"], "--far 0.1,1: give a number above 0 and below 1"),
    (["--far", "0"], "--far 0: give a number above 0"),
    (["--report", "/dev/null"], "--report /dev/null: cannot be written"),
    (["--json", "a", "--calibration", "a"], "--calibration a: is also the file of --json"),
    (["--calibration", "{faces}/pair.list"], "--calibration .*pair.list: is the same file as"),
    (["--calibration", "a", "--bin", "{faces}/lfw.bin"], "--calibration a: is fitted on one set; give one"),
])
def test_mistakes_of_valid(flags: list[str], message: str, faces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(faces, faces / "lfw.bin")
    monkeypatch.setattr(valid, "evaluate_set", lambda *_, **__: pytest.fail("embedded"))
    with pytest.raises(UserError, match=message):
        valid_main(faces, monkeypatch, "--untrained", "-a", "mobilefacenet",
                   *(flag.format(faces=faces) for flag in flags))


@pytest.mark.parametrize("change", [
    {"slope": "3"}, {"slope": None}, {"intercept": float("nan")}, {"weights": 3}, {"flip": 1}, {"extra": 1},
    {"thresholds": 3}, {"thresholds": [[1, 2]]}, {"thresholds": [["a", 1, None]]}, {"calibration": 9}, None])
def test_damaged_calibrations_are_one_error(change: dict | None, tmp_path: Path) -> None:
    good = {"calibration": 1, "slope": 3.0, "intercept": -1.0, "cost": 0.5, "weights": "a", "flip": False, "set": "lfw",
            "same_pairs": 3, "different_pairs": 4, "thresholds": [[0.1, 0.3, [0.2, 0.4]], [0.01, 0.4, None]]}
    path = tmp_path / "c.json"
    path.write_text(json.dumps(good))
    assert read_calibration(str(path), "--calibration").probability(1 / 3) == pytest.approx(0.5)
    path.write_text(json.dumps(good | change) if change is not None else "[" * 100_000)
    with pytest.raises(UserError, match="--calibration .*c.json: (is no calibration|was written by another version)"):
        read_calibration(str(path), "--calibration")
    with pytest.raises(UserError, match="--calibration .*none: cannot be read"):
        read_calibration(str(tmp_path / "none"), "--calibration")
