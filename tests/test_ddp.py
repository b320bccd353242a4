"""The settings of DistributedDataParallel: fewer copies, no broadcasts, and the training stays the same to the bit."""

from __future__ import annotations

import warnings
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.parity import run_training
from helpers.training import RandomFaces, RecordingLog, make_run

import main
from data.loader import TrainBatch
from utils import build
from utils.dist.context import DistContext
from utils.dist.ddp import DDP_SETTINGS
from utils.operators import OperatorCounter
from utils.options import parse_options


def operators_of_a_step(rank: int, world_size: int) -> dict[str, tuple[Counter[str], list[str]]]:
    """Calls of a step of MobileFaceNet with our settings and with DDP's defaults; and the warnings of DDP."""
    options = parse_options(["unused", "-a", "mobilefacenet", "--embedding-size", "16", "--num-classes", "5", "-b",
                             str(2 * world_size), "--channels-last"])
    context, dataset = DistContext(rank, world_size, world_size, torch.device("cpu")), RandomFaces(5)
    found, nhwc = {}, []
    for name, settings in (("ours", DDP_SETTINGS), ("defaults", {})):
        with mock.patch.object(build, "DDP_SETTINGS", settings), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            state, model = build.build_training(context, options, 0, 8, 2 * world_size)
            state.backbone.register_forward_pre_hook(
                lambda _, inputs: nhwc.append(inputs[0].is_contiguous(memory_format=torch.channels_last)))
            run = make_run(context, options, state, model, 100, RecordingLog())
            batch = TrainBatch(dataset.images[:2], torch.from_numpy(dataset.labels[:2]), torch.arange(2), 0)
            main.train_one_epoch(run, [batch], 1)  # in it the ranks agree on the order of the buckets
            with OperatorCounter("cpu") as counter:
                main.train_one_epoch(run, [batch], 1)
        found[name] = counter.counts.launches + counter.counts.collectives, [str(warning.message) for warning in caught]
    assert nhwc == [True] * 4
    return found


def test_a_step_copies_a_third_less_and_broadcasts_nothing(pools):
    (found,) = pools(1).run(operators_of_a_step)
    (ours, warned), (defaults, _) = found["ours"], found["defaults"]
    assert defaults["copy_"] > 200 and ours["copy_"] <= 2 / 3 * defaults["copy_"]
    assert defaults["broadcast_"] > 0 and not ours["broadcast_"]
    assert not warned  # of gradients with other strides than their weights


MODES = {
    "base": [], "accumulation": ["--accumulation-steps", "2"], "ZeRO": ["--enable-zero-optim"],
    "sharded, clipped": ["--enable-model-parallel", "--clip-grad-norm", "0.1"],
    "skip, fp16": ["--on-nonfinite", "skip", "--enable-amp-mode", "--amp-dtype", "fp16"],
    "running statistics of the loss": ["--loss", "adaface"],
}


def train_in_both_ways(rank: int, world_size: int, flags: list[str]) -> list:
    outcomes = []
    for settings in (DDP_SETTINGS, {}):
        with mock.patch.object(build, "DDP_SETTINGS", settings):
            outcomes.append(run_training(rank, world_size, 5, True, flags))
    return outcomes


@pytest.mark.parametrize("mode", MODES)
def test_training_is_that_of_ddps_defaults(pools, mode):
    """To the bit: losses, gradients, all weights on all ranks, and the buffers of rank 0, which are saved.

    So a resumed run, which gives all ranks the buffers of rank 0, goes on as the uninterrupted one.
    """
    for rank, (ours, defaults) in enumerate(pools(2).run(train_in_both_ways, MODES[mode])):
        assert ours.losses == defaults.losses
        for mine, other in zip(ours.gradients, defaults.gradients, strict=True):
            assert mine.keys() == other.keys()
            for name in mine:
                np.testing.assert_array_equal(mine[name], other[name], err_msg=name)
        same = {name: np.array_equal(value, defaults.weights[name]) for name, value in ours.weights.items()}
        own = {name for name in same if "running" in name}
        assert len(own) == 4 and all(same[name] or rank and name in own for name in same), same
