"""Steps whose loss is not finite: left out on the device (--on-nonfinite skip), and never saved.

The host reads nothing for it in a step. Where a step must not count, its optimizers get a mask on the device (`utils.optim`),
and BatchNorm's running statistics, which the forward pass has changed by then, are put back through the same mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.errors import UserError

ADVICE = "lower --lr or raise --warmup-epochs; fp16: take --amp-dtype bf16; go on from the last checkpoint with --resume"


class NotFinite(UserError):
    """The training has come to numbers that are not finite. Raised on all ranks together."""


class StepGuard:
    """Finds out, on the device, whether a step counts, and takes back what its forward pass did to the buffers if not.

    Args:
        module: with the buffers that the forward pass changes.
        enabled: False: every method returns at once, and every step counts.
    """

    def __init__(self, module: nn.Module, *, enabled: bool) -> None:
        self._module, self._enabled = module, enabled
        self._before: list[tuple[list[Tensor], Tensor]] = []  # per dtype: the buffers, and their values in one tensor

    def remember(self) -> None:
        """Before the first forward pass of a step."""
        if not self._enabled:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for buffer in self._module.buffers():
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
        self._before = [(buffers, _flat(buffers)) for buffers in by_dtype.values()]

    def nonfinite(self, losses: Sequence[Tensor]) -> Tensor | None:
        """Collective if enabled. float32 scalar on the device, the same on all ranks: 1 if any rank's loss is inf or NaN, else 0.

        losses: of this rank's micro-batches, a scalar each. Returns None if not enabled.
        """
        if not self._enabled:
            return None
        found = torch.stack(list(losses)).isfinite().all().logical_not().float()
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found

    def take_back(self, nonfinite: Tensor | None) -> None:
        """After the optimizers' step: the buffers as they were at `remember`, if `nonfinite` is 1."""
        if not self._enabled:
            return
        for buffers, before in self._before:
            kept = torch.where(nonfinite > 0, before, _flat(buffers))
            for buffer, values in zip(buffers, kept.split([buffer.numel() for buffer in buffers])):
                buffer.copy_(values.view_as(buffer))
        self._before = []


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def require_finite_weights(backbone: nn.Module, centers: Tensor, step: int) -> None:
    """Collective. Raise NotFinite, on all ranks, if a weight anywhere is inf or NaN: then nothing must be saved.

    The losses do not tell: gradients that were not finite spoil the weights after a step whose loss was.
    centers: this rank's class centers (C_r, d).
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    finite = torch.stack([
        torch.stack([tensor.isfinite().all() for tensor in backbone.state_dict().values()]).all(),
        _is_finite(centers.detach()),
    ])
    bad = torch.zeros(world_size, 2, device=centers.device)
    bad[rank] = finite.logical_not().float()
    dist.all_reduce(bad)
    found = bad.tolist()
    parts = [f"{what} of {_ranks(ranks, world_size)}"
             for column, what in enumerate(("the backbone", "the class centers"))
             if (ranks := [number for number, row in enumerate(found) if row[column]])]
    if parts:
        raise NotFinite(f"after step {step} the weights are not finite ({', '.join(parts)}) and were not saved; {ADVICE}")


def _is_finite(centers: Tensor) -> Tensor:
    """bool scalar. In pieces: a mask of the whole shard would take a quarter of its size."""
    pieces = [piece.isfinite().all() for piece in centers.split(65536)] if len(centers) else []
    return torch.stack(pieces).all() if pieces else torch.ones((), dtype=torch.bool, device=centers.device)


def nonfinite_step(step: int, loss: float, found: list[tuple[bool, bool]]) -> str:
    """One line on a step whose loss was not finite: which rank it began with.

    found: for each rank, whether its embeddings and whether its own loss were not finite in that step. With sharded classes
    the loss is the same on every rank, but the embeddings are each rank's own; and if all of them are finite, what is left
    are the class centers.
    """
    embeddings = [rank for rank, (embedding, _) in enumerate(found) if embedding]
    losses = [rank for rank, (_, its_loss) in enumerate(found) if its_loss]
    if embeddings:
        cause = f"embeddings of {_ranks(embeddings, len(found))}"
    else:
        cause = f"loss of {_ranks(losses, len(found))}, though all embeddings were finite: the class centers, then"
    return f"step {step}: the loss is {loss} ({cause})"


def _ranks(ranks: list[int], world_size: int) -> str:
    if len(ranks) == world_size:
        return "all ranks" if world_size > 1 else "rank 0"
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return ("rank " if len(ranks) == 1 else "ranks ") + shown
