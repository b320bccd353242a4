"""Every mode of training against the truth: one process, the full batch, the full softmax, in float64.

The distributed side runs main.py's own build_training and train_one_epoch. The truth (helpers/parity.py) has nothing of
the project's but the initial weights and the batches.
"""

from __future__ import annotations

from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.margins import TrueLoss, true_arcface
from helpers.parity import BATCH, SEED, Outcome, assert_equal, run_training, true_training
from helpers.tiny import TinyBackbone
from helpers.training import IMAGES

from utils import build
from utils.dist.context import DistContext
from utils.options import parse_options

SHARDED = ["--enable-model-parallel"]
MODES = {
    "base": [],
    "base, ZeRO": ["--enable-zero-optim"],
    "base, accumulation": ["--accumulation-steps", "2"],
    "sharded": SHARDED,
    "sharded, dim 1": [*SHARDED, "--model-parallel-dim", "1"],
    "sharded, dim -1": [*SHARDED, "--model-parallel-dim", "-1"],
    "sharded, ZeRO": [*SHARDED, "--enable-zero-optim"],
    "sharded, accumulation": [*SHARDED, "--accumulation-steps", "2"],
    "sharded, ZeRO, accumulation": [*SHARDED, "--enable-zero-optim", "--accumulation-steps", "2"],
    "sharded, hard margin": [*SHARDED, "--no-easy-margin"],
}
CLASSIFIERS = {
    "base, torchshard classifier": ["--classifier", "torchshard"],
    "sharded, torchshard classifier": [*SHARDED, "--classifier", "torchshard"],
    "sharded, probabilities computed again": [*SHARDED, "--classifier-memory-mib", "0"],
    "sharded, fused update": [*SHARDED, "--fuse-classifier-update"],
    "sharded, fused update, ZeRO": [*SHARDED, "--fuse-classifier-update", "--enable-zero-optim"],
}
MODES |= CLASSIFIERS
_truths: dict[tuple, Outcome] = {}


def truth_for(num_classes: int, batch_norm: bool, flags: list[str]) -> Outcome:
    micro_batches = int(flags[flags.index("--accumulation-steps") + 1]) if "--accumulation-steps" in flags else 1
    easy = "--no-easy-margin" not in flags
    key = (num_classes, batch_norm, easy, micro_batches if batch_norm else 1)
    if key not in _truths:
        _truths[key] = true_training(num_classes, batch_norm, TrueLoss(partial(true_arcface, easy_margin=easy), []),
                                     micro_batches=key[-1])
    return _truths[key]


# 2 leaves shards empty at 3 and 4; 5 gives 2, 2, 1, 0 at 4; 12 divides by all; 13 by none.
CASES = [(mode, num_classes) for mode in MODES for num_classes in ((5,) if mode in CLASSIFIERS else (5, 12))]
CASES += [(mode, num_classes) for mode in ("base", "sharded") for num_classes in (2, 13)]


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2, 3,
                                        pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("mode", "num_classes"), CASES)
def test_equals_single_process_in_float64(pools, mode, world_size, num_classes):
    flags = [*MODES[mode], "--precision", "float64"]
    outcomes = pools(world_size).run(run_training, num_classes, False, flags)
    assert_equal(outcomes, truth_for(num_classes, False, flags), "--enable-model-parallel" in flags, 1e-9, num_classes)


def test_fused_update_with_one_process_and_no_model_parallel(pools):
    flags = ["--fuse-classifier-update", "--precision", "float64"]
    assert_equal(pools(1).run(run_training, 12, False, flags), truth_for(12, False, flags), True, 1e-9, 12)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", ["base", "base, ZeRO", "base, accumulation", "sharded", "sharded, ZeRO",
                                  "sharded, accumulation"])
def test_synchronised_batch_norm_equals_single_process(pools, mode, world_size):
    flags = [*MODES[mode], "--precision", "float64", "--sync-bn"]
    outcomes = pools(world_size).run(run_training, 5, True, flags)
    assert_equal(outcomes, truth_for(5, True, flags), "--enable-model-parallel" in flags, 1e-9, 5)


@pytest.mark.parametrize("mode", ["base", "sharded"])
def test_batch_norm_alone_does_differ(pools, mode):
    """The test above can fail: without --sync-bn the statistics are each rank's own."""
    outcomes = pools(2).run(run_training, 5, True, [*MODES[mode], "--precision", "float64"])
    with pytest.raises(AssertionError):
        assert_equal(outcomes, truth_for(5, True, []), mode == "sharded", 1e-9, 5)


@pytest.mark.parametrize("mode", ["base", "sharded", "sharded, ZeRO"])
@pytest.mark.parametrize(("flags", "tolerance"), [([], 1e-4), (["--enable-amp-mode", "--amp-dtype", "bf16"], 0.1)])
def test_lower_precision_is_near(pools, mode, flags, tolerance):
    outcomes = pools(2).run(run_training, 13, False, [*MODES[mode], *flags])
    assert_equal(outcomes, truth_for(13, False, []), "--enable-model-parallel" in MODES[mode], tolerance, 13)


def scaler_steps(rank: int, world_size: int, flags: list[str]) -> tuple[list[np.ndarray], list[float]]:
    """Two steps with the fp16 scaler; in the first one, only the last rank's own shard overflows."""
    options = parse_options(["unused", "--num-classes", "5", "--batch-size", str(BATCH), "--enable-model-parallel",
                             "--enable-amp-mode", "--amp-dtype", "fp16", *flags])
    context = DistContext(rank, world_size, world_size, torch.device("cpu"))
    with mock.patch.object(build, "build_backbone", lambda arch, embedding_size: TinyBackbone(False)):
        state, model = build.build_training(context, options, SEED, IMAGES, BATCH)
    assert state.scaler.is_enabled()
    state.scaler.scale(torch.ones(()))  # makes the scale tensor
    weights, scales = [], []
    for step in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        if step == 0 and rank == world_size - 1:
            model.module.classifier.weight.grad[0, 0] = float("inf")
        state.scaler.step_all(state.optimizers.all)
        weights.append(np.concatenate([parameter.detach().numpy().ravel() for parameter in model.parameters()]))
        scales.append(state.scaler.get_scale())
    return weights, scales


@pytest.mark.parametrize("flags", [[], ["--enable-zero-optim"]])
def test_all_ranks_skip_a_step_together(pools, flags):
    torch.manual_seed(SEED)
    start = np.concatenate([parameter.detach().numpy().ravel() for parameter in TinyBackbone(False).parameters()])
    for weights, scales in pools(2).run(scaler_steps, flags):
        np.testing.assert_array_equal(weights[0][:len(start)], start)  # skipped on the rank without overflow as well
        assert not np.array_equal(weights[1], weights[0])
        assert scales == [32768.0, 32768.0]
