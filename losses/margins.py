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

from utils.errors import UserError
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
    default_scale: ClassVar[float] = 64.0  # of the publication
    negatives: ClassVar[Callable[..., tuple[Tensor, Tensor]] | None] = None
    # The same map in the form that the GPU's kernels know, where it has that: target cosines and phi, (N,) each -> a
    # threshold (N,) and coefficients (3,), float32. A cosine c above the threshold becomes k0 * c + k1 * c^2 + k2.
    quadratic: ClassVar[Callable[..., tuple[Tensor, Tensor]] | None] = None
    # A term of the loss in the norm alone: norms (N,) -> its value per row and the slope of that, (N,).
    penalty: ClassVar[Callable[..., tuple[Tensor, Tensor]] | None] = None

    def __post_init__(self) -> None:
        super().__init__()
        self.unit_gradient = False
        self._observed: list[tuple[Tensor, Tensor | None]] = []

    def target(self, cosine: Tensor, norm: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """phi, d phi / d cosine and d phi / d norm (None: no gradient), each (N,) and of the cosines' dtype.

        Args:
            cosine: target cosines (N,), float32 or float64; rounding may put them slightly outside [-1, 1].
            norm: norms of the embeddings (N,); None unless `uses_norm`.

        All three must be finite for finite cosines, also at +-1; a NaN must stay a NaN.
        """
        raise NotImplementedError

    def with_slopes(self, cosine: Tensor, norm: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """`target`; with `unit_gradient` its slopes are 1 and None, as in programs that change the logit in place."""
        phi, slope, norm_slope = self.target(cosine, norm)
        return (phi, torch.ones_like(slope), None) if self.unit_gradient else (phi, slope, norm_slope)

    def forward(self, cosine: Tensor, norm: Tensor | None = None) -> Tensor:
        """phi, with its slopes as gradients."""
        slopes = self.with_slopes(cosine.detach(), None if norm is None else norm.detach())
        return WithSlopes.apply(*slopes, cosine, norm)

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

    def highest_negative(self) -> float:
        """An upper bound of what `negatives` returns for cosines up to 1. It must not return less than -1 for a class
        that takes part."""
        return 1.0

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


def angle_of(cosine: Tensor) -> Tensor:
    """arccos(cosine) in [0, pi]; rounding may put cosines slightly outside [-1, 1]."""
    return cosine.clamp(-1.0, 1.0).acos()


def arc_target(cosine: Tensor, margin: Tensor | float, *, easy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """ArcFace's phi, (N,), and its derivatives by cosine and margin. Each row may have its own margin, (N,)."""
    if not isinstance(margin, Tensor):
        margin = torch.full_like(cosine, margin)
    sine, cos_m, sin_m = sine_of(cosine), margin.cos(), margin.sin()
    inside = cosine > (0.0 if easy else -cos_m)
    outside = cosine if easy else cosine - margin * sin_m
    by_margin = torch.zeros_like(cosine) if easy else -sin_m - margin * cos_m
    return (torch.where(inside, cosine * cos_m - sine * sin_m, outside),
            torch.where(inside, cos_m + sin_m * cosine / sine, torch.ones_like(cosine)),
            torch.where(inside, -cosine * sin_m - sine * cos_m, by_margin))


@dataclass(eq=False, repr=False)
class ArcFace(Margin):
    """phi = cos(theta + m), theta = arccos(cosine).

        inside the margin's range:  phi = cos * cos(m) - sin * sin(m),  phi' = cos(m) + sin(m) * cos / sin
        outside of it:              easy: phi = cos,               phi' = 1
                                    hard: phi = cos - m * sin(m),  phi' = 1

    The range is theta < pi/2 (cos > 0) for the easy margin and theta < pi - m for the hard one: beyond pi - m,
    cos(theta + m) would rise again.

    Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019, equation 3. insightface's
    recipes have the hard margin, `--no-easy-margin`; the easy one is the default because this program began with it.
    """

    margin: float = flag("--margin", default=0.5, at_least=0, at_most=math.pi / 2, metavar="M", section="loss",
                         help="margin, in radians")
    easy_margin: bool = flag("--easy-margin", default=True, section="loss",
                             help="apply the margin only where the target cosine is positive")

    def target(self, cosine: Tensor, norm: Tensor | None = None) -> tuple[Tensor, Tensor, None]:
        return *arc_target(cosine, self.margin, easy=self.easy_margin)[:2], None

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


@dataclass(eq=False, repr=False)
class CombinedMargin(Margin):
    """phi = cos(m1 * theta + m2) - m3.

    This falls with theta up to theta0, where m1 * theta0 + m2 = pi. Beyond, phi = cosine - cos(theta0) - 1 - m3, which
    is continuous at theta0 and keeps falling.

    Deng et al., "ArcFace", CVPR 2019, equation 4. (1, 0.3, 0.2) and (0.9, 0.4, 0.15) are in its table 2.
    """

    m1: float = flag("--m1", default=1.0, above=0, at_most=4, metavar="M", section="loss",
                     help="factor of the angle")
    m2: float = flag("--m2", default=0.3, at_least=0, at_most=math.pi / 2, metavar="M", section="loss",
                     help="margin in radians, added to m1 times the angle")
    m3: float = flag("--m3", default=0.2, at_least=0, at_most=1, metavar="M", section="loss",
                     help="margin, subtracted from the cosine")

    def target(self, cosine: Tensor, norm: Tensor | None = None) -> tuple[Tensor, Tensor, None]:
        angle = self.m1 * angle_of(cosine) + self.m2
        inside = angle <= math.pi
        beyond = cosine - math.cos(min((math.pi - self.m2) / self.m1, math.pi)) - 1.0
        phi = torch.where(inside, angle.cos(), beyond) - self.m3
        slope = torch.where(inside, self.m1 * angle.sin() / sine_of(cosine), torch.ones_like(cosine))
        return phi, slope, None

    def describe(self) -> str:
        return f"combined margin, m1 {self.m1:g}, m2 {self.m2:g}, m3 {self.m3:g}"


@dataclass(eq=False, repr=False)
class SphereFace(Margin):
    """phi = (-1)^k * cos(m * theta) - 2 * k with k = floor(m * theta / pi): cos(m * theta), made to fall everywhere.

    Liu et al., "SphereFace: Deep Hypersphere Embedding for Face Recognition", CVPR 2017, equation 7. m = 1.7 at scale
    30, with normalised embeddings, is that of Liu et al., "SphereFace Revived", TPAMI 2022.
    """

    default_scale: ClassVar[float] = 30.0

    margin: float = flag("--margin", default=1.7, at_least=1, at_most=4, metavar="M", section="loss",
                         help="margin, a factor of the angle")

    def target(self, cosine: Tensor, norm: Tensor | None = None) -> tuple[Tensor, Tensor, None]:
        angle = self.margin * angle_of(cosine)
        k = (angle / math.pi).floor()
        phi = (1.0 - 2.0 * k.remainder(2.0)) * angle.cos() - 2.0 * k
        return phi, self.margin * angle.sin().abs() / sine_of(cosine), None

    def describe(self) -> str:
        return f"SphereFace, margin {self.margin:g}"


@dataclass(eq=False, repr=False)
class AdaFace(Margin):
    """phi = cos(clip(theta - m * z, eps, pi - eps)) - m * (1 + z), z in [-1, 1] by the quality of the image.

        z = clip(h * (norm - mu) / (sigma + 0.001), -1, 1)

    takes the norm of the embedding, clipped to [0.001, 100], for the quality; no gradient flows through it. mu and
    sigma are running mean and (unbiased) standard deviation of these norms over the global batch.

    Kim et al., "AdaFace: Quality Adaptive Margin for Face Recognition", CVPR 2022, equations 6 to 11, and its program
    for the constants. The program keeps the statistics of each GPU apart and updates them before their use; here they
    are those of all ranks, up to the step before.
    """

    uses_norm: ClassVar[bool] = True
    has_statistics: ClassVar[bool] = True

    margin: float = flag("--margin", default=0.4, at_least=0, at_most=1, metavar="M", section="loss",
                         help="margin: m of the angle and of the cosine")
    concentration: float = flag("--concentration", default=0.333, above=0, metavar="H", section="loss",
                                help="h: how fast the margin changes with the norm")
    norm_momentum: float = flag("--norm-momentum", default=0.01, above=0, at_most=1, metavar="A", section="loss",
                                help="share of the batch in the running mean and deviation of the norms")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.norm_mean: Tensor
        self.norm_std: Tensor
        self.register_buffer("norm_mean", torch.tensor(20.0))
        self.register_buffer("norm_std", torch.tensor(100.0))

    def target(self, cosine: Tensor, norm: Tensor | None = None) -> tuple[Tensor, Tensor, None]:
        assert norm is not None
        quality = self.concentration * (norm.clamp(1e-3, 100.0) - self.norm_mean) / (self.norm_std + 1e-3)
        quality = quality.clamp(-1.0, 1.0)
        angle = angle_of(cosine) - self.margin * quality
        clipped = angle.clamp(1e-3, math.pi - 1e-3)
        slope = torch.where(angle == clipped, angle.sin() / sine_of(cosine), torch.zeros_like(cosine))
        return clipped.cos() - self.margin * (1.0 + quality), slope, None

    def update(self, cosine: Tensor, norm: Tensor | None) -> None:
        assert norm is not None
        norm = norm.clamp(1e-3, 100.0)
        self.norm_mean.lerp_(norm.mean().to(self.norm_mean), self.norm_momentum)
        if len(norm) > 1:  # one row has no deviation
            self.norm_std.lerp_(norm.std().to(self.norm_std), self.norm_momentum)

    def describe(self) -> str:
        return f"AdaFace, margin {self.margin:g}, concentration {self.concentration:g}"


@dataclass(eq=False, repr=False)
class CurricularFace(Margin):
    """phi as ArcFace's (hard). A negative c > cos(theta + m) becomes c * (t + c).

    t is the running mean of the target cosines over the global batch: it starts at 0, where hard negatives count less,
    and rises during training.

    Huang et al., "CurricularFace: Adaptive Curriculum Learning Loss for Deep Face Recognition", CVPR 2020, equations 5
    to 10. There t is updated before its use; here it holds the steps before.
    """

    has_statistics: ClassVar[bool] = True

    margin: float = flag("--margin", default=0.5, at_least=0, at_most=math.pi / 2, metavar="M", section="loss",
                         help="margin, in radians")
    curriculum_momentum: float = flag(
        "--curriculum-momentum", default=0.01, above=0, at_most=1, metavar="A", section="loss",
        help="share of the batch in t, the running mean of the target cosines")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.t: Tensor
        self.register_buffer("t", torch.tensor(0.0))

    def target(self, cosine: Tensor, norm: Tensor | None = None) -> tuple[Tensor, Tensor, None]:
        return *arc_target(cosine, self.margin, easy=False)[:2], None

    def _threshold(self, target: Tensor) -> Tensor:
        return target * math.cos(self.margin) - sine_of(target) * math.sin(self.margin)

    def quadratic(self, cosine: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        return self._threshold(cosine), torch.stack([self.t, torch.ones_like(self.t), torch.zeros_like(self.t)]).float()

    def negatives(self, cosine: Tensor, target: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        hard = cosine > self._threshold(target)
        return (torch.where(hard, cosine * (self.t + cosine), cosine),
                torch.where(hard, self.t + 2.0 * cosine, torch.ones_like(cosine)))

    def highest_negative(self) -> float:
        return 2.0  # c = t = 1, or both -1

    def update(self, cosine: Tensor, norm: Tensor | None) -> None:
        self.t.lerp_(cosine.mean().to(self.t), self.curriculum_momentum)

    def describe(self) -> str:
        return f"CurricularFace, margin {self.margin:g}"


@dataclass(eq=False, repr=False)
class MVSoftmax(Margin):
    """phi as CosFace's (am) or ArcFace's (arc). A negative c > phi becomes v * c + v - 1.

    Wang et al., "Mis-classified Vector Guided Softmax Loss for Face Recognition", AAAI 2020, equations 8 and 10, in its
    adaptive form: v = t + 1. m, v and the scale are those of FaceX-Zoo.
    """

    default_scale: ClassVar[float] = 32.0

    margin: float = flag("--margin", default=0.35, at_least=0, at_most=1, metavar="M", section="loss",
                         help="margin of the cosine (am) or the angle (arc)")
    mv_target: str = flag("--mv-target", default="am", choices=("am", "arc"), section="loss",
                          help="the target: CosFace's or ArcFace's")
    mv_weight: float = flag("--mv-weight", default=1.12, at_least=1, metavar="V", section="loss",
                            help="weight v of the negatives that are closer than the target")
    easy_margin: bool = flag("--easy-margin", default=True, section="loss",
                             help="apply the margin only where the target cosine is positive")

    def target(self, cosine: Tensor, norm: Tensor | None = None) -> tuple[Tensor, Tensor, None]:
        if self.mv_target == "arc":
            return *arc_target(cosine, self.margin, easy=self.easy_margin)[:2], None
        inside = cosine > 0 if self.easy_margin else torch.ones_like(cosine, dtype=torch.bool)
        return torch.where(inside, cosine - self.margin, cosine), torch.ones_like(cosine), None

    def quadratic(self, cosine: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        coefficients = phi.new_full((3,), self.mv_weight, dtype=torch.float32)
        coefficients[1].fill_(0.0)
        coefficients[2].sub_(1.0)
        return phi, coefficients

    def negatives(self, cosine: Tensor, target: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        hard = cosine > phi
        return (torch.where(hard, self.mv_weight * cosine + (self.mv_weight - 1.0), cosine),
                torch.where(hard, self.mv_weight, torch.ones_like(cosine)))

    def highest_negative(self) -> float:
        return 2.0 * self.mv_weight - 1.0

    def describe(self) -> str:
        return f"MV-Softmax ({self.mv_target}), margin {self.margin:g}, weight {self.mv_weight:g}"


@dataclass(eq=False, repr=False)
class MagFace(Margin):
    """phi = cos(theta + m(a)), a the norm of the embedding, clipped to [l_a, u_a], and a term that rewards large norms.

        m(a) = l_m + (u_m - l_m) * (a - l_a) / (u_a - l_a)
        the loss of a row has in addition  lambda * (a / u_a^2 + 1 / a)

    Beyond the margin's range phi is that of `ArcFace` with the margin m(a). The norm gets a gradient through phi and
    through the term, and none where it is clipped.

    Meng et al., "MagFace: A Universal Representation for Face Recognition and Quality Assessment", CVPR 2021, equations
    2 to 4, and its program for the constants.
    """

    uses_norm: ClassVar[bool] = True

    low_norm: float = flag("--low-norm", default=10.0, above=0, metavar="A", section="loss",
                           help="l_a, the norm that smaller norms count as")
    high_norm: float = flag("--high-norm", default=110.0, above=0, metavar="A", section="loss",
                            help="u_a, the norm that larger norms count as")
    low_margin: float = flag("--low-margin", default=0.45, at_least=0, at_most=math.pi / 2, metavar="M", section="loss",
                             help="margin at the norm l_a, in radians")
    high_margin: float = flag("--high-margin", default=0.8, at_least=0, at_most=math.pi / 2, metavar="M",
                              section="loss", help="margin at the norm u_a, in radians")
    norm_weight: float = flag("--norm-weight", default=35.0, at_least=0, metavar="L", section="loss",
                              help="lambda, the weight of the term in the norm")
    easy_margin: bool = flag("--easy-margin", default=True, section="loss",
                             help="apply the margin only where the target cosine is positive")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low_norm >= self.high_norm:
            raise UserError(f"--low-norm {self.low_norm:g}: give a number below --high-norm {self.high_norm:g}")

    def target(self, cosine: Tensor, norm: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        assert norm is not None
        rise = (self.high_margin - self.low_margin) / (self.high_norm - self.low_norm)
        margin = self.low_margin + rise * (norm.clamp(self.low_norm, self.high_norm) - self.low_norm)
        phi, slope, by_margin = arc_target(cosine, margin, easy=self.easy_margin)
        return phi, slope, rise * by_margin * self._inside(norm)

    def penalty(self, norm: Tensor) -> tuple[Tensor, Tensor]:
        clipped = norm.clamp(self.low_norm, self.high_norm)
        value = self.norm_weight * (clipped / self.high_norm**2 + 1.0 / clipped)
        return value, self.norm_weight * (1.0 / self.high_norm**2 - 1.0 / clipped**2) * self._inside(norm)

    def _inside(self, norm: Tensor) -> Tensor:
        return (norm >= self.low_norm) & (norm <= self.high_norm)

    def describe(self) -> str:
        return (f"MagFace, margin {self.low_margin:g} to {self.high_margin:g} for norms {self.low_norm:g} to "
                f"{self.high_norm:g}, norm weight {self.norm_weight:g}")


MARGINS: dict[str, type[Margin]] = {
    "arcface": ArcFace,
    "cosface": CosFace,
    "combined": CombinedMargin,
    "sphereface": SphereFace,
    "adaface": AdaFace,
    "curricularface": CurricularFace,
    "mv-softmax": MVSoftmax,
    "magface": MagFace,
}
