"""A report of one or several runs as one HTML page: settings, curves of training, error rates, the worst errors.

valid.py --report writes the page of what it evaluated, and its content as report.json, of which scripts/report.py
makes pages that compare runs.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from utils.errors import UserError
from utils.evaluation import html, svg
from utils.evaluation.calibration import calibration_cost, fit_logistic
from utils.evaluation.curves import METRICS_FILE, read_metrics, smooth
from utils.evaluation.operating_points import Curve, OperatingPoint, Verification
from utils.evaluation.protocol import MontageSection, Result
from utils.files import atomic_write, open_bounded

PAGE_FILE, CONTENT_FILE = "report.html", "report.json"
VERSION = 1
_MAX_BYTES = 2**28  # of a report.json: the worst errors of a hundred sets
_MOST_POINTS = 400  # of a curve


@dataclass(frozen=True)
class SetReport:
    """One evaluation set. Without scores of pairs only `text`, the montage, and perhaps the curve are there."""

    name: str
    text: str  # the lines that valid.py prints
    pairs: str = ""  # how many, and of whom
    counts: tuple[int, int] = (0, 0)  # same and different pairs
    accuracy: float | None = None
    accuracy_std: float | None = None
    threshold: float | None = None  # the cosine with the best accuracy, which the montage uses
    points: tuple[OperatingPoint, ...] = ()
    curve: Curve | None = None
    histogram: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    calibration: tuple[float, float, float] | None = None  # slope, intercept and cost
    montage: tuple[MontageSection, ...] = ()

    def describe_points(self) -> str:
        """Lines: the thresholds and the rates there."""
        return "\n".join(point.describe() for point in self.points) or f"{self.name}: has no scores of pairs, so no FAR"


@dataclass(frozen=True)
class RunReport:
    """One run, or one evaluation of a model."""

    name: str
    model: str = ""  # what was evaluated, in words
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the training
    steps: Sequence[Mapping[str, Any]] = ()  # as read_metrics returns them
    evaluations: Sequence[Mapping[str, Any]] = ()
    sets: Sequence[SetReport] = ()


def describe_run(directory: str | None, model: str, settings: Mapping[str, Any]) -> RunReport:
    """What is known of a training whose files are in `directory`; its curves, if their file is there and readable."""
    steps, evaluations = list[dict[str, Any]](), list[dict[str, Any]]()
    if directory is not None and os.path.exists(path := os.path.join(directory, METRICS_FILE)):
        try:
            steps, evaluations = read_metrics(path)
        except UserError as error:
            print(f"warning: {error}; the report has no curves of training", file=sys.stderr)
    return RunReport(os.path.basename(directory or "") or model, model, settings, steps, evaluations)


def summarise(name: str, result: Result, fars: Sequence[float]) -> SetReport:
    """The report of a set, with its operating points at these false accept rates if it has scores of pairs."""
    montage = tuple(result.montage()) if result.montage else ()
    if result.scores is None:
        if not result.curves:
            return SetReport(name, result.report, montage=montage)
        roc = result.curves[0]
        far, tar = roc.fpr[roc.fpr > 0], roc.tpr[roc.fpr > 0]
        return SetReport(name, result.report, "the protocol's pairs of templates, without intervals",
                         curve=Curve(far, tar, tar, tar) if len(far) else None, montage=montage)
    pairs = result.scores()
    verification = Verification(pairs)
    same, different = len(verification.same), len(verification.different)
    calibration = None
    with contextlib.suppress(UserError):  # nothing to calibrate
        line = fit_logistic(pairs.cosine, pairs.is_same)
        calibration = (*line, calibration_cost(pairs.cosine, pairs.is_same, *line))
    threshold = result.metrics.get("threshold")  # a squared distance
    text = (f"{same:,} same and {different:,} different pairs of {pairs.num_identities:,} identities (known by "
            f"{pairs.identities}); intervals of 95 % from {pairs.replicates:,} replicates of the identities")
    if pairs.undecidable:
        text += f"; {pairs.undecidable:,} pairs have no usable embedding and count as errors"
    return SetReport(
        name, result.report, text, (same, different), result.metrics.get("accuracy"),
        result.metrics.get("accuracy_std"), None if threshold is None else 1 - threshold / 2,
        tuple(verification.points(fars)), verification.curve(), verification.histogram(), calibration, montage)


# ---------------------------------------------------------------------------------------------------------------------
# report.json


def to_json(run: RunReport) -> bytes:
    """The model, the settings and the sets of a run; its training curves stay in metrics.jsonl."""
    content = {"report": VERSION, "model": run.model, "settings": dict(run.settings),
               "sets": [dataclasses.asdict(dataclasses.replace(one, montage=())) | {"montage": [
                   {"title": section.title, "pairs": [[_encode(a), _encode(b), caption]
                                                      for a, b, caption in section.pairs]}
                   for section in one.montage]} for one in run.sets]}
    return json.dumps(_plain(content), allow_nan=False).encode() + b"\n"


def _plain(value: Any) -> Any:
    """Strict JSON: arrays become lists, and numbers that are not finite null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(one) for one in (value.tolist() if isinstance(value, np.ndarray) else value)]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, type(None))) else str(value)


def _encode(image: np.ndarray) -> str:
    """uint8 (3, height, width) -> JPEG in base64."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(file, "JPEG", quality=90)
    return base64.b64encode(file.getvalue()).decode()


def _decode(text: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["JPEG"]) as image:
            if max(image.size) > 1024:
                raise ValueError
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    except OSError:  # Pillow's error for a damaged image
        raise ValueError from None


def read_json(path: str, name: str) -> RunReport:
    """Read a report.json of valid.py. name: what the page calls the run. Raises UserError."""
    try:
        with open_bounded(path, _MAX_BYTES) as file:
            content = json.load(file)
        if content["report"] != VERSION:
            raise UserError(f"{path}: was written by another version; write it again with valid.py --report")
        return RunReport(name, str(content["model"]), dict(content["settings"]),
                         sets=[_read_set(one) for one in content["sets"]])
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError, OverflowError,
            Image.DecompressionBombError):
        raise UserError(f"{path}: is no report of valid.py, or a damaged one; write it again") from None


def _read_set(one: Mapping[str, Any]) -> SetReport:
    def optional(value: Any) -> float | None:
        return None if value is None else float(value)

    def interval(value: Any) -> tuple[float, float] | None:
        return None if value is None else (float(value[0]), float(value[1]))

    def arrays(values: Any) -> list[np.ndarray]:
        found = [np.array(part, dtype=float) for part in values]
        if any(part.ndim != 1 or not len(part) for part in found):
            raise ValueError
        return found

    points = tuple(OperatingPoint(
        float(p["far"]), optional(p["threshold"]), interval(p["threshold_interval"]), int(p["accepted"]),
        int(p["different"]), interval(p["far_interval"]), optional(p["tar"]), interval(p["tar_interval"]),
        str(p["note"])) for p in one["points"])
    curve = histogram = None
    if one["curve"] is not None:
        curve = Curve(*arrays(one["curve"][name] for name in ("far", "tar", "low", "high")))
        if len({len(part) for part in vars(curve).values()}) != 1 or not curve.far.min() > 0:
            raise ValueError
    if one["histogram"] is not None:
        edges, same, different = arrays(one["histogram"])
        if not len(edges) - 1 == len(same) == len(different) or not np.isfinite([*edges, *same, *different]).all():
            raise ValueError
        histogram = edges, same, different
    calibration: tuple[float, float, float] | None = None
    if one["calibration"] is not None:
        slope, intercept, cost = map(float, one["calibration"])
        calibration = slope, intercept, cost
    same_pairs, different_pairs = map(int, one["counts"])
    montage = tuple(MontageSection(str(section["title"]), [
        (_decode(a), _decode(b), str(caption)) for a, b, caption in section["pairs"]]) for section in one["montage"])
    return SetReport(str(one["name"]), str(one["text"]), str(one["pairs"]), (same_pairs, different_pairs),
                     optional(one["accuracy"]), optional(one["accuracy_std"]), optional(one["threshold"]), points,
                     curve, histogram, calibration, montage)


# ---------------------------------------------------------------------------------------------------------------------
# The page


def render(runs: Sequence[RunReport]) -> str:
    """The page of one run, or one that compares several."""
    names = [run.name for run in runs]
    parts = [f"<style>{svg.STYLE}</style>"]
    if len(runs) == 1 and runs[0].model:
        parts.append(html.paragraph(runs[0].model))
    set_names = list(dict.fromkeys(one.name for run in runs for one in run.sets))
    if len(runs) > 1:
        parts += ["<h2>Comparison</h2>", svg.legend(names), _comparison(runs)]
    for name in set_names:
        parts += _section(name, runs, [next((one for one in run.sets if one.name == name), None) for run in runs])
    parts += _training(runs) + _settings(runs)
    title = f"Report: {names[0]}" if len(runs) == 1 else f"Report: {len(runs)} runs"
    return html.page(title, "\n".join(parts))


def _comparison(runs: Sequence[RunReport]) -> str:
    """Each run's accuracy, and its TAR at every FAR that some set can tell."""
    fars = sorted({point.far for run in runs for one in run.sets for point in one.points if point.tar is not None},
                  reverse=True)
    rows = []
    for run in runs:
        for one in run.sets:
            tar = {point.far: _with_interval(point.tar, point.tar_interval, 4) for point in one.points
                   if point.tar is not None}
            rows.append([run.name, one.name, _accuracy(one), *(tar.get(far, "") for far in fars)])
        if not run.sets:
            last: Mapping[str, Any] = run.evaluations[-1] if run.evaluations else {"step": 0, "accuracy": {}}
            rows += [[run.name, name, f"{100 * value:.2f} % at step {last['step']:,}", *([""] * len(fars))]
                     for name, value in last["accuracy"].items()] or [[run.name, "", "", *([""] * len(fars))]]
    return html.table(["run", "set", "accuracy", *(f"TAR at FAR {far:g}" for far in fars)], rows)


def _accuracy(one: SetReport) -> str:
    return "" if one.accuracy is None else f"{100 * one.accuracy:.2f} % ± {100 * (one.accuracy_std or 0):.2f}"


def _with_interval(value: float | None, interval: tuple[float, float] | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" + (f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else "")


def _section(name: str, runs: Sequence[RunReport], found: Sequence[SetReport | None]) -> list[str]:
    """What all runs say about one evaluation set."""
    parts: list[str] = [html.heading(name)]
    reports = [(number, run, one) for number, (run, one) in enumerate(zip(runs, found)) if one is not None]
    if len({one.counts for _, _, one in reports}) > 1:
        parts.append("<p><strong>The runs were evaluated on different pairs: do not compare them.</strong></p>")
    curves = [(number, one.curve) for number, _, one in reports if one.curve is not None]
    if curves:
        if len(runs) > 1:
            parts.append(svg.legend([run.name for run in runs]))
        parts.append(_charts([("ROC", _roc(curves)), ("DET", _det(curves))] + [
            ("Scores" + (f": {run.name}" if len(runs) > 1 else ""), _scores(one)) for _, run, one in reports
            if one.histogram is not None]))
        parts.append(svg.legend(["same pairs", "different pairs"]) + "<p>The colours of the scores. Shaded bands and "
                     "numbers in brackets are intervals of 95 %.</p>")
    for _, run, one in reports:
        if len(runs) > 1:
            parts.append(html.heading(run.name, 3))
        parts.append(html.paragraph(one.pairs) if one.pairs else "")
        parts.append(f"<pre>{html.escape(one.text)}</pre>")
        if one.points:
            parts.append(_points(one))
        if one.calibration is not None:
            slope, intercept, cost = one.calibration
            sign = "−" if intercept < 0 else "+"
            parts.append(f"<p>Calibrated on these pairs: the probability that a pair with cosine c is of one person, "
                         f"if that was as likely as not before, is 1 / (1 + exp(−({slope:.4f} c {sign} "
                         f"{abs(intercept):.4f}))). Its cost C<sub>llr</sub> is {cost:.3f} bits (0 is perfect, 1 tells "
                         "nothing).</p>")
        for section in one.montage:
            parts += [html.heading(section.title, 3), html.montage([
                ((first, second), caption) for first, second, caption in section.pairs], 100)]
    return parts


def _points(one: SetReport) -> str:
    rows = [[f"{point.far:g}", *([
        _with_interval(point.threshold, point.threshold_interval, 4), _with_interval(point.tar, point.tar_interval, 4),
        f"{point.accepted:,} of {point.different:,}",
        "[{:.2g}, {:.2g}]".format(*point.far_interval) if point.far_interval else ""]
        if point.threshold is not None else [point.note.partition(":")[0], "", "", ""])] for point in one.points]
    first: dict[str, OperatingPoint] = {}  # of those that cannot be estimated for the same reason
    for point in one.points:
        first.setdefault(point.note.partition(":")[0], point)
    notes = "".join(f"<li>FAR {point.far:g} {html.escape(point.note)}</li>" for point in first.values() if point.note)
    header = ["FAR asked for", "threshold (cosine)", "TAR", "different pairs above it", "FAR, 95 %"]
    return html.table(header, rows) + (
        f"<ul>{notes}</ul><p>A pair is accepted if its cosine is above the threshold. (The cosine is 1 − distance / "
        "2.) The intervals of the threshold and of TAR come from drawing identities with replacement. That of the FAR "
        "is Clopper and Pearson's for independent pairs; pairs that share people tell less, so the truth may lie "
        "further away.</p>")


def _roc(curves: Sequence[tuple[int, Curve]]) -> svg.Chart:
    chart = svg.Chart("ROC", _far_axis(curves), svg.Axis("", 0, 1))
    for number, curve in curves:
        chart.band(curve.far, curve.low, curve.high, number)
        chart.line(curve.far, curve.tar, number, dots=False)
    return chart


def _det(curves: Sequence[tuple[int, Curve]]) -> svg.Chart:
    errors = [1 - curve.tar for _, curve in curves]
    least = min((float(part[part > 0].min()) for part in errors if np.any(part > 0)), default=0.1)
    low = 10.0 ** min(max(math.floor(math.log10(least)), -9), -1)
    chart = svg.Chart("DET", _far_axis(curves), svg.Axis("", low, 1, log=True))
    for (number, curve), error in zip(curves, errors):
        chart.band(curve.far, 1 - curve.high, 1 - curve.low, number)
        chart.line(curve.far, error, number, dots=False)
    return chart


def _far_axis(curves: Sequence[tuple[int, Curve]]) -> svg.Axis:
    least = min(float(curve.far.min()) for _, curve in curves)
    return svg.Axis("false accept rate", 10.0 ** min(math.floor(math.log10(least) + 1e-9), -1), 1, log=True)


def _scores(one: SetReport) -> svg.Chart:
    assert one.histogram is not None
    edges, same, different = one.histogram
    shares = [part / max(part.sum(), 1) for part in (same, different)]
    chart = svg.Chart("Scores", svg.axis_of("cosine", [edges]),
                      svg.Axis("", 0, 1.15 * max(float(max(part.max() for part in shares)), 1e-9)))
    for number, part in enumerate(shares):
        chart.bars(edges, part, number)
    if one.threshold is not None:
        chart.rule(one.threshold, f"best accuracy, {one.threshold:.3f}")
    for point in one.points:
        if point.threshold is not None:
            chart.rule(point.threshold, f"FAR {point.far:g}")
    return chart


def _charts(charts: Sequence[tuple[str, svg.Chart]]) -> str:
    captions = {"ROC": "ROC: true accept rate", "DET": "DET: false reject rate"}
    return '<div class="charts">' + "".join(
        f"<figure><figcaption>{html.escape(captions.get(title, title))}</figcaption>{chart.render()}</figure>"
        for title, chart in charts) + "</div>"


def _training(runs: Sequence[RunReport]) -> list[str]:
    """Loss, accuracies and learning rate of all runs over their steps."""
    trained = [(number, run) for number, run in enumerate(runs) if run.steps]
    if not trained:
        return []
    charts = []

    def add(title: str, series: Callable[[RunReport], tuple[np.ndarray, np.ndarray]], *, raw: bool = False,
            log: bool | None = None) -> None:
        lines = [(number, run, *series(run)) for number, run in trained]
        lines = [line for line in lines if np.isfinite(line[3]).any()]
        if not lines:
            return
        chart = svg.Chart(title, svg.axis_of("step", [x for _, _, x, _ in lines], log=False),
                          svg.axis_of("", [y for _, _, _, y in lines], log))
        for number, _, x, y in lines:
            if raw and len(trained) == 1:
                chart.line(*_thinned(x, y), number, faint=True)
            chart.line(*_thinned(x, smooth(y, max(len(y) // 25, 1)) if raw else y), number)
        charts.append((title, chart))

    add("loss", lambda run: _column(run.steps, "loss"), raw=True)
    add("top 1 on the training batches, %", lambda run: _column(
        [row for row in run.steps if "top1" in row], "top1"), log=False)
    for name in dict.fromkeys(name for _, run in trained for row in run.evaluations for name in row["accuracy"]):
        add(f"accuracy on {name}, %", lambda run: _column(
            [{"step": row["step"], "%": 100 * row["accuracy"][name]} for row in run.evaluations  # noqa: B023
             if name in row["accuracy"]], "%"), log=False)  # noqa: B023
    add("learning rate", lambda run: _column(run.steps, "lr"))
    lost = sum(int(np.count_nonzero(~np.isfinite(_column(run.steps, "loss")[1]))) for _, run in trained)
    note = f"<p>{lost:,} steps have a loss that is inf or NaN.</p>" if lost else ""
    names = svg.legend([run.name for run in runs]) if len(runs) > 1 else ""
    return ["<h2>Training</h2>", names, _charts(charts), note]


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values), NaN for a value that is no number."""
    values = [row.get(name) for row in rows]
    return (np.array([float(row["step"]) for row in rows]),
            np.array([float(value) if isinstance(value, (int, float)) else math.nan for value in values]))


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every k-th point and the last one, about _MOST_POINTS in all."""
    places = np.unique(np.append(np.arange(0, len(x), -(-len(x) // _MOST_POINTS) or 1), len(x) - 1))
    return x[places], y[places]


def _settings(runs: Sequence[RunReport]) -> list[str]:
    """The settings of the runs, those that differ first."""
    flat = [{**run.settings, **nested} if isinstance(nested := run.settings.get("loss_settings"), Mapping)
            else dict(run.settings) for run in runs]
    for one in flat:
        one.pop("loss_settings", None)
    names = [name for name in dict.fromkeys(name for one in flat for name in one)
             if any(one.get(name) not in (None, False, "", (), []) for one in flat)]
    if not names:
        return []

    def table(names: Sequence[str]) -> str:
        return html.table(["setting", *(run.name for run in runs)],
                          [[name.replace("_", "-"), *(_value(one.get(name)) for one in flat)] for name in names])

    differing = [name for name in names if len({_value(one.get(name)) for one in flat}) > 1]
    parts = ["<h2>Settings</h2>"]
    if len(runs) > 1:
        parts.append(table(differing) if differing else "<p>All settings are the same.</p>")
    return [*parts, f"<details{' open' if len(runs) == 1 else ''}><summary>All settings that are not off</summary>",
            table(names), "</details>"]


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def write_report(directory: str, run: RunReport) -> None:
    """Write PAGE_FILE and CONTENT_FILE. Raises OSError."""
    for name, content in ((PAGE_FILE, encode_page(render([run]))), (CONTENT_FILE, to_json(run))):
        with atomic_write(os.path.join(directory, name)) as file:
            file.write(content)


def encode_page(page: str) -> bytes:
    """UTF-8. Bytes of file names that are no text become escapes."""
    return page.encode("utf-8", "backslashreplace")
