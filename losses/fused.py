"""The margin softmax over class centers that may be sharded over ranks, walked in chunks of classes.

Shapes: N rows (embeddings), R centers on this rank, d the embedding size, K centers of a chunk, q sub-centers of each
class (1 for most runs: its center).

With c_ij = x_i . w_j / |w_j| the cosine of row i and class j, y_i the target, phi the margin of `losses.margins` and g
its map of the other cosines (the identity for most losses), the sums over all classes of all ranks:

    l_ij = s * g(c_ij)  for j != y_i,   l_iy = s * phi(c_iy)
    loss = 1/N * sum_i [ log sum_j exp(l_ij) - l_iy + the margin's penalty of |x_i|, which most losses do not have ]

With q > 1, c_ij is the largest of the class's q cosines, and only the center that has it gets a gradient: Deng et al.,
"Sub-center ArcFace: Boosting Face Recognition by Large-scale Noisy Web Faces", ECCV 2020.

The (N, R) logits never exist. losses/README.md describes the walk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from losses.margins import Margin
from losses.sampling import Sample, join_targets
from utils.dist.collectives import all_gather_rows, all_reduce_sum

# Makes the step of some rows: (rows of the centers, their gradient (K, d), whether the loss is finite, a bool scalar).
# Of sampled classes the rows are an int64 tensor (K,). Those of the targets may be there twice, and come with a bool
# tensor (K,), which of them have had their step; of equal rows the first one counts. Triton's form passes
# `projection`, a `triton_kernels.Projection` that the gradient has not had yet.
RowUpdate = Callable[..., None]

# Logit of a column that is left out: exp(this - any logit) is 0, and this - this is no NaN, as it would be of -inf.
LEFT_OUT = -1e30

# Columns of a chunk's buffer beside its K classes. The first takes the writes for targets of other chunks; 16 of them
# (64 bytes, a cache line, in float32) keep the rows aligned.
SPARE_COLUMNS = 16

# Bytes that the buffers of a chunk may fill of a CPU's cache: about the share of L2 and L3 of one core.
_CPU_CACHE = 8 * 2**20

# Values of the largest buffer of a chunk on a GPU: 128 MiB in float32. A matrix product of 2^25 results and 512 steps
# takes an H100 50 us, ten times what a launch takes.
_GPU_CHUNK = 2**25

# fp16 cannot hold the probability of one class among millions (the smallest normal number is 2^-14): the backward pass
# computes with this multiple of all probabilities. 2^13 times a probability of 1 is still below fp16's 65504.
FP16_GAIN = 2.0**13


def margin_softmax(
    embedding: Tensor, target: Tensor, centers: Tensor, margin: Margin, *, scale: float,
    group: dist.ProcessGroup | None, norm: Tensor | None = None, filter_above: float | None = None,
    saved_probs_mib: float = 0.0, matmul_dtype: torch.dtype | None = None, update: RowUpdate | None = None,
    chunk: int | None = None, sub_centers: int = 1, drawn: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Collective over `group`. The loss of the module's docstring, and how many classes are closer than the target.

    Args:
        embedding: x (N, d), L2-normalised, the same rows on every rank of the group; float32 or float64.
        target: (N,) int64, the class of `centers` that is the target, counted from 0, or -1 where another rank has it.
        centers: this rank's class centers (R, d), not normalised; R may be 0. Any classes, in any order; the q rows of
            class c are [c * q, c * q + q).
        margin: one of MARGINS; gives phi, g and the need for norms.
        scale: s.
        group: the ranks that share the classes; None if this process has all of them.
        norm: norms of the embeddings (N,) before they were normalised, the same on every rank; for margin.uses_norm.
        filter_above: a class other than the target with a cosine above this takes no part in the row's loss. It is
            probably the same person under another label (An et al., "Killing Two Birds with One Stone", CVPR 2022).
        saved_probs_mib: memory for probabilities saved for the backward pass, which recomputes those that do not fit.
            All saved: 6 N R d operations and 4 N bytes a class (2 N with bf16 products); none: 8 N R d.
        matmul_dtype: torch.bfloat16 or torch.float16, to which the matrix products round their operands; they sum and
            return the dtype of `centers`. None: no rounding.
        update: called in the backward pass with each chunk's gradient, which it may overwrite: an optimizer step that
            needs no (R, d) gradient. `centers.grad` stays None. It is called at least once, without rows if R is 0.
        chunk: K, rounded down to whole classes; None: `chunk_classes`.
        sub_centers: q.
        drawn: classes (S,), int64 and ascending. Only these and the targets take part, in the loss and in num_closer.
            The gradient of `centers` is a sparse tensor with the rows of S + N classes, some of them twice. None: all
            classes take part.

    Returns:
        loss: scalar, the mean over all N rows, the same on every rank. Its gradient with respect to `centers` is
            complete. Those of `embedding` and `norm` are this rank's part; the sum over the group is the gradient.
        num_closer: (N,) int64, how many classes have a larger cosine (without margin) than the target: row i is a
            top-k hit where it is < k. A NaN counts as larger.
    """
    walk = make_walk(
        embedding, target, centers, norm, margin=margin, scale=scale, filter_above=filter_above, group=group,
        sub_centers=sub_centers, saved_probs_mib=saved_probs_mib, matmul_dtype=matmul_dtype, update=update, chunk=chunk,
        drawn=drawn)
    return _MarginSoftmax.apply(embedding, centers, norm, target, walk)


def make_walk(
    embedding: Tensor, target: Tensor, centers: Tensor, norm: Tensor | None, *, saved_probs_mib: float,
    matmul_dtype: torch.dtype | None, chunk: int | None, sub_centers: int, drawn: Tensor | None, **settings: Any,
) -> Walk:
    """The walk of `margin_softmax` with these arguments. settings: those that `Walk` takes as they are."""
    backward_follows = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (embedding, centers, norm))
    sample = None if drawn is None else join_targets(drawn, target, sub_centers)
    size, widest = ((len(centers), len(centers)) if sample is None
                    else (len(sample.rows), max(sample.drawn, len(sample.left_out))))
    return Walk(
        sample=sample, size=size, sub_centers=sub_centers,
        chunk=whole_classes(min(chunk or _chunk_size(embedding, sub_centers), widest), sub_centers),
        saved_bytes=int(saved_probs_mib * 2**20) if backward_follows else 0,
        matmul_dtype=matmul_dtype if matmul_dtype != centers.dtype else None, **settings,
    )


def _chunk_size(embedding: Tensor, sub_centers: int = 1) -> int:
    rows, size = embedding.shape
    return chunk_classes(rows, size, None if embedding.is_cuda else _CPU_CACHE, embedding.element_size(), sub_centers)


@dataclass(frozen=True)
class Walk:
    """How the centers are walked: the arguments of `margin_softmax`. `size`: how many columns the logits would have."""

    margin: Margin
    scale: float
    filter_above: float | None
    group: dist.ProcessGroup | None
    sample: Sample | None
    size: int
    sub_centers: int
    chunk: int
    saved_bytes: int
    matmul_dtype: torch.dtype | None
    update: RowUpdate | None

    def parts(self) -> list[tuple[int, int]]:
        """Columns that form chunks of their own: all, or those of the drawn rows and those of the targets."""
        drawn = self.size if self.sample is None else self.sample.drawn
        return [(0, drawn), (drawn, self.size)]

    def chunks(self) -> list[slice]:
        """The columns of all logits, K at a time."""
        return [slice(first, min(first + self.chunk, stop)) for start, stop in self.parts()
                for first in range(start, stop, self.chunk)]

    def columns(self, target: Tensor) -> Tensor:
        """(chunks, N) int64: the column of the target's row in each chunk, or the spare column K if it is not there.

        target: rows of the centers, (N,) int64.
        """
        start = torch.cat([torch.arange(*part, self.chunk, device=target.device) for part in self.parts()]).unsqueeze(1)
        stop = F.pad(start[1:], (0, 0, 0, 1), value=self.size)
        target = self.place_of(target)
        return torch.where((target >= start) & (target < stop), target - start, self.chunk)

    def place_of(self, target: Tensor) -> Tensor:
        """(N,) int64: the columns, of all logits, of these rows of the centers; -1 where `target` is."""
        if self.sample is None:
            return target
        return torch.where(target >= 0, self.sample.place + target % self.sub_centers, -1)

    def rows(self, classes: slice) -> slice | Tensor:
        """Which rows of the centers a chunk has."""
        return classes if self.sample is None else self.sample.rows[classes]

    def gather(self, centers: Tensor, classes: slice, buffer: Tensor) -> Tensor:
        """The centers of a chunk (K, d): a view, or sampled rows in `buffer`."""
        if self.sample is None:
            return centers[classes]
        return torch.index_select(centers, 0, self.sample.rows[classes], out=buffer[:classes.stop - classes.start])

    def new_buffer(self, centers: Tensor) -> Tensor:
        """For `gather`."""
        return centers.new_empty(0 if self.sample is None else self.chunk, centers.shape[1])

    def repeated(self, classes: slice) -> Tensor | None:
        """Which columns of a chunk are there already, (K,) bool; None: no one is."""
        if self.sample is None or classes.start < self.sample.drawn:
            return None
        return self.sample.left_out[classes.start - self.sample.drawn:classes.stop - self.sample.drawn]

    def step_rows(self, classes: slice, grad: Tensor, finite: Tensor, **more: Any) -> None:
        """Call `update` for a chunk. more: its other arguments."""
        assert self.update is not None
        repeated = self.repeated(classes)
        self.update(self.rows(classes), grad, finite, *([] if repeated is None else [repeated]), **more)

    def class_columns(self, column: Tensor) -> Tensor:
        """(N, q): the columns of all centers of the class that has the center in `column`, (N,), an entry of `columns`.

        They are the spare column where `column` is.
        """
        if self.sub_centers == 1:
            return column.unsqueeze(1)
        first = (column - column % self.sub_centers).unsqueeze(1)
        return (first + torch.arange(self.sub_centers, device=column.device)).clamp_(max=self.chunk)

    def farther_centers(self, logits: Tensor) -> Tensor | None:
        """Bool (N, K): centers that are not the closest of their class, given s * cosine, (N, K). None if q is 1.

        Of equal ones the first is the closest; a NaN is closer than any other.
        """
        if self.sub_centers == 1:
            return None
        closest = logits.unflatten(1, (-1, self.sub_centers)).argmax(dim=2, keepdim=True)
        return (closest != torch.arange(self.sub_centers, device=logits.device)).flatten(1)

    def left_out(self, classes: slice, logits: Tensor) -> Tensor | None:
        """Which columns take no part, `farther_centers` and `repeated` ones: (K,) or (N, K) bool, or None."""
        masks = [mask for mask in (self.farther_centers(logits), self.repeated(classes)) if mask is not None]
        return functools.reduce(torch.logical_or, masks) if masks else None

    def leave_out(self, buffer: Tensor, column: Tensor, left_out: Tensor | None) -> None:
        """In a chunk's buffer, set the columns of the target's class and those of `left_out` to LEFT_OUT."""
        if left_out is not None:
            buffer[:, :left_out.shape[-1]].masked_fill_(left_out, LEFT_OUT)
        buffer.scatter_(1, self.class_columns(column), LEFT_OUT)

    def rounded(self, tensor: Tensor) -> Tensor:
        return tensor if self.matmul_dtype is None else tensor.to(self.matmul_dtype)

    def operand(self, centers: Tensor, factor: Tensor) -> Tensor:
        """Centers of a chunk (K, d) for the products: in low precision times `factor` = s / |w|, (K,).

        In full precision the factor is applied to the (N, K) side, which needs no copy of the centers.
        """
        return centers if self.matmul_dtype is None else self.rounded(centers * factor.unsqueeze(1))

    def scaled_cosines(self, embedding: Tensor, centers: Tensor, factor: Tensor, out: Tensor) -> None:
        """out (N, K) = s * cosine, from the results of `rounded` and `operand`."""
        multiply(embedding, centers.t(), out)
        if self.matmul_dtype is None:
            out.mul_(factor)

    def map_negatives(self, logits: Tensor, cosine: Tensor, phi: Tensor) -> Tensor | None:
        """Apply the filter and the margin's g, where given, to `logits`, s * cosine (N, K), in place.

        Returns g's slope, (N, K), or None for a slope of 1. A filtered class needs none: its probability is 0.

        cosine, phi: (N,), of the targets.
        """
        filtered = None if self.filter_above is None else logits > self.filter_above * self.scale
        slope = None
        if self.margin.negatives is not None:
            mapped, slope = self.margin.negatives(logits / self.scale, cosine.unsqueeze(1), phi.unsqueeze(1))
            torch.mul(mapped, self.scale, out=logits)
        if filtered is not None:
            logits.masked_fill_(filtered, LEFT_OUT)
        return slope


def multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b, summed in the dtype of `out` whatever the dtype of a and b."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    # The CPU has no such product. This one gives a GPU's result and serves the tests.
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


class _MarginSoftmax(torch.autograd.Function):
    """Forward: a walk that sums exp(l) over all classes but the target. Backward: a walk for the gradients.

    The target joins after the walk. With z_i the log-sum-exp of all other classes, loss_i = log(1 + exp(z_i - l_iy)),
    and its derivative by l_iy is -sigmoid(z_i - l_iy). Both stay exact where the target's probability rounds to 1.
    """

    @staticmethod
    def forward(ctx, embedding: Tensor, centers: Tensor, norm: Tensor | None, target: Tensor, walk: Walk):
        rows, chunks, margin, dtype = embedding.shape[0], walk.chunks(), walk.margin, embedding.dtype
        target, own_cosine = closest_target(embedding, target, centers, walk.sub_centers)
        cosine = all_reduce_sum(own_cosine, walk.group)
        margin.observe(cosine, norm)
        phi, slope, norm_slope = margin.with_slopes(cosine, norm)
        bar = (walk.scale * cosine).unsqueeze(1)

        buffer = embedding.new_empty(rows, walk.chunk + SPARE_COLUMNS)
        compared = torch.empty_like(buffer)
        saved_dtype = torch.bfloat16 if walk.matmul_dtype == torch.bfloat16 else dtype
        saved_chunks = min(len(chunks), walk.saved_bytes // (buffer.numel() * saved_dtype.itemsize))
        saved_probs = buffer.new_empty(saved_chunks, *buffer.shape, dtype=saved_dtype)
        columns = walk.columns(target)
        factor, gathered = centers.new_empty(walk.size), walk.new_buffer(centers)
        running_max = embedding.new_empty(len(chunks), rows)  # after each chunk
        maximum = embedding.new_full((rows,), LEFT_OUT)
        sum_exp = embedding.new_zeros(rows)
        not_closer = embedding.new_zeros(rows, dtype=torch.float64)
        operand = walk.rounded(embedding)
        for number, classes in enumerate(chunks):
            here, chunk_factor, save = walk.gather(centers, classes, gathered), factor[classes], number < saved_chunks
            torch.linalg.vector_norm(here, dim=1, out=chunk_factor).clamp_(min=1e-12).reciprocal_().mul_(walk.scale)
            block = saved_probs[number] if save and saved_dtype == dtype else buffer
            logits = block[:, :len(here)]
            walk.scaled_cosines(operand, walk.operand(here, chunk_factor), chunk_factor, logits)
            left_out = walk.left_out(classes, logits)
            walk.leave_out(block, columns[number], left_out)
            # "<=" and not ">": a NaN on either side must count against the hit.
            not_closer += torch.le(logits, bar, out=compared[:, :len(here)]).sum(dim=1)
            negative_slope = walk.map_negatives(logits, cosine, phi)
            if negative_slope is not None:
                walk.leave_out(block, columns[number], left_out)
            previous, maximum = maximum, torch.maximum(maximum, logits.amax(dim=1), out=running_max[number])
            logits.sub_(maximum.unsqueeze(1)).exp_()
            sum_exp.mul_((previous - maximum).exp_()).add_(logits.sum(dim=1))
            if save and negative_slope is not None:
                logits.mul_(negative_slope)
            if save and block is buffer:
                saved_probs[number, :, :len(here)] = logits

        # Merge the ranks' partial sums in float64. A rank without classes adds 0 * exp(LEFT_OUT - maximum) = 0.
        part = torch.stack([maximum.double(), sum_exp.double(), walk.size - not_closer])
        parts = part.unsqueeze(0) if walk.group is None else all_gather_rows(part, walk.group).view(-1, *part.shape)
        maximum = parts[:, 0].amax(dim=0)
        log_others = maximum + (parts[:, 1] * (parts[:, 0] - maximum).exp()).sum(dim=0).log()
        num_closer = parts[:, 2].sum(dim=0).long()
        loss, log_total, target_grad, norm_grad = join_target(walk, log_others, target, norm, phi, slope, norm_slope)
        ctx.save_for_backward(embedding, centers, factor, columns, log_total.to(dtype), target_grad.to(dtype),
                              running_max, saved_probs, cosine, phi, norm_grad)
        ctx.walk, ctx.finite = walk, loss.isfinite()
        ctx.mark_non_differentiable(num_closer)
        return loss, num_closer

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, _: None) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        (embedding, centers, factor, columns, log_total, target_grad, running_max, saved_probs, cosine, phi,
         norm_grad) = ctx.saved_tensors
        walk: Walk = ctx.walk
        rows, size = embedding.shape
        gain = FP16_GAIN if walk.matmul_dtype == torch.float16 else 1.0
        unit = grad_loss / (rows * gain)
        target_column = (target_grad * gain).unsqueeze(1)
        if walk.matmul_dtype == torch.float16:
            target_column.clamp_(min=torch.finfo(torch.float16).min)
        shift = (log_total - math.log(gain)).unsqueeze(1)

        buffer = embedding.new_empty(rows, walk.chunk + SPARE_COLUMNS)
        product = embedding.new_empty(walk.chunk, size)
        embedding_grad, part = torch.zeros_like(embedding), torch.empty_like(embedding)
        needs_centers = ctx.needs_input_grad[1]
        centers_grad = centers.new_empty(walk.size, size) if needs_centers and walk.update is None else None
        chunk_grad = product if walk.update is None else torch.empty_like(product)
        operand, gathered = walk.rounded(embedding), walk.new_buffer(centers)
        for number, classes in enumerate(walk.chunks()):
            here, chunk_factor = walk.gather(centers, classes, gathered), factor[classes]
            center_operand, probability = walk.operand(here, chunk_factor), buffer[:, :len(here)]
            if number < len(saved_probs):
                torch.mul(saved_probs[number, :, :len(here)], (running_max[number].unsqueeze(1) - shift).exp_(),
                          out=probability)
            else:
                walk.scaled_cosines(operand, center_operand, chunk_factor, probability)
                left_out = walk.left_out(classes, probability)
                negative_slope = walk.map_negatives(probability, cosine, phi)
                if left_out is not None:
                    walk.leave_out(buffer, columns[number], left_out)
                probability.sub_(shift).exp_()
                if negative_slope is not None:
                    probability.mul_(negative_slope)
            buffer.scatter_(1, columns[number].unsqueeze(1), target_column)
            weight = chunk_factor * unit
            if walk.matmul_dtype is None:
                embedding_grad.addmm_(probability.mul_(weight), here)
            else:
                probability = walk.rounded(probability)
                embedding_grad += multiply(probability, center_operand, part)
            if not needs_centers:
                continue

            grad = chunk_grad[:len(here)] if centers_grad is None else centers_grad[classes]
            multiply(probability.t(), operand, grad)
            if walk.matmul_dtype is not None:
                grad.mul_(weight.unsqueeze(1))
            # Through w / |w|: the component along w drops out. (factor / s)^2 = 1 / |w|^2.
            along = torch.mul(grad, here, out=product[:len(here)]).sum(dim=1)
            along.mul_((chunk_factor / walk.scale).square_())
            grad.addcmul_(here, along.unsqueeze(1), value=-1)
            if walk.update is not None:
                walk.step_rows(classes, grad, ctx.finite)
        if walk.update is not None and walk.size == 0:
            walk.update(slice(0, 0), centers.new_empty(0, size), ctx.finite)
        if centers_grad is not None and walk.sample is not None:
            centers_grad = torch.sparse_coo_tensor(walk.sample.rows.unsqueeze(0), centers_grad, centers.shape,
                                                   check_invariants=False)
        if walk.matmul_dtype is not None:
            embedding_grad *= unit
        return embedding_grad, centers_grad, None if norm_grad is None else norm_grad * grad_loss, None, None


def join_target(
    walk: Walk, log_others: Tensor, target: Tensor, norm: Tensor | None, phi: Tensor, slope: Tensor,
    norm_slope: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The loss and what its gradients need, from the log-sum-exp of all other classes of all ranks, (N,) float64.

    Returns:
        loss: scalar, of the dtype of phi.
        log_total: the log-sum-exp of all classes, (N,) float64.
        target_grad: the derivative of the row's loss by s times the target cosine, (N,) float64.
        norm_grad: the gradient of `norm`, (N,), of the dtype of phi. Each rank knows that of every norm: the owner of
            the target gives it, so that the sum over ranks has it once.
    """
    target_logit = walk.scale * phi.double()
    row_loss = torch.logaddexp(log_others - target_logit, torch.zeros_like(target_logit))
    logit_grad = -torch.sigmoid(log_others - target_logit)
    norm_grad = None if norm_slope is None else walk.scale * logit_grad * norm_slope
    loss = row_loss.mean()
    if walk.margin.penalty is not None:
        penalty, penalty_slope = walk.margin.penalty(norm)
        loss = loss + penalty.mean()
        norm_grad = penalty_slope if norm_grad is None else norm_grad + penalty_slope
    if norm_grad is not None:
        norm_grad = torch.where(target >= 0, norm_grad / len(phi), 0.0).to(phi.dtype)
    return loss.to(phi.dtype), target_logit + row_loss, logit_grad * slope, norm_grad


def closest_target(
    embedding: Tensor, target: Tensor, centers: Tensor, sub_centers: int
) -> tuple[Tensor, Tensor]:
    """The row of the closest of the target's centers, and the cosine with it, (N,) each. No host synchronisation.

    They are -1 and 0 where `target` is -1.
    """
    if len(centers) == 0:
        return target, embedding.new_zeros(embedding.shape[0])
    first = target.clamp(min=0) * sub_centers
    cosines = torch.stack([(embedding * F.normalize(centers[first + number])).sum(dim=1)
                           for number in range(sub_centers)])
    cosine, closest = cosines.max(dim=0)
    return (torch.where(target >= 0, first + closest, -1),
            torch.where(target >= 0, cosine, embedding.new_zeros(())))


def chunk_classes(
    rows: int, embedding_size: int, cache_bytes: int | None, value_bytes: int = 4, sub_centers: int = 1
) -> int:
    """K, a multiple of 256.

    On a CPU so many centers that the chunk's buffers, two (N, K) and two (K, d), stay in the cache. On a GPU
    (`cache_bytes` None) so many that the larger kind has `_GPU_CHUNK` values: there, a chunk of the cache's size would
    take less time to compute than to launch. With sub-centers it is rounded down to whole classes, and to whole cache
    lines of float32 if there is room.
    """
    centers = (_GPU_CHUNK // max(rows, embedding_size) if cache_bytes is None
               else cache_bytes // (2 * (rows + embedding_size) * value_bytes))
    centers = max(256, centers // 256 * 256)
    return whole_classes(centers, math.lcm(16, sub_centers) if centers > 16 * sub_centers else sub_centers)


def whole_classes(centers: int, sub_centers: int) -> int:
    """`centers`, rounded down to a multiple of `sub_centers`, which it is at least."""
    return max(sub_centers, centers // sub_centers * sub_centers)


def automatic_memory_bytes(
    centers: int, total_bytes: int, fused_update: bool, optimizer_states: int = 1, sample_rate: float = 1.0
) -> int:
    """For saved probabilities: a quarter of the bytes that the centers, their gradient and optimizer state leave."""
    gradient = 0 if fused_update else int(sample_rate * centers)
    return max(0, total_bytes - (1 + max(1, optimizer_states)) * centers - gradient) // 4
