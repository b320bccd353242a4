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

THRESHOLD_STEP = 0.01  # for accuracy and ROC; squared L2 distances of unit vectors are in [0, 4]
VAL_THRESHOLD_STEP = 0.001
TARGET_FAR = 1e-3
FAR_EXPONENTS = range(1, 7)  # TAR is reported at FAR = 1e-1 ... 1e-6, as far as there are enough pairs


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
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(self).items()
        }


def evaluate(
    embeddings1: np.ndarray, embeddings2: np.ndarray, is_same: np.ndarray, folds: int = 10
) -> VerificationResult:
    """For each fold: t = first argmax over 0, 0.01, ..., 3.99 of the accuracy of (distance < t) on the other folds;
    accuracy = share of the fold's pairs with (distance < t) == is_same; distance = |e1/|e1| - e2/|e2||^2.

    embeddings1, embeddings2: (P, d) floats of any length, the two images of each pair. is_same: (P,) bool or 0/1.

    Folds: the pairs of each label are split, in their order, into `folds` contiguous parts whose sizes differ by at
    most one, longer parts first. A list in the official order (fold by fold) and one sorted by label give the same
    folds. A label with fewer pairs than `folds` reduces the number of folds to its pairs.

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

    Raises UserError for fewer than two same or two different pairs, ValueError for arrays of the wrong shape.
    """
    embeddings1, embeddings2 = np.asarray(embeddings1), np.asarray(embeddings2)
    is_same = _as_bool(is_same)
    if embeddings1.ndim != 2 or embeddings1.shape != embeddings2.shape or len(embeddings1) != len(is_same):
        raise ValueError(
            f"evaluate takes (P, d), (P, d) and (P,), not {embeddings1.shape}, {embeddings2.shape} and {is_same.shape}"
        )
    usable_folds(is_same, folds)
    return evaluate_distances(squared_distance(embeddings1, embeddings2), is_same, folds)


def evaluate_distances(distance: np.ndarray, is_same: np.ndarray, folds: int = 10) -> VerificationResult:
    """`evaluate` from the output of `squared_distance`: float64 (P,), NaN for a pair that counts as an error."""
    is_same = _as_bool(is_same)
    folds = usable_folds(is_same, folds)
    undecidable = np.isnan(distance)
    distance = distance.copy()
    distance[undecidable] = np.where(is_same[undecidable], np.inf, -np.inf)  # never accepted, always accepted

    # With each fold's distances sorted, counting those below a threshold is a binary search.
    same = [np.sort(part) for part in np.array_split(distance[is_same], folds)]
    different = [np.sort(part) for part in np.array_split(distance[~is_same], folds)]
    same_size, different_size = _sizes(same), _sizes(different)

    thresholds = np.arange(0, 4, THRESHOLD_STEP)
    true_accepts, false_accepts = _counts_below(same, thresholds), _counts_below(different, thresholds)
    correct = true_accepts + different_size[:, None] - false_accepts
    best = np.argmax(correct.sum(axis=0) - correct, axis=1)
    accuracy = correct[np.arange(folds), best] / (same_size + different_size)
    tpr = np.mean(true_accepts / same_size[:, None], axis=0)
    fpr = np.mean(false_accepts / different_size[:, None], axis=0)

    val, far = _validation_rate(same, different)
    exact_accuracy = _exact_accuracy(same, different)
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
        tar_at_far=_tar_at_far(np.concatenate(same), np.concatenate(different)),
        undecidable_pairs=int(np.count_nonzero(undecidable)),
    )


def worst_errors(
    distance: np.ndarray, is_same: np.ndarray, threshold: float, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """(false accepts, false rejects) at `threshold`: indices of pairs, int64 (<= count,) each, the worst ones first.

    distance: float64 (P,); pairs without a distance (NaN) are in neither.
    """
    accepts = np.flatnonzero(~is_same & (distance < threshold))
    rejects = np.flatnonzero(is_same & (distance >= threshold))
    return (accepts[np.argsort(distance[accepts], kind="stable")][:count],
            rejects[np.argsort(-distance[rejects], kind="stable")][:count])


def usable_folds(is_same: np.ndarray, folds: int = 10) -> int:
    """min(folds, same pairs, different pairs): each fold needs a pair of each label.

    Raises UserError if that is less than two, because then there are no other folds to choose a threshold on.
    """
    if folds < 2:
        raise ValueError(f"folds is {folds}: at least 2 are needed, because each threshold is chosen on the others")
    same = int(np.count_nonzero(is_same))
    different = len(is_same) - same
    if min(same, different) < 2:
        raise UserError(
            f"{same} same (label 1) and {different} different (label 0) pairs: the protocol needs at least 2 of each"
        )
    return min(folds, same, different)


def format_result(result: VerificationResult) -> str:
    """The four lines of the published validation script."""
    return "\n".join((
        f"Accuracy: {result.accuracy:.5f}+-{result.accuracy_std:.5f}",
        f"Validation rate: {result.val:.5f}+-{result.val_std:.5f} @ FAR={result.far:.5f}",
        f"Area Under Curve (AUC): {result.auc:.3f}",
        f"Equal Error Rate (EER): {result.eer:.3f}",
    ))


def _as_bool(is_same: np.ndarray) -> np.ndarray:
    is_same = np.asarray(is_same)
    if is_same.ndim != 1 or not np.isin(is_same, (0, 1)).all():
        raise ValueError("is_same must be (P,) of bool, or of 0 and 1")
    return is_same.astype(bool)


def squared_distance(embeddings1: np.ndarray, embeddings2: np.ndarray) -> np.ndarray:
    """|e1/|e1| - e2/|e2||^2: (P, d), (P, d) -> float64 (P,), NaN where an embedding has no direction."""
    distance = np.empty(len(embeddings1))
    # Blocks that stay in the cache take half the time of whole arrays, and need no float64 copies of them.
    rows = max(1, 2**16 // max(1, embeddings1.shape[1]))
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


def _sizes(parts: list[np.ndarray]) -> np.ndarray:
    return np.array([len(part) for part in parts])


def _counts_below(parts: list[np.ndarray], thresholds: np.ndarray) -> np.ndarray:
    """int64 (K, T): the number of each fold's sorted distances below each threshold."""
    return np.stack([np.searchsorted(part, thresholds, side="left") for part in parts])


def _validation_rate(same: list[np.ndarray], different: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Per fold (val, far), each float64 (K,), from the sorted distances of the folds."""
    thresholds = np.arange(0, 4, VAL_THRESHOLD_STEP)
    false_accepts = _counts_below(different, thresholds)
    sizes = _sizes(different)
    far_elsewhere = (false_accepts.sum(axis=0) - false_accepts) / (sizes.sum() - sizes)[:, None]  # (K, T), rising
    chosen = [np.interp(TARGET_FAR, far, thresholds) if far[-1] >= TARGET_FAR else 0.0 for far in far_elsewhere]
    val = [np.searchsorted(part, t, side="left") / len(part) for part, t in zip(same, chosen)]
    far = [np.searchsorted(part, t, side="left") / len(part) for part, t in zip(different, chosen)]
    return np.array(val), np.array(far)


def _exact_accuracy(same: list[np.ndarray], different: list[np.ndarray]) -> np.ndarray:
    """Per fold, float64 (K,), from the sorted distances of the folds."""
    folds = len(same)
    distance = np.concatenate(same + different)
    fold = np.concatenate([np.full(len(part), k % folds) for k, part in enumerate(same + different)])
    # The change in correct decisions when a pair is accepted.
    gain = np.concatenate([np.ones(sum(map(len, same))), -np.ones(sum(map(len, different)))])
    order = np.argsort(distance, kind="stable")
    order = order[np.isfinite(distance[order])]  # pairs that are wrong at every threshold
    accuracy = np.empty(folds)
    for k in range(folds):
        others = order[fold[order] != k]
        threshold = _best_threshold(distance[others], gain[others])
        correct = np.count_nonzero(same[k] < threshold) + np.count_nonzero(different[k] >= threshold)
        accuracy[k] = correct / (len(same[k]) + len(different[k]))
    return accuracy


def _best_threshold(distance: np.ndarray, gain: np.ndarray) -> float:
    """The threshold t that maximizes the sum of `gain` over `distance` < t; both (P,), distances sorted."""
    if len(distance) == 0:
        return 0.0
    ends = np.flatnonzero(np.append(distance[1:] > distance[:-1], True))  # the last of each run of equal distances
    total = np.append(0.0, np.cumsum(gain)[ends])
    best = int(np.argmax(total))
    if best == 0:
        return float(distance[0])
    if best == len(ends):
        return np.inf
    below, above = distance[ends[best - 1]], distance[ends[best - 1] + 1]
    return float(max((below + above) / 2, np.nextafter(below, np.inf)))  # never rounds down to `below`


def _tar_at_far(same: np.ndarray, different: np.ndarray) -> dict[str, float]:
    different = np.sort(different)
    return {
        f"1e-{k}": float(np.mean(same < different[len(different) // 10**k]))
        for k in FAR_EXPONENTS if 10**k <= len(different)
    }


def _equal_error_rate(tpr: np.ndarray, fpr: np.ndarray) -> float:
    """The fpr at which fpr + tpr = 1. Both rise along the curve, which ends in (1, 1)."""
    tpr, fpr = np.append(tpr, 1.0), np.append(fpr, 1.0)
    excess = fpr + tpr - 1
    after = int(np.argmax(excess >= 0))
    if after == 0:  # every different pair is undecidable
        return float(fpr[0])
    step = -excess[after - 1] / (excess[after] - excess[after - 1])
    return float(fpr[after - 1] + step * (fpr[after] - fpr[after - 1]))
