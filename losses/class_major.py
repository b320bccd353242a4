"""The margin softmax for GPUs: the equation, arguments and results of `losses.fused.margin_softmax`, in another order.

Shapes: N rows, K classes of a chunk, d the embedding size. Three ideas make a chunk a few large operations:

- **No running maximum.** A logit is at most s times the largest value of the margin's map. With one shift for all rows,
  exp(l - shift) and its sums fit the dtype, if s is not too large: `fits`. Otherwise a pass over the classes before the
  others finds each row's largest logit, its shift. Partial sums of chunks and of ranks simply add up.
- **Class-major.** E (K, N) holds exp(l - shift), and 0 for the target. A chunk is a contiguous block of it, whatever K.
- **The row's factor goes into the embeddings.** The probability of row i is E * r_i, r_i = exp(shift - lse_i). With
  w' = s * w / |w|, the gradients are dX = r * (E^T @ w') and dw' = E @ (r * X), up to 1 / N: the backward pass has no
  element-wise pass over (N, K). The target's entry of E then is its gradient, divided by r_i.

losses/README.md has the analysis of the errors.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from losses.fused import (
    FP16_GAIN,
    LEFT_OUT,
    RowUpdate,
    Walk,
    closest_target,
    join_target,
    make_walk,
    margin_softmax,
    multiply,
)
from losses.margins import Margin
from utils.dist.collectives import all_reduce_sum
from utils.errors import UserError

# exp(x) is a normal number for x from -_LOWEST to _HIGHEST, and so are its sum over e^23 = 10^10 classes and the
# inverse of that times the entries of an embedding.
_LOWEST = {torch.float32: 86.0, torch.float64: 700.0}
_HIGHEST = {torch.float32: 64.0, torch.float64: 600.0}


def fits(margin: Margin, scale: float, dtype: torch.dtype) -> bool:
    """Whether one shift serves all logits: then no exponential overflows, and none of a class that takes part is 0.

    In float32 it does up to a scale of 75, for a map of the other cosines that stays in [-1, 1].
    """
    return scale + _one_shift(margin, scale, dtype) <= _LOWEST[dtype]


def _one_shift(margin: Margin, scale: float, dtype: torch.dtype) -> float:
    """What is subtracted from all logits, where that `fits`."""
    return max(0.0, scale * margin.highest_negative() - _HIGHEST[dtype])


def margin_softmax_class_major(
    embedding: Tensor, target: Tensor, centers: Tensor, margin: Margin, *, scale: float,
    group: dist.ProcessGroup | None, norm: Tensor | None = None, filter_above: float | None = None,
    saved_probs_mib: float = 0.0, matmul_dtype: torch.dtype | None = None, update: RowUpdate | None = None,
    chunk: int | None = None, sub_centers: int = 1, drawn: Tensor | None = None, triton: bool = False,
) -> tuple[Tensor, Tensor]:
    """Collective over `group`. `margin_softmax`, with the same arguments and results.

    triton: by the kernels of `losses.triton_kernels`. They take float32.
    """
    walk = make_walk(
        embedding, target, centers, norm, margin=margin, scale=scale, filter_above=filter_above, group=group,
        sub_centers=sub_centers, saved_probs_mib=saved_probs_mib, matmul_dtype=matmul_dtype, update=update, chunk=chunk,
        drawn=drawn)
    return _ClassMajor.apply(embedding, centers, norm, target, walk, _triton_work() if triton else ChunkWork)


def _triton_work() -> type[ChunkWork]:
    from losses.triton_kernels import TritonWork  # Triton is there on GPUs only

    return TritonWork


WALK = "walk"  # losses.fused


def choose_form(name: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """`--classifier NAME` -> what computes it: WALK, or "eager" or "triton", both class-major. Raises UserError.

    fused: what serves the device best. dtype: of the class centers.
    """
    device = torch.device(device)
    if name == "fused":
        return (WALK if device.type != "cuda" else
                "triton" if dtype == torch.float32 and _why_no_triton(device) is None else "eager")
    if name == "triton" and dtype != torch.float32:
        raise UserError("--classifier triton with --precision float64: its kernels compute in float32; choose eager")
    if name == "triton" and device.type != "cuda":
        raise UserError("--classifier triton: its kernels are for GPUs, and this run is on the CPU; choose fused")
    if name == "triton" and (why := _why_no_triton(device)) is not None:
        raise UserError(f"--classifier triton: {why}, or choose eager")
    return name


def _why_no_triton(device: torch.device) -> str | None:
    """What the kernels lack for a GPU of this machine, and what to do. None: nothing.

    Without a GPU, its generation is not asked.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install it"
    # Triton compiles a part of its own in C when the first kernel starts.
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler, and found neither gcc nor clang; install one"
    headers = sysconfig.get_path("include", "posix_prefix")
    if not os.path.exists(os.path.join(headers, "Python.h")):
        return f"Triton needs Python's headers, and {headers} has none; install them (python3-dev on Debian)"
    # tests/test_triton.py compiles for 8.0 and newer.
    if torch.version.hip is None and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        return "its kernels are for compute capability 8.0 (A100) or newer, and this GPU is older; use another GPU"
    return None


def find_form(
    name: str, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The margin softmax of `choose_form`. All of them compute the same loss: a resumed run may have another one."""
    form = choose_form(name, device, dtype)
    return margin_softmax if form == WALK else functools.partial(margin_softmax_class_major, triton=form == "triton")


def dtype_of_probs(walk: Walk, dtype: torch.dtype) -> torch.dtype:
    """That of E in memory. fp16 could not hold it."""
    return torch.bfloat16 if walk.matmul_dtype == torch.bfloat16 else dtype


class ChunkWork:
    """The work on a chunk of classes, in PyTorch's operators. A subclass has kernels for it.

    cosine, phi: of the targets, (N,). columns: `Walk.columns`. bar: s * cosine. shift: what is subtracted from each
    row's logits, (N,); None: nothing, as in most runs.
    """

    def __init__(
        self, walk: Walk, embedding: Tensor, centers: Tensor, cosine: Tensor, phi: Tensor, shift: Tensor | None
    ) -> None:
        self.walk, self.cosine, self.phi, self.bar, self.shift = walk, cosine, phi, walk.scale * cosine, shift
        self.embedding, self._gathered = walk.rounded(embedding), walk.new_buffer(centers)
        self._new = functools.partial(centers.new_empty, walk.chunk)
        self._sums = embedding.new_zeros(2, len(embedding), dtype=torch.float64)

    @functools.cached_property
    def _buffer(self) -> Tensor:
        """For logits, and E in their dtype. The last row takes the writes for targets of other chunks."""
        return self._sums.new_empty(self.walk.chunk + 1, len(self.bar), dtype=self.bar.dtype)

    @functools.cached_property
    def _largest(self) -> Tensor:
        return torch.full_like(self.bar, LEFT_OUT)

    @functools.cached_property
    def low(self) -> Tensor:
        """For E of a chunk in the backward pass, in its dtype."""
        return self.new_probs(self.walk.chunk)

    @functools.cached_property
    def _product(self) -> Tensor:
        return self._new(self.embedding.shape[1])

    def _new_probs(self, classes: int, rows: int) -> Tensor:
        return self.bar.new_empty(classes, rows, dtype=dtype_of_probs(self.walk, self.bar.dtype))

    def new_probs(self, classes: int) -> Tensor:
        """For E of some classes, (classes, N)."""
        return self._new_probs(classes, len(self.bar))

    def operand(self, centers: Tensor, classes: slice, factor: Tensor, known: bool) -> tuple[Tensor, Tensor]:
        """The centers w of a chunk (K, d), and s * w / |w| for the products. factor = s / |w|, (K,): `known`, or set.
        """
        here = self.walk.gather(centers, classes, self._gathered)
        if not known:
            torch.linalg.vector_norm(here, dim=1, out=factor).clamp_(min=1e-12).reciprocal_().mul_(self.walk.scale)
        return here, self.walk.rounded(torch.mul(here, factor.unsqueeze(1), out=self._product[:len(here)]))

    def _logits(self, operand: Tensor, classes: slice, column: Tensor, count: bool) -> tuple[Tensor, Tensor | None]:
        """The logits of a chunk, (K, N), and the slope of the map, (N, K), or None for 1. count: for `totals`."""
        walk, logits = self.walk, self._buffer[:len(operand)]
        multiply(operand, self.embedding.t(), logits)
        # `Walk` has the rows first. It gets views.
        left_out = walk.left_out(classes, logits.t())
        walk.leave_out(self._buffer.t(), column, left_out)
        if count:  # "<=" and not ">": a NaN must count against the hit.
            self._sums[1] += torch.le(logits, self.bar).sum(dim=0)
        slope = walk.map_negatives(logits.t(), self.cosine, self.phi)
        if slope is not None:
            walk.leave_out(self._buffer.t(), column, left_out)
        return logits, slope

    def find_largest(self, operand: Tensor, classes: slice, column: Tensor) -> None:
        """The logits of a chunk count for `largest`."""
        logits, _ = self._logits(operand, classes, column, count=False)
        torch.maximum(self._largest, logits.amax(dim=0), out=self._largest)

    def largest(self) -> Tensor:
        """(N,): the largest logit of all chunks but the target's, or LEFT_OUT."""
        return self._largest

    def exponentials(self, operand: Tensor, classes: slice, column: Tensor, out: Tensor | None,
                     target_entry: Tensor | None = None) -> Tensor:
        """E of a chunk (K, N), times the map's slope: the probabilities but for the row's factor.

        column: the target's in this chunk, (N,), an entry of `Walk.columns`. out: for E, if it is saved. target_entry:
        in the backward pass the entries of the targets, (N,); in the forward pass the chunk counts for `totals`.
        """
        walk, forward = self.walk, target_entry is None
        logits, slope = self._logits(operand, classes, column, count=forward)
        if self.shift is not None:
            logits.sub_(self.shift)
        exponentials = torch.exp(logits, out=logits if out is None or out.dtype != logits.dtype else out)
        if forward:
            self._sums[0] += exponentials.sum(dim=0)
        if slope is not None:
            exponentials.mul_(slope.t())
        if out is not None and out is not exponentials:
            out.copy_(exponentials)
        if target_entry is not None:
            self._buffer.scatter_(0, column.unsqueeze(0), target_entry.unsqueeze(0))
            if dtype_of_probs(walk, logits.dtype) != logits.dtype:
                out = self.low[:len(operand)].copy_(exponentials)
        return exponentials if out is None else out

    def totals(self) -> tuple[Tensor, Tensor]:
        """Of all classes of this rank but the target, float64, (N,) each: the sum of E; how many are not closer."""
        return self._sums[0], self._sums[1]

    def project(self, grad: Tensor, here: Tensor, factor: Tensor, unit: Tensor) -> None:
        """In place: the gradient (K, d) of s * w / |w|, but for a factor `unit`, becomes that of w, in `here`."""
        grad.mul_((factor * unit).unsqueeze(1))
        # The component along w drops out. (factor / s)^2 = 1 / |w|^2.
        along = torch.mul(grad, here, out=self._product[:len(here)]).sum(dim=1)
        grad.addcmul_(here, along.mul_((factor / self.walk.scale).square_()).unsqueeze(1), value=-1)

    def update(
        self, classes: slice, grad: Tensor, here: Tensor, factor: Tensor, unit: Tensor, finite: Tensor
    ) -> None:
        """The fused update of a chunk, from the gradient that `project` gets."""
        self.project(grad, here, factor, unit)
        self.walk.step_rows(classes, grad, finite)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in the dtype of `total`."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


class _ClassMajor(torch.autograd.Function):
    """Forward: a walk that sums exp(l) over all classes but the target. Backward: a walk for the gradients."""

    @staticmethod
    def forward(ctx, embedding: Tensor, centers: Tensor, norm: Tensor | None, target: Tensor, walk: Walk,
                work_class: type[ChunkWork]):
        rows, chunks, dtype = len(embedding), walk.chunks(), embedding.dtype
        target, own_cosine = closest_target(embedding, target, centers, walk.sub_centers)
        cosine = all_reduce_sum(own_cosine, walk.group)
        walk.margin.observe(cosine, norm)
        phi, slope, norm_slope = walk.margin.with_slopes(cosine, norm)

        saved_dtype = dtype_of_probs(walk, dtype)
        saved_chunks = min(len(chunks), walk.saved_bytes // max(1, walk.chunk * rows * saved_dtype.itemsize))
        saved = chunks[saved_chunks - 1].stop if saved_chunks else 0  # columns
        columns, factor = walk.columns(target), centers.new_empty(walk.size)
        searches, one_shift = not fits(walk.margin, walk.scale, dtype), _one_shift(walk.margin, walk.scale, dtype)
        work = work_class(walk, embedding, centers, cosine, phi,
                          None if searches or not one_shift else torch.full_like(cosine, one_shift))
        if searches:
            for number, classes in enumerate(chunks):
                _, operand = work.operand(centers, classes, factor[classes], known=False)
                work.find_largest(operand, classes, columns[number])
            # LEFT_OUT, of a row without other classes, makes the row's factor 0.
            work.shift = work.largest()
            if walk.group is not None:
                dist.all_reduce(work.shift, op=dist.ReduceOp.MAX, group=walk.group)
        probs = work.new_probs(saved + 1)  # the last one for targets that are not there
        for number, classes in enumerate(chunks):
            _, operand = work.operand(centers, classes, factor[classes], known=searches)
            work.exponentials(operand, classes, columns[number], probs[classes] if number < saved_chunks else None)

        # The ranks' sums have one shift. In float64 the sum of few terms is as exact as they are.
        sum_exp, not_closer = work.totals()
        sums = all_reduce_sum(torch.stack([sum_exp, walk.size - not_closer]), walk.group)
        shift = 0.0 if work.shift is None else work.shift.double()
        log_others, num_closer = sums[0].log() + shift, sums[1].long()
        loss, log_total, target_grad, norm_grad = join_target(walk, log_others, target, norm, phi, slope, norm_slope)
        # Without any other class the row has no gradient, and the factor may be any finite number. The lower limit,
        # of float64, is met where the target's gradient is 0 too.
        row_factor = (shift - log_total).clamp_(-_LOWEST[torch.float64], _LOWEST[dtype]).exp()
        if walk.matmul_dtype == torch.float16:
            target_grad.clamp_(min=torch.finfo(torch.float16).min / FP16_GAIN)
        limit = torch.finfo(dtype).max
        target_entry = (target_grad / row_factor).clamp_(-limit, limit).to(dtype)
        place = walk.place_of(target)
        probs.scatter_(0, torch.where((place >= 0) & (place < saved), place, saved).unsqueeze(0),
                       target_entry.to(saved_dtype).unsqueeze(0))
        ctx.save_for_backward(embedding, centers, factor, columns, probs, row_factor.to(dtype), target_entry, cosine,
                              phi, norm_grad, work.shift)
        ctx.walk, ctx.finite, ctx.saved_chunks, ctx.work_class = walk, loss.isfinite(), saved_chunks, work_class
        ctx.mark_non_differentiable(num_closer)
        return loss, num_closer

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, _: None) -> tuple[Tensor, Tensor | None, Tensor | None, None, None, None]:
        (embedding, centers, factor, columns, saved_probs, row_factor, target_entry, cosine, phi, norm_grad,
         shift) = ctx.saved_tensors
        walk: Walk = ctx.walk
        rows, size = embedding.shape
        work = ctx.work_class(walk, embedding, centers, cosine, phi, shift)
        fp16 = walk.matmul_dtype == torch.float16
        # fp16 cannot hold E: it gets the probabilities, by an element-wise pass after all.
        gain = FP16_GAIN if fp16 else 1.0
        unit, row_gain = grad_loss / (rows * gain), row_factor * gain
        weighted = work.embedding if fp16 else walk.rounded(embedding * row_factor.unsqueeze(1))
        low = embedding.new_empty(walk.chunk if fp16 else 0, rows, dtype=torch.float16)
        embedding_grad = torch.zeros_like(embedding)
        needs_centers = ctx.needs_input_grad[1]
        centers_grad = centers.new_empty(walk.size, size) if needs_centers and walk.update is None else None
        chunk_grad = centers.new_empty(walk.chunk if centers_grad is None else 0, size)
        for number, classes in enumerate(walk.chunks()):
            here, operand = work.operand(centers, classes, factor[classes], known=True)
            if number < ctx.saved_chunks:
                probs = saved_probs[classes]
            else:
                probs = work.exponentials(operand, classes, columns[number], None, target_entry)
            if fp16:
                probs = torch.mul(probs, row_gain, out=low[:len(here)])
            _add_product(embedding_grad, probs.t(), operand)
            if not needs_centers:
                continue
            grad = chunk_grad[:len(here)] if centers_grad is None else centers_grad[classes]
            multiply(probs, weighted, grad)
            if walk.update is None:
                work.project(grad, here, factor[classes], unit)
            else:
                work.update(classes, grad, here, factor[classes], unit, ctx.finite)
        if walk.update is not None and walk.size == 0:
            walk.update(slice(0, 0), centers.new_empty(0, size), ctx.finite)
        if centers_grad is not None and walk.sample is not None:
            centers_grad = torch.sparse_coo_tensor(walk.sample.rows.unsqueeze(0), centers_grad, centers.shape,
                                                   check_invariants=False)
        embedding_grad *= unit if fp16 else (row_factor * unit).unsqueeze(1)
        return embedding_grad, centers_grad, None if norm_grad is None else norm_grad * grad_loss, None, None, None
