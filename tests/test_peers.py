"""What other trainers get wrong when the batch or the classes are spread over processes, and what is right here.

The docstring of each test says what they do. Where it is short, the test computes the wrong value too.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from helpers.margins import true_arcface
from helpers.parity import Outcome, run_training
from torch import nn
from torch.utils.checkpoint import checkpoint

from losses.margins import MARGINS
from losses.sampling import draw_classes
from models.checkpointing import checkpoint_activations
from models.classifier import initial_centers
from models.iresnet import IBasicBlock
from utils.dist.sharding import ClassShard
from utils.training.optim import RowSGD
from utils.training.schedules import ScheduleFlags, learning_rate

FLOAT64 = ["--precision", "float64"]
SHARDED = ["--enable-model-parallel", *FLOAT64]


def norm_of_difference(one: Outcome, other: Outcome) -> float:
    """Of the backbone's gradients in the first step, relative to their norm."""
    names = [name for name in one.gradients[0] if name.startswith("backbone.")]
    difference, whole = (math.sqrt(sum(np.square(array).sum() for array in arrays)) for arrays in (
        [one.gradients[0][name] - other.gradients[0][name] for name in names],
        [one.gradients[0][name] for name in names]))
    return difference / whole


def test_shards_of_equal_size_start_from_different_centers():
    """insightface seeds every rank alike: with equal shards, class c and class c + C/W start from one center."""
    first, second = (initial_centers(ClassShard(8, rank, 2), 16, seed=1) for rank in (0, 1))
    assert (first - second).norm(dim=1).min() > 0.1


def test_the_target_slope_is_that_of_the_margin():
    """insightface, CVLface and SOTA-FR change the target logit under no_grad: their slope is 1 everywhere."""
    cosine = torch.tensor([0.3, 0.9, -0.6], dtype=torch.float64)
    _, slope, _ = MARGINS["arcface"](margin=0.5, easy_margin=False).with_slopes(cosine, None)
    torch.testing.assert_close(slope, torch.tensor([1.03, 1.87, 0.52], dtype=torch.float64), atol=0.006, rtol=0)


def test_the_combined_margin_applies_all_three():
    """insightface's CombinedMarginLoss ignores m1 and m2 as soon as m3 is positive."""
    cosine = torch.linspace(-0.5, 0.9, 8, dtype=torch.float64)
    phi = MARGINS["combined"](m1=0.9, m2=0.4, m3=0.15).target(cosine, None)[0]
    torch.testing.assert_close(phi, (0.9 * cosine.acos() + 0.4).cos() - 0.15)
    assert (phi - (cosine - 0.15)).abs().min() > 0.01


def test_adaface_subtracts_its_angular_margin():
    """SOTA-FR scales the angle, theta (1 - m z), where the paper has theta - m z (Kim et al. 2022, eq. 11)."""
    margin = MARGINS["adaface"]()
    cosine, norm = torch.tensor([0.5], dtype=torch.float64), torch.tensor([80.0], dtype=torch.float64)
    z = 0.333 * (80 - 20) / (100 + 0.001)  # the statistics at the start: mean 20, deviation 100
    theta = math.acos(0.5)
    phi = float(margin.target(cosine, norm)[0])
    assert math.isclose(phi, math.cos(theta - 0.4 * z) - (0.4 + 0.4 * z), rel_tol=1e-6)
    assert abs(phi - (math.cos(theta * (1 - 0.4 * z)) - (0.4 + 0.4 * z))) > 1e-3


def test_adaface_statistics_are_those_of_the_global_batch(pools):
    """AdaFace keeps a mean and deviation on each GPU, of the images of that GPU (its issues 39 and 76)."""
    def statistics(outcomes: list[Outcome]) -> list[list[float]]:
        return [[float(outcome.weights[f"classifier.margin.{name}"]) for name in ("norm_mean", "norm_std")]
                for outcome in outcomes]

    (alone,) = statistics(pools(1).run(run_training, 5, False, SHARDED, "adaface"))
    for flags in (SHARDED, FLOAT64):
        for of_rank in statistics(pools(3).run(run_training, 5, False, flags, "adaface")):
            np.testing.assert_allclose(of_rank, alone, rtol=1e-12)


def test_magface_does_not_depend_on_the_owner_of_the_class(pools):
    """MagFace's distributed program loses the margin's gradient by the norm where another rank has the image's class,
    and multiplies lambda by the number of processes."""
    (alone,) = pools(1).run(run_training, 5, False, SHARDED, "magface")
    for outcome in pools(3).run(run_training, 5, False, SHARDED, "magface"):
        assert norm_of_difference(alone, outcome) < 1e-12
        np.testing.assert_allclose(outcome.losses, alone.losses, rtol=1e-12)


def test_accumulated_losses_are_divided(pools):
    """insightface adds the gradients of micro-batches without dividing: K of them train at K times the rate."""
    outcomes = [pools(1).run(run_training, 5, False, [*SHARDED, "--accumulation-steps", str(steps)])[0]
                for steps in (1, 2)]
    assert norm_of_difference(*outcomes) < 1e-12


def test_curricularface_moves_slowly():
    """TFace moves t by a tenth of each batch; the paper by a hundredth (Huang et al. 2020, eq. 9)."""
    margin = MARGINS["curricularface"]().double()
    margin.update(torch.full((4,), 0.5, dtype=torch.float64), None)
    torch.testing.assert_close(margin.t, torch.tensor(0.01 * 0.5, dtype=torch.float64))


def test_arcface_continues_beyond_pi():
    """cos(theta + m) rises again beyond pi - m: a target that is far away would be pushed away further."""
    cosine = torch.linspace(-0.999, 0.999, 501, dtype=torch.float64)
    phi = MARGINS["arcface"](margin=0.5, easy_margin=False).target(cosine, None)[0]
    assert (phi.diff() > 0).all()
    assert not ((cosine.acos() + 0.5).cos().diff() > 0).all()
    torch.testing.assert_close(phi, true_arcface(cosine, easy_margin=False))


def test_the_first_step_of_a_polynomial_schedule_is_a_warm_up_step():
    """insightface's polynomial schedule takes its first step at the full rate, before the warm-up begins."""
    flags = ScheduleFlags(lr=0.4, schedule="poly", warmup_epochs=2)
    assert [learning_rate(step, 10, 100, flags) for step in (0, 1, 19)] == pytest.approx([0.02, 0.04, 0.4])


def test_sampled_classes_do_not_depend_on_the_number_of_processes():
    """insightface's PartialFC and PLSC draw on each rank from its own shard: other classes at every world size."""
    drawn = []
    for world_size in (1, 2, 3, 8):
        shards = [ClassShard(100_000, rank, world_size) for rank in range(world_size)]
        drawn.append(torch.cat([shard.start + draw_classes(shard, 0.1, seed=1, step=7) for shard in shards]))
    assert len(drawn[0]) > 9_900 and all(torch.equal(other, drawn[0]) for other in drawn[1:])


def test_rows_that_are_not_sampled_rest():
    """PartialFC v2 passes a dense gradient of zeros, so that momentum and weight decay move every row."""
    weight, dense = (nn.Parameter(torch.ones(6, 2, dtype=torch.float64)) for _ in range(2))
    optimizer = RowSGD(weight, skip_nonfinite=False, lr=0.1, momentum=0.9, weight_decay=0.1)
    theirs = torch.optim.SGD([dense], lr=0.1, momentum=0.9, weight_decay=0.1)
    for row in (1, 4):
        weight.grad = torch.sparse_coo_tensor([[row]], torch.ones(1, 2, dtype=torch.float64), weight.shape,
                                              check_invariants=True)
        dense.grad = weight.grad.to_dense()
        optimizer.step()
        theirs.step()
    moved = weight.detach() != 1
    assert moved.any(1).tolist() == [False, True, False, False, True, False] and (dense.detach() != 1).all()
    momentum = optimizer.state[weight]["momentum_buffer"]
    assert momentum[[1, 4]].tolist() == [[1.1, 1.1]] * 2 and not momentum[[0, 2, 3, 5]].any()


def test_a_checkpointed_block_counts_its_images_once():
    """torch.utils.checkpoint computes a block twice, and so BatchNorm's statistics move twice."""
    torch.manual_seed(0)
    plain = nn.Sequential(IBasicBlock(4, 4, 1)).train()
    ours, theirs, x = copy.deepcopy(plain), copy.deepcopy(plain), torch.randn(8, 4, 6, 6, requires_grad=True)
    for out in (plain(x), checkpoint_activations(ours)(x), checkpoint(theirs, x, use_reentrant=False)):
        out.sum().backward()
    statistics = [torch.cat([buffer.flatten() for name, buffer in module.named_buffers() if "running" in name])
                  for module in (plain, ours, theirs)]
    assert torch.equal(statistics[1], statistics[0]) and not torch.equal(statistics[2], statistics[0])
