"""The margin softmax written for reading: plain PyTorch, and a composition of torchshard's parts.

Equation, arguments and results are those of `losses.fused.margin_softmax`, which is compared with both. Both hold about
ten tensors of the logits' size (N, R); q sub-centers of a class.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from losses.fused import LEFT_OUT
from losses.margins import Margin, WithSlopes
from utils.dist.collectives import all_reduce_sum
from utils.dist.sharding import parallel_cross_entropy


def margin_softmax_plain(
    embedding: Tensor, target: Tensor, centers: Tensor, margin: Margin, *, scale: float, group: None = None,
    norm: Tensor | None = None, filter_above: float | None = None, sub_centers: int = 1,
) -> tuple[Tensor, Tensor]:
    """`margin_softmax` by its equation, in one process that has all classes."""
    logits, num_closer = _shard_logits(embedding, target, centers, margin, scale, group, norm, filter_above,
                                       sub_centers)
    return F.cross_entropy(logits, target) + _penalty(margin, norm, target), num_closer


def margin_softmax_torchshard(
    embedding: Tensor, target: Tensor, centers: Tensor, margin: Margin, *, scale: float,
    group: dist.ProcessGroup | None, norm: Tensor | None = None, filter_above: float | None = None,
    sub_centers: int = 1,
) -> tuple[Tensor, Tensor]:
    """Collective over `group`. `margin_softmax` through torchshard's parallel_cross_entropy.

    torchshard assumes shards of one width and returns a wrong loss without an error where they differ. Narrow shards
    are padded here, with a logit whose exp is 0 but which is finite, so that it leaves no NaN.
    """
    if group is None:
        return margin_softmax_plain(embedding, target, centers, margin, scale=scale, norm=norm,
                                    filter_above=filter_above, sub_centers=sub_centers)
    logits, num_closer = _shard_logits(embedding, target, centers, margin, scale, group, norm, filter_above,
                                       sub_centers)
    classes = logits.shape[1]
    width = torch.tensor(classes, device=target.device)
    dist.all_reduce(width, op=dist.ReduceOp.MAX, group=group)
    column = torch.where(target >= 0, target + dist.get_rank(group) * width, 0)
    padded = F.pad(logits, (0, int(width) - classes), value=-1e4 * scale)
    loss = parallel_cross_entropy(padded, all_reduce_sum(column, group))
    return loss + _penalty(margin, norm, target), num_closer


def _shard_logits(
    embedding: Tensor, target: Tensor, centers: Tensor, margin: Margin, scale: float, group: dist.ProcessGroup | None,
    norm: Tensor | None, filter_above: float | None, sub_centers: int,
) -> tuple[Tensor, Tensor]:
    """Collective over `group`. This rank's logits (N, R / q), and num_closer (N,), without host synchronisation."""
    cosine = embedding @ F.normalize(centers).t()
    if sub_centers > 1:
        cosine = cosine.view(len(cosine), len(centers) // sub_centers, sub_centers).max(dim=2).values
    owned, column = target >= 0, target.clamp(min=0).unsqueeze(1)
    zeros = embedding.new_zeros(len(target))
    target_cosine = cosine.gather(1, column).squeeze(1) if len(centers) else zeros
    bar = all_reduce_sum(torch.where(owned, target_cosine.detach(), zeros), group)
    margin.observe(bar, norm)
    # "not <=" rather than ">": a NaN on either side must count against the hit. The target equals itself: no count.
    closer = all_reduce_sum((~(cosine.detach() <= bar.unsqueeze(1))).sum(dim=1), group)
    if not len(centers):
        return scale * cosine, closer
    phi, others = margin(target_cosine, norm), cosine
    if margin.negatives is not None:
        constants = bar.unsqueeze(1), margin.with_slopes(bar, None if norm is None else norm.detach())[0].unsqueeze(1)
        mapped, slope = margin.negatives(cosine.detach(), *constants)
        others = WithSlopes.apply(mapped, slope, None, cosine, None)
    if filter_above is not None:
        others = others.masked_fill(cosine.detach() > filter_above, LEFT_OUT / scale)
    # Rows whose target is elsewhere write back the value that is there already.
    patch = torch.where(owned, phi, others.gather(1, column).squeeze(1))
    return scale * others.scatter(1, column, patch.unsqueeze(1)), closer


def _penalty(margin: Margin, norm: Tensor | None, target: Tensor) -> Tensor | float:
    """The mean of the margin's penalty. Its gradient is on the rank of the target alone: the ranks' are summed."""
    if margin.penalty is None or norm is None:
        return 0.0
    value, slope = margin.penalty(norm.detach())
    return WithSlopes.apply(value, torch.where(target >= 0, slope, 0.0), None, norm, None).mean()
