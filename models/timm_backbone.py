"""timm:NAME: any network of timm (PyTorch Image Models, https://github.com/huggingface/pytorch-image-models)."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from models.precision import at_least_float32
from utils.errors import UserError

PREFIX = "timm:"


class TimmBackbone(nn.Module):
    """Embedding = features(fc(body(images))): the network without its own classifier, then the head of IResNet.

    timm's own classifier of d classes would lack the BatchNorm, which centers the values of the embedding. The weights
    are initialised by timm, none are downloaded. Dropout and stochastic depth are switched off: timm draws them from
    torch's generator, and they would depend on the number of processes.

    Raises UserError if timm has no network of this name, or if it does not take images of 112 x 112 pixels.
    """

    def __init__(self, name: str, embedding_size: int = 512) -> None:
        super().__init__()
        check_timm(name)
        self.embedding_size = embedding_size
        try:
            try:
                self.body, width = _build_body(name)
            except RuntimeError:
                if torch.get_default_device().type != "meta":
                    raise
                with torch.device("cpu"):  # older versions of timm read values while they build a network
                    self.body, width = _build_body(name)
                self.body.to("meta")
        except (RuntimeError, ValueError, AssertionError, TypeError) as error:
            raise UserError(f"--arch {PREFIX}{name}: does not work with images of 112 pixels "
                            f"({' '.join(str(error).split())[:200]}); choose another network") from None
        self.body.train()
        self.fc = nn.Linear(width, embedding_size)
        self.features = nn.BatchNorm1d(embedding_size)
        self.features.weight.requires_grad_(False)  # fixed, because the embedding is L2-normalised afterwards

    def forward(self, images: Tensor) -> Tensor:
        """images: (n, 3, 112, 112) float in [-1, 1] -> embedding (n, d), not L2-normalised."""
        return at_least_float32(self.body(images).flatten(1), self.fc, self.features)


def _build_body(name: str) -> tuple[nn.Module, int]:
    """The network without its classifier, and the width of its output."""
    timm = _import_timm(name)
    try:
        body = timm.create_model(name, num_classes=0, img_size=112)
    except TypeError:  # only some networks must know the size
        body = timm.create_model(name, num_classes=0)
    _switch_off_dropout(body)
    with torch.no_grad():
        return body, body.eval()(torch.zeros(2, 3, 112, 112)).flatten(1).shape[1]


def check_timm(name: str) -> None:
    """Raise UserError unless timm is installed and has a network of this name."""
    timm = _import_timm(name)
    if not timm.is_model(name):
        similar = timm.list_models(f"*{name[:4]}*")[:5]
        raise UserError(f"--arch {PREFIX}{name}: timm {timm.__version__} has no network of this name"
                        + (f"; similar ones: {', '.join(similar)}" if similar else "; see timm.list_models()"))


def _import_timm(name: str) -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise UserError(f"--arch {PREFIX}{name}: the package timm is missing or does not load ({error}); pip install "
                        "timm") from None


def _switch_off_dropout(body: nn.Module) -> None:
    for module in body.modules():
        for rate in ("p", "drop_prob", "drop_rate"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
