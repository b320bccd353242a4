#!/usr/bin/env python3
"""Images per second and memory of a training step: main.py compared with torchshard's published ArcFace script.

    python3 scripts/bench_step.py -a iresnet50 --classes 85744 --batch 128 --precision bf16 --channels-last

ours: `main.build_training` and `main.train_one_epoch`, always with --enable-model-parallel.
published: the step of that script (projects/arcface of torchshard 0.1), in `PublishedTraining`: float images in NCHW,
fp16 autocast with a GradScaler or none, the margin on all logits, a one-hot matrix that selects the targets, the full
softmax, top-5 over the full logits, and three values read from the device in every step. With several processes its
full head would need all logits on every GPU, so it gets torchshard's parallel cross entropy instead.

Random images are on the device from the start, so reading them is not measured. Both start from the same weights and
take turns, a block of steps each. Peak memory is that of one process, after the first steps.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

# The script's own directory is on sys.path, the repository's root is not.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import main as training  # noqa: E402
from data.loader import TrainBatch  # noqa: E402
from losses.margins import ArcFace  # noqa: E402
from losses.softmax import margin_softmax_torchshard  # noqa: E402
from models import build_backbone, check_arch  # noqa: E402
from models.classifier import MarginClassifier, class_centers, initial_centers  # noqa: E402
from scripts.measure import (
    MIB,
    PeakMemory,
    aligned,
    append_csv,
    available_bytes,
    check_csv,
    choose_device_type,
    choose_implementations,
    describe_machine,
    fits_in_memory,
    launch_local,
    of_slowest_rank,
    percentiles,
    release_memory,
    timed,
)  # noqa: E402
from utils.build import build_training  # noqa: E402
from utils.dist.context import DistContext  # noqa: E402
from utils.dist.sharding import ClassShard, init_model_parallel, let_ddp_ignore_shards  # noqa: E402
from utils.errors import Parser, UserError, exit_on_user_error  # noqa: E402
from utils.flags import flags_of  # noqa: E402
from utils.options import (
    EMBEDDING_SIZE,  # noqa: E402
    check_options,  # noqa: E402
)
from utils.options import Options as TrainingOptions  # noqa: E402
from utils.training.guard import StepGuard, StepLoss  # noqa: E402

IMPLEMENTATIONS = ("ours", "published")
PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
OWN_FLAGS = ("channels_last", "compile", "fuse_classifier_update", "classifier")  # of main.py, for ours alone
SEED = 0
LEARNING_RATE = 0.01
WARM_UP_STEPS = 2  # the first creates momentum and chooses convolutions; then DDP rebuilds its buckets
ENDLESS_EPOCH = 10**9  # steps; no milestone is reached

CSV_COLUMNS = (
    "date", "device", "torch", "threads", "world_size", "arch", "classes", "batch", "precision", "flags", "steps",
    "impl", "p20_images_s", "p50_images_s", "p80_images_s", "peak_mib", "first_loss", "speedup_to_published",
)


@dataclass(frozen=True)
class Options:
    """What the user asked for, one field per flag (see `parse_options` for their meaning)."""

    arch: str
    classes: int
    batch: int
    world_size: int
    precision: str
    flags: tuple[str, ...]  # OWN_FLAGS as given
    impl: tuple[str, ...]
    steps: int
    block: int
    device: str
    json: bool
    csv: str | None


def main() -> None:
    options, training_options = parse_options()
    if options.csv is not None:
        check_csv(options.csv, CSV_COLUMNS)
    launch_local(measure, options.world_size, options.device, options, training_options)


def measure(context: DistContext, options: Options, training_options: TrainingOptions) -> None:
    """Collective. Measure the implementations; rank 0 reports."""
    device = context.device
    warm_up_libraries(options.arch, device)
    images, labels = draw_batch(context, options)
    builders: dict[str, Callable[[], OurTraining | PublishedTraining]] = {
        "ours": lambda: OurTraining(context, training_options, images, labels),
        "published": lambda: PublishedTraining(context, options, images, labels),
    }
    ready: dict[str, OurTraining | PublishedTraining] = {}
    figures: dict[str, dict[str, float | None]] = {}

    def build(name: str) -> None:
        ready[name] = builders[name]()
        ready[name].run(WARM_UP_STEPS)

    # Each runs alone first, so that the peak is its own.
    for name in options.impl:
        if name == "published" and published_will_not_fit(context, options):
            continue
        memory = PeakMemory(device)
        fits = fits_in_memory(partial(build, name), device)
        if fits:
            memory.restart()
            fits = fits_in_memory(partial(ready[name].run, 1), device)
        if fits:
            peak = memory.bytes()
            figures[name] = {"peak_mib": None if peak is None else of_slowest_rank([peak], device)[0] / MIB,
                             "first_loss": ready[name].first_loss()}
        ready.pop(name, None)
        release_memory(device)

    rates: dict[str, list[float]] = {name: [] for name in figures}
    together = fit_together(figures, context)
    for _ in range(-(-options.steps // options.block)):
        for name in figures:
            if name not in ready:
                build(name)
            seconds = of_slowest_rank([timed(partial(ready[name].run, options.block), device)], device)[0]
            rates[name].append(options.batch * options.block / seconds)
            if not together:
                del ready[name]
                release_memory(device)
    if context.is_main:
        impl: dict[str, dict[str, Any]] = {}
        for name in options.impl:
            keys = ("p20_images_s", "p50_images_s", "p80_images_s")
            if name in figures:
                impl[name] = {**dict(zip(keys, percentiles(rates[name]))), **figures[name]}
            else:
                impl[name] = {**dict.fromkeys((*keys, "peak_mib", "first_loss")), "error": "out of memory"}
        report(context, options, impl)


# ---------------------------------------------------------------------------------------------------------------------
# The two ways of training


class OurTraining:
    """Collective. The model, optimizers and loop of main.py, repeatedly on one batch."""

    def __init__(self, context: DistContext, options: TrainingOptions, images: Tensor, labels: Tensor) -> None:
        state, model = build_training(
            context, options, SEED, num_images=options.batch_size, global_batch=options.batch_size
        )
        indices = torch.arange(len(images)) + context.rank * len(images)
        self._batch = TrainBatch(images, labels, indices, 0)
        self._log: Any = _FirstLoss()
        guard = StepGuard(state.backbone, skip=False)
        self._run = training.Run(context, options, state, model, ENDLESS_EPOCH, self._log, guard)

    def run(self, steps: int) -> None:
        batches: Any = [self._batch] * steps
        training.train_one_epoch(self._run, batches, steps)

    def first_loss(self) -> float:
        return self._log.loss.item()


class _FirstLoss:
    """Replaces TrainingLog. It writes nothing and reads nothing from the device."""

    loss: Tensor | None = None

    def add(self, *, loss: Tensor, **others: object) -> list[StepLoss]:
        self.loss = loss if self.loss is None else self.loss
        return []

    def count_replaced(self, images: int) -> None:
        pass


class FullHead(nn.Module):
    """The published classifier of a single process: the margin on every logit, then a one-hot selection.

    forward: embedding (n, d), label (n,) -> loss, and bool (n, 5), whether the k-th best class is the target.
    """

    scale, margin = 64.0, 0.5

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(initial_centers(ClassShard(num_classes, 0, 1), EMBEDDING_SIZE, SEED))

    def forward(self, embedding: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        cosine = F.linear(F.normalize(embedding), F.normalize(self.weight))
        sine = (1.0 - cosine.square()).clamp(0, 1).sqrt()
        phi = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
        phi = torch.where(cosine > 0, phi, cosine)
        one_hot = torch.zeros(cosine.shape, device=cosine.device).scatter_(1, label.unsqueeze(1), 1)
        logits = self.scale * (one_hot * phi + (1.0 - one_hot) * cosine)
        best = cosine.detach().topk(min(5, cosine.shape[1])).indices
        return F.cross_entropy(logits, label), best == label.unsqueeze(1)


class ParallelHead(MarginClassifier):
    """Collective. The same with torchshard's parallel cross entropy and the classes sharded over the processes."""

    def __init__(self, context: DistContext, num_classes: int) -> None:
        shard = ClassShard(num_classes, context.rank, context.world_size)
        group = init_model_parallel(context.world_size)
        super().__init__(class_centers(shard, EMBEDDING_SIZE, SEED, parallel_dim=1), shard, ArcFace(),
                         scale=FullHead.scale, group=group, loss=margin_softmax_torchshard)

    def forward(self, embedding: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        loss, num_closer = super().forward(embedding, label)
        return loss, num_closer.unsqueeze(1) == torch.arange(5, device=num_closer.device)


class PublishedModel(nn.Module):
    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.backbone(images), labels)


class PublishedTraining:
    """Collective. Model and step of the published script, repeatedly on one batch."""

    def __init__(self, context: DistContext, options: Options, images: Tensor, labels: Tensor) -> None:
        device = context.device
        torch.backends.cudnn.benchmark = True
        torch.manual_seed(SEED)
        backbone = build_backbone(options.arch, EMBEDDING_SIZE)
        head = FullHead(options.classes) if context.world_size == 1 else ParallelHead(context, options.classes)
        model: nn.Module = PublishedModel(backbone, head).to(device).train()
        if context.world_size > 1:
            let_ddp_ignore_shards(model)
            model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
        self._model = model
        # Its mixed precision is fp16 on GPUs. It has none on the CPU, so it gets ours there.
        dtype = PRECISIONS[options.precision]
        if dtype is not None and device.type == "cuda":
            dtype = torch.float16
        self._autocast = (contextlib.nullcontext() if dtype is None
                          else torch.autocast(device.type, dtype, cache_enabled=True))
        self._optimizer = SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4)
        self._scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self._images, self._labels = images.float().div_(255), labels
        self._first_loss = float("nan")  # until the first step

    def run(self, steps: int) -> None:
        for _ in range(steps):
            images = (self._images - 0.5) / 0.5
            with self._autocast:
                loss, hits = self._model(images, self._labels)
            for metric in (loss, hits[:, 0].float().mean(), hits.any(dim=1).float().mean()):
                value = metric.item()
                self._first_loss = value if math.isnan(self._first_loss) else self._first_loss
            self._scaler.scale(loss).backward()
            self._scaler.step(self._optimizer)
            self._scaler.update()
            self._optimizer.zero_grad()

    def first_loss(self) -> float:
        return self._first_loss


# ---------------------------------------------------------------------------------------------------------------------
# Around them


def draw_batch(context: DistContext, options: Options) -> tuple[Tensor, Tensor]:
    """This rank's images uint8 (n, 3, 112, 112) and labels int64 (n,), on the device."""
    generator = torch.Generator().manual_seed(context.rank)
    n = options.batch // context.world_size
    images = torch.randint(256, (n, 3, 112, 112), dtype=torch.uint8, generator=generator)
    labels = torch.randint(options.classes, (n,), generator=generator)
    return images.to(context.device), labels.to(context.device)


def warm_up_libraries(arch: str, device: torch.device) -> None:
    """Load what a process keeps after its first step, so that it does not count as memory of the first implementation.

    The first optimizer alone imports 150 MB of modules.
    """
    backbone = build_backbone(arch, EMBEDDING_SIZE).to(device).train()
    backbone(torch.zeros(2, 3, 112, 112, device=device)).sum().backward()
    SGD(backbone.parameters(), lr=0.0).step()


def published_will_not_fit(context: DistContext, options: Options) -> bool:
    """Collective. Whether the published head exceeds the memory of a CPU, where the system would kill processes."""
    if context.device.type == "cuda":
        return False
    classes = ClassShard(options.classes, 0, context.world_size).size
    # ten float32 tensors (N, C_r), and centers, their normalised copy, gradient and momentum
    needed = 10 * 4 * options.batch * classes + 4 * 4 * classes * EMBEDDING_SIZE
    return of_slowest_rank([needed - available_bytes(context.device, context.world_size)], context.device)[0] > 0


def fit_together(figures: dict[str, dict[str, float | None]], context: DistContext) -> bool:
    """Collective. Whether all fit into memory while they take turns. If not, each is rebuilt for its turn."""
    peaks = [peak for figure in figures.values() if (peak := figure["peak_mib"]) is not None]
    missing = sum(peaks) * MIB - 0.9 * available_bytes(context.device, context.world_size)
    return of_slowest_rank([missing], context.device)[0] <= 0


def report(context: DistContext, options: Options, impl: dict[str, dict]) -> None:
    """Print the JSON object or the table, and append to the CSV file. Call on rank 0."""
    result = {
        **describe_machine(context.device),
        "arch": options.arch, "classes": options.classes, "batch": options.batch, "world_size": options.world_size,
        "precision": options.precision, "flags": " ".join(options.flags), "steps": options.steps, "impl": impl,
    }
    print(json.dumps(result) if options.json else as_text(result), flush=True)
    if options.csv is not None:
        append_csv(options.csv, CSV_COLUMNS, [
            {**result, "impl": name, **figures, "speedup_to_published": speedup(impl, name)}
            for name, figures in impl.items()
        ])


def speedup(impl: dict[str, dict], name: str) -> float | None:
    mine, published = (impl.get(which, {}).get("p50_images_s") for which in (name, "published"))
    return mine / published if mine and published else None


def as_text(result: dict) -> str:
    """The table and a sentence with the ratio."""
    rows = [("images/s", "p20", "p50", "p80", "peak memory", "first loss")]
    for name, figures in result["impl"].items():
        if figures["p50_images_s"] is None:
            rows.append((name, *("-" * 3), figures["error"], "-"))
            continue
        peak = figures["peak_mib"]
        rows.append((name, *(f"{figures[key]:,.1f}" for key in ("p20_images_s", "p50_images_s", "p80_images_s")),
                     "unknown" if peak is None else f"{peak:,.0f} MiB", f"{figures['first_loss']:.3f}"))
    lines = [
        f"{result['arch']}, {result['classes']:,} classes, batch {result['batch']}, {result['world_size']} processes "
        f"with {result['threads']} threads, {result['precision']}"
        + (f", ours with {result['flags']}" if result["flags"] else ""),
        f"{result['device']}, torch {result['torch']}",
        "", aligned(rows),
    ]
    ratio = speedup(result["impl"], "ours")
    if ratio:
        words = f"ours is {ratio:.2f} times as fast as published"
        mine, theirs = (result["impl"][name]["peak_mib"] for name in IMPLEMENTATIONS)
        if mine and theirs:
            words += f", in {mine / theirs:.1%} of its memory"
        lines += ["", words]
    return "\n".join(lines)


def parse_options(argv: list[str] | None = None) -> tuple[Options, TrainingOptions]:
    """Parse, check, and look which devices there are: this benchmark's options, and main.py's. Raises UserError."""
    parser = Parser("bench_step.py", "Images per second of main.py's training step beside torchshard's published script.")
    parser.add_argument("-a", "--arch", default="iresnet50", metavar="ARCH", help="backbone (default: %(default)s)")
    parser.add_argument("--classes", type=int, required=True, metavar="C", help="classes of all processes")
    parser.add_argument("--batch", type=int, required=True, metavar="N", help="images per step of all processes")
    parser.add_argument("--world-size", type=int, default=1, metavar="W", help="processes (default: %(default)s)")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="fp32",
                        help="of the backbone (default: %(default)s); published does bf16 on GPUs as fp16")
    group = parser.add_argument_group("flags of main.py, for ours")
    for name in OWN_FLAGS:
        flags_of(TrainingOptions)[name].add_to(group, name)
    parser.add_argument("--impl", default=",".join(IMPLEMENTATIONS), metavar="A,B",
                        help="what takes turns (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, metavar="K",
                        help="timed steps of each, rounded up to whole blocks (default: %(default)s)")
    parser.add_argument("--block", type=int, default=4, metavar="K", help="steps in a turn (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: GPUs if there are any")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--csv", metavar="FILE", help="append a row per implementation")
    values = vars(parser.parse_args(argv))
    for flag, minimum in (("classes", 2), ("batch", 2), ("world_size", 1), ("steps", 1), ("block", 1)):
        if values[flag] < minimum:
            raise UserError(f"--{flag.replace('_', '-')} {values[flag]}: give a number of at least {minimum}")
    check_arch(values["arch"])
    world_size = values["world_size"]
    if values["batch"] % world_size or values["batch"] == world_size:
        raise UserError(f"--batch {values['batch']}: must divide by --world-size {world_size} and leave each process two images")

    if values["fuse_classifier_update"] and values["precision"] == "fp16":
        raise UserError("--fuse-classifier-update with --precision fp16: main.py has no such mode; use bf16, or drop one of them")
    own = {name: values.pop(name) for name in OWN_FLAGS}
    definitions = flags_of(TrainingOptions)
    flags = tuple(definitions[name].describe(value) for name, value in own.items() if value != definitions[name].default)
    options = Options(**{**values, "flags": flags, "device": choose_device_type(values["device"], world_size),
                         "impl": choose_implementations(values["impl"], IMPLEMENTATIONS)})
    low_precision = options.precision != "fp32"
    return options, check_options(TrainingOptions(
        data="images drawn by the benchmark", arch=options.arch, num_classes=options.classes, batch_size=options.batch,
        device=options.device, seed=SEED, lr=LEARNING_RATE, enable_model_parallel=True, no_save=True,
        enable_amp_mode=low_precision, amp_dtype=options.precision if low_precision else None,
        multiprocessing_distributed=world_size > 1, nproc_per_node=world_size if world_size > 1 else None, **own,
    ))


if __name__ == "__main__":
    exit_on_user_error(main)
