"""The layers that autocast must leave alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def at_least_float32(x: Tensor, *layers: nn.Module) -> Tensor:
    """The layers one after the other, also under autocast in float32 (in float64 for float64).

    For the last linear layer of a backbone and its BatchNorm: bfloat16 would leave 8 bits of each value of the
    embedding, from which the classifier computes cosines in float32.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        for layer in layers:
            x = layer(x)
        return x
