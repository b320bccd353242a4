"""What DistributedDataParallel needs beyond its defaults."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

# No broadcast of buffers before each forward pass: in training no gradient depends on them, and those of rank 0, which
# are saved and evaluated, are the same without. torch 2.14 renamed the argument and warns about the old name.
_BUFFERS = ("forward_sync_buffers" if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
            else "broadcast_buffers")
# Gradients lie in the buckets that are reduced. By default each step copies them from the buckets into tensors of their
# own.
DDP_SETTINGS: dict[str, Any] = {_BUFFERS: False, "gradient_as_bucket_view": True}


def fix_gradient_buckets(model: DistributedDataParallel) -> None:
    """Collective. Make DistributedDataParallel lay out its gradient buckets now, in the same way in every run.

    It lays them out again once, after its first backward pass, in the order in which the gradients became ready. The
    place of a gradient in a bucket decides in which order three or more ranks add it up, so the first step of a resumed
    run would differ from the same step of the uninterrupted run. So the first backward pass is a cheap one, of a sum of
    all parameters. Its gradients become ready last parameter first, as in training, and are thrown away.
    """
    averaged = [parameter for name, parameter in model.module.named_parameters()
                if parameter.requires_grad and name not in model.parameters_to_ignore]
    model.module.forward = lambda anchor: torch.stack([parameter.sum() for parameter in averaged]).sum() + anchor
    try:
        # With GPUs DistributedDataParallel needs an input. The next forward pass lays out the buckets.
        model(averaged[0].new_zeros(())).backward()
    finally:
        del model.module.forward  # uncovers the class's own
    for parameter in averaged:
        parameter.grad = None
