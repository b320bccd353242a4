"""BatchNorm over all ranks, also on the CPU, where torch.nn.SyncBatchNorm raises an error."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.dist.collectives import AllReduceSum


class CpuSyncBatchNorm(_BatchNorm):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, mean and (biased) variance over the batch of *all* ranks.

    Input (n, channels, ...) with any number of dimensions. In training mode forward and backward are collective: two
    all-reduces of (channels,), and every rank must have a batch of the same size. Evaluation is plain batch norm.
    The module must have running statistics, with a fixed momentum.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # the base class requires a method

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        world_size, dims, shape = dist.get_world_size(), [0, *range(2, input.dim())], [1, -1] + [1] * (input.dim() - 2)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        # Outside autocast, in the parameters' precision: fp16 squares overflow above 256.
        with torch.autocast("cpu", enabled=False):
            x = input.to(self.running_mean.dtype)
            mean = AllReduceSum.apply(x.mean(dims)) / world_size
            centered = x - mean.view(shape)
            # A second pass about the common mean: E[x^2] - mean^2 would cancel in float32.
            variance = AllReduceSum.apply(centered.square().mean(dims)) / world_size
            with torch.no_grad():
                count = x.numel() // x.shape[1] * world_size
                self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            factor = (variance + self.eps).rsqrt()
            if not self.affine:
                return (centered * factor.view(shape)).to(input.dtype)
            scaled = centered * (factor * self.weight).view(shape) + self.bias.view(shape)
        return scaled.to(input.dtype)


def has_other_batchnorm(module: nn.Module) -> bool:
    """Whether `convert_sync_batchnorm` would change what the module computes: some of timm's BatchNorms do more, such
    as an activation, which is lost without an error, with torch's own conversion too.
    """
    return any(isinstance(layer, _BatchNorm) and type(layer).forward is not _BatchNorm.forward
               for layer in module.modules())


def convert_sync_batchnorm(module: nn.Module, device_type: str) -> nn.Module:
    """Replace every BatchNorm in `module`, in place, by one with statistics over all ranks. Returns the module.

    Parameters and buffers keep their names, values and requires_grad.
    """
    if device_type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            synced = CpuSyncBatchNorm(child.num_features, child.eps, child.momentum, child.affine)
            synced._parameters, synced._buffers = child._parameters, child._buffers
            setattr(module, name, synced)
        else:
            convert_sync_batchnorm(child, device_type)
    return module
