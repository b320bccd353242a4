"""Collectives with gradients, and small ones for agreement between ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from utils.dist.context import DistContext
from utils.errors import UserError


# torch 2.14 renamed these two and warns of the old names, which are all that 2.11 has.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


# ---------------------------------------------------------------------------------------------------------------------
# Collectives


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Collective over the group. The sum over its ranks, as a new tensor without a graph; `group` None: this process alone."""
    if group is None:
        return tensor
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def all_gather_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Collective over the group. (n, ...) of every rank -> (n * W, ...) in rank order, without a graph."""
    gathered = rows.new_empty(rows.shape[0] * dist.get_world_size(group), *rows.shape[1:])
    _all_gather(gathered, rows.detach().contiguous(), group=group)
    return gathered


class GatherRows(torch.autograd.Function):
    """Collective over the group, both ways. `GatherRows.apply(rows (n, d), group) -> (n * W, d)` in rank order.

    Backward sums the ranks' parts of the gradient and gives each rank that of its own rows, times W: the rows come from
    a backbone under DistributedDataParallel, which averages gradients over the W ranks, where the gradient of a loss that is
    already the mean over all rows is their sum. Without the factor the backbone would learn W times too slowly.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather_rows(rows, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        world_size = dist.get_world_size(ctx.group)
        mine = grad.new_empty(grad.shape[0] // world_size, *grad.shape[1:])
        _reduce_scatter(mine, grad.contiguous(), group=ctx.group)
        return mine * world_size, None


def broadcast_integer(value: int, device: torch.device) -> int:
    """Collective. Rank 0's value, below 2**63, on every rank."""
    tensor = torch.tensor([value], dtype=torch.int64, device=device)
    dist.broadcast(tensor, src=0)
    return int(tensor)


def require_same_on_all_ranks(context: DistContext, facts: dict[str, object]) -> None:
    """Collective. Raise UserError, naming the first difference, unless every rank gives the facts that rank 0 gives.

    Nodes that differ in them would train something else than they were asked to, without a word, or wait for ever.
    """
    of_rank_0 = [facts]
    dist.broadcast_object_list(of_rank_0, src=0, device=context.device)
    mine = {name: value for name, value in facts.items() if value != of_rank_0[0].get(name)}
    # The first rank that differs tells all.
    differing = torch.tensor(context.rank if mine else context.world_size, device=context.device)
    dist.all_reduce(differing, op=dist.ReduceOp.MIN)
    if differing < context.world_size:
        difference = [next(iter(mine.items()), None)]
        dist.broadcast_object_list(difference, src=int(differing), device=context.device)
        name, value = difference[0]
        raise UserError(f"{name} is {value} on rank {int(differing)} and {of_rank_0[0].get(name)} on rank 0: "
                        "give every node the same flags and the same data")


class AllReduceSum(torch.autograd.Function):
    """Collective over all ranks, both ways: the sum of the ranks' tensors, for a loss that is the sum of all ranks'."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        return all_reduce_sum(tensor, dist.group.WORLD)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return all_reduce_sum(grad, dist.group.WORLD)
