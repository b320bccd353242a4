"""Thresholds and error rates of pairs' scores, with confidence intervals: numpy in, numbers out.

A pair is accepted if its score is above the threshold. FAR is the share of the different pairs that are accepted, TAR
that of the same pairs. The threshold for a FAR is the lowest one that accepts no larger share, as `tar_at_far` of
lfw.py. A pair without a score counts as an error at every threshold.

Shapes: P pairs, I identities, F false accept rates, B replicates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from utils.errors import UserError

FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
LEVEL = 0.95  # of all intervals
SEED = 0  # of the replicates: the same pairs and scores give the same intervals
_MOST_REPLICATES, _LEAST_REPLICATES, _MOST_WEIGHTS = 1000, 100, 2 * 10**8


@dataclass(frozen=True)
class PairScores:
    """Scores of pairs, and whose images they compare."""

    cosine: np.ndarray  # float64 (P,), NaN for a pair without a usable embedding
    is_same: np.ndarray  # bool (P,)
    identity1: np.ndarray  # int64 (P,), from 0 to I - 1; equal to identity2 where is_same
    identity2: np.ndarray
    identities: str  # how they are known, such as "the images' directories"

    @property
    def num_identities(self) -> int:
        """I: those in any pair."""
        return len(np.unique(np.concatenate([self.identity1, self.identity2])))

    @property
    def undecidable(self) -> int:
        """How many pairs have no score."""
        return int(np.count_nonzero(np.isnan(self.cosine)))

    @property
    def replicates(self) -> int:
        """B: 1,000, and fewer for more than 200,000 pairs, down to 100."""
        return int(np.clip(_MOST_WEIGHTS // len(self.cosine), _LEAST_REPLICATES, _MOST_REPLICATES))


@dataclass(frozen=True)
class OperatingPoint:
    """What a set of pairs says about one false accept rate. Intervals are of LEVEL."""

    far: float  # that was asked for
    threshold: float | None  # None if the set cannot tell, for the reason in `note`
    threshold_interval: tuple[float, float] | None
    accepted: int  # different pairs above the threshold, of `different`
    different: int
    far_interval: tuple[float, float] | None  # Clopper-Pearson of accepted / different
    tar: float | None
    tar_interval: tuple[float, float] | None
    note: str = ""

    def describe(self) -> str:
        """One line."""
        if self.threshold is None or self.tar is None:
            return f"FAR {self.far:g}: {self.note}"
        return (f"FAR {self.far:g}: threshold {self.threshold:.4f}{_interval(self.threshold_interval, '.4f')}, "
                f"TAR {self.tar:.4f}{_interval(self.tar_interval, '.4f')}, {self.accepted:,} of {self.different:,} "
                "different pairs accepted" + (f"; {self.note}" if self.note else ""))


def _interval(interval: tuple[float, float] | None, digits: str) -> str:
    return "" if interval is None else f" [{interval[0]:{digits}}, {interval[1]:{digits}}]"


@dataclass(frozen=True)
class Curve:
    """TAR at FAR, each the largest TAR whose FAR is no larger, and the interval of TAR. float64 (F,), FAR rising."""

    far: np.ndarray
    tar: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Verification:
    """Error rates of `pairs`. Raises UserError without a pair of each label."""

    def __init__(self, pairs: PairScores) -> None:
        self.pairs = pairs
        score = np.where(np.isnan(pairs.cosine), np.where(pairs.is_same, -np.inf, np.inf), pairs.cosine)
        same, different = np.flatnonzero(pairs.is_same), np.flatnonzero(~pairs.is_same)
        if not len(same) or not len(different):
            raise UserError(f"{len(same)} same and {len(different)} different pairs: error rates need both")
        # Falling scores: the first accepted pairs of a list are those above the score that follows.
        same = same[np.argsort(-score[same], kind="stable")]
        different = different[np.argsort(-score[different], kind="stable")]
        numbers = np.unique(np.concatenate([pairs.identity1, pairs.identity2]), return_inverse=True)[1].astype(np.int32)
        self._first, self._second = (part[different] for part in np.split(numbers, 2))
        self._owner = numbers[:len(score)][same]
        self.same, self.different = score[same], score[different]  # float64, falling
        # For each different pair: how many same pairs score higher.
        self._above = np.searchsorted(-self.same, -self.different, side="left").astype(np.int32)
        self._people = int(numbers.max()) + 1

    def points(self, fars: Sequence[float]) -> list[OperatingPoint]:
        """The operating points at these false accept rates, each in (0, 1)."""
        rates = [Fraction(str(far)) for far in fars]
        thresholds, tars = self.bootstrap(rates)
        return [self._point(far, rate, thresholds[:, i], tars[:, i]) for i, (far, rate) in enumerate(zip(fars, rates))]

    def _point(self, far: float, rate: Fraction, thresholds: np.ndarray, tars: np.ndarray) -> OperatingPoint:
        count = len(self.different)
        allowed = math.floor(count * rate)
        if allowed < 1:
            note = (f"cannot be estimated: it needs {math.ceil(1 / rate):,} different pairs or more, and the set has "
                    f"{count:,}; if none of them is accepted, FAR is below {min(3 / count, 1):.2g} (rule of three)")
            return OperatingPoint(far, None, None, 0, count, None, None, None, note)
        threshold = float(self.different[allowed])
        accepted = int(np.count_nonzero(self.different > threshold))
        if not math.isfinite(threshold):
            note = f"cannot be reached: {self.pairs.undecidable:,} pairs have no score, and count as errors"
            return OperatingPoint(far, None, None, accepted, count, None, None, None, note)
        few = f"rests on {allowed} pairs only" if 1 < allowed < 10 else "rests on one pair" if allowed == 1 else ""
        return OperatingPoint(
            far, threshold, quantile_interval(thresholds), accepted, count, clopper_pearson(accepted, count),
            float(self._above[allowed] / len(self.same)), quantile_interval(tars), few)

    def curve(self, most: int = 60) -> Curve:
        """TAR at up to `most` rates k / D, from 1 / D to 1, where D is the number of different pairs."""
        count = len(self.different)
        k = np.unique(np.round(np.geomspace(1, max(count - 1, 1), most)).astype(int))
        k = k[k < count]
        intervals = [quantile_interval(tars) or (math.nan, math.nan)
                     for tars in self.bootstrap([Fraction(int(one), count) for one in k])[1].T]
        low, high = np.array([*intervals, (1.0, 1.0)]).T
        return Curve(np.append(k / count, 1.0), np.append(self._above[k] / len(self.same), 1.0), low, high)

    def bootstrap(self, rates: Sequence[Fraction]) -> tuple[np.ndarray, np.ndarray]:
        """(thresholds, TARs) at the rates in each replicate, float64 (B, F); NaN in one without pairs of a label.

        A replicate draws I identities with replacement. Identity i, drawn m_i times, stands for m_i people with the
        same images. So a same pair of i counts m_i times, and a different pair of i and j m_i m_j times. Pairs that
        share a person are not independent, so a bootstrap over pairs gives intervals that are too narrow (Fogliato,
        Patil and Perona, "Confidence intervals for error rates in 1:1 matching tasks", 2023).
        """
        rng, people = np.random.default_rng(SEED), self._people
        found = np.full((2, self.pairs.replicates, len(rates)), np.nan)
        with_itself = self._first == self._second
        for r in range(self.pairs.replicates):
            drawn = np.bincount(rng.integers(people, size=people), minlength=people).astype(np.int32)
            weight = drawn[self._first] * np.where(with_itself, np.int32(1), drawn[self._second])
            accepted, recognised = np.cumsum(weight), np.append(0, np.cumsum(drawn[self._owner]))
            if accepted[-1] == 0 or recognised[-1] == 0:
                continue
            allowed = [math.floor(int(accepted[-1]) * rate) for rate in rates]
            place = np.searchsorted(accepted, allowed, side="right")
            found[:, r] = self.different[place], recognised[self._above[place]] / recognised[-1]
        return found[0], found[1]

    def histogram(self, bins: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(edges (bins + 1,), counts of same pairs (bins,), of different pairs) of the scores that there are."""
        same, different = (part[np.isfinite(part)] for part in (self.same, self.different))
        both = np.concatenate([same, different])
        low, high = (float(both.min()), float(both.max())) if len(both) and np.ptp(both) > 0 else (-1.0, 1.0)
        edges = np.linspace(low, high, bins + 1)
        return edges, np.histogram(same, edges)[0], np.histogram(different, edges)[0]


def quantile_interval(values: np.ndarray) -> tuple[float, float] | None:
    """The middle part LEVEL of the values, without NaN; None without a finite one. (A bound is one of the values.)"""
    values = values[~np.isnan(values)]
    if not np.isfinite(values).any():
        return None
    # No threshold is above 1, which accepts nothing, or below -1.
    low, high = np.quantile(np.clip(values, -1, 1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
    return float(low), float(high)


def clopper_pearson(hits: int, trials: int) -> tuple[float, float]:
    """The exact interval of level LEVEL for a probability, from independent trials (Clopper and Pearson, 1934).

    The lower bound p has P(X >= hits) = (1 - LEVEL) / 2, the upper one P(X <= hits).
    """
    def bound(most: int, tail: float) -> float:  # p with P(X <= most) = tail
        k = torch.arange(most + 1, dtype=torch.float64)
        trials_ = torch.tensor(float(trials), dtype=torch.float64)
        ways = torch.lgamma(trials_ + 1) - torch.lgamma(k + 1) - torch.lgamma(trials_ - k + 1)
        low, high = 0.0, 1.0
        while (middle := (low + high) / 2) not in (low, high) and high - low > 1e-12 * high:
            terms = ways + k * math.log(middle) + (trials - k) * math.log1p(-middle)
            low, high = (middle, high) if float(terms.exp().sum()) > tail else (low, middle)
        return (low + high) / 2

    tail = (1 - LEVEL) / 2
    return bound(hits - 1, 1 - tail) if hits else 0.0, bound(hits, tail) if hits < trials else 1.0
