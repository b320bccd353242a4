"""--enable-zero-optim: each rank keeps the optimizer state of a part of the replicated parameters."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.training.flat import by_dtype, flatten, unflatten_into


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


def assign_owners(sizes: Sequence[int], world_size: int) -> list[int]:
    """The rank that owns each parameter: greedily, the largest first, to the rank that owns the fewest bytes so far."""
    owners = [0] * len(sizes)
    shares = [(0, rank) for rank in range(world_size)]
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        share, owners[index] = shares[0]
        heapq.heapreplace(shares, (share + sizes[index], owners[index]))
    return owners


class ZeroOptimizer(Optimizer):
    """ZeRO stage 1 (Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, 2020).

    Each rank steps the parameters that it owns, with an optimizer of torch (`optim`), and then sends their values to
    all. torch.distributed.optim.ZeroRedundancyOptimizer broadcasts every parameter alone, and pickles the state, byte
    by byte and to all ranks, for a checkpoint. Here a step has a broadcast for each owner and dtype.

    `param_groups` has all parameters: their learning rate counts, and a gradient scaler unscales them all.

    groups, settings: as `make`, SGD or AdamW, takes them. The same on all ranks.
    """

    def __init__(self, groups: list[dict[str, Any]], make: Callable[..., Optimizer], **settings: Any) -> None:
        super().__init__(groups, settings)
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self._owner = dict(zip(parameters, assign_owners([p.nbytes for p in parameters], self._world_size)))
        own = [{**group, "params": [p for p in group["params"] if self._owner[p] == self._rank]}
               for group in self.param_groups]
        self.optim = make(own, **settings)
        self._buckets = [(owner, tensors) for owner in range(self._world_size if self._world_size > 1 else 0)
                         for tensors in by_dtype(p for p in parameters if self._owner[p] == owner)]
        # A gradient scaler asks for it: whether a step takes `found_inf`, which then stays on the device.
        self._step_supports_amp_scaling = getattr(self.optim, "_step_supports_amp_scaling", False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Collective. Step the own parameters, and take over those of the other ranks."""
        for group, own in zip(self.param_groups, self.optim.param_groups):
            own["lr"] = group["lr"]
        for name in ("found_inf", "grad_scale"):  # as torch's fused optimizers get them
            setattr(self.optim, name, getattr(self, name, None))
        self.optim.step()
        for owner, tensors in self._buckets:
            if len(tensors) == 1 and tensors[0].is_contiguous():  # such as replicated class centers: no copy
                dist.broadcast(tensors[0].detach(), src=owner)
                continue
            flat = (flatten(tensors) if owner == self._rank
                    else tensors[0].new_empty(sum(tensor.numel() for tensor in tensors)))
            dist.broadcast(flat, src=owner)
            if owner != self._rank:
                unflatten_into(flat, tensors)

    def gather_state(self) -> list[dict[str, Tensor]]:
        """Collective. On rank 0 the state of every parameter in the order of `param_groups`; elsewhere [].

        That of other owners is on the CPU, so that the device of rank 0 holds one owner's at a time.
        """
        make_state(self.optim)
        found: dict[nn.Parameter, dict[str, Tensor]] = {}
        for owner in range(self._world_size):
            if self._rank not in (0, owner):
                continue
            states, devices = dict[nn.Parameter, dict[str, Tensor]](), set[torch.device]()
            for group, own in zip(self.param_groups, self.optim.param_groups):
                for parameter in group["params"]:
                    if self._owner[parameter] == owner:
                        devices.add(parameter.device)
                        states[parameter] = {
                            name: self.optim.state[parameter][name] if owner == self._rank
                            else _initial_state(name, own, parameter, torch.device("cpu"))
                            for name in _state_names(own)}
            if owner:
                for tensors in by_dtype(value for values in states.values() for value in values.values()):
                    self._send_to_rank_0(tensors, owner, *devices)
            found |= states
        return list(found[parameter] for parameter in self._owner) if self._rank == 0 else []

    def _send_to_rank_0(self, tensors: list[Tensor], owner: int, device: torch.device) -> None:
        """Collective of rank 0 and the owner. tensors: of one dtype; rank 0 overwrites its own."""
        if owner == self._rank:
            flat = flatten([tensor.to(device) for tensor in tensors])
        else:
            flat = tensors[0].new_empty(sum(tensor.numel() for tensor in tensors), device=device)
        # A batch of one: NCCL then uses the group's communicator, and makes none for the two ranks.
        exchange = dist.P2POp(dist.isend, flat, 0) if owner == self._rank else dist.P2POp(dist.irecv, flat, owner)
        for work in dist.batch_isend_irecv([exchange]):
            work.wait()
        if owner != self._rank:
            unflatten_into(flat.cpu(), tensors)
