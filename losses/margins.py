"""Margins on the target cosine: one class per loss; `--loss` selects from MARGINS.

A margin turns the cosine between an embedding and the center of its own class into phi; the loss's target logit is
scale * phi. It computes phi's slopes itself: the fused loss needs no graph, and they stay finite where phi's are not.

Some losses keep running statistics of norms or cosines, as buffers of the margin: losses/README.md has the rule. The
losses pass each batch to `observe`; `models.classifier.MarginClassifier.end_step` passes what was observed to `update`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from utils.flags import flag


class Margin(nn.Module):
    """Base of all margins. A subclass is a @dataclass(eq=False, repr=False) whose fields are its flags.

    A loss that maps the other cosines defines

        def negatives(self, cosine: Tensor, target: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]

    It takes the cosines (N, K) of a chunk of classes, and of each row the target cosine and phi, (N, 1), as constants.
    It returns the mapped cosines and the slopes of the map, (N, K). It works element by element: which classes form a
    chunk must not matter. A class that takes no part gets a large negative finite value and slope 0. The column of the
    target itself is ignored.
    """

    uses_norm: ClassVar[bool] = False  # `target` needs the norms of the embeddings
    has_statistics: ClassVar[bool] = False  # the margin defines `update`
    negatives: ClassVar[Callable[..., tuple[Tensor, Tensor]] | None] = None

    def __post_init__(self) -> None:
        super().__init__()
        self._observed: list[tuple[Tensor, Tensor | None]] = []

    def target(self, cosine: Tensor, norm: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """phi, d phi / d cosine and d phi / d norm (None: no gradient), each (N,) and of the cosines' dtype.

        Args:
            cosine: target cosines (N,), float32 or float64; rounding may put them slightly outside [-1, 1].
            norm: norms of the embeddings (N,); None unless `uses_norm`.

        All three must be finite for finite cosines, also at +-1; a NaN must stay a NaN.
        """
        raise NotImplementedError

    def forward(self, cosine: Tensor, norm: Tensor | None = None) -> Tensor:
        """phi of `target`, with its slopes as gradients."""
        return WithSlopes.apply(*self.target(cosine.detach(), None if norm is None else norm.detach()), cosine, norm)

    def update(self, cosine: Tensor, norm: Tensor | None) -> None:
        """Update the statistics (buffers, in place) with the target cosines and norms of the global batch, (N,)."""
        raise NotImplementedError

    def observe(self, cosine: Tensor, norm: Tensor | None) -> None:
        """Remember a micro-batch's target cosines and norms, (N,), until `observed` collects them."""
        if self.has_statistics and self.training:
            self._observed.append((cosine.detach(), None if norm is None else norm.detach()))

    def observed(self) -> tuple[Tensor, Tensor | None] | None:
        """Cosines and norms of all micro-batches since the last call, (N * micro-batches,); None if there are none."""
        if not self._observed:
            return None
        cosines, norms = zip(*self._observed)
        self._observed = []
        return torch.cat(cosines), None if norms[0] is None else torch.cat(norms)

    def describe(self) -> str:
        """The loss in a few words, for the table of the run."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return self.describe()


class WithSlopes(torch.autograd.Function):
    """value, with given slopes (None: 0) as its derivatives by `first` and `second`; all of one shape."""

    @staticmethod
    def forward(ctx, value, slope, second_slope, first, second):
        ctx.save_for_backward(slope, second_slope)
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        slope, second_slope = ctx.saved_tensors
        return None, None, None, grad * slope, None if second_slope is None else grad * second_slope


def sine_of(cosine: Tensor) -> Tensor:
    """sin(arccos(cosine)), at least sqrt(eps): slopes divide by it.

    sqrt(eps) is also the accuracy that 1 - cosine^2 leaves near cosine = 1; below it the sine is rounding noise.
    """
    return (1.0 - cosine * cosine).clamp(min=torch.finfo(cosine.dtype).eps).sqrt()


@dataclass(eq=False, repr=False)
class ArcFace(Margin):
    """phi = cos(theta + m), theta = arccos(cosine).

        inside the margin's range:  phi = cos * cos(m) - sin * sin(m),  phi' = cos(m) + sin(m) * cos / sin
        outside of it:              easy: phi = cos,               phi' = 1
                                    hard: phi = cos - m * sin(m),  phi' = 1

    The range is theta < pi/2 (cos > 0) for the easy margin and theta < pi - m for the hard one: beyond pi - m,
    cos(theta + m) would rise again.

    Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019, equation 3.
    """

    margin: float = flag("--margin", default=0.5, at_least=0, at_most=math.pi / 2, metavar="M", section="loss",
                         help="margin, in radians")
    easy_margin: bool = flag("--easy-margin", default=True, section="loss",
                             help="apply the margin only where the target cosine is positive")

    def target(self, cosine: Tensor, norm: Tensor | None = None) -> tuple[Tensor, Tensor, None]:
        sine = sine_of(cosine)
        cos_m, sin_m = math.cos(self.margin), math.sin(self.margin)
        inside = cosine > (0.0 if self.easy_margin else -cos_m)
        outside = cosine if self.easy_margin else cosine - self.margin * sin_m
        phi = torch.where(inside, cosine * cos_m - sine * sin_m, outside)
        slope = torch.where(inside, cos_m + sin_m * cosine / sine, torch.ones_like(cosine))
        return phi, slope, None

    def describe(self) -> str:
        return f"ArcFace, margin {self.margin:g} ({'easy' if self.easy_margin else 'hard'})"


@dataclass(eq=False, repr=False)
class CosFace(Margin):
    """phi = cosine - m.

    Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face Recognition", CVPR 2018, equation 4. m is 0.35 in the
    paper and 0.4 in insightface's recipes.
    """

    margin: float = flag("--margin", default=0.35, at_least=0, at_most=1, metavar="M", section="loss",
                         help="margin, subtracted from the target cosine")

    def target(self, cosine: Tensor, norm: Tensor | None = None) -> tuple[Tensor, Tensor, None]:
        return cosine - self.margin, torch.ones_like(cosine), None

    def describe(self) -> str:
        return f"CosFace, margin {self.margin:g}"


MARGINS: dict[str, type[Margin]] = {
    "arcface": ArcFace,
    "cosface": CosFace,
}
