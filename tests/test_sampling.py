"""Sampled classes: the draw, and training with them against one process that is given the same classes. Float64."""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.margins import TRUTH, TrueLoss, true_softmax
from helpers.saved import assert_same_training, saved_training
from helpers.training import RESUME, build_sharded_fp16, losses, train
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from losses import sampling
from losses.class_major import margin_softmax_class_major
from losses.fused import margin_softmax
from losses.margins import MARGINS
from losses.sampling import draw_classes, join_targets
from models.classifier import MarginClassifier, initial_centers
from utils import build
from utils.dist.sharding import ClassShard, init_model_parallel
from utils.errors import UserError
from utils.launch.plan import ProcessPlan
from utils.options import describe_changes, parse_options
from utils.preflight import check_sampling
from utils.training import optim
from utils.training.optim import RowAdamW, RowSGD

# Small blocks: 50 classes are two blocks and a part, which the shards of 2 and 3 ranks cut.
BLOCK, RATE, SEED, N, D, SCALE = 20, 0.3, 3, 24, 8, 12.0
SETTINGS = dict(lr=0.3, momentum=0.9, weight_decay=1e-2)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(sampling, "SAMPLING_BLOCK", BLOCK)


def drawn_of(num_classes: int, step: int, world_size: int = 1, rate: float = RATE, seed: int = SEED) -> list[int]:
    """The drawn classes of all ranks."""
    shards = [ClassShard(num_classes, rank, world_size) for rank in range(world_size)]
    return [shard.start + row for shard in shards for row in draw_classes(shard, rate, seed, step).tolist()]


@pytest.mark.parametrize("num_classes", [2, 5, 20, 50, 61])
def test_the_draw_depends_on_seed_and_step_but_not_on_the_ranks(num_classes):
    for step in range(3):
        drawn = drawn_of(num_classes, step)
        assert drawn == sorted(set(drawn)) and drawn[-1] < num_classes
        assert all(drawn_of(num_classes, step, world_size) == drawn for world_size in (2, 3, 7))
    assert len({tuple(drawn_of(61, step, seed=seed)) for step in range(5) for seed in range(5)}) == 25


def test_the_draw_has_an_exact_count_in_each_block():
    drawn = np.array(drawn_of(61, 0))
    assert [int(((drawn >= first) & (drawn < first + BLOCK)).sum()) for first in range(0, 61, BLOCK)] == [6, 6, 6, 1]
    counts = np.zeros(40)
    for step in range(2000):
        counts[drawn_of(40, step)] += 1
    assert np.abs(counts / 2000 - RATE).max() < 5 * (RATE * (1 - RATE) / 2000) ** 0.5


def test_the_targets_join_once_and_where_they_are_is_known():
    drawn, target = torch.tensor([1, 4, 7]), torch.tensor([4, 5, -1, 5, 0, -1, 4, 9])
    sample = join_targets(drawn, target)
    taking_part = sample.rows[torch.cat([torch.zeros(3, dtype=torch.bool), sample.left_out]).logical_not()]
    assert taking_part.tolist() == [1, 4, 7, 0, 5, 9] and len(sample.rows) == 3 + 8
    assert set(sample.rows.tolist()) == {0, 1, 4, 5, 7, 9}
    assert [-1 if place < 0 else int(sample.rows[place]) for place in sample.place] == target.tolist()
    assert not sample.left_out[sample.place[sample.place >= 3] - 3].any()
    nothing = torch.empty(0, dtype=torch.int64)
    assert join_targets(nothing, target).rows.unique().tolist() == [0, 4, 5, 9]
    assert join_targets(nothing, torch.full((8,), -1)).rows.tolist() == []


@pytest.mark.parametrize(("matmul_dtype", "tolerance"), [(None, 1e-5), (torch.bfloat16, 2e-3), (torch.float16, 5e-4)])
@pytest.mark.parametrize("sub_centers", [1, 3])
@pytest.mark.parametrize("walk", [margin_softmax, margin_softmax_class_major])
def test_equals_the_full_softmax_over_these_classes(walk, matmul_dtype, tolerance, sub_centers):
    """In float32 and with rounded products; also with the filter and a slope of 1."""
    generator = torch.Generator().manual_seed(0)
    centers, label = torch.randn(90, 32, generator=generator), torch.randint(90, (N,), generator=generator)
    drawn = torch.arange(0, 90 // sub_centers, 3)
    label %= 90 // sub_centers
    classes, results = torch.cat([drawn, label]).unique(), []
    rows = rows_of(classes, sub_centers)
    for weight, target, more in ((centers[rows], torch.searchsorted(classes, label), {}),
                                 (centers, label, dict(drawn=drawn, chunk=8))):
        for name, filter_above, saved in itertools.product(("arcface", "mv-softmax"), (None, 0.1), (0, 1e9)):
            margin, more["sub_centers"] = MARGINS[name](), sub_centers
            margin.unit_gradient = name == "arcface"
            x = F.normalize(torch.randn(N, 32, generator=torch.Generator().manual_seed(1))).requires_grad_()
            own = weight.clone().requires_grad_()
            loss, closer = walk(x, target, own, margin, scale=SCALE, group=None, filter_above=filter_above,
                                          saved_probs_mib=saved, matmul_dtype=matmul_dtype, **more)
            loss.backward()
            grad = own.grad.to_dense()[rows] if "drawn" in more else own.grad
            results.append([loss.detach(), x.grad, grad, closer])
    for true, mine in zip(results[:8], results[8:]):
        assert torch.equal(mine[3], true[3])
        for one, other in zip(mine[:3], true[:3]):
            assert (one - other).norm() <= tolerance * other.norm()


# ---- Training steps against the truth


def inputs(num_classes: int, sub_centers: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (3, N, D), labels (3, N) of some classes more than once, centers (C * q, D)."""
    generator = torch.Generator().manual_seed(num_classes)
    embedding, centers = (torch.randn(*shape, D, generator=generator, dtype=torch.float64)
                          for shape in ((3, N), (num_classes * sub_centers,)))
    label = torch.randint(num_classes, (3, N), generator=generator)
    label[:, N // 2:N // 2 + 5] = label[:, :5]
    return 8 * (embedding + F.normalize(centers)[label * sub_centers]), label, centers


def rows_of(classes: Tensor, sub_centers: int) -> Tensor:
    """The rows of these classes' centers."""
    return (classes[:, None] * sub_centers + torch.arange(sub_centers)).flatten()


def true_steps(loss: TrueLoss, num_classes: int, micro_batches: int, sub_centers: int = 1) -> list[np.ndarray]:
    """One process, plain PyTorch: losses, gradients of the embeddings, num_closer, weights, momentum, statistics."""
    embeddings, labels, centers = inputs(num_classes, sub_centers)
    momentum, statistics = torch.zeros_like(centers), dict(loss.statistics)
    traces: list[list] = [[], [], []]
    for step, (embedding, label) in enumerate(zip(embeddings, labels)):
        embedding, drawn = embedding.clone().requires_grad_(), torch.tensor(drawn_of(num_classes, step))
        used, gradient = torch.zeros(len(centers), dtype=torch.bool), torch.zeros_like(centers)
        cosines = []
        for x, y in zip(embedding.chunk(micro_batches), label.chunk(micro_batches)):
            classes = torch.cat([drawn, y]).unique()
            rows = rows_of(classes, sub_centers)
            sampled = centers[rows].requires_grad_()
            norm = x.norm(dim=1)
            value, closer = true_softmax(F.normalize(x), torch.searchsorted(classes, y), sampled, SCALE,
                                         *loss.parts(**statistics)[:2], norm, loss.parts(**statistics)[2], sub_centers)
            (value / micro_batches).backward()
            gradient[rows] += sampled.grad
            used[rows] = True
            own = F.normalize(centers.view(num_classes, sub_centers, D)[y], dim=2)
            cosines.append((F.normalize(x).unsqueeze(1) * own).sum(2).amax(1).detach())
            traces[0].append(value.item())
            traces[2].append(closer.numpy())
        traces[1].append(embedding.grad.numpy())
        moved = SETTINGS["momentum"] * momentum + gradient + SETTINGS["weight_decay"] * centers
        momentum = torch.where(used[:, None], moved, momentum)
        centers = torch.where(used[:, None], centers - SETTINGS["lr"] * momentum, centers)
        if loss.update is not None:
            statistics = loss.update(torch.cat(cosines), embedding.detach().norm(dim=1), **statistics)
    return [*map(np.array, traces), centers.numpy(), momentum.numpy(), np.array(list(map(float, statistics.values())))]


class NoSynchronisation(TorchDispatchMode):
    """Refuses operators that would wait for a GPU, since the host must know a value or a shape."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._schema.name.removeprefix("aten::")
        indices = args[1] if name in ("index", "index_put_") else ()
        assert name not in ("nonzero", "_local_scalar_dense", "masked_select", "_unique2", "unique_dim",
                            "unique_consecutive", "_coalesce"), name
        assert not any(index is not None and index.dtype == torch.bool for index in indices), name
        return operator(*args, **(kwargs or {}))


def sampled_steps(rank: int, world_size: int, name: str, num_classes: int, micro_batches: int, fused: bool,
                  more: dict, walk: Callable[..., tuple[Tensor, Tensor]] = margin_softmax) -> list[np.ndarray]:
    """What `true_steps` returns, of this rank's classes, by the classifier and its optimizer."""
    group, shard = init_model_parallel(world_size), ClassShard(num_classes, rank, world_size)
    sub_centers = more.get("sub_centers", 1)
    embeddings, labels, centers = inputs(num_classes, sub_centers)
    own_rows = slice(shard.start * sub_centers, shard.stop * sub_centers)
    weight = nn.Parameter(centers[own_rows].clone())
    optimizer = RowSGD(weight, skip_nonfinite=False, **SETTINGS)
    margin = MARGINS[name]().double()

    def loss(*args, **settings):
        return walk(*args, **{**settings, **more}, update=optimizer.update_rows if fused else None)

    with mock.patch.object(sampling, "SAMPLING_BLOCK", BLOCK):
        classifier = MarginClassifier(weight, shard, margin, scale=SCALE, group=group, loss=loss,
                                      sub_centers=sub_centers,
                                      draw=lambda step: draw_classes(shard, RATE, SEED, step))
        traces: list[list] = [[], [], []]
        for step in range(3):
            classifier.start_step(step)
            # The shards of two ranks, unless they are so small that nothing is drawn, which is known here.
            checked = world_size == 2 and len(classifier._drawn["drawn"]) > 0
            own = [slice(part * N // micro_batches + rank * N // micro_batches // world_size,
                         part * N // micro_batches + (rank + 1) * N // micro_batches // world_size)
                   for part in range(micro_batches)]
            embedding = embeddings[step].clone().requires_grad_()
            before = [tensor.clone() for tensor in (weight.detach(), momentum_of(optimizer))]
            for rows in own:
                x, y = embedding[rows], labels[step][rows]
                with NoSynchronisation() if checked else contextlib.nullcontext():
                    value, closer = classifier(x, y)
                    (value / micro_batches).backward()
                traces[0].append(value.item())
                traces[2].append(closer.numpy())
            assert (weight.grad is None) == fused or not len(weight)
            if checked and not fused:  # one gradient of the drawn classes, and the targets of each micro-batch
                assert len(weight.grad._values()) == (len(classifier._drawn["drawn"]) + N) * sub_centers
            with NoSynchronisation() if checked else contextlib.nullcontext():
                optimizer.step()
            optimizer.zero_grad()
            classifier.end_step()
            used = torch.zeros(len(centers), dtype=torch.bool)
            used[rows_of(torch.cat([torch.tensor(drawn_of(num_classes, step)), labels[step]]), sub_centers)] = True
            for old, new in zip(before, (weight.detach(), momentum_of(optimizer))):
                assert torch.equal((old != new).any(1), used[own_rows])  # others to the bit
            dist.all_reduce(embedding.grad)
            traces[1].append(embedding.grad.numpy() / world_size)  # which is for DDP's average
    return [*map(np.array, traces), weight.detach().numpy(), momentum_of(optimizer).numpy(),
            np.array([float(value) for value in margin.buffers()])]


def momentum_of(optimizer: RowSGD) -> Tensor:
    (weight,) = optimizer.param_groups[0]["params"]
    return optimizer.state[weight].get("momentum_buffer", torch.zeros_like(weight)).detach()


# 2 and 5 leave shards empty, or without a drawn class; 50 and 61 do not divide by the ranks; 40 does by 2.
CASES = [
    ("arcface", 50, 1, False, dict(chunk=7)), ("arcface", 61, 2, False, dict(saved_probs_mib=1e9)),
    ("arcface", 61, 1, True, dict(chunk=4)), ("arcface", 40, 1, True, dict(chunk=5, saved_probs_mib=1e9)),
    ("arcface", 61, 4, False, dict(chunk=7)), ("arcface", 5, 2, False, {}), ("arcface", 5, 1, True, {}),
    ("arcface", 2, 1, True, {}), ("arcface", 2, 1, False, {}),
    ("adaface", 61, 2, False, dict(chunk=9)), ("adaface", 50, 1, True, {}),
    ("curricularface", 50, 2, False, dict(chunk=7)), ("curricularface", 61, 1, True, dict(saved_probs_mib=1e9)),
    ("magface", 61, 1, True, {}), ("magface", 50, 2, False, dict(chunk=11)),
    ("mv-softmax", 50, 1, True, dict(chunk=7, saved_probs_mib=1e9)),
    ("mv-softmax", 61, 2, False, dict(chunk=7)), ("cosface", 61, 2, False, dict(chunk=7)),
    ("combined", 61, 2, False, dict(chunk=9)), ("sphereface", 50, 2, False, dict(chunk=7)),
    ("arcface", 61, 4, False, dict(chunk=9, sub_centers=3)), ("arcface", 61, 1, True, dict(chunk=9, sub_centers=3)),
    ("arcface", 5, 2, False, dict(sub_centers=2)), ("curricularface", 50, 2, False, dict(chunk=8, sub_centers=2)),
]
assert {name for name, *_ in CASES} == set(TRUTH)
CASES = [*((*case, margin_softmax) for case in CASES), *((*CASES[case], margin_softmax_class_major)
                                                         for case in (0, 3, 4, 5, 7, 11, 12, 15, 20))]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_steps_equal_those_of_one_process_with_the_same_classes(pools, world_size):
    for name, num_classes, micro_batches, fused, more, walk in CASES:
        what = f"{name}, {num_classes} classes, {micro_batches} micro-batches, fused {fused}, {more}"
        truth = true_steps(TRUTH[name], num_classes, micro_batches, more.get("sub_centers", 1))
        results = pools(world_size).run(sampled_steps, name, num_classes, micro_batches, fused, more, walk)
        for outcome in results:
            np.testing.assert_array_equal(outcome[2], truth[2], err_msg=what)
        for number in (0, 1, 3, 4, 5):
            mine = (np.concatenate([result[number] for result in results]) if number in (3, 4) else results[0][number])
            error, size = np.linalg.norm(mine - truth[number]), np.linalg.norm(truth[number])
            assert error <= 1e-9 * size, f"{what}, {number}: {error:.2g} of {size:.2g}"


def test_a_gradient_of_other_classes_is_refused_and_nothing_keeps_the_centers():
    embeddings, labels, centers = inputs(61)
    shard = ClassShard(61, 0, 1)
    classifier = MarginClassifier(nn.Parameter(centers), shard, MARGINS["arcface"](), scale=SCALE, group=None,
                                  draw=lambda step: draw_classes(shard, RATE, SEED, step))
    classifier.start_step(0)
    classifier(embeddings[0], labels[0])[0].backward()
    with pytest.raises(AssertionError, match="zero_grad first"):
        classifier.start_step(1)
    weight = weakref.ref(classifier.weight)
    gc.disable()  # the hook of the centers must not need it
    try:
        del classifier
        assert weight() is None
    finally:
        gc.enable()


# ---- Whole runs of the trainer

SAMPLED = {
    "SGD": ["--enable-model-parallel"],
    "fused update": ["--enable-model-parallel", "--fuse-classifier-update"],
    "accumulation, ZeRO": ["--enable-model-parallel", "--accumulation-steps", "2", "--enable-zero-optim"],
}


# Every loss, and several centers of a class, with settings that have an effect on the tiny backbone's norms
LOSSES = {name: ["--loss", name, *itertools.chain.from_iterable(
    (f"--{setting.replace('_', '-')}", str(value)) for setting, value in loss.trained.items())]
    for name, loss in TRUTH.items()} | {"sub-centers": ["--sub-centers", "3"]}


def train_and_note_draws(rank: int, world_size: int, argv: list[str]) -> list[int]:
    """The steps that classes were drawn for."""
    with mock.patch.object(build, "draw_classes", wraps=draw_classes) as draw:
        train(rank, world_size, argv)
    return [call.args[-1] for call in draw.call_args_list]


@pytest.mark.parametrize(("mode", "loss"), [*((mode, "arcface") for mode in SAMPLED),
                                            *(("accumulation, ZeRO", loss) for loss in LOSSES if loss != "arcface")])
def test_an_interrupted_run_continues_to_the_bit(pools, faces, tmp_path, mode, loss):
    flags = [str(faces), *RESUME, *SAMPLED[mode], *LOSSES[loss], "--sample-rate", "0.3"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pools(2).run(train, [*flags, "--seed", "5", "--output", str(whole)])
    pools(2).run(train, [*flags, "--seed", "5", "--output", str(parts), "--max-steps", "3"])  # of 4 in an epoch
    steps = pools(2).run(train_and_note_draws, [*flags, "--output", str(parts), "--resume", "auto"])
    assert steps == [[3, 4, 5, 6, 7]] * 2
    assert_same_training(parts, whole)
    assert losses(parts) == losses(whole) and len(losses(whole)) == 8


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_continues_with_fewer_ranks(pools, faces, tmp_path, loss):
    """Also with a rank without classes: 9 on 4 ranks are 3, 3, 3 and 0."""
    flags = [str(faces), *RESUME, "--num-classes", "9", "--sync-bn", "--precision", "float64", "--sample-rate", "0.3",
             *LOSSES[loss]]
    whole, parts, more = tmp_path / "whole", tmp_path / "parts", ["--enable-model-parallel"]
    pools(1).run(train, [*flags, "--seed", "5", "--output", str(whole)])
    pools(4).run(train, [*flags, *more, "--seed", "5", "--output", str(parts), "--max-steps", "3"])
    pools(2).run(train, [*flags, *more, "--output", str(parts), "--resume", "auto", "--fuse-classifier-update"])
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-9)
    assert_same_training(parts, whole, 1e-6)


ROW_OPTIMIZERS = [(RowSGD, torch.optim.SGD, dict(momentum=0.0)), (RowSGD, torch.optim.SGD, dict(momentum=0.9)),
                  (RowAdamW, torch.optim.AdamW, {})]


@pytest.mark.parametrize(("by_rows", "plain", "more"), ROW_OPTIMIZERS)
def test_a_sparse_step_is_the_step_of_these_rows(monkeypatch, by_rows, plain, more):
    """Of rows in any order and several times, in parts that separate equal rows."""
    monkeypatch.setattr(optim, "_STEPPED_ROWS", 2)
    settings, start = dict(lr=0.3, weight_decay=1e-2, **more), torch.randn(7, 3, dtype=torch.float64)
    sparse, dense = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer, true = by_rows(sparse, skip_nonfinite=False, **settings), plain([dense], **settings)
    for rows in ([5, 1, 1, 5, 3, 1, 1], [5, 5, 1, 3, 1, 1, 1]):
        values = torch.randn(7, 3, dtype=torch.float64)
        sparse.grad = torch.sparse_coo_tensor(torch.tensor([rows]), values, (7, 3), check_invariants=False)
        dense.grad = torch.zeros_like(dense).index_add_(0, torch.tensor(rows), values)
        optimizer.step()
        true.step()
    torch.testing.assert_close(sparse[[1, 3, 5]], dense[[1, 3, 5]], rtol=1e-12, atol=1e-12)
    assert torch.equal(sparse[[0, 2, 4, 6]], start[[0, 2, 4, 6]])


@pytest.mark.parametrize("sub_centers", [1, 3])
@pytest.mark.parametrize(("by_rows", "plain", "more"), ROW_OPTIMIZERS)
def test_the_fused_update_equals_the_sparse_step(by_rows, plain, more, sub_centers):
    embeddings, labels, centers = inputs(60)
    labels, weights = labels % (60 // sub_centers), []
    for fused in (True, False):
        weight = nn.Parameter(centers.clone())
        optimizer = by_rows(weight, skip_nonfinite=False, lr=0.3, weight_decay=1e-2, **more)
        for step in range(3):
            drawn, x = torch.arange(step, 60 // sub_centers, 4), F.normalize(embeddings[step])
            loss, _ = margin_softmax(x, labels[step], weight, MARGINS["arcface"](), scale=SCALE, group=None, chunk=9,
                                     sub_centers=sub_centers, drawn=drawn,
                                     update=optimizer.update_rows if fused else None)
            loss.backward()
            assert (weight.grad is None) == fused
            optimizer.step()
            optimizer.zero_grad()
        weights.append([weight.detach(), *(optimizer.state[weight][name] for name in optimizer._state_names())])
    for one, other in zip(*weights):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def step_after_an_overflow(rank: int, world_size: int) -> tuple[list[Tensor], list[Tensor]]:
    """Centers and momentum before, between and after two steps of sampled gradients with the fp16 scaler.

    The first one overflows on the last rank.
    """
    state, model = build_sharded_fp16(rank, world_size, 10, "--sample-rate", "0.3")
    weight, weights, momenta = model.module.classifier.weight, [], []
    for bad in (rank == world_size - 1, False):
        weights.append(weight.detach().clone())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        values = torch.ones(4, 512)
        values[2, 7] = float("inf") if bad else 1.0
        weight.grad = torch.sparse_coo_tensor(torch.tensor([[1, 3, 1, 0]]), values, weight.shape,
                                              check_invariants=False)
        state.scaler.step_all(state.optimizers.all)
        momenta.append(state.optimizers.state()["classifier.weight"]["momentum_buffer"].clone())
    return [*weights, weight.detach().clone()], momenta


def train_on_nan(rank: int, world_size: int, argv: list[str]) -> None:
    nan = mock.Mock(side_effect=lambda images, dtype, **_: torch.full_like(images, torch.nan, dtype=dtype))
    with mock.patch("main.prepare_batch", nan):
        train(rank, world_size, argv)


def test_a_skipped_step_leaves_all_rows(pools, faces, tmp_path):
    for weights, momenta in pools(2).run(step_after_an_overflow):
        assert torch.equal(weights[0], weights[1]) and not momenta[0].any()
        stepped = [True, True, False, True, False]
        assert (weights[2] != weights[1]).any(1).tolist() == momenta[1].any(1).tolist() == stepped
    for mode in SAMPLED:
        output = tmp_path / mode
        flags = [*SAMPLED[mode], "--sample-rate", "0.3", "--on-nonfinite", "skip", "--seed", "5", "--max-steps", "2"]
        pools(2).run(train_on_nan, [str(faces), *RESUME, *flags, "--output", str(output)])
        saved = saved_training(output)
        assert torch.equal(saved["centers"], initial_centers(ClassShard(11, 0, 1), 512, 5))
        assert not saved["optimizer/classifier.weight/momentum_buffer"].any()


# ---- Options


@pytest.mark.parametrize(("flags", "words"), [
    (["--sample-rate", "0"], "--sample-rate 0: give a number above 0 and up to 1"),
    (["--sample-rate", "1.5"], "--sample-rate 1.5"),
    (["--sample-rate", "0.3", "--classifier", "torchshard"], "--sample-rate 0.3 with --classifier torchshard"),
    (["--sample-rate", "0.3", "--enable-zero-optim"], "--sample-rate 0.3 with --enable-zero-optim"),
    (["--sample-rate", "0.3", "--clip-grad-norm", "5", "--clip-centers"], "--clip-centers with --sample-rate 0.3"),
])
def test_wrong_flags(flags, words):
    with pytest.raises(UserError, match=words):
        parse_options(["DIR", *flags])


def test_copies_of_the_classifier_cannot_be_sampled():
    plan = ProcessPlan("spawn", nodes=1, node_rank=0, processes_per_node=2, device_type="cpu", gpu=None, backend="gloo",
                       host="127.0.0.1", port=0)
    check_sampling(parse_options(["DIR", "--sample-rate", "0.3", "--enable-model-parallel"]), plan)
    with pytest.raises(UserError, match="--sample-rate 0.3: .*add --enable-model-parallel"):
        check_sampling(parse_options(["DIR", "--sample-rate", "0.3"]), plan)


def test_a_resumed_run_tells_that_the_rate_changed():
    options = parse_options(["DIR", "--sample-rate", "0.3"])
    assert describe_changes({"sample_rate": 1.0}, options) == "--sample-rate 0.3 (was 1)"
