"""Calibrated scores: from the cosine of two embeddings to the probability that they are of the same person."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.evaluation.operating_points import OperatingPoint
from utils.evaluation.protocol import Result
from utils.files import atomic_write, open_bounded

VERSION = 1
_MAX_BYTES = 2**20


@dataclass(frozen=True)
class Calibration:
    """What was fitted on a set of pairs, and with which weights. Attributes are those of the file."""

    slope: float
    intercept: float
    cost: float  # C_llr on the pairs that it was fitted on
    weights: str  # fingerprint of the backbone
    flip: bool  # the embeddings are sums with those of the mirrored images
    set: str
    same_pairs: int
    different_pairs: int
    thresholds: tuple[tuple[float, float, tuple[float, float] | None], ...]  # (FAR, cosine, its interval)

    def probability(self, cosine: float) -> float:
        """That both images are of one person, if that was as likely as not before."""
        return (1 + math.tanh((self.slope * cosine + self.intercept) / 2)) / 2

    def write(self, path: str) -> None:
        """Write the file that read_calibration reads. Raises OSError."""
        with atomic_write(path) as file:
            file.write(json.dumps({"calibration": VERSION, **vars(self)}, allow_nan=False).encode() + b"\n")


def calibrate(
    name: str, result: Result, points: Sequence[OperatingPoint], weights: str, flip: bool
) -> Calibration:
    """Fit the scores of the set `name`. points: of the same result. Raises UserError without scores of pairs, and if
    same pairs do not score higher.
    """
    if result.scores is None:
        raise UserError(f"--calibration: {name} has no scores of pairs to fit; give a set of pairs")
    pairs = result.scores()
    try:
        slope, intercept = fit_logistic(pairs.cosine, pairs.is_same)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    same = int(np.count_nonzero(pairs.is_same))
    return Calibration(
        slope, intercept, calibration_cost(pairs.cosine, pairs.is_same, slope, intercept), weights, flip, name, same,
        len(pairs.is_same) - same,
        tuple((point.far, point.threshold, point.threshold_interval) for point in points
              if point.threshold is not None))


def read_calibration(path: str, flag: str) -> Calibration:
    """Read a file of valid.py --calibration. Raises UserError."""
    try:
        with open_bounded(path, _MAX_BYTES) as file:
            content = json.load(file)
        if content.pop("calibration") != VERSION:
            raise UserError(f"{flag} {path}: was written by another version; fit it again with valid.py --calibration")
        thresholds = tuple((_finite(far), _finite(cosine), interval and (_finite(interval[0]), _finite(interval[1])))
                           for far, cosine, interval in content.pop("thresholds"))
        for name in ("slope", "intercept", "cost"):
            content[name] = _finite(content[name])
        for name, kind in (("weights", str), ("flip", bool), ("set", str)):
            if not isinstance(content[name], kind):
                raise TypeError
        return Calibration(**content, thresholds=thresholds)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read ({error.strerror})") from None
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError, OverflowError):
        raise UserError(f"{flag} {path}: is no calibration, or a damaged one; fit one with valid.py --calibration"
                        ) from None


def _finite(value: Any) -> float:
    if isinstance(value, str) or not math.isfinite(value):
        raise ValueError
    return float(value)


def fit_logistic(cosine: np.ndarray, is_same: np.ndarray) -> tuple[float, float]:
    """(a, b) such that a * cosine + b is the logarithm of how much likelier the score is for a same pair.

    Logistic regression in which both labels weigh the same, with the targets (S + 1) / (S + 2) and 1 / (D + 2) of Platt
    ("Probabilistic outputs for support vector machines", 1999), so that separable scores have a solution too. NaN
    scores are left out. Raises UserError if same pairs do not score higher.
    """
    known = ~np.isnan(cosine)
    score, label = cosine[known], is_same[known]
    same = int(np.count_nonzero(label))
    different = len(label) - same
    if not same or not different or np.ptp(score) == 0:
        raise UserError(f"{same} same and {different} different pairs with {len(np.unique(score))} different scores: "
                        "nothing to calibrate with")
    centre, spread = score.mean(), score.std()
    x = np.stack([(score - centre) / spread, np.ones(len(score))])
    target = np.where(label, (same + 1) / (same + 2), 1 / (different + 2))
    weight = np.where(label, 0.5 / same, 0.5 / different)

    def loss(w: np.ndarray) -> float:
        return float(np.sum(weight * (np.logaddexp(0, w @ x) - target * (w @ x))))

    w = np.zeros(2)
    for _ in range(100):
        p = (1 + np.tanh(w @ x / 2)) / 2  # the logistic function, without overflow
        gradient = x @ (weight * (p - target))
        step = np.linalg.solve((x * (weight * p * (1 - p))) @ x.T + 1e-12 * np.eye(2), gradient)
        while loss(w - step) > loss(w) and np.abs(step).max() > 1e-14:
            step /= 2
        w = w - step
        if np.abs(step).max() < 1e-10:
            break
    if not w[0] > 1e-6:  # of scores with the deviation 1: less is a rounding error
        raise UserError("same pairs do not score higher than different ones: there is nothing to calibrate")
    return float(w[0] / spread), float(w[1] - w[0] * centre / spread)


def calibration_cost(cosine: np.ndarray, is_same: np.ndarray, slope: float, intercept: float) -> float:
    """C_llr in bits: 0 is perfect, 1 is a score that tells nothing (Brümmer and du Preez, 2006). Without NaN scores."""
    known = ~np.isnan(cosine)
    z, label = slope * cosine[known] + intercept, is_same[known]
    return float((np.logaddexp(0, -z[label]).mean() + np.logaddexp(0, z[~label]).mean()) / (2 * math.log(2)))
