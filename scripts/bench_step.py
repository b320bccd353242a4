#!/usr/bin/env python3
"""Images per second and memory of a training step: main.py compared with torchshard's published ArcFace script.

    python3 scripts/bench_step.py -a iresnet50 --classes 85744 --batch 128 --precision bf16 --channels-last

ours: `build_training` and `main.train_one_epoch`, always with --enable-model-parallel.
published: the step of that script (projects/arcface of torchshard 0.1): float images in NCHW, fp16 autocast with a
GradScaler or none, the margin on all logits, a one-hot matrix that selects the targets, the full softmax, top-5 over
the full logits, and three values read from the device in every step. With several processes its full head would need
all logits on every GPU, so it gets torchshard's parallel cross entropy instead.

Random images are on the device from the start. Neither way mirrors them: the published script does that while it reads.
Both start from the same weights, must find the same first loss, and take turns, a block of steps each.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from types import SimpleNamespace
from typing import Any

# The script's own directory is on sys.path, the repository's root is not.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

if __name__ == "__main__":
    from utils.packages import require_packages

    require_packages()

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import main as training  # noqa: E402
from data.loader import TrainBatch  # noqa: E402
from losses.margins import ArcFace  # noqa: E402
from losses.softmax import margin_softmax_torchshard  # noqa: E402
from models import BACKBONES, build_backbone  # noqa: E402
from models.classifier import MarginClassifier, class_centers  # noqa: E402
from scripts import measure  # noqa: E402
from utils.build import build_training  # noqa: E402
from utils.dist.context import DistContext  # noqa: E402
from utils.dist.sharding import ClassShard, init_model_parallel, let_ddp_ignore_shards  # noqa: E402
from utils.errors import UserError, exit_on_user_error  # noqa: E402
from utils.flags import flag, flags_of, parse_flags  # noqa: E402
from utils.launch.spawn import launch  # noqa: E402
from utils.options import EMBEDDING_SIZE, check_options  # noqa: E402
from utils.options import Options as TrainingOptions  # noqa: E402
from utils.preflight import check_fused_update  # noqa: E402
from utils.training.guard import StepGuard, StepLoss  # noqa: E402

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OWN_FLAGS = ("channels_last", "compile", "fuse_classifier_update", "classifier")  # of main.py, for ours alone
SEED = 0
SCALE = 64.0
LEARNING_RATE = 0.01
ENDLESS_EPOCH = 10**9  # steps; no milestone is reached
WARM_UP_STEPS = 2  # the first creates momentum and chooses convolutions; then DDP rebuilds its buckets

CSV_COLUMNS = (
    "date", "device", "torch", "threads", "world_size", "arch", "classes", "batch", "precision", "flags", "steps",
    "impl", "p20_images_s", "p50_images_s", "p80_images_s", "peak_mib", "first_loss", "speedup_to_published",
)


def flag_of_main(name: str) -> Any:
    """The field of main.py's options."""
    original = next(item for item in fields(TrainingOptions) if item.name == name)
    return field(default=original.default, metadata=original.metadata)


@dataclass(frozen=True, kw_only=True)
class Options(measure.StepFlags):
    """The command line."""

    arch: str = flag("-a", "--arch", metavar="ARCH", choices=BACKBONES, default="iresnet50", help="backbone")
    precision: str = flag("--precision", choices=PRECISIONS, default="fp32",
                          help="of the backbone; published does bf16 on GPUs as fp16")
    impl: tuple[str, ...] = flag("--impl", default=("ours", "published"), choices=("ours", "published"),
                                 metavar="A,B", help="implementations that take turns")
    steps: int = flag("--steps", default=40, metavar="K", at_least=1,
                      help="timed steps of each, rounded up to whole blocks")
    block: int = flag("--block", default=4, metavar="K", at_least=1, help="steps in a turn")
    channels_last: bool = flag_of_main("channels_last")
    compile: bool = flag_of_main("compile")
    fuse_classifier_update: bool = flag_of_main("fuse_classifier_update")
    classifier: str = flag_of_main("classifier")


def main() -> None:
    options, training_options = parse_options()
    measure.check_csv(options.csv, CSV_COLUMNS)
    launch(run, options.plan(), options, training_options)


def run(context: DistContext, options: Options, training_options: TrainingOptions) -> None:
    """Collective. Build the implementations, let them take turns, and report on rank 0."""
    device = context.device
    warm_up_libraries(options.arch, device)
    images, labels = draw_batch(context, options)
    ways: dict[str, OurTraining | PublishedTraining] = {}
    peak_mib: dict[str, float] = {}

    def build(name: str) -> None:
        way = (OurTraining(context, training_options, images, labels) if name == "ours"
               else PublishedTraining(context, options, images, labels))
        way.run(WARM_UP_STEPS)
        ways[name] = way

    for name in options.impl:
        held = measure.restart_peak(device)
        if measure.fits_in_memory(name, partial(build, name), device, 0 if name == "ours" else options.logits_bytes):
            measure.restart_peak(device)
            ways[name].run(1)
            peak_mib[name] = measure.peak_mib(device, held)
    first_loss = {name: float(way.losses[0]) for name, way in ways.items()}
    tolerance = 0.01 if options.precision == "fp32" else 0.05
    if not np.allclose(list(first_loss.values()), max(first_loss.values(), default=0.0), rtol=tolerance):
        raise UserError(f"the first losses differ: {first_loss}; nothing was measured")

    blocks = -(-options.steps // options.block)
    seconds = measure.alternate({name: partial(measure.timed, partial(way.run, options.block), device)
                                 for name, way in ways.items()}, blocks)
    if context.is_main:
        rates = {name: options.batch * options.block / np.array(values) for name, values in seconds.items()}
        median = {name: float(np.median(values)) for name, values in rates.items()}
        flags = [definition.describe(getattr(options, name)) for name, definition in flags_of(Options).items()
                 if name in OWN_FLAGS and getattr(options, name) != definition.default]
        common = {**asdict(options), **measure.describe_machine(device), "flags": " ".join(flags)}
        measure.report([
            {**common, "impl": name, **measure.spread(rates[name], "_images_s"), "peak_mib": peak_mib[name],
             "first_loss": first_loss[name],
             "speedup_to_published": median[name] / median["published"] if "published" in median else None}
            for name in ways
        ], CSV_COLUMNS, "impl", options.csv)


class OurTraining:
    """Collective. The model, optimizers and loop of main.py, repeatedly on one batch."""

    def __init__(self, context: DistContext, options: TrainingOptions, images: Tensor, labels: Tensor) -> None:
        state, model = build_training(context, options, SEED, options.batch_size, options.batch_size)
        indices = torch.arange(len(images)) + context.rank * len(images)
        self._batch = TrainBatch(images, labels, indices, skipped=0)
        self.losses: list[Tensor] = []
        log: Any = SimpleNamespace(add=self._add, count_replaced=lambda images: None)  # no TrainingLog: nothing is read
        guard = StepGuard(state.backbone, skip=options.on_nonfinite == "skip")
        self.state = state
        self._run = training.Run(context, options, state, model, ENDLESS_EPOCH, log, guard)

    def run(self, steps: int) -> None:
        self.run_batches([self._batch] * steps * self._run.options.accumulation_steps, steps)

    def run_batches(self, batches: Iterable[TrainBatch], steps: int) -> None:
        training.train_one_epoch(self._run, batches, steps)

    def _add(self, *, loss: Tensor, **others: object) -> list[StepLoss]:
        self.losses.append(loss)
        return []


class FullModel(nn.Module):
    """The published model of a single process: the margin on every logit, then a one-hot selection.

    forward: images (n, 3, 112, 112), label (n,) -> loss, and bool (n, 5), whether the k-th best class is the target.
    """

    def __init__(self, backbone: nn.Module, shard: ClassShard) -> None:
        super().__init__()
        self.backbone, self.weight = backbone, class_centers(shard, EMBEDDING_SIZE, SEED)

    def forward(self, images: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        cosine = F.linear(F.normalize(self.backbone(images)), F.normalize(self.weight))
        sine = (1.0 - cosine.square()).clamp(0, 1).sqrt()
        phi = cosine * math.cos(0.5) - sine * math.sin(0.5)
        phi = torch.where(cosine > 0, phi, cosine)
        one_hot = torch.zeros(cosine.shape, device=cosine.device).scatter_(1, label.unsqueeze(1), 1)
        logits = SCALE * (one_hot * phi + (1.0 - one_hot) * cosine)
        best = cosine.detach().topk(min(5, cosine.shape[1])).indices
        return F.cross_entropy(logits, label), best == label.unsqueeze(1)


class ParallelModel(MarginClassifier):
    """Collective. The same with torchshard's parallel cross entropy and the classes sharded over the processes."""

    def __init__(self, backbone: nn.Module, shard: ClassShard) -> None:
        centers = class_centers(shard, EMBEDDING_SIZE, SEED, parallel_dim=1)
        super().__init__(centers, shard, ArcFace(), scale=SCALE, loss=margin_softmax_torchshard,
                         group=init_model_parallel(shard.world_size))
        self.backbone = backbone

    def forward(self, images: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        loss, num_closer = super().forward(self.backbone(images), label)
        return loss, num_closer.unsqueeze(1) == torch.arange(5, device=num_closer.device)


class PublishedTraining:
    """Collective. Model and step of the published script, repeatedly on one batch."""

    def __init__(self, context: DistContext, options: Options, images: Tensor, labels: Tensor) -> None:
        device = context.device
        torch.backends.cudnn.benchmark = True
        torch.manual_seed(SEED)
        backbone = build_backbone(options.arch, EMBEDDING_SIZE)
        shard = ClassShard(options.classes, context.rank, context.world_size)
        self._model: nn.Module = (ParallelModel if context.world_size > 1 else FullModel)(backbone, shard)
        self._model.to(device).train()
        if context.world_size > 1:
            let_ddp_ignore_shards(self._model)
            self._model = DistributedDataParallel(self._model, device_ids=[device] if device.type == "cuda" else None)
        low_precision = options.precision != "fp32"
        # Its mixed precision is fp16 on GPUs. It has none on the CPU, so it gets ours there.
        dtype = torch.float16 if low_precision and device.type == "cuda" else PRECISIONS[options.precision]
        self._autocast = torch.autocast(device.type, dtype, enabled=low_precision)
        self._optimizer = SGD(self._model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4)
        self._scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self._images, self._labels = images.float().div_(255), labels
        self.losses: list[float] = []

    def run(self, steps: int) -> None:
        for _ in range(steps):
            images = (self._images - 0.5) / 0.5
            with self._autocast:
                loss, hits = self._model(images, self._labels)
            values = [metric.item() for metric in (loss, hits[:, 0].float().mean(), hits.any(dim=1).float().mean())]
            self.losses.append(values[0])
            self._scaler.scale(loss).backward()
            self._scaler.step(self._optimizer)
            self._scaler.update()
            self._optimizer.zero_grad()


def draw_batch(context: DistContext, options: Options) -> tuple[Tensor, Tensor]:
    """This rank's images uint8 (n, 3, 112, 112) and labels int64 (n,), on the device."""
    generator = torch.Generator().manual_seed(context.rank)
    n = options.batch // context.world_size
    images = torch.randint(256, (n, 3, 112, 112), dtype=torch.uint8, generator=generator)
    labels = torch.randint(options.classes, (n,), generator=generator)
    return images.to(context.device), labels.to(context.device)


def warm_up_libraries(arch: str, device: torch.device) -> None:
    """Load what a process keeps after its first step, such as 150 MB of modules: it is no implementation's memory."""
    backbone = build_backbone(arch, EMBEDDING_SIZE).to(device).train()
    backbone(torch.zeros(2, 3, 112, 112, device=device)).sum().backward()
    SGD(backbone.parameters(), lr=0.0).step()


def parse_options(argv: list[str] | None = None) -> tuple[Options, TrainingOptions]:
    """Parse, check, and look which devices there are: this benchmark's options, and main.py's. Raises UserError."""
    options = parse_flags(Options, "bench_step.py", "Images per second of main.py's training step beside torchshard's "
                          "published script.", argv)
    plan = options.plan()
    if options.batch == options.world_size:
        raise UserError(f"--batch {options.batch}: leaves each process one image, and BatchNorm needs two")
    low_precision, several = options.precision != "fp32", options.world_size > 1
    training_options = check_options(TrainingOptions(
        data="images drawn by the benchmark", arch=options.arch, num_classes=options.classes, batch_size=options.batch,
        device=plan.device_type, matmul=plan.matmul, seed=SEED, lr=LEARNING_RATE, augment="none",
        enable_model_parallel=True, no_save=True, enable_amp_mode=low_precision,
        amp_dtype=options.precision if low_precision else None,
        multiprocessing_distributed=several, nproc_per_node=options.world_size if several else None,
        **{name: getattr(options, name) for name in OWN_FLAGS},
    ))
    check_fused_update(training_options, plan)
    return options, training_options


if __name__ == "__main__":
    exit_on_user_error(main)
