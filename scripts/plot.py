#!/usr/bin/env python3
"""Draw a training curve, or ROC curves.

    python3 scripts/plot.py --metrics DIR/metrics.jsonl --output curve.png
    python3 scripts/plot.py --roc result.json[=label] [--roc other.json=label] --output roc.png
"""

from __future__ import annotations

import json
import os
import sys

# Python puts the script's own directory on sys.path instead of the repository's root.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

if __name__ == "__main__":
    from utils.packages import require_packages

    require_packages(["numpy"])

import numpy as np

from utils.errors import Parser, UserError, exit_on_user_error  # noqa: E402
from utils.evaluation import plots  # noqa: E402
from utils.evaluation.curves import read_metrics, smooth  # noqa: E402
from utils.evaluation.protocol import RocCurve  # noqa: E402
from utils.files import require_writable  # noqa: E402


def main() -> None:
    parser = Parser("plot.py", "Draw a training curve, or ROC curves, as a picture.")
    parser.add_argument("--metrics", metavar="FILE", help="metrics.jsonl of a training run")
    parser.add_argument("--roc", action="append", metavar="FILE[=LABEL]",
                        help="a file that valid.py --json wrote; may be repeated")
    parser.add_argument("--output", required=True, metavar="FILE", help="picture to write: .png, .svg or .pdf")
    parser.add_argument("--force", action="store_true", help="replace an existing picture")
    options = parser.parse_args()
    if (options.metrics is None) == (options.roc is None):
        raise UserError("give either --metrics FILE or --roc FILE")
    plots.check_picture("--output", options.output, plots.PLOT_FORMATS)
    require_writable("--output", options.output, force=options.force,
                     inputs=[options.metrics] if options.roc is None else map(roc_path, options.roc))
    plots.require_matplotlib("--metrics" if options.roc is None else "--roc")
    if options.roc is None:
        plot_metrics(options.metrics, options.output)
    else:
        plots.draw_roc([curve for argument in options.roc for curve in read_roc(argument)], options.output)
    print(f"=> {options.output}")


def roc_path(argument: str) -> str:
    """The file in `FILE` or `FILE=LABEL`."""
    return argument if os.path.exists(argument) else argument.partition("=")[0]


def read_roc(argument: str) -> list[RocCurve]:
    """The curves in a file that valid.py wrote, one per set. argument: `FILE` or `FILE=LABEL`. Raises UserError."""
    path = roc_path(argument)
    label = argument[len(path) + 1:] or os.path.splitext(os.path.basename(path))[0]
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        results = {f"{label}, {name}": result for name, result in content.get("sets", {}).items()} or {label: content}
        return [RocCurve(name, np.asarray(result["fpr"], dtype=float), np.asarray(result["tpr"], dtype=float),
                         float(result["accuracy"]) if "accuracy" in result else None, float(result["auc"]))
                for name, result in results.items()]
    except OSError as error:
        raise UserError(f"--roc {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"--roc {path}: not a result of valid.py --json") from None


def plot_metrics(path: str, output: str) -> None:
    """Draw loss, accuracies and learning rate over the steps of the run in `path`. Raises UserError."""
    rows, evaluations = read_metrics(path, "--metrics ")
    step, loss, lr = (np.array([row[name] for row in rows]) for name in ("step", "loss", "lr"))
    window = max(len(rows) // 25, 1)
    smoothed = smooth(loss, window)
    accuracies = {}  # label of the panel: {name: [(step, percent), ...]}
    if reports := [row for row in rows if "top1" in row]:
        accuracies["training accuracy, %"] = {
            name: [(row["step"], row.get(key, np.nan)) for row in reports]
            for name, key in (("top 1", "top1"), ("top 5", "top5"))
        }
    if evaluations:
        accuracies["pair accuracy, %"] = {
            name: [(row["step"], 100 * row["accuracy"][name]) for row in evaluations if name in row["accuracy"]]
            for name in dict.fromkeys(name for row in evaluations for name in row["accuracy"])
        }

    heights = [3, *[2] * len(accuracies), 1.2]
    figure, panels = plots.load_pyplot().subplots(
        len(heights), 1, sharex=True, figsize=(8, 2.4 + 2.1 * (len(heights) - 1)), height_ratios=heights,
        layout="constrained",
    )
    marker = "o" if len(rows) == 1 else None  # a single point makes no line
    colour = plots.COLOURS[0]
    panels[0].plot(step, loss, color=colour, alpha=0.3, linewidth=0.9, marker=marker, label="each step")
    panels[0].plot(step, smoothed, color=colour, linewidth=2, label=f"mean of {window} steps")
    panels[0].legend(frameon=False)
    for panel, curves in zip(panels[1:], accuracies.values()):
        for number, (name, points) in enumerate(curves.items(), 1):
            panel.plot(*zip(*points), **plots.line_style(number), linewidth=1.6, marker="o",
                       markersize=3 if len(points) < 60 else 0, label=name)
        panel.legend(frameon=False)
    panels[-1].plot(step, lr, color=plots.GRAY, linewidth=1.6, marker=marker)
    panels[-1].set_xlabel("step")
    panels[-1].locator_params(axis="x", integer=True)
    for panel, values in ((panels[0], loss), (panels[-1], lr)):
        finite = values[np.isfinite(values)]
        if len(finite) and 0 < 30 * finite.min() < finite.max():
            panel.set_yscale("log")
    for panel, label in zip(panels, ("loss", *accuracies, "learning rate")):
        plots.tidy(panel, label)
    figure.align_ylabels()
    figure.suptitle(f"Training: {len(rows):,} steps, loss {loss[0]:.2f} to {smoothed[-1]:.2f}")
    try:
        figure.savefig(output, dpi=130)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    exit_on_user_error(main)
