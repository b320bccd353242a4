"""Collectives: with gradients, and small ones by which ranks agree."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from utils.dist.context import DistContext
from utils.errors import UserError

# torch 2.14 renamed these and warns about the old names; 2.11 has only those.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Collective. The sum over the group's ranks, as a new tensor without a graph. `group` None: this process alone."""
    if group is None:
        return tensor
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def all_gather_rows(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Collective. (n, ...) of every rank -> (n * W, ...) in rank order, without a graph. `group` None: all ranks."""
    gathered = rows.new_empty(rows.shape[0] * dist.get_world_size(group), *rows.shape[1:])
    _all_gather(gathered, rows.detach().contiguous(), group=group)
    return gathered


class GatherRows(torch.autograd.Function):
    """Collective, forward and backward. `GatherRows.apply(rows (n, d), group) -> (n * W, d)` in rank order.

    Backward sums the gradient over the ranks, gives each rank the part of its own rows, and multiplies it by W. The
    rows come from a backbone under DistributedDataParallel, which averages gradients over W ranks; but the loss is
    already the mean over all rows, so its gradient is the sum. Without the factor the backbone would learn W times too
    slowly.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather_rows(rows, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        world_size = dist.get_world_size(ctx.group)
        own = grads[0].new_empty(grads[0].shape[0] // world_size, *grads[0].shape[1:])
        _reduce_scatter(own, grads[0].contiguous(), group=ctx.group)
        return own * world_size, None


class AllReduceSum(torch.autograd.Function):
    """Collective, forward and backward. The sum over all ranks, for a loss that is the sum of all ranks' losses."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return all_reduce_sum(tensor, dist.group.WORLD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return all_reduce_sum(grads[0], dist.group.WORLD)


def broadcast_integer(value: int, device: torch.device) -> int:
    """Collective. Rank 0's value on every rank."""
    return all_gather_json(value, device)[0]


def all_gather_json(value: Any, device: torch.device, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Collective. Every rank's value, in rank order: what JSON can hold, and unlike a pickle it runs no code.

    `group` None: all ranks. Tuples arrive as lists, and other objects as their `str`.
    """
    text = torch.frombuffer(bytearray(json.dumps(value, default=str).encode()), dtype=torch.uint8).to(device)
    sizes = all_gather_rows(torch.tensor([len(text)], device=device), group).tolist()
    padded = text.new_zeros(1, max(sizes))
    padded[0, :len(text)] = text
    rows = all_gather_rows(padded, group).cpu()
    return [json.loads(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes)]


def require_same_on_all_ranks(context: DistContext, facts: dict[str, Any]) -> None:
    """Collective. Raise UserError, naming the first difference, unless every rank gives the facts that rank 0 gives."""
    first, *others = all_gather_json(facts, context.device)
    for rank, other in enumerate(others, start=1):
        for name, value in other.items():
            if value != first.get(name):
                raise UserError(f"{name} is {value} on rank {rank} and {first.get(name)} on rank 0: "
                                "give every node the same flags and the same data")
