"""Thresholds, intervals and calibrated scores against implementations with loops, and numbers computed by hand."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.pairs import PairList
from utils.errors import UserError
from utils.evaluation import operating_points
from utils.evaluation.calibration import calibration_cost, fit_logistic
from utils.evaluation.lfw import evaluate_distances
from utils.evaluation.operating_points import PairScores, Verification, clopper_pearson, quantile_interval
from utils.evaluation.pairs import identities_of


def random_pairs(seed: int, people: int = 12, size: int = 120, decimals: int = 2, missing: int = 0) -> PairScores:
    """Pairs with many equal scores. Same pairs score higher."""
    rng = np.random.default_rng(seed)
    first, second = rng.integers(people, size=(2, size))
    second[: size // 3] = first[: size // 3]
    is_same = first == second
    cosine = np.round(np.clip(rng.normal(np.where(is_same, 0.5, 0.1), 0.25), -1, 1), decimals)
    cosine[rng.choice(size, missing, replace=False)] = np.nan
    return PairScores(cosine, is_same, first, second, "made up")


def brute_force(same: list[float], different: list[float], rate: Fraction) -> tuple[float, float]:
    """(the lowest threshold among the scores of different pairs whose FAR is not above the rate, its TAR)."""
    for threshold in sorted(different):
        if Fraction(sum(score > threshold for score in different), len(different)) <= rate:
            return threshold, sum(score > threshold for score in same) / len(same)
    raise AssertionError


def lists(pairs: PairScores) -> tuple[list[float], list[float]]:
    score = np.where(np.isnan(pairs.cosine), np.where(pairs.is_same, -np.inf, np.inf), pairs.cosine)
    return score[pairs.is_same].tolist(), score[~pairs.is_same].tolist()


@pytest.mark.parametrize("seed, missing", [(0, 0), (1, 0), (2, 5)])
def test_operating_points_with_ties_and_missing_scores(seed: int, missing: int) -> None:
    pairs = random_pairs(seed, missing=missing)
    same, different = lists(pairs)
    verification = Verification(pairs)
    for far in (0.3, 0.1, 0.05, 0.02):
        point, = verification.points([far])
        threshold, tar = brute_force(same, different, Fraction(str(far)))
        if math.isinf(threshold):
            assert point.threshold is None and "have no score" in point.note
            continue
        assert (point.threshold, point.tar) == (threshold, tar)
        assert point.accepted == sum(score > threshold for score in different) and point.different == len(different)
        assert point.accepted / point.different <= far  # never above what was asked for
    curve = verification.curve()
    for far, tar in zip(curve.far[:-1], curve.tar):
        assert tar == brute_force(same, different, Fraction(round(far * len(different)), len(different)))[1]
    assert (curve.far[-1], curve.tar[-1]) == (1, 1)
    assert np.all(np.diff(curve.far) > 0) and np.all(np.diff(curve.tar) >= 0)


def test_the_rates_are_those_of_the_lfw_protocol() -> None:
    pairs = random_pairs(5, people=300, size=3000, decimals=12, missing=4)
    result = evaluate_distances(2 - 2 * pairs.cosine, pairs.is_same)
    for point in Verification(pairs).points([0.1, 0.01]):
        assert point.tar == result.tar_at_far[f"1e-{round(-math.log10(point.far))}"]


def test_numbers_by_hand() -> None:
    """Ten different pairs score 0.0, ..., 0.9, four same pairs 0.95, 0.85, 0.75 and 0.05."""
    cosine = np.array([*np.arange(10) / 10, 0.95, 0.85, 0.75, 0.05])
    first = np.arange(14)
    pairs = PairScores(cosine, first >= 10, first, np.where(first >= 10, first, first + 20), "made up")
    points = Verification(pairs).points([0.1, 0.2, 0.29, 0.09])
    assert [(point.threshold, point.accepted, point.tar) for point in points] == [
        (0.8, 1, 0.5), (0.7, 2, 0.75), (0.7, 2, 0.75), (None, 0, None)]
    assert [point.note[:28] for point in points[:2]] == ["rests on one pair", "rests on 2 pairs only"]
    assert points[3].describe() == ("FAR 0.09: cannot be estimated: it needs 12 different pairs or more, and the set "
                                    "has 10; if none of them is accepted, FAR is below 0.3 (rule of three)")
    # 0.29 * 100 is 28.999... in floating point
    many = PairScores(np.append(np.arange(100) / 100, 1.0), np.arange(101) == 100, np.arange(101),
                      np.append(np.arange(100) + 200, 100), "made up")
    assert Verification(many).points([0.29])[0].accepted == 29


@pytest.mark.parametrize("seed", range(3))
def test_bootstrap_against_explicit_resampling(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each drawn copy of an identity is a person of its own, with copies of the images."""
    monkeypatch.setattr(operating_points, "_MOST_REPLICATES", 15)
    monkeypatch.setattr(operating_points, "_LEAST_REPLICATES", 1)
    pairs = random_pairs(seed, people=7, size=60)
    pairs.is_same[:3] = False  # labelled wrongly: both images of one identity
    rates = [Fraction(1, 4), Fraction(1, 20)]
    thresholds, tars = Verification(pairs).bootstrap(rates)
    assert thresholds.shape == tars.shape == (15, 2) and len(np.unique(thresholds)) > 5
    rng = np.random.default_rng(operating_points.SEED)
    for replicate in range(15):
        copies = Counter(rng.integers(7, size=7).tolist())
        same, different = [], []
        for cosine, is_same, i, j in zip(pairs.cosine, pairs.is_same, pairs.identity1, pairs.identity2):
            for _ in range(copies[i]):
                if is_same:
                    same.append(cosine)
                for _ in range(0 if is_same else 1 if i == j else copies[j]):
                    different.append(cosine)
        for k, rate in enumerate(rates):
            assert (thresholds[replicate, k], tars[replicate, k]) == brute_force(same, different, rate)


def test_intervals_are_reproducible_and_wider_with_fewer_people() -> None:
    """The same number of pairs, of 5 and of 300 people who are not all equally easy."""
    def width(people: int) -> float:
        rng = np.random.default_rng(0)
        ease = np.arange(people) % 2 * 0.8
        first = rng.integers(people, size=2000)
        second = np.where(np.arange(2000) < 1000, first, (first + 1) % people)
        is_same = first == second
        cosine = np.where(is_same, ease[first], 0.0) + rng.normal(0, 0.1, 2000)
        point, = Verification(PairScores(cosine, is_same, first, second, "made up")).points([0.1])
        low, high = point.tar_interval
        assert low < point.tar < high
        return high - low

    assert width(5) > 3 * width(300)
    assert width(5) == width(5)


def test_a_replicate_without_a_same_pair_is_left_out() -> None:
    first = np.array([0, 1, 2, 3, 4, 5])
    second = np.array([0, 2, 3, 4, 5, 1])
    pairs = PairScores(np.array([0.9, 0.1, 0.2, 0.3, 0.4, 0.5]), first == second, first, second, "made up")
    thresholds, tars = Verification(pairs).bootstrap([Fraction(1, 5)])
    assert 0 < np.isnan(tars).sum() < len(tars) and np.array_equal(np.isnan(tars), np.isnan(thresholds))
    assert Verification(pairs).points([0.2])[0].tar_interval == (1.0, 1.0)
    with pytest.raises(UserError, match="1 same and 0 different"):
        Verification(PairScores(*(part[:1] for part in (pairs.cosine, pairs.is_same, first, second)), "made up"))


def test_pairs_without_a_score() -> None:
    pairs = random_pairs(0)
    unusable = PairScores(np.full(120, np.nan), pairs.is_same, pairs.identity1, pairs.identity2, "made up")
    point, = Verification(unusable).points([0.1])
    assert point.threshold is None and point.note.startswith("cannot be reached: 120 pairs have no score")
    edges, same, different = Verification(unusable).histogram()
    assert same.sum() == different.sum() == 0 and np.isfinite(edges).all()
    assert quantile_interval(np.array([np.inf, np.nan])) is None
    # Bounds of a threshold that some replicates cannot reach.
    assert quantile_interval(np.array([0.25] * 10 + [np.inf] * 10)) == (0.25, 1.0)


def test_histogram_counts_every_score() -> None:
    pairs = random_pairs(3, missing=7)
    edges, same, different = Verification(pairs).histogram(10)
    known = ~np.isnan(pairs.cosine)
    assert same.sum() == np.count_nonzero(pairs.is_same & known)
    assert different.sum() == np.count_nonzero(~pairs.is_same & known)
    assert (edges[0], edges[-1]) == (np.nanmin(pairs.cosine), np.nanmax(pairs.cosine))


@pytest.mark.parametrize("hits, trials", [(0, 10), (1, 10), (3, 40), (10, 10), (39, 40)])
def test_clopper_pearson_is_the_exact_interval(hits: int, trials: int) -> None:
    def at_most(k: int, p: float) -> float:
        return sum(math.comb(trials, i) * p**i * (1 - p) ** (trials - i) for i in range(k + 1))

    low, high = clopper_pearson(hits, trials)
    assert low == 0 if hits == 0 else math.isclose(1 - at_most(hits - 1, low), 0.025, rel_tol=1e-8)
    assert high == 1 if hits == trials else math.isclose(at_most(hits, high), 0.025, rel_tol=1e-8)


def test_clopper_pearson_of_published_numbers() -> None:
    np.testing.assert_allclose(clopper_pearson(0, 100), (0, 1 - 0.025**0.01), rtol=1e-9)
    np.testing.assert_allclose(clopper_pearson(4, 20), (0.0573, 0.4366), atol=1e-4)
    low, high = clopper_pearson(1000, 10_000_000)  # the normal approximation is good here
    np.testing.assert_allclose([low, high], 1e-4 * (1 + np.array([-1.96, 1.96]) / 1000**0.5), rtol=0.002)


def test_logistic_calibration_of_two_scores_has_a_closed_form() -> None:
    """With two different scores the line goes through the logit of each one's mean target."""
    cosine, is_same = np.array([0.0] * 6 + [1.0] * 4), np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 0], bool)
    high, low = 5 / 6, 1 / 8  # Platt's targets of 4 same and 6 different pairs

    def logit_at(same: int, different: int) -> float:
        weight_same, weight_different = same / 8, different / 12
        p = (weight_same * high + weight_different * low) / (weight_same + weight_different)
        return math.log(p / (1 - p))

    slope, intercept = fit_logistic(np.append(cosine, np.nan), np.append(is_same, True))
    np.testing.assert_allclose([intercept, slope + intercept], [logit_at(1, 5), logit_at(3, 1)], rtol=1e-9)


def test_logistic_calibration_against_another_solver() -> None:
    pairs = random_pairs(11, size=400)
    slope, intercept = fit_logistic(pairs.cosine, pairs.is_same)
    same, different = pairs.is_same.sum(), (~pairs.is_same).sum()
    score, label = torch.from_numpy(pairs.cosine), torch.from_numpy(pairs.is_same)
    target = torch.where(label, (same + 1) / (same + 2), 1 / (different + 2)).double()
    weight = torch.where(label, 0.5 / same, 0.5 / different).double()
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([w], lr=1, max_iter=500, tolerance_grad=1e-13, tolerance_change=0,
                               line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        solver.zero_grad()
        z = w[0] * score + w[1]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(z, target, weight, reduction="sum")
        loss.backward()
        return loss

    solver.step(closure)
    np.testing.assert_allclose([slope, intercept], w.detach().numpy(), rtol=1e-5)
    assert 0 < calibration_cost(pairs.cosine, pairs.is_same, slope, intercept) < 1
    assert math.isclose(calibration_cost(pairs.cosine, pairs.is_same, 0.0, 0.0), 1)


def test_separable_scores_have_a_calibration_and_useless_ones_none() -> None:
    slope, intercept = fit_logistic(np.array([-0.1, 0.0, 0.9, 1.0]), np.array([False, False, True, True]))
    assert 0 < slope < 100 and abs(slope * 0.45 + intercept) < 1e-6
    for cosine in (np.array([0.9, 1.0, 0.0, 0.1]), np.full(4, 0.5), np.full(4, np.nan)):
        with pytest.raises(UserError, match="calibrate"):
            fit_logistic(cosine, np.array([False, False, True, True]))
    with pytest.raises(UserError, match="calibrate"):  # a slope of 2e-15: a rounding error
        fit_logistic(np.array([np.nan, 0.2, 0.3, 0.1]), np.array([True, True, False, False]))


def write_list(root: Path, lines: list[str]) -> PairList:
    for line in lines:
        for path in line.split()[:2]:
            (root / "imgs" / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (112, 112)).save(root / "imgs" / path)
    (root / "pair.list").write_text("\n".join(lines))
    return PairList(root / "imgs", root / "pair.list")


def test_identities_are_directories_or_images_that_same_pairs_join(tmp_path: Path) -> None:
    lines = ["a/1.png a/2.png 1", "a/3.png b/1.png 0", "c/1.png b/2.png 0"]
    numbers, how = identities_of(write_list(tmp_path / "a", lines))
    assert how == "the images' directories"
    assert numbers.tolist() == [0, 0, 0, 1, 2, 1]
    # a same pair joins two directories
    lines = ["a/1.png b/1.png 1", "c/1.png a/2.png 0", "c/1.png d/1.png 1"]
    numbers, _ = identities_of(write_list(tmp_path / "b", lines))
    assert len(set(numbers.tolist())) == 2
    # one directory for all: chains of same pairs, in any order
    lines = ["5.png 4.png 1", "1.png 2.png 1", "3.png 4.png 1", "2.png 3.png 1", "6.png 1.png 0", "7.png 6.png 0"]
    numbers, how = identities_of(write_list(tmp_path / "c", lines))
    names = [5, 4, 1, 2, 3, 6, 7]
    assert how == "images that same pairs join"
    assert {name for name, number in zip(names, numbers) if number == numbers[0]} == {1, 2, 3, 4, 5}
    assert len(set(numbers.tolist())) == 3
