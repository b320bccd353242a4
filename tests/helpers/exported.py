"""A mobilefacenet checkpoint of known class centers, and files that scripts/export.py makes of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch

from helpers.commands import load_script
from models.classifier import initial_centers
from utils.build import build_training
from utils.checkpoint.init_from import init_from
from utils.checkpoint.weights import open_weights
from utils.checkpoint.writer import CheckpointWriter
from utils.dist.context import DistContext
from utils.dist.sharding import ClassShard
from utils.options import parse_options

NAMES = [f"person {number}" for number in range(11)]
SHARDED = ["--enable-model-parallel"]
export = load_script("export")


def build(rank: int, world_size: int, num_classes: int, seed: int, identities: list[str], flags: list[str]):
    """The state of a mobilefacenet run that has not begun."""
    options = parse_options(
        ["unused", "-a", "mobilefacenet", "--num-classes", str(num_classes), "--batch-size", "12", *flags])
    context = DistContext(rank, world_size, world_size, torch.device("cpu"))
    state, _ = build_training(context, options, seed, 48, 12, identities)
    return state, options, context


def save(rank: int, world_size: int, output: str, num_classes: int, identities: list[str], flags: list[str]) -> None:
    """A checkpoint of seed 1, of which class c's center is its initial one."""
    state, _, context = build(rank, world_size, num_classes, 1, identities, flags)
    os.makedirs(output, exist_ok=True)
    writer = CheckpointWriter(context, output, options={}, say=lambda text: None)
    writer.save(state)
    writer.close()


def make_checkpoint(pools, output: Path) -> Path:
    """11 classes with names, written by two ranks: 6 and 5."""
    pools(2).run(save, str(output), 11, NAMES, SHARDED)
    return output / "checkpoint.pth.tar"


def export_to(source: Path, format: str, output: Path, *flags: str) -> Path:
    before = sys.argv
    sys.argv = ["export.py", "--resume", str(source), "--format", format, "--output", str(output), *flags]
    try:
        export.main()
    finally:
        sys.argv = before
    names = [path.name for path in output.parent.iterdir()]
    assert not [name for name in names if name.endswith(".part") or name.startswith(".centers")]
    return output


def centers(num_classes: int, seed: int) -> np.ndarray:
    return initial_centers(ClassShard(num_classes, 0, 1), 512, seed).numpy()


def backbone_of(path: Path) -> dict[str, torch.Tensor]:
    return open_weights(str(path)).backbone.state_dict()


def start(rank: int, world_size: int, path: str, num_classes: int, identities: list[str], flags: list[str]) -> tuple:
    """What a run of seed 2 starts with: the line it says, this rank's centers, the backbone."""
    state, options, _ = build(rank, world_size, num_classes, 2, identities, flags)
    said = init_from(path, options.training_arch, state.backbone, state.classifier, identities)
    backbone = {name: tensor.numpy().copy() for name, tensor in state.backbone.state_dict().items()}
    return said, state.classifier.weight.detach().numpy().copy(), backbone
