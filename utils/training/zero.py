"""--enable-zero-optim: each rank keeps the optimizer state of a part of the replicated parameters."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.dist.collectives import all_gather_rows
from utils.training.flat import by_dtype, flatten, in_memory_order, memory_order, unflatten_into

# Of values. In the vector that is cut, parameters and ranges start at multiples of it. So a rank steps its values in
# the same vectors of the processor as an optimizer without ZeRO, and to the same bits: torch's fused SGD rounds the
# values that fill no vector otherwise. On a GPU, pieces are aligned as their parameters are.
_ALIGNMENT = 32


def make_state(optimizer: Optimizer) -> None:
    """Give SGD or AdamW the zeros from which its state starts, where it has none yet.

    torch makes the state in the first step. That is too late for a step that a mask on the device may skip, and a shard
    without classes, which never steps, needs it because the checkpoint expects it. On a GPU, state that is made after
    the first backward pass also lies between tensors that are freed.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            for name in _state_names(group):
                if state.get(name) is None:
                    state[name] = _initial_state(name, group, parameter, parameter.device)


def _state_names(group: dict[str, Any]) -> tuple[str, ...]:
    """Of SGD, or of AdamW."""
    return ("step", "exp_avg", "exp_avg_sq") if "betas" in group else ("momentum_buffer",) if group["momentum"] else ()


def _initial_state(name: str, group: dict[str, Any], parameter: nn.Parameter, device: torch.device) -> Tensor:
    if name == "step":  # torch's fused step takes the counter on the device, the others on the CPU.
        return torch.zeros((), device=device if group["fused"] else "cpu")
    return torch.zeros_like(parameter, device=device, requires_grad=False)


def _aligned(values: int) -> int:
    return -(-values // _ALIGNMENT) * _ALIGNMENT


class ZeroOptimizer(Optimizer):
    """ZeRO stage 1 (Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, 2020).

    All parameters of a dtype, one after another, form a vector that is cut into a range for each rank. Each rank steps
    the pieces of parameters in its range with an optimizer of torch (`optim`), which works on each value alone. Then
    one all-gather for each dtype brings the new values to all ranks. A rank has 1/W of the state, whatever the sizes
    of the parameters. torch.distributed.optim.ZeroRedundancyOptimizer broadcasts every parameter alone, and pickles the
    state, byte by byte and to all ranks, for a checkpoint.

    A piece is a view of its parameter's memory: the parameter must have no gaps there, and keep it.

    `param_groups` has all parameters: their settings count, and a gradient scaler unscales them all.

    groups, settings: as `make`, SGD or AdamW, takes them. The same on all ranks.
    """

    def __init__(self, groups: list[dict[str, Any]], make: Callable[..., Optimizer], **settings: Any) -> None:
        super().__init__(groups, settings)
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self._values = {parameter: parameter.detach().permute(memory_order(parameter)).view(-1)
                        for parameter in parameters}
        # For each dtype: {parameter: where it starts in the vector}, and how many values a rank has.
        self._vectors: list[tuple[dict[nn.Parameter, int], int]] = []
        for members in by_dtype(parameters):
            *starts, size = itertools.accumulate((_aligned(member.numel()) for member in members), initial=0)
            self._vectors.append((dict(zip(members, starts)), _aligned(-(-size // self._world_size))))
        self._parts = self._parts_of(self._rank)
        self._pieces = {parameter: nn.Parameter(self._values[parameter][part])
                        for parameter, part in self._parts.items()}
        self.optim = make([
            {**group, "params": [self._pieces[parameter] for parameter in group["params"] if parameter in self._pieces]}
            for group in self.param_groups], **settings)
        # A gradient scaler asks for it: whether a step takes `found_inf`, which then stays on the device.
        self._step_supports_amp_scaling = getattr(self.optim, "_step_supports_amp_scaling", False)

    def _parts_of(self, rank: int) -> dict[nn.Parameter, slice]:
        """The parameters in a rank's range, and which of their values, in memory order."""
        parts = {}
        for starts, share in self._vectors:
            for parameter, start in starts.items():
                first, end = max(0, rank * share - start), min(parameter.numel(), (rank + 1) * share - start)
                if first < end:
                    parts[parameter] = slice(first, end)
        return parts

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Collective. Step the own pieces, and take over those of the other ranks."""
        for group, own in zip(self.param_groups, self.optim.param_groups):
            own.update({**group, "params": own["params"]})
        for name in ("found_inf", "grad_scale"):  # as torch's fused optimizers get them
            setattr(self.optim, name, getattr(self, name, None))
        for parameter, piece in self._pieces.items():
            if parameter.grad is not None:
                piece.grad = in_memory_order(parameter.grad, parameter)[self._parts[parameter]]
        self.optim.step()
        self.optim.zero_grad()  # lets go of the gradients' memory
        for starts, share in self._vectors if self._world_size > 1 else ():
            values = next(iter(starts)).new_empty(share)
            pieces = [(starts[parameter] + self._parts[parameter].start - self._rank * share, self._pieces[parameter])
                      for parameter in starts if parameter in self._pieces]
            if pieces:
                torch._foreach_copy_([values[place : place + piece.numel()] for place, piece in pieces],
                                     [piece for _, piece in pieces])
            vector = all_gather_rows(values, None)
            torch._foreach_copy_([self._values[parameter] for parameter in starts],
                                 [vector[start : start + parameter.numel()] for parameter, start in starts.items()])

    def gather_state(self) -> list[dict[str, Tensor]]:
        """Collective. On rank 0 the state of every parameter, in the order of `param_groups`; elsewhere [].

        It is on the CPU, laid out in memory as the parameter. The device of rank 0 holds one rank's at a time.
        """
        make_state(self.optim)
        device, names = next(iter(self._values)).device, _state_names(self.optim.param_groups[0])
        whole = {parameter: {name: _initial_state(name, self.optim.param_groups[0], parameter, torch.device("cpu"))
                             for name in names}
                 for parameter in self._values} if self._rank == 0 else {}
        for rank in range(self._world_size):
            own, parts = list[Tensor](), list[Tensor]()
            if rank == self._rank:
                own = [self.optim.state[piece][name] for piece in self._pieces.values() for name in names]
            if self._rank == 0:
                parts = [_part_of(whole[parameter][name], parameter, part)
                         for parameter, part in self._parts_of(rank).items() for name in names]
            for sources, targets in zip(by_dtype(own or parts), by_dtype(parts or own)):
                vector = (flatten([source.to(device) for source in sources]) if own
                          else targets[0].new_empty(sum(target.numel() for target in targets), device=device))
                if rank:
                    # A batch of one: NCCL then uses the group's communicator, and makes none for the two ranks.
                    exchange = dist.P2POp(dist.isend, vector, 0) if own else dist.P2POp(dist.irecv, vector, rank)
                    for work in dist.batch_isend_irecv([exchange]):
                        work.wait()
                if parts:
                    unflatten_into(vector.cpu(), targets)
        return list(whole.values())

    @torch.no_grad()
    def load_state(self, states: Iterable[dict[str, Tensor]]) -> None:
        """Take the own part of each parameter's state, in the order of `param_groups`. What is missing is zero."""
        self.optim.state.clear()
        make_state(self.optim)
        for parameter, values in zip(self._values, states):
            if parameter in self._pieces:
                for name, value in self.optim.state[self._pieces[parameter]].items():
                    if name in values:
                        value.copy_(_part_of(values[name], parameter, self._parts[parameter]))


def _part_of(state: Tensor, parameter: nn.Parameter, part: slice) -> Tensor:
    """Of a parameter's state the values that belong to `part`: of AdamW's step the one that it has."""
    return in_memory_order(state, parameter)[part] if state.dim() else state
