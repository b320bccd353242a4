"""The rates of this CPU for plan.py's model of a step, and steps to compare it with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.fused import _CPU_CACHE, chunk_classes, margin_softmax
from losses.margins import ArcFace
from models.classifier import MarginClassifier
from scripts import measure
from utils.dist.sharding import ClassShard
from utils.planner import RunSettings
from utils.rates import CONVOLUTION, DEPTHWISE, NORMALIZATION, OTHER, PRODUCT, Rates
from utils.step_time import probability_bytes

# The layers of MobileFaceNet's two most frequent blocks: narrow and wide channels, pixels of a side.
LAYERS = ((64, 128, 28), (128, 256, 14))
COPIED = 2**25  # values: 128 MiB, more than a cache holds
SMALL, SMALL_CALLS = 16, 1000
CHUNKS = 16  # of centers and their gradient: as cold as in a walk


def measure_rates(images: int, rows: int, size: int, turns: int, steps: dict[Any, Callable[[], Any]]) -> tuple[
        Rates, dict[Any, float]]:
    """The rates, from medians, and the median seconds of `steps`, which take turns with the measurements.

    Each kind of operator has one measurement: products of chunks (K, d) of the classifier; a convolution, a depthwise
    convolution and BatchNorm of `LAYERS`, forward and backward; a large copy;
    element-wise passes over a chunk's (N, K); and the overhead of a small operator.

    images: n. rows: N. size: d.
    """
    chunk = chunk_classes(rows, size, _CPU_CACHE)
    left, centers = torch.rand(rows, size), torch.rand(CHUNKS, chunk, size)
    left_grad, centers_grad = torch.zeros_like(left), torch.zeros_like(centers)
    logits, scores, passed = torch.rand(3, rows, chunk)  # the exponentials of some numbers, such as inf, take longer
    large, small, factor = torch.zeros(2, COPIED), torch.zeros(SMALL), torch.rand(chunk)

    @torch.no_grad()
    def products() -> None:
        for here, grad in zip(centers, centers_grad):
            torch.mm(left, here.t(), out=logits)
            torch.mm(logits, here, out=left_grad)
            torch.mm(logits.t(), left, out=grad)

    @torch.no_grad()
    def passes() -> None:
        torch.mul(scores, factor, out=passed)
        passed.amax(dim=1)
        passed.sub_(1.0).exp_()
        passed.sum(dim=1)

    @torch.no_grad()
    def overhead() -> None:
        for _ in range(SMALL_CALLS):
            small.add_(1.0)

    positions = [images * wide * pixels**2 for _, wide, pixels in LAYERS]
    narrow = [torch.rand(images, channels, pixels, pixels) for channels, _, pixels in LAYERS]
    wide = [torch.rand(images, channels, pixels, pixels) for _, channels, pixels in LAYERS]
    # What was done, and how much of it: operations, bytes or calls.
    works: dict[str, tuple[Callable[[], Any], float]] = {
        PRODUCT: (products, 6.0 * rows * CHUNKS * chunk * size),
        CONVOLUTION: (_both_passes([nn.Conv2d(few, many, 1, bias=False) for few, many, _ in LAYERS], narrow),
                      sum(6.0 * count * few for count, (few, _, _) in zip(positions, LAYERS))),
        DEPTHWISE: (_both_passes([nn.Conv2d(many, many, 3, padding=1, groups=many, bias=False)
                                   for _, many, _ in LAYERS], wide), 6.0 * 9 * sum(positions)),
        NORMALIZATION: (_both_passes([nn.BatchNorm2d(many) for _, many, _ in LAYERS], wide), 4.0 * 5 * sum(positions)),
        OTHER: (lambda: large[0].copy_(large[1]), 2.0 * large[0].nbytes),
        "cached": (passes, 8.0 * logits.nbytes),
        "launch": (overhead, SMALL_CALLS),
    }
    calls = {name: work for name, (work, _) in works.items()} | steps
    for work in calls.values():
        work()
    seconds = {name: float(np.median(values)) for name, values in measure.alternate(
        {name: partial(measure.timed, work) for name, work in calls.items()}, turns).items()}
    per_second = {name: amount / seconds.pop(name) for name, (_, amount) in works.items()}
    rates = Rates(
        flops={kind: per_second[kind] for kind in (PRODUCT, CONVOLUTION, DEPTHWISE)}, low_flops={},
        bandwidth={kind: per_second[kind] for kind in (NORMALIZATION, OTHER)}, launch=1 / per_second["launch"],
        cached_bandwidth=per_second["cached"], cache_bytes=2 * _CPU_CACHE)
    return rates, seconds


def _both_passes(layers: Sequence[nn.Module], inputs: Sequence[Tensor]) -> Callable[[], None]:
    """The forward and the backward pass of each layer with its input."""
    inputs = [tensor.requires_grad_() for tensor in inputs]
    grads = [torch.rand(layer(tensor).shape) for layer, tensor in zip(layers, inputs)]

    def run() -> None:
        for layer, tensor, grad in zip(layers, inputs, grads):
            tensor.grad = None
            layer.zero_grad()
            layer(tensor).backward(grad)

    return run


def backbone_step(backbone: nn.Module, images: int) -> Callable[[], None]:
    """The backbone's forward and backward pass."""
    batch = torch.rand(images, 3, 112, 112)
    backbone.train()

    def step() -> None:
        backbone.zero_grad()
        embedding = backbone(batch)
        embedding.backward(torch.ones_like(embedding))

    return step


def classifier_step(run: RunSettings) -> Callable[[], None]:
    """The classifier's forward and backward pass in one process."""
    centers = nn.Parameter(torch.randn(run.classes * run.sub_centers, run.embedding_size))
    embedding = F.normalize(torch.randn(run.batch_size, run.embedding_size)).requires_grad_()
    label = torch.randint(run.classes, (run.batch_size,))
    classifier = MarginClassifier(centers, ClassShard(run.classes, 0, 1), ArcFace(), scale=64.0, group=None,
                                  loss=partial(margin_softmax, saved_probs_mib=probability_bytes(run) / 2**20),
                                  sub_centers=run.sub_centers)

    def step() -> None:
        centers.grad = embedding.grad = None
        classifier(embedding, label)[0].backward()

    return step
