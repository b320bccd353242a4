"""Both forms of the sharded margin softmax against the full softmax written out, for any sharding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from losses.margin import arcface_margin
from losses.margin_softmax import margin_softmax, margin_softmax_torchshard
from utils.sharding import ClassShard, init_model_parallel

N, D = 9, 16
IMPLEMENTATIONS = {"ours": margin_softmax, "torchshard": margin_softmax_torchshard}


def inputs(num_classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_classes)
    embedding = F.normalize(torch.randn(N, D, generator=generator, dtype=torch.float64))
    centers = torch.randn(num_classes, D, generator=generator, dtype=torch.float64)
    label = torch.randint(num_classes, (N,), generator=generator)
    centers[label[0]] = 2 * embedding[0]  # cos = 1
    embedding[1] = -F.normalize(centers[label[1]], dim=0)  # cos = -1
    return embedding, label, centers


def settings(easy: bool) -> dict:
    return dict(scale=16.0, margin=0.5, easy_margin=easy)


def truth(num_classes: int, easy: bool):
    embedding, label, centers = inputs(num_classes)
    embedding.requires_grad_(), centers.requires_grad_()
    cosine = embedding @ F.normalize(centers).t()
    rows = torch.arange(N)
    target = cosine[rows, label]
    phi, slope = (value.detach() for value in arcface_margin(target, 0.5, easy))
    logits = 16.0 * cosine.index_put((rows, label), phi + slope * (target - target.detach()))
    loss = F.cross_entropy(logits, label)
    loss.backward()
    rank = (cosine > target[:, None]).sum(1)
    return loss.item(), embedding.grad.numpy(), centers.grad.numpy(), rank.numpy()


def run_shard(rank: int, world_size: int, name: str, num_classes: int, easy: bool):
    group = init_model_parallel(world_size)
    shard = ClassShard(num_classes, rank, world_size)
    embedding, label, centers = inputs(num_classes)
    centers = centers[shard.start:shard.stop].clone().requires_grad_()
    embedding.requires_grad_()
    loss, target_rank = IMPLEMENTATIONS[name](embedding, label, centers, shard=shard, group=group, **settings(easy))
    loss.backward()
    gradient = embedding.grad
    dist.all_reduce(gradient)
    return loss.item(), gradient.numpy(), centers.grad.numpy(), target_rank.numpy()


def assert_near(mine: np.ndarray, true: np.ndarray) -> None:
    """By norm: at cos = 1 the slope is 1/sqrt(eps), and single elements carry rounding errors that much larger."""
    assert np.linalg.norm(mine - true) <= 1e-9 * np.linalg.norm(true)


@pytest.mark.parametrize("easy", [True, False])
@pytest.mark.parametrize("num_classes", [2, 5, 8, 11])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_loss_gradients_and_ranks(pools, name, world_size, num_classes, easy):
    loss, embedding_grad, centers_grad, rank = truth(num_classes, easy)
    results = pools(world_size).run(run_shard, name, num_classes, easy)
    for got_loss, got_embedding_grad, _, got_rank in results:
        assert got_loss == pytest.approx(loss, rel=1e-12)
        assert_near(got_embedding_grad, embedding_grad)
        np.testing.assert_array_equal(got_rank, rank)
    assert_near(np.concatenate([result[2] for result in results]), centers_grad)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_without_a_group(implementation):
    loss, embedding_grad, centers_grad, rank = truth(8, True)
    embedding, label, centers = inputs(8)
    embedding.requires_grad_(), centers.requires_grad_()
    got, got_rank = implementation(embedding, label, centers, shard=ClassShard(8, 0, 1), group=None, **settings(True))
    got.backward()
    assert got.item() == pytest.approx(loss, rel=1e-12)
    assert_near(embedding.grad.numpy(), embedding_grad)
    assert_near(centers.grad.numpy(), centers_grad)
    np.testing.assert_array_equal(got_rank, rank)


def rank_with_nan(rank: int, world_size: int, where: str):
    group = init_model_parallel(world_size)
    shard = ClassShard(8, rank, world_size)
    embedding, label, centers = inputs(8)
    if where == "embedding":
        embedding[3] = float("nan")
    else:
        centers[label[3]] = float("nan")
    with torch.no_grad():
        _, target_rank = margin_softmax(
            embedding, label, centers[shard.start:shard.stop], shard=shard, group=group, **settings(True)
        )
    return target_rank.numpy(), label.numpy()


@pytest.mark.parametrize("where", ["embedding", "center"])
def test_nan_is_never_a_hit(pools, where):
    for target_rank, _ in pools(2).run(rank_with_nan, where):
        assert target_rank[3] >= 5


def test_gradient_is_finite_in_float32_at_cosine_one():
    embedding, label, centers = (tensor.float() if tensor.is_floating_point() else tensor for tensor in inputs(8))
    embedding.requires_grad_(), centers.requires_grad_()
    loss, _ = margin_softmax(embedding, label, centers, shard=ClassShard(8, 0, 1), group=None, scale=64.0, margin=0.5,
                             easy_margin=True)
    loss.backward()
    assert embedding.grad.isfinite().all() and centers.grad.isfinite().all()
    assert centers.grad.norm() < 100
