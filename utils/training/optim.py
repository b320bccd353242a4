"""The optimizers of a run, and the SGD step that the fused classifier update takes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from utils.dist.sharding import is_sharded


def make_momentum(optimizer: SGD) -> None:
    """Zeros where SGD has no momentum yet, from which its first step goes as it would without.

    torch makes it within the first step: too late for a step that is made, or left out, by a mask; and a shard without classes
    must have it as well, because what saves the shards counts on it.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _sgd_step(optimizer: SGD, rows: slice, grad: Tensor, finite: Tensor | None = None) -> None:
    """torch.optim.SGD's step (momentum, weight decay) for some rows of its one parameter; `grad` is overwritten.

    finite: bool scalar on the device; where it is False, parameter and momentum keep their values. None: they change.
    """
    (settings,) = optimizer.param_groups
    (parameter,) = settings["params"]
    if finite is not None:
        # The step as it is, then back: a gradient of zeros would not do, momentum and weight decay go on without one.
        changed = [parameter.detach()[rows]]
        if settings["momentum"]:
            changed.append(optimizer.state[parameter]["momentum_buffer"][rows])
        before = [tensor.clone() for tensor in changed]
        _sgd_step(optimizer, rows, grad)
        for tensor, old in zip(changed, before):
            tensor.copy_(torch.where(finite, tensor, old))
        return
    weight = parameter.detach()[rows]
    grad.add_(weight, alpha=settings["weight_decay"])
    if settings["momentum"]:
        grad = optimizer.state[parameter]["momentum_buffer"][rows].mul_(settings["momentum"]).add_(grad)
    weight.add_(grad, alpha=-settings["lr"])


# Optimizers by the name that --optimizer would give them.
OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": SGD}


class Optimizers:
    """One optimizer for the replicated parameters (with ZeRO or without), and one for this rank's shard of classes.

    The shard must not be in ZeroRedundancyOptimizer. After each step, that broadcasts every parameter from its owner:
    one rank's classes would overwrite all others.

    Args:
        model: its sharded parameters are registered (`utils.dist.sharding.register_parallel_dim`).
        name: in OPTIMIZERS.
        settings: the optimizer's arguments, such as lr, momentum and weight_decay.
        zero: shard the replicated parameters' state with ZeroRedundancyOptimizer.
        skippable: a mask on the device can skip a step, which of torch's implementations only the fused one offers.
    """

    def __init__(
        self, model: nn.Module, name: str, settings: dict[str, Any], *, zero: bool = False, skippable: bool = False
    ) -> None:
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        replicated = [(name, parameter) for name, parameter in trained if not is_sharded(parameter)]
        sharded = [(name, parameter) for name, parameter in trained if is_sharded(parameter)]
        parameters = [parameter for _, parameter in replicated]
        make: Any = OPTIMIZERS[name]
        replicated_settings = {**settings, "fused": True} if skippable else settings
        # The names go with each optimizer: state is saved by name, whoever holds it.
        self._named: list[tuple[Optimizer, list[tuple[str, nn.Parameter]]]] = []
        if zero:
            # Importing it takes seconds, and few runs use it.
            from torch.distributed.optim import ZeroRedundancyOptimizer

            optimizer = ZeroRedundancyOptimizer(parameters, optimizer_class=make, **replicated_settings)
            self._named.append((optimizer, replicated))
        else:
            self._named.append((make(parameters, **replicated_settings), replicated))
        if sharded:
            # Fused: torch's other implementations copy the gradient, which is as large as the shard, for weight decay.
            self._named.append((make([parameter for _, parameter in sharded], **settings, fused=True), sharded))
        self.of_shard: Optimizer | None = self._named[-1][0] if sharded else None

    @property
    def all(self) -> list[Optimizer]:
        return [optimizer for optimizer, _ in self._named]

    def set_learning_rate(self, rate: float) -> None:
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def zero_grad(self) -> None:
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Collective with ZeRO. {parameter: {state: tensor}}: {"backbone.conv1.weight": {"momentum_buffer": ...}, ...}.

        Replicated parameters are complete on rank 0, and with ZeRO absent on other ranks; a shard is on its own rank.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for optimizer, named in self._named:
            if hasattr(optimizer, "consolidate_state_dict"):  # ZeRO
                optimizer.consolidate_state_dict(to=0)
                if dist.get_rank() != 0:
                    continue
                by_index = optimizer.state_dict()["state"]
                states = [by_index.get(index, {}) for index in range(len(named))]
            else:
                states = [optimizer.state[parameter] for _, parameter in named]
            for (name, _), values in zip(named, states):
                if tensors := {key: value for key, value in values.items() if isinstance(value, Tensor)}:
                    found[name] = tensors
        return found

    def load_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Load state by parameter and state name. Every rank passes all it trains; other parameters start without."""
        for optimizer, named in self._named:
            packed = Optimizer.state_dict(optimizer)  # ZeRO's own method would require a consolidation first.
            packed["state"] = {
                index: {key: _laid_out_like(parameter, value) for key, value in state[name].items()}
                for index, (name, parameter) in enumerate(named) if name in state
            }
            optimizer.load_state_dict(packed)


def _laid_out_like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """The value in the parameter's memory layout, copied if it differs. Scalars stay as they are.

    torch's fused optimizers walk both in memory order, and --channels-last may have changed since the save.
    """
    if value.shape != parameter.shape or value.stride() == parameter.stride() and value.device == parameter.device:
        return value
    return torch.empty_like(parameter, requires_grad=False).copy_(value)
