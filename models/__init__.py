"""Backbones by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from models.iresnet import BLOCK_COUNTS, IResNet
from models.mobilefacenet import MobileFaceNet
from utils.errors import UserError

# name -> constructor(embedding_size). A backbone maps images (n, 3, 112, 112), floats in [-1, 1], to embeddings
# (n, embedding_size), which are not L2-normalised, and has the attribute `embedding_size`.
BACKBONES: dict[str, Callable[[int], nn.Module]] = {
    **{name: partial(IResNet, counts) for name, counts in BLOCK_COUNTS.items()},
    "mobilefacenet": MobileFaceNet,
}


def build_backbone(arch: str, embedding_size: int = 512) -> nn.Module:
    """A freshly initialised backbone of BACKBONES. Raises UserError if there is none of this name."""
    check_arch(arch)
    return BACKBONES[arch](embedding_size)


def check_arch(arch: str) -> None:
    """Raise UserError unless there is a backbone of this name."""
    if arch not in BACKBONES:
        raise UserError(f"--arch {arch} is unknown; choose one of {', '.join(BACKBONES)}")
