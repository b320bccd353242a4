"""Whole runs of main.py's `train` in the pooled processes, with a tiny backbone."""

from __future__ import annotations

from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import main
from data.formats import open_training_set
from helpers.commands import read_metrics
from helpers.tiny import TinyBackbone
from utils import build, preflight
from utils.checkpoint.reader import read_resumable
from utils.dist.context import DistContext
from utils.options import parse_options
from utils.training.guard import StepGuard
from utils.training.state import TrainState

MODES = {
    "base": [],
    "base, ZeRO": ["--enable-zero-optim"],
    "sharded": ["--enable-model-parallel"],
    "sharded, ZeRO": ["--enable-model-parallel", "--enable-zero-optim"],
    "sharded, fused update": ["--enable-model-parallel", "--fuse-classifier-update"],
}


def train(rank: int, world_size: int, argv: list[str], *others: list[str]) -> int:
    """What `main.py <argv>` does in each of its processes. `others`: the flags of further nodes."""
    processes = world_size // (1 + len(others))
    node = rank // processes
    options = parse_options([argv, *others][node])
    if node == 0:
        preflight.make_output(options)
        if options.resume:
            read_resumable(main.resume_request(options))
    with mock.patch.object(build, "build_backbone", lambda arch, embedding_size: TinyBackbone(batch_norm=True)):
        context = DistContext(rank, world_size, processes, torch.device("cpu"))
        dataset = open_training_set(options.data, index="none", skip_bad=False, progress=False,
                                    identities=options.identities, exclude=options.exclude)
        return main.train(context, options, dataset, preflight.open_validation_sets(options))


def build_sharded_fp16(rank: int, world_size: int, num_classes: int, *flags: str) -> tuple[TrainState, nn.Module]:
    """State and model of a run with sharded classes, batch 8 and the fp16 scaler, whose scale tensor is there."""
    options = parse_options(["unused", "--num-classes", str(num_classes), "--batch-size", "8",
                             "--enable-model-parallel", "--enable-amp-mode", "--amp-dtype", "fp16", *flags])
    context = DistContext(rank, world_size, world_size, torch.device("cpu"))
    with mock.patch.object(build, "build_backbone", lambda arch, embedding_size: TinyBackbone(False)):
        state, model = build.build_training(context, options, 5, 80, 8)
    state.scaler.scale(torch.ones(()))
    return state, model


def make_run(context, options, state, model, steps_per_epoch: int, log) -> main.Run:
    """What `main.train_one_epoch` needs to train, without saving, evaluating or signals."""
    guard = StepGuard(state.backbone, skip=options.on_nonfinite == "skip")
    return main.Run(context, options, state, model, steps_per_epoch, log, guard)


def losses(output) -> list[float]:
    return [line["loss"] for line in read_metrics(output)]


RESUME = ["-b", "12", "--num-classes", "11", "-j", "0", "--epochs", "2", "--lr-milestones", "1"]


IMAGES = 80


class RandomFaces(Dataset):
    """Images that differ by identity, so that the loss moves."""

    def __init__(self, num_classes: int) -> None:
        generator = np.random.default_rng(0)
        self.labels = generator.integers(0, num_classes, IMAGES)
        coarse = generator.integers(0, 256, (IMAGES, 3, 14, 14), dtype=np.uint8)
        self.images = torch.from_numpy(coarse.repeat(8, axis=2).repeat(8, axis=3))
        self.skip_bad = False

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


class RecordingLog:
    """Stands in for TrainingLog: keeps what train_one_epoch reports."""

    def __init__(self) -> None:
        self.steps: list[dict] = []

    def add(self, **values) -> list:
        self.steps.append(values)
        return []

    def count_replaced(self, images: int) -> None:
        assert images == 0
