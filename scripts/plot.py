#!/usr/bin/env python3
"""Draw a training curve, or ROC curves.

    python3 scripts/plot.py --metrics DIR/metrics.jsonl --output curve.png
    python3 scripts/plot.py --roc result.json[=label] [--roc other.json=label] --output roc.png
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import NoReturn

import numpy as np

# The script's own directory is on sys.path, the repository's root is not.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from utils.errors import UserError, exit_on_user_error  # noqa: E402
from utils.evaluation.plots import (
    COLOURS,
    GRAY,
    PLOT_FORMATS,
    RocCurve,
    check_picture,
    draw_roc,
    line_style,
    require_matplotlib,
    tidy,
)  # noqa: E402


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see python3 scripts/plot.py --help)")


def main() -> None:
    options = parse_options()
    require_matplotlib("--metrics" if options.metrics is not None else "--roc")
    if options.metrics is not None:
        plot_metrics(options.metrics, options.output)
    else:
        draw_roc([curve for argument in options.roc for curve in read_roc(argument)], options.output)
    print(f"=> {options.output}")


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = _Parser(allow_abbrev=False, description="Draw a training curve, or ROC curves, as a picture.")
    parser.add_argument("--metrics", metavar="FILE", help="metrics.jsonl of a training run")
    parser.add_argument("--roc", action="append", metavar="FILE[=LABEL]",
                        help="what valid.py --json wrote; may be repeated")
    parser.add_argument("--output", required=True, metavar="FILE", help="picture to write: .png, .svg or .pdf")
    options = parser.parse_args(argv)
    if (options.metrics is None) == (options.roc is None):
        raise UserError("give either --metrics FILE or --roc FILE")
    check_picture("--output", options.output, PLOT_FORMATS)
    directory = os.path.dirname(options.output) or "."
    if not os.path.isdir(directory):
        raise UserError(f"--output {options.output}: there is no directory {directory}")
    return options


def read_metrics(path: str) -> tuple[list[dict], list[dict]]:
    """(lines of steps, lines of evaluations) of a metrics.jsonl; a last line that a stopped run left unfinished is
    ignored. Raises UserError."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise UserError(f"--metrics {path}: {error.strerror}") from None
    steps, evaluations = [], []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if "val" in row:
                accuracies = {name: float(result["accuracy"]) for name, result in row["val"].items()}
                evaluations.append({"step": int(row["step"]), "accuracy": accuracies})
            else:
                loss = np.nan if row["loss"] is None else float(row["loss"])  # null: it was inf or NaN
                steps.append({**row, "step": int(row["step"]), "loss": loss, "lr": float(row["lr"])})
        except (ValueError, TypeError, KeyError, AttributeError):
            if number == len(lines):
                break
            raise UserError(f"--metrics {path}: line {number} has no step, loss and lr: {line[:60]}") from None
    if not steps:
        raise UserError(f"--metrics {path}: holds no complete line yet")
    return steps, evaluations


def read_roc(argument: str) -> list[RocCurve]:
    """`FILE` or `FILE=LABEL` -> the curve of what valid.py wrote, or of each of its sets. Raises UserError."""
    path, _, label = argument.partition("=") if not os.path.exists(argument) else (argument, "", "")
    label = label or os.path.splitext(os.path.basename(path))[0]
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        several = content["sets"].items() if "sets" in content else ()
        curves = []
        for name, result in [(f"{label}, {name}", result) for name, result in several] or [(label, content)]:
            fpr, tpr = (np.asarray(result[rate], dtype=float) for rate in ("fpr", "tpr"))
            if fpr.ndim != 1 or fpr.shape != tpr.shape or not len(fpr):
                raise ValueError
            curves.append(RocCurve(name, fpr, tpr, float(result["accuracy"]), float(result["auc"])))
        return curves
    except OSError as error:
        raise UserError(f"--roc {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"--roc {path}: not a result that valid.py --json wrote") from None


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` values, over fewer at the ends, and over the finite ones only: as long as `values`."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    places = np.arange(len(values))
    first, last = np.maximum(places - window // 2, 0), np.minimum(places + window // 2 + 1, len(values))
    with np.errstate(invalid="ignore"):  # nan where a window has no finite value
        return (sums[last] - sums[first]) / (counts[last] - counts[first])


def plot_metrics(path: str, output: str) -> None:
    """Loss, accuracies where they were reported, and learning rate over the steps of the run in `path`."""
    import matplotlib

    matplotlib.use("Agg")  # writes files, needs no screen
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    rows, evaluations = read_metrics(path)
    step, loss, lr = (np.array([row[name] for row in rows], dtype=float) for name in ("step", "loss", "lr"))
    reports = [row for row in rows if "top1" in row]
    heights = (3, *([2] if reports else []), *([2] if evaluations else []), 1.2)
    figure, panels = pyplot.subplots(
        len(heights), 1, sharex=True, figsize=(8, 2.4 + 2.1 * (len(heights) - 1)), height_ratios=heights,
        layout="constrained",
    )

    marker = "o" if len(rows) == 1 else None  # a single point makes no line
    window = max(len(rows) // 25, 1)
    panels[0].plot(step, loss, color=COLOURS[0], alpha=0.3 if window > 1 else 1, linewidth=0.9, marker=marker, label="each step")
    if window > 1:
        panels[0].plot(step, smoothed(loss, window), color=COLOURS[0], linewidth=2, label=f"mean of {window} steps")
        panels[0].legend(frameon=False)
    finite = loss[np.isfinite(loss)]
    if len(finite) and finite.min() > 0 and finite.max() > 30 * finite.min():
        panels[0].set_yscale("log")
    tidy(panels[0], "loss")

    if reports:
        at = [row["step"] for row in reports]
        for name, colour, label in (("top5", COLOURS[2], "top 5"), ("top1", COLOURS[1], "top 1")):
            panels[1].plot(at, [row.get(name, np.nan) for row in reports], color=colour, linewidth=1.6, marker="o",
                           markersize=3 if len(reports) < 60 else 0, label=label)
        panels[1].set_ylim(bottom=0)
        panels[1].legend(frameon=False, loc="upper left")
        tidy(panels[1], "training accuracy, %")

    if evaluations:
        for number, name in enumerate(dict.fromkeys(name for row in evaluations for name in row["accuracy"])):
            points = [(row["step"], 100 * row["accuracy"][name]) for row in evaluations if name in row["accuracy"]]
            panels[-2].plot(*zip(*points), **line_style(number), linewidth=1.6, marker="o",
                            markersize=3 if len(points) < 60 else 0, label=name)
        panels[-2].legend(frameon=False, loc="lower right")
        tidy(panels[-2], "pair accuracy, %")

    panels[-1].plot(step, lr, color=GRAY, linewidth=1.6, marker=marker)
    if lr.min() > 0 and lr.max() > 30 * lr.min():
        panels[-1].set_yscale("log")
    else:
        panels[-1].set_ylim(bottom=0)
    tidy(panels[-1], "learning rate")
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels()
    last = smoothed(loss, window)[-1]
    figure.suptitle(f"Training: {len(rows):,} steps, loss {loss[0]:.2f} to {last:.2f}")
    figure.savefig(output, dpi=130)


if __name__ == "__main__":
    exit_on_user_error(main)
