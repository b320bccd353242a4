"""What the time model and the memory planner predict for the questions of gpu_questions.py. It needs no GPU.

The time model's float32 is TF32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from losses.class_major import choose_form
from models import build_backbone
from scripts.gpu_classifier import KINDS
from scripts.gpu_questions import MIB, Check
from scripts.gpu_report import data_sheet, read_rows
from scripts.gpu_training import MEMORY_RUNS, STEP_RUNS, prepare
from utils.options import EMBEDDING_SIZE
from utils.planner import RunSettings, measure_backbone, predict_memory
from utils.rates import CONVOLUTION, DEVICES, OTHER, PRODUCT, Shares, gpu_rates
from utils.step_time import BackboneWork, count_backbone, count_classifier, predict_step, time_of

FORMS = ("triton", "eager")
DTYPES: dict[str, torch.dtype | None] = {"bf16": torch.bfloat16, "tf32": None}


def predict(check: Check) -> None:
    prepare(check)
    sizes = check.sizes
    rows, _ = read_rows(check.out)
    name, total_mib = data_sheet(rows, check.dry_run)
    if name is None:
        asked = any(row.get("capability") for row in rows.values())
        check.add("all", left_out="utils/rates.py has no data sheet of this GPU" if asked else
                  "the part machine has not said which GPU this is")
        return
    rates, total_bytes = gpu_rates(DEVICES[name], Shares()), int(total_mib * MIB)
    check.add("rates", of="machine", sheet=DEVICES[name].name, bf16_product_tflops=rates.low_flops[PRODUCT] / 1e12,
              tf32_product_tflops=rates.flops[PRODUCT] / 1e12,
              bf16_convolution_tflops=rates.low_flops[CONVOLUTION] / 1e12,
              tf32_convolution_tflops=rates.flops[CONVOLUTION] / 1e12, copy_gbs=rates.bandwidth[OTHER] / 1e9,
              launch_us=rates.launch * 1e6, nvlink_gbs=rates.node_bandwidth / 1e9)

    def settings(classes: int, batch: int, dtype: torch.dtype | None, **more: Any) -> RunSettings:
        return RunSettings(classes=classes, batch_size=batch, world_size=1, total_bytes=total_bytes, cache_bytes=None,
                           matmul_dtype=dtype, **more)

    for classes in sizes.classes:
        for precision, dtype in DTYPES.items():
            for kind in KINDS:
                run = settings(classes, sizes.rows, dtype, embedding_size=sizes.size, fused_update=kind == "update",
                               classifier_memory_mib=0 if kind == "recomputed" else 1e9)
                for form in FORMS if choose_form("fused", "cuda") == "triton" else ("eager",):
                    part = time_of(count_classifier(run, form=form)[0], rates)
                    check.add(f"classifier: {classes} {precision} {kind} {form}", of="classifier", seconds=part.seconds,
                              bound=part.bound)

    @functools.cache
    def work(images: int, dtype: torch.dtype | None) -> BackboneWork:
        return count_backbone(build, images, device_type="cuda", autocast_dtype=dtype)

    build: Callable[[], nn.Module] = lambda: build_backbone(sizes.arch, EMBEDDING_SIZE)  # noqa: E731
    for images in sizes.images:
        for precision, dtype in DTYPES.items():
            both = work(images, dtype).forward + work(images, dtype).backward
            part = time_of(both, rates)
            check.add(f"backbone: {images} {precision}", of="backbone", seconds=part.seconds, bound=part.bound)
    for name, (flags, divisor) in STEP_RUNS.items():
        dtype = torch.bfloat16 if "bf16" in flags else None
        images = max(2, sizes.step_images // divisor)
        parts = predict_step(work(images, dtype), settings(sizes.step_classes, images, dtype), rates)
        check.add(f"step: {name}", of="step", seconds=sum(part.seconds for part in parts),
                  parts={part.name: part.seconds for part in parts})
    for classes in sizes.classes[:2]:
        dtype = torch.bfloat16
        parts = predict_step(work(sizes.step_images, dtype), settings(classes, sizes.step_images, dtype), rates)
        check.add(f"profile: {classes} classes", of="profile", seconds=sum(part.seconds for part in parts),
                  parts={part.name: part.seconds for part in parts})

    backbones = {dtype: measure_backbone(build, device_type="cuda", autocast_dtype=dtype) for dtype in DTYPES.values()}
    for name, (run_flags, many) in MEMORY_RUNS.items():
        dtype = torch.bfloat16 if "bf16" in run_flags else None
        fused = "--fuse-classifier-update" in run_flags
        run = settings(sizes.classes[0] if many else sizes.step_classes, sizes.step_images, dtype, fused_update=fused,
                       classifier_memory_mib=0 if fused else None)
        memory = predict_memory(backbones[dtype], run)
        check.add(f"memory: {name}", of="memory", mib=sum(memory.values()) / MIB,
                  parts={part: size / MIB for part, size in memory.items() if size})
