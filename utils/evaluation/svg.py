"""Charts as inline SVG. A browser scales them; their colours are those of the page, light or dark.

A series has a number: its colour is the CSS class c0, ..., c5, which the page defines (STYLE), and its dashes change
after six series. Values that are not finite are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils.evaluation.html import escape

STYLE = """
:root{--c0:#0b6fb8;--c1:#b8500f;--c2:#237a3a;--c3:#8148a8;--c4:#a3264f;--c5:#5c5c5c;--grid:#ddd}
@media(prefers-color-scheme:dark){
:root{--c0:#62b3f0;--c1:#f09a5f;--c2:#72c98a;--c3:#c79be6;--c4:#f08aab;--c5:#b0b0b0;--grid:#444}}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}.c4{color:var(--c4)}.c5{color:var(--c5)}
.scroll th,.scroll td{overflow-wrap:normal}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr));gap:1rem}
.charts svg{width:100%;height:auto;font:13px system-ui,sans-serif}
.charts figcaption{font-weight:600;margin:0 0 4px}
@media(max-width:480px){.montage img{width:74px}}
.legend span{margin-right:1rem;overflow-wrap:anywhere}
"""
_WIDTH, _HEIGHT = 440, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 8, 42  # margins of the plot
_COLOURS, _DASHES = 6, ("", "6 4", "2 3", "8 3 2 3")
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`; with `log` from one power of ten to another."""

    label: str
    low: float
    high: float
    log: bool = False

    def place(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """Where the values are: 0 at `low`, 1 at `high`; the nearest end for those outside, NaN for NaN."""
        x = np.asarray(values, dtype=float)
        low, high = self.low, self.high
        if self.log:
            x, low, high = np.log10(np.maximum(x, low)), math.log10(low), math.log10(high)
        return np.clip((x - low) / (high - low), 0, 1)

    def ticks(self) -> list[tuple[float, str]]:
        """(value, label) of up to about six ticks."""
        if self.log:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            return [(10.0**k, "10" + str(k).translate(_SUPERSCRIPTS) if k else "1")
                    for k in range(first, last + 1, -(-(last - first) // 7))]
        rough = (self.high - self.low) / 6
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.999 * rough)
        return [(k * step, _short(k * step)) for k in range(math.ceil(self.low / step - 1e-9),
                                                            math.floor(self.high / step + 1e-9) + 1)]


def _short(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= 10 * size:
            return f"{value / size:.6g}{unit}"
    return f"{value:.6g}"


def axis_of(label: str, values: Sequence[np.ndarray], log: bool | None = None) -> Axis:
    """An axis that shows all values. log: None chooses it for positive values that differ by a factor above 30."""
    known = np.concatenate([np.asarray(part, dtype=float) for part in values] or [np.empty(0)])
    known = known[np.isfinite(known)]
    known = np.clip(known, -1e300, 1e300)
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    if log is None:
        log = 1e-300 < 30 * low < high
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        return Axis(label, 10.0**first, 10.0 ** max(last, first + 1), True)
    return Axis(label, low, high) if high - low > max(1e-9 * max(abs(low), abs(high)), 1e-300) else Axis(
        label, low - max(abs(low), 1) / 2, low + max(abs(low), 1) / 2)


class Chart:
    """Marks in a frame with two axes."""

    def __init__(self, title: str, x: Axis, y: Axis) -> None:
        self.title, self.x, self.y = title, x, y
        self._marks: list[str] = []
        self._rules = 0

    def _points(self, x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> np.ndarray:
        """Pixels, float64 (n, 2)."""
        return np.stack([_LEFT + self.x.place(x) * (_WIDTH - _LEFT - _RIGHT),
                         _HEIGHT - _BOTTOM - self.y.place(y) * (_HEIGHT - _BOTTOM - _TOP)], axis=1)

    def line(self, x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, series: int,
             faint: bool = False, dots: bool = True) -> None:
        """A line, broken where a value is not finite; with up to 30 points also a dot at each, if wanted."""
        points = self._points(x, y)
        known = np.isfinite(np.asarray(x, dtype=float)) & np.isfinite(np.asarray(y, dtype=float))
        dash = _DASHES[series // _COLOURS % len(_DASHES)]
        style = f'stroke-width="{1 if faint else 2}" opacity="{0.35 if faint else 1}"' + (
            f' stroke-dasharray="{dash}"' if dash else "")
        marks = []
        for part in np.split(np.arange(len(points)), np.flatnonzero(~known)):
            part = part[known[part]]
            if len(part) > 1:
                marks.append(f'<polyline fill="none" stroke="currentColor" {style} points="{_text(points[part])}"/>')
        if dots and np.count_nonzero(known) <= 30:
            marks += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="currentColor"/>' for a, b in points[known]]
        self._add(series, marks)

    def band(self, x: np.ndarray, low: np.ndarray, high: np.ndarray, series: int) -> None:
        """The area between two curves."""
        known = np.isfinite(x) & np.isfinite(low) & np.isfinite(high)
        if np.count_nonzero(known) > 1:
            outline = np.concatenate([self._points(x[known], high[known]), self._points(x[known], low[known])[::-1]])
            self._add(series, [f'<polygon fill="currentColor" opacity="0.15" points="{_text(outline)}"/>'])

    def bars(self, edges: np.ndarray, heights: np.ndarray, series: int) -> None:
        """A histogram, whose columns stand side by side."""
        x = np.repeat(edges, 2)
        outline = self._points(x, np.concatenate([[0], np.repeat(heights, 2), [0]]))
        self._add(series, [f'<polygon fill="currentColor" fill-opacity="0.3" stroke="currentColor" '
                           f'points="{_text(outline)}"/>'])

    def rule(self, x: float, label: str) -> None:
        """A vertical line with words, below those of the rules before it."""
        (left, bottom), (_, top) = self._points([x, x], [self.y.low, self.y.high])
        end, self._rules = left > _WIDTH / 2, self._rules + 1
        self._marks.append(
            f'<path d="M{left:.1f} {bottom:.1f}V{top:.1f}" stroke="currentColor" stroke-dasharray="4 3"/>'
            f'<text x="{left + (-4 if end else 4):.1f}" y="{top + 14 * self._rules - 2:.1f}" fill="currentColor" '
            f'text-anchor="{"end" if end else "start"}">{escape(label)}</text>')

    def _add(self, series: int, marks: list[str]) -> None:
        self._marks.append(f'<g class="c{series % _COLOURS}">{"".join(marks)}</g>')

    def render(self) -> str:
        """The <svg> element."""
        right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        frame = []
        for value, label in self.x.ticks():
            (x, _), = self._points([value], [self.y.low])
            frame.append(f'<path d="M{x:.1f} {bottom}V{_TOP}" stroke="var(--grid)"/>'
                         f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle" fill="currentColor">{label}</text>')
        for value, label in self.y.ticks():
            (_, y), = self._points([self.x.low], [value])
            frame.append(f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="var(--grid)"/>'
                         f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end" fill="currentColor">{label}</text>')
        frame.append(f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="currentColor"/>'
                     f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 6}" text-anchor="middle" fill="currentColor">'
                     f'{escape(self.x.label)}</text>')
        return (f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(self.title)}">'
                f'{"".join(frame)}{"".join(self._marks)}</svg>')


def legend(names: Sequence[str]) -> str:
    """The names of series 0, 1, ..., in their colours."""
    dots = ("&#9632;", "&#9633;", "&#9650;", "&#9651;")
    return '<p class="legend">' + "".join(
        f'<span><span class="c{i % _COLOURS}" style="margin:0">{dots[i // _COLOURS % len(dots)]}</span> '
        f'{escape(name)}</span>' for i, name in enumerate(names)) + "</p>"


def _text(points: np.ndarray) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
