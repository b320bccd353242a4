"""Face verification by the LFW protocol: numpy in, numbers out.

Huang et al., "Labeled Faces in the Wild", 2007: ten folds, each with the threshold chosen on the other nine. The
validation rate is that of Schroff et al., "FaceNet", 2015, section 4, as commonly used evaluation scripts compute it.

Shapes: P pairs, d embedding size, K folds, T thresholds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.errors import UserError

TARGET_FAR = 1e-3


@dataclass(frozen=True)
class VerificationResult:
    """What `evaluate` returns. Rates and accuracies are fractions in [0, 1]; all numbers are finite."""

    accuracy: float  # mean over the folds
    accuracy_std: float  # population standard deviation over the folds
    val: float  # validation rate: share of same pairs accepted at the threshold for FAR = 1e-3, mean over the folds
    val_std: float
    far: float  # the false accept rate measured at that threshold; far above 1e-3 `val` means little
    auc: float
    eer: float
    thresholds: np.ndarray  # (T,) squared L2 distance: 0, 0.01, ..., 3.99
    tpr: np.ndarray  # (T,) true positive rate at each threshold, mean over the folds
    fpr: np.ndarray  # (T,) false positive rate
    exact_accuracy: float  # like `accuracy`, but with thresholds between any two distances instead of a grid
    exact_accuracy_std: float
    threshold: float  # the first of `thresholds` with the best accuracy over all pairs
    tar_at_far: dict[str, float]  # "1e-3": share of same pairs accepted where that share of different pairs is
    undecidable_pairs: int  # pairs with an embedding that is zero, NaN or infinite

    def to_json_dict(self) -> dict[str, Any]:
        """The attributes by name, with arrays as lists: strict JSON."""
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(self).items()}

    def __str__(self) -> str:
        """The four lines of the published validation script."""
        return (f"Accuracy: {self.accuracy:.5f}+-{self.accuracy_std:.5f}\n"
                f"Validation rate: {self.val:.5f}+-{self.val_std:.5f} @ FAR={self.far:.5f}\n"
                f"Area Under Curve (AUC): {self.auc:.3f}\n"
                f"Equal Error Rate (EER): {self.eer:.3f}")


def evaluate(
    embeddings1: np.ndarray, embeddings2: np.ndarray, is_same: np.ndarray, folds: int = 10
) -> VerificationResult:
    """For each fold: t = first argmax over 0, 0.01, ..., 3.99 of the accuracy of (distance < t) on the other folds;
    accuracy = share of the fold's pairs with (distance < t) == is_same; distance = |e1/|e1| - e2/|e2||^2.

    embeddings1, embeddings2: (P, d) floats of any length, the two images of each pair. is_same: (P,) bool or 0/1.

    Folds: the pairs of each label are split, in their order, into `folds` contiguous parts whose sizes differ by at
    most one, longer parts first. A label with fewer pairs than `folds` reduces the number of folds to its pairs.

    val: per fold, the threshold at which the false accept rate on the other folds reaches 1e-3, interpolated linearly
    on the grid 0, 0.001, ..., 3.999 (the last grid point of a flat stretch at exactly 1e-3; 0 if it is never reached).
    val and far are the shares of the fold's same and different pairs below it.
    auc: trapezoids under the points (fpr, tpr) of the grid, as published: nothing is added beyond the last point.
    eer: the false positive rate where fpr = 1 - tpr, on straight lines between these points, extended to (1, 1).
    exact_accuracy: per fold, the threshold with the best accuracy on the other folds, among: below their smallest
    distance, midway between two neighbours (the first of equally good ones), above their largest.
    tar_at_far: at FAR = 1e-k, for k from 1 to 6 while 10^k <= D, the number of different pairs: over all pairs, without
    folds, at the largest threshold that accepts at most D // 10^k different pairs.

    A pair with an embedding that has no direction (zero, NaN or infinite) counts as an error at every threshold.

    Raises UserError for fewer than two same or two different pairs.
    """
    return evaluate_distances(squared_distance(embeddings1, embeddings2), is_same, folds)


def evaluate_distances(distance: np.ndarray, is_same: np.ndarray, folds: int = 10) -> VerificationResult:
    """`evaluate` from the output of `squared_distance`: float64 (P,), NaN for a pair that counts as an error."""
    is_same = np.asarray(is_same, dtype=bool)
    folds = usable_folds(is_same, folds)
    undecidable = np.isnan(distance)
    distance = np.where(undecidable, np.where(is_same, np.inf, -np.inf), distance)  # never accepted, always accepted

    # With each fold's distances sorted, counting those below a threshold is a binary search.
    same = [np.sort(part) for part in np.array_split(distance[is_same], folds)]
    different = [np.sort(part) for part in np.array_split(distance[~is_same], folds)]
    same_size, different_size = (np.array([len(part) for part in parts]) for parts in (same, different))

    thresholds = np.arange(0, 4, 0.01)  # squared L2 distances of unit vectors are in [0, 4]
    true_accepts, false_accepts = _counts_below(same, thresholds), _counts_below(different, thresholds)
    correct = true_accepts + different_size[:, None] - false_accepts
    best = np.argmax(correct.sum(axis=0) - correct, axis=1)
    accuracy = correct[np.arange(folds), best] / (same_size + different_size)
    tpr = np.mean(true_accepts / same_size[:, None], axis=0)
    fpr = np.mean(false_accepts / different_size[:, None], axis=0)

    at_far = _thresholds_at_far(different)
    val, far = ([np.mean(part < t) for part, t in zip(parts, at_far)] for parts in (same, different))
    exact = _exact_thresholds(same, different)
    exact_accuracy = [(np.count_nonzero(part < t) + np.count_nonzero(other >= t)) / (len(part) + len(other))
                      for part, other, t in zip(same, different, exact)]
    all_same, all_different = np.concatenate(same), np.sort(np.concatenate(different))
    count = len(all_different)
    return VerificationResult(
        accuracy=float(np.mean(accuracy)),
        accuracy_std=float(np.std(accuracy)),
        val=float(np.mean(val)),
        val_std=float(np.std(val)),
        far=float(np.mean(far)),
        auc=float(np.sum(np.diff(fpr) * (tpr[1:] + tpr[:-1])) / 2),
        eer=_equal_error_rate(tpr, fpr),
        thresholds=thresholds,
        tpr=tpr,
        fpr=fpr,
        exact_accuracy=float(np.mean(exact_accuracy)),
        exact_accuracy_std=float(np.std(exact_accuracy)),
        threshold=float(thresholds[np.argmax(correct.sum(axis=0))]),
        tar_at_far={f"1e-{k}": float(np.mean(all_same < all_different[count // 10**k]))
                    for k in range(1, 7) if 10**k <= count},
        undecidable_pairs=int(np.count_nonzero(undecidable)),
    )


def usable_folds(is_same: np.ndarray, folds: int = 10) -> int:
    """min(folds, same pairs, different pairs): each fold needs a pair of each label.

    Raises UserError if that is less than two, because then there are no other folds to choose a threshold on.
    """
    same = int(np.count_nonzero(is_same))
    different = len(is_same) - same
    if min(same, different) < 2:
        raise UserError(
            f"{same} same (label 1) and {different} different (label 0) pairs: the protocol needs at least 2 of each")
    return min(folds, same, different)


def squared_distance(embeddings1: np.ndarray, embeddings2: np.ndarray) -> np.ndarray:
    """|e1/|e1| - e2/|e2||^2: (P, d), (P, d) -> float64 (P,), NaN where an embedding has no direction."""
    distance = np.empty(len(embeddings1))
    # Blocks that stay in the cache take half the time of whole arrays, and need no float64 copies of them.
    rows = max(1, 2**16 // embeddings1.shape[1])
    for start in range(0, len(distance), rows):
        block = slice(start, start + rows)
        difference = _unit_rows(embeddings1[block]) - _unit_rows(embeddings2[block])
        distance[block] = np.einsum("ij,ij->i", difference, difference)
    return distance


def _unit_rows(embeddings: np.ndarray) -> np.ndarray:
    """float64, each row divided by its length; NaN in a row that is zero or not finite."""
    embeddings = embeddings.astype(np.float64)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        length = np.sqrt(np.einsum("ij,ij->i", embeddings, embeddings))
        length[~np.isfinite(length)] = np.nan
        return embeddings / length[:, None]


def _counts_below(parts: list[np.ndarray], thresholds: np.ndarray) -> np.ndarray:
    """int64 (K, T): the number of each fold's sorted distances below each threshold."""
    return np.stack([np.searchsorted(part, thresholds) for part in parts])


def _thresholds_at_far(different: list[np.ndarray]) -> list[float]:
    """Of each fold: the threshold for TARGET_FAR on the other folds, whose distances are sorted."""
    thresholds = np.arange(0, 4, 0.001)
    accepts = _counts_below(different, thresholds)
    others = sum(map(len, different)) - np.array([len(part) for part in different])
    far = (accepts.sum(axis=0) - accepts) / others[:, None]  # (K, T), rising
    return [float(np.interp(TARGET_FAR, row, thresholds)) if row[-1] >= TARGET_FAR else 0.0 for row in far]


def _exact_thresholds(same: list[np.ndarray], different: list[np.ndarray]) -> list[float]:
    """Of each fold: the threshold with the best accuracy on the other folds."""
    chosen = []
    for k in range(len(same)):
        other_same = np.sort(np.concatenate(same[:k] + same[k + 1:]))
        other_different = np.sort(np.concatenate(different[:k] + different[k + 1:]))
        distance = np.unique(np.concatenate([other_same, other_different]))
        distance = distance[np.isfinite(distance)]
        # Midway between neighbours, but never rounded down to the smaller one, which the threshold has to accept.
        between = np.maximum((distance[:-1] + distance[1:]) / 2, np.nextafter(distance[:-1], np.inf))
        candidates = np.concatenate([distance[:1], between, [np.inf if len(distance) else 0.0]])
        gain = np.searchsorted(other_same, candidates) - np.searchsorted(other_different, candidates)
        chosen.append(float(candidates[np.argmax(gain)]))
    return chosen


def _equal_error_rate(tpr: np.ndarray, fpr: np.ndarray) -> float:
    """The fpr at which fpr + tpr = 1. Both rise along the curve, which ends in (1, 1)."""
    tpr, fpr = np.append(tpr, 1.0), np.append(fpr, 1.0)
    excess = fpr + tpr - 1
    after = int(np.argmax(excess >= 0))
    if after == 0:  # every different pair is undecidable
        return float(fpr[0])
    step = -excess[after - 1] / (excess[after] - excess[after - 1])
    return float(fpr[after - 1] + step * (fpr[after] - fpr[after - 1]))
