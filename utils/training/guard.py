"""Steps whose loss is not finite: skip them on the device, or end the run; never save what they left behind.

No step waits for the device. A skipped step (--on-nonfinite skip) is masked on the device: the optimizers apply the
mask (utils/training/optim.py), and it rolls back BatchNorm's running statistics, which the forward pass has already
changed. The losses are read when they are logged, and StepGuard.check then decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.dist.collectives import all_gather_rows
from utils.errors import UserError
from utils.training.flat import by_dtype, flatten, unflatten_into

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
    skipped: the loss is finite, but the step was skipped, because gradients were not.
    """

    step: int
    loss: float
    nonfinite: Sequence[Sequence[bool]] = ()
    skipped: bool = False

    def describe(self) -> str:
        """One line that names the ranks whose numbers were not finite.

        With sharded classes all ranks have the same loss, but each rank has its own embeddings. If all embeddings are
        finite, only the class centers are left as the cause.
        """
        if not self.nonfinite:
            return f"step {self.step}: gradients are inf or NaN (the loss is {self.loss:g})"
        embeddings, losses = zip(*self.nonfinite)
        cause = (f"embeddings of {_ranks(embeddings)}" if any(embeddings) else
                 f"loss of {_ranks(losses)}; all embeddings were finite, so look at the class centers")
        return f"step {self.step}: the loss is {self.loss} ({cause})"


class StepGuard:
    """Decides whether steps count and whether a run may continue.

    module: its buffers are rolled back when a step is skipped.
    skip: skip steps with a loss that is not finite (--on-nonfinite skip). Without it, snapshot and rollback do nothing,
        and `check` ends the run at the first such loss.
    """

    def __init__(self, module: nn.Module, *, skip: bool) -> None:
        self._module, self._skip = module, skip
        self._snapshot: list[Tensor] = []  # a vector for each dtype
        self._nonfinite_in_a_row = 0

    def snapshot(self) -> None:
        """Copy the buffers, before the first forward pass of a step."""
        if self._skip:
            self._snapshot = [flatten(buffers) for buffers in by_dtype(self._module.buffers())]

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
        if nonfinite is not None:
            for buffers, before in zip(by_dtype(self._module.buffers()), self._snapshot):
                unflatten_into(torch.where(nonfinite > 0, before, flatten(buffers)), buffers)

    def check(self, steps: Sequence[StepLoss]) -> None:
        """Look at losses that TrainingLog has read, each step once and in order. Call it on all ranks.

        Raises NotFinite for the first loss that is not finite, or with `skip` after a hundred of them in a row, and
        after a hundred steps in a row that were skipped for their gradients.
        """
        for step in steps:
            self._nonfinite_in_a_row = self._nonfinite_in_a_row + 1 if step.nonfinite or step.skipped else 0
            if step.nonfinite and not self._skip:
                raise NotFinite(f"{step.describe()}; training stopped and no checkpoint was overwritten. {ADVICE}, "
                                "or skip such steps with --on-nonfinite skip")
        if self._nonfinite_in_a_row >= _MAX_NONFINITE_IN_A_ROW:
            raise NotFinite(f"{steps[-1].describe()}, like the {self._nonfinite_in_a_row} steps in a row that were "
                            f"skipped; {ADVICE}")


def require_finite_weights(backbone: nn.Module, centers: Tensor, step: int) -> None:
    """Collective. Raise NotFinite, on all ranks, if a weight on any rank is inf or NaN and so must not be saved.

    Finite losses do not imply finite weights: the gradients of the last step may have overflowed.
    centers: this rank's class centers (C_r, d).
    """
    # In blocks, because a mask of all centers would take a quarter of their memory.
    own = torch.stack([_any_nonfinite(backbone.state_dict().values()), _any_nonfinite(centers.detach().split(65536))])
    of_backbone, of_centers = zip(*all_gather_rows(own.unsqueeze(0), None).tolist())
    parts = [f"{what} of {_ranks(found)}"
             for what, found in (("the backbone", of_backbone), ("the class centers", of_centers)) if any(found)]
    if parts:
        raise NotFinite(f"after step {step} the weights are not finite ({', '.join(parts)}) and were not saved; "
                        f"{ADVICE}")


def _any_nonfinite(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([tensor.isfinite().all() for tensor in tensors]).all().logical_not().to(torch.uint8)


def _ranks(found: Sequence[bool]) -> str:
    ranks = [str(rank) for rank, here in enumerate(found) if here]
    if len(ranks) == len(found) > 1:
        return "all ranks"
    shown = ", ".join(ranks[:8]) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return ("rank " if len(ranks) == 1 else "ranks ") + shown
