"""Pictures of verification results: ROC curves, and a montage of the worst errors."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.errors import UserError
from utils.evaluation.protocol import MontageSection, RocCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT_FORMATS = (".png", ".svg", ".pdf")
MONTAGE_FORMATS = (".png", ".jpg")
COLOURS = ("#0b6fb8", "#c2571a", "#2f8f46", "#8a4fb0", "#444444")
GRAY = "#8a8a8a"
MONTAGE_COLUMNS = 6  # pairs in a row
_SIDE, _GAP, _MARGIN, _CAPTION, _TITLE = 112, 2, 10, 18, 30  # pixels


def check_picture(flag: str, path: str, formats: tuple[str, ...]) -> None:
    """Raise UserError unless the file's extension is one of `formats`."""
    if os.path.splitext(path)[1].lower() not in formats:
        raise UserError(f"{flag} {path}: the name must end in {', '.join(formats[:-1])} or {formats[-1]}")


def require_matplotlib(flag: str) -> None:
    """Raise UserError unless matplotlib is installed. Call it before the work whose result is drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"{flag}: matplotlib is missing: pip install matplotlib")


def load_pyplot() -> ModuleType:
    """Import matplotlib.pyplot for writing files. It takes a second, so only functions that draw call this."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_roc(curves: Sequence[RocCurve], output: str) -> None:
    """Draw ROC curves over a logarithmic false accept rate. Raises OSError."""
    pyplot = load_pyplot()
    # The rates are means over folds of a few hundred pairs. There is nothing to see below the smallest positive one.
    least = min((float(rate) for curve in curves for rate in curve.fpr if rate > 0), default=1e-3)
    left = 10.0 ** np.floor(np.log10(min(least, 0.1)))
    figure, axes = pyplot.subplots(figsize=(7, 5.2), layout="constrained")
    for number, curve in enumerate(curves):
        # From the left edge, because a logarithmic axis has no 0, to (1, 1), where every pair is accepted.
        fpr, tpr = np.append(np.maximum(curve.fpr, left), 1.0), np.append(curve.tpr, 1.0)
        name = curve.label.encode(errors="backslashreplace").decode()  # of a file, whose bytes need not be text
        axes.step(fpr, tpr, where="post", **line_style(number), linewidth=2,
                  label=name + ": " + (f"accuracy {100 * curve.accuracy:.1f} %, " if curve.accuracy is not None else "")
                  + f"AUC {curve.auc:.3f}")
    chance = np.geomspace(left, 1.0, 200)
    axes.plot(chance, chance, color=GRAY, linewidth=1, linestyle=(0, (1, 3)), label="chance")
    axes.set(xscale="log", xlim=(left, 1.0), ylim=(0.0, 1.01), title="Verification: ROC",
             xlabel="false accept rate (different people taken for one)")
    tidy(axes, "true accept rate (one person recognised)")
    figure.legend(frameon=False, loc="outside lower center")  # a good curve runs along the top
    figure.savefig(output, dpi=130)
    pyplot.close(figure)


def line_style(number: int) -> dict[str, str]:
    """Colour and dashes of the curve with this number: 20 different combinations."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": ("-", "--", "-.", ":")[number // len(COLOURS) % 4]}


def tidy(axes: Axes, label: str) -> None:
    """The common look of all panels. label: of the vertical axis."""
    axes.set_ylabel(label)
    axes.grid(True, color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw_montage(sections: Sequence[MontageSection], output: str) -> None:
    """Draw the sections below each other, MONTAGE_COLUMNS pairs in a row, with captions. Raises OSError."""
    cell_width, cell_height = 2 * _SIDE + _GAP + _MARGIN, _SIDE + _CAPTION + _MARGIN
    heights = [_TITLE + -(-len(section.pairs) // MONTAGE_COLUMNS) * cell_height for section in sections]
    canvas = Image.new("RGB", (MONTAGE_COLUMNS * cell_width + _MARGIN, sum(heights) + _MARGIN), "white")
    draw, top = ImageDraw.Draw(canvas), _MARGIN
    for section, height in zip(sections, heights):
        draw.text((_MARGIN, top), section.title, fill="black", font=ImageFont.load_default(size=15))
        for number, (image1, image2, caption) in enumerate(section.pairs):
            row, column = divmod(number, MONTAGE_COLUMNS)
            x, y = _MARGIN + column * cell_width, top + _TITLE + row * cell_height
            for image, left in ((image1, x), (image2, x + _SIDE + _GAP)):
                canvas.paste(Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))), (left, y))
            draw.text((x, y + _SIDE + 1), caption, fill="black", font=ImageFont.load_default(size=12))
        top += height
    canvas.save(output)
