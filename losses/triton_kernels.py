"""Triton kernels for a chunk of `losses.class_major`. Imported only where they run: no CPU run needs Triton.

Each launch is a custom operator of PyTorch ("arcface::..."): fake tensors pass through them, and a dispatch mode counts
them. Shapes as in `losses.class_major`: N rows, K classes of a chunk, d the embedding size.

TRITON_INTERPRET=1 runs the kernels on the CPU, for tests. Its tl.dot multiplies the bit patterns of bf16, and it
truncates where a GPU rounds: `INTERPRET` avoids both.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, library
from torch.utils.flop_counter import register_flop_formula

from losses.class_major import ChunkWork
from losses.fused import LEFT_OUT, Walk

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

# Rows of a tile of `exponentials_kernel`. `tile_options` has the rest.
ROW_TILE = 64

# Programs of `exponentials_kernel` in all: two for each of an H100's 132 multiprocessors. Each has its own partial
# sums, and walks over tiles of classes; so the sums need no atomics, and do not depend on which program runs first.
PROGRAMS = 264

LEFT_OUT_LOGIT = tl.constexpr(LEFT_OUT)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _store(pointer, value, mask, INTERPRET: tl.constexpr):
    if INTERPRET and pointer.dtype.element_ty == tl.bfloat16:  # round to nearest even, by the bits
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, rounded, bits).to(tl.float32, bitcast=True)
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


# K is not specialized: a last chunk of another size is no reason to compile again.
@triton.jit(do_not_specialize=["K"])
def scale_kernel(W, FACTOR, OUT, K, scale, KNOWN: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
                 BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    """OUT = w * FACTOR, in its dtype; FACTOR = scale / |w| is KNOWN, or set. A program: BLOCK classes."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, PADDED_D)
    here, mask = c < K, (c < K)[:, None] & (d < D)[None, :]
    place = c[:, None].to(tl.int64) * D + d[None, :]
    w = tl.load(W + place, mask=mask, other=0.0)
    if KNOWN:
        factor = tl.load(FACTOR + c, mask=here, other=0.0)
    else:
        norm = tl.sqrt(tl.sum(w * w, axis=1))
        # A NaN must stay one: a comparison with it is false.
        factor = scale / tl.where(norm < 1e-12, 1e-12, norm)
        tl.store(FACTOR + c, factor, mask=here)
    _store(OUT + place, w * factor[:, None], mask, INTERPRET)


@triton.jit(do_not_specialize=["K"])
def exponentials_kernel(
    OPERAND, X, COLUMN, BAR, SUM, NOT_CLOSER, E, LEFT_OUT, THRESHOLD, MAP, TARGET_ENTRY, SHIFT, N, STRIDE, K, scale,
    highest,
    LARGEST: tl.constexpr, SUMS: tl.constexpr, STORE: tl.constexpr, HAS_LEFT_OUT: tl.constexpr, HAS_MAP: tl.constexpr,
    HAS_FILTER: tl.constexpr, HAS_ENTRY: tl.constexpr, HAS_SHIFT: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """`ChunkWork.exponentials`: product, mask, count, exp, sums, and E (K, N).

    A program (number of the block of rows, p): every P-th tile of classes. SUM and NOT_CLOSER, (P, N): it adds to its
    own rows of them. MAP (3,): the cosines c above THRESHOLD (N,) become MAP[0] * c + MAP[1] * c^2 + MAP[2].
    LARGEST: `ChunkWork.find_largest` instead; SUM holds maxima, and there are no exponentials.
    """
    p, programs = tl.program_id(1), tl.num_programs(1)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = n < N
    column = tl.load(COLUMN + n, mask=in_rows, other=-1)
    bar = tl.load(BAR + n, mask=in_rows, other=0.0)
    if HAS_MAP:
        threshold = tl.load(THRESHOLD + n, mask=in_rows, other=0.0)
        linear, square, constant = tl.load(MAP), tl.load(MAP + 1), tl.load(MAP + 2)
    if HAS_ENTRY:
        entry = tl.load(TARGET_ENTRY + n, mask=in_rows, other=0.0)
    if HAS_SHIFT:
        shift = tl.load(SHIFT + n, mask=in_rows, other=0.0)
    total = tl.full((ROWS,), LEFT_OUT_LOGIT if LARGEST else 0.0, tl.float32)
    not_closer = tl.zeros((ROWS,), tl.int32)
    depth = tl.arange(0, DEPTH)
    for tile in range(p, tl.cdiv(K, CLASSES), programs):
        # 32-bit offsets from the tile's first element: 64-bit ones of every element would fill the registers.
        first_class, local = tl.full((), 0, tl.int64) + tile * CLASSES, tl.arange(0, CLASSES)
        c = tile * CLASSES + local
        in_classes = c < K
        logits = tl.zeros((CLASSES, ROWS), tl.float32)
        for first in range(0, D, DEPTH):
            d = first + depth
            w_mask, x_mask = in_classes[:, None], in_rows[None, :]
            if D % DEPTH:
                w_mask, x_mask = w_mask & (d < D)[None, :], x_mask & (d < D)[:, None]
            w = tl.load(OPERAND + first_class * D + (local[:, None] * D + d[None, :]), mask=w_mask, other=0.0)
            x = tl.load(X + (n[None, :] * D + d[:, None]), mask=x_mask, other=0.0)
            if INTERPRET:
                w, x = w.to(tl.float32), x.to(tl.float32)
            logits = tl.dot(w, x, logits, input_precision=PRECISION)
        is_target = c[:, None] == column[None, :]
        out = is_target
        if HAS_LEFT_OUT:
            out = out | (tl.load(LEFT_OUT + c, mask=in_classes, other=1) != 0)[:, None]
        logits = tl.where(out, LEFT_OUT_LOGIT, logits)
        if SUMS:
            not_closer += tl.sum(((logits <= bar[None, :]) & in_classes[:, None]).to(tl.int32), axis=0)
        out = out | (c >= K)[:, None]
        if HAS_FILTER:
            out = out | (logits > highest)
        if HAS_MAP:
            cosine = logits / scale
            hard = cosine > threshold[None, :]
            logits = tl.where(hard, scale * (constant + cosine * (linear + square * cosine)), logits)
        if LARGEST:
            total = tl.maximum(total, tl.max(tl.where(out, LEFT_OUT_LOGIT, logits), axis=0))
        if HAS_SHIFT:
            logits -= shift[None, :]
        e = tl.where(out, 0.0, tl.exp2(logits * LOG2_E))
        if SUMS:
            total += tl.sum(e, axis=0)
        if HAS_MAP:
            e = tl.where(hard & (e != 0.0), e * (linear + 2.0 * square * cosine), e)
        if HAS_ENTRY:
            e = tl.where(is_target, entry[None, :], e)
        if STORE:
            # STRIDE divides by 16, and the rows up to it are written too: so a thread stores 16 bytes at a time.
            _store(E + first_class * STRIDE + (local[:, None] * STRIDE + n[None, :]), e,
                   in_classes[:, None] & (n < STRIDE)[None, :], INTERPRET)
    place = p * N + n
    if LARGEST:
        before = tl.load(SUM + place, mask=in_rows, other=0.0)
        tl.store(SUM + place, tl.maximum(before, total), mask=in_rows)
    if SUMS:
        tl.store(SUM + place, tl.load(SUM + place, mask=in_rows, other=0.0) + total, mask=in_rows)
        tl.store(NOT_CLOSER + place, tl.load(NOT_CLOSER + place, mask=in_rows, other=0) + not_closer, mask=in_rows)


@triton.jit(do_not_specialize=["K"])
def gradient_kernel(G, W, FACTOR, UNIT, M, FINITE, K, scale, lr, momentum, weight_decay, STEP: tl.constexpr,
                    HAS_MOMENTUM: tl.constexpr, HAS_FINITE: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
                    BLOCK: tl.constexpr):
    """`ChunkWork.project`, in place; or, with STEP, also the step of SGD, which changes W and M and not G.

    A program: BLOCK classes. FINITE: where it is 0, nothing is read or written.
    """
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, PADDED_D)
    here = c < K
    if HAS_FINITE:
        here = here & (tl.load(FINITE) != 0)
    mask = here[:, None] & (d < D)[None, :]
    place = c[:, None].to(tl.int64) * D + d[None, :]
    factor = tl.load(FACTOR + c, mask=here, other=0.0)
    w = tl.load(W + place, mask=mask, other=0.0)
    g = tl.load(G + place, mask=mask, other=0.0) * (factor * tl.load(UNIT))[:, None]
    inverse = factor / scale
    along = tl.sum(g * w, axis=1) * inverse * inverse
    g -= w * along[:, None]
    if STEP:
        g += weight_decay * w
        if HAS_MOMENTUM:
            g += momentum * tl.load(M + place, mask=mask, other=0.0)
            tl.store(M + place, g, mask=mask)
        tl.store(W + place, w - lr * g, mask=mask)
    else:
        tl.store(G + place, g, mask=mask)


def row_options(d: int) -> dict[str, int]:
    """Block sizes of the kernels that take whole rows of d values: about 2,048 values a program, of 4 warps."""
    padded = triton.next_power_of_2(d)
    return {"D": d, "PADDED_D": padded, "BLOCK": max(1, 2048 // padded)}


def tile_options(d: int, dtype: torch.dtype, capability: int) -> dict[str, Any]:
    """Tiles, warps and precision of `exponentials_kernel` for operands of this dtype. tl.dot takes 16 values at least.

    capability: of the GPU, 90 for 9.0. The tiles are the largest of those tried that need no local memory, as the
    compiler tells it (tests/test_triton.py). No GPU has timed them.
    """
    depth = 64 if dtype.itemsize == 2 else 32
    return {"D": d, "ROWS": ROW_TILE, "CLASSES": 128 if dtype == torch.bfloat16 and capability == 90 else 64,
            "DEPTH": min(depth, max(16, triton.next_power_of_2(d))),
            "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
            "num_warps": 8, "num_stages": 3}


@functools.cache
def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _scale(centers: Tensor, factor: Tensor, out: Tensor, scale: float, known: bool) -> None:
    options = row_options(centers.shape[1])
    scale_kernel[(triton.cdiv(len(centers), options["BLOCK"]),)](
        centers, factor, out, len(centers), scale, KNOWN=known, INTERPRET=INTERPRET, **options)


def _project(grad: Tensor, centers: Tensor, factor: Tensor, unit: Tensor, scale: float) -> None:
    _gradient(grad, centers, factor, unit, None, None, scale, 0.0, 0.0, 0.0, step=False)


def _sgd(
    grad: Tensor, centers: Tensor, momentum_buffer: Tensor | None, factor: Tensor, unit: Tensor, finite: Tensor | None,
    scale: float, lr: float, momentum: float, weight_decay: float,
) -> None:
    _gradient(grad, centers, factor, unit, momentum_buffer, finite, scale, lr, momentum, weight_decay, step=True)


def _gradient(
    grad: Tensor, centers: Tensor, factor: Tensor, unit: Tensor, momentum_buffer: Tensor | None, finite: Tensor | None,
    scale: float, lr: float, momentum: float, weight_decay: float, step: bool,
) -> None:
    options = row_options(centers.shape[1])
    # A pointer that the variant does not read is that of the gradient. Triton compiles once for all values of a float.
    gradient_kernel[(triton.cdiv(len(centers), options["BLOCK"]),)](
        grad, centers, factor, unit, grad if momentum_buffer is None else momentum_buffer,
        grad if finite is None else finite.view(torch.uint8), len(centers), scale, lr, momentum, weight_decay,
        STEP=step, HAS_MOMENTUM=momentum_buffer is not None, HAS_FINITE=finite is not None, **options)


def _exponentials(
    operand: Tensor, embedding: Tensor, column: Tensor, bar: Tensor, total: Tensor | None, not_closer: Tensor | None,
    out: Tensor | None, left_out: Tensor | None, threshold: Tensor | None, coefficients: Tensor | None,
    target_entry: Tensor | None, shift: Tensor | None, scale: float, highest: float | None,
) -> None:
    """total without not_closer: LARGEST."""
    rows, size = embedding.shape
    blocks = triton.cdiv(rows, ROW_TILE)
    # A pointer that the variant does not read is that of the operand.
    pointers = [operand if tensor is None else tensor for tensor in (
        total, not_closer, out, left_out, threshold, coefficients, target_entry, shift)]
    exponentials_kernel[(blocks, programs_of(rows))](
        operand, embedding, column, bar, *pointers, rows, 16 if out is None else out.stride(0), len(operand), scale,
        highest or 0.0,
        LARGEST=total is not None and not_closer is None, SUMS=not_closer is not None, STORE=out is not None,
        HAS_LEFT_OUT=left_out is not None, HAS_MAP=threshold is not None, HAS_FILTER=highest is not None,
        HAS_ENTRY=target_entry is not None, HAS_SHIFT=shift is not None, INTERPRET=INTERPRET,
        **tile_options(size, operand.dtype, _capability(operand.device)))


def programs_of(rows: int) -> int:
    """P: programs of `exponentials_kernel` for each block of rows."""
    return 2 if INTERPRET else max(1, PROGRAMS // triton.cdiv(rows, ROW_TILE))


_library = library.Library("arcface", "DEF")
for _name, _schema, _function in (
    ("scale", "Tensor centers, Tensor(a!) factor, Tensor(b!) out, float scale, bool known", _scale),
    ("project", "Tensor(a!) grad, Tensor centers, Tensor factor, Tensor unit, float scale", _project),
    ("sgd", "Tensor grad, Tensor(a!) centers, Tensor(b!)? momentum_buffer, Tensor factor, Tensor unit, "
     "Tensor? finite, float scale, float lr, float momentum, float weight_decay", _sgd),
    ("exponentials",
     "Tensor operand, Tensor embedding, Tensor column, Tensor bar, Tensor(a!)? total, Tensor(b!)? not_closer, "
     "Tensor(c!)? out, Tensor? left_out, Tensor? threshold, Tensor? coefficients, Tensor? target_entry, Tensor? shift, "
     "float scale, float? highest", _exponentials),
):
    _library.define(f"{_name}({_schema}) -> ()")
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _function, _key)
    library.register_fake(f"arcface::{_name}", lambda *_: None, lib=_library)


@register_flop_formula(torch.ops.arcface.exponentials)
def _count_flops(operand: torch.Size, embedding: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Of the product, for `utils.operators`."""
    return 2 * operand[0] * operand[1] * embedding[0]


class TritonWork(ChunkWork):
    """`ChunkWork` by kernels. Sub-centers, and a map of the other cosines that is not `Margin.quadratic`, go through
    PyTorch's operators for E; everything else has a kernel."""

    def __init__(
        self, walk: Walk, embedding: Tensor, centers: Tensor, cosine: Tensor, phi: Tensor, shift: Tensor | None
    ) -> None:
        margin = walk.margin
        self._has_kernel = walk.sub_centers == 1 and (margin.negatives is None or margin.quadratic is not None)
        super().__init__(walk, embedding, centers, cosine, phi, shift)
        self._operand = centers.new_empty(walk.chunk, centers.shape[1], dtype=walk.matmul_dtype or centers.dtype)
        self._partial = [embedding.new_zeros(programs_of(len(embedding)), len(embedding), dtype=dtype)
                         for dtype in (torch.float32, torch.int32)] if self._has_kernel else []
        self._maxima: Tensor | None = None
        self._threshold = self._coefficients = None
        if self._has_kernel and margin.quadratic is not None:
            self._threshold, self._coefficients = margin.quadratic(cosine, phi)

    def new_probs(self, classes: int) -> Tensor:
        """The kernel stores whole 16 rows: there is room for them."""
        rows = len(self.bar)
        return self._new_probs(classes, -(-rows // 16) * 16)[:, :rows]

    def operand(self, centers: Tensor, classes: slice, factor: Tensor, known: bool) -> tuple[Tensor, Tensor]:
        here = self.walk.gather(centers, classes, self._gathered)
        operand = self._operand[:len(here)]
        torch.ops.arcface.scale(here, factor, operand, self.walk.scale, known)
        return here, operand

    def _run(self, operand: Tensor, classes: slice, column: Tensor, total: Tensor | None, not_closer: Tensor | None,
             out: Tensor | None, target_entry: Tensor | None) -> None:
        repeated, highest = self.walk.repeated(classes), self.walk.filter_above
        torch.ops.arcface.exponentials(
            operand, self.embedding, column, self.bar, total, not_closer, out,
            None if repeated is None else repeated.view(torch.uint8), self._threshold, self._coefficients, target_entry,
            self.shift, self.walk.scale, None if highest is None else highest * self.walk.scale)

    def find_largest(self, operand: Tensor, classes: slice, column: Tensor) -> None:
        if not self._has_kernel:
            return super().find_largest(operand, classes, column)
        if self._maxima is None:
            self._maxima = torch.full_like(self._partial[0], LEFT_OUT)
        self._run(operand, classes, column, self._maxima, None, None, None)

    def largest(self) -> Tensor:
        return super().largest() if self._maxima is None else self._maxima.amax(dim=0)

    def exponentials(self, operand: Tensor, classes: slice, column: Tensor, out: Tensor | None,
                     target_entry: Tensor | None = None) -> Tensor:
        if not self._has_kernel:
            return super().exponentials(operand, classes, column, out, target_entry)
        backward = target_entry is not None
        if backward:
            out = self.low[:len(operand)]
        total, not_closer = (None, None) if backward else self._partial
        self._run(operand, classes, column, total, not_closer, out, target_entry)
        return operand if out is None else out

    def totals(self) -> tuple[Tensor, Tensor]:
        if not self._has_kernel:
            return super().totals()
        return self._partial[0].double().sum(dim=0), self._partial[1].sum(dim=0).double()

    def project(self, grad: Tensor, here: Tensor, factor: Tensor, unit: Tensor) -> None:
        Projection(factor, unit, self.walk.scale).project(grad, here)

    def update(
        self, classes: slice, grad: Tensor, here: Tensor, factor: Tensor, unit: Tensor, finite: Tensor
    ) -> None:
        self.walk.step_rows(classes, grad, finite, projection=Projection(factor, unit, self.walk.scale))


@dataclass(frozen=True)
class Projection:
    """What `ChunkWork.project` does to the gradient of a chunk: alone, or in one kernel with the step of SGD.

    Equal centers have equal factors. So the centers that are given may be those of equal rows, in any order.
    """

    factor: Tensor
    unit: Tensor
    scale: float

    def project(self, grad: Tensor, centers: Tensor) -> None:
        """In place, the gradient alone."""
        torch.ops.arcface.project(grad, centers, self.factor, self.unit, self.scale)

    def sgd(
        self, grad: Tensor, centers: Tensor, momentum_buffer: Tensor | None, finite: Tensor | None, *, lr: float,
        momentum: float, weight_decay: float,
    ) -> None:
        """torch.optim.SGD's step of centers and momentum, in place. The gradient is not modified.

        finite: bool scalar on the device; where it is False, nothing changes.
        """
        torch.ops.arcface.sgd(grad, centers, momentum_buffer, self.factor, self.unit, finite, self.scale, lr, momentum,
                              weight_decay)
