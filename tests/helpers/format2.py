"""The run that wrote tests/data/format-2 with the program of format 2: so small that its checkpoint takes a few kB."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import main
from utils import build
from utils.dist.context import DistContext
from utils.options import parse_options

STATE = Path(__file__).resolve().parent.parent / "data/format-2/step-00000003/state.pth.tar"
EMBEDDING_SIZE = 8
FLAGS = ["-b", "8", "-j", "0", "--num-classes", "5", "--enable-model-parallel", "--precision", "float64",
         "--epochs", "2", "--lr-milestones", "1", "--lr", "0.05", "--margin", "0.5", "--scale", "16",
         "-p", "1", "--sync-bn", "--embedding-size", str(EMBEDDING_SIZE)]
# Of steps 1 to 10, seed 1. The checkpoint is of step 3.
LOSSES = [7.245673076040976, 9.30014505579855, 11.347105092519127, 13.03489724885905, 9.15885987122599,
          8.705296488369346, 8.486215762234265, 13.217753103153317, 8.560934730298674, 7.730406391321415]


class Mean(nn.Module):
    """Images (n, 3, 112, 112) -> (n, 8)."""

    embedding_size = EMBEDDING_SIZE

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, EMBEDDING_SIZE, bias=False)
        self.features = nn.BatchNorm1d(EMBEDDING_SIZE)

    def forward(self, images: Tensor) -> Tensor:
        return self.features(self.fc(nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)))


class Drawn(Dataset):
    """40 images of 5 identities, from numpy's generator alone."""

    root, skip_bad = "drawn", False

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self.labels = np.arange(40) % 5
        coarse = generator.integers(0, 256, (40, 3, 2, 2), dtype=np.uint8)
        self.images = torch.from_numpy(coarse.repeat(56, axis=2).repeat(56, axis=3))
        self.identities = [f"person {label}" for label in range(5)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])

    def fingerprint(self) -> str:
        return ""


def train(rank: int, world_size: int, argv: list[str], nodes: int = 1) -> int:
    options = parse_options(["drawn", *FLAGS, *argv])
    os.makedirs(options.output, exist_ok=True)
    with mock.patch.object(build, "build_backbone", lambda arch, embedding_size: Mean()):
        context = DistContext(rank, world_size, world_size // nodes, torch.device("cpu"))
        return main.train(context, options, Drawn())
