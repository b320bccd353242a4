"""The curves of a training run, from its metrics.jsonl (utils/training/metrics.py describes it)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from utils.errors import UserError

METRICS_FILE = "metrics.jsonl"


def _parse_int(digits: str) -> int:
    """Raises ValueError for more digits than a number of 64 bits has, which float() would refuse later."""
    if len(digits) > 20:
        raise ValueError
    return int(digits)


def read_metrics(path: str, prefix: str = "") -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(lines of steps, lines of evaluations) of a metrics.jsonl. Ignores an incomplete last line.

    prefix: of errors, such as "--metrics ". Raises UserError.
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise UserError(f"{prefix}{path}: {error.strerror}") from None
    steps, evaluations = [], []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line, parse_int=_parse_int)
            if "val" in row:
                accuracies = {name: float(result["accuracy"]) for name, result in row["val"].items()}
                evaluations.append({"step": int(row["step"]), "accuracy": accuracies})
            else:
                loss = np.nan if row["loss"] is None else float(row["loss"])  # null stands for inf or NaN
                steps.append({**row, "step": int(row["step"]), "loss": loss, "lr": float(row["lr"])})
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            if number < len(lines):
                raise UserError(f"{prefix}{path}: line {number} has no step, loss and lr: {line[:60]}") from None
    if not steps:
        raise UserError(f"{prefix}{path}: contains no complete line")
    return steps, evaluations


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean of the finite values in a window, which is shorter at both ends: as long as `values`."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    places = np.arange(len(values))
    first, last = np.maximum(places - window // 2, 0), np.minimum(places + window // 2 + 1, len(values))
    with np.errstate(invalid="ignore"):  # NaN for a window without a finite value
        return (sums[last] - sums[first]) / (counts[last] - counts[first])
