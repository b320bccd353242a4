"""The most similar rows, block by block, against all cosines at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from utils.checkpoint import shards
from utils.evaluation import neighbours
from utils.evaluation.neighbours import NOTHING, find_neighbours, nearest_rows, predict_seconds, unit_rows


def some_rows(count: int, width: int = 8, seed: int = 0) -> torch.Tensor:
    """Small whole numbers: many cosines are equal, and sums are exact in any order."""
    rows = torch.from_numpy(np.random.default_rng(seed).integers(-2, 3, (count, width))).double()
    rows[rows.abs().sum(1) == 0] = 1
    return rows


def all_cosines(rows: torch.Tensor, groups: np.ndarray) -> np.ndarray:
    """float32 (N, N), NOTHING within a group and with rows that take no part."""
    values = rows.numpy()
    length = np.sqrt((values.astype(np.float64) ** 2).sum(1, keepdims=True))
    with np.errstate(invalid="ignore", divide="ignore"):
        unit = values / length
    cosines = (unit @ unit.T).astype(np.float32)
    usable = np.isfinite(length[:, 0]) & (length[:, 0] > 0)
    cosines[(groups[:, None] == groups) | ~usable[:, None] | ~usable] = NOTHING
    return cosines


def check(found, rows, groups, above):
    cosines = all_cosines(rows, groups)
    best = cosines.max(1)
    np.testing.assert_allclose(found.similarity, best, atol=1e-6)
    # The first of equal ones, up to rounding: no earlier row is more similar by more than that.
    for row, (number, value) in enumerate(zip(found.nearest, best)):
        if value == NOTHING:
            assert number == -1
        else:
            assert cosines[row, number] >= value - 1e-6
            assert not (cosines[row, :number] > value + 1e-6).any()
    first, second = np.nonzero(np.triu(cosines >= above, 1))
    assert set(zip(found.first.tolist(), found.second.tolist())) == set(zip(first.tolist(), second.tolist()))
    np.testing.assert_allclose(found.cosines, cosines[found.first, found.second], atol=1e-6)
    order = np.lexsort((found.second, found.first, -found.cosines))
    assert order.tolist() == list(range(len(order)))


@pytest.mark.parametrize("count", [1, 2, 7, 16, 37])
@pytest.mark.parametrize("block", [1, 5, 8, 64])
@pytest.mark.parametrize("panel_bytes", [0, 640, 10**6])
def test_blocks_and_panels_find_what_all_cosines_show(count, block, panel_bytes):
    rows, pairs = some_rows(count), []
    found = find_neighbours(lambda start, stop: rows[start:stop], count, above=0.613, block=block,
                            panel_bytes=panel_bytes, advance=pairs.append)
    check(found, rows, np.arange(count), 0.613)
    assert sum(pairs) == count * (count + 1) // 2
    assert found.left_out is None and found.unusable == 0


@pytest.mark.parametrize("block", [1, 4, 6, 100])
def test_rows_of_a_group_are_not_compared(block):
    rows, groups = some_rows(30), np.repeat(np.arange(10), 3)
    found = find_neighbours(lambda start, stop: rows[start:stop], 30, above=0.513, groups=groups, block=block)
    check(found, rows, groups, 0.513)
    assert (groups[found.nearest] != groups).all()


def test_the_first_of_equal_rows_is_the_nearest():
    rows = torch.eye(4)[[0, 1, 0, 1, 0, 2]]
    for block in (1, 2, 3, 6):
        found = find_neighbours(lambda start, stop: rows[start:stop], 6, above=0.9, block=block, panel_bytes=0)
        assert found.nearest[:5].tolist() == [2, 3, 0, 1, 0] and found.nearest[5] == 0  # cosine 0 with all
        assert list(zip(found.first, found.second)) == [(0, 2), (0, 4), (1, 3), (2, 4)]


def test_rows_that_are_zero_or_not_finite_take_no_part():
    rows = some_rows(12).float()
    rows[3], rows[5, 2], rows[11, 0] = 0, float("nan"), float("inf")
    found = find_neighbours(lambda start, stop: rows[start:stop], 12, above=-1.0, block=5)
    check(found, rows, np.arange(12), -1.0)
    assert found.unusable == 3 and found.nearest[[3, 5, 11]].tolist() == [-1, -1, -1]
    nothing = find_neighbours(lambda start, stop: torch.zeros(stop - start, 4), 3, above=0.1)
    assert nothing.unusable == 3 and (nothing.nearest == -1).all() and len(nothing.first) == 0


def test_a_huge_row_is_normalised():
    unit, usable = unit_rows(torch.tensor([[3e38, 3e38], [1e-30, 0.0]]))
    assert usable.all() and torch.allclose(unit, torch.tensor([[0.5**0.5, 0.5**0.5], [1.0, 0.0]]))


def test_of_too_many_pairs_the_most_similar_are_kept():
    rows = some_rows(60)
    whole = find_neighbours(lambda start, stop: rows[start:stop], 60, above=0.313, block=7)
    cut = find_neighbours(lambda start, stop: rows[start:stop], 60, above=0.313, block=7, most=25)
    assert len(cut.first) == 25 < len(whole.first)
    np.testing.assert_array_equal(cut.cosines, whole.cosines[:25])
    np.testing.assert_array_equal(cut.first, whole.first[:25])
    np.testing.assert_array_equal(cut.second, whole.second[:25])
    assert cut.left_out == pytest.approx(whole.cosines[24])


def test_memory_is_bounded_by_blocks_and_a_panel():
    """Reads are no larger than a block, and later rows are read once for each panel, not for each block."""
    rows, reads = some_rows(100).float(), []

    def read(start, stop):
        reads.append((start, stop))
        return rows[start:stop]

    find_neighbours(read, 100, above=2.0, block=10, panel_bytes=30 * 8 * 4)
    assert max(stop - start for start, stop in reads) == 10
    assert [start for start, _ in reads] == [*range(0, 100, 10), *range(30, 100, 10), *range(60, 100, 10), 90]


@pytest.mark.parametrize("block", [1, 4, 50])
def test_nearest_rows_of_queries(block):
    rows, queries = some_rows(23), some_rows(19, seed=1)
    queries[4] = 0
    rows[2] = float("nan")
    own = np.arange(19) % 7 - 1
    expected = (unit_rows(queries)[0] @ unit_rows(rows)[0].T).numpy().astype(np.float32)
    expected[4], expected[:, 2] = NOTHING, NOTHING
    for query, row in enumerate(own):
        if row >= 0:
            expected[query, row] = NOTHING
    nearest, cosine = nearest_rows(lambda start, stop: queries[start:stop], 19, lambda start, stop: rows[start:stop],
                                   23, own, block=block)
    np.testing.assert_allclose(cosine, expected.max(1), atol=1e-6)
    assert nearest[4] == -1 and (nearest[np.arange(19) != 4] >= 0).all() and not (nearest == 2).any()
    assert all(expected[query, row] >= cosine[query] - 1e-6 for query, row in enumerate(nearest) if row >= 0)


@pytest.mark.parametrize("sizes", [(5,), (4, 1), (0, 3, 2), (2, 2, 1)])
def test_centers_are_compared_from_the_shards_of_a_checkpoint(tmp_path, monkeypatch, sizes):
    """W files of different sizes, also without a row, and blocks that do not end where a file does."""
    monkeypatch.setattr(shards, "BLOCK_CLASSES", 2)
    (tmp_path / "shards").mkdir()
    rows, start, blocks, files = some_rows(sum(sizes)).float(), 0, [], {}
    for rank, size in enumerate(sizes):
        part = {"centers": rows[start:start + size]}
        if shards.write_pieces(str(tmp_path), rank, shards.pieces(rank, part, start, blocks)):
            files[shards.shard_name(rank)] = (0, 0)
        start += size
    shards.write_metadata(str(tmp_path), {"centers": rows}, blocks)
    files["shards/.metadata"] = ((tmp_path / "shards" / ".metadata").stat().st_size, 0)
    stored = shards.open_shards(str(tmp_path), ["centers"], tuple(rows.shape), files)["centers"]

    def read(start, stop):
        values = torch.zeros(stop - start, 8)
        stored.copy_rows(np.arange(start, stop), values)
        return values

    check(find_neighbours(read, len(rows), above=0.113, block=3), rows, np.arange(len(rows)), 0.113)


def test_the_time_grows_with_the_pairs(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(neighbours, "BLOCK", 64)
    monkeypatch.setattr(neighbours.time, "perf_counter", lambda: next(clock))  # a tile takes one second
    assert predict_seconds(64, 4, torch.device("cpu")) == 0.5
    assert predict_seconds(640, 4, torch.device("cpu")) == 50
    assert predict_seconds(128, 4, torch.device("cpu"), columns=64) == 2
