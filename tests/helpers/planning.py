"""A small backbone and run for the memory planner, and what autograd keeps of a forward pass."""

from __future__ import annotations

import dataclasses

import torch
from torch.autograd.graph import saved_tensors_hooks

from utils.planner import BackboneMemory, RunSettings, predict_memory

MIB, GIB = 2**20, 2**30
BACKBONE = BackboneMemory(trained=(1000, 300, 200), fixed=50, activations=70, activations_per_image=10_000)
RUN = RunSettings(classes=100_000, batch_size=256, world_size=8, classifier_memory_mib=0, device_type="cpu",
                  class_major=False, total_bytes=16 * GIB, cache_bytes=8 * MIB)


def predict(**changes) -> dict[str, int]:
    return predict_memory(BACKBONE, dataclasses.replace(RUN, **changes))


def kept_for_backward(work, leave_out) -> list[torch.Tensor]:
    """The tensors that autograd keeps of work(), one for each piece of memory."""
    known, kept = {tensor.data_ptr() for tensor in leave_out}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = work()
    assert result is not None  # alive until here: no piece of memory was used twice
    return list(kept.values())
