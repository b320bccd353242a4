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
from typing import TYPE_CHECKING, NoReturn

import numpy as np

# The script's own directory is on sys.path, the repository's root is not.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from utils.errors import UserError, exit_on_user_error  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0b6fb8", "#c2571a", "#2f8f46", "#8a4fb0", "#444444")
GRAY = "#8a8a8a"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see python3 scripts/plot.py --help)")


def main() -> None:
    options = parse_options()
    try:
        import matplotlib
    except ImportError:
        raise UserError("matplotlib is missing: pip install matplotlib") from None
    matplotlib.use("Agg")  # writes files, needs no screen
    if options.metrics is not None:
        plot_metrics(options.metrics, options.output)
    else:
        plot_roc(options.roc, options.output)
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
    if os.path.splitext(options.output)[1].lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"--output {options.output}: the name must end in .png, .svg or .pdf")
    directory = os.path.dirname(options.output) or "."
    if not os.path.isdir(directory):
        raise UserError(f"--output {options.output}: there is no directory {directory}")
    return options


def read_metrics(path: str) -> list[dict]:
    """The lines of a metrics.jsonl; a last line that a stopped run left unfinished is ignored. Raises UserError."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise UserError(f"--metrics {path}: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            loss = np.nan if row["loss"] is None else float(row["loss"])  # null: it was inf or NaN
            rows.append({**row, "step": int(row["step"]), "loss": loss, "lr": float(row["lr"])})
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                break
            raise UserError(f"--metrics {path}: line {number} has no step, loss and lr: {line[:60]}") from None
    if not rows:
        raise UserError(f"--metrics {path}: holds no complete line yet")
    return rows


def read_roc(argument: str) -> tuple[dict, str]:
    """`FILE` or `FILE=LABEL` -> (what valid.py wrote, label). Raises UserError."""
    path, _, label = argument.partition("=") if not os.path.exists(argument) else (argument, "", "")
    try:
        with open(path, encoding="utf-8") as file:
            result = json.load(file)
        rates = [np.asarray(result[name], dtype=float) for name in ("fpr", "tpr")]
        if rates[0].ndim != 1 or rates[0].shape != rates[1].shape or not len(rates[0]):
            raise ValueError
        numbers = {name: float(result[name]) for name in ("accuracy", "auc")}
        result = {"fpr": rates[0], "tpr": rates[1], **numbers}
    except OSError as error:
        raise UserError(f"--roc {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"--roc {path}: not a result that valid.py --json wrote") from None
    return result, label or os.path.splitext(os.path.basename(path))[0]


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` values, over fewer at the ends, and over the finite ones only: as long as `values`."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    places = np.arange(len(values))
    first, last = np.maximum(places - window // 2, 0), np.minimum(places + window // 2 + 1, len(values))
    with np.errstate(invalid="ignore"):  # nan where a window has no finite value
        return (sums[last] - sums[first]) / (counts[last] - counts[first])


def _tidy(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.grid(True, color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def plot_metrics(path: str, output: str) -> None:
    """Loss, accuracy where it was reported, and learning rate over the steps of the run in `path`."""
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    rows = read_metrics(path)
    step, loss, lr = (np.array([row[name] for row in rows], dtype=float) for name in ("step", "loss", "lr"))
    reports = [row for row in rows if "top1" in row]
    heights = (3, 2, 1.2) if reports else (3, 1.2)
    figure, panels = pyplot.subplots(
        len(heights), 1, sharex=True, figsize=(8, 2.4 + 2.1 * (len(heights) - 1)), height_ratios=heights,
        layout="constrained",
    )

    marker = "o" if len(rows) == 1 else None  # a single point makes no line
    panels[0].plot(step, loss, color=COLOURS[0], alpha=0.3, linewidth=0.9, marker=marker, label="each step")
    window = max(len(rows) // 25, 1)
    if window > 1:
        panels[0].plot(step, smoothed(loss, window), color=COLOURS[0], linewidth=2, label=f"mean of {window} steps")
        panels[0].legend(frameon=False)
    finite = loss[np.isfinite(loss)]
    if len(finite) and finite.min() > 0 and finite.max() > 30 * finite.min():
        panels[0].set_yscale("log")
    _tidy(panels[0], "loss")

    if reports:
        at = [row["step"] for row in reports]
        for name, colour, label in (("top5", COLOURS[2], "top 5"), ("top1", COLOURS[1], "top 1")):
            panels[1].plot(at, [row.get(name, np.nan) for row in reports], color=colour, linewidth=1.6, marker="o",
                           markersize=3 if len(reports) < 60 else 0, label=label)
        panels[1].set_ylim(bottom=0)
        panels[1].legend(frameon=False, loc="upper left")
        _tidy(panels[1], "training accuracy, %")

    panels[-1].plot(step, lr, color=GRAY, linewidth=1.6, marker=marker)
    if lr.min() > 0 and lr.max() > 30 * lr.min():
        panels[-1].set_yscale("log")
    else:
        panels[-1].set_ylim(bottom=0)
    _tidy(panels[-1], "learning rate")
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels()
    last = smoothed(loss, window)[-1]
    figure.suptitle(f"Training: {len(rows):,} steps, loss {loss[0]:.2f} to {last:.2f}")
    figure.savefig(output, dpi=130)


def plot_roc(arguments: list[str], output: str) -> None:
    """The ROC curves of the results in `arguments` (FILE or FILE=LABEL), with a logarithmic false accept rate."""
    from matplotlib import pyplot

    results = [read_roc(argument) for argument in arguments]
    # rates are means over folds of a few hundred pairs: below the smallest one above 0 there is nothing to see
    least = min((float(rate) for result, _ in results for rate in result["fpr"] if rate > 0), default=1e-3)
    left = 10.0 ** np.floor(np.log10(min(least, 0.1)))
    figure, axes = pyplot.subplots(figsize=(7, 5.2), layout="constrained")
    for number, (result, label) in enumerate(results):
        # from the left edge (a rate of 0 has no place on this axis) to (1, 1), where everything is accepted
        fpr, tpr = np.append(np.maximum(result["fpr"], left), 1.0), np.append(result["tpr"], 1.0)
        axes.step(fpr, tpr, where="post", color=COLOURS[number % len(COLOURS)], linewidth=2,
                  label=f"{label}: accuracy {100 * result['accuracy']:.1f} %, AUC {result['auc']:.3f}")
    chance = np.geomspace(left, 1.0, 200)
    axes.plot(chance, chance, color=GRAY, linewidth=1, linestyle="--", label="chance")
    axes.set_xscale("log")
    axes.set_xlim(left, 1.0)
    axes.set_ylim(0.0, 1.01)
    axes.set_xlabel("false accept rate (different people taken for one)")
    _tidy(axes, "true accept rate (one person recognised)")
    figure.legend(frameon=False, loc="outside lower center")  # outside: a good curve runs along the top
    axes.set_title("Verification: ROC")
    figure.savefig(output, dpi=130)


if __name__ == "__main__":
    exit_on_user_error(main)
