"""torch's kernels for batch norm over several processes, which exist on CUDA only, in plain PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, library


@contextlib.contextmanager
def kernels_everywhere() -> Iterator[None]:
    """Within it the kernels also run on the CPU and on fake tensors. They demand the dtypes that those on CUDA do."""
    with library._scoped_library("aten", "IMPL") as aten:
        for kernel in (batch_norm_stats, batch_norm_gather_stats_with_counts, batch_norm_elemt,
                       batch_norm_backward_reduce, batch_norm_backward_elemt):
            for key in ("CPU", "Meta"):
                aten.impl(kernel.__name__, kernel, key)
        yield


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.dim() - 2))


def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x.to(_statistics_dtype(x))
    return x.mean(_dims(x)), (x.var(_dims(x), correction=0) + eps).rsqrt()


def batch_norm_gather_stats_with_counts(
    x: Tensor, means: Tensor, inverse_stds: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float,
    eps: float, counts: Tensor,
) -> tuple[Tensor, Tensor]:
    assert means.dtype == inverse_stds.dtype == _statistics_dtype(x) and counts.dtype == running_mean.dtype
    assert means.shape == inverse_stds.shape == (*counts.shape, x.shape[1])
    counts, total = counts.unsqueeze(1), counts.sum()
    mean = (counts * means).sum(0) / total
    variance = (counts * (inverse_stds**-2 - eps + (means - mean).square())).sum(0) / total
    running_mean.mul_(1 - momentum).add_(momentum * mean)
    running_var.mul_(1 - momentum).add_(momentum * variance * total / (total - 1))
    return mean, (variance + eps).rsqrt()


def batch_norm_elemt(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, inverse_std: Tensor, eps: float
) -> Tensor:
    assert mean.dtype == inverse_std.dtype == _statistics_dtype(x)
    out = (x - _by_channel(mean, x)) * _by_channel(inverse_std, x)
    if weight is not None:
        out = out * _by_channel(weight, x) + _by_channel(bias, x)
    return out.to(x.dtype)


def batch_norm_backward_reduce(
    grad: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor | None, input_g: bool, weight_g: bool,
    bias_g: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert grad.dtype == x.dtype and mean.dtype == _statistics_dtype(x)
    sum_dy = grad.to(mean.dtype).sum(_dims(x))
    sum_dy_xmu = (grad.to(mean.dtype) * (x - _by_channel(mean, x))).sum(_dims(x))
    return sum_dy.clone(), sum_dy_xmu, sum_dy_xmu * inverse_std, sum_dy


def batch_norm_backward_elemt(
    grad: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor | None, sum_dy: Tensor,
    sum_dy_xmu: Tensor, counts: Tensor,
) -> Tensor:
    assert counts.dtype == torch.int32 and (weight is None or weight.dtype == mean.dtype == sum_dy.dtype)
    total = counts.sum()
    factor = inverse_std if weight is None else inverse_std * weight
    centered = x - _by_channel(mean, x)
    out = (grad - _by_channel(sum_dy / total, x)
           - centered * _by_channel(inverse_std.square() * sum_dy_xmu / total, x)) * _by_channel(factor, x)
    return out.to(x.dtype)
