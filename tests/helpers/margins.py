"""The margin softmax in plain float64 PyTorch, and random cases for it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from losses.margins import arcface_margin


def random_case(generator: np.random.Generator) -> dict:
    """Shapes, settings and inputs in float64; targets at all angles, also at cos = +-1 exactly."""
    rows, classes, size = int(generator.integers(1, 65)), int(generator.integers(2, 501)), int(generator.integers(2, 33))
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
    return dict(
        embedding=torch.from_numpy(embedding), centers=torch.from_numpy(centers), label=torch.from_numpy(label),
        scale=float(generator.choice([1.0, 16.0, 64.0, 300.0])), margin=float(generator.choice([0.0, 0.3, 0.5, 1.5])),
        easy=bool(generator.integers(0, 2)), chunk=int(generator.integers(1, classes + 1)),
        memory_mib=float(generator.choice([0, 1e9, rows * classes * 4 / 2**20])),  # none, all, some
    )


def true_gradients(case: dict) -> tuple[float, torch.Tensor, torch.Tensor, float]:
    """Loss, gradients of embeddings and centers, and the largest slope of the margin."""
    embedding, centers = case["embedding"].clone().requires_grad_(), case["centers"].clone().requires_grad_()
    cosine = embedding @ F.normalize(centers).t()
    rows = torch.arange(len(embedding))
    target = cosine[rows, case["label"]]
    phi, slope = (value.detach() for value in arcface_margin(target, case["margin"], case["easy"]))
    logits = case["scale"] * cosine.index_put((rows, case["label"]), phi + slope * (target - target.detach()))
    # Written as cross_entropy would be, but with the target left out of the sum, which float64 needs near p = 1.
    others = logits.masked_fill(F.one_hot(case["label"], cosine.shape[1]).bool(), -torch.inf).logsumexp(1)
    loss = torch.logaddexp(others - logits[rows, case["label"]], torch.zeros(())).mean()
    loss.backward()
    return loss.item(), embedding.grad, centers.grad, slope.max().item()
