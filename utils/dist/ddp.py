"""What DistributedDataParallel needs beyond its defaults."""

from __future__ import annotations

import torch
from torch.nn.parallel import DistributedDataParallel


def fix_gradient_buckets(model: DistributedDataParallel) -> None:
    """Collective. Let DistributedDataParallel decide now, as in every run, where in its buckets a gradient lies.

    It does so once, after its first backward pass, by the order in which the gradients came. Where a number lies in a bucket is
    the order in which three or more ranks add it up: the first step of a resumed run would differ from the same step of the
    run that went on. So the first backward pass is one that costs nothing, of a sum of all parameters, whose gradients come
    last parameter first, as they do in training. Its gradients are thrown away.
    """
    averaged = [
        parameter for name, parameter in model.module.named_parameters()
        if parameter.requires_grad and name not in model.parameters_to_ignore
    ]
    model.module.forward = lambda anchor: torch.stack([parameter.sum() for parameter in averaged]).sum() + anchor
    try:
        # With GPUs DistributedDataParallel takes it for granted that there is an input.
        model(averaged[0].new_zeros(())).backward()  # the buckets are laid out at the beginning of the next forward pass, whatever that is
    finally:
        del model.module.forward  # the class's own is there again
    for parameter in averaged:
        parameter.grad = None
