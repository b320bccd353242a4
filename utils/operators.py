"""Counts what a piece of PyTorch code asks of a device: kernel launches, bytes, arithmetic, collectives, host waits."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# Operators that launch nothing, beside those that return a view.
_NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "resize_",
              "set_", "is_pinned", "_pin_memory", "record_stream", "lift", "lift_fresh"}

# They read as much of the tensor that they take values from (their first argument) as they return.
_GATHERS = {"index", "gather", "index_select", "embedding", "take"}
# They write as much of their first argument as their last tensor has, and do not touch the rest.
_SCATTERS = {"scatter_", "scatter_add_", "index_copy_", "index_put_", "index_add_", "index_fill_"}
# They write their first argument without reading it.
_OVERWRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_"}

# The shape of their result, or a Python value, depends on values: the host waits for the device.
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique", "_unique2", "unique_dim",
          "unique_consecutive", "barrier", "monitored_barrier_"}

# CUDA takes a copy of up to this size from pageable memory into its command queue and returns: CUDA C++ Programming
# Guide, "Asynchronous Concurrent Execution". A larger one waits for the stream.
SMALL_COPY = 64 * 1024
COPY_TO_HOST = "copy to the host"
COPY_PAGEABLE = "copy from pageable memory"
COPY_BLOCKING = "blocking copy from pinned memory"
COPY_SMALL = "small copy from pageable memory"  # not a wait

# torch's kernels over lists of tensors (MultiTensorApply.cuh) take so many tensors in a launch, by the number of lists,
# and this many blocks, each of so many values.
_LIST_TENSORS, _LIST_BLOCKS, _LIST_VALUES = (110, 64, 48, 36, 30), 320, 65536


@dataclass
class Counts:
    """What was counted, by the operator's name, such as "mm" or "allreduce_".

    launches, bytes, flops: of the operators on the device.
    collectives, collective_bytes: calls of collectives, and the bytes of the tensors that they are given first. Those
        on tensors of the host have names with " (host)".
    waits: operators for which the host waits for the device.
    where: {name of a wait: the places of the code that asked for it}.
    small_copies: copies from pageable memory that are small enough for CUDA to take over without a wait.
    host_values: the largest number of values in a tensor of an operator on the host.
    """

    launches: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    flops: Counter[str] = field(default_factory=Counter)
    collectives: Counter[str] = field(default_factory=Counter)
    collective_bytes: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    where: dict[str, set[str]] = field(default_factory=dict)
    small_copies: int = 0
    host_values: dict[str, int] = field(default_factory=dict)


class OperatorCounter(TorchDispatchMode):
    """Within it, every operator of this thread and of the backward passes that it starts is counted, in `counts`.

    It sees operators as torch's dispatcher runs them, below autograd and autocast, on fake tensors as on real ones. A
    kernel launch is an operator that computes on the device: not a view, not an allocation. Operators over lists of
    tensors count as many launches as torch makes of them, and a convolution's backward pass one for each gradient.
    Other operators of several kernels, such as a sort, count as one. Bytes are those of the tensors that an operator
    reads and writes, each once, as if nothing stayed in a cache. Arithmetic is that of products and convolutions, two
    operations for a multiplication and an addition.

    Waits that are no operators, such as torch.cuda.synchronize(), are not seen.

    device_type: the operators that count have a tensor on such a device.
    """

    def __init__(self, device_type: str = "cuda") -> None:
        super().__init__()
        self.device_type, self.counts = device_type, Counts()

    def take(self) -> Counts:
        """The counts so far. Counting starts again from 0."""
        taken, self.counts = self.counts, Counts()
        return taken

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace in ("prim", "profiler"):  # a fake tensor's device, and names of parts
            return func(*args, **kwargs)
        wait = self._wait_of(func, args, kwargs)  # before an operator in place changes what it got
        result = func(*args, **kwargs)
        if wait == COPY_SMALL:
            self.counts.small_copies += 1
        elif wait is not None:
            self.counts.waits[wait] += 1
            self.counts.where.setdefault(wait, set()).add(_caller())
        self._count(func, args, kwargs, result)
        return result

    def _count(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        name = func.overloadpacket.__name__
        read, written = list(_tensors((args, kwargs))), list(_tensors(result))
        here = any(tensor.device.type == self.device_type for tensor in (*read, *written))
        if func.namespace in ("c10d", "_c10d_functional"):
            if name != "wait_tensor":
                key = name if here else f"{name} (host)"
                self.counts.collectives[key] += 1
                self.counts.collective_bytes[key] += sum(tensor.nbytes for tensor in _tensors(args[0]))
            return
        if name in _NO_KERNEL or func.is_view:
            return
        if not here:
            values = max((tensor.numel() for tensor in (*read, *written)), default=0)
            self.counts.host_values[name] = max(values, self.counts.host_values.get(name, 0))
            return
        self.counts.launches[name] += _launches(name, args, written)
        self.counts.bytes[name] += _bytes(name, func, args, kwargs, read, written)
        self.counts.flops[name] += _flops(func, args, kwargs, result)

    def _on_device(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.device.type == self.device_type

    def _wait_of(self, func: Any, args: Any, kwargs: dict[str, Any]) -> str | None:
        """What the host waits for in this operator, or that it is a small copy; None: it is neither."""
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source = args[0] if name == "_to_copy" else args[1]
            target_type = (torch.device(kwargs.get("device") or source.device) if name == "_to_copy"
                           else args[0].device).type
            non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            if self._on_device(source) and target_type == "cpu":
                # torch puts the result of a copy that does not block into pinned memory.
                return None if non_blocking and (name == "_to_copy" or args[0].is_pinned()) else COPY_TO_HOST
            if source.device.type == "cpu" and target_type == self.device_type:
                return _copy_from_host(source, non_blocking)
            return None
        if name in ("index", "index_put_", "index_put", "_index_put_impl_") and self._on_device(args[0]):
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                return f"{name} by a mask"
            copies = {_copy_from_host(index, False) for index in indices if index.device.type == "cpu"}
            return COPY_PAGEABLE if copies else None
        if name in _WAITS and any(map(self._on_device, _tensors((args, kwargs)))):
            return name
        if name == "repeat_interleave" and kwargs.get("output_size") is None and any(
                map(self._on_device, _tensors(args))):
            return name
        return None


def _copy_from_host(source: Tensor, non_blocking: bool) -> str | None:
    if source.numel() == 0:
        return None
    if source.is_pinned():
        return None if non_blocking else COPY_BLOCKING
    return COPY_SMALL if non_blocking and source.nbytes <= SMALL_COPY else COPY_PAGEABLE


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _launches(name: str, args: Any, written: list[Tensor]) -> int:
    if name == "convolution_backward":
        return sum(args[-1])
    if not name.startswith(("_foreach", "_fused", "_amp_foreach")):
        return 1
    lists = [part for part in args if isinstance(part, (list, tuple)) and part and isinstance(part[0], Tensor)]
    if not lists:
        return 1
    if written and not name.endswith("_"):
        lists.append(written)
    count = len(lists[0])
    blocks = sum(-(-tensor.numel() // _LIST_VALUES) for tensor in lists[0])
    return max(1, math.ceil(count / _LIST_TENSORS[len(lists) - 1]), math.ceil(blocks / _LIST_BLOCKS))


def _flops(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> int:
    name = func.overloadpacket.__name__
    if name == "addmm_":  # torch's counter knows it only out of place
        return 2 * args[1].numel() * args[2].shape[1]
    if name == "convolution_backward":  # there, torch's counter multiplies by the groups
        grad, _, weight = args[:3]
        return 2 * sum(args[-1][:2]) * grad.numel() * (weight.numel() // weight.shape[0])
    formula = flop_registry.get(func.overloadpacket)
    return formula(*args, **kwargs, out_val=result) if formula else 0


def _bytes(
    name: str, func: Any, args: Any, kwargs: dict[str, Any], read: list[Tensor], written: list[Tensor]
) -> int:
    if name in _GATHERS:
        return sum(map(_own_bytes, (*read[1:], *written, *written)))
    if name in _SCATTERS:
        return sum(map(_own_bytes, read[1:])) + _own_bytes(read[-1])
    if name in _OVERWRITES:
        return sum(map(_own_bytes, read))
    # Arguments that it writes. One with a name such as "out" is not read.
    changed = [(argument.name.startswith("out"), tensor)
               for argument, value in (*zip(func._schema.arguments, args), *(
                   (argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs))
               if argument.alias_info is not None and argument.alias_info.is_write for tensor in _tensors(value)]
    outs = {id(tensor) for only_written, tensor in changed if only_written}
    inputs = {id(tensor): tensor for tensor in read if id(tensor) not in outs}
    # The results of operators in place are their arguments.
    return sum(map(_own_bytes, (*inputs.values(), *(written or [tensor for _, tensor in changed]))))


def _own_bytes(tensor: Tensor) -> int:
    """Of the memory that a tensor covers: an expanded dimension counts once."""
    return tensor.element_size() * math.prod(
        size for size, stride in zip(tensor.shape, tensor.stride()) if stride or not size)


def _caller() -> str:
    """Where the innermost code outside of torch and of this file stands: "losses/fused.py:12"."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
            frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename
            or frame.f_code.co_filename.startswith("<")):
        frame = frame.f_back
    return f"{'/'.join(frame.f_code.co_filename.split('/')[-2:])}:{frame.f_lineno}"
