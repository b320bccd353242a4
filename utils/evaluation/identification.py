"""Templates, verification at low false accept rates, and identification: numpy in, numbers out.

Similarities are inner products of unit vectors. Everything is computed in blocks, so that memory does not depend on the
number of pairs beyond a few bytes for each.

A vector that cannot be used (zero, NaN or infinite) is never accepted: its similarity with anything is -inf.

Shapes: N images, d embedding size, T templates, P pairs, Q probes, G gallery entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

FAR_EXPONENTS = range(1, 7)  # FAR = 1e-1, ..., 1e-6
_ROWS = 4096  # embeddings at a time
_SIMILARITIES = 2**23  # at a time: 32 MiB
_COPY_COST, _COPIED_PAIRS = 100, 2**13  # of a pair of copied vectors, in similarities of a product; pairs at a time
_CURVE_POINTS = 500


class Rows(Protocol):
    """float32 (N, d): an array, or a file that is read in parts."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """float32 (n, d): each row divided by its length, and zeros in place of a row without a direction."""
    with np.errstate(all="ignore"):
        length = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
        usable = np.isfinite(length) & (length > 0)
        return np.where(usable[:, None], rows / np.where(usable, length, 1)[:, None], 0).astype(np.float32)


def usable_rows(rows: np.ndarray) -> np.ndarray:
    """bool (n,): which of the rows of `unit_rows` are not zero."""
    return np.asarray(rows.any(axis=1))


def fuse_templates(embeddings: Rows, template: np.ndarray, media: np.ndarray, weight: np.ndarray, *,
                   num_templates: int, keep_norm: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The template vectors of the IJB protocols, as insightface's evaluation computes them.

    v_i = weight_i e_i, or weight_i e_i / |e_i| without keep_norm; mean of v over the images of a template that are from
    one media (a photo or a video); sum over the template's media; division by the length.

    embeddings: (N, d). template: integers (N,), from 0 to T - 1. media: int64 (N,). weight: float64 (N,).
    Returns float32 (T, d), zero where a template has no usable image, and bool (N,), the usable images. Images whose
    embedding or weight is not finite, or whose embedding is zero, are left out of the means.
    """
    count, size = embeddings.shape
    length = np.empty(count)
    for start in range(0, count, _ROWS):
        rows = embeddings[start : start + _ROWS]
        with np.errstate(over="ignore", invalid="ignore"):
            length[start : start + _ROWS] = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
    usable = np.isfinite(length) & (length > 0) & np.isfinite(weight)
    # The number of usable images of each pair of template and media.
    order = np.lexsort((media, template))
    begins = np.append(True, np.diff(template[order]).astype(bool) | np.diff(media[order]).astype(bool))[:count]
    group = np.empty(count, dtype=np.int64)
    group[order] = np.cumsum(begins) - 1
    images = np.bincount(group[usable], minlength=int(begins.sum()))[group]
    factor = np.zeros(count)
    factor[usable] = weight[usable] / images[usable] / (1 if keep_norm else length[usable])

    total = np.zeros((num_templates, size))
    for start in range(0, count, _ROWS):
        block = slice(start, start + _ROWS)
        by_template = np.argsort(template[block], kind="stable")
        kept = by_template[usable[block][by_template]]
        if len(kept):
            owner = template[block][kept]
            first = np.flatnonzero(np.append(True, np.diff(owner) != 0))
            total[owner[first]] += np.add.reduceat(embeddings[block][kept] * factor[block][kept, None], first)
    return unit_rows(total), usable


def pair_similarities(templates: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """float32 (P,): the similarities of templates first[p] and second[p]. templates: (T, d), of unit length or zero.

    One matrix product per block of first templates, with all templates: a pair costs less than the copies of its two
    vectors would, unless few of the possible pairs are listed; then the vectors are copied.
    """
    usable = usable_rows(templates)
    similarity = np.empty(len(first), dtype=np.float32)
    counts = np.bincount(first, minlength=len(templates))
    order, ends = np.argsort(first, kind="stable").astype(np.int32), np.cumsum(counts)
    present = np.flatnonzero(counts)
    place = np.zeros(len(templates), dtype=np.int64)  # of a template among those present
    place[present] = np.arange(len(present))
    step = max(1, _SIMILARITIES // max(1, len(templates)))
    for start in range(0, len(present), step):
        block = present[start : start + step]
        pairs = order[ends[block[0]] - counts[block[0]] : ends[block[-1]]]
        if len(pairs) * _COPY_COST < len(block) * len(templates):
            for part in np.array_split(pairs, -(-len(pairs) // _COPIED_PAIRS)):
                similarity[part] = np.einsum("pd,pd->p", templates[first[part]], templates[second[part]])
            continue
        products = templates[block] @ templates.T
        similarity[pairs] = products[place[first[pairs]] - start, second[pairs]]
    if not usable.all():
        similarity[~(usable[first] & usable[second])] = -np.inf
    return similarity


@dataclass(frozen=True)
class Verification:
    """Verification at fixed false accept rates. Rates are fractions in [0, 1]."""

    genuine: int  # pairs of one person
    impostors: int  # pairs of different people
    tar: dict[str, float]  # "1e-4": the share of genuine pairs that are accepted at this false accept rate
    far: dict[str, float]  # the false accept rate that is measured there
    threshold: dict[str, float]  # `accepted`: similarity above it (at or above it with the nearest point of the curve)
    auc: float  # the probability that a genuine pair is more similar than an impostor pair; equal ones count half
    curve_far: np.ndarray  # (n,), rising
    curve_tar: np.ndarray


def verify(similarity: np.ndarray, is_same: np.ndarray, nearest: bool = False) -> Verification:
    """TAR at FAR 1e-k for k from 1 to 6.

    The threshold is the lowest one whose false accept rate does not exceed 1e-k, and rates with 10^k > D, the number
    of impostor pairs, are left out. nearest: what insightface's scripts print instead: the point of scikit-learn's
    `roc_curve` whose false accept rate is nearest to 1e-k, be it above; of several, the one with the largest rates.

    similarity: float (P,), without NaN. is_same: bool (P,), with a pair of each kind at least.
    """
    same, different = np.sort(similarity[is_same]), np.sort(similarity[~is_same])
    genuine, impostors = len(same), len(different)

    def above(scores: np.ndarray, threshold: np.ndarray) -> np.ndarray:
        return (len(scores) - np.searchsorted(scores, threshold, side="right")) / len(scores)

    steps = np.unique(np.geomspace(1, impostors, _CURVE_POINTS).astype(np.int64)) - 1
    thresholds = different[impostors - 1 - steps]
    if nearest:
        tar, far, threshold = _nearest_points(same, different)
    else:
        exponents = [k for k in FAR_EXPONENTS if 10**k <= impostors]
        chosen = different[[impostors - 1 - impostors // 10**k for k in exponents]]
        tar, far, threshold = ({f"1e-{k}": float(value) for k, value in zip(exponents, values)} for values in (
            above(same, chosen), above(different, chosen), chosen))
    below = np.searchsorted(different, same, side="left") + np.searchsorted(different, same, side="right")
    return Verification(genuine, impostors, tar, far, threshold, float(below.mean() / 2 / impostors),
                        above(different, thresholds), above(same, thresholds))


def _nearest_points(same: np.ndarray, different: np.ndarray) -> tuple[dict[str, float], ...]:
    """(TAR, FAR, threshold) at the points of scikit-learn's ROC curve. same, different: rising."""
    threshold = np.unique(np.concatenate([same, different]))[::-1]
    accepted = [(len(scores) - np.searchsorted(scores, threshold, side="left")).astype(np.int32)
                for scores in (same, different)]
    if len(threshold) > 2:  # drop_intermediate: without the inner points of straight parts
        bends = np.diff(accepted[0], 2).astype(bool) | np.diff(accepted[1], 2).astype(bool)
        kept = np.concatenate([[True], bends, [True]])
        threshold, accepted = threshold[kept], [counts[kept] for counts in accepted]
    threshold = np.append(np.inf, threshold)
    tar, far = (np.append(0, counts) / counts[-1] for counts in accepted)
    places = [len(far) - 1 - int(np.argmin(np.abs(far - 10.0**-k)[::-1])) for k in FAR_EXPONENTS]
    return tuple({f"1e-{k}": float(values[place]) for k, place in zip(FAR_EXPONENTS, places)}
                 for values in (tar, far, threshold))


@dataclass(frozen=True)
class Search:
    """The probes' search in a gallery. A mate is an entry of the probe's subject.

    mated: bool (Q,), whether the gallery has a mate.
    rank: int64 (Q,): 1 + the number of other entries that are as similar as the best mate, or more; 0 without a mate,
        or if the probe or all its mates cannot be used.
    mate, other: float32 (Q,), the largest similarity with a mate, and with another entry; -inf if there is none.
    """

    mated: np.ndarray
    rank: np.ndarray
    mate: np.ndarray
    other: np.ndarray

    def hit_rates(self, ranks: Sequence[int]) -> dict[str, float]:
        """{"1": share of mated probes of rank 1, ...}, for a closed set."""
        rank = self.rank[self.mated]
        return {str(k): float(np.mean((rank > 0) & (rank <= k))) for k in ranks} if len(rank) else {}

    def open_set(self, fpirs: Sequence[float]) -> dict[str, dict[str, float]]:
        """{"0.01": {"tpir": ..., "fpir": ..., "threshold": ...}}; {} without mated probes or without others.

        FPIR: the share of probes without a mate whose largest similarity is above the threshold; the lowest threshold
        that does not exceed the asked-for rate. TPIR: the share of mated probes of rank 1 whose mate is above it. See
        Grother and Ngan, "Face Recognition Vendor Test" (NIST, 2014).
        """
        others = np.sort(self.other[~self.mated])
        if not len(others) or not self.mated.any():
            return {}
        found = {}
        for rate in fpirs:
            allowed = int(len(others) * rate + 1e-9)
            threshold = others[len(others) - 1 - min(allowed, len(others) - 1)]
            found[f"{rate:g}"] = {
                "tpir": float(np.mean((self.rank == 1)[self.mated] & (self.mate[self.mated] > threshold))),
                "fpir": float(np.mean(others > threshold)), "threshold": float(threshold)}
        return found


def search(probes: np.ndarray, probe_subject: np.ndarray, gallery: np.ndarray, gallery_subject: np.ndarray) -> Search:
    """Compare each probe with each gallery entry. probes: (Q, d), gallery: (G, d), of unit length or zero.

    probe_subject, gallery_subject: int64 (Q,), (G,). A subject may have several entries.
    """
    count = len(probes)
    rank, mated = np.zeros(count, dtype=np.int64), np.isin(probe_subject, gallery_subject)
    mate, other = np.empty(count, dtype=np.float32), np.empty(count, dtype=np.float32)
    usable, usable_entry = usable_rows(probes), usable_rows(gallery)
    step = max(1, _SIMILARITIES // max(1, len(gallery)))
    for start in range(0, count, step):
        block = slice(start, start + step)
        similarity = probes[block] @ gallery.T
        similarity[:, ~usable_entry] = -np.inf
        similarity[~usable[block]] = -np.inf
        is_mate = probe_subject[block, None] == gallery_subject
        mate[block] = np.max(similarity, axis=1, where=is_mate, initial=-np.inf)
        other[block] = np.max(similarity, axis=1, where=~is_mate, initial=-np.inf)
        rank[block] = 1 + np.count_nonzero((similarity >= mate[block, None]) & ~is_mate, axis=1)
    rank[np.isneginf(mate)] = 0
    return Search(mated, rank, mate, other)
