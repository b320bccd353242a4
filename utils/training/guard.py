"""Steps whose loss is not finite: skip them on the device, or end the run; never save what they left behind.

No step waits for the device. A skipped step (--on-nonfinite skip) is masked on the device: the optimizers apply the
mask (utils/training/optim.py), and it rolls back BatchNorm's running statistics, which the forward pass has already
changed. The losses are read when they are logged, and StepGuard.check then decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.errors import UserError

ADVICE = ("lower --lr or raise --warmup-epochs; with fp16 use --amp-dtype bf16; "
          "continue from the last checkpoint with --resume")

# This many steps in a row without a finite loss are not a few bad batches: the weights are lost.
_MAX_NONFINITE_IN_A_ROW = 100


class NotFinite(UserError):
    """Losses or weights are inf or NaN. Raised on all ranks together."""


@dataclass(frozen=True)
class StepLoss:
    """The loss of a step, the mean over all ranks.

    nonfinite: for each rank, whether its embeddings and its own loss were inf or NaN; empty if the loss is finite.
    """

    step: int
    loss: float
    nonfinite: Sequence[tuple[bool, bool]] = ()

    def describe(self) -> str:
        """One line that names the ranks whose numbers were not finite.

        With sharded classes all ranks have the same loss, but each rank has its own embeddings. If all embeddings are
        finite, only the class centers are left as the cause.
        """
        embeddings = [rank for rank, (embedding, _) in enumerate(self.nonfinite) if embedding]
        losses = [rank for rank, (_, loss) in enumerate(self.nonfinite) if loss]
        world_size = len(self.nonfinite)
        cause = (f"embeddings of {_ranks(embeddings, world_size)}" if embeddings else
                 f"loss of {_ranks(losses, world_size)}; all embeddings were finite, so look at the class centers")
        return f"step {self.step}: the loss is {self.loss} ({cause})"


class StepGuard:
    """Decides whether steps count and whether a run may continue.

    Args:
        module: its buffers are rolled back when a step is skipped.
        skip: skip steps with a loss that is not finite (--on-nonfinite skip). False: every step counts, snapshot and
            rollback do nothing, and `check` ends the run at the first such loss.
    """

    def __init__(self, module: nn.Module, *, skip: bool) -> None:
        self._module, self._skip = module, skip
        self._snapshot: list[tuple[list[Tensor], Tensor]] = []  # per dtype: buffers, and their values in one tensor
        self._nonfinite_in_a_row = 0

    def snapshot(self) -> None:
        """Copy the buffers, before the first forward pass of a step."""
        if not self._skip:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for buffer in self._module.buffers():
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
        self._snapshot = [(buffers, _flatten(buffers)) for buffers in by_dtype.values()]

    def nonfinite(self, losses: Sequence[Tensor]) -> Tensor | None:
        """Collective with `skip`. 1 if any loss of any rank is inf or NaN, else 0: a float32 scalar on the device.

        losses: scalars, this rank's micro-batches. Returns None without `skip`.
        """
        if not self._skip:
            return None
        found = torch.stack(list(losses)).isfinite().all().logical_not().float()
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found

    def rollback(self, nonfinite: Tensor | None) -> None:
        """Restore the buffers if `nonfinite` is 1, after the optimizers' step."""
        if nonfinite is None:
            return
        for buffers, before in self._snapshot:
            values = torch.where(nonfinite > 0, before, _flatten(buffers))
            for buffer, value in zip(buffers, values.split([buffer.numel() for buffer in buffers])):
                buffer.copy_(value.view_as(buffer))
        self._snapshot = []

    def check(self, steps: Sequence[StepLoss]) -> None:
        """Look at losses that TrainingLog has read, each step once and in order. Call it on all ranks.

        Raises NotFinite for the first loss that is not finite, or with `skip` after a hundred of them in a row.
        """
        for step in steps:
            if not step.nonfinite:
                self._nonfinite_in_a_row = 0
                continue
            self._nonfinite_in_a_row += 1
            if not self._skip:
                raise NotFinite(f"{step.describe()}; training stopped and no checkpoint was overwritten. {ADVICE}, "
                                "or skip such steps with --on-nonfinite skip")
        if self._nonfinite_in_a_row >= _MAX_NONFINITE_IN_A_ROW:
            raise NotFinite(f"{steps[-1].describe()}, like the {self._nonfinite_in_a_row} steps in a row that "
                            f"--on-nonfinite skip has skipped; {ADVICE}")


def require_finite_weights(backbone: nn.Module, centers: Tensor, step: int) -> None:
    """Collective. Raise NotFinite, on all ranks, if a weight on any rank is inf or NaN and so must not be saved.

    Finite losses do not imply finite weights: the gradients of the last step may have overflowed.
    centers: this rank's class centers (C_r, d).
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tensors = [*backbone.state_dict().values()]
    # In blocks, because a mask of all centers would take a quarter of their memory.
    centers_finite = [block.isfinite().all() for block in centers.detach().split(65536)]
    bad = torch.zeros(world_size, 2, device=centers.device)
    for column, finite in enumerate(([tensor.isfinite().all() for tensor in tensors], centers_finite)):
        if finite:
            bad[rank, column] = torch.stack(finite).all().logical_not()
    dist.all_reduce(bad)
    found = bad.tolist()
    parts = [f"{what} of {_ranks(ranks, world_size)}"
             for column, what in enumerate(("the backbone", "the class centers"))
             if (ranks := [number for number, row in enumerate(found) if row[column]])]
    if parts:
        raise NotFinite(f"after step {step} the weights are not finite ({', '.join(parts)}) and were not saved; "
                        f"{ADVICE}")


def _flatten(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _ranks(ranks: list[int], world_size: int) -> str:
    if len(ranks) == world_size:
        return "all ranks" if world_size > 1 else "rank 0"
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return ("rank " if len(ranks) == 1 else "ranks ") + shown
