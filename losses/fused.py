"""The margin softmax over class centers that may be sharded over ranks.

Shapes: N rows (embeddings), C classes in all, C_r on this rank, d the embedding size.

With w_c the L2-normalised center of class c, cos_ic = x_i . w_c, y_i the label and phi the margin of `losses.margins`:

    l_ic = s * cos_ic  for c != y_i,   l_iy = s * phi(cos_iy)
    loss = 1/N * sum_i [ log sum_c exp(l_ic) - l_iy ]

`margin_softmax` walks the shard in chunks of classes and never holds the (N, C_r) logits. `margin_softmax_torchshard` gives
the same, put together from torchshard's own parts, which hold about ten such matrices; it is there to be compared with.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.optim import SGD

from losses.margins import arcface_margin
from utils.dist.collectives import all_gather_rows, all_reduce_sum
from utils.dist.sharding import ClassShard
from utils.training.optim import _sgd_step, make_momentum

# Stands for minus infinity where the target's column is left out: exp(this - any logit) is 0, and this - this is no NaN.
_NOTHING = -1e30


# Columns beside the chunk's own: the first takes the writes for targets of other chunks, the rest keep rows aligned.
SPARE_COLUMNS = 16


# What the buffers of a chunk may fill of a CPU's cache, bytes.
_CPU_CACHE = 8 * 2**20
_SMALL_PAGE, _LARGE_PAGE = mmap.PAGESIZE, 2 * 2**20


# More of them at a time the system has to put together first: for a gradient of 1 GB a step took a quarter longer, not less.
_MOST_IN_LARGE_PAGES = 128 * 2**20
_C_LIBRARY = ctypes.CDLL(None)


# fp16 cannot hold the probability of one class among millions: the backward walk computes with this multiple of it.
_FP16_GAIN = 2.0**13


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
    memory_mib: float = 0.0,
    operands: torch.dtype | None = None,
    update: SGD | None = None,
    update_if_finite: bool = False,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Collective over `group`. The loss of the module's docstring, and the rank of each row's target class.

    Args:
        embedding: x (N, d), L2-normalised, the same rows on every rank of the group; float32 or float64.
        label: y (N,) int64 in [0, C).
        centers: this rank's class centers (C_r, d), not normalised; C_r may be 0.
        shard: which classes these are.
        scale, margin, easy_margin: s, m (radians), and the margin's range.
        group: the ranks that share the classes; None when this process has all of them.
        memory_mib: the probabilities of as many classes as fit are kept for the backward walk, which computes those of the
            others again: 6 N C_r d operations with all kept (4 N bytes a class, 2 N with bf16 operands), 8 N C_r d with none.
        operands: type of the matrix products' operands, torch.bfloat16 or torch.float16; sums and results have the type
            of `centers` all the same. None: operands have it, too.
        update: an SGD optimizer of `centers` alone (learning rate, momentum, weight decay). The backward walk makes its
            step chunk by chunk, so that the (C_r, d) gradient never exists; `centers.grad` stays None.
        update_if_finite: that step is left out, by a mask on the device, if the loss is inf or NaN.
        chunk: classes walked at a time; None: as many as stay in the cache.

    Returns:
        loss: scalar, the mean over all N rows, the same number on every rank. Its gradient with respect to `centers` is
            complete; that with respect to `embedding` is this rank's part: the sum over the group is the gradient.
        num_closer: (N,) int64, how many classes have a larger cosine (without margin) than the target class has: row i
            is a top-k hit where it is < k. The target itself does not count; a NaN counts as larger.
    """
    backward_follows = torch.is_grad_enabled() and (embedding.requires_grad or centers.requires_grad)
    walk = _Walk(
        shard=shard, scale=scale, margin=margin, easy_margin=easy_margin, group=group,
        chunk=max(1, min(chunk or _chunk_size(embedding), shard.size)),
        kept_bytes=int(memory_mib * 2**20) if backward_follows else 0,
        operands=operands if operands != centers.dtype else None, update=update, update_if_finite=update_if_finite,
    )
    return _MarginSoftmax.apply(embedding, centers, label, walk)


def _empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Tensor.new_empty for what has the size of the shard: on a CPU in large pages, within limits.

    The system clears such memory page by page when it is first written, in every step: in pages of 4 KiB that takes a tenth
    of the whole step.
    """
    tensor = like.new_empty(shape, dtype=dtype)
    if not tensor.is_cuda and _LARGE_PAGE <= tensor.nbytes <= _MOST_IN_LARGE_PAGES:
        start = -(-tensor.data_ptr() // _SMALL_PAGE) * _SMALL_PAGE
        size = (tensor.data_ptr() + tensor.nbytes - start) // _SMALL_PAGE * _SMALL_PAGE
        # Advice only: where the kernel has no such pages it says no, and nothing else changes.
        _C_LIBRARY.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
    return tensor


def _chunk_size(embedding: Tensor) -> int:
    cache = torch.cuda.get_device_properties(embedding.device).L2_cache_size if embedding.is_cuda else _CPU_CACHE
    return chunk_classes(*embedding.shape, cache, embedding.element_size())


@dataclass(frozen=True)
class _Walk:
    """How a shard is walked: the arguments of `margin_softmax`."""

    shard: ClassShard
    scale: float
    margin: float
    easy_margin: bool
    group: dist.ProcessGroup | None
    chunk: int
    kept_bytes: int
    operands: torch.dtype | None
    update: SGD | None
    update_if_finite: bool

    @property
    def chunks(self) -> list[slice]:
        """Rows of the centers, K at a time."""
        size = self.shard.size
        return [slice(first, min(first + self.chunk, size)) for first in range(0, size, self.chunk)]

    def target_columns(self, label: Tensor) -> Tensor:
        """(chunks, N) int64: where in its chunk row i has its target, or the spare column K where it is in another chunk."""
        first = torch.arange(0, self.shard.size, self.chunk, device=label.device).unsqueeze(1)
        column = label - self.shard.start - first
        inside = (column >= 0) & (column < self.chunk) & (label < self.shard.stop)
        return torch.where(inside, column, self.chunk)

    def operand(self, tensor: Tensor) -> Tensor:
        return tensor if self.operands is None else tensor.to(self.operands)

    def center_operand(self, centers: Tensor, factor: Tensor) -> Tensor:
        """Centers of a chunk (K, d) as they enter the products: in low precision times `factor` = s / |w|, (K,).

        In full precision the factor goes onto the (N, K) side, where it needs no copy of the centers.
        """
        return centers if self.operands is None else (centers * factor.unsqueeze(1)).to(self.operands)

    def logits(self, embedding: Tensor, centers: Tensor, factor: Tensor, out: Tensor) -> Tensor:
        """out (N, K) = s * cosine, from what `operand` and `center_operand` give."""
        _multiply(embedding, centers.t(), out)
        return out if self.operands is not None else out.mul_(factor)


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b, summed up in the type of `out`, whatever the operands' type."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    # The CPU has no such product. With the rounded operands it computes what a GPU does: enough for the tests.
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


class _MarginSoftmax(torch.autograd.Function):
    """Forward: a walk that sums exp(l) over all classes but the target. Backward: a walk for the gradients.

    The target joins at the end, with z_i the log-sum-exp of all others: loss_i = log(1 + exp(z_i - l_iy)), of which the
    derivative by l_iy is -sigmoid(z_i - l_iy). Both stay exact where the target has all but the whole probability.
    """

    @staticmethod
    def forward(ctx, embedding: Tensor, centers: Tensor, label: Tensor, walk: _Walk) -> tuple[Tensor, Tensor]:
        rows, chunks = embedding.shape[0], walk.chunks
        cosine = all_reduce_sum(_target_cosine(embedding, label, centers, walk.shard), walk.group)
        phi, slope = arcface_margin(cosine, walk.margin, walk.easy_margin)
        bar = (walk.scale * cosine).unsqueeze(1)

        buffer = embedding.new_empty(rows, walk.chunk + SPARE_COLUMNS)
        compared = torch.empty_like(buffer)
        kept_type = torch.bfloat16 if walk.operands == torch.bfloat16 else buffer.dtype
        kept_chunks = min(len(chunks), walk.kept_bytes // (buffer.numel() * kept_type.itemsize))
        kept = _empty(buffer, kept_chunks, *buffer.shape, dtype=kept_type)
        columns = walk.target_columns(label)
        factor = centers.new_empty(centers.shape[0])
        references = embedding.new_empty(len(chunks), rows)
        reference = embedding.new_full((rows,), _NOTHING)
        total = embedding.new_zeros(rows)
        not_above = embedding.new_zeros(rows, dtype=torch.float64)
        operand = walk.operand(embedding)
        for number, classes in enumerate(chunks):
            here, width = centers[classes], classes.stop - classes.start
            torch.linalg.vector_norm(here, dim=1, out=factor[classes]).clamp_(min=1e-12).reciprocal_().mul_(walk.scale)
            keep = number < kept_chunks
            block = kept[number] if keep and kept_type == buffer.dtype else buffer
            logits = block[:, :width]
            walk.logits(operand, walk.center_operand(here, factor[classes]), factor[classes], logits)
            block.scatter_(1, columns[number].unsqueeze(1), _NOTHING)
            # "<=" and not ">": a NaN on either side must count against the hit.
            not_above += torch.le(logits, bar, out=compared[:, :width]).sum(dim=1)
            before, reference = reference, torch.maximum(reference, logits.amax(dim=1), out=references[number])
            logits.sub_(reference.unsqueeze(1)).exp_()
            total.mul_((before - reference).exp_()).add_(logits.sum(dim=1))
            if keep and block is buffer:
                kept[number, :, :width] = logits

        # The shards' partial sums, merged in float64. A rank without classes adds 0 * exp(_NOTHING - largest) = 0.
        mine = torch.stack([reference.double(), total.double(), walk.shard.size - not_above])
        parts = mine.unsqueeze(0) if walk.group is None else all_gather_rows(mine, walk.group).view(-1, *mine.shape)
        largest = parts[:, 0].amax(dim=0)
        log_others = largest + (parts[:, 1] * (parts[:, 0] - largest).exp()).sum(dim=0).log()
        target_logit = walk.scale * phi.double()
        row_loss = torch.logaddexp(log_others - target_logit, torch.zeros_like(target_logit))
        log_total = target_logit + row_loss
        target_grad = -torch.sigmoid(log_others - target_logit) * slope
        num_closer = parts[:, 2].sum(dim=0).long()

        ctx.walk = walk
        ctx.save_for_backward(embedding, centers, factor, columns, log_total.to(embedding.dtype),
                              target_grad.to(embedding.dtype), references, kept)
        ctx.mark_non_differentiable(num_closer)
        loss = row_loss.mean().to(embedding.dtype)
        ctx.finite = loss.isfinite() if walk.update_if_finite else None
        return loss, num_closer

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, _: None) -> tuple[Tensor, Tensor | None, None, None]:
        embedding, centers, factor, columns, log_total, target_grad, references, kept = ctx.saved_tensors
        walk: _Walk = ctx.walk
        rows, size = embedding.shape
        gain = _FP16_GAIN if walk.operands == torch.float16 else 1.0
        unit = grad_loss / (rows * gain)
        target_column = (target_grad * gain).unsqueeze(1)
        if walk.operands == torch.float16:
            target_column.clamp_(min=torch.finfo(torch.float16).min)
        shift = (log_total - math.log(gain)).unsqueeze(1)

        buffer = embedding.new_empty(rows, walk.chunk + SPARE_COLUMNS)
        product = embedding.new_empty(walk.chunk, size)
        embedding_grad, part = torch.zeros_like(embedding), torch.empty_like(embedding)
        wants_grad = ctx.needs_input_grad[1] and walk.update is None
        centers_grad = _empty(centers, *centers.shape) if wants_grad else None
        step = None
        if walk.update is not None:
            step = product.new_empty(walk.chunk, size)
            make_momentum(walk.update)
        operand = walk.operand(embedding)
        for number, classes in enumerate(walk.chunks):
            here, width = centers[classes], classes.stop - classes.start
            center_operand = walk.center_operand(here, factor[classes])
            probability = buffer[:, :width]
            if number < len(kept):
                torch.mul(kept[number, :, :width], (references[number].unsqueeze(1) - shift).exp_(), out=probability)
            else:
                walk.logits(operand, center_operand, factor[classes], probability).sub_(shift).exp_()
            buffer.scatter_(1, columns[number].unsqueeze(1), target_column)
            weight = factor[classes] * unit
            if walk.operands is None:
                embedding_grad.addmm_(probability.mul_(weight), here)
            else:
                probability = probability.to(walk.operands)
                embedding_grad += _multiply(probability, center_operand, part)
            if not ctx.needs_input_grad[1]:
                continue

            grad = step[:width] if centers_grad is None else centers_grad[classes]
            _multiply(probability.t(), operand, grad)
            if walk.operands is not None:
                grad.mul_(weight.unsqueeze(1))
            # Through w / |w|: what is along w goes. (factor / s)^2 = 1 / |w|^2.
            along = torch.mul(grad, here, out=product[:width]).sum(dim=1).mul_((factor[classes] / walk.scale).square_())
            grad.addcmul_(here, along.unsqueeze(1), value=-1)
            if walk.update is not None:
                _sgd_step(walk.update, classes, grad, ctx.finite)
        if walk.operands is not None:
            embedding_grad *= unit
        return embedding_grad, centers_grad, None, None


def _target_cosine(embedding: Tensor, label: Tensor, centers: Tensor, shard: ClassShard) -> Tensor:
    """(N,): the cosine of each row with its target where this rank owns that, else 0. No host synchronisation."""
    if shard.size == 0:
        return embedding.new_zeros(embedding.shape[0])
    owned = (label >= shard.start) & (label < shard.stop)
    nearest = F.normalize(centers[(label - shard.start).clamp(0, shard.size - 1)])
    return torch.where(owned, (embedding * nearest).sum(dim=1), embedding.new_zeros(()))


def chunk_classes(rows: int, embedding_size: int, cache_bytes: int, value_bytes: int = 4) -> int:
    """K: the classes whose buffers in the margin softmax, (N, K) and (K, d) two of each, stay in the cache; a multiple of 256."""
    return max(256, cache_bytes // (2 * (rows + embedding_size) * value_bytes) // 256 * 256)


def automatic_memory_bytes(centers: int, total_bytes: int, fused_update: bool) -> int:
    """For kept probabilities: a quarter of the memory that the class centers (bytes), gradient and momentum leave."""
    return max(0, total_bytes - (2 if fused_update else 3) * centers) // 4
