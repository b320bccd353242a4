"""The arithmetic of templates, verification and identification, against numbers by hand and against plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from utils.evaluation import identification
from utils.evaluation.identification import fuse_templates, pair_similarities, search, unit_rows, verify


def test_verification_by_hand() -> None:
    """Ten impostor pairs allow one accept at FAR 0.1; the two at 0.7 are equal, so the threshold is 0.7 at first."""
    different = [0.9, 0.7, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, -0.1]
    same = [0.95, 0.8, 0.7, 0.6]
    result = verify(np.float32(same + different), np.arange(14) < 4)
    assert (result.genuine, result.impostors) == (4, 10)
    assert result.tar == {"1e-1": 0.5} and result.far == {"1e-1": 0.1}
    assert result.threshold["1e-1"] == pytest.approx(0.7)
    # 0.95 beats all 10, 0.8 beats 9, 0.7 beats 7 and equals 2, 0.6 beats 7.
    assert result.auc == pytest.approx((10 + 9 + 8 + 7) / 40)
    # The nearest points: FAR 0.1 is at the threshold 0.8, FAR 0 at 0.95.
    nearest = verify(np.float32(same + different), np.arange(14) < 4, nearest=True)
    assert nearest.tar == {"1e-1": 0.5, **{f"1e-{k}": 0.25 for k in range(2, 7)}}
    assert nearest.threshold["1e-1"] == pytest.approx(0.8) and nearest.far["1e-1"] == 0.1


def slow_verification(similarity: list[float], is_same: list[bool], k: int) -> tuple[float, float]:
    """(TAR, FAR): the best TAR over all thresholds whose FAR does not exceed 1e-k."""
    same = [s for s, label in zip(similarity, is_same) if label]
    different = [s for s, label in zip(similarity, is_same) if not label]
    best = (0.0, 0.0)
    for threshold in sorted({*similarity, -9.0}):
        far = sum(s > threshold for s in different) * 10**k
        if far <= len(different):
            tar = sum(s > threshold for s in same) / len(same)
            best = max(best, (tar, far / 10**k / len(different)))
    return best


def slow_nearest(similarity: list[float], is_same: list[bool], k: int) -> tuple[float, float]:
    """(TAR, FAR) as in insightface's script: scikit-learn's roc_curve, flipped, and the first of the nearest points."""
    points = []
    for threshold in sorted(set(similarity), reverse=True):
        points.append([sum(s >= threshold and label == kind for s, label in zip(similarity, is_same))
                       for kind in (False, True)])
    if len(points) > 2:  # drop_intermediate
        points = [b for a, b, c in zip([None, *points], points, [*points[1:], None])
                  if a is None or c is None or [c[0] - b[0], c[1] - b[1]] != [b[0] - a[0], b[1] - a[1]]]
    points.insert(0, [0, 0])
    fpr = [f / points[-1][0] for f, _ in points][::-1]
    tpr = [t / points[-1][1] for _, t in points][::-1]
    place = min(range(len(fpr)), key=lambda i: (abs(fpr[i] - 10.0**-k), i))
    return tpr[place], fpr[place]


@pytest.mark.parametrize("seed", range(4))
def test_verification_of_random_scores_with_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = (40, 120, 250, 350)[seed]
    is_same = rng.random(count) < 0.3
    similarity = np.round(rng.normal(0.4 * is_same, 0.3), (1, 2, 3, 2)[seed]).astype(np.float32)
    similarity[rng.integers(0, count, 5)] = -np.inf
    lists = similarity.tolist(), is_same.tolist()
    found = verify(similarity, is_same)
    assert list(found.tar) == [f"1e-{k}" for k in range(1, 7) if 10**k <= np.count_nonzero(~is_same)]
    for far in found.tar:
        tar, measured = slow_verification(*lists, int(far[-1]))
        assert found.tar[far] == pytest.approx(tar) and found.far[far] <= 10.0 ** -int(far[-1])
        assert np.mean(similarity[~is_same] > found.threshold[far]) == found.far[far] >= measured
    nearest = verify(similarity, is_same, nearest=True)
    for k in range(1, 7):
        assert (nearest.tar[f"1e-{k}"], nearest.far[f"1e-{k}"]) == pytest.approx(slow_nearest(*lists, k))
    same, different = similarity[is_same], similarity[~is_same]
    assert found.auc == pytest.approx(
        np.mean([[(s > d) + 0.5 * (s == d) for d in different] for s in same]))
    for tar, far in zip(found.curve_tar[::9], found.curve_far[::9]):  # each is a point of the curve
        assert (far * len(different)) == pytest.approx(round(far * len(different)))
        assert tar <= max(np.mean(same >= t) for t in {*similarity.tolist()} if np.mean(different >= t) <= far + 1e-9
                          ) if far < 1 else True


def test_templates_by_hand() -> None:
    """Template 0 has a video of two frames and a photo; template 1 one photo; template 2 only what cannot be used."""
    embeddings = np.float32([[2, 0], [4, 0], [0, 2], [0, 5], [np.nan, 1], [0, 0]])
    arguments = {"template": np.array([0, 0, 0, 1, 2, 2]), "media": np.array([7, 7, 8, 7, 7, 7]), "num_templates": 3}
    weight = np.array([0.5, 1.0, 1.0, 0.1, 1.0, 1.0])
    templates, usable = fuse_templates(embeddings, weight=weight, **arguments)
    # The video's mean is ((1, 0) + (4, 0)) / 2, the photo is (0, 2).
    assert templates == pytest.approx(np.array([[2.5 / np.hypot(2.5, 2), 2 / np.hypot(2.5, 2)], [0, 1], [0, 0]]))
    assert usable.tolist() == [True, True, True, True, False, False]
    # Without norms: ((0.5, 0) + (1, 0)) / 2 and (0, 1).
    templates, _ = fuse_templates(embeddings, weight=weight, keep_norm=False, **arguments)
    assert templates[0] == pytest.approx(np.array([0.75, 1]) / 1.25)


@pytest.mark.parametrize("keep_norm", [True, False])
def test_templates_of_random_images(keep_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops over templates and medias, as published. Images that cannot be used do not exist for them."""
    monkeypatch.setattr("utils.evaluation.identification._ROWS", 7)
    rng = np.random.default_rng(1)
    embeddings = rng.standard_normal((100, 6)).astype(np.float32) * rng.uniform(1, 20, (100, 1)).astype(np.float32)
    embeddings[3], embeddings[50, 2], embeddings[51, 0] = 0, np.nan, np.inf
    template, media, weight = rng.integers(0, 15, 100), rng.integers(-4, 4, 100), rng.uniform(0, 1, 100)
    weight[7] = np.nan
    templates, usable = fuse_templates(embeddings, template, media, weight, num_templates=16, keep_norm=keep_norm)
    assert np.flatnonzero(~usable).tolist() == [3, 7, 50, 51]
    for t in range(16):
        total = np.zeros(6)
        for m in range(-4, 4):
            rows = []
            for i in range(100):
                if template[i] == t and media[i] == m and usable[i]:
                    e = embeddings[i].astype(np.float64)
                    rows.append(weight[i] * (e if keep_norm else e / np.sqrt(np.sum(e * e))))
            if rows:
                total += np.mean(rows, axis=0)
        length = np.sqrt(np.sum(total * total))
        assert templates[t] == pytest.approx(total / length if length else total, abs=1e-6)


def test_similarities_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.evaluation.identification._SIMILARITIES", 50)  # blocks of two templates
    rng = np.random.default_rng(0)
    templates = unit_rows(rng.standard_normal((20, 5)))
    templates[4] = 0
    first, second = rng.integers(0, 20, (2, 300)).astype(np.int32)
    first[first == 9] = 8  # a template that is never first
    expected = [-np.inf if 4 in (a, b) else float(templates[a].astype(float) @ templates[b])
                for a, b in zip(first, second)]
    assert pair_similarities(templates, first, second) == pytest.approx(np.array(expected), abs=1e-6)


@pytest.mark.parametrize("pairs", [1, 30, 3000])
def test_few_pairs_of_many_templates_and_many_pairs_are_the_same(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identification, "_SIMILARITIES", 40 * 300)
    monkeypatch.setattr(identification, "_COPIED_PAIRS", 7)
    rng = np.random.default_rng(0)
    templates = unit_rows(rng.standard_normal((300, 8)).astype(np.float32))
    templates[5] = 0
    first, second = rng.integers(300, size=(2, pairs))
    expected = (templates[first] * templates[second]).sum(1)
    expected[(first == 5) | (second == 5)] = -np.inf
    np.testing.assert_allclose(pair_similarities(templates, first, second), expected, atol=1e-6)


def test_a_search_by_hand() -> None:
    """Unit vectors of four halves, so that similarities are exact. Subject 1 has two entries."""
    gallery = np.float32([[1, 1, 1, 1], [1, 1, 1, -1], [1, 1, -1, -1], [1, -1, 1, -1]]) / 2
    subjects = np.array([1, 2, 3, 1])
    probes = np.float32([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, -1, 1, -1], [1, 1, 1, -1], [0, 0, 0, 0]]) / 2
    found = search(probes, np.array([1, 2, 3, 9, 8, 1]), gallery, subjects)
    assert found.mated.tolist() == [True, True, True, False, False, True]
    assert found.mate.tolist() == [1, 0.5, 0, -np.inf, -np.inf, -np.inf]
    assert found.other.tolist() == [0.5, 1, 1, 1, 1, -np.inf]
    # The third probe's mate is at 0, as is the second entry of subject 1: equal counts as closer.
    assert found.rank.tolist() == [1, 2, 4, 0, 0, 0]
    assert found.hit_rates((1, 2, 3, 4)) == {"1": 0.25, "2": 0.5, "3": 0.5, "4": 0.75}
    # Both other probes reach 1, so no threshold below 1 keeps a FPIR of 0.1, and no mate is above 1.
    assert found.open_set((0.1,)) == {"0.1": {"tpir": 0.0, "fpir": 0.0, "threshold": 1.0}}
    assert search(probes[:3], np.array([1, 2, 3]), gallery, subjects).open_set((0.1,)) == {}


@pytest.mark.parametrize("seed", range(3))
def test_random_searches_with_ties(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each similarity, rank and rate counted in loops."""
    monkeypatch.setattr("utils.evaluation.identification._SIMILARITIES", 60)
    rng = np.random.default_rng(seed)
    signs = rng.choice(np.float32([-0.5, 0.5]), (60, 4))  # inner products are multiples of 0.5
    probes, gallery = signs[:45], signs[45:]
    probes[3] = gallery[2] = 0
    subject, entry = rng.integers(0, 20, 45), rng.integers(0, 12, 15)
    found = search(probes, subject, gallery, entry)
    hits, others, mates = [], [], []
    for q in range(45):
        scores = [float("-inf") if q == 3 or g == 2 else sum(float(a) * float(b) for a, b in zip(probes[q], gallery[g]))
                  for g in range(15)]
        mine = [s for s, e in zip(scores, entry) if e == subject[q]]
        rest = [s for s, e in zip(scores, entry) if e != subject[q]]
        assert found.other[q] == max(rest)
        if not mine:
            others.append(max(scores))
            continue
        rank = 1 + sum(s >= max(mine) for s in rest) if max(mine) > float("-inf") else 0
        assert (found.rank[q], found.mate[q]) == (rank, max(mine))
        hits.append(rank)
        mates.append((rank, max(mine)))
    assert found.hit_rates((1, 5)) == {k: np.mean([0 < r <= int(k) for r in hits]) for k in ("1", "5")}
    for rate in (0.1, 0.3, 0.9):
        options = [t for t in {-9.0, *others} if sum(o > t for o in others) <= rate * len(others)]
        best = max(np.mean([r == 1 and m > t for r, m in mates]) for t in options)
        point = found.open_set((rate,))[f"{rate:g}"]
        assert point["tpir"] == pytest.approx(best) and point["fpir"] <= rate
