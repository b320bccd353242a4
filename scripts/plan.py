#!/usr/bin/env python3
"""How much memory a training run needs on each GPU, how many classes would fit, and how long a step would take. Needs
no GPU.

    python3 scripts/plan.py --classes 4000000 --processes 8 --batch-size 1024 --precision bf16 --fuse-classifier-update
    python3 scripts/plan.py --classes 10000000 --processes 64 --batch-size 8192 --precision bf16 --device h100
    python3 scripts/plan.py --classes 85744 --batch-size 128 -a mobilefacenet --device cpu --measure

The time of --device is a model's: every operator of the step, counted on fake tensors, takes as long as its arithmetic,
its memory traffic or its launch, at the rates that are printed. No GPU was measured.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

# The script's own directory is on sys.path, the repository's root is not.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

if __name__ == "__main__":
    from utils.packages import require_packages

    require_packages()

import torch

from losses.class_major import WALK, choose_form  # noqa: E402
from models import ANY_TIMM, BACKBONES, build_backbone, check_arch, is_timm  # noqa: E402
from utils.checkpoint.weights import MAX_EMBEDDING_SIZE  # noqa: E402
from utils.errors import UserError, exit_on_user_error  # noqa: E402
from utils.flags import flag, parse_flags  # noqa: E402
from utils.memory import host_bytes, keep_freed_memory  # noqa: E402
from utils.options import EMBEDDING_SIZE  # noqa: E402
from utils.planner import RunSettings, largest, measure_backbone, predict_memory  # noqa: E402
from utils.rates import DEVICES, OTHER, PRODUCT, DataSheet, Rates, Shares, gpu_rates  # noqa: E402
from utils.training.optim import OPTIMIZERS, count_states  # noqa: E402

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

MIB, GIB = 2**20, 2**30
# Of an A100 or H100, if no GPU is visible.
ASSUMED_MEMORY_GIB = 80.0
CPU_TURNS = 7
CPU_CACHE = 8 * MIB  # that a chunk of classes may fill

LEFT_OUT = ("Left out: loading of data, augmentation, metrics, the scaler of fp16, the average of --ema, copies of "
            "DDP, waits of the host, what other losses than ArcFace add (CurricularFace: a pass over the classes).")


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
                                    default_text=f"that of --device or the visible GPU, else {ASSUMED_MEMORY_GIB:g}")
    device: str | None = flag("--device", choices=(*DEVICES, "cpu"), section="time of a step",
                              help="predict the time on this GPU, or in one process of this CPU, which is measured")
    images: int | None = flag("--images", metavar="M", at_least=1, section="time of a step",
                              help="images of the training set, for the time of an epoch")
    measure: bool = flag("--measure", default=False, section="time of a step",
                         help="--device cpu: also time backbone and classifier, beside the prediction")
    gpus_per_node: int = flag("--gpus-per-node", default=8, metavar="G", at_least=1, section="time of a step",
                              help="GPUs that NVLink connects")
    tflops: float | None = flag("--tflops", metavar="TFLOPS", above=0, section="time of a step",
                                default_text="data sheet x share",
                                help="achieved by products in this precision; convolutions in proportion")
    bandwidth: float | None = flag("--bandwidth", metavar="GB/S", above=0, section="time of a step",
                                   default_text="data sheet x share", help="achieved by the GPU's memory")
    launch_us: float | None = flag("--launch-us", metavar="US", at_least=0, section="time of a step",
                                   default_text=f"{Shares().launch_us:g}", help="microseconds from kernel to kernel")
    nvlink: float | None = flag("--nvlink", metavar="GB/S", above=0, section="time of a step",
                                default_text="data sheet x share", help="achieved within a node, in one direction")
    network: float | None = flag("--network", metavar="GB/S", above=0, section="time of a step",
                                 default_text="data sheet x share", help="achieved by each GPU to other nodes")
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
    sheet = DEVICES.get(options.device or "")
    on_cpu = options.device == "cpu"
    device_type = "cpu" if on_cpu else "cuda"
    memory_gib = options.memory_gib or (
        sheet.memory_gib if sheet else host_bytes() / GIB if on_cpu else visible.total_memory / GIB if visible
        else ASSUMED_MEMORY_GIB)
    memory, matmul_dtype = int(memory_gib * GIB), PRECISIONS[options.precision]
    backbone = measure_backbone(
        lambda: build_backbone(options.arch, options.embedding_size), device_type=device_type,
        autocast_dtype=matmul_dtype, checkpointed=options.checkpoint_activations)

    def settings(classes: int, world_size: int) -> RunSettings:
        return RunSettings(
            classes=classes, world_size=world_size, batch_size=options.batch_size,
            embedding_size=options.embedding_size, sub_centers=options.sub_centers, total_bytes=memory,
            cache_bytes=CPU_CACHE if on_cpu else None, device_type=device_type,
            class_major=choose_form("fused", device_type) != WALK,
            model_parallel=options.enable_model_parallel, zero=options.enable_zero_optim,
            optimizer_states=count_states(options.optimizer, momentum=0.9), ema=options.ema,
            fused_update=options.fuse_classifier_update, classifier_memory_mib=options.classifier_memory_mib,
            sample_rate=options.sample_rate, matmul_dtype=matmul_dtype,
        )

    def predict(classes: int, world_size: int) -> dict[str, int]:
        return predict_memory(backbone, settings(classes, world_size))

    def fits(classes: int, world_size: int) -> bool:
        return sum(predict(classes, world_size).values()) <= memory

    place = "in one process" if on_cpu else f"on {options.world_size} GPUs"
    centers = f" with {options.sub_centers} centers each" if options.sub_centers > 1 else ""
    print(f"{options.arch}, {options.classes:,} classes{centers}, {options.batch_size} images {place} of "
          f"{memory_gib:.4g} GiB, {options.precision}\n")
    parts = predict(options.classes, options.world_size)
    total, width = sum(parts.values()), max(map(len, parts))
    for name, size in parts.items():
        if size:
            print(f"{name:<{width}}  {size / MIB:>10,.0f} MiB")
    print(f"{'sum':<{width}}  {total / MIB:>10,.0f} MiB  = {total / memory:.0%} of "
          f"{'the memory' if on_cpu else 'a GPU'}: {'fits' if total <= memory else 'does not fit'}\n")

    most = largest(lambda classes: fits(classes, options.world_size), options.world_size)
    print(f"most classes that fit {place}: {most:,}" if most else
          f"no number of classes fits {place}; use a smaller batch or --precision bf16")
    if not on_cpu:
        counts = [count for count in range(1, options.batch_size // 2 + 1) if options.batch_size % count == 0]
        if (options.fuse_classifier_update or options.sample_rate < 1) and not options.enable_model_parallel:
            counts = [1]
        fewest = next((count for count in counts if fits(options.classes, count)), None)
        print(f"fewest GPUs that {options.classes:,} classes fit on with this batch: "
              f"{fewest or 'no number is enough'}")
    if options.device is not None:
        print_time(options, settings(options.classes, options.world_size), sheet)


def print_time(options: Options, run: RunSettings, sheet: DataSheet | None) -> None:
    """Print the predicted time of a step, part by part, and its assumptions. sheet: None for this CPU."""
    from utils.step_time import count_backbone, predict_step  # Importing it takes seconds.

    images = options.batch_size // options.world_size
    backbone = count_backbone(
        lambda: build_backbone(options.arch, options.embedding_size), images, device_type=run.device_type,
        autocast_dtype=run.matmul_dtype, checkpointed=options.checkpoint_activations, optimizer=options.optimizer,
        shares=options.world_size if options.enable_zero_optim else 1)
    measured: dict[str, float] = {}
    if sheet is None:
        from scripts import cpu_rates

        keep_freed_memory()
        steps = {}
        if options.measure:
            steps = {"backbone": cpu_rates.backbone_step(build_backbone(options.arch, options.embedding_size), images),
                     "classifier": cpu_rates.classifier_step(run)}
        rates, measured = cpu_rates.measure_rates(images, options.batch_size, options.embedding_size, CPU_TURNS, steps)
    else:
        rates = with_flags(gpu_rates(sheet, Shares(), options.gpus_per_node), options)
    parts = predict_step(backbone, run, rates, options.optimizer)
    step = sum(part.seconds for part in parts)
    width = max(len(part.name) for part in parts)
    print(f"\ntime of a step on {sheet.name if sheet else 'this CPU, in one process'}, predicted")
    for name, seconds, bound in parts:
        print(f"{name:<{width}}  {seconds * 1e3:>10,.2f} ms  {seconds / step:>4.0%}  {bound}")
    speed = options.batch_size / step
    print(f"{'sum':<{width}}  {step * 1e3:>10,.2f} ms  = {speed / options.world_size:,.0f} images/s per "
          f"{'GPU' if sheet else 'process'}, {speed:,.0f} in total")
    if options.images is not None:
        print(f"{'epoch':<{width}}  {options.images / options.batch_size * step / 3600:>10,.2f} h   of "
              f"{options.images:,} images")
    predicted = {"backbone": parts[0].seconds + parts[1].seconds, "classifier": parts[2].seconds}
    for name, seconds in measured.items():
        print(f"{name}: measured {seconds * 1e3:,.1f} ms, predicted {predicted[name] * 1e3:,.1f} ms "
              f"({predicted[name] / seconds - 1:+.0%})")
    print("\n" + "\n".join(assumptions(rates, options, sheet)))


def with_flags(rates: Rates, options: Options) -> Rates:
    """The rates with those that the flags give."""
    given: dict[str, Any] = {name: value * unit for name, value, unit in (
        ("launch", options.launch_us, 1e-6), ("node_bandwidth", options.nvlink, 1e9),
        ("network_bandwidth", options.network, 1e9)) if value is not None}
    if options.bandwidth is not None:
        given["bandwidth"] = {OTHER: options.bandwidth * 1e9}
    if options.tflops is not None:
        name = "flops" if PRECISIONS[options.precision] is None else "low_flops"
        old = getattr(rates, name)
        factor = options.tflops * 1e12 / old[PRODUCT]
        given[name] = {kind: rate * factor for kind, rate in old.items()}
    return replace(rates, **given)


def assumptions(rates: Rates, options: Options, sheet: DataSheet | None) -> Sequence[str]:
    """Lines that say what the prediction rests on."""
    flops = rates.flops if PRECISIONS[options.precision] is None else rates.low_flops
    shown = ", ".join(f"{kind} {rate / (1e9 if sheet is None else 1e12):,.1f}" for kind, rate in flops.items())
    moved = ", ".join(f"{kind} {rate / 1e9:,.1f}" for kind, rate in rates.bandwidth.items())
    if sheet is None:
        return (f"Measured in this run: GFLOP/s: {shown}; GB/s: {moved}, in the cache "
                f"{rates.cached_bandwidth / 1e9:,.1f}; a small operator {rates.launch * 1e6:.1f} us; "
                f"{torch.get_num_threads()} threads.", LEFT_OUT)
    kind = "TF32" if PRECISIONS[options.precision] is None else options.precision
    return (
        f"Assumed, from NVIDIA's data sheet times the share that is achieved (no GPU was measured): {kind} TFLOP/s: "
        f"{shown};",
        f"memory {rates.bandwidth[OTHER] / 1e9:,.0f} GB/s; a launch {rates.launch * 1e6:g} us; nodes of {rates.node}: "
        f"NVLink {rates.node_bandwidth / 1e9:,.0f} GB/s a GPU,",
        f"network {rates.network_bandwidth / 1e9:,.0f} GB/s a GPU; {rates.node_latency * 1e6:g} and "
        f"{rates.network_latency * 1e6:g} us for each stage of a collective within and between nodes.",
        "Classifier by Triton's kernels, whose products achieve what the others do."
        if choose_form("fused", "cuda") == "triton" else
        "Classifier by PyTorch's operators, because this machine lacks what Triton needs; its kernels would take less.",
        LEFT_OUT)


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
    if o.device == "cpu" and (o.world_size > 1 or o.precision != "fp32"):
        raise UserError("--device cpu with --processes or --precision: the time on the CPU is that of one process in "
                        "float32; drop them")
    if o.measure and (o.device != "cpu" or o.sample_rate < 1 or o.fuse_classifier_update or o.checkpoint_activations):
        raise UserError("--measure: times the plain step on the CPU; give --device cpu, and drop --sample-rate, "
                        "--fuse-classifier-update and --checkpoint-activations")
    rates = {"--tflops": o.tflops, "--bandwidth": o.bandwidth, "--launch-us": o.launch_us, "--nvlink": o.nvlink,
             "--network": o.network}
    if given := [name for name, value in rates.items() if value is not None]:
        if o.device in (None, "cpu"):
            raise UserError(f"{given[0]}: describes a GPU; give --device {'|'.join(DEVICES)}, or drop it")
    if o.images is not None and o.device is None:
        raise UserError("--images without --device: is for the time of an epoch; give --device, or drop it")
    return o


if __name__ == "__main__":
    exit_on_user_error(main)
