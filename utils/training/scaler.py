"""Mixed precision: the autocast dtype, and a gradient scaler whose decision to skip a step all ranks share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from utils.dist.collectives import all_gather_json
from utils.dist.context import DistContext
from utils.training.clip import GradientClip


class SharedGradScaler(torch.amp.GradScaler):
    """fp16 loss scaling in which all ranks, and all optimizers, skip a step together.

    torch's scaler looks at the gradients of its own process. An overflow in one shard would make one rank skip while
    the others step, and the replicas would silently diverge.
    """

    def step_all(
        self, optimizers: Sequence[Optimizer], nonfinite: Tensor | None = None, clip: GradientClip | None = None
    ) -> Tensor | None:
        """Collective when enabled. Unscale, agree on whether any gradient anywhere is inf or NaN, step or skip, update.

        Args:
            optimizers: all of this rank's, with their state (`utils.training.zero.make_state`): torch's fused SGD
                allocates momentum without writing it, for the first step to fill. If that step were skipped, the second
                one would read whatever the memory holds. With `nonfinite` they must be torch's fused ones, or ZeRO of
                them.
            nonfinite: float32 scalar on the device, the same on all ranks. Where it is 1, weights and state stay.
                The scale stays too, since it cannot have caused a loss that is inf or NaN. None: no step is masked.
            clip: limits the gradients after they are unscaled. If their norm is inf or NaN, a step that can be skipped
                is skipped.

        Returns a float32 scalar on the device: 1 if the step was skipped; None if it cannot have been.
        """
        if not self.is_enabled():
            if clip is not None:
                norm = clip()
                if nonfinite is not None:
                    nonfinite = torch.maximum(nonfinite, norm.isfinite().logical_not().float())
            for optimizer in optimizers:
                if nonfinite is not None:
                    optimizer.found_inf = nonfinite  # type: ignore[attr-defined]  # of fused steps
                optimizer.step()
            return nonfinite
        for optimizer in optimizers:
            self.unscale_(optimizer)
        found = [flag for optimizer in optimizers
                 for flag in self._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values()]
        masks = found if nonfinite is None else [*found, nonfinite]
        if clip is not None:
            masks = [*masks, clip().isfinite().logical_not().float()]
        skipped = torch.stack(masks).max()
        dist.all_reduce(skipped, op=dist.ReduceOp.MAX)
        for flag in found:
            flag.fill_(skipped)
        for optimizer in optimizers:
            self.step(optimizer)
        assert self._scale is not None and self._growth_tracker is not None
        states = self._scale, self._growth_tracker
        before = [state.clone() for state in states]
        self.update()  # in place
        if nonfinite is not None:
            for state, old in zip(states, before):
                state.copy_(torch.where(nonfinite > 0, old, state))
        return skipped


def amp_dtype(choice: str | None, device: torch.device) -> torch.dtype:
    """The autocast dtype for --amp-dtype auto|bf16|fp16. auto, or None: bf16 where the device has it, else fp16."""
    if choice == "fp16":
        return torch.float16
    # Not torch.cuda.is_bf16_supported, which asks about the current GPU: GPU 0 until a rank has set its own.
    if choice == "bf16" or device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return torch.float16


def shared_amp_dtype(choice: str | None, context: DistContext) -> torch.dtype:
    """Collective. `amp_dtype` of all ranks, which must be one, for their collectives: bf16 only if all can use it."""
    own = amp_dtype(choice, context.device)
    dtypes = set(all_gather_json(str(own), context.device))
    if len(dtypes) > 1 and context.is_main:
        print("--amp-dtype auto: not all GPUs of this run have bfloat16, so all ranks use float16", flush=True)
    return own if len(dtypes) == 1 else torch.float16
