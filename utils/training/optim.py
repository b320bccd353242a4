"""The optimizers of a run, and the SGD step that the fused classifier update takes."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import SGD, Optimizer
from torch.optim.sgd import sgd

from utils.dist.sharding import is_sharded


def make_momentum(optimizer: Optimizer) -> None:
    """Give the optimizer the zeros from which momentum starts, where it has none yet.

    torch makes momentum in the first step. That is too late for a step that a mask on the device may skip, and a shard
    without classes, which never steps, needs it because the checkpoint expects it.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


class RowSGD(SGD):
    """SGD of one parameter (rows, d) that can step some rows at a time, within the backward pass (`update_rows`).

    skip_nonfinite: skip the steps of a loss that is inf or NaN. settings: lr, momentum, ... as in torch.optim.SGD.
    """

    def __init__(self, weight: nn.Parameter, *, skip_nonfinite: bool, **settings: Any) -> None:
        super().__init__([weight], **settings, fused=True)
        self._skip_nonfinite = skip_nonfinite

    @torch.no_grad()
    def update_rows(self, rows: slice, grad: Tensor, finite: Tensor) -> None:
        """The optimizer's step for some rows of the parameter. Their gradient may be overwritten.

        finite: bool scalar on the device; where it is False, skip_nonfinite leaves weights and momentum unchanged.
        """
        make_momentum(self)
        (settings,) = self.param_groups
        (weight,) = settings["params"]
        momentum = [self.state[weight]["momentum_buffer"][rows] if settings["momentum"] else None]
        sgd([weight.detach()[rows]], [grad], momentum, fused=True,
            found_inf=finite.logical_not().float() if self._skip_nonfinite else None, lr=settings["lr"],
            **{name: settings[name] for name in ("momentum", "weight_decay", "dampening", "nesterov", "maximize")})
        # The fused kernel does not say that it writes. Now a second backward through the old weights is an error.
        increment_version(weight)


# --optimizer NAME -> class
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
        row_sgd: the shard's optimizer, if it steps within the backward pass.
        backbone_lr_scale: the learning rate of backbone.* is that of the class centers times this.
    """

    def __init__(
        self, model: nn.Module, name: str, settings: dict[str, Any], *, zero: bool = False, skippable: bool = False,
        row_sgd: RowSGD | None = None, backbone_lr_scale: float = 1.0,
    ) -> None:
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        replicated, sharded = ([pair for pair in trained if is_sharded(pair[1]) == wanted] for wanted in (False, True))

        def group_of(named: tuple[str, nn.Parameter]) -> tuple[tuple[str, float], ...]:
            """The settings of the parameter's group that differ from those of all."""
            return (("lr_scale", backbone_lr_scale if named[0].startswith("backbone.") else 1.0),)

        replicated.sort(key=group_of)  # stable; the optimizer counts parameters group by group
        groups = [{"params": [parameter for _, parameter in members], **dict(own)}
                  for own, members in itertools.groupby(replicated, group_of)]
        make: Any = OPTIMIZERS[name]
        make_replicated = make
        if zero:
            # Importing it takes seconds, and few runs use it.
            from torch.distributed.optim import ZeroRedundancyOptimizer

            make_replicated = functools.partial(ZeroRedundancyOptimizer, optimizer_class=make)
        fused = {"fused": True} if skippable else {}
        # The names go with each optimizer: state is saved by name, whoever holds it.
        self._named: list[tuple[Optimizer, list[tuple[str, nn.Parameter]]]] = []
        if replicated:  # --freeze backbone leaves only the shard
            self._named.append((make_replicated(groups, **settings, **fused), replicated))
        if sharded:
            # Fused: torch's other implementations copy the gradient, which is as large as the shard, for weight decay.
            shard = row_sgd or make([parameter for _, parameter in sharded], **settings, fused=True)
            self._named.append((shard, sharded))

    @property
    def all(self) -> list[Optimizer]:
        return [optimizer for optimizer, _ in self._named]

    def set_learning_rate(self, rate: float) -> None:
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)

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
