"""Both forms of the sharded margin softmax against the full softmax written out, for any sharding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.margins import random_case, true_gradients

from losses.fused import margin_softmax
from losses.margins import arcface_margin
from losses.softmax import margin_softmax_torchshard
from utils.dist.sharding import ClassShard, init_model_parallel

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
    loss, num_closer = IMPLEMENTATIONS[name](embedding, label, centers, shard=shard, group=group, **settings(easy))
    loss.backward()
    gradient = embedding.grad
    dist.all_reduce(gradient)
    return loss.item(), gradient.numpy(), centers.grad.numpy(), num_closer.numpy()


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


def check_random_cases(rank: int, world_size: int, first_seed: int, count: int) -> int:
    """Each rank compares its part."""
    group = init_model_parallel(world_size)
    for seed in range(first_seed, first_seed + count):
        case = random_case(np.random.default_rng(seed))
        loss, embedding_grad, centers_grad, slope = true_gradients(case)
        shard = ClassShard(len(case["centers"]), rank, world_size)
        rows = slice(shard.start, shard.stop)
        for dtype in (torch.float64, torch.float32):
            embedding = case["embedding"].to(dtype, copy=True).requires_grad_()
            centers = case["centers"][rows].to(dtype, copy=True).requires_grad_()
            got, _ = margin_softmax(
                embedding, case["label"], centers, shard=shard, group=group, scale=case["scale"], margin=case["margin"],
                easy_margin=case["easy"], chunk=case["chunk"], memory_mib=case["memory_mib"],
            )
            got.backward()
            dist.all_reduce(embedding.grad)
            pairs = [(got.detach(), torch.tensor(loss, dtype=torch.float64)), (embedding.grad, embedding_grad), (centers.grad, centers_grad[rows])]
            for mine, true in pairs:
                if dtype == torch.float64:
                    # At cos = 1 the slope is 7e7, and what is left of it in the centers' gradient, 0, is its rounding error.
                    allowed = 1e-10 * true.norm() + 1e-15 * case["scale"] * slope
                    assert (mine - true).norm() <= allowed, (seed, float((mine - true).norm()), float(allowed))
                else:
                    assert mine.isfinite().all() and mine.norm() <= 2 * case["scale"] / torch.finfo(dtype).eps**0.5, seed
    return count


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_random_shapes_equal_float64_truth(pools, world_size):
    assert pools(world_size).run(check_random_cases, 1000 * world_size, 60) == [60] * world_size


@pytest.mark.parametrize("easy", [True, False])
@pytest.mark.parametrize("memory_mib", [0, 1e9])
def test_float32_equals_float64_away_from_the_poles(easy, memory_mib):
    generator = torch.Generator().manual_seed(3)
    centers = torch.randn(400, 64, generator=generator, dtype=torch.float64)
    label = torch.randint(400, (48,), generator=generator)
    # Targets of all angles up to |cos| = 0.99.
    direction = F.normalize(centers[label])
    other = torch.randn(48, 64, generator=generator, dtype=torch.float64)
    other = F.normalize(other - (other * direction).sum(1, keepdim=True) * direction)
    cosine = torch.linspace(-0.99, 0.99, 48, dtype=torch.float64)[:, None]
    embedding = cosine * direction + (1 - cosine**2).sqrt() * other
    results = {}
    for dtype in (torch.float64, torch.float32):
        x, w = embedding.to(dtype, copy=True).requires_grad_(), centers.to(dtype, copy=True).requires_grad_()
        loss, _ = margin_softmax(x, label, w, shard=ClassShard(400, 0, 1), group=None, scale=64.0, margin=0.5,
                                 easy_margin=easy, chunk=37, memory_mib=memory_mib)
        loss.backward()
        results[dtype] = loss.detach(), x.grad, w.grad
    for mine, true in zip(results[torch.float32], results[torch.float64]):
        assert (mine - true).norm() <= 1e-5 * true.norm()


@pytest.mark.parametrize("memory_mib", [0, 1e9])
def test_backward_twice_gives_the_same(memory_mib):
    embedding, label, centers = inputs(11)
    embedding.requires_grad_(), centers.requires_grad_()
    loss, _ = margin_softmax(embedding, label, centers, shard=ClassShard(11, 0, 1), group=None, chunk=4,
                             memory_mib=memory_mib, **settings(True))
    first = torch.autograd.grad(loss, [embedding, centers], retain_graph=True)
    second = torch.autograd.grad(2 * loss, [embedding, centers])
    for once, twice in zip(first, second):
        torch.testing.assert_close(2 * once, twice, rtol=1e-12, atol=0)


def test_loss_alone_without_a_graph():
    embedding, label, centers = inputs(11)
    with torch.no_grad():
        loss, _ = margin_softmax(embedding, label, centers.requires_grad_(), shard=ClassShard(11, 0, 1), group=None,
                                 memory_mib=1e9, **settings(True))
    assert not loss.requires_grad and loss.item() == pytest.approx(truth(11, True)[0], rel=1e-12)


def fused_updates(rank: int, world_size: int, num_classes: int, fused: bool, momentum: float) -> tuple[np.ndarray, ...]:
    """Weights, momentum and embedding gradient after four steps of SGD with a changing learning rate."""
    group = init_model_parallel(world_size)
    shard = ClassShard(num_classes, rank, world_size)
    embedding, label, centers = inputs(num_classes)
    weight = torch.nn.Parameter(centers[shard.start:shard.stop].clone())
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=momentum, weight_decay=0.01)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 0.5 / (step + 1)
        x = embedding.roll(step, 0).requires_grad_()
        loss, _ = margin_softmax(x, label, weight, shard=shard, group=group, chunk=2, memory_mib=0 if step % 2 else 1e9,
                                 update=optimizer if fused else None, **settings(True))
        loss.backward()
        assert (weight.grad is None) == fused
        optimizer.step()
        optimizer.zero_grad()
    return weight.detach().numpy(), optimizer.state[weight].get("momentum_buffer", torch.zeros(0)).numpy(), x.grad.numpy()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_fused_update_equals_the_optimizer(pools, world_size, momentum):
    for num_classes in (2, 11):
        plain = pools(world_size).run(fused_updates, num_classes, False, momentum)
        for mine, true in zip(pools(world_size).run(fused_updates, num_classes, True, momentum), plain):
            for one, other in zip(mine, true):
                np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-11)


def test_fused_update_refuses_a_second_backward():
    embedding, label, centers = inputs(11)
    weight = torch.nn.Parameter(centers)
    loss, _ = margin_softmax(embedding.requires_grad_(), label, weight, shard=ClassShard(11, 0, 1), group=None,
                             update=torch.optim.SGD([weight], lr=0.1), **settings(True))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("memory_mib", [0, 1e9])
@pytest.mark.parametrize(("operands", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_low_precision_operands_are_near(operands, tolerance, memory_mib):
    generator = torch.Generator().manual_seed(1)
    centers = torch.randn(5000, 128, generator=generator)
    label = torch.randint(5000, (32,), generator=generator)
    embedding = F.normalize(F.normalize(centers[label]) + 0.1 * torch.randn(32, 128, generator=generator))
    results = {}
    for kind in (None, operands):
        x, w = embedding.clone().requires_grad_(), centers.clone().requires_grad_()
        loss, _ = margin_softmax(x, label, w, shard=ClassShard(5000, 0, 1), group=None, operands=kind, chunk=700,
                                 memory_mib=memory_mib, scale=64.0, margin=0.5, easy_margin=True)
        loss.backward()
        results[kind] = loss.detach(), x.grad, w.grad
    for mine, true in zip(results[operands], results[None]):
        assert mine.dtype == torch.float32 and 0 < (mine - true).norm() <= tolerance * true.norm()


def rank_with_nan(rank: int, world_size: int, where: str):
    group = init_model_parallel(world_size)
    shard = ClassShard(8, rank, world_size)
    embedding, label, centers = inputs(8)
    if where == "embedding":
        embedding[3] = float("nan")
    else:
        centers[label[3]] = float("nan")
    with torch.no_grad():
        _, num_closer = margin_softmax(
            embedding, label, centers[shard.start:shard.stop], shard=shard, group=group, **settings(True)
        )
    return num_closer.numpy(), label.numpy()


@pytest.mark.parametrize("where", ["embedding", "center"])
def test_nan_is_never_a_hit(pools, where):
    for num_closer, _ in pools(2).run(rank_with_nan, where):
        assert num_closer[3] >= 5


def test_gradient_is_finite_in_float32_at_cosine_one():
    embedding, label, centers = (tensor.float() if tensor.is_floating_point() else tensor for tensor in inputs(8))
    embedding.requires_grad_(), centers.requires_grad_()
    loss, _ = margin_softmax(embedding, label, centers, shard=ClassShard(8, 0, 1), group=None, scale=64.0, margin=0.5,
                             easy_margin=True)
    loss.backward()
    assert embedding.grad.isfinite().all() and centers.grad.isfinite().all()
    assert centers.grad.norm() < 100
