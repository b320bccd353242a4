"""The margin softmax over class centers that may be sharded over ranks.

Shapes: N rows (embeddings), C classes in all, C_r on this rank, d the embedding size.

With w_c the L2-normalised center of class c, cos_ic = x_i . w_c, y_i the label and phi the margin of `losses.margin`:

    l_ic = s * cos_ic  for c != y_i,   l_iy = s * phi(cos_iy)
    loss = 1/N * sum_i [ log sum_c exp(l_ic) - l_iy ]

`margin_softmax` and `margin_softmax_torchshard` have one signature and equal each other; the second is put together
from torchshard's own parts and is there to be compared with.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from losses.margin import ArcFaceMargin
from utils.distributed import all_gather_rows, all_reduce_sum
from utils.sharding import ClassShard, parallel_cross_entropy


def margin_softmax(
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
    """Collective over `group`. The loss of the module's docstring, and the rank of each row's target class.

    Args:
        embedding: x (N, d), L2-normalised, the same rows on every rank of the group; float32 or float64.
        label: y (N,) int64 in [0, C).
        centers: this rank's class centers (C_r, d), not normalised; C_r may be 0.
        shard: which classes these are.
        scale, margin, easy_margin: s, m (radians), and the margin's range.
        group: the ranks that share the classes; None when this process has all of them.

    Returns:
        loss: scalar, the mean over all N rows, the same number on every rank. Its gradient with respect to `centers` is
            complete; that with respect to `embedding` is this rank's part: the sum over the group is the gradient.
        target_rank: (N,) int64, how many classes have a larger cosine (without margin) than the target class has: row i
            is a top-k hit where it is < k. The target itself does not count; a NaN counts as larger.
    """
    logits, target_logit, target_cosine, cosine = _shard_logits(
        embedding, label, centers, shard, scale, margin, easy_margin
    )
    row_loss = _MergeShards.apply(torch.logsumexp(logits, dim=1), target_logit, group)
    return row_loss.mean(), _target_rank(cosine, target_cosine, group)


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
    logits, _, target_cosine, cosine = _shard_logits(embedding, label, centers, shard, scale, margin, easy_margin)
    if group is None:
        loss = F.cross_entropy(logits, label)
    else:
        # Our shards start at multiples of the full shard's width: padded labels and global labels are the same.
        loss = parallel_cross_entropy(F.pad(logits, (0, shard.chunk - shard.size), value=-1e4 * scale), label)
    return loss, _target_rank(cosine, target_cosine, group)


def _shard_logits(
    embedding: Tensor,
    label: Tensor,
    centers: Tensor,
    shard: ClassShard,
    scale: float,
    margin: float,
    easy_margin: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This rank's logits (N, C_r), its share of l_iy and of cos_iy (N,) (0 where another rank owns the target), and
    the cosines (N, C_r) without a graph. No host synchronisation: ownership is a mask, never a list of rows.
    """
    cosine = embedding @ F.normalize(centers).t()
    if shard.size == 0:
        nothing = embedding.new_zeros(embedding.shape[0])
        return cosine, nothing, nothing, cosine.detach()
    owned = (label >= shard.start) & (label < shard.stop)
    column = (label - shard.start).clamp(0, shard.size - 1).unsqueeze(1)
    target_cosine = cosine.gather(1, column).squeeze(1)
    target_logit = scale * ArcFaceMargin.apply(target_cosine, margin, easy_margin)
    logits = scale * cosine
    # Rows owned elsewhere write back the logit that is there already.
    patch = torch.where(owned, target_logit, logits.gather(1, column).squeeze(1))
    logits = logits.scatter(1, column, patch.unsqueeze(1))
    zero = cosine.new_zeros(())
    return (
        logits,
        torch.where(owned, target_logit, zero),
        torch.where(owned, target_cosine.detach(), zero),
        cosine.detach(),
    )


class _MergeShards(torch.autograd.Function):
    """Collective over the group. log sum_r exp(z_r) - sum_r t_r, per row.

    `shard_logsumexp` (N,): z_r, -inf on a rank without classes. `target_share` (N,): t_r, the target's logit on the rank
    that owns it, 0 elsewhere. d/dz_r = exp(z_r - z), which is 0 for z_r = -inf; d/dt_r = -1.
    """

    @staticmethod
    def forward(ctx, shard_logsumexp: Tensor, target_share: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        if group is None:
            total, target = shard_logsumexp, target_share
        else:
            mine = torch.stack([shard_logsumexp, target_share])
            parts = all_gather_rows(mine, group).view(-1, *mine.shape)
            total = torch.logsumexp(parts[:, 0], dim=0)
            target = parts[:, 1].sum(dim=0)
        ctx.save_for_backward((shard_logsumexp - total).exp())
        return total - target

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (probability,) = ctx.saved_tensors
        return grad * probability, -grad, None


def _target_rank(cosine: Tensor, target_cosine: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Collective over the group. (N,) int64: the number of classes whose cosine is above the target's."""
    target = all_reduce_sum(target_cosine, group)
    # "not <=" rather than ">": a NaN on either side must count against the hit. The target equals itself: no count.
    return all_reduce_sum((~(cosine <= target.unsqueeze(1))).sum(dim=1), group)
