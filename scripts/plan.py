#!/usr/bin/env python3
"""How much memory a training run will need on each GPU, and how many classes would fit; no GPU is needed to ask.

    python3 scripts/plan.py --classes 4000000 --world-size 8 --batch-size 1024 --precision bf16 --fuse-classifier-update
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

# The script's own directory is on sys.path, the repository's root is not.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from models import build_backbone, check_arch  # noqa: E402
from utils.errors import Parser, UserError, exit_on_user_error  # noqa: E402
from utils.options import EMBEDDING_SIZE  # noqa: E402
from utils.planner import largest, measure_backbone, predict_memory  # noqa: E402

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

MIB, GIB = 2**20, 2**30
# Of an H100 or A100, for where no GPU is visible.
ASSUMED_MEMORY_GIB, ASSUMED_CACHE = 80.0, 50 * MIB


@dataclass(frozen=True)
class Options:
    """What the user asked for, one field per flag (see `parse_options` for their meaning)."""

    classes: int
    world_size: int
    batch_size: int
    arch: str
    precision: str
    enable_model_parallel: bool
    enable_zero_optim: bool
    fuse_classifier_update: bool
    classifier_memory_mib: int | None
    memory_gib: float
    cache_bytes: int


def main() -> None:
    options = parse_options()
    predict = predictor(options)
    print(as_text(options, predict))


def predictor(options: Options) -> Callable[[int, int], dict[str, int]]:
    """(classes, world size) -> bytes of each part, everything else as in `options`."""
    autocast_dtype = PRECISIONS[options.precision]
    backbone = measure_backbone(
        lambda: build_backbone(options.arch, EMBEDDING_SIZE), device_type="cuda", autocast_dtype=autocast_dtype
    )
    return lambda classes, world_size: predict_memory(
        backbone, classes=classes, embedding_size=EMBEDDING_SIZE, batch_size=options.batch_size, world_size=world_size,
        model_parallel=options.enable_model_parallel, zero=options.enable_zero_optim,
        fused_update=options.fuse_classifier_update, classifier_memory_mib=options.classifier_memory_mib,
        operands=autocast_dtype, device_type="cuda", total_bytes=int(options.memory_gib * GIB),
        cache_bytes=options.cache_bytes,
    )


def as_text(options: Options, predict: Callable[[int, int], dict[str, int]]) -> str:
    """The table, and what fits."""
    memory = options.memory_gib * GIB
    parts = predict(options.classes, options.world_size)
    total = sum(parts.values())
    width = max(map(len, parts))
    lines = [
        f"{options.arch}, {options.classes:,} classes, {options.batch_size} images on {options.world_size} GPUs of "
        f"{options.memory_gib:g} GiB, {options.precision}",
        "",
        *(f"{name:<{width}}  {size / MIB:>10,.0f} MiB" for name, size in parts.items() if size),
        f"{'sum':<{width}}  {total / MIB:>10,.0f} MiB  = {total / memory:.0%} of a GPU: "
        + ("fits" if total <= memory else "does not fit"),
        "",
    ]
    most = largest(lambda classes: sum(predict(classes, options.world_size).values()) <= memory, options.world_size)
    lines.append(f"most classes that fit on {options.world_size} GPUs: {most:,}" if most else
                 f"no number of classes fits on {options.world_size} GPUs: give them fewer images, or --precision bf16")
    counts = [count for count in range(1, options.batch_size // 2 + 1) if options.batch_size % count == 0]
    if options.fuse_classifier_update and not options.enable_model_parallel:
        counts = [1]
    fewest = next((count for count in counts if sum(predict(options.classes, count).values()) <= memory), None)
    lines.append(f"fewest GPUs that {options.classes:,} classes fit on with this batch: {fewest}" if fewest else
                 f"{options.classes:,} classes fit on no number of GPUs with this batch")
    return "\n".join(lines)


def parse_options(argv: list[str] | None = None) -> Options:
    """Parse, check, and look at the GPU if there is one. Raises UserError."""
    parser = Parser("plan.py", "Memory of a training run on each GPU, part by part, and how many classes would fit.")
    parser.add_argument("--classes", type=int, required=True, metavar="C", help="classes of the classifier")
    parser.add_argument("--world-size", type=int, default=1, metavar="W", help="GPUs of all nodes (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=512, metavar="N",
                        help="images of all GPUs that are computed at once (default: %(default)s)")
    parser.add_argument("-a", "--arch", default="iresnet50", metavar="ARCH", help="backbone (default: %(default)s)")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="fp32",
                        help="bf16, fp16: with --enable-amp-mode (default: %(default)s)")
    parser.add_argument("--memory-gib", type=float, metavar="GIB",
                        help=f"of each GPU (default: that of the GPU that is visible, else {ASSUMED_MEMORY_GIB:g})")
    group = parser.add_argument_group("flags of main.py")
    group.add_argument("--enable-model-parallel", action=argparse.BooleanOptionalAction, default=True,
                       help="classes sharded over all GPUs (default: on)")
    group.add_argument("--enable-zero-optim", action="store_true")
    group.add_argument("--fuse-classifier-update", action="store_true")
    group.add_argument("--classifier-memory-mib", type=int, metavar="MIB")
    values = vars(parser.parse_args(argv))
    for flag, minimum in (("classes", 2), ("world_size", 1), ("batch_size", 2), ("classifier_memory_mib", 0), ("memory_gib", 0)):
        if values[flag] is not None and not values[flag] >= minimum:
            raise UserError(f"--{flag.replace('_', '-')} {values[flag]}: give a number of at least {minimum}")
    check_arch(values["arch"])
    if values["batch_size"] % values["world_size"]:
        raise UserError(f"--batch-size {values['batch_size']}: must divide by --world-size {values['world_size']}")
    if values["fuse_classifier_update"] and values["precision"] == "fp16":
        raise UserError("--fuse-classifier-update with --precision fp16: main.py has no such mode; use bf16, or drop one of them")
    if values["fuse_classifier_update"] and values["world_size"] > 1 and not values["enable_model_parallel"]:
        raise UserError("--fuse-classifier-update: several GPUs share the update out only with --enable-model-parallel; "
                        "drop one of them")
    visible = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    if values["memory_gib"] is None:
        values["memory_gib"] = visible.total_memory / GIB if visible else ASSUMED_MEMORY_GIB
    return Options(**values, cache_bytes=visible.L2_cache_size if visible else ASSUMED_CACHE)


if __name__ == "__main__":
    exit_on_user_error(main)
