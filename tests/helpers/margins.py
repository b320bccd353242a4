"""Every margin by its definition, the margin softmax in plain float64 PyTorch, and random cases for it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from losses.margins import ArcFace


def true_arcface(cosine: Tensor, norm: Tensor | None = None, margin: float = 0.5, easy_margin: bool = True) -> Tensor:
    """phi by its definition, through the angle."""
    theta = cosine.acos()
    inside = cosine > 0 if easy_margin else theta < math.pi - margin
    return torch.where(inside, (theta + margin).cos(), cosine if easy_margin else cosine - margin * math.sin(margin))


@dataclass(frozen=True)
class TrueLoss:
    """A loss by its definition: functions that autograd can differentiate.

    phi(cosine, norm, **settings), negatives(cosine, target, phi, **settings), penalty(norm, **settings), where the
    settings include the running statistics; update(cosine, norm, **settings) returns these after a step. trained:
    settings for training steps, where the defaults would have no effect.
    """

    phi: Callable[..., Tensor]
    tried: list[dict[str, Any]]
    negatives: Callable[..., Tensor] | None = None
    penalty: Callable[..., Tensor] | None = None
    statistics: dict[str, float] = field(default_factory=dict)
    update: Callable[..., dict[str, Any]] | None = None
    trained: dict[str, float] = field(default_factory=dict)

    def parts(self, **settings: Any) -> list[Callable[..., Tensor] | None]:
        """phi, negatives and penalty with these settings and statistics."""
        return [None if part is None else functools.partial(part, **settings)
                for part in (self.phi, self.negatives, self.penalty)]


def true_cosface(cosine, norm=None, margin=0.35):
    return cosine - margin


def true_combined(cosine, norm=None, m1=1.0, m2=0.3, m3=0.2):
    angle = m1 * cosine.acos() + m2
    beyond = cosine - math.cos(min((math.pi - m2) / m1, math.pi)) - 1  # continuous: phi is -1 - m3 where it begins
    return torch.where(angle <= math.pi, angle.cos(), beyond) - m3


def true_sphereface(cosine, norm=None, margin=1.7):
    angle = margin * cosine.acos()
    k = (angle / math.pi).floor()
    return (-1.0) ** k * angle.cos() - 2 * k


def true_adaface(cosine, norm=None, margin=0.4, concentration=0.333, norm_momentum=0.01, norm_mean=20.0,
                 norm_std=100.0):
    quality = (concentration * (norm.detach().clip(0.001, 100) - norm_mean) / (norm_std + 0.001)).clip(-1, 1)
    angle = (cosine.acos() - margin * quality).clip(0.001, math.pi - 0.001)
    return angle.cos() - (margin + margin * quality)


def next_adaface(cosine, norm, norm_mean, norm_std, norm_momentum=0.01):
    norm = norm.clip(0.001, 100)
    return dict(norm_mean=norm_momentum * norm.mean() + (1 - norm_momentum) * norm_mean,
                norm_std=norm_momentum * norm.std() + (1 - norm_momentum) * norm_std)


def true_curricular(cosine, norm=None, margin=0.5, curriculum_momentum=0.01, t=0.0):
    return true_arcface(cosine, norm, margin, easy_margin=False)


def harder_curricular(cosine, target, phi, margin=0.5, curriculum_momentum=0.01, t=0.0):
    return torch.where(cosine > (target.acos() + margin).cos(), cosine * (t + cosine), cosine)


def true_mv_softmax(cosine, norm=None, margin=0.35, mv_target="am", mv_weight=1.12, easy_margin=True):
    if mv_target == "arc":
        return true_arcface(cosine, norm, margin, easy_margin)
    return torch.where(cosine > 0, cosine - margin, cosine) if easy_margin else cosine - margin


def harder_mv_softmax(cosine, target, phi, mv_weight=1.12, **_):
    return torch.where(cosine > phi, mv_weight * cosine + mv_weight - 1, cosine)


def true_magface(cosine, norm=None, low_norm=10.0, high_norm=110.0, low_margin=0.45, high_margin=0.8, norm_weight=35.0,
                 easy_margin=True):
    norm = norm.clip(low_norm, high_norm)
    margin = low_margin + (high_margin - low_margin) * (norm - low_norm) / (high_norm - low_norm)
    theta = cosine.acos()
    inside = cosine > 0 if easy_margin else theta < math.pi - margin
    return torch.where(inside, (theta + margin).cos(), cosine if easy_margin else cosine - margin * margin.sin())


def penalty_magface(norm, low_norm=10.0, high_norm=110.0, norm_weight=35.0, **_):
    norm = norm.clip(low_norm, high_norm)
    return norm_weight * (norm / high_norm**2 + 1 / norm)


TRUTH = {
    "arcface": TrueLoss(true_arcface, [dict(margin=m, easy_margin=e) for m in (0.0, 0.1, 0.5, 1.2)
                                       for e in (True, False)]),
    "cosface": TrueLoss(true_cosface, [dict(margin=m) for m in (0.0, 0.35, 0.8)]),
    "combined": TrueLoss(true_combined, [dict(), dict(m1=0.9, m2=0.4, m3=0.15), dict(m1=1.35, m2=0.0, m3=0.0)]),
    "sphereface": TrueLoss(true_sphereface, [dict(margin=m) for m in (1.0, 1.7, 4.0)]),
    "adaface": TrueLoss(true_adaface, [dict(), dict(margin=0.7, concentration=2.0)],
                        statistics=dict(norm_mean=20.0, norm_std=100.0), update=next_adaface),
    "curricularface": TrueLoss(
        true_curricular, [dict(), dict(margin=0.3)], harder_curricular, statistics=dict(t=0.0),
        update=lambda cosine, norm, t: dict(t=0.01 * cosine.mean() + 0.99 * t)),
    "mv-softmax": TrueLoss(true_mv_softmax, [dict(), dict(mv_target="arc", margin=0.5), dict(easy_margin=False)],
                           harder_mv_softmax),
    "magface": TrueLoss(true_magface, [dict(), dict(easy_margin=False)], penalty=penalty_magface,
                        # The tiny backbone's norms are about 4: below the default low_norm, no norm has a gradient.
                        trained=dict(low_norm=1.0, high_norm=20.0)),
}


def true_softmax(
    embedding: Tensor, label: Tensor, centers: Tensor, scale: float, phi: Callable[..., Tensor],
    negatives: Callable[..., Tensor] | None = None, norm: Tensor | None = None,
    penalty: Callable[..., Tensor] | None = None, sub_centers: int = 1,
) -> tuple[Tensor, Tensor]:
    """Loss and num_closer by the equation. Each class has `sub_centers` rows of the centers, one after the other.

    phi(cosine, norm), negatives(cosine, target, phi) and penalty(norm) are differentiable.
    """
    cosine = (embedding @ F.normalize(centers).t()).view(len(label), -1, sub_centers).amax(2)
    rows = torch.arange(len(label))
    target = cosine[rows, label]
    value = phi(target, norm)
    others = cosine if negatives is None else negatives(cosine, target.detach()[:, None], value.detach()[:, None])
    # Written as cross_entropy would be, but with the target left out of the sum, which float64 needs near p = 1.
    others = (scale * others).masked_fill(F.one_hot(label, cosine.shape[1]).bool(), -torch.inf).logsumexp(1)
    loss = torch.logaddexp(others - scale * value, torch.zeros((), dtype=value.dtype)).mean()
    if penalty is not None:
        loss = loss + penalty(norm).mean()
    return loss, (cosine > target[:, None]).sum(1)


def true_gradients(inputs: list[Tensor | None], label: Tensor, scale: float, phi: Callable[..., Tensor],
                   negatives: Callable[..., Tensor] | None = None,
                   penalty: Callable[..., Tensor] | None = None,
                   sub_centers: int = 1) -> tuple[Tensor, list[Tensor], Tensor]:
    """Loss, gradients of embeddings, centers (and norms), and num_closer."""
    embedding, centers, norm = (None if tensor is None else tensor.clone().requires_grad_() for tensor in inputs)
    loss, closer = true_softmax(embedding, label, centers, scale, phi, negatives, norm, penalty, sub_centers)
    leaves = [embedding, centers] if norm is None else [embedding, centers, norm]
    return loss.detach(), list(torch.autograd.grad(loss, leaves, materialize_grads=True)), closer


def random_case(generator: np.random.Generator) -> dict:
    """Shapes, settings and inputs in float64; targets at all angles, also at cos = +-1 exactly."""
    rows, classes, size = (int(generator.integers(*limits)) for limits in ((1, 65), (2, 501), (2, 33)))
    embedding, centers = generator.standard_normal((rows, size)), generator.standard_normal((classes, size))
    centers *= np.exp(generator.normal(size=(classes, 1)))
    label = generator.integers(0, classes, rows)
    for row in range(0, rows, 3):
        cosine = (1.0, -1.0, *generator.uniform(-0.99, 0.99, 2))[row % 4]
        if abs(cosine) == 1:  # along an axis, so that no rounding decides what 1/sin(theta) is
            centers[label[row]] = np.eye(size)[row % size] * 2.0 ** (row % 3)
    for row in range(0, rows, 3):
        cosine = (1.0, -1.0, *generator.uniform(-0.99, 0.99, 2))[row % 4]
        direction = centers[label[row]] / np.linalg.norm(centers[label[row]])
        other = embedding[row] - (embedding[row] @ direction) * direction
        embedding[row] = cosine * direction + np.sqrt(1 - cosine**2) * other / np.linalg.norm(other)
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    scale, margin = float(generator.choice([1.0, 16.0, 64.0, 300.0])), float(generator.choice([0.0, 0.3, 0.5, 1.5]))
    return dict(
        embedding=torch.from_numpy(embedding), centers=torch.from_numpy(centers), label=torch.from_numpy(label),
        scale=scale, margin=ArcFace(margin, bool(generator.integers(0, 2))),
        chunk=int(generator.integers(1, classes + 1)),
        saved_probs_mib=float(generator.choice([0, 1e9, rows * classes * 4 / 2**20])),  # none, all, some
    )


def truth_of(case: dict) -> tuple[float, Tensor, Tensor, float]:
    """Of a random case: loss, gradients of embeddings and centers, and the largest slope of the margin.

    The margin's own slope: at cos = +-1 the true one is infinite.
    """
    inputs = [case["embedding"], case["centers"], None]
    loss, (embedding_grad, centers_grad), _ = true_gradients(inputs, case["label"], case["scale"], case["margin"])
    cosine = (case["embedding"] * F.normalize(case["centers"][case["label"]])).sum(1)
    return loss.item(), embedding_grad, centers_grad, case["margin"].target(cosine)[1].max().item()
