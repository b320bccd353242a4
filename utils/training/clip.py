"""--clip-grad-norm: gradients whose total norm is limited, at every number of processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from utils.dist.sharding import is_sharded


class GradientClip:
    """Scales gradients by min(1, max_norm / total norm), as torch.nn.utils.clip_grad_norm_ in a single process does.

    The total norm is the L2 norm of the gradients of all `parameters`. Those of replicated parameters are the same on
    all ranks and count once; of sharded ones the squares of all ranks are added.
    """

    def __init__(self, max_norm: float, parameters: Sequence[nn.Parameter]) -> None:
        self._max_norm, self._parameters = max_norm, list(parameters)
        self._sharded = any(map(is_sharded, self._parameters))

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Collective with sharded parameters. Returns the total norm before: a scalar on the device, for all ranks.

        Call it when the gradients are complete: averaged over the ranks and, with fp16, unscaled. If the norm is inf or
        NaN, so are gradients afterwards: the caller must skip the step.
        """
        replicated, sharded = ([parameter.grad for parameter in self._parameters if parameter.grad is not None
                                and is_sharded(parameter) == wanted] for wanted in (False, True))
        # With --freeze backbone there is none: torch's norm of no gradients would be on the CPU.
        norm = get_total_norm(replicated) if replicated else torch.zeros((), device=self._parameters[0].device)
        if self._sharded:
            squares = get_total_norm(sharded).double().square().to(norm.device)
            dist.all_reduce(squares)
            norm = (norm.double().square() + squares).sqrt().to(norm.dtype)
        clip_grads_with_norm_(self._parameters, self._max_norm, norm)
        return norm
