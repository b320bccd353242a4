"""Pictures of verification results: ROC curves, and the pairs that were decided most wrongly."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT_FORMATS = (".png", ".svg", ".pdf")
MONTAGE_FORMATS = (".png", ".jpg")
COLOURS = ("#0b6fb8", "#c2571a", "#2f8f46", "#8a4fb0", "#444444")
GRAY = "#8a8a8a"
MONTAGE_COLUMNS = 6  # pairs in a row
_SIDE, _GAP, _MARGIN, _CAPTION, _TITLE = 112, 2, 10, 18, 30  # pixels


@dataclass(frozen=True)
class RocCurve:
    """A curve and what its legend says."""

    label: str
    fpr: np.ndarray  # (T,)
    tpr: np.ndarray  # (T,)
    accuracy: float
    auc: float


@dataclass(frozen=True)
class MontageRows:
    """Pairs under one title."""

    title: str
    pairs: Sequence[tuple[np.ndarray, np.ndarray, str]]  # two uint8 (3, 112, 112) and the caption


def check_picture(flag: str, path: str, formats: tuple[str, ...]) -> None:
    """Raise UserError where the name of a picture does not tell a format that can be written."""
    if os.path.splitext(path)[1].lower() not in formats:
        raise UserError(f"{flag} {path}: the name must end in {', '.join(formats[:-1])} or {formats[-1]}")


def require_matplotlib(flag: str) -> None:
    """Raise UserError unless matplotlib is installed: better before the work than after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"{flag}: matplotlib is missing: pip install matplotlib")


def draw_roc(curves: Sequence[RocCurve], output: str) -> None:
    """The ROC curves, with a logarithmic false accept rate. Raises OSError."""
    import matplotlib  # here and in `tidy`'s callers: a second of start-up that only pictures need

    matplotlib.use("Agg")  # writes files, needs no screen
    from matplotlib import pyplot

    # rates are means over folds of a few hundred pairs: below the smallest one above 0 there is nothing to see
    least = min((float(rate) for curve in curves for rate in curve.fpr if rate > 0), default=1e-3)
    left = 10.0 ** np.floor(np.log10(min(least, 0.1)))
    figure, axes = pyplot.subplots(figsize=(7, 5.2), layout="constrained")
    for number, curve in enumerate(curves):
        # from the left edge (a rate of 0 has no place on this axis) to (1, 1), where everything is accepted
        fpr, tpr = np.append(np.maximum(curve.fpr, left), 1.0), np.append(curve.tpr, 1.0)
        axes.step(fpr, tpr, where="post", **line_style(number), linewidth=2,
                  label=f"{curve.label}: accuracy {100 * curve.accuracy:.1f} %, AUC {curve.auc:.3f}")
    chance = np.geomspace(left, 1.0, 200)
    axes.plot(chance, chance, color=GRAY, linewidth=1, linestyle=(0, (1, 3)), label="chance")
    axes.set_xscale("log")
    axes.set_xlim(left, 1.0)
    axes.set_ylim(0.0, 1.01)
    axes.set_xlabel("false accept rate (different people taken for one)")
    tidy(axes, "true accept rate (one person recognised)")
    figure.legend(frameon=False, loc="outside lower center")  # outside: a good curve runs along the top
    axes.set_title("Verification: ROC")
    figure.savefig(output, dpi=130)
    pyplot.close(figure)


def line_style(number: int) -> dict[str, str]:
    """Colour and dashes of the curve with this number: the colours alone are too few for all sets that people have."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": ("-", "--", "-.", ":")[number // len(COLOURS) % 4]}


def tidy(axes: Axes, label: str) -> None:
    """The common look of the panels; `label` is the vertical axis's."""
    axes.set_ylabel(label)
    axes.grid(True, color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw_montage(sections: Sequence[MontageRows], output: str) -> None:
    """The sections below each other, MONTAGE_COLUMNS pairs in a row, each pair with its caption. Raises OSError."""
    cell_width, cell_height = 2 * _SIDE + _GAP + _MARGIN, _SIDE + _CAPTION + _MARGIN
    rows = [-(-len(section.pairs) // MONTAGE_COLUMNS) for section in sections]
    height = len(sections) * _TITLE + sum(rows) * cell_height + _MARGIN
    canvas = Image.new("RGB", (MONTAGE_COLUMNS * cell_width + _MARGIN, height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=12)
    top = _MARGIN
    for section, count in zip(sections, rows):
        draw.text((_MARGIN, top), section.title, fill="black", font=ImageFont.load_default(size=15))
        top += _TITLE
        for number, (image1, image2, caption) in enumerate(section.pairs):
            row, column = divmod(number, MONTAGE_COLUMNS)
            x, y = _MARGIN + column * cell_width, top + row * cell_height
            for image, left in ((image1, x), (image2, x + _SIDE + _GAP)):
                canvas.paste(Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))), (left, y))
            draw.text((x, y + _SIDE + 1), caption, fill="black", font=font)
        top += count * cell_height
    canvas.save(output)
