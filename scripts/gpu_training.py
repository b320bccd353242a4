"""Questions about whole training steps and runs, for gpu_questions.py. Their steps are those of main.py."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile
from torch.utils._python_dispatch import TorchDispatchMode

import models.classifier
from data.formats import open_training_set
from data.loader import GlobalBatchSampler, build_train_loader
from models import BACKBONES, build_backbone
from models.channels_last import store_channels_last
from scripts import bench_step, measure
from scripts.gpu_questions import MIB, ROOT, Check
from scripts.synthesize import write_identity_set, write_pairs
from utils.checkpoint.writer import CheckpointWriter
from utils.dist.collectives import all_gather_json, all_gather_rows
from utils.dist.context import DistContext, set_matmul
from utils.dist.sharding import ClassShard
from utils.launch.spawn import launch
from utils.options import EMBEDDING_SIZE, parse_options
from utils.planner import RunSettings, measure_backbone, predict_memory
from utils.planner import largest as largest_number

SHARDED = ["--enable-model-parallel"]
BF16 = [*SHARDED, "--enable-amp-mode", "--amp-dtype", "bf16"]
FP16 = [*SHARDED, "--enable-amp-mode", "--amp-dtype", "fp16"]
MODES: dict[str, list[str]] = {
    "base": [],
    "sharded": SHARDED,
    "fused update, eager": [*SHARDED, "--fuse-classifier-update", "--classifier", "eager"],
    "fused update, triton": [*SHARDED, "--fuse-classifier-update", "--classifier", "triton"],
    "recomputed, triton": [*BF16, "--classifier-memory-mib", "0", "--classifier", "triton"],
    "bf16, channels-last": [*BF16, "--channels-last"],
    "bf16, fused update, skip": [*BF16, "--fuse-classifier-update", "--on-nonfinite", "skip"],
    "fp16": FP16,
    "sampling": [*BF16, "--sample-rate", "0.1"],
    "sampling, fused update": [*BF16, "--sample-rate", "0.1", "--fuse-classifier-update"],
    "accumulation": [*BF16, "--accumulation-steps", "2"],
    "ZeRO": [*FP16, "--enable-zero-optim", "--on-nonfinite", "skip"],
    "sync-bn": [*BF16, "--sync-bn"],
    "clip, EMA, strong": [*BF16, "--clip-grad-norm", "1", "--ema", "0.99", "--augment", "strong"],
    "AdamW, fused update": [*BF16, "--optimizer", "adamw", "--fuse-classifier-update"],
    "curricularface": [*BF16, "--loss", "curricularface"],
    "mv-softmax, filter": [*BF16, "--loss", "mv-softmax", "--inter-class-filter", "0.4"],
    "adaface": [*BF16, "--loss", "adaface"],
    "sub-centers": [*BF16, "--sub-centers", "3"],
    "checkpointed": [*BF16, "--checkpoint-activations"],
}
# name -> flags of a run of `memory`, and whether it has as many classes as the acceptance figure of the classifier
MEMORY_RUNS: dict[str, tuple[list[str], bool]] = {
    "step, bf16": (BF16, False),
    "step, float32": (SHARDED, False),
    "many classes, bf16": (BF16, True),
    "many classes, bf16, fused update": ([*BF16, "--fuse-classifier-update", "--classifier-memory-mib", "0"], True),
}
# name -> flags of bench_step.py, and what divides the number of images
STEP_RUNS: dict[str, tuple[list[str], int]] = {
    "bf16": (["--precision", "bf16", "--channels-last"], 1),
    "bf16, fewer images": (["--precision", "bf16", "--channels-last"], 4),
    "float32": (["--precision", "fp32"], 2),
}
LARGEST = [*BF16, "--channels-last", "--fuse-classifier-update", "--classifier-memory-mib", "0"]


class TinyBackbone(nn.Module):
    """Images (n, 3, 112, 112) -> (n, d), in a dry run."""

    def __init__(self, embedding_size: int) -> None:
        super().__init__()
        self.embedding_size = embedding_size
        self.conv, self.bn, self.prelu = nn.Conv2d(3, 6, 3, stride=4, bias=False), nn.BatchNorm2d(6), nn.PReLU(6)
        self.fc, self.features = nn.Linear(6 * 7 * 7, embedding_size), nn.BatchNorm1d(embedding_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.features(self.fc(F.avg_pool2d(self.prelu(self.bn(self.conv(images))), 4).flatten(1)))


def prepare(check: Check) -> None:
    """Settings of each process that trains."""
    torch.backends.cudnn.benchmark = True
    if check.dry_run:
        BACKBONES[check.sizes.arch] = TinyBackbone


def in_group(check: Check, work: Callable[..., Any], *args: Any, processes: int = 1, matmul: str = "tf32") -> None:
    """Run `work(context, check, *args)` in a process group of so many processes, as main.py would."""
    on_gpu = check.device.type == "cuda"
    flags = measure.StepFlags(classes=2, batch=processes, world_size=processes, device=check.device.type,
                              matmul=matmul if on_gpu else None)
    launch(_prepared, flags.plan(), check, work, *args)


def _prepared(context: DistContext, check: Check, work: Callable[..., Any], *args: Any) -> None:
    prepare(check)
    check.device = context.device
    work(context, check, *args)


def build(
    context: DistContext, check: Check, flags: Sequence[str], classes: int, batch: int
) -> bench_step.OurTraining:
    """Model, optimizers and loop of main.py, and a batch in pinned memory that is always the same."""
    several = ["--multiprocessing-distributed", "--nproc-per-node", str(context.world_size)]
    options = parse_options([
        "images that are drawn", "-a", check.sizes.arch, "--num-classes", str(classes), "-b", str(batch), "--no-save",
        "--seed", "0", "--lr", "0.01", "--device", context.device.type, *(several if context.world_size > 1 else []),
        *(["--augment", "none"] if "--augment" not in flags else []), *on_this_device(check, flags)])
    generator = torch.Generator().manual_seed(0)
    n = batch // context.world_size // options.accumulation_steps
    images = torch.randint(256, (n * context.world_size, 3, 112, 112), dtype=torch.uint8, generator=generator)
    labels = torch.randint(classes, (n * context.world_size,), generator=generator)
    mine = slice(context.rank * n, (context.rank + 1) * n)
    images, labels = images[mine].clone(), labels[mine].clone()
    if context.device.type == "cuda":
        images, labels = images.pin_memory(), labels.pin_memory()
    return bench_step.OurTraining(context, options, images, labels)


def on_this_device(check: Check, flags: Sequence[str]) -> list[str]:
    """The flags, without Triton where it cannot be."""
    return ["eager" if flag == "triton" and check.device.type == "cpu" else flag for flag in flags]


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def modes(check: Check) -> None:
    in_group(check, check_modes)


def check_modes(context: DistContext, check: Check) -> None:
    """Two steps of each mode in which the host may not wait for the GPU; then fp16 that overflows, and a NaN."""
    for name, flags in MODES.items():
        try:
            check_mode(context, check, name, flags)
        except Exception as error:
            ours = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(ROOT)]
            check.add(name, ok=False, error=f"{type(error).__name__}: {error}"[:500],
                      at=f"{os.path.relpath(ours[-1].filename, ROOT)}:{ours[-1].lineno}" if ours else None)
        measure.release_memory(context.device)
    check_overflow(context, check)
    check_nan(context, check, "a NaN", [*BF16, "--on-nonfinite", "skip"])
    check_nan(context, check, "a NaN, fused update", [*BF16, "--on-nonfinite", "skip", "--fuse-classifier-update"])


def check_mode(context: DistContext, check: Check, name: str, flags: Sequence[str]) -> None:
    way = build(context, check, flags, check.sizes.step_classes, check.sizes.images[-1])
    before = way.state.classifier.weight.detach().clone()
    if way.state.scaler.is_enabled():  # the first steps with its own scale overflow
        set_scale(way, 2.0**8)
    way.run(2)  # creates what is created once
    wait_for(context.device)
    with waits_are_errors(context.device):
        way.run(2)
    losses = torch.stack(way.losses).tolist()
    moved = not torch.equal(before, way.state.classifier.weight.detach())
    check.add(name, ok=moved and bool(np.isfinite(losses).all()), losses=losses, moved=moved)


def check_overflow(context: DistContext, check: Check) -> None:
    """A step of fp16 whose gradients overflow is skipped, and halves the scale."""
    way = build(context, check, FP16, check.sizes.step_classes, check.sizes.images[-1])
    way.run(1)
    scale = 2.0**40
    set_scale(way, scale)
    kept = weights_stay(way, lambda: way.run(1))
    after = way.state.scaler.state_dict()["scale"]
    check.add("fp16 that overflows", ok=kept and after < scale, weights_kept=kept, scale_before=scale,
              scale_after=after)


def check_nan(context: DistContext, check: Check, name: str, flags: Sequence[str]) -> None:
    """A step with NaN is skipped, and the next one is not."""
    way = build(context, check, flags, check.sizes.step_classes, check.sizes.images[-1])
    way.run(1)
    hook = way.state.backbone.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    kept = weights_stay(way, lambda: way.run(1))
    hook.remove()
    way.run(1)
    lost, following = (loss.item() for loss in way.losses[-2:])
    check.add(name, ok=kept and not np.isfinite(lost) and bool(np.isfinite(following)), weights_kept=kept,
              loss=str(lost), next_loss=following)


def weights_stay(way: bench_step.OurTraining, work: Callable[[], object]) -> bool:
    """Whether `work` leaves centers and backbone as they are."""
    weights = [way.state.classifier.weight, *way.state.backbone.parameters()]
    before = [weight.detach().clone() for weight in weights]
    work()
    return all(torch.equal(old, new) for old, new in zip(before, weights))


def set_scale(way: bench_step.OurTraining, scale: float) -> None:
    """Of the fp16 scaler."""
    way.state.scaler.load_state_dict({**way.state.scaler.state_dict(), "scale": scale})


@contextlib.contextmanager
def waits_are_errors(device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step(check: Check) -> None:
    """The whole step beside the published script's, in one run of bench_step.py each."""
    compare_steps(check, STEP_RUNS)


def compile(check: Check) -> None:
    """The same with torch.compile."""
    compare_steps(check, {"bf16, compiled": (["--precision", "bf16", "--channels-last", "--compile"], 1)})


def compare_steps(check: Check, runs: dict[str, tuple[list[str], int]]) -> None:
    prepare(check)
    sizes = check.sizes
    with tempfile.TemporaryDirectory() as scratch:
        for name, (flags, divisor) in runs.items():
            path = os.path.join(scratch, f"{len(os.listdir(scratch))}.csv")
            batch = max(2, sizes.step_images // divisor)
            options, training_options = bench_step.parse_options([
                "-a", sizes.arch, "--classes", str(sizes.step_classes), "--batch", str(batch), "--steps",
                str(sizes.steps), "--block", str(min(4, sizes.steps)), "--device", check.device.type, "--csv", path,
                *flags])
            started = time.perf_counter()
            launch(bench_step.run, options.plan(), options, training_options)
            with open(path, encoding="utf-8", newline="") as file:
                rows = {row["impl"]: row for row in csv.DictReader(file)}
            for way, row in rows.items():
                rate = float(row["p50_images_s"])
                check.add(f"{name}, {way}", run=name, way=way, classes=sizes.step_classes, images=batch,
                          images_per_second=rate, seconds=batch / rate, peak_mib=float(row["peak_mib"]),
                          first_loss=float(row["first_loss"]),
                          speedup=float(row["speedup_to_published"]) if row["speedup_to_published"] else None,
                          whole_run_seconds=time.perf_counter() - started)
            if len(rows) < 2:
                check.add(f"{name}, one way", left_out="the other way is out of memory")


def memory(check: Check) -> None:
    in_group(check, check_memory)


def check_memory(context: DistContext, check: Check) -> None:
    """The peak of training steps: what PyTorch allocated and reserved, and what is used as the driver says."""
    for name, (flags, many) in MEMORY_RUNS.items():
        classes = check.sizes.classes[0] if many else check.sizes.step_classes
        try:
            measure_memory(context, check, name, flags, classes)
        except torch.OutOfMemoryError:
            check.add(name, left_out="out of memory", classes=classes)
        measure.release_memory(context.device)


def measure_memory(context: DistContext, check: Check, name: str, flags: Sequence[str], classes: int) -> None:
    images, device = check.sizes.step_images, context.device
    held = measure.restart_peak(device)
    way = build(context, check, flags, classes, images)
    way.run(2)
    first: dict[str, float] = {}
    if device.type == "cuda":  # cuDNN tries algorithms first, some of which take much memory
        first = {"first_steps_mib": torch.cuda.max_memory_allocated(device) / MIB}
        torch.cuda.reset_peak_memory_stats(device)
    way.run(1)
    wait_for(device)
    check.add(name, classes=classes, images=images, **first, **peaks(device, held))


def peaks(device: torch.device, held: float = 0.0) -> dict[str, Any]:
    """held: MiB of a process on the CPU at the start."""
    if device.type == "cpu":
        return {"allocated_mib": measure.peak_mib(device, held)}
    unused, total = torch.cuda.mem_get_info(device)
    return {"allocated_mib": torch.cuda.max_memory_allocated(device) / MIB,
            "reserved_mib": torch.cuda.max_memory_reserved(device) / MIB, "driver_mib": (total - unused) / MIB,
            "total_mib": total / MIB}


def largest_settings(check: Check, total_bytes: int, classes: int) -> RunSettings:
    """Of the run with the flags LARGEST."""
    return RunSettings(classes=classes, batch_size=check.sizes.largest_images, world_size=1, total_bytes=total_bytes,
                       cache_bytes=None, fused_update=True, classifier_memory_mib=0, matmul_dtype=torch.bfloat16)


def planned_classes(check: Check, total_bytes: int) -> int:
    """The most classes that the planner says fit."""
    backbone = measure_backbone(lambda: build_backbone(check.sizes.arch, EMBEDDING_SIZE), device_type="cuda",
                                autocast_dtype=torch.bfloat16)
    return largest_number(lambda classes: sum(predict_memory(
        backbone, largest_settings(check, total_bytes, classes)).values()) <= total_bytes, 1)


def largest(check: Check) -> None:
    prepare(check)
    total = 3 * 2**30 if check.dry_run else torch.cuda.get_device_properties(0).total_memory
    planned = planned_classes(check, total)
    check.add("planner", classes=planned, total_mib=total / MIB)
    tries = [int(planned * share) for share in (1.0, 0.97, 0.93, 0.85, 0.7)]
    if check.dry_run:
        tries = [check.sizes.wanted_classes]
    elif total >= check.sizes.wanted_gib * 2**30:
        tries = sorted({*tries, check.sizes.wanted_classes}, reverse=True)
    in_group(check, check_largest, tries, planned)


def check_largest(context: DistContext, check: Check, tries: list[int], planned: int) -> None:
    """Two steps with as many classes as possible. The first number of `tries` that trains ends it."""
    for classes in tries:
        try:
            train_largest(context, check, classes, planned)
            return
        except torch.OutOfMemoryError as error:
            check.add(f"{classes} classes", classes=classes, left_out="out of memory",
                      error=str(error).splitlines()[0][:300])
        measure.release_memory(context.device)
    check.add("trained", ok=False, classes=0, planned=planned)


def train_largest(context: DistContext, check: Check, classes: int, planned: int) -> None:
    started, held = time.perf_counter(), measure.restart_peak(context.device)
    # From the CPU, as a run draws them, they would take minutes.
    with mock.patch.object(models.classifier, "initial_centers", centers_on_device):
        way = build(context, check, LARGEST, classes, check.sizes.largest_images)
    way.run(1)
    wait_for(context.device)
    built = time.perf_counter()
    way.run(1)
    losses = torch.stack(way.losses).tolist()  # waits
    check.add("trained", ok=bool(np.isfinite(losses).all()), classes=classes, planned=planned, losses=losses,
              step_seconds=time.perf_counter() - built, start_seconds=built - started, **peaks(context.device, held))


def centers_on_device(shard: ClassShard, embedding_size: int, seed: int, device: Any = "cpu",
                      dtype: torch.dtype = torch.float32, sub_centers: int = 1) -> Tensor:
    """In place of models.classifier.initial_centers: other numbers, of about the same lengths."""
    return torch.empty(shard.size * sub_centers, embedding_size, device=device, dtype=dtype).normal_(
        std=embedding_size**-0.5)


# ---------------------------------------------------------------------------------------------------------------------
# The profiler, the backbone


def profile(check: Check) -> None:
    with tempfile.TemporaryDirectory() as faces:
        write_faces(faces, check, pairs=False)  # by processes that are forked: before there is a process group
        in_group(check, check_profile, faces)


def check_profile(context: DistContext, check: Check, faces: str) -> None:
    """How busy the GPU is, with which kernels, and how long the loop waits for images."""
    for classes in sorted(check.sizes.classes[:2]):
        profile_steps(context, check, classes)
        measure.release_memory(context.device)
    check_loading(context, check, faces)


def profile_steps(context: DistContext, check: Check, classes: int) -> None:
    images, steps = check.sizes.step_images, min(3, check.sizes.steps)
    way = build(context, check, [*BF16, "--channels-last"], classes, images)
    way.run(3)
    on_gpu = context.device.type == "cuda"
    wait_for(context.device)
    with torch_profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        start = time.perf_counter()
        way.run(steps)
        issued = time.perf_counter() - start
        wait_for(context.device)
        wall = time.perf_counter() - start
    check.add(f"{classes} classes", classes=classes, images=images, step_seconds=wall / steps,
              issued_seconds=issued / steps, **kernel_times(found, steps, wall, on_gpu))


def kernel_times(found: Any, steps: int, wall: float, on_gpu: bool) -> dict[str, Any]:
    """From the profiler's trace: launches of a step, the share of the time with a kernel, the kernels that take most.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = os.path.join(scratch, "trace.json")
        found.export_chrome_trace(path)
        with open(path, encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if on_gpu else ("cpu_op",)
    kernels = [(event["ts"], event["ts"] + event["dur"], event["name"]) for event in events
               if event.get("cat") in kinds and "dur" in event]
    busy, end = 0.0, float("-inf")
    by_name: dict[str, float] = {}
    for first, last, name in sorted(kernels):
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
        by_name[name] = by_name.get(name, 0.0) + last - first
    top = sorted(by_name.items(), key=lambda item: -item[1])[:12]
    return {"launches": len(kernels) / steps, "busy": busy * 1e-6 / wall,
            "top": [[name[:90], microseconds / steps / 1e3] for name, microseconds in top]}


def check_loading(context: DistContext, check: Check, faces: str) -> None:
    """An epoch of main.py's loader and steps: how much of the time the loop waits for a batch."""
    dataset = open_training_set(faces, index="none", skip_bad=False, progress=False)
    images = min(check.sizes.step_images, len(dataset))
    sampler = GlobalBatchSampler(len(dataset), images, 1, 0, 1, seed=0)
    loader = build_train_loader(dataset, sampler, workers=0 if check.dry_run else 8,
                                pin_memory=context.device.type == "cuda")
    way = build(context, check, [*BF16, "--channels-last"], check.sizes.step_classes, images)
    waited = 0.0

    def batches() -> Iterator[Any]:
        nonlocal waited
        iterator = iter(loader)
        while True:
            start = time.perf_counter()
            batch = next(iterator, None)
            waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    for epoch in range(2):  # the first one starts the workers
        sampler.set_position(epoch, 0)
        waited = 0.0
        wait_for(context.device)
        start = time.perf_counter()
        way.run_batches(batches(), sampler.steps_per_epoch)
        wait_for(context.device)
        wall = time.perf_counter() - start
    check.add("loading", images=images, steps=sampler.steps_per_epoch, waiting=waited / wall,
              images_per_second=images * sampler.steps_per_epoch / wall)


def write_faces(directory: str, check: Check, pairs: bool) -> None:
    sizes = check.sizes
    write_identity_set(Path(directory, "train"), range(sizes.face_identities), images=sizes.faces, seed=0)
    if pairs:
        write_pairs(Path(directory, "lfw"), 20, range(sizes.face_identities, sizes.face_identities + 8), images=4,
                    seed=0)


def backbone(check: Check) -> None:
    """Forward and backward pass of the backbone alone."""
    prepare(check)
    sizes, device = check.sizes, check.device
    for channels_last in (True, False):
        network = build_backbone(sizes.arch, EMBEDDING_SIZE).train()
        if channels_last:
            store_channels_last(network)
        network.to(device)
        for precision, images in itertools.product(("bf16", "tf32", "float32"), sizes.images):
            if precision == "float32" and (images, channels_last) != (sizes.images[0], True):  # slow, shows no more
                continue
            set_matmul(None if device.type == "cpu" else "ieee" if precision == "float32" else "tf32")
            layout = "NHWC" if channels_last else "NCHW"
            case, values = f"{images} {precision} {layout}", dict(images=images, precision=precision, layout=layout)
            try:
                batch = torch.rand(images, 3, 112, 112, device=device)
                if channels_last:
                    batch = batch.contiguous(memory_format=torch.channels_last)
                held = measure.restart_peak(device)
                seconds = check.seconds(partial(forward_and_backward, network, batch, precision == "bf16"),
                                        min(3, sizes.repeats))
                check.add(case, seconds=seconds, images_per_second=images / seconds,
                          peak_mib=measure.peak_mib(device, held), **values)
            except torch.OutOfMemoryError:
                check.add(case, left_out="out of memory", **values)
            network.zero_grad(set_to_none=True)
            measure.release_memory(device)
        del network


def forward_and_backward(network: nn.Module, batch: Tensor, low: bool) -> None:
    network.zero_grad(set_to_none=True)
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=low):
        embedding = network(batch).float()
    embedding.backward(torch.ones_like(embedding))


# ---------------------------------------------------------------------------------------------------------------------
# Saving and resuming


def save(check: Check) -> None:
    in_group(check, check_save)


def check_save(context: DistContext, check: Check) -> None:
    """How fast centers come to the host, and how long a save blocks training."""
    way = build(context, check, BF16, check.sizes.saved_classes, check.sizes.images[-1])
    way.run(1)
    weight = way.state.classifier.weight.detach()
    check.add("pageable", gbs=weight.nbytes / check.seconds(lambda: weight.to("cpu", copy=True), 2) / 1e9)
    start = time.perf_counter()
    pinned = torch.empty_like(weight, device="cpu", pin_memory=context.device.type == "cuda")
    pinning = time.perf_counter() - start
    check.add("pinned", gbs=weight.nbytes / check.seconds(lambda: pinned.copy_(weight, non_blocking=True), 2) / 1e9,
              pinning_gbs=weight.nbytes / pinning / 1e9)
    said: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        writer = CheckpointWriter(context, scratch, options={}, say=said.append, keep=1)
        for number in ("first", "second"):
            start = time.perf_counter()
            blocked = writer.save(way.state)
            way.run(1)  # the copies must not change
            writer.wait()
            check.add(f"{number} save", classes=check.sizes.saved_classes, blocked_seconds=blocked,
                      seconds=time.perf_counter() - start, said=said[-1] if said else None,
                      ok=bool(said) and said[-1].startswith("saved"))
        writer.close()


def resume(check: Check) -> None:
    """A run that is killed and resumed, beside one that is not: main.py's own processes."""
    sizes = check.sizes
    with tempfile.TemporaryDirectory() as scratch:
        faces = os.path.join(scratch, "faces")
        write_faces(faces, check, pairs=True)
        command = [
            sys.executable, os.path.join(ROOT, "main.py"), faces, "-a", sizes.resume_arch, "--num-classes", "1000",
            "-b", str(sizes.resume_images), "-j", "2", "--epochs", "999", "--lr-milestones", "none", "--seed", "0",
            "--max-steps", str(sizes.resume_steps), "--save-freq", str(max(1, sizes.resume_steps // 4)), "-p", "1",
            "--device", check.device.type, *SHARDED, "--enable-zero-optim", "--val-pairs",
            os.path.join(faces, "lfw", "pair.list"), "--val-freq", "999999",
            *([] if check.dry_run else ["--enable-amp-mode", "--amp-dtype", "bf16", "--channels-last"])]

        def start(name: str, *flags: str) -> subprocess.Popen[str]:
            log = open(os.path.join(scratch, f"{name}.log"), "a", encoding="utf-8")
            with log:
                return subprocess.Popen([*command, "--output", os.path.join(scratch, name), *flags], cwd=ROOT,
                                        stdout=log, stderr=subprocess.STDOUT, text=True)

        def log_of(name: str) -> str:
            with open(os.path.join(scratch, f"{name}.log"), encoding="utf-8") as file:
                return file.read()

        started = time.perf_counter()
        whole = start("whole").wait()
        seconds = time.perf_counter() - started
        check.add("whole run", ok=whole == 0, status=whole, seconds=seconds, end=log_of("whole")[-600:])
        killed = start("killed")
        while killed.poll() is None and not os.path.exists(os.path.join(scratch, "killed", "checkpoint.pth.tar")):
            time.sleep(0.02)
        killed.send_signal(signal.SIGKILL)
        status = killed.wait()
        resumed = start("killed", "--resume", "auto").wait()
        ok, log = whole == 0 and resumed == 0, log_of("killed")
        values: dict[str, Any] = {}
        if ok:
            losses, evaluations = zip(*(metrics(os.path.join(scratch, name, "metrics.jsonl"))
                                        for name in ("whole", "killed")))
            differences = [abs(one - other) for one, other in zip(*losses)]
            ok = len(losses[0]) == len(losses[1]) == sizes.resume_steps
            values = {"same_losses": losses[0] == losses[1], "largest_difference": max(differences, default=None),
                      "losses": losses[0], "accuracies": [
                          [mean["accuracy"] for each in run for mean in each.values()] for run in evaluations]}
        check.add("killed and resumed", ok=ok, killed=status == -signal.SIGKILL, status=resumed, **values,
                  end=log[-1000:])


def metrics(path: str) -> tuple[list[float], list[Any]]:
    """Losses and evaluations."""
    with open(path, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return [line["loss"] for line in lines if "loss" in line], [line["val"] for line in lines if "val" in line]


# ---------------------------------------------------------------------------------------------------------------------
# Two GPUs

# Losses of these do not depend on the number of processes: BatchNorm's statistics are those of all images.
TWO_MODES: dict[str, list[str]] = {
    "sharded, sync-bn": [*SHARDED, "--sync-bn"],
    "base, sync-bn": ["--sync-bn"],
    "ZeRO, sync-bn": [*SHARDED, "--sync-bn", "--enable-zero-optim"],
    "fused update, sync-bn": [*SHARDED, "--sync-bn", "--fuse-classifier-update"],
    "sampling, sync-bn": [*SHARDED, "--sync-bn", "--sample-rate", "0.5"],
}


def two(check: Check) -> None:
    """Two processes against one: losses; the same collectives in the same order; and how fast they are."""
    with tempfile.TemporaryDirectory() as scratch:
        paths = [os.path.join(scratch, f"{processes}.json") for processes in (1, 2)]
        in_group(check, keep_losses, paths[0], matmul="ieee")
        in_group(check, keep_losses, paths[1], processes=2, matmul="ieee")
        one, both = (json.loads(open(path, encoding="utf-8").read()) for path in paths)
        for name in TWO_MODES:
            expected, got = np.array(one[name]), np.array(both[name])
            difference = float(np.max(np.abs(got - expected)) / np.max(np.abs(expected)))
            check.add(name, ok=difference <= 1e-3, difference=difference, one=one[name], two=both[name])


def keep_losses(context: DistContext, check: Check, path: str) -> None:
    losses = {}
    for name, flags in TWO_MODES.items():
        losses[name] = some_losses(context, check, flags)
        measure.release_memory(context.device)
    if context.is_main:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(losses, file)
    if context.world_size > 1:
        check_collectives(context, check)


def some_losses(context: DistContext, check: Check, flags: Sequence[str]) -> list[float]:
    way = build(context, check, flags, check.sizes.step_classes, check.sizes.images[0])
    way.run(4)
    return [mean_of_ranks(loss).item() for loss in way.losses]


def mean_of_ranks(loss: Tensor) -> Tensor:
    total = loss.detach().double()
    dist.all_reduce(total)
    return total / dist.get_world_size()


class Order(TorchDispatchMode):
    """Within it, the collectives of this process are noted: their names, and how many values they are given first."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            first = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.calls.append((func.overloadpacket.__name__, sum(
                tensor.numel() for tensor in first if isinstance(tensor, Tensor))))
        return func(*args, **(kwargs or {}))


def check_order(context: DistContext, check: Check, name: str, flags: Sequence[str]) -> None:
    """Whether all ranks call the same collectives in the same order."""
    way = build(context, check, flags, check.sizes.step_classes, check.sizes.images[0])
    with Order() as order:
        way.run(2)
    wait_for(context.device)
    found = all_gather_json(order.calls, context.device)
    if context.is_main:
        check.add(f"order of collectives: {name}", ok=all(calls == found[0] for calls in found) and bool(order.calls),
                  collectives=len(order.calls))


def check_collectives(context: DistContext, check: Check) -> None:
    """Their order; and gigabytes a second of a GPU, in one direction, as `Rates.collective` counts them."""
    for name, flags in {**TWO_MODES, "accumulation": [*BF16, "--accumulation-steps", "2"],
                        "fp16, ZeRO, skip": [*FP16, "--enable-zero-optim", "--on-nonfinite", "skip"]}.items():
        check_order(context, check, name, flags)
        measure.release_memory(context.device)
    values = check.sizes.copied // 16
    part = torch.ones(values, device=context.device)
    both = torch.ones(2 * values, device=context.device)
    small = torch.ones(16, device=context.device)
    latency = min(measure.timed(partial(dist.all_reduce, small), context.device) for _ in range(5))
    for name, work, size in (("all-gather", partial(all_gather_rows, part, None), both.nbytes),
                             ("all-reduce", partial(dist.all_reduce, both), 2 * both.nbytes)):
        seconds = min(measure.timed(work, context.device) for _ in range(4))
        if context.is_main:
            check.add(name, gbs=size / 2 / seconds / 1e9, mib=size / MIB, latency_us=latency * 1e6)
