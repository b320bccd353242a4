"""Every margin against its definition: itself, in both forms of the loss, and in training. Float64, plain PyTorch.

A new margin needs an entry in MARGINS and one in TRUTH (helpers/margins.py).
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.margins import TRUTH, TrueLoss, true_arcface, true_gradients
from helpers.parity import assert_equal, run_training, true_training

from losses.class_major import margin_softmax_class_major
from losses.fused import margin_softmax
from losses.margins import MARGINS
from losses.softmax import margin_softmax_plain, margin_softmax_torchshard
from utils.dist.sharding import ClassShard, init_model_parallel
from utils.flags import check_values, flags_of

CASES = [(name, settings) for name, true in TRUTH.items() for settings in true.tried]
FORMS = {"fused": margin_softmax, "class-major": margin_softmax_class_major, "torchshard": margin_softmax_torchshard}
GRID = torch.linspace(-0.999, 0.999, 1001, dtype=torch.float64)


def test_every_margin_has_its_truth():
    assert TRUTH.keys() == MARGINS.keys()


@pytest.mark.parametrize("name", TRUTH)
def test_flags_and_description(name):
    margin = MARGINS[name]()
    check_values(margin)
    flags = flags_of(MARGINS[name])
    assert all(definition.help and definition.section == "loss" for definition in flags.values())
    parameters = inspect.signature(TRUTH[name].phi).parameters
    assert {field: parameters[field].default for field in flags} == {field: getattr(margin, field) for field in flags}
    assert margin.describe() and margin.describe() in str(margin)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_value_and_slopes_match_the_definition(name, settings):
    margin = MARGINS[name](**settings).double()
    cosine = GRID.clone().requires_grad_()
    norm = torch.linspace(1, 120, len(GRID), dtype=torch.float64).requires_grad_() if margin.uses_norm else None
    true = TRUTH[name].phi(cosine, norm, **settings)
    (slope,) = torch.autograd.grad(true.sum(), cosine, retain_graph=True)
    phi, got_slope, norm_slope = margin.target(GRID, None if norm is None else norm.detach())
    torch.testing.assert_close(phi, true.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_slope, slope, rtol=1e-10, atol=1e-10)
    if norm_slope is not None:
        torch.testing.assert_close(norm_slope, torch.autograd.grad(true.sum(), norm)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_slope_is_the_numerical_derivative(name, settings):
    margin, step = MARGINS[name](**settings).double(), 1e-6
    cosine = torch.linspace(-0.93, 0.97, 38, dtype=torch.float64)  # no point within `step` of a kink
    norm = torch.full_like(cosine, 30.0) if margin.uses_norm else None
    above, below = (margin.target(cosine + sign * step, norm)[0] for sign in (1, -1))
    torch.testing.assert_close(margin.target(cosine, norm)[1], (above - below) / (2 * step), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_finite_at_and_slightly_outside_one(name, settings, dtype):
    eps, margin = torch.finfo(dtype).eps, MARGINS[name](**settings).to(dtype)
    cosine = torch.tensor([1.0, -1.0, 1 + eps, -1 - eps, 1 - eps, 0.0], dtype=dtype)
    norm = torch.ones_like(cosine) if margin.uses_norm else None
    results = [value for value in margin.target(cosine, norm) if value is not None]
    assert all(value.isfinite().all() and value.dtype == dtype for value in results)
    true = TRUTH[name].phi(torch.ones(1, dtype=torch.float64), None if norm is None else norm[:1].double(), **settings)
    assert results[0][0].item() == pytest.approx(true.item(), abs=1e-3)


@pytest.mark.parametrize("name", TRUTH)
def test_nan_stays_nan(name):
    margin = MARGINS[name]()
    assert margin.target(torch.tensor([float("nan")]), torch.ones(1) if margin.uses_norm else None)[0].isnan().all()


def test_one_row_leaves_adafaces_deviation():
    margin = MARGINS["adaface"]()
    margin.update(torch.zeros(1), torch.tensor([50.0]))
    assert float(margin.norm_mean) == pytest.approx(20.3) and float(margin.norm_std) == 100


def test_autograd_form_has_the_slopes_as_gradient():
    cosine = GRID.clone().requires_grad_()
    margin = MARGINS["arcface"](easy_margin=False)
    (margin(cosine) * 3).sum().backward()
    torch.testing.assert_close(cosine.grad, 3 * margin.target(GRID)[1])


def inputs(num_classes: int, name: str) -> tuple[list[torch.Tensor | None], torch.Tensor]:
    """Embeddings, centers, norms where the margin wants them, and labels; targets at all angles."""
    generator = torch.Generator().manual_seed(num_classes)
    embedding, centers = (torch.randn(rows, 16, generator=generator, dtype=torch.float64) for rows in (30, num_classes))
    label = torch.randint(num_classes, (30,), generator=generator)
    embedding += torch.linspace(-3, 3, 30)[:, None] * F.normalize(centers[label])
    norm = 10 * embedding.norm(dim=1) if MARGINS[name].uses_norm else None
    return [F.normalize(embedding), centers, norm], label


def run_form(rank: int, world_size: int, form: str, name: str, num_classes: int, **more: Any) -> tuple[np.ndarray, ...]:
    """Loss, num_closer, gradients of this rank's centers, of embeddings (summed) and of norms (summed)."""
    (embedding, centers, norm), label = inputs(num_classes, name)
    shard = ClassShard(num_classes, rank, world_size)
    owned = (label >= shard.start) & (label < shard.stop)
    centers = centers[shard.start:shard.stop].clone().requires_grad_()
    leaves = [embedding.requires_grad_()] + ([] if norm is None else [norm.requires_grad_()])
    target = torch.where(owned, label - shard.start, -1)
    loss, closer = FORMS[form](embedding, target, centers, MARGINS[name]().double(), scale=16.0, norm=norm,
                               group=init_model_parallel(world_size), **more)
    loss.backward()
    for leaf in leaves:
        if leaf.grad is None:  # the norm's, where the margin takes it as a constant
            leaf.grad = torch.zeros_like(leaf)
        dist.all_reduce(leaf.grad)
    return loss.detach().numpy(), closer.numpy(), centers.grad.numpy(), *(leaf.grad.numpy() for leaf in leaves)


def assert_near(mine: np.ndarray, true: torch.Tensor) -> None:
    assert np.linalg.norm(mine - true.numpy()) <= 1e-10 * true.norm()


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TRUTH)
def test_loss_and_gradients(pools, name, form, world_size):
    for num_classes in (2, 11):
        tensors, label = inputs(num_classes, name)
        loss, (embedding_grad, centers_grad, *norm_grad), num_closer = true_gradients(
            tensors, label, 16.0, *TRUTH[name].parts())
        results = pools(world_size).run(run_form, form, name, num_classes)
        for got_loss, got_closer, _, *grads in results:
            assert_near(got_loss, loss)
            np.testing.assert_array_equal(got_closer, num_closer.numpy())
            for mine, true in zip(grads, [embedding_grad, *norm_grad], strict=True):
                assert_near(mine, true)
        assert_near(np.concatenate([result[2] for result in results]), centers_grad)


@pytest.mark.parametrize("name", TRUTH)
def test_plain_form(name):
    (embedding, centers, norm), label = inputs(11, name)
    loss, grads, num_closer = true_gradients([embedding, centers, norm], label, 16.0, *TRUTH[name].parts())
    leaves = [tensor.requires_grad_() for tensor in (embedding, centers, norm) if tensor is not None]
    got, got_closer = margin_softmax_plain(embedding, label, centers, MARGINS[name]().double(), scale=16.0, norm=norm)
    assert_near(got.detach().numpy(), loss)
    assert torch.equal(got_closer, num_closer)
    for mine, true in zip(torch.autograd.grad(got, leaves, materialize_grads=True), grads):
        assert_near(mine.numpy(), true)


@pytest.mark.parametrize("name", TRUTH)
def test_unit_gradient_is_that_of_programs_which_change_the_logit_in_place(name):
    """As insightface: logits[rows, label] = phi under no_grad, so that the slope by the cosine is 1, and by the norm 0.
    """
    tensors, label = inputs(11, name)
    phi, negatives, penalty = TRUTH[name].parts()
    loss, true, _ = true_gradients(tensors, label, 16.0, lambda c, norm: c + (phi(c, norm) - c).detach(), negatives,
                                   penalty)
    margin = MARGINS[name]().double()
    margin.unit_gradient = True
    for form in (margin_softmax, margin_softmax_class_major, margin_softmax_plain):
        embedding, centers, norm = (None if tensor is None else tensor.clone().requires_grad_() for tensor in tensors)
        got, _ = form(embedding, label, centers, margin, scale=16.0, group=None, norm=norm)
        assert_near(got.detach().numpy(), loss)
        leaves = [embedding, centers] if norm is None else [embedding, centers, norm]
        for mine, expected in zip(torch.autograd.grad(got, leaves, materialize_grads=True), true, strict=True):
            assert_near(mine.numpy(), expected)


def test_the_unit_gradient_of_a_logit_that_is_changed_in_place():
    tensors, label = inputs(11, "arcface")
    embedding, centers = (tensor.clone().requires_grad_() for tensor in tensors[:2])
    logits = embedding @ F.normalize(centers).t()
    with torch.no_grad():
        logits[torch.arange(30), label] = true_arcface(logits[torch.arange(30), label])
    true = torch.autograd.grad(F.cross_entropy(16 * logits, label), [embedding, centers])
    margin = MARGINS["arcface"]()
    margin.unit_gradient = True
    loss, _ = margin_softmax(embedding, label, centers, margin, scale=16.0, group=None)
    for mine, expected in zip(torch.autograd.grad(loss, [embedding, centers]), true):
        assert_near(mine.numpy(), expected)


def run_filtered(rank: int, world_size: int, form: str, name: str, saved: float) -> tuple[np.ndarray, ...]:
    more = dict(saved_probs_mib=saved, chunk=4) if form != "torchshard" else {}
    return run_form(rank, world_size, form, name, 11, filter_above=0.2, **more)


def filtered(true: TrueLoss, above: float) -> TrueLoss:
    """Other classes with a cosine above this take no part."""
    def negatives(cosine, target, value, **settings):
        others = cosine if true.negatives is None else true.negatives(cosine, target, value, **settings)
        return others.masked_fill(cosine > above, -1e9)

    return dataclasses.replace(true, negatives=negatives)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("form", "saved"), [("fused", 0), ("fused", 1e9), ("class-major", 0), ("class-major", 1e9),
                                            ("torchshard", 0)])
@pytest.mark.parametrize("name", TRUTH)
def test_inter_class_filter(pools, name, form, saved, world_size):
    tensors, label = inputs(11, name)
    loss, (embedding_grad, centers_grad, *norm_grad), closer = true_gradients(
        tensors, label, 16.0, *filtered(TRUTH[name], 0.2).parts())
    assert loss < true_gradients(tensors, label, 16.0, *TRUTH[name].parts())[0]
    results = pools(world_size).run(run_filtered, form, name, saved)
    for got_loss, got_closer, _, *grads in results:
        assert_near(got_loss, loss)
        np.testing.assert_array_equal(got_closer, closer.numpy())
        for mine, true in zip(grads, [embedding_grad, *norm_grad], strict=True):
            assert_near(mine, true)
    assert_near(np.concatenate([result[2] for result in results]), centers_grad)


TRAINING = {
    "base": (2, []),
    "sharded, torchshard": (2, ["--enable-model-parallel", "--classifier", "torchshard"]),
    "sharded, fused update": (2, ["--enable-model-parallel", "--fuse-classifier-update"]),
}


@pytest.mark.parametrize("mode", TRAINING)
@pytest.mark.parametrize("name", TRUTH)
def test_training_equals_a_single_process(pools, name, mode):
    world_size, flags = TRAINING[mode]
    outcomes = pools(world_size).run(run_training, 5, False, [*flags, "--precision", "float64"], name)
    truth = true_training(5, False, TRUTH[name])
    assert_equal(outcomes, truth, "--enable-model-parallel" in flags, 1e-9, 5)


@pytest.mark.parametrize("flags", [["--fuse-classifier-update"], ["--accumulation-steps", "2"]])
@pytest.mark.parametrize("name", TRUTH)
def test_training_with_the_filter_equals_a_single_process(pools, name, flags):
    flags = ["--enable-model-parallel", "--precision", "float64", "--inter-class-filter", "0.02", *flags]
    outcomes = pools(2).run(run_training, 5, False, flags, name)
    truth = true_training(5, False, filtered(TRUTH[name], 0.02))
    assert truth.losses != true_training(5, False, TRUTH[name]).losses
    assert_equal(outcomes, truth, True, 1e-9, 5)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("name", TRUTH)
def test_sharded_training_equals_a_single_process(pools, name, world_size):
    for num_classes in (6, 5, 2):  # divides; does not; on three ranks, one has no class
        truth = true_training(num_classes, False, TRUTH[name])
        for micro_batches in (1, 2):
            flags = ["--enable-model-parallel", "--accumulation-steps", str(micro_batches), "--precision", "float64"]
            outcomes = pools(world_size).run(run_training, num_classes, False, flags, name)
            assert_equal(outcomes, truth, True, 1e-9, num_classes)
