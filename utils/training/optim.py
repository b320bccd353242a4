"""Optimizers, the learning-rate schedule, and a gradient scaler whose decision to skip a step all ranks share."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import SGD, Optimizer
from torch.optim.sgd import sgd

from utils.dist.sharding import is_sharded
from utils.options import Options


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
    """SGD of one parameter that can step some rows at a time, within the backward pass (`update_rows`).

    Args:
        weight: the parameter, (rows, d).
        skip_nonfinite: skip the steps of a loss that is inf or NaN.
        lr, momentum, weight_decay: as in torch.optim.SGD.
    """

    def __init__(
        self, weight: nn.Parameter, *, skip_nonfinite: bool, lr: float, momentum: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        super().__init__([weight], lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
        self._skip_nonfinite = skip_nonfinite

    @torch.no_grad()
    def update_rows(self, rows: slice, grad: Tensor, finite: Tensor) -> None:
        """The optimizer's step for some rows.

        Args:
            rows: of the parameter.
            grad: their gradient, which may be overwritten.
            finite: bool scalar on the device; where it is False, skip_nonfinite leaves weights and momentum unchanged.
        """
        make_momentum(self)
        (settings,) = self.param_groups
        (weight,) = settings["params"]
        if settings["momentum"]:
            momentum = [self.state[weight]["momentum_buffer"][rows]]
        else:
            momentum = [None]
        sgd([weight.detach()[rows]], [grad], momentum, fused=True,
            found_inf=finite.logical_not().float() if self._skip_nonfinite else None, lr=settings["lr"],
            **{name: settings[name] for name in ("momentum", "weight_decay", "dampening", "nesterov", "maximize")})
        # The fused kernel does not say that it writes; with this, a second backward through the old weights is an error.
        increment_version(weight)


class Optimizers:
    """SGD with momentum over the replicated parameters (optionally ZeRO) and, apart from it, over this rank's shard.

    The shard never goes into ZeroRedundancyOptimizer: after a step that broadcasts every parameter from its owner, and one
    rank's classes would overwrite those of all others.

    Args:
        model: with the sharded parameters registered (`utils.sharding.register_parallel_dim`).
        options: lr, momentum, weight_decay, enable_zero_optim, on_nonfinite.
        row_sgd: the optimizer of the shard, if it steps in the backward pass.
    """

    def __init__(self, model: nn.Module, options: Options, row_sgd: RowSGD | None = None) -> None:
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        replicated = [(name, parameter) for name, parameter in trained if not is_sharded(parameter)]
        sharded = [(name, parameter) for name, parameter in trained if is_sharded(parameter)]
        settings = dict(lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay)
        # Parameter names beside each optimizer: momentum is saved by name, so that it does not matter who held it.
        self._named: list[tuple[Optimizer, list[tuple[str, nn.Parameter]]]] = []
        parameters = [parameter for _, parameter in replicated]
        # Of torch's three implementations only the fused one can leave a step out by a mask on the device.
        maskable = {"fused": True} if options.on_nonfinite == "skip" else {}
        self._zero: Optimizer | None = None
        if options.enable_zero_optim:
            from torch.distributed.optim import ZeroRedundancyOptimizer  # here: seconds of start-up that few need

            self._zero = ZeroRedundancyOptimizer(parameters, optimizer_class=SGD, **settings, **maskable)
            self._named.append((self._zero, replicated))
        else:
            self._named.append((SGD(parameters, **settings, **maskable), replicated))
        if sharded:
            # torch's other two implementations add the weight decay to a copy of the gradient: as much memory as the shard.
            self._named.append((row_sgd or SGD([parameter for _, parameter in sharded], **settings, fused=True), sharded))
        self.of_shard: SGD | None = self._named[-1][0] if sharded else None

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

    def momentum(self) -> dict[str, Tensor]:
        """Collective with ZeRO. Momentum by parameter name: what is replicated on rank 0 at least, a shard on its rank."""
        found: dict[str, Tensor] = {}
        for optimizer, named in self._named:
            if optimizer is self._zero:
                optimizer.consolidate_state_dict(to=0)
                if dist.get_rank() != 0:
                    continue
                states = optimizer.state_dict()["state"]
                buffers = [states.get(index, {}).get("momentum_buffer") for index in range(len(named))]
            else:
                buffers = [optimizer.state[parameter].get("momentum_buffer") for _, parameter in named]
            found.update({name: buffer for (name, _), buffer in zip(named, buffers) if buffer is not None})
        return found

    def load_momentum(self, momentum: dict[str, Tensor]) -> None:
        """Take over momentum by parameter name; a name that is missing starts without. Every rank gives all it trains."""
        for optimizer, named in self._named:
            packed = Optimizer.state_dict(optimizer)  # the base class's: ZeRO's own would ask for a consolidation
            packed["state"] = {
                index: {"momentum_buffer": _laid_out_like(parameter, momentum[name])}
                for index, (name, parameter) in enumerate(named) if name in momentum
            }
            optimizer.load_state_dict(packed)


def _laid_out_like(parameter: nn.Parameter, momentum: Tensor) -> Tensor:
    """The momentum in the parameter's memory layout: torch's fused SGD walks both as they lie, and a checkpoint may be of a run
    with the other setting of --channels-last. A shard's, which always fits, is not copied."""
    if momentum.stride() == parameter.stride() and momentum.device == parameter.device:
        return momentum
    return torch.empty_like(parameter, requires_grad=False).copy_(momentum)
