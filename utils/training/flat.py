"""Many tensors as one vector, so that one operator or one collective serves them all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def by_dtype(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors in their order, a list for each dtype."""
    found: dict[torch.dtype, list[Tensor]] = {}
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
