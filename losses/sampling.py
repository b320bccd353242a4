"""Sampling classes: a step uses some classes that are drawn at random, and the targets of its batch.

An et al., "Killing Two Birds with One Stone: Efficient and Robust Training of Face Recognition CNNs by Partial FC",
CVPR 2022. As there, the log-probabilities are not corrected for the sampling. Unlike there, the drawn classes do not
depend on the number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.dist.sharding import ClassShard

# Each block of this many classes has a generator of its own and a fixed number of drawn classes. A rank draws only the
# blocks that overlap its shard, and knows without asking the device how many of its classes are drawn.
SAMPLING_BLOCK = 8192


def draw_classes(shard: ClassShard, rate: float, seed: int, step: int) -> Tensor:
    """(S,) int64 on the CPU, ascending: the drawn classes of the shard, counted from its first one.

    Of each block of B = `SAMPLING_BLOCK` classes (the last one may be smaller), floor(rate * B) are drawn, but at least
    one, without replacement. Whether class c is drawn depends on (seed, step, c, rate, C) only.
    """
    drawn = [np.empty(0, dtype=np.int64)]
    for first in range(shard.start // SAMPLING_BLOCK * SAMPLING_BLOCK, shard.stop, SAMPLING_BLOCK):
        size = min(SAMPLING_BLOCK, shard.num_classes - first)
        # The initial centers have the same keys, and a third word of 0 in the counter.
        words = (seed, first // SAMPLING_BLOCK), (0, 0, 1, step)
        key, counter = (np.array(numbers, dtype=np.uint64) for numbers in words)
        generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
        drawn.append(np.sort(first + generator.choice(size, max(1, int(rate * size)), replace=False, shuffle=False)))
    classes = np.concatenate(drawn)
    return torch.from_numpy(classes[(classes >= shard.start) & (classes < shard.stop)] - shard.start)


@dataclass(frozen=True)
class Sample:
    """The rows of the centers that take part in a step.

    rows: (S + N,) int64. S drawn rows, ascending; then N rows, ascending, of the targets. The shapes do not depend on
        the batch: some of the last N are there twice, or are drawn rows.
    drawn: S.
    left_out: (N,) bool: which of the last N take no part, since they are there already.
    place: (N,) int64: where in `rows` the target of each row of the batch is, or -1 if another rank has it.
    """

    rows: Tensor
    drawn: int
    left_out: Tensor
    place: Tensor


def join_targets(drawn: Tensor, target: Tensor, sub_centers: int = 1) -> Sample:
    """The drawn classes (S,), int64 and ascending, and the targets (N,), -1 where another rank has the target.

    sub_centers: q, the centers of each class: class c has the rows [c * q, c * q + q). S and N of the sample then count
        rows, and `place` is that of the target's first center.

    It waits for the device only if nothing is drawn, of a very small shard.
    """
    owned = target >= 0
    if not len(drawn):
        drawn = target[owned].unique()
        if not len(drawn):
            return Sample(drawn, 0, owned[:0], target)
    # A drawn class stands for targets of other ranks: it is left out below.
    last = torch.where(owned, target, drawn[0]).sort().values
    is_drawn, place_in_drawn = _find(drawn, torch.cat([last, target]))
    repeated = torch.cat([owned.new_zeros(1), last[1:] == last[:-1]])
    in_last = len(drawn) + torch.searchsorted(last, target)
    count = len(last)
    place = torch.where(is_drawn[count:], place_in_drawn[count:], in_last)
    classes, left_out = torch.cat([drawn, last]).unsqueeze(1), (is_drawn[:count] | repeated).unsqueeze(1)
    rows = classes * sub_centers + torch.arange(sub_centers, device=classes.device)
    return Sample(rows.flatten(), len(drawn) * sub_centers, left_out.expand(-1, sub_centers).flatten(),
                  torch.where(owned, place * sub_centers, -1))


def _find(ascending: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each value is in `ascending`, which is not empty; where it is, or would be."""
    place = torch.searchsorted(ascending, values)
    return ascending[place.clamp(max=len(ascending) - 1)] == values, place
