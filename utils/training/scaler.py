"""Mixed precision: the autocast type, and a gradient scaler whose decision to skip a step all ranks share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from utils.training.optim import make_momentum


class SharedGradScaler(torch.amp.GradScaler):
    """fp16 loss scaling in which all ranks, and all optimizers, skip a step together.

    torch's scaler looks at the gradients of its own process: an overflow in one shard would make one rank skip and the
    others step, and the replicas would differ from then on without a word.
    """

    def step_all(self, optimizers: Sequence[Optimizer], nonfinite: Tensor | None = None) -> None:
        """Collective when enabled. Unscale, agree on whether any gradient anywhere is inf or NaN, step or skip, update.

        nonfinite: float32 scalar on the device, the same on all ranks: where it is 1, weights and momentum stay as they are,
            and so does the scale, because that cannot be the cause of a loss that is inf or NaN. The optimizers must be
            torch's fused ones then (or ZeRO of them). None: every step counts, as far as the scale is concerned.
        """
        if nonfinite is not None:
            for optimizer in map(_local_optimizer, optimizers):
                optimizer.found_inf = nonfinite
        if self.is_enabled() or nonfinite is not None:
            # The fused SGD makes its momentum as memory that is not written, for the first step to fill: if that step is left
            # out, what happened to be there would be the momentum of the second.
            for optimizer in map(_local_optimizer, optimizers):
                make_momentum(optimizer)
        if self.is_enabled():
            for optimizer in optimizers:
                self.unscale_(optimizer)
            found = [
                flag
                for optimizer in optimizers
                for flag in self._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values()
            ]
            anywhere = torch.stack(found if nonfinite is None else [*found, nonfinite]).max()
            dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
            for flag in found:
                flag.fill_(anywhere)
        for optimizer in optimizers:
            self.step(optimizer)
        if not self.is_enabled() or nonfinite is None:
            self.update()
            return
        before = self._scale.clone(), self._growth_tracker.clone()
        self.update()
        for state, old in zip((self._scale, self._growth_tracker), before):
            state.copy_(torch.where(nonfinite > 0, old, state))


def _local_optimizer(optimizer: Optimizer) -> Optimizer:
    """ZeRO's optimizer of the parameters that this rank steps; any other optimizer itself."""
    return getattr(optimizer, "optim", optimizer)


def amp_dtype(choice: str | None, device_type: str) -> torch.dtype:
    """The autocast type for --amp-dtype: "fp16", "bf16", or (auto, None) bf16 if the device supports it, else fp16."""
    if choice == "fp16":
        return torch.float16
    if choice == "bf16" or device_type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16
