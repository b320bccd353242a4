"""--channels-last: NHWC weights, so that convolutions and their gradients are NHWC throughout."""

from __future__ import annotations

import torch
from torch import nn


def store_channels_last(backbone: nn.Module) -> None:
    """Give the weights (c_out, c_in, h, w) of convolutions the strides of NHWC, in place. Values and names stay.

    Also where one of the dimensions has size 1, which `backbone.to(memory_format=torch.channels_last)` leaves as it is:
    their gradients have these strides, and DistributedDataParallel would warn about others.
    """
    for weight in backbone.parameters():
        if weight.dim() == 4:
            weight.data = torch.empty_like(weight, memory_format=torch.channels_last).copy_(weight.data)
