"""The classifier around the loss: gathered rows and norms, running statistics of a margin, initial centers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from losses.margins import Margin
from losses.softmax import margin_softmax_plain, margin_softmax_torchshard
from models.classifier import MarginClassifier, class_centers
from utils.dist.sharding import ClassShard, init_model_parallel

CLASSES, ROWS, SIZE = 7, 12, 16


@dataclass(eq=False, repr=False)
class StatisticsMargin(Margin):
    """cos - 0.01 * norm * (1 + mean of the cosines so far)."""

    uses_norm = True
    has_statistics = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.updates = 0

    def target(self, cosine, norm=None):
        factor = 0.01 * (1 + self.mean)
        return cosine - factor * norm, torch.ones_like(cosine), -factor.expand_as(norm)

    def update(self, cosine, norm):
        assert cosine.shape == norm.shape == (2 * ROWS,)
        self.updates += 1
        self.mean.lerp_((cosine * norm).mean(), 0.5)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(2, ROWS, SIZE, generator=generator, dtype=torch.float64),
            torch.randint(CLASSES, (2, ROWS), generator=generator))


def build(shard: ClassShard, **settings) -> MarginClassifier:
    weight = class_centers(shard, SIZE, 1, dtype=torch.float64)
    return MarginClassifier(weight, shard, StatisticsMargin(), scale=8.0, **settings)


def two_steps(classifier: MarginClassifier, embeddings: Tensor, labels: Tensor, skip: list[float]) -> list[list]:
    """Two micro-batches a step; of each step loss, gradient of the embeddings, and the statistic after it."""
    results = []
    for skipped in skip:
        x = embeddings.clone().requires_grad_()
        loss = sum(classifier(*batch)[0] for batch in zip(x, labels)) / 2
        loss.backward()
        classifier.end_step(torch.tensor(skipped))
        results.append([loss.item(), x.grad.numpy(), classifier.margin.mean.item()])
    return results


def on_one_rank(rank: int, world_size: int, sharded: bool, form: str, skip: list[float]) -> list[list]:
    mine = slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    embeddings, labels = (tensor[:, mine] for tensor in inputs())
    group = init_model_parallel(world_size) if sharded else None
    shard = ClassShard(CLASSES, rank, world_size) if sharded else ClassShard(CLASSES, 0, 1)
    forms = {"torchshard": dict(loss=margin_softmax_torchshard), "fused": {}}
    return two_steps(build(shard, group=group, **forms[form]), embeddings, labels, skip)


@pytest.mark.slow
@pytest.mark.parametrize("skip", [[0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]])
@pytest.mark.parametrize(("sharded", "form"), [(True, "fused"), (True, "torchshard"), (False, "fused")])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_statistics_follow_the_global_batch(pools, world_size, sharded, form, skip):
    """Once per step, by the rows of all ranks and micro-batches; not in a skipped step. Norms have gradients."""
    classifier = build(ClassShard(CLASSES, 0, 1), group=None, loss=margin_softmax_plain)
    mean = 0.0
    for step, (loss, grad, after) in enumerate(two_steps(classifier, *inputs(), skip)):
        before, (embeddings, labels) = mean, inputs()
        own = classifier.weight.detach()[labels]
        cosine = F.cosine_similarity(embeddings, own, dim=2)
        if not skip[step]:
            mean = before + 0.5 * ((cosine * embeddings.norm(dim=2)).mean().item() - before)
        assert after == pytest.approx(mean, rel=1e-12)
        results = [rank[step] for rank in pools(world_size).run(on_one_rank, sharded, form, skip)]
        assert np.mean([result[0] for result in results]) == pytest.approx(loss, rel=1e-12)
        # As DistributedDataParallel averages: a rank's own rows have W times their share.
        whole = np.concatenate([result[1] for result in results], axis=1) / world_size
        np.testing.assert_allclose(whole, grad, rtol=1e-9, atol=1e-12)
        assert all(result[2] == pytest.approx(mean, rel=1e-12) for result in results)


def test_statistics_do_not_see_evaluation():
    classifier = build(ClassShard(CLASSES, 0, 1), group=None).eval()
    embeddings, labels = inputs()
    classifier(embeddings[0], labels[0])
    classifier.end_step()
    assert classifier.margin.updates == 0
