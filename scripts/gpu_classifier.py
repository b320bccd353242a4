"""Questions about the classifier alone, for gpu_questions.py.

Shapes: N rows, C classes, d the embedding size.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.class_major import margin_softmax_class_major
from losses.fused import margin_softmax
from losses.margins import MARGINS, ArcFace
from scripts import measure
from scripts.gpu_questions import Check
from utils.dist.context import set_matmul
from utils.operators import OperatorCounter
from utils.training.optim import RowSGD

FORMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "triton": functools.partial(margin_softmax_class_major, triton=True),
    "eager": margin_softmax_class_major,
    "walk": margin_softmax,  # of losses.fused: what the CPU uses
}
# name -> --matmul, operands of the products
PRECISIONS: dict[str, tuple[str, torch.dtype | None]] = {
    "bf16": ("tf32", torch.bfloat16), "tf32": ("tf32", None), "float32": ("ieee", None)}
KINDS = ("kept", "recomputed", "update")  # kept: all probabilities; update: kept, with the step of the centers
ALL_MIB = 1e9

# Largest relative error of loss and gradients, by norm.
TOLERANCES: dict[str, float] = {"float32": 1e-5, "tf32": 5e-3, "bf16": 2e-2, "fp16": 3e-3}

# (ROW_TILE, and CLASSES, DEPTH, num_warps, num_stages of tile_options, PROGRAMS) of losses.triton_kernels for bf16.
TILES = ((64, 128, 64, 8, 3, 264), (64, 128, 64, 8, 4, 264), (64, 128, 64, 4, 3, 264), (64, 64, 64, 4, 3, 264),
         (64, 64, 128, 4, 3, 264), (64, 128, 128, 8, 2, 264), (128, 128, 64, 8, 3, 264), (128, 64, 64, 8, 3, 264),
         (64, 128, 64, 8, 3, 132), (64, 128, 64, 8, 3, 528))
DRY_TILES = ((16, 32, 16, 4, 2, 8), (32, 16, 16, 4, 2, 8))


def multiply_as(check: Check, precision: str) -> torch.dtype | None:
    """Set --matmul. Returns the dtype of the operands, None for that of the centers."""
    matmul, operands = PRECISIONS[precision]
    set_matmul(matmul if check.device.type == "cuda" else None)
    return operands


class Inputs:
    """Embeddings (N, d), labels (N,) and centers (C, d) that are a little trained: a target's cosine is about 0.6."""

    def __init__(self, check: Check, classes: int, rows: int) -> None:
        generator = torch.Generator(check.device).manual_seed(0)
        size = check.sizes.size
        random = functools.partial(torch.randn, device=check.device, generator=generator)
        self.centers = nn.Parameter(random(classes, size).mul_(size**-0.5))
        self.label = torch.randint(classes, (rows,), device=check.device, generator=generator)
        noise = random(rows, size).mul_(1.36 * size**-0.5)
        self.embedding = F.normalize(F.normalize(self.centers.detach()[self.label]) + noise).requires_grad_()


def step_of(
    check: Check, inputs: Inputs, form: str, precision: str, kind: str, **settings: Any
) -> Callable[[], Tensor]:
    """Forward and backward pass, and the update of the centers where the kind has it. Returns the loss."""
    operands, update = multiply_as(check, precision), None
    if kind == "update":
        # lr 0: every step has the same centers
        update = RowSGD(inputs.centers, lr=0.0, momentum=0.9, weight_decay=5e-4, skip_nonfinite=False).update_rows
    margin = ArcFace()

    def step() -> Tensor:
        inputs.centers.grad = inputs.embedding.grad = None
        loss, _ = FORMS[form](inputs.embedding, inputs.label, inputs.centers, margin, scale=64.0, group=None,
                              saved_probs_mib=0.0 if kind == "recomputed" else ALL_MIB, matmul_dtype=operands,
                              update=update, **settings)
        loss.backward()
        return loss.detach()

    return step


def time_step(check: Check, case: str, make: Callable[[], Callable[[], Tensor]], **values: Any) -> None:
    """Add a row with the time and the peak memory of a step, or with the reason why there is none."""
    try:
        step = make()
        step()
        held = measure.restart_peak(check.device)
        loss = step().item()
        peak = measure.peak_mib(check.device, held)
        check.add(case, seconds=check.seconds(step), peak_mib=peak, loss=loss, **values)
        return
    except ModuleNotFoundError as error:
        check.add(case, left_out=f"{error.name} is missing", **values)
    except torch.OutOfMemoryError:
        check.add(case, left_out="out of memory", **values)
    except Exception as error:  # a kernel that does not compile or fails: the other cases go on if the GPU still does
        check.add(case, ok=False, error=f"{type(error).__name__}: {error}"[:500], **values)
    measure.release_memory(check.device)  # only here: an exception's frames hold tensors


def classifier(check: Check) -> None:
    """Time of a step in each form, precision and kind, beside its products alone and the bytes that it must move."""
    sizes = check.sizes
    bandwidth = check.bandwidth()
    for classes in sizes.classes:
        inputs = Inputs(check, classes, sizes.rows)
        common: dict[str, Any] = dict(classes=classes, rows=sizes.rows, size=sizes.size)
        for precision in sizes.precisions:
            # The others are slow, and show no more.
            if precision != "bf16" and classes == max(sizes.classes) or (
                    precision == "float32" and classes != sizes.classes[0]):
                continue
            add_floors(check, inputs, precision, bandwidth, common)
            for form, kind in itertools.product(FORMS, KINDS):
                time_step(check, f"{classes} {precision} {kind} {form}",
                          functools.partial(step_of, check, inputs, form, precision, kind),
                          form=form, precision=precision, kind=kind, **common)
                inputs.centers.grad = None
            if classes == sizes.classes[0] and precision == "bf16":
                add_launches(check, inputs, common)
                for chunk, form in itertools.product(sizes.chunks, ("triton", "eager")):
                    time_step(check, f"{classes} bf16 kept {form}, chunk {chunk}",
                              functools.partial(step_of, check, inputs, form, "bf16", "kept", chunk=chunk),
                              form=form, precision="bf16", kind="kept", chunk=chunk, **common)
        del inputs
        measure.release_memory(check.device)


def add_floors(check: Check, inputs: Inputs, precision: str, bandwidth: float, common: dict[str, Any]) -> None:
    """The time of the three products alone, in the fastest of some chunks, and that of the bytes at this bandwidth.

    Bytes, with b those of a probability: the forward pass reads the centers and writes N b of each class; the backward
    pass reads both and writes a gradient, 12 d + 2 N b a class. With the update it reads momentum and writes momentum
    and centers in place of the gradient, 20 d + 2 N b. Recomputed, there are no probabilities in memory: 12 d.
    """
    dtype = multiply_as(check, precision) or torch.float32
    try:
        centers, rows = inputs.centers.detach().to(dtype), inputs.embedding.detach().to(dtype)
        gradient, row_gradient = torch.empty_like(centers), torch.zeros_like(rows)

        def products(chunk: int) -> None:
            for first in range(0, len(centers), chunk):
                here = centers[first:first + chunk]
                probs = buffer[:len(here)]
                torch.mm(here, rows.t(), out=probs)
                row_gradient.addmm_(probs.t(), here)
                torch.mm(probs, rows, out=gradient[first:first + chunk])

        seconds = {}
        for chunk in (*check.sizes.chunks, len(centers)):
            if chunk <= max(check.sizes.chunks) and chunk <= len(centers):
                buffer = centers.new_empty(chunk, len(rows))
                seconds[chunk] = check.seconds(functools.partial(products, chunk))
        chunk = min(seconds, key=seconds.__getitem__)
        check.add(f"{len(centers)} {precision} products", seconds=seconds[chunk], chunk=chunk, precision=precision,
                  floor="products", tflops=6 * rows.numel() * len(centers) / seconds[chunk] / 1e12, **common)
    except torch.OutOfMemoryError:
        check.add(f"{len(inputs.centers)} {precision} products", left_out="out of memory", precision=precision,
                  floor="products", **common)
    measure.release_memory(check.device)
    probs = 2 * common["rows"] * dtype.itemsize
    for kind, size in {"kept": 12 * common["size"] + probs, "recomputed": 12 * common["size"],
                       "update": 20 * common["size"] + probs}.items():
        check.add(f"{common['classes']} {precision} {kind} memory", seconds=common["classes"] * size / bandwidth,
                  gbs=bandwidth / 1e9, precision=precision, kind=kind, floor="memory", **common)


def add_launches(check: Check, inputs: Inputs, common: dict[str, Any]) -> None:
    """Operators of a step that launch kernels, as utils/operators.py counts them."""
    for form, kind in itertools.product(FORMS, ("kept", "recomputed")):
        try:
            step = step_of(check, inputs, form, "bf16", kind)
            with OperatorCounter(check.device.type) as counter:
                step()
            counts = counter.take()
            check.add(f"launches {kind} {form}", launches=counts.launches.total(), gib=counts.bytes.total() / 2**30,
                      waits=dict(counts.waits), form=form, kind=kind, **common)
        except Exception as error:
            check.add(f"launches {kind} {form}", ok=False, error=f"{type(error).__name__}: {error}"[:500], form=form,
                      kind=kind, **common)
        inputs.centers.grad = None


@contextlib.contextmanager
def tiles_are(tile: tuple[int, ...]) -> Iterator[None]:
    from losses import triton_kernels as kernels

    rows, classes, depth, warps, stages, programs = tile
    chosen = kernels.tile_options

    def options(*arguments: Any) -> dict[str, Any]:
        return {**chosen(*arguments), "ROWS": rows, "CLASSES": classes, "DEPTH": depth, "num_warps": warps,
                "num_stages": stages}

    with mock.patch.object(kernels, "ROW_TILE", rows), mock.patch.object(kernels, "PROGRAMS", programs), \
            mock.patch.object(kernels, "tile_options", options):
        yield


def tiles(check: Check) -> None:
    """Time of a step with other tiles of the kernel of exponentials."""
    classes = check.sizes.classes[0]
    inputs = Inputs(check, classes, check.sizes.rows)
    common: dict[str, Any] = dict(classes=classes, rows=check.sizes.rows, size=check.sizes.size)
    time_step(check, "current", functools.partial(step_of, check, inputs, "triton", "bf16", "kept"), **common)
    for tile in DRY_TILES if check.dry_run else TILES:
        with tiles_are(tile):
            time_step(check, " ".join(map(str, tile)),
                      functools.partial(step_of, check, inputs, "triton", "bf16", "kept"), tile=tile, **common)


def kernels(check: Check) -> None:
    """Loss and gradients of the forms for GPUs against the walk of losses.fused in float64, on the same device."""
    classes, rows = check.sizes.checked_classes, check.sizes.checked_rows
    inputs = Inputs(check, classes, rows)
    drawn = torch.arange(0, classes, 3, device=check.device)
    cases: list[tuple[str, str, float, dict[str, Any]]] = [
        *(("arcface", precision, memory, {}) for precision in TOLERANCES for memory in (ALL_MIB, 0.0)),
        ("mv-softmax", "bf16", ALL_MIB, {}), ("curricularface", "float32", 0.0, {}),
        ("arcface", "float32", 0.0, dict(filter_above=0.1)), ("arcface", "bf16", ALL_MIB, dict(drawn=drawn)),
        ("arcface", "tf32", 0.0, dict(chunk=classes // 3 + 1)),
    ]
    for name, precision, memory, settings in cases:
        truth = results(margin_softmax, inputs, name, torch.float64, None, memory, settings)
        operands = torch.float16 if precision == "fp16" else multiply_as(check, precision)
        # A cosine at a threshold, of the filter or of the loss's map, may be on its other side in float64.
        allowed = TOLERANCES[precision] * (10 if "filter_above" in settings or name != "arcface" else 1)
        for form in ("triton", "eager"):
            case = " ".join([name, precision, "kept" if memory else "recomputed", *settings, form])
            try:
                got = results(FORMS[form], inputs, name, torch.float32, operands, memory, settings)
                errors = [((one - true).norm() / true.norm()).item() for one, true in zip(got, truth)]
                check.add(case, ok=all(error <= allowed for error in errors), form=form, loss_error=errors[0],
                          embedding_error=errors[1], centers_error=errors[2], allowed=allowed)
            except Exception as error:
                check.add(case, ok=False, form=form, error=f"{type(error).__name__}: {error}"[:500])
    set_matmul("tf32" if check.device.type == "cuda" else None)


def results(form: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs, name: str, dtype: torch.dtype,
            operands: torch.dtype | None, memory: float, settings: dict[str, Any]) -> list[Tensor]:
    """Loss, gradient of the embeddings, gradient of the centers."""
    margin: Any = MARGINS[name]()
    scale = 32.0
    if name == "curricularface":  # its own scale takes a shift for each row
        scale = margin.default_scale
        margin.t.fill_(0.3)
    margin.to(inputs.centers.device)
    embedding, centers = (tensor.detach().to(dtype, copy=True).requires_grad_()
                          for tensor in (inputs.embedding, inputs.centers))
    loss, _ = form(embedding, inputs.label, centers, margin, scale=scale, group=None, saved_probs_mib=memory,
                   matmul_dtype=operands, **settings)
    loss.backward()
    assert embedding.grad is not None and centers.grad is not None
    return [loss.detach(), embedding.grad, centers.grad.to_dense()]
