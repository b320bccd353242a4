"""Optimizers, the learning-rate schedule, and a gradient scaler whose decision to skip a step all ranks share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from losses.margin_softmax import make_momentum
from utils.options import Options
from utils.sharding import is_sharded


def learning_rate(
    step: int, steps_per_epoch: int, *, base: float, milestones: Sequence[float], warmup_epochs: float
) -> float:
    """The rate of the step with number `step`, from 0: a linear rise to `base`, then a factor 0.1 at every milestone epoch.

    Counted in steps of a global batch, so it is the same at every world size.
    """
    warmup_steps = warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return base * min(1.0, (step + 1) / warmup_steps)
    return base * 0.1 ** sum(step >= milestone * steps_per_epoch for milestone in milestones)


class Optimizers:
    """SGD with momentum over the replicated parameters (optionally ZeRO) and, apart from it, over this rank's shard.

    The shard never goes into ZeroRedundancyOptimizer: after a step that broadcasts every parameter from its owner, and one
    rank's classes would overwrite those of all others.

    Args:
        model: with the sharded parameters registered (`utils.sharding.register_parallel_dim`).
        options: lr, momentum, weight_decay, enable_zero_optim, on_nonfinite.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
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
            self._named.append((SGD([parameter for _, parameter in sharded], **settings, fused=True), sharded))
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


def amp_dtype(options: Options, device_type: str) -> torch.dtype:
    """The autocast type of --enable-amp-mode: bf16 where the device has it, else fp16, unless the user chose."""
    if options.amp_dtype == "fp16":
        return torch.float16
    if options.amp_dtype == "bf16" or device_type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16
