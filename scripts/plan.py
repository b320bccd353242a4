#!/usr/bin/env python3
"""How much memory a training run needs on each GPU, and how many classes would fit. Needs no GPU.

    python3 scripts/plan.py --classes 4000000 --processes 8 --batch-size 1024 --precision bf16 --fuse-classifier-update
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

# The script's own directory is on sys.path, the repository's root is not.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

if __name__ == "__main__":
    from utils.packages import require_packages

    require_packages()

import torch

from models import ANY_TIMM, BACKBONES, build_backbone, check_arch, is_timm  # noqa: E402
from utils.checkpoint.weights import MAX_EMBEDDING_SIZE  # noqa: E402
from utils.errors import UserError, exit_on_user_error  # noqa: E402
from utils.flags import flag, parse_flags  # noqa: E402
from utils.options import EMBEDDING_SIZE  # noqa: E402
from utils.planner import RunSettings, largest, measure_backbone, predict_memory  # noqa: E402
from utils.training.optim import OPTIMIZERS, count_states  # noqa: E402

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

MIB, GIB = 2**20, 2**30
# Of an A100 or H100, if no GPU is visible.
ASSUMED_MEMORY_GIB = 80.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """The flags of plan.py. Those in the second section mean what they mean for main.py."""

    classes: int = flag("--classes", required=True, metavar="C", at_least=2, help="classes of the classifier")
    world_size: int = flag("--processes", "--world-size", default=1, metavar="W", at_least=1,
                           help="GPUs of all nodes, with a process each")
    batch_size: int = flag("--batch-size", default=512, metavar="N", at_least=2,
                           help="images of a micro-batch, over all GPUs")
    arch: str = flag("-a", "--arch", default="iresnet50", metavar="ARCH", choices=BACKBONES,
                      more_choices=ANY_TIMM, help="backbone")
    embedding_size: int = flag("--embedding-size", default=EMBEDDING_SIZE, metavar="D", at_least=1,
                               at_most=MAX_EMBEDDING_SIZE, section="flags of main.py", help="numbers of an embedding")
    precision: str = flag("--precision", default="fp32", choices=PRECISIONS, help="bf16, fp16: with --enable-amp-mode")
    memory_gib: float | None = flag("--memory-gib", metavar="GIB", above=0, help="memory of each GPU",
                                    default_text=f"that of the visible GPU, else {ASSUMED_MEMORY_GIB:g}")
    sub_centers: int = flag("--sub-centers", default=1, metavar="K", at_least=1, section="flags of main.py",
                            help="centers of each class")
    enable_model_parallel: bool = flag("--enable-model-parallel", default=True, section="flags of main.py",
                                       help="shard the classes over all GPUs")
    enable_zero_optim: bool = flag("--enable-zero-optim", default=False, section="flags of main.py",
                                   help="shard the optimizer state of replicated parameters")
    optimizer: str = flag("--optimizer", default="sgd", choices=OPTIMIZERS, section="flags of main.py",
                          help="sgd keeps one value per weight, adamw two")
    ema: bool = flag("--ema", default=False, section="flags of main.py", help="keep an average of the backbone")
    fuse_classifier_update: bool = flag("--fuse-classifier-update", default=False, section="flags of main.py",
                                        help="never store the gradient of the class centers")
    checkpoint_activations: bool = flag("--checkpoint-activations", default=False, section="flags of main.py",
                                        help="keep only the input of each block of the backbone")
    sample_rate: float = flag("--sample-rate", default=1.0, metavar="R", above=0, at_most=1, section="flags of main.py",
                              help="part of the classes that each step uses")
    classifier_memory_mib: int | None = flag("--classifier-memory-mib", metavar="MIB", at_least=0,
                                             section="flags of main.py", help="memory for saved probabilities")


def main() -> None:
    options = parse_options()
    visible = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    memory_gib = options.memory_gib or (visible.total_memory / GIB if visible else ASSUMED_MEMORY_GIB)
    memory, matmul_dtype = int(memory_gib * GIB), PRECISIONS[options.precision]
    backbone = measure_backbone(
        lambda: build_backbone(options.arch, options.embedding_size), device_type="cuda", autocast_dtype=matmul_dtype,
        checkpointed=options.checkpoint_activations)

    def predict(classes: int, world_size: int) -> dict[str, int]:
        return predict_memory(backbone, RunSettings(
            classes=classes, world_size=world_size, batch_size=options.batch_size,
            embedding_size=options.embedding_size, sub_centers=options.sub_centers, total_bytes=memory,
            cache_bytes=None,
            model_parallel=options.enable_model_parallel, zero=options.enable_zero_optim,
            optimizer_states=count_states(options.optimizer, momentum=0.9), ema=options.ema,
            fused_update=options.fuse_classifier_update, classifier_memory_mib=options.classifier_memory_mib,
            sample_rate=options.sample_rate, matmul_dtype=matmul_dtype,
        ))

    def fits(classes: int, world_size: int) -> bool:
        return sum(predict(classes, world_size).values()) <= memory

    centers = f" with {options.sub_centers} centers each" if options.sub_centers > 1 else ""
    print(f"{options.arch}, {options.classes:,} classes{centers}, {options.batch_size} images on {options.world_size} "
          f"GPUs of {memory_gib:g} GiB, {options.precision}\n")
    parts = predict(options.classes, options.world_size)
    total, width = sum(parts.values()), max(map(len, parts))
    for name, size in parts.items():
        if size:
            print(f"{name:<{width}}  {size / MIB:>10,.0f} MiB")
    print(f"{'sum':<{width}}  {total / MIB:>10,.0f} MiB  = {total / memory:.0%} of a GPU: "
          f"{'fits' if total <= memory else 'does not fit'}\n")

    most = largest(lambda classes: fits(classes, options.world_size), options.world_size)
    print(f"most classes that fit on {options.world_size} GPUs: {most:,}" if most else
          f"no number of classes fits on {options.world_size} GPUs; use a smaller batch or --precision bf16")
    counts = [count for count in range(1, options.batch_size // 2 + 1) if options.batch_size % count == 0]
    if (options.fuse_classifier_update or options.sample_rate < 1) and not options.enable_model_parallel:
        counts = [1]
    fewest = next((count for count in counts if fits(options.classes, count)), None)
    print(f"fewest GPUs that {options.classes:,} classes fit on with this batch: {fewest or 'no number is enough'}")


def parse_options(argv: list[str] | None = None) -> Options:
    """Parse and check the flags. Raises UserError."""
    o = parse_flags(
        Options, "plan.py", "Memory of a training run on each GPU, part by part, and how many classes would fit.", argv
    )
    check_arch(o.arch)
    if o.checkpoint_activations and is_timm(o.arch):
        raise UserError(f"--checkpoint-activations with --arch {o.arch}: main.py does not support this; drop one of "
                        "them")
    if o.batch_size % o.world_size:
        raise UserError(f"--batch-size {o.batch_size}: must divide by --processes {o.world_size}")
    if o.fuse_classifier_update and o.precision == "fp16":
        raise UserError("--fuse-classifier-update with --precision fp16: main.py does not support this; use bf16, or "
                        "drop one of them")
    for name, is_set in (("--fuse-classifier-update", o.fuse_classifier_update),
                         (f"--sample-rate {o.sample_rate:g}", o.sample_rate < 1)):
        if is_set and o.world_size > 1 and not o.enable_model_parallel:
            raise UserError(f"{name} with --no-enable-model-parallel: works on one GPU only; drop one of them")
    return o


if __name__ == "__main__":
    exit_on_user_error(main)
