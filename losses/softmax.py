"""The margin softmax composed from torchshard's parts: the reference that `losses.fused` is compared with."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from losses.margins import ArcFaceMargin
from utils.dist.collectives import all_reduce_sum
from utils.dist.sharding import ClassShard, parallel_cross_entropy


def margin_softmax_torchshard(
    embedding: Tensor,
    label: Tensor,
    centers: Tensor,
    *,
    shard: ClassShard,
    scale: float,
    margin: float,
    easy_margin: bool,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Collective over `group`. The same as `margin_softmax`, put together from torchshard's parallel_cross_entropy.

    torchshard takes it that all shards have the same width, and gives a wrong loss without a word where they do not:
    narrow ones are padded here, with a logit whose exp is 0 but which, being finite, leaves no NaN behind.
    """
    logits, target_cosine, cosine = _shard_logits(embedding, label, centers, shard, scale, margin, easy_margin)
    if group is None:
        loss = F.cross_entropy(logits, label)
    else:
        # Our shards start at multiples of the full shard's width: padded labels and global labels are the same.
        loss = parallel_cross_entropy(F.pad(logits, (0, shard.chunk - shard.size), value=-1e4 * scale), label)
    return loss, num_closer(cosine, target_cosine, group)


def _shard_logits(
    embedding: Tensor,
    label: Tensor,
    centers: Tensor,
    shard: ClassShard,
    scale: float,
    margin: float,
    easy_margin: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's logits (N, C_r), its share of cos_iy (N,) (0 where another rank owns the target), and the cosines (N, C_r),
    these two without a graph. No host synchronisation: ownership is a mask, never a list of rows.
    """
    cosine = embedding @ F.normalize(centers).t()
    if shard.size == 0:
        return cosine, embedding.new_zeros(embedding.shape[0]), cosine.detach()
    owned = (label >= shard.start) & (label < shard.stop)
    column = (label - shard.start).clamp(0, shard.size - 1).unsqueeze(1)
    target_cosine = cosine.gather(1, column).squeeze(1)
    target_logit = scale * ArcFaceMargin.apply(target_cosine, margin, easy_margin)
    logits = scale * cosine
    # Rows owned elsewhere write back the logit that is there already.
    patch = torch.where(owned, target_logit, logits.gather(1, column).squeeze(1))
    logits = logits.scatter(1, column, patch.unsqueeze(1))
    return logits, torch.where(owned, target_cosine.detach(), cosine.new_zeros(())), cosine.detach()


def num_closer(cosine: Tensor, target_cosine: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Collective over the group. (N,) int64: the number of classes whose cosine is above the target's."""
    target = all_reduce_sum(target_cosine, group)
    # "not <=" rather than ">": a NaN on either side must count against the hit. The target equals itself: no count.
    return all_reduce_sum((~(cosine <= target.unsqueeze(1))).sum(dim=1), group)
