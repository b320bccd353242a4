"""The additive angular margin of ArcFace on the target cosine: value and derivative.

Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019, equation 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from utils.flags import flag


def arcface_margin(cosine: Tensor, margin: float, easy: bool) -> tuple[Tensor, Tensor]:
    """phi(cos) and d phi / d cos, where phi = cos(theta + m) and theta = arccos(cos).

        inside the margin's range:  phi = cos * cos(m) - sin * sin(m),  phi' = cos(m) + sin(m) * cos / sin
        outside of it:              easy: phi = cos,               phi' = 1
                                    hard: phi = cos - m * sin(m),  phi' = 1

    The range is theta < pi/2 (cos > 0) for the easy margin and theta < pi - m (cos > cos(pi - m)) for the hard one:
    beyond pi - m, cos(theta + m) would rise again.

    Args:
        cosine: target cosines, any shape, float32 or float64; rounding may put them slightly outside [-1, 1].
        margin: m in radians.
        easy: which of the two ranges.

    Returns:
        (phi, slope), both of cosine's shape and dtype. The slope has 1/sin(theta) in it; sin is bounded away from 0 by
        sqrt(eps), so both are finite at cos = +-1. A NaN stays a NaN.
    """
    # sqrt(eps) is also the accuracy that 1 - cos^2 leaves to sin near cos = 1: below it sin is rounding noise.
    sine = (1.0 - cosine * cosine).clamp(min=torch.finfo(cosine.dtype).eps).sqrt()
    cos_m, sin_m = math.cos(margin), math.sin(margin)
    inside = cosine > (0.0 if easy else math.cos(math.pi - margin))
    phi = torch.where(inside, cosine * cos_m - sine * sin_m, cosine if easy else cosine - margin * sin_m)
    slope = torch.where(inside, cos_m + sin_m * cosine / sine, torch.ones_like(cosine))
    return phi, slope


class ArcFaceMargin(torch.autograd.Function):
    """Autograd form of `arcface_margin`: `ArcFaceMargin.apply(cosine, margin, easy) -> phi`."""

    @staticmethod
    def forward(ctx, cosine: Tensor, margin: float, easy: bool) -> Tensor:
        phi, slope = arcface_margin(cosine, margin, easy)
        ctx.save_for_backward(slope)
        return phi

    @staticmethod
    def backward(ctx, grad_phi: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grad_phi * slope, None, None


@dataclass(eq=False)
class ArcFace(nn.Module):
    """Stand-in until the losses are objects."""

    margin: float = flag("--margin", default=0.5, metavar="M", at_least=0, at_most=math.pi / 2, section="loss",
                         help="margin in radians")
    easy_margin: bool = flag("--easy-margin", default=True, section="loss",
                             help="margin only where the target cosine is positive")

    def __post_init__(self) -> None:
        super().__init__()

    def describe(self) -> str:
        return f"ArcFace, margin {self.margin:g} ({'easy' if self.easy_margin else 'hard'})"


MARGINS: dict[str, type[ArcFace]] = {"arcface": ArcFace}
