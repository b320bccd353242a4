"""Backbones by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from models.ir import IR, IR_VARIANTS
from models.iresnet import BLOCK_COUNTS, IResNet
from models.mbf import MBF, MBF_VARIANTS
from models.mobilefacenet import MobileFaceNet
from models.timm_backbone import PREFIX, TimmBackbone, check_timm
from models.vit import VIT_VARIANTS, ViT
from utils.errors import UserError

# name -> constructor(embedding_size). A backbone maps images (n, 3, 112, 112), RGB, floats in [-1, 1], to embeddings
# (n, embedding_size), which are not L2-normalised, and has the attribute `embedding_size`. One that draws random
# numbers in training has `takes_keys = True`, and takes the images' keys of models.randomness as second argument.
BACKBONES: dict[str, Callable[[int], nn.Module]] = {
    **{name: partial(IResNet, counts) for name, counts in BLOCK_COUNTS.items()},
    "mobilefacenet": MobileFaceNet,
    **{name: partial(IR, *variant) for name, variant in IR_VARIANTS.items()},
    **{name: partial(MBF, *variant) for name, variant in MBF_VARIANTS.items()},
    **{name: partial(ViT, variant) for name, variant in VIT_VARIANTS.items()},
}
ANY_TIMM = f"{PREFIX}NAME"  # in --help, for all networks of timm


def build_backbone(arch: str, embedding_size: int = 512) -> nn.Module:
    """A freshly initialised backbone of BACKBONES or of timm. Raises UserError if there is none of this name."""
    check_arch(arch)
    if is_timm(arch):
        return TimmBackbone(arch.removeprefix(PREFIX), embedding_size)
    return BACKBONES[arch](embedding_size)


def is_timm(arch: str) -> bool:
    return arch.startswith(PREFIX)


def check_arch(arch: str) -> None:
    """Raise UserError unless there is a backbone of this name."""
    if is_timm(arch):
        check_timm(arch.removeprefix(PREFIX))
    elif arch not in BACKBONES:
        raise UserError(f"--arch {arch} is unknown; choose one of {', '.join(BACKBONES)}, {ANY_TIMM}")


def first_convolution(backbone: nn.Module) -> tuple[str, Tensor]:
    """Name and weight of the convolution that sees the image: its dimension 1 is the color, red first."""
    return next((name, weight.detach()) for name, weight in backbone.named_parameters()
                if weight.dim() == 4 and weight.shape[1] == 3)
