"""The sharded margin softmax against the full softmax written out, for any sharding; each margin: test_margins.py."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.margins import TRUTH, random_case, true_gradients, truth_of
from torch import Tensor

from losses.class_major import fits, margin_softmax_class_major
from losses.fused import margin_softmax
from losses.margins import MARGINS, ArcFace, Margin
from losses.softmax import margin_softmax_plain, margin_softmax_torchshard
from utils.dist.sharding import ClassShard, init_model_parallel
from utils.training.optim import RowSGD

N, D = 9, 16
SCALE = 16.0
WALKS = {"fused": margin_softmax, "class-major": margin_softmax_class_major}
IMPLEMENTATIONS = {**WALKS, "torchshard": margin_softmax_torchshard}
WALK = pytest.mark.parametrize("walk", WALKS)
SAVED = pytest.mark.parametrize("saved_probs_mib", [0, 1e9])


def local_rows(label: Tensor, shard: ClassShard) -> Tensor:
    """(N,): the row of this rank's centers, or -1."""
    return torch.where((label >= shard.start) & (label < shard.stop), label - shard.start, -1)


def inputs(num_classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_classes)
    embedding = F.normalize(torch.randn(N, D, generator=generator, dtype=torch.float64))
    centers = torch.randn(num_classes, D, generator=generator, dtype=torch.float64)
    label = torch.randint(num_classes, (N,), generator=generator)
    centers[label[0]] = 2 * embedding[0]  # cos = 1
    embedding[1] = -F.normalize(centers[label[1]], dim=0)  # cos = -1
    return embedding, label, centers


def truth(num_classes: int, easy: bool):
    """With the margin's own slope: at cos = 1 the true one is infinite."""
    embedding, label, centers = inputs(num_classes)
    loss, (embedding_grad, centers_grad), closer = true_gradients([embedding, centers, None], label, SCALE,
                                                                  ArcFace(easy_margin=easy))
    return loss.item(), embedding_grad.numpy(), centers_grad.numpy(), closer.numpy()


def run_shard(rank: int, world_size: int, name: str, num_classes: int, easy: bool):
    group = init_model_parallel(world_size)
    shard = ClassShard(num_classes, rank, world_size)
    embedding, label, centers = inputs(num_classes)
    centers = centers[shard.start:shard.stop].clone().requires_grad_()
    embedding.requires_grad_()
    loss, num_closer = IMPLEMENTATIONS[name](embedding, local_rows(label, shard), centers, ArcFace(easy_margin=easy),
                                             scale=SCALE, group=group)
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


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS.values(), margin_softmax_plain])
def test_without_a_group(implementation):
    loss, embedding_grad, centers_grad, rank = truth(8, True)
    embedding, label, centers = inputs(8)
    embedding.requires_grad_(), centers.requires_grad_()
    got, got_rank = implementation(embedding, label, centers, ArcFace(), scale=SCALE, group=None)
    got.backward()
    assert got.item() == pytest.approx(loss, rel=1e-12)
    assert_near(embedding.grad.numpy(), embedding_grad)
    assert_near(centers.grad.numpy(), centers_grad)
    np.testing.assert_array_equal(got_rank, rank)


def check_random_cases(rank: int, world_size: int, first_seed: int, count: int, walk: str) -> int:
    """Each rank compares its part."""
    group = init_model_parallel(world_size)
    for seed in range(first_seed, first_seed + count):
        case = random_case(np.random.default_rng(seed))
        loss, embedding_grad, centers_grad, slope = truth_of(case)
        shard = ClassShard(len(case["centers"]), rank, world_size)
        rows = slice(shard.start, shard.stop)
        for dtype in (torch.float64, torch.float32):
            embedding = case["embedding"].to(dtype, copy=True).requires_grad_()
            centers = case["centers"][rows].to(dtype, copy=True).requires_grad_()
            got, _ = WALKS[walk](
                embedding, local_rows(case["label"], shard), centers, case["margin"], group=group, scale=case["scale"],
                chunk=case["chunk"], saved_probs_mib=case["saved_probs_mib"],
            )
            got.backward()
            dist.all_reduce(embedding.grad)
            pairs = [(got.detach(), torch.tensor(loss, dtype=torch.float64)), (embedding.grad, embedding_grad),
                     (centers.grad, centers_grad[rows])]
            for mine, true in pairs:
                if dtype == torch.float64:
                    # At cos = 1 the slope is 7e7, and its share in the centers' gradient, 0, is a rounding error.
                    # Class-major, it is of a product of two rounded factors.
                    rounding = 1e-15 if walk == "fused" else 1e-14
                    allowed = 1e-10 * true.norm() + rounding * case["scale"] * slope
                    assert (mine - true).norm() <= allowed, (seed, float((mine - true).norm()), float(allowed))
                else:
                    limit = 2 * case["scale"] / torch.finfo(dtype).eps**0.5
                    assert mine.isfinite().all() and mine.norm() <= limit, seed
    return count


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "walk"), [*((size, "fused") for size in (1, 2, 3, 4)), (2, "class-major"),
                                                  (3, "class-major")])
def test_random_shapes_equal_float64_truth(pools, world_size, walk):
    assert pools(world_size).run(check_random_cases, 1000 * world_size, 60, walk) == [60] * world_size


@WALK
@pytest.mark.parametrize("easy", [True, False])
@SAVED
def test_float32_equals_float64_away_from_the_poles(walk, easy, saved_probs_mib):
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
        loss, _ = WALKS[walk](x, label, w, ArcFace(easy_margin=easy), group=None, scale=64.0, chunk=37,
                                 saved_probs_mib=saved_probs_mib)
        loss.backward()
        results[dtype] = loss.detach(), x.grad, w.grad
    for mine, true in zip(results[torch.float32], results[torch.float64]):
        assert (mine - true).norm() <= 1e-5 * true.norm()


@WALK
@SAVED
def test_backward_twice_gives_the_same(walk, saved_probs_mib):
    embedding, label, centers = inputs(11)
    embedding.requires_grad_(), centers.requires_grad_()
    loss, _ = WALKS[walk](embedding, label, centers, ArcFace(), scale=SCALE, group=None, chunk=4,
                             saved_probs_mib=saved_probs_mib)
    first = torch.autograd.grad(loss, [embedding, centers], retain_graph=True)
    second = torch.autograd.grad(2 * loss, [embedding, centers])
    for once, twice in zip(first, second):
        torch.testing.assert_close(2 * once, twice, rtol=1e-12, atol=0)


@WALK
def test_loss_alone_without_a_graph(walk):
    embedding, label, centers = inputs(11)
    with torch.no_grad():
        loss, _ = WALKS[walk](embedding, label, centers.requires_grad_(), ArcFace(), scale=SCALE, group=None,
                                 saved_probs_mib=1e9)
    assert not loss.requires_grad and loss.item() == pytest.approx(truth(11, True)[0], rel=1e-12)


def fused_updates(rank: int, world_size: int, num_classes: int, fused: bool, momentum: float,
                  walk: str = "fused") -> tuple[np.ndarray, ...]:
    """Weights, momentum and embedding gradient after four steps of SGD with a changing learning rate."""
    group = init_model_parallel(world_size)
    shard = ClassShard(num_classes, rank, world_size)
    embedding, label, centers = inputs(num_classes)
    weight = torch.nn.Parameter(centers[shard.start:shard.stop].clone())
    settings = dict(lr=0.1, momentum=momentum, weight_decay=0.01)
    optimizer = RowSGD(weight, skip_nonfinite=False, **settings) if fused else torch.optim.SGD([weight], **settings)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 0.5 / (step + 1)
        x = embedding.roll(step, 0).requires_grad_()
        loss, _ = WALKS[walk](x, local_rows(label, shard), weight, ArcFace(), scale=SCALE, group=group, chunk=2,
                                 saved_probs_mib=0 if step % 2 else 1e9,
                                 update=optimizer.update_rows if fused else None)
        loss.backward()
        assert (weight.grad is None) == fused
        optimizer.step()
        optimizer.zero_grad()
    buffer = optimizer.state[weight].get("momentum_buffer", torch.zeros(0))
    return weight.detach().numpy(), buffer.numpy(), x.grad.numpy()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_fused_update_equals_the_optimizer(pools, world_size, momentum):
    for num_classes in (2, 11):
        plain = pools(world_size).run(fused_updates, num_classes, False, momentum)
        for walk in WALKS:
            for mine, true in zip(pools(world_size).run(fused_updates, num_classes, True, momentum, walk), plain):
                for one, other in zip(mine, true):
                    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_masked_update_changes_nothing(momentum):
    weight = torch.nn.Parameter(torch.randn(5, 3))
    optimizer = RowSGD(weight, skip_nonfinite=True, lr=0.1, momentum=momentum, weight_decay=0.1)
    nan, finite = torch.full((2, 3), float("nan")), torch.tensor([True, False])
    states = []
    for mask, gradient in ((finite[1], nan), (finite[0], torch.ones(2, 3)), (finite[1], nan)):
        optimizer.update_rows(slice(1, 3), gradient.clone(), mask)
        buffer = optimizer.state[weight].get("momentum_buffer", torch.zeros(5, 3))
        states.append((weight.detach().clone(), buffer.clone()))
    assert not states[0][1].any()
    assert torch.equal((states[1][0] != states[0][0]).any(1), torch.tensor([False, True, True, False, False]))
    assert all(torch.equal(one, other) for one, other in zip(states[1], states[2]))


@WALK
def test_fused_update_refuses_a_second_backward(walk):
    embedding, label, centers = inputs(11)
    weight = torch.nn.Parameter(centers)
    loss, _ = WALKS[walk](embedding.requires_grad_(), label, weight, ArcFace(), scale=SCALE, group=None,
                             update=RowSGD(weight, skip_nonfinite=False, lr=0.1).update_rows)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@WALK
@SAVED
@pytest.mark.parametrize(("matmul_dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_low_precision_operands_are_near(walk, matmul_dtype, tolerance, saved_probs_mib):
    generator = torch.Generator().manual_seed(1)
    centers = torch.randn(5000, 128, generator=generator)
    label = torch.randint(5000, (32,), generator=generator)
    embedding = F.normalize(F.normalize(centers[label]) + 0.1 * torch.randn(32, 128, generator=generator))
    results = {}
    for kind in (None, matmul_dtype):
        x, w = embedding.clone().requires_grad_(), centers.clone().requires_grad_()
        loss, _ = WALKS[walk](x, label, w, ArcFace(), scale=64.0, group=None, matmul_dtype=kind, chunk=700,
                                 saved_probs_mib=saved_probs_mib)
        loss.backward()
        results[kind] = loss.detach(), x.grad, w.grad
    for mine, true in zip(results[matmul_dtype], results[None]):
        assert mine.dtype == torch.float32 and 0 < (mine - true).norm() <= tolerance * true.norm()


def rank_with_nan(rank: int, world_size: int, where: str, walk: str):
    group = init_model_parallel(world_size)
    shard = ClassShard(8, rank, world_size)
    embedding, label, centers = inputs(8)
    if where == "embedding":
        embedding[3] = float("nan")
    else:
        centers[label[3]] = float("nan")
    with torch.no_grad():
        loss, num_closer = WALKS[walk](embedding, local_rows(label, shard), centers[shard.start:shard.stop], ArcFace(),
                                       scale=SCALE, group=group)
    return num_closer.numpy(), loss.item()


@pytest.mark.parametrize("where", ["embedding", "center"])
def test_nan_is_never_a_hit(pools, where):
    fused, class_major = (pools(2).run(rank_with_nan, where, walk) for walk in WALKS)
    for (num_closer, loss), (same, also) in zip(fused, class_major):
        assert num_closer[3] >= 5 and np.isnan(loss) and np.isnan(also)
        np.testing.assert_array_equal(num_closer, same)


@WALK
def test_gradient_is_finite_in_float32_at_cosine_one(walk):
    embedding, label, centers = (tensor.float() if tensor.is_floating_point() else tensor for tensor in inputs(8))
    embedding.requires_grad_(), centers.requires_grad_()
    loss, _ = WALKS[walk](embedding, label, centers, ArcFace(), scale=64.0, group=None)
    loss.backward()
    assert embedding.grad.isfinite().all() and centers.grad.isfinite().all()
    assert centers.grad.norm() < 100


@WALK
@pytest.mark.parametrize("scale", [16.0, 1000.0])
@SAVED
def test_rows_without_other_classes_have_no_gradient(walk, scale, saved_probs_mib):
    embedding, label, centers = inputs(8)
    embedding, centers = embedding.float().requires_grad_(), centers.float().requires_grad_()
    loss, _ = WALKS[walk](embedding, label, centers, ArcFace(), scale=scale, group=None, filter_above=-1.0, chunk=3,
                          saved_probs_mib=saved_probs_mib)
    loss.backward()
    assert loss.item() == 0 and not embedding.grad.any() and not centers.grad.any()


@WALK
def test_a_loss_that_is_not_finite_updates_nothing(walk):
    embedding, label, centers = inputs(11)
    embedding[3] = float("nan")
    weight = torch.nn.Parameter(centers.clone())
    optimizer = RowSGD(weight, skip_nonfinite=True, lr=0.1, momentum=0.9)
    loss, _ = WALKS[walk](embedding.requires_grad_(), label, weight, ArcFace(), scale=SCALE, group=None, chunk=4,
                          update=optimizer.update_rows)
    loss.backward()
    assert torch.equal(weight, centers)


@WALK
@SAVED
def test_fp16_holds_small_probabilities(walk, saved_probs_mib):
    """Most of the other classes' probabilities are below 6e-8, the smallest positive number of fp16."""
    generator = torch.Generator().manual_seed(1)
    centers, label = torch.randn(2000, 128, generator=generator), torch.randint(20, (32,), generator=generator)
    embedding = F.normalize(F.normalize(centers[label]) + 0.01 * torch.randn(32, 128, generator=generator))
    grads = []
    for kind in (None, torch.float16):
        w = centers.clone().requires_grad_()
        loss, _ = WALKS[walk](embedding.clone().requires_grad_(), label, w, ArcFace(), scale=24.0, group=None,
                              matmul_dtype=kind, saved_probs_mib=saved_probs_mib)
        loss.backward()
        grads.append(w.grad[20:])
    assert (grads[1] - grads[0]).norm() <= 5e-3 * grads[0].norm()


# ---- Margins with a map of the negatives, and with the norm


@dataclass(eq=False, repr=False)
class MappedNegatives(Margin):
    """CosFace; negatives above phi become v * c + v - 1 (Wang et al. 2020, MV-Softmax), below -0.3 take no part."""

    v: float = 1.12

    def target(self, cosine, norm=None):
        return cosine - 0.35, torch.ones_like(cosine), None

    def negatives(self, cosine, target, phi):
        assert cosine.shape[0] == target.shape[0] == phi.shape[0] and target.shape[1] == phi.shape[1] == 1
        hard, out = cosine > phi, cosine < -0.3
        mapped = torch.where(hard, self.v * cosine + self.v - 1, cosine).masked_fill(out, -1e9)
        return mapped, (1 + (self.v - 1) * hard.to(cosine.dtype)).masked_fill(out, 0)


@dataclass(eq=False, repr=False)
class MarginByNorm(Margin):
    """cos(theta + m(norm)), m linear in the norm (Meng et al. 2021, MagFace)."""

    uses_norm = True

    def target(self, cosine, norm=None):
        m, theta = 0.45 + 0.0035 * (norm - 10), cosine.acos()
        sine = (theta + m).sin()
        return (theta + m).cos(), sine / theta.sin(), -0.0035 * sine


def true_mapped(cosine, target, phi):
    mapped = torch.where(cosine > phi, 1.12 * cosine + 0.12, cosine)
    return mapped.masked_fill(cosine < -0.3, -1e9)


MORE = {
    "negatives": (MappedNegatives(), lambda cosine, norm: cosine - 0.35, true_mapped),
    "norm": (MarginByNorm(), lambda cosine, norm: (cosine.acos() + 0.45 + 0.0035 * (norm - 10)).cos(), None),
}


def more_inputs(name: str, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor | None], Tensor]:
    generator = torch.Generator().manual_seed(5)
    embedding, centers = (torch.randn(rows, 8, generator=generator, dtype=torch.float64) for rows in (40, 23))
    label = torch.randint(23, (40,), generator=generator)
    embedding += F.normalize(centers[label])
    norm = 20 * embedding.norm(dim=1) if name == "norm" else None
    return [None if tensor is None else tensor.to(dtype) for tensor in (F.normalize(embedding), centers, norm)], label


def run_more(rank: int, world_size: int, name: str, form: str, options: dict, permuted: bool) -> list[np.ndarray]:
    """Loss, gradients of embeddings (and norms) summed over ranks, of all centers, num_closer."""
    (embedding, centers, norm), label = more_inputs(name)
    rows = torch.arange(23)[rank::world_size] if permuted else torch.arange(23).tensor_split(world_size)[rank]
    if form == "torchshard":
        shard = ClassShard(23, rank, world_size)
        rows = torch.arange(shard.start, shard.stop)
    target = (label[:, None] == rows).int().argmax(1).where(torch.isin(label, rows), -1)
    own = centers[rows].clone().requires_grad_()
    leaves = [tensor.requires_grad_() for tensor in (embedding, norm) if tensor is not None]
    loss, closer = IMPLEMENTATIONS[form](embedding, target, own, MORE[name][0], norm=norm,
                                         group=init_model_parallel(world_size), **{"scale": 12.0, **options})
    (2 * loss).backward()
    whole = torch.zeros_like(centers)
    whole[rows] = own.grad
    for tensor in (whole, *(leaf.grad for leaf in leaves)):
        dist.all_reduce(tensor)
    results = (loss.detach(), leaves[0].grad, whole, *(leaf.grad for leaf in leaves[1:]), closer)
    return [tensor.numpy() for tensor in results]


@pytest.mark.parametrize(("form", "options", "permuted"), [
    ("torchshard", {}, False), ("fused", dict(chunk=5), True), ("fused", dict(chunk=4, saved_probs_mib=1e9), False),
    ("fused", dict(chunk=3, saved_probs_mib=40 * 19 * 8 * 2 / 2**20), True), ("class-major", dict(chunk=5), True),
    ("class-major", dict(chunk=3, saved_probs_mib=40 * 3 * 8 * 2 / 2**20), True),
    # One shift does not serve this scale.
    ("class-major", dict(chunk=5, scale=1000.0), True),
    ("class-major", dict(chunk=3, saved_probs_mib=1, scale=1000.0), False),
])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("name", MORE)
def test_negatives_and_norms(pools, name, world_size, form, options, permuted):
    """Also where the rows of the centers are any classes in any order, as sampled ones are."""
    tensors, label = more_inputs(name)
    loss, grads, closer = true_gradients(tensors, label, options.get("scale", 12.0), *MORE[name][1:])
    for got_loss, *got, got_closer in pools(world_size).run(run_more, name, form, options, permuted):
        assert got_loss == pytest.approx(loss.item(), rel=1e-12)
        np.testing.assert_array_equal(got_closer, closer.numpy())
        for mine, true in zip(got, grads, strict=True):
            assert_near(mine, 2 * true.numpy())


@WALK
@SAVED
@pytest.mark.parametrize(("matmul_dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("name", MORE)
def test_negatives_and_norms_in_low_precision(walk, name, matmul_dtype, tolerance, saved_probs_mib):
    tensors, label = more_inputs(name, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in tensors if tensor is not None]
    results = []
    for kind in (None, matmul_dtype):
        loss, _ = WALKS[walk](tensors[0], label, tensors[1], MORE[name][0], scale=12.0, group=None, norm=tensors[2],
                                 matmul_dtype=kind, saved_probs_mib=saved_probs_mib, chunk=7)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for true, mine in zip(*results):
        assert mine.dtype == torch.float32 and 0 < (mine - true).norm() <= tolerance * true.norm()


def test_products_in_tf32_are_near_float64(monkeypatch):
    """--matmul tf32 on a GPU: cuBLAS rounds float32 operands to 10 bits. The figures are in losses/README.md."""
    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        bits = tensor.contiguous().view(torch.int32)
        return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)

    generator = torch.Generator().manual_seed(0)
    centers, label = torch.randn(5000, 512, generator=generator), torch.randint(5000, (64,), generator=generator)
    near = F.normalize(F.normalize(centers[label]) + 0.06 * torch.randn(64, 512, generator=generator))
    product, add_product = torch.mm, torch.Tensor.addmm_
    for embedding in (near, F.normalize(torch.randn(64, 512, generator=generator))):
        results = {}
        for dtype in (torch.float64, torch.float32):
            if dtype == torch.float32:
                monkeypatch.setattr(torch, "mm", lambda a, b, out: product(rounded(a), rounded(b), out=out))
                monkeypatch.setattr(torch.Tensor, "addmm_",
                                    lambda self, a, b: add_product(self, rounded(a), rounded(b)))
            x, w = (tensor.to(dtype, copy=True).requires_grad_() for tensor in (embedding, centers))
            loss, num_closer = margin_softmax(x, label, w, ArcFace(), group=None, scale=64.0)
            loss.backward()
            results[dtype] = (loss.detach(), x.grad, w.grad), num_closer
            monkeypatch.undo()
        (true, closer), (values, low_closer) = results.values()
        for value, exact, tolerance in zip(values, true, (1e-5, 1e-3, 1e-3)):
            error = (value - exact).norm() / exact.norm()
            assert 0 < error <= tolerance
        assert (values[1] - true[1]).norm() > 1e-5 * true[1].norm()  # the products were rounded
        assert torch.equal(low_closer < 5, closer < 5) and (low_closer - closer).abs().max() <= 5
# ---- The class-major form's one shift


# name: (settings, the running statistic, the largest scale here that one shift serves)
EXTREME = {"arcface": (dict(easy_margin=False), {}, 75), "mv-softmax": ({}, {}, 64),
           "curricularface, t 0": ({}, dict(t=0.0), 0), "curricularface, t 1": ({}, dict(t=1.0), 0)}


@pytest.mark.parametrize("scale", [64.0, 75.0, 76.0, 300.0, 1000.0])
@pytest.mark.parametrize("name", EXTREME)
def test_extreme_cosines_are_exact_in_float32(name, scale):
    """All cosines near -1, -0.9, 0 or 1, and one row's target among them or near the other end.

    One shift serves some of these scales, and the others have a pass for each row's largest logit.
    """
    (settings, statistic, largest), name = EXTREME[name], name.partition(",")[0]
    margin = MARGINS[name](**settings)
    if statistic:
        margin.t.fill_(statistic["t"])
    assert fits(margin, scale, torch.float32) == (scale <= largest)
    for toward, own in itertools.product((-1.0, -0.9, 0.0, 1.0), (None, 0.99, -0.99)):
        generator = torch.Generator().manual_seed(2)
        x, noise = (torch.randn(rows, 8, generator=generator, dtype=torch.float64) for rows in (5, 5))
        x = F.normalize(x[:1] + 1e-2 * x)
        centers = toward * x[:1] + 2e-2 * noise
        label = torch.tensor([0, 1, 2, 4, 3])
        if own is not None:
            centers[3] = own * x[4] + (1 - own**2) ** 0.5 * F.normalize(noise[3] - (noise[3] @ x[4]) * x[4], dim=0)
        true_parts = TRUTH[name].parts(**settings, **statistic)[:2]
        loss, grads, _ = true_gradients([x, centers, None], label, scale, *true_parts)
        for saved_probs_mib in (0, 1e9):
            leaves = [x.float().requires_grad_(), centers.float().requires_grad_()]
            got, _ = margin_softmax_class_major(leaves[0], label, leaves[1], margin, scale=scale, group=None, chunk=2,
                                                saved_probs_mib=saved_probs_mib)
            got.backward()
            # A cosine's rounding error, times the scale, is that of a logit.
            assert (got - loss).abs() <= 1e-6 * (scale + loss), (toward, own)
            for mine, true in zip(leaves, grads):
                assert (mine.grad - true).norm() <= 2e-5 * scale * true.norm(), (toward, own)
