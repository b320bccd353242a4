"""Self-contained HTML pages: one file, no script, no network, light and dark, for screens from 390 pixels on.

Plain strings are escaped. Only Markup, the type that these functions return, is inserted unescaped.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

# A face to show: uint8 (3, h, w) or (h, w, 3), an image of Pillow, a .jpg, .png or .svg file; None: there is none.
Picture = np.ndarray | Image.Image | str | os.PathLike | None

_TYPES = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png", ".svg": "svg+xml"}
_STYLE = """
:root { color-scheme: light dark; --text: #1d2127; --soft: #5c6570; --line: #d9dee4; --card: #f6f7f9; --back: #fff;
  --accent: #0b6fb8; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7eb; --soft: #9aa4b0; --line: #363d46; --card: #1f242b;
  --back: #15181d; --accent: #6db6ee; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 16px; max-width: 1400px; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .2em 0 .6em; } h2 { font-size: 1.2rem; margin: 1.8em 0 .4em; }
h3 { font-size: 1rem; margin: 1.4em 0 .3em; } p, ul { max-width: 80ch; } a { color: var(--accent); }
code, pre { font: .88em/1.45 ui-monospace, monospace; background: var(--card); border-radius: 4px; padding: .1em .3em; }
pre { padding: 10px; overflow-x: auto; overflow-wrap: normal; } .soft, figcaption { color: var(--soft); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6em 0; }
th, td { text-align: left; vertical-align: top; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; } td.number, th.number { text-align: right; white-space: nowrap; }
.montage { display: flex; flex-wrap: wrap; gap: 10px; margin: .6em 0; }
.columns { display: grid; gap: 0 20px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 600px), 1fr)); }
figure { margin: 0; padding: 6px; min-width: 132px; max-width: 100%; background: var(--card);
  border: 1px solid var(--line); border-radius: 6px; } figure > div { display: flex; flex-wrap: wrap; gap: 3px; }
figcaption { font-size: .8rem; line-height: 1.35; margin-top: 4px; white-space: pre-line; width: min-content;
  min-width: 100%; } img, .none { max-width: 100%; height: auto; border-radius: 3px; display: block; }
.none { display: grid; place-items: center; border: 1px dashed var(--line); color: var(--soft); font-size: .75rem; }
"""


class Markup(str):
    """HTML, which is not escaped again."""


def escape(text: Any) -> str:
    """Text as HTML. Bytes of file names that are no text, and control characters but line breaks, show as escapes."""
    if isinstance(text, Markup):
        return text
    plain = str(text).encode("utf-8", "backslashreplace").decode()
    return html.escape("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in plain))


def page(title: str, body: str) -> str:
    """A whole page. body: HTML, such as what the functions below return."""
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">\n'
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
            f"<style>{_STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n</body></html>\n")


def heading(text: str, level: int = 2, name: str = "") -> Markup:
    """A heading. name: what links such as #name lead to."""
    anchor = f' id="{escape(name)}"' if name else ""
    return Markup(f"<h{level}{anchor}>{escape(text)}</h{level}>\n")


def paragraph(text: str) -> Markup:
    return Markup(f"<p>{escape(text)}</p>\n")


def picture(image: Picture, size: int = 112, *, text: str = "") -> Markup:
    """The image, `size` pixels wide on the page, inside it as a data URI. text: its description, for `alt`.

    Pixels are encoded as JPEG, files are embedded as they are. Without an image an empty frame appears.
    Raises OSError if a file cannot be read, and ValueError for one of another kind.
    """
    if image is None:
        return Markup(f'<div class="none" style="width:{size}px;aspect-ratio:1" title="{escape(text)}">no image</div>')
    if isinstance(image, (str, os.PathLike)):
        kind = _TYPES.get(os.path.splitext(image)[1].lower())
        if kind is None:
            raise ValueError(f"{os.fspath(image)}: is none of {', '.join(_TYPES)}")
        with open(image, "rb") as file:
            data = file.read()
    else:
        if isinstance(image, np.ndarray):
            # (3, h, w): channels first, as the network takes them
            image = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0) if image.shape[0] == 3 else image))
        buffer, kind = io.BytesIO(), "jpeg"
        image.convert("RGB").save(buffer, "JPEG", quality=88)
        data = buffer.getvalue()
    return Markup(f'<img src="data:image/{kind};base64,{base64.b64encode(data).decode()}" width="{size}" '
                  f'alt="{escape(text)}">')


def montage(items: Sequence[tuple[Picture | Sequence[Picture], str]], size: int = 112) -> Markup:
    """Images with captions, side by side as far as there is room. An item may be several images with one caption."""
    figures = []
    for images, caption in items:
        several: Sequence[Any] = images if isinstance(images, (list, tuple)) else [images]
        pictures = "".join(picture(image, size, text=caption) for image in several)
        figures.append(f"<figure><div>{pictures}</div><figcaption>{escape(caption)}</figcaption></figure>\n")
    return Markup(f'<div class="montage">\n{"".join(figures)}</div>\n')


def columns(parts: Sequence[str]) -> Markup:
    """Parts of a page, at least 600 pixels wide each, side by side as far as there is room."""
    return Markup(f'<div class="columns">\n{"".join(f"<div>{part}</div>" for part in parts)}</div>\n')


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> Markup:
    """A table, which scrolls sideways on a small screen. Columns of int and float are aligned to the right."""
    cells_of = list(zip(*rows, strict=True)) or [()] * len(headers)
    numeric = [bool(column) and all(isinstance(cell, (int, float)) for cell in column) for column in cells_of]

    def line(tag: str, cells: Sequence[Any]) -> str:
        return "<tr>" + "".join(f"<{tag}{' class=number' * number}>{escape(cell)}</{tag}>"
                                for cell, number in zip(cells, numeric, strict=True)) + "</tr>\n"

    return Markup(f'<div class="scroll"><table>\n<thead>{line("th", headers)}</thead>\n<tbody>'
                  f'{"".join(line("td", row) for row in rows)}</tbody></table></div>\n')
