"""Writing results to files: JSON, ROC curves, a montage of the worst errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from utils.errors import UserError
from utils.evaluation.plots import draw_montage, draw_roc
from utils.evaluation.protocol import Result
from utils.files import atomic_write


def write_json(flag: str, path: str, results: Mapping[str, Result]) -> None:
    """Write the result of the one set, or {"sets": {name: result}} for several. Raises UserError."""
    objects = {name: result.json for name, result in results.items()}
    content = next(iter(objects.values())) if len(objects) == 1 else {"sets": objects}
    _write(flag, path, lambda: _dump(path, content))


def write_roc(flag: str, path: str, results: Mapping[str, Result]) -> None:
    """Draw the ROC curves of all sets. Raises UserError."""
    curves = [curve for result in results.values() for curve in result.curves]
    _write(flag, path, lambda: draw_roc(curves, path))


def write_montage(flag: str, path: str, results: Mapping[str, Result]) -> None:
    """Draw the worst errors of all sets. Raises UserError."""
    sections = [section for result in results.values() if result.montage for section in result.montage()]
    _write(flag, path, lambda: draw_montage(sections, path))


def _dump(path: str, content: Mapping[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(content, allow_nan=False).encode() + b"\n")


def _write(flag: str, path: str, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written ({error.strerror or error})") from None
