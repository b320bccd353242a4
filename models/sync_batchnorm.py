"""BatchNorm over all ranks, without waiting for the GPU, and also on the CPU.

torch.nn.SyncBatchNorm has neither: it waits for the GPU three times in each layer, to leave out ranks whose batch is
empty, and raises an error on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.dist.collectives import AllReduceSum, all_gather_rows


class SyncBatchNorm(_BatchNorm):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, mean and (biased) variance over the batch of *all* ranks.

    Input (n, channels, ...) with any number of dimensions. In training mode forward and backward are collective, and
    every rank must have a batch of the same size. Evaluation, and training with one process, are plain batch norm.
    The module must have running statistics, with a fixed momentum.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # the base class requires a method

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or dist.get_world_size() == 1:
            return super().forward(input)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        return self._forward_on_cpu(input) if input.is_cpu else self._forward_on_gpu(input)

    def _forward_on_gpu(self, input: Tensor) -> Tensor:
        return _KernelsOverRanks.apply(input, self.weight, self.bias, self.running_mean, self.running_var, self.eps,
                                       self.momentum)

    def _forward_on_cpu(self, input: Tensor) -> Tensor:
        world_size, dims, shape = dist.get_world_size(), [0, *range(2, input.dim())], [1, -1] + [1] * (input.dim() - 2)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        # Outside autocast, in the parameters' precision: fp16 squares overflow above 256.
        with torch.autocast("cpu", enabled=False):
            x = input.to(self.running_mean.dtype)
            mean = AllReduceSum.apply(x.mean(dims)) / world_size
            centered = x - mean.view(shape)
            # A second pass about the common mean: E[x^2] - mean^2 would cancel in float32.
            variance = AllReduceSum.apply(centered.square().mean(dims)) / world_size
            with torch.no_grad():
                count = x.numel() // x.shape[1] * world_size
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            factor = (variance + self.eps).rsqrt()
            if not self.affine:
                return (centered * factor.view(shape)).to(input.dtype)
            scaled = centered * (factor * self.weight).view(shape) + self.bias.view(shape)
        return scaled.to(input.dtype)


class _KernelsOverRanks(torch.autograd.Function):
    """Collective, forward (one all-gather) and backward (one all-reduce): batch norm by the CUDA kernels that
    torch.nn.SyncBatchNorm calls, for batches of equal size. Statistics of half-precision input are float32.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor,
        eps: float, momentum: float,
    ) -> Tensor:
        x = _as_kernels_need_it(x)
        own = torch.stack(torch.batch_norm_stats(x, eps))  # mean and 1 / sqrt(var + eps): (2, channels)
        means, inverse_stds = all_gather_rows(own.unsqueeze(0), None).unbind(1)
        counts = running_mean.new_full((len(means),), x.numel() // x.shape[1])
        mean, inverse_std = torch.batch_norm_gather_stats_with_counts(
            x, means, inverse_stds, running_mean, running_var, momentum, eps, counts)
        ctx.save_for_backward(x, weight, mean, inverse_std)
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse_std, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_std = ctx.saved_tensors
        grad, needed = _as_kernels_need_it(grads[0]), ctx.needs_input_grad
        # DistributedDataParallel averages the gradients of weight and bias, so these are this rank's own.
        *sums, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
            grad, x, mean, inverse_std, weight, *needed[:3])
        grad_x = None
        if needed[0]:
            total = torch.stack(sums)
            dist.all_reduce(total)
            counts = torch.full((dist.get_world_size(),), x.numel() // x.shape[1], dtype=torch.int32, device=x.device)
            sum_grad, sum_grad_x = total.unbind()
            grad_x = torch.batch_norm_backward_elemt(grad, x, mean, inverse_std, weight, sum_grad, sum_grad_x, counts)
        return grad_x, grad_weight if needed[1] else None, grad_bias if needed[2] else None, None, None, None, None


def _as_kernels_need_it(x: Tensor) -> Tensor:
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def has_other_batchnorm(module: nn.Module) -> bool:
    """Whether `convert_sync_batchnorm` would change what the module computes: some of timm's BatchNorms do more, such
    as an activation, which is lost without an error, with torch's own conversion too.
    """
    return any(isinstance(layer, _BatchNorm) and type(layer).forward is not _BatchNorm.forward
               for layer in module.modules())


def convert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Replace every BatchNorm in `module`, in place, by one with statistics over all ranks. Returns the module.

    Parameters and buffers keep their names, values and requires_grad.
    """
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            synced = SyncBatchNorm(child.num_features, child.eps, child.momentum, child.affine)
            synced._parameters, synced._buffers = child._parameters, child._buffers
            setattr(module, name, synced)
        else:
            convert_sync_batchnorm(child)
    return module
