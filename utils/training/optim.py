"""The optimizers of a run, and the steps that the fused classifier update takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from utils.dist.sharding import is_sharded
from utils.training.zero import ZeroOptimizer, make_state

if TYPE_CHECKING:
    from losses.triton_kernels import Projection


class RowOptimizer(Optimizer):
    """An optimizer of one parameter (rows, d) that can step some rows alone: within the backward pass (`update_rows`),
    or those of a sparse gradient (`step`), which is that of sampled classes.

    skip_nonfinite: skip the steps of a loss that is inf or NaN. settings: lr, ... of the torch.optim class.
    """

    def __init__(self, weight: nn.Parameter, *, skip_nonfinite: bool, **settings: Any) -> None:
        torch_class: Any = super()  # SGD or AdamW
        torch_class.__init__([weight], **settings, fused=True)
        self._skip_nonfinite = skip_nonfinite

    @torch.no_grad()
    def update_rows(
        self, rows: slice | Tensor, grad: Tensor, finite: Tensor, stepped: Tensor | None = None,
        projection: Projection | None = None,
    ) -> None:
        """The optimizer's step for some rows of the parameter. Their gradient may be overwritten.

        rows: of sampled classes an int64 tensor (K,).
        finite: bool scalar on the device; where it is False, skip_nonfinite leaves weights and state unchanged.
        stepped: bool (K,), rows that have had their step. If it is given, a row may be there several times: its first
            gradient and `stepped` count.
        projection: projects the gradient before the step. None: it already is the gradient of the rows.
        """
        mask = finite if self._skip_nonfinite else None
        self._update_rows(rows, grad, stepped, lambda here, grad: self._step_finite(here, grad, mask, projection))

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """The optimizer's step. Of a sparse gradient it steps only the rows that the gradient has.

        The other rows stay as they are, and so does their state.
        """
        (weight,) = self.param_groups[0]["params"]
        if weight.grad is None or not weight.grad.is_sparse:
            return super().step(closure)
        make_state(self)  # also if the gradient has no rows
        found_inf = getattr(self, "found_inf", None)  # as torch's fused optimizers get it
        for rows, grad, stepped in _rows_of(weight.grad):
            self._update_rows(rows, grad, stepped, lambda here, grad: self._step_rows(here, grad, found_inf))
        return None

    def _update_rows(
        self, rows: slice | Tensor, grad: Tensor, stepped: Tensor | None,
        step_rows: Callable[[list[Tensor], Tensor], None],
    ) -> None:
        make_state(self)
        (weight,) = self.param_groups[0]["params"]
        whole = [weight.detach(), *(self.state[weight][name] for name in self._state_names())]
        here = [tensor[rows] for tensor in whole]  # views of a slice, otherwise copies
        if stepped is not None and isinstance(rows, Tensor):
            ascending, order = rows.sort(stable=True)
            first = order[torch.searchsorted(ascending, rows)]  # all of equal rows do the same
            grad, stepped = grad[first], stepped[first]
            before = [tensor.clone() for tensor in here]
        step_rows(here, grad)
        if stepped is not None:
            here = [torch.where(stepped.unsqueeze(1), old, new) for old, new in zip(before, here)]
        if isinstance(rows, Tensor):
            for tensor, new in zip(whole, here):
                tensor.index_copy_(0, rows, new)
        # The fused kernel does not say that it writes. Now a second backward through the old weights is an error.
        increment_version(weight)

    def _state_names(self) -> tuple[str, ...]:
        """The state with a row for each row of the parameter."""
        raise NotImplementedError

    def _step_finite(
        self, here: list[Tensor], grad: Tensor, finite: Tensor | None, projection: Projection | None
    ) -> None:
        """`_step_rows`, after the projection. finite: None steps in any case."""
        if projection is not None:
            projection.project(grad, here[0])
        found_inf = None  # float32 at once: this is called for each chunk of classes
        if finite is not None:
            found_inf = torch.logical_not(finite, out=finite.new_empty((), dtype=torch.float32))
        self._step_rows(here, grad, found_inf)

    def _step_rows(self, here: list[Tensor], grad: Tensor, found_inf: Tensor | None) -> None:
        """Step rows in place. here: the rows of the parameter, then of its state. found_inf: 1 leaves them as they are.
        """
        raise NotImplementedError


# Rows of a sparse gradient that are stepped at a time. Of 512 float32 values 2,048 rows are 4 MiB, each of weights,
# momentum and gradient: a CPU took two thirds of the time that it took with four times as many.
_STEPPED_ROWS = 2048


def _rows_of(gradient: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The arguments `rows`, `grad` and `stepped` of `RowOptimizer.update_rows` for the rows of a sparse gradient.

    Rows that it has several times, from the targets of each micro-batch, are added up, without waiting for the device.
    """
    values = gradient._values()
    rows, order = gradient._indices()[0].sort(stable=True)
    first = torch.searchsorted(rows, rows)
    place = torch.empty_like(order).scatter_(0, order, first)
    total = torch.zeros_like(values)
    if values.is_cuda:  # where index_add_ would add equal rows in any order
        total.index_put_((place,), values, accumulate=True)
    else:
        total.index_add_(0, place, values)
    stepped = first != torch.arange(len(rows), device=rows.device)
    for start in range(0, len(rows), _STEPPED_ROWS):
        part = slice(start, start + _STEPPED_ROWS)
        yield rows[part], total[part], stepped[part]


class RowSGD(RowOptimizer, SGD):
    """SGD by rows."""

    def _state_names(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.param_groups[0]["momentum"] else ()

    def _step_rows(self, here: list[Tensor], grad: Tensor, found_inf: Tensor | None) -> None:
        (settings,) = self.param_groups
        momentum: Any = here[1:] or [None]
        sgd(here[:1], [grad], momentum, fused=True, found_inf=found_inf, lr=settings["lr"],
            **{name: settings[name] for name in ("momentum", "weight_decay", "dampening", "nesterov", "maximize")})

    def _step_finite(
        self, here: list[Tensor], grad: Tensor, finite: Tensor | None, projection: Projection | None
    ) -> None:
        (settings,) = self.param_groups
        if projection is None or settings["dampening"] or settings["nesterov"] or settings["maximize"]:
            super()._step_finite(here, grad, finite, projection)
            return
        projection.sgd(grad, here[0], here[1] if len(here) > 1 else None, finite,
                       **{name: settings[name] for name in ("lr", "momentum", "weight_decay")})


class RowAdamW(RowOptimizer, AdamW):
    """AdamW by rows. Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019, algorithm 2.

    Its bias correction counts the optimizer steps of the run that were not skipped: one per step for all rows, however
    many calls step them, and also for rows that a step leaves out. `step` counts, after the calls of `update_rows`.
    """

    def _state_names(self) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq"

    def _step_rows(self, here: list[Tensor], grad: Tensor, found_inf: Tensor | None) -> None:
        (settings,) = self.param_groups
        weight, average, average_of_squares = here
        beta1, beta2 = settings["betas"]
        count = self.state[settings["params"][0]]["step"].clone()  # torch counts on in it
        adamw([weight], [grad], [average], [average_of_squares], [], [count], fused=True, found_inf=found_inf,
              beta1=beta1, beta2=beta2, **{name: settings[name] for name in (
                  "lr", "weight_decay", "eps", "amsgrad", "maximize")})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step the rows of a sparse gradient, if there is one, and count a step whose rows are done."""
        make_state(self)
        (weight,) = self.param_groups[0]["params"]
        if weight.grad is not None:
            assert weight.grad.is_sparse  # torch's own step would count too
            super().step(closure)
        found_inf = getattr(self, "found_inf", None)  # as torch's fused optimizers get it
        self.state[weight]["step"] += 1 if found_inf is None else 1 - found_inf


# --optimizer NAME -> class, the class that steps rows, and the flags that it takes with their defaults. insightface's
# AdamW recipes have these values.
OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": SGD, "adamw": AdamW}
ROW_OPTIMIZERS: dict[str, type[RowOptimizer]] = {"sgd": RowSGD, "adamw": RowAdamW}
OPTIMIZER_SETTINGS: dict[str, dict[str, float]] = {
    "sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
    "adamw": {"lr": 1e-3, "weight_decay": 0.1},
}

# --no-decay: which parameters have no weight decay
NO_DECAY = ("norm", "bias")


def count_states(name: str, momentum: float | None) -> int:
    """How many values the optimizer keeps for each value of a parameter."""
    return 2 if name == "adamw" else 1 if momentum else 0


def undecayed(module: nn.Module, kinds: Collection[str]) -> set[str]:
    """Names of the parameters without weight decay.

    kinds: of NO_DECAY. "norm": weights and biases of normalisation layers, as in AdaFace's split_parameters. "bias":
    the biases of all layers. PReLU's slopes are neither, as there.
    """
    return {f"{prefix}.{name}" if prefix else name
            for prefix, layer in module.named_modules() for name, _ in layer.named_parameters(recurse=False)
            if "norm" in kinds and isinstance(layer, (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm))
            or "bias" in kinds and name.endswith("bias")}


class Optimizers:
    """One optimizer for the replicated parameters (with ZeRO or without), and one for this rank's shard of classes.

    The shard must not be in ZeroOptimizer, which gives all ranks the same values.

    All state is there from the beginning, as zeros.

    Args:
        model: its sharded parameters are registered (`utils.dist.sharding.register_parallel_dim`).
        name: in OPTIMIZERS.
        settings: the optimizer's arguments, such as lr, momentum and weight_decay.
        no_decay: kinds of replicated parameters without weight decay, of NO_DECAY.
        zero: shard the replicated parameters' state (ZeroOptimizer).
        skippable: a mask on the device can skip a step, which of torch's implementations only the fused one offers.
        row_optimizer: the shard's optimizer, if it steps within the backward pass or has sparse gradients.
        backbone_lr_scale: the learning rate of backbone.* is that of the class centers times this.
    """

    def __init__(
        self, model: nn.Module, name: str, settings: dict[str, Any], *, zero: bool = False, skippable: bool = False,
        row_optimizer: RowOptimizer | None = None, no_decay: Collection[str] = (),
        backbone_lr_scale: float = 1.0,
    ) -> None:
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        replicated, sharded = ([pair for pair in trained if is_sharded(pair[1]) == wanted] for wanted in (False, True))
        without = undecayed(model, no_decay)

        def group_of(named: tuple[str, nn.Parameter]) -> tuple[tuple[str, float], ...]:
            """The settings of the parameter's group that differ from those of all."""
            decay = (("weight_decay", 0.0),) if named[0] in without else ()
            return ("lr_scale", backbone_lr_scale if named[0].startswith("backbone.") else 1.0), *decay

        replicated.sort(key=group_of)  # stable; the optimizer counts parameters group by group
        groups = [{"params": [parameter for _, parameter in members], **dict(own)}
                  for own, members in itertools.groupby(replicated, group_of)]
        make: Any = OPTIMIZERS[name]
        # On GPUs, the fused one takes found_inf of the fp16 scaler on the device. The others make the host wait for it.
        fused = {"fused": True} if skippable or any(parameter.is_cuda for _, parameter in replicated) else {}
        # The names go with each optimizer: state is saved by name, whoever holds it.
        self._named: list[tuple[Optimizer, list[tuple[str, nn.Parameter]]]] = []
        if replicated:  # --freeze backbone leaves only the shard
            optimizer = ZeroOptimizer(groups, make, **settings, **fused) if zero else make(groups, **settings, **fused)
            self._named.append((optimizer, replicated))
        if sharded:
            # Fused: torch's other implementations copy the gradient, which is as large as the shard, for weight decay.
            shard = row_optimizer or make([parameter for _, parameter in sharded], **settings, fused=True)
            self._named.append((shard, sharded))
        self._make_state()

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

        Replicated parameters are complete on rank 0, and with ZeRO on its CPU, and absent on other ranks; a shard is on
        its own rank.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for optimizer, named in self._named:
            states = (optimizer.gather_state() if isinstance(optimizer, ZeroOptimizer)
                      else [optimizer.state[parameter] for _, parameter in named])
            for (name, _), values in zip(named, states):
                if tensors := {key: value for key, value in values.items() if isinstance(value, Tensor)}:
                    found[name] = tensors
        return found

    def load_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Load state by parameter and state name. Every rank passes all it trains; other parameters start without."""
        for optimizer, named in self._named:
            if isinstance(optimizer, ZeroOptimizer):
                optimizer.load_state(state.get(name, {}) for name, _ in named)
                continue
            packed = optimizer.state_dict()
            packed["state"] = {
                index: {key: _laid_out_like(parameter, value) for key, value in state[name].items()}
                for index, (name, parameter) in enumerate(named) if name in state
            }
            optimizer.load_state_dict(packed)
        self._make_state()

    def drop_state(self) -> None:
        """Free the state's memory before `load_state`, whose argument takes as much."""
        for optimizer in self.all:
            _local_optimizer(optimizer).state.clear()

    def _make_state(self) -> None:
        for optimizer in self.all:
            make_state(_local_optimizer(optimizer))


def _local_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer that steps this rank's parameters: ZeRO's inner one, or any other optimizer itself."""
    return optimizer.optim if isinstance(optimizer, ZeroOptimizer) else optimizer


def _laid_out_like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """The value in the parameter's memory layout, copied if it differs. Scalars stay as they are.

    torch's fused optimizers walk both in memory order, and --channels-last may have changed since the save.
    """
    if value.shape != parameter.shape or value.stride() == parameter.stride() and value.device == parameter.device:
        return value
    return torch.empty_like(parameter, requires_grad=False).copy_(value)
