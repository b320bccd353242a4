"""Many tensors as one vector, so that one operator or one collective serves them all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound=Tensor)


def by_dtype(tensors: Iterable[T]) -> list[list[T]]:
    """The tensors in their order, a list for each dtype."""
    found: dict[torch.dtype, list[T]] = {}
    for tensor in tensors:
        found.setdefault(tensor.dtype, []).append(tensor)
    return list(found.values())


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """(n,), a copy of the values of tensors of one dtype and device, one after another."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def unflatten_into(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Write (n,), the values of all `tensors` as `flatten` orders them, into the tensors."""
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_([tensor.detach() for tensor in tensors],
                         [part.view(tensor.shape) for part, tensor in zip(parts, tensors)])


def memory_order(tensor: Tensor) -> list[int]:
    """The dimensions of a tensor, from the one with the largest stride to that with the smallest."""
    return sorted(range(tensor.dim()), key=tensor.stride().__getitem__, reverse=True)


def in_memory_order(tensor: Tensor, like: Tensor) -> Tensor:
    """(n,), the values of `tensor` in the order in which those of `like`, of the same shape, lie in memory.

    A view if they lie so in `tensor` too, without gaps, otherwise a copy.
    """
    return tensor.permute(memory_order(like)).reshape(-1)
