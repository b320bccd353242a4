"""--ema: an exponential moving average of the backbone's weights, which evaluations and exports use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """The average of a module's parameters and buffers, in their dtypes and on their devices. It starts from them.

    After each optimizer step, average += (1 - d) * (value - average) with d = min(decay, (1 + n) / (10 + n)). n counts
    the updates before, so that a short run is not dominated by its start (the rule of TensorFlow's
    ExponentialMovingAverage). Steps that were skipped are not counted and change nothing.

    BatchNorm's running statistics are averaged like the weights, as in timm's ModelEmaV2: the present ones belong to
    the present weights. Counters (num_batches_tracked) are copied.

    Parameters are the same on all ranks, so their average is too, with ZeRO as well. Buffers are each rank's own;
    evaluations and checkpoints use those of rank 0.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module, self._decay = module, decay
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Start again from the module's present values."""
        self._average = {name: value.clone() for name, value in self._module.state_dict().items()}
        device = next(iter(self._average.values())).device
        self._updates = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, skipped: Tensor | None = None) -> None:
        """Take in the module's values after an optimizer step, without waiting for the device.

        skipped: float32 scalar on the device; where it is 1, the average stays. None: the step was not skipped.
        """
        taken = torch.ones_like(self._updates) if skipped is None else 1 - skipped.double()
        weight = taken * (1 - ((1 + self._updates) / (10 + self._updates)).clamp(max=self._decay))
        self._updates += taken
        averages, values = [], []
        for name, value in self._module.state_dict().items():
            if value.is_floating_point():
                averages.append(self._average[name])
                values.append(value)
            else:
                self._average[name].copy_(value)
        changes = torch._foreach_sub(values, averages)
        torch._foreach_mul_(changes, weight.to(values[0].dtype))
        torch._foreach_add_(averages, changes)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Exchange the module's values and the average, and exchange them back at the end, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, value in self._module.state_dict().items():
            before = value.clone()
            value.copy_(self._average[name])
            self._average[name].copy_(before)

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores: the number of updates, and the average under the names of the module's weights."""
        return {"updates": self._updates, "state_dict": dict(self._average)}

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """Continue with what `state` returned."""
        self._updates.copy_(state["updates"])
        for name, average in self._average.items():
            average.copy_(state["state_dict"][name])
