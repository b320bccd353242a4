"""Activation checkpointing: compute each block again in the backward pass, instead of keeping its activations."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    """A part of a backbone that `checkpoint_activations` may compute twice. It must not use torch's generator."""


def checkpoint_activations(backbone: nn.Module) -> nn.Module:
    """Make each Block of the backbone keep its input only, when it is trained. Names and values of weights stay.

    Gradients are the same to the bit, and BatchNorm's statistics are updated once. With synchronized BatchNorm the
    second computation is collective too. Returns the backbone.
    """
    for block in backbone.modules():
        if isinstance(block, Block):
            block.forward = functools.partial(_checkpointed, block, block.forward)
    return backbone


def _checkpointed(block: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args)
    contexts = functools.partial(_contexts, block)
    # Masks come from arguments (models.randomness): no state of a generator to restore.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return contextlib.nullcontext(), _copied_statistics(block)


@contextlib.contextmanager
def _copied_statistics(block: nn.Module) -> Iterator[None]:
    """Within it, BatchNorm updates copies of its running statistics, which are dropped at the end."""
    own = [(module, dict(module._buffers)) for module in block.modules() if isinstance(module, _BatchNorm)]
    for module, buffers in own:
        for name, buffer in buffers.items():
            module._buffers[name] = None if buffer is None else buffer.clone()
    try:
        yield
    finally:
        for module, buffers in own:
            module._buffers.update(buffers)
