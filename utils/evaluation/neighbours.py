"""The most similar rows of a large matrix, block by block: N x N cosines in bounded memory, on a CPU or a GPU.

Shapes: N rows of d values, read by a function (start, stop) -> (stop - start, d), so that they can lie in files. Rows
are normalised here. A row that is zero, NaN or infinite is similar to nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Read = Callable[[int, int], Tensor]

BLOCK = 4096  # rows of a tile: 64 MiB of cosines
PANEL_BYTES = 2**29  # rows held in memory while all later ones are read once
NOTHING = -2.0  # the cosine with a row that takes no part


@dataclass(frozen=True)
class Neighbours:
    """What `find_neighbours` returns. Row numbers are int64, cosines float32.

    nearest, similarity: (N,), the most similar row of another group, the first of several, and its cosine; -1 and
        NOTHING where there is none.
    first, second, cosines: (P,), the pairs first < second of rows of two groups with a cosine of at least `above`, the
        most similar first, equal ones by number.
    left_out: the pairs beyond `most` were more similar than this: `above` of the pairs that are complete. None: all
        pairs are there.
    unusable: rows that are zero, NaN or infinite.
    """

    nearest: np.ndarray
    similarity: np.ndarray
    first: np.ndarray
    second: np.ndarray
    cosines: np.ndarray
    left_out: float | None
    unusable: int


def unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(rows / their lengths, zero where unusable; bool (n,), which are usable). float64 stays, others become float32.
    """
    exact = rows.double()  # in which the length of a float32 row neither overflows nor underflows
    length = torch.linalg.vector_norm(exact, dim=1, keepdim=True)
    usable = (length.isfinite() & (length > 0))[:, 0]
    unit = torch.where(usable[:, None], exact / length, 0)
    return (unit if rows.dtype == torch.float64 else unit.float()), usable


def predict_seconds(rows: int, width: int, device: torch.device, *, columns: int | None = None) -> float:
    """How long `find_neighbours` of so many rows takes, or with `columns` nearest_rows, from one measured tile.

    Reading the rows is not in it.
    """
    size = min(BLOCK, rows, columns or rows)
    block = torch.ones(size, width, device=device)
    seconds = float("inf")
    for _ in range(2):  # the first one warms up
        started = time.perf_counter()
        tile = block @ block.T
        tile.max(1), tile.max(0) if columns is None else None
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = min(seconds, time.perf_counter() - started)
    return seconds * (rows / size) * (rows / size / 2 if columns is None else columns / size)


def find_neighbours(
    read: Read, count: int, *, above: float, groups: np.ndarray | None = None, most: int = 1_000_000,
    device: torch.device | str = "cpu", block: int = BLOCK, panel_bytes: int = PANEL_BYTES,
    advance: Callable[[int], object] = lambda pairs: None,
) -> Neighbours:
    """Compare `count` rows with one another. Each pair is computed once.

    Holds one panel of rows, two blocks of rows, one tile (block, block), and 12 bytes a row; the rows after a panel are
    read once for each panel.

    Args:
        groups: int64 (N,), ascending: rows of one group are not compared, such as the centers of one class. None: each
            row is a group.
        most: pairs that are kept, the most similar ones.
        advance: called with the number of pairs of rows that were compared since the last call, of N * (N + 1) / 2.
    """
    groups = np.arange(count) if groups is None else groups
    similarity, nearest = np.full(count, NOTHING, np.float32), np.full(count, -1)
    kept, unusable = _Kept(above, most), 0
    group_of = torch.from_numpy(groups)
    start = 0
    while start < count:
        panel, stop = list[tuple[int, Tensor, Tensor]](), start
        for first in range(start, count, block):
            rows, usable = unit_rows(read(first, min(first + block, count)).to(device))
            unusable += int((~usable).sum()) if start == 0 else 0
            if first == start or first == stop and (stop - start) * rows[0].nbytes < panel_bytes:
                panel.append((first, rows, usable))
                stop = first + len(rows)
            for upper, other, other_usable in panel:
                tile = other @ rows.T
                tile[~other_usable] = NOTHING
                tile[:, ~usable] = NOTHING
                if groups[upper + len(other) - 1] >= groups[first]:
                    # ascending: of the earlier rows only those of one group, and a tile with itself
                    same = group_of[upper:upper + len(other), None] >= group_of[None, first:first + len(rows)]
                    tile[same.to(tile.device)] = NOTHING
                by_column, by_row = tile.max(0), tile.max(1)
                # In this order the candidates of a row come by rising number, so that the first of equal ones stays.
                _improve(similarity, nearest, first, by_column, upper)
                _improve(similarity, nearest, upper, by_row, first)
                if float(by_row.values.max()) >= kept.least:
                    one, two = torch.nonzero(tile >= kept.least, as_tuple=True)
                    kept.add(one.cpu().numpy() + upper, two.cpu().numpy() + first, tile[one, two].cpu().numpy())
                advance(len(other) * len(rows) if upper != first else len(other) * (len(other) + 1) // 2)
        start = stop
    nearest[similarity == NOTHING] = -1
    return Neighbours(nearest, similarity, *kept.sorted(), kept.left_out, unusable)


def nearest_rows(
    queries: Read, query_count: int, read: Read, count: int, own: np.ndarray | None = None, *,
    device: torch.device | str = "cpu", block: int = BLOCK, advance: Callable[[int], object] = lambda pairs: None,
) -> tuple[np.ndarray, np.ndarray]:
    """For each query its nearest row, the first of several: (int64 (M,), float32 (M,) cosines); -1 and NOTHING: none.

    own: int64 (M,), the row that a query is not compared with, or -1. All rows are read once for each panel of queries.
    """
    similarity, nearest = np.full(query_count, NOTHING, np.float32), np.full(query_count, -1)
    panel = 16 * block
    for start in range(0, query_count, panel):
        blocks = [(first, *unit_rows(queries(first, min(first + block, query_count)).to(device)))
                  for first in range(start, min(start + panel, query_count), block)]
        for first in range(0, count, block):
            rows, usable = unit_rows(read(first, min(first + block, count)).to(device))
            for query, values, query_usable in blocks:
                tile = values @ rows.T
                tile[~query_usable] = NOTHING
                tile[:, ~usable] = NOTHING
                if own is not None:
                    column = own[query:query + len(values)] - first
                    inside = np.flatnonzero((column >= 0) & (column < len(rows)))
                    tile[torch.from_numpy(inside).to(device), torch.from_numpy(column[inside]).to(device)] = NOTHING
                _improve(similarity, nearest, query, tile.max(1), first)
                advance(len(values) * len(rows))
    nearest[similarity == NOTHING] = -1
    return nearest, similarity


def _improve(similarity: np.ndarray, nearest: np.ndarray, start: int, best: tuple[Tensor, Tensor], offset: int) -> None:
    """Take the best of a tile for the rows from `start` where it is better than what they have."""
    values, numbers = best[0].cpu().numpy().astype(np.float32), best[1].cpu().numpy()
    place = slice(start, start + len(values))
    better = values > similarity[place]
    similarity[place][better] = values[better]
    nearest[place][better] = numbers[better] + offset


class _Kept:
    """The most similar pairs that were added so far."""

    def __init__(self, above: float, most: int) -> None:
        self.least, self._most = above, most
        self.left_out: float | None = None
        self._parts, self._count = list[tuple[np.ndarray, ...]](), 0

    def add(self, first: np.ndarray, second: np.ndarray, cosines: np.ndarray) -> None:
        self._parts.append((first, second, cosines))
        self._count += len(first)
        if self._count > 2 * self._most:
            self._cut()

    def _cut(self) -> None:
        first, second, cosines = (np.concatenate(column) for column in zip(*self._parts))
        if len(cosines) > self._most:  # equal ones may come that belong before the last
            self.least = self.left_out = float(np.partition(cosines, -self._most)[-self._most])
            enough = cosines >= self.least  # sorting all would take ten times as long
            first, second, cosines = first[enough], second[enough], cosines[enough]
        order = np.lexsort((second, first, -cosines))[: self._most]
        self._parts, self._count = [(first[order], second[order], cosines[order])], len(order)

    def sorted(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if not self._parts:
            return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
        self._cut()
        return self._parts[0]  # type: ignore[return-value]


def in_blocks(count: int, block: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive blocks of 0..count."""
    return ((start, min(start + block, count)) for start in range(0, count, block))
