"""The LFW protocol against a literal implementation with loops, and on degenerate input."""

from __future__ import annotations

import json
import math
import time
import warnings

import numpy as np
import pytest

from utils.errors import UserError
from utils.evaluation.lfw import VerificationResult, evaluate, evaluate_distances, usable_folds

NUMBERS = ("accuracy", "accuracy_std", "val", "val_std", "far", "auc", "eer", "exact_accuracy", "exact_accuracy_std")
CURVES = ("thresholds", "tpr", "fpr")


def literal_protocol(embeddings1: np.ndarray, embeddings2: np.ndarray, is_same: np.ndarray, folds: int = 10) -> dict:
    """The protocol as published, one pair and one threshold at a time."""
    fold_of = [0] * len(is_same)
    for label in (True, False):
        of_label = [p for p in range(len(is_same)) if bool(is_same[p]) == label]
        size, longer = divmod(len(of_label), folds)
        start = 0
        for k in range(folds):
            stop = start + size + (k < longer)
            for p in of_label[start:stop]:
                fold_of[p] = k
            start = stop

    distance = []
    for a, b in zip(embeddings1.astype(np.float64), embeddings2.astype(np.float64)):
        length_a, length_b = math.sqrt(sum(a * a)), math.sqrt(sum(b * b))
        usable = all(math.isfinite(x) and x > 0 for x in (length_a, length_b))
        distance.append(float(sum((a / length_a - b / length_b) ** 2)) if usable else None)

    def accepted(p: int, threshold: float) -> bool:
        return not is_same[p] if distance[p] is None else distance[p] < threshold

    def rates(pairs: list[int], threshold: float) -> tuple[float, float, float]:
        """(true positive rate, false positive rate, accuracy)"""
        tp = fp = tn = fn = 0
        for p in pairs:
            if accepted(p, threshold):
                tp, fp = tp + bool(is_same[p]), fp + (not is_same[p])
            else:
                fn, tn = fn + bool(is_same[p]), tn + (not is_same[p])
        return tp / (tp + fn), fp / (fp + tn), (tp + tn) / len(pairs)

    thresholds, fine = np.arange(0, 4, 0.01).tolist(), np.arange(0, 4, 0.001).tolist()  # lists: faster in loops
    tpr, fpr, accuracy, val, far, exact_accuracy = [], [], [], [], [], []
    for k in range(folds):
        inside = [p for p in range(len(is_same)) if fold_of[p] == k]
        outside = [p for p in range(len(is_same)) if fold_of[p] != k]
        best, best_accuracy = 0.0, -1.0
        for t in thresholds:
            outside_accuracy = rates(outside, t)[2]
            if outside_accuracy > best_accuracy:
                best, best_accuracy = t, outside_accuracy
        accuracy.append(rates(inside, best)[2])
        curve = [rates(inside, t) for t in thresholds]
        tpr.append([point[0] for point in curve])
        fpr.append([point[1] for point in curve])

        values = sorted({distance[p] for p in outside if distance[p] is not None})
        candidates = [values[0], *((a + b) / 2 for a, b in zip(values, values[1:])), math.inf] if values else [0.0]
        exact_accuracy.append(rates(inside, max(candidates, key=lambda t: rates(outside, t)[2]))[2])

        different = [p for p in outside if not is_same[p]]
        far_outside = [sum(accepted(p, t) for p in different) / len(different) for t in fine]
        chosen = 0.0
        if far_outside[-1] >= 1e-3:
            below = max(i for i in range(len(fine)) if far_outside[i] <= 1e-3) if far_outside[0] <= 1e-3 else None
            if below is not None:
                chosen = fine[below]
                if far_outside[below] < 1e-3:
                    rise = far_outside[below + 1] - far_outside[below]
                    chosen += (1e-3 - far_outside[below]) / rise * (fine[below + 1] - fine[below])
        val.append(rates(inside, chosen)[0])
        far.append(rates(inside, chosen)[1])

    tpr, fpr = np.mean(tpr, axis=0), np.mean(fpr, axis=0)
    auc = 0.0
    for i in range(1, len(thresholds)):
        auc += (fpr[i] - fpr[i - 1]) * (tpr[i] + tpr[i - 1]) / 2
    everywhere = range(len(is_same))
    return {
        "accuracy": np.mean(accuracy), "accuracy_std": np.std(accuracy), "val": np.mean(val), "val_std": np.std(val),
        "far": np.mean(far), "auc": auc, "eer": equal_error_rate(tpr, fpr),
        "exact_accuracy": np.mean(exact_accuracy), "exact_accuracy_std": np.std(exact_accuracy),
        "threshold": max(thresholds, key=lambda t: rates(everywhere, t)[2]),
        "undecidable_pairs": distance.count(None), "tar_at_far": tar_at_far(distance, is_same),
        "thresholds": thresholds, "tpr": tpr, "fpr": fpr,
    }


def tar_at_far(distance: list[float | None], is_same: np.ndarray) -> dict[str, float]:
    """Among the distances of different pairs, the allowed threshold with the most true accepts."""
    different = [-math.inf if d is None else d for d, label in zip(distance, is_same) if not label]
    same = [math.inf if d is None else d for d, label in zip(distance, is_same) if label]
    rates = {}
    for k in range(1, 7):
        if 10**k <= len(different):
            allowed = [t for t in different if sum(d < t for d in different) * 10**k <= len(different)]
            rates[f"1e-{k}"] = max(sum(d < t for d in same) for t in allowed) / len(same)
    return rates


def equal_error_rate(tpr: np.ndarray, fpr: np.ndarray) -> float:
    """Where 1 - tpr = fpr along the polygon through the points, continued to (1, 1): by bisection of each segment."""
    points = [(x, y) for x, y in zip(fpr, tpr)] + [(1.0, 1.0)]
    if points[0][0] + points[0][1] >= 1:
        return points[0][0]
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x1 + y1 >= 1:
            low, high = 0.0, 1.0
            for _ in range(80):
                middle = (low + high) / 2
                reached = x0 + middle * (x1 - x0) + y0 + middle * (y1 - y0) >= 1
                low, high = (low, middle) if reached else (middle, high)
            return x0 + high * (x1 - x0)
    raise AssertionError("no crossing")


def official_order(pairs: int, folds: int = 10) -> np.ndarray:
    """Fold by fold: same, then different."""
    part = pairs // folds // 2
    return np.tile(np.repeat([True, False], part), folds)


def faces(rng: np.random.Generator, is_same: np.ndarray, size: int = 16, noise: float = 1.0):
    """Embeddings where most same pairs are closer than different ones."""
    first = rng.standard_normal((len(is_same), size))
    second = rng.standard_normal((len(is_same), size))
    second[is_same] = second[is_same] * noise + first[is_same]
    return first.astype(np.float32), second.astype(np.float32)


def coarse(rng: np.random.Generator, count: int) -> np.ndarray:
    """Four entries of ±1 among eight: distances are exact multiples of 0.5, and many are equal."""
    signs = rng.choice([-1.0, 1.0], (count, 8))
    chosen = np.argsort(rng.random((count, 8)), axis=1)[:, :4]
    embeddings = np.zeros((count, 8))
    np.put_along_axis(embeddings, chosen, np.take_along_axis(signs, chosen, axis=1), axis=1)
    return embeddings


def assert_equals_literal(
    embeddings1: np.ndarray, embeddings2: np.ndarray, is_same: np.ndarray, folds: int = 10
) -> None:
    result = evaluate(embeddings1, embeddings2, is_same, folds)
    expected = literal_protocol(embeddings1, embeddings2, is_same, usable_folds(is_same, folds))
    for name in NUMBERS:
        assert getattr(result, name) == pytest.approx(expected[name], abs=1e-12), name
    for name in CURVES:
        np.testing.assert_allclose(getattr(result, name), expected[name], rtol=0, atol=1e-12, err_msg=name)
    assert result.threshold == pytest.approx(expected["threshold"], abs=1e-12)
    assert result.undecidable_pairs == expected["undecidable_pairs"]
    assert result.tar_at_far == pytest.approx(expected["tar_at_far"], abs=1e-12)


def assert_finite(result: VerificationResult) -> None:
    for name in NUMBERS:
        assert 0 <= getattr(result, name) <= 1, name
    for name in CURVES:
        assert np.isfinite(getattr(result, name)).all(), name
    json.dumps(result.to_json_dict(), allow_nan=False)
    assert len(str(result).splitlines()) == 4


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_equals_the_literal_protocol(noise: float) -> None:
    rng = np.random.default_rng(int(noise * 10))
    is_same = official_order(100)
    assert_equals_literal(*faces(rng, is_same, noise=noise), is_same)


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_literal_protocol_with_ties_on_the_grid(seed: int) -> None:
    rng = np.random.default_rng(seed)
    is_same = rng.random(116) < 0.4  # any order, unequal numbers of each label, not divisible by ten
    first, second = coarse(rng, 116), coarse(rng, 116)
    second = np.where((is_same & (rng.random(116) < 0.5))[:, None], first, second)
    assert len(np.unique(np.round(((first - second) ** 2).sum(1), 9))) < 20
    assert_equals_literal(first, second, is_same)


@pytest.mark.slow
def test_equals_the_literal_protocol_where_the_false_accept_rate_is_exactly_reached() -> None:
    """Each of two folds has 1,000 different pairs outside, so 1e-3 is one pair and a flat stretch of the curve."""
    rng = np.random.default_rng(5)
    is_same = np.arange(2004) < 4
    assert_equals_literal(*faces(rng, is_same, size=4), is_same, folds=2)


def test_equals_the_literal_protocol_where_distances_crowd_between_grid_points() -> None:
    rng = np.random.default_rng(8)
    is_same = official_order(200, folds=4)
    distance = np.where(is_same, rng.uniform(0.998, 1.0, 200), rng.uniform(0.9992, 1.002, 200))
    angle = np.arccos(1 - distance / 2)
    second = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    assert_equals_literal(np.tile([1.0, 0.0], (200, 1)), second, is_same, folds=4)


def test_equals_the_literal_protocol_with_unusable_embeddings() -> None:
    rng = np.random.default_rng(6)
    is_same = official_order(100)
    first, second = faces(rng, is_same, noise=0.5)
    first[3], second[10], first[40, 2], second[77, 0], first[90, 1] = 0, np.nan, np.inf, np.nan, -np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equals_literal(first, second, is_same)


@pytest.mark.parametrize("size", [3, 5, 128, 512])
def test_official_and_sorted_order_give_identical_numbers(size: int) -> None:
    rng = np.random.default_rng(size)
    is_same = official_order(600)
    first, second = faces(rng, is_same, size=size, noise=1.5)
    by_label = np.argsort(~is_same, kind="stable")
    assert is_same[by_label].tolist() == [True] * 300 + [False] * 300
    official = evaluate(first, second, is_same).to_json_dict()
    assert official == evaluate(first[by_label], second[by_label], is_same[by_label]).to_json_dict()
    assert 0.55 < official["accuracy"] < 0.999


def test_random_embeddings_give_a_half() -> None:
    rng = np.random.default_rng(0)
    is_same = official_order(6000)
    result = evaluate(rng.standard_normal((6000, 64)), rng.standard_normal((6000, 64)), is_same)
    assert result.accuracy == pytest.approx(0.5, abs=0.03)
    assert result.auc == pytest.approx(0.5, abs=0.03)
    assert result.eer == pytest.approx(0.5, abs=0.03)
    assert result.val < 0.01 and result.far < 0.01


def test_perfect_embeddings_give_one() -> None:
    rng = np.random.default_rng(0)
    is_same = official_order(600)
    first = rng.standard_normal((600, 64))
    second = np.where(is_same[:, None], first * 3, rng.standard_normal((600, 64)))  # length does not matter
    result = evaluate(first, second, is_same)
    assert (result.accuracy, result.accuracy_std, result.val, result.auc, result.eer) == (1, 0, 1, 1, 0)
    assert str(result) == (
        "Accuracy: 1.00000+-0.00000\n"
        f"Validation rate: 1.00000+-0.00000 @ FAR={result.far:.5f}\n"
        "Area Under Curve (AUC): 1.000\n"
        "Equal Error Rate (EER): 0.000"
    )


def test_inverted_embeddings_give_nothing() -> None:
    is_same = official_order(200)
    first = np.tile([1.0, 0.0], (200, 1))
    second = np.where(is_same[:, None], [-1.0, 0.0], [1.0, 0.0])
    result = evaluate(first, second, is_same)
    assert_finite(result)
    assert result.accuracy == 0.5  # all different
    assert (result.val, result.auc, result.eer) == (0, 0, 1)


@pytest.mark.parametrize("value", [0.0, 1.0, np.nan, np.inf, 1e-30, 1e30])
def test_equal_embeddings_are_never_good(value: float) -> None:
    is_same = official_order(200)
    embeddings = np.full((200, 8), value, dtype=np.float32)
    result = evaluate(embeddings, embeddings, is_same)
    assert_finite(result)
    usable = np.isfinite(value) and value != 0
    assert result.accuracy == (0.5 if usable else 0)
    assert result.auc == (0.5 if usable else 0)
    assert result.eer == (0.5 if usable else 1)
    # The published interpolation accepts all of them, as the false accept rate beside it shows.
    assert (result.val, result.far) == ((1, 1) if usable else (0, 1))


def test_opposite_embeddings_beyond_the_grid() -> None:
    """All distances are 4, so no threshold of the grid accepts a pair."""
    is_same = official_order(200)
    first = np.tile([1.0, 0.0], (200, 1))
    result = evaluate(first, -first, is_same)
    assert_finite(result)
    assert (result.accuracy, result.val, result.far, result.auc, result.eer) == (0.5, 0, 0, 0, 0.5)


def test_an_unusable_embedding_only_makes_it_worse() -> None:
    rng = np.random.default_rng(2)
    is_same = official_order(200)
    first = rng.standard_normal((200, 32))
    second = np.where(is_same[:, None], first, -first)
    for pair in (0, 199):
        for value in (0.0, np.nan):
            spoilt = second.copy()
            spoilt[pair] = value
            result = evaluate(first, spoilt, is_same)
            assert_finite(result)
            assert result.accuracy == pytest.approx(1 - 1 / 200)
            assert result.auc < 1


@pytest.mark.parametrize("same, different, folds", [(2, 2, 2), (3, 50, 3), (50, 4, 4), (10, 10, 10), (11, 19, 10)])
def test_few_pairs_use_fewer_folds(same: int, different: int, folds: int) -> None:
    rng = np.random.default_rng(same)
    is_same = np.arange(same + different) < same
    assert usable_folds(is_same) == folds
    assert_equals_literal(*faces(rng, is_same), is_same)


@pytest.mark.parametrize("same, different", [(100, 0), (0, 100), (1, 100), (100, 1), (0, 0)])
def test_a_single_label_is_refused(same: int, different: int) -> None:
    is_same = np.arange(same + different) < same
    with pytest.raises(UserError, match=f"^{same} same .* {different} different .* at least 2 of each"):
        evaluate(np.ones((len(is_same), 4)), np.ones((len(is_same), 4)), is_same)


def test_labels_may_be_integers_and_embeddings_any_float() -> None:
    rng = np.random.default_rng(4)
    is_same = official_order(100)
    first, second = faces(rng, is_same)
    expected = evaluate(first, second, is_same).to_json_dict()
    assert evaluate(first.astype(np.float64) * 1e-3, second * 1e3, is_same.astype(np.int64)).to_json_dict() == expected


def test_the_result_as_json() -> None:
    rng = np.random.default_rng(3)
    is_same = official_order(100)
    result = evaluate(*faces(rng, is_same), is_same)
    read = json.loads(json.dumps(result.to_json_dict(), allow_nan=False))
    assert set(read) == {*NUMBERS, *CURVES, "threshold", "tar_at_far", "undecidable_pairs"}
    assert read["accuracy"] == result.accuracy
    assert len(read["thresholds"]) == len(read["tpr"]) == len(read["fpr"]) == 400
    assert (read["thresholds"][0], read["thresholds"][-1]) == (0, pytest.approx(3.99))
    assert np.all(np.diff(read["tpr"]) >= 0) and np.all(np.diff(read["fpr"]) >= 0)


@pytest.mark.parametrize(("different", "rates"), [(9, 0), (10, 1), (99, 1), (100, 2), (1000, 3), (3000, 3), (10**6, 6)])
def test_tar_is_reported_as_far_as_there_are_pairs(different: int, rates: int) -> None:
    """Same pairs have distances 0.25, 1.25, ..., 9.25 and different ones are beyond 1000, or moved to 3 and 7."""
    distance = np.concatenate([np.arange(10) + 0.25, 1000 + np.arange(different)])
    allowed = {f"1e-{k}": different // 10**k for k in range(1, rates + 1)}
    for count, far in [(count, far) for far, count in allowed.items()]:
        shifted = distance.copy()
        shifted[10 : 10 + count] = 3  # as many false accepts as the rate allows; one more is at 7
        shifted[10 + count] = 7
        result = evaluate_distances(shifted, np.arange(len(distance)) < 10, folds=2)
        assert list(result.tar_at_far) == list(allowed)
        assert result.tar_at_far[far] == 0.7
    if not rates:
        assert evaluate_distances(distance, np.arange(len(distance)) < 10, folds=2).tar_at_far == {}


def test_the_exact_threshold_separates_what_the_grid_cannot() -> None:
    """All distances are between two points of the grid."""
    is_same = official_order(200)
    distance = np.where(is_same, 1.0012, 1.0049) + np.linspace(0, 1e-3, 200)
    result = evaluate_distances(distance, is_same)
    assert (result.exact_accuracy, result.exact_accuracy_std) == (1, 0) and result.accuracy == 0.5
    one, next_to_it = 1.0, float(np.nextafter(1.0, 2))  # no float64 is between them
    assert evaluate_distances(np.where(is_same, one, next_to_it), is_same).exact_accuracy == 1
    assert evaluate_distances(np.where(is_same, next_to_it, one), is_same).exact_accuracy == 0.5


def test_six_thousand_pairs_take_well_under_a_third_of_a_second() -> None:
    rng = np.random.default_rng(1)
    is_same = official_order(6000)
    first, second = faces(rng, is_same, size=512)
    seconds = []
    for _ in range(3):
        started = time.process_time()
        evaluate(first, second, is_same)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.3
