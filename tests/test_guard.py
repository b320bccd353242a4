"""Losses and weights that are inf or NaN: reported, skipped or the end of the run, and never saved."""

from __future__ import annotations

import itertools
import json
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import training
from helpers.commands import read_metrics
from helpers.tiny import TinyBackbone
from helpers.training import RESUME, RandomFaces, RecordingLog, build_sharded_fp16, make_run, train

import main
from data.loader import TrainBatch
from scripts import plot
from utils import build
from utils.dist.context import DistContext
from utils.errors import UserError
from utils.options import parse_options
from utils.training import clip
from utils.training.guard import StepGuard, StepLoss
from utils.training.metrics import TrainingLog

BATCH, CLASSES = 8, 5
MODES = {
    **training.MODES,
    "sharded, torchshard classifier": ["--enable-model-parallel", "--classifier", "torchshard"],
    "sharded, accumulation": ["--enable-model-parallel", "--accumulation-steps", "2"],
    "base, synchronised BatchNorm": ["--sync-bn"],
    "sharded, ZeRO, AdamW": ["--enable-model-parallel", "--enable-zero-optim", "--optimizer", "adamw", "--ema", "0.5",
                             "--clip-grad-norm", "0.5", "--clip-centers", "--no-decay", "norm"],
    "sharded, fused update, AdamW": ["--enable-model-parallel", "--fuse-classifier-update", "--optimizer", "adamw"],
    "base, fp16": ["--enable-amp-mode", "--amp-dtype", "fp16"],
}


class NotFiniteImages:
    """Replaces main.prepare_batch and returns NaN images in some of its calls."""

    def __init__(self, calls: set[int]) -> None:
        self._calls, self._count, self._prepare = calls, itertools.count(), main.prepare_batch

    def __call__(self, *args, **settings) -> torch.Tensor:
        images = self._prepare(*args, **settings)
        return images.fill_(float("nan")) if next(self._count) in self._calls else images


def steps_on_batches(
    rank: int, world_size: int, batches: list[int], spoiled: list[int], flags: list[str]
) -> dict[str, np.ndarray]:
    """The training state after main.py's loop over these batches; the `spoiled` ones are NaN on the last rank."""
    options = parse_options(["unused", "--num-classes", str(CLASSES), "--batch-size", str(BATCH), "--augment", "none",
                             "--wd", "1e-3", *flags])
    context = DistContext(rank, world_size, world_size, torch.device("cpu"))
    dataset, parts = RandomFaces(CLASSES), world_size * options.accumulation_steps
    loader = []
    for batch in batches:
        micro_batches = torch.arange(batch * BATCH, (batch + 1) * BATCH).chunk(parts)
        loader += [TrainBatch(dataset.images[indices], torch.from_numpy(dataset.labels[indices.numpy()]), indices, 0)
                   for indices in micro_batches[rank::world_size]]
    calls = {batches.index(batch) * options.accumulation_steps for batch in spoiled if rank == world_size - 1}
    with mock.patch.object(build, "build_backbone", lambda arch, embedding_size: TinyBackbone(batch_norm=True)):
        state, model = build.build_training(context, options, 5, len(dataset), BATCH)
    with mock.patch.object(main, "prepare_batch", NotFiniteImages(calls)):
        main.train_one_epoch(make_run(context, options, state, model, 1000, RecordingLog()), loader, len(batches))
    momentum = {f"{key} of {name}": tensor
                for name, values in state.optimizers.state().items() for key, tensor in values.items()}
    scaler = {"scale": torch.tensor(state.scaler.get_scale())}
    average = {f"average of {name}": tensor
               for name, tensor in (state.ema.state()["state_dict"] if state.ema is not None else {}).items()}
    tensors = {**model.module.state_dict(), **momentum, **average, **scaler}
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_a_skipped_step_did_not_happen(pools, mode, world_size):
    """NaN in the first step and in one in the middle, on one rank: the same as a run without these two steps."""
    flags = [*MODES[mode], "--on-nonfinite", "skip"]
    with_nan = pools(world_size).run(steps_on_batches, [0, 1, 2, 3, 4], [0, 3], flags)
    without = pools(world_size).run(steps_on_batches, [1, 2, 4], [], flags)
    for mine, true in zip(with_nan, without):
        assert mine.keys() == true.keys() and any(" of " in name for name in without[0])
        for name in true:
            assert np.isfinite(mine[name]).all(), name
            np.testing.assert_array_equal(mine[name], true[name], err_msg=name)


@pytest.mark.parametrize("mode", ["base", "base, ZeRO", "sharded", "sharded, fused update"])
def test_skip_changes_nothing_while_all_is_finite(pools, mode):
    flags = [*MODES[mode], "--precision", "float64"]
    skipping = pools(2).run(steps_on_batches, [0, 1, 2], [], [*flags, "--on-nonfinite", "skip"])
    stopping = pools(2).run(steps_on_batches, [0, 1, 2], [], flags)
    for mine, true in zip(skipping, stopping):
        for name in true:
            np.testing.assert_allclose(mine[name], true[name], rtol=1e-9, atol=1e-12, err_msg=name)


def test_without_skip_the_weights_are_lost(pools):
    """The tests above can fail."""
    for weights in pools(2).run(steps_on_batches, [0, 1], [0], MODES["sharded"]):
        assert all(np.isnan(weights[name]).any() for name in ("backbone.fc.weight", "classifier.weight"))


def scaler_decisions(rank: int, world_size: int) -> list[tuple[float, bool]]:
    """(fp16 scale, whether the weights moved) after an overflow, after a NaN loss, and after a good step."""
    state, model = build_sharded_fp16(rank, world_size, 5, "--on-nonfinite", "skip")
    outcome = []
    for overflow, loss in ((True, 1.0), (False, float("nan")), (False, 1.0)):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        if overflow and rank == world_size - 1:
            model.module.classifier.weight.grad[0, 0] = float("inf")
        state.scaler.step_all(state.optimizers.all, torch.tensor(float(loss != loss)))
        moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters())]
        assert len(set(moved)) == 1
        outcome.append((state.scaler.get_scale(), moved[0]))
    return outcome


def test_only_an_overflow_of_the_gradients_lowers_the_scale(pools):
    for outcome in pools(2).run(scaler_decisions):
        assert outcome == [(32768.0, False), (32768.0, False), (32768.0, True)]


def first_step_after_an_overflow(rank: int, world_size: int) -> float:
    """The classifier's momentum after a first step that the fp16 scaler skips and a second one with gradient 1."""
    state, model = build_sharded_fp16(rank, world_size, 40, "--wd", "0")
    for gradient in (float("inf"), 32768.0):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        # torch's fused SGD would take its momentum from this uninitialised memory after a skipped first step.
        with mock.patch.object(torch, "empty_like", lambda tensor, *args, **settings: torch.full_like(tensor, 1e3)):
            state.scaler.step_all(state.optimizers.all)
    return float((state.optimizers.state()["classifier.weight"]["momentum_buffer"] - 1).abs().max())


def test_the_momentum_of_a_shard_whose_first_step_overflowed(pools):
    assert pools(1).run(first_step_after_an_overflow) == [0.0]


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


def train_with_nan(rank: int, world_size: int, argv: list[str], bad_rank: int, bad_steps: list[int]) -> str:
    """The error of `main.py <argv>`, if any, where rank `bad_rank` gets NaN images in these steps (from 1)."""
    images = NotFiniteImages({step - 1 for step in bad_steps} if rank == bad_rank else set())
    try:
        with mock.patch.object(main, "prepare_batch", images):
            train(rank, world_size, argv)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("mode", ["base", "sharded"])
def test_stop_names_step_and_rank_and_saves_nothing(pools, faces, tmp_path, mode):
    # An epoch has 4 steps.
    flags = [str(faces), *RESUME, *MODES[mode], "--seed", "5", "--output", str(tmp_path), "-p", "10"]
    errors = pools(2).run(train_with_nan, flags, 1, [6])
    assert errors[0] == errors[1]
    assert errors[0].startswith("step 6: the loss is nan (embeddings of rank 1)")
    assert "--on-nonfinite skip" in errors[0] and "\n" not in errors[0]
    saved = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)
    assert saved["position"]["step"] == 4
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["loss"] is None for line in lines] == 5 * [False] + 3 * [True]
    assert [line.get("nonfinite", False) for line in lines] == 5 * [False] + 3 * [True]
    # A resumed run continues from what was saved.
    resume = [*flags[:-6], *flags[-4:], "--resume", str(tmp_path / "checkpoint.pth.tar")]
    assert pools(2).run(train_with_nan, resume, 1, []) == ["", ""]
    assert all(np.isfinite(line["loss"]) for line in read_metrics(tmp_path))


def test_skipped_steps_are_counted_and_plotted(pools, faces, tmp_path):
    flags = [str(faces), *RESUME, *MODES["sharded"], "--output", str(tmp_path), "-p", "2", "--on-nonfinite", "skip"]
    assert pools(2).run(train_with_nan, flags, 0, [2, 5]) == ["", ""]
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines if line.get("nonfinite")] == [2, 5]
    assert [line.get("skipped_steps") for line in lines] == [None, 1, None, 1, None, 2, None, 2]
    assert all(line["top1"] is not None for line in lines if "top1" in line)
    saved = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)
    assert saved["position"]["step"] == 8 and all(tensor.isfinite().all() for tensor in saved["state_dict"].values())
    loss = [row["loss"] for row in plot.read_metrics(str(tmp_path / "metrics.jsonl"))[0]]
    assert [step for step, value in enumerate(loss, 1) if np.isnan(value)] == [2, 5]
    means = plot.smooth(np.array(loss[:4]), 3)
    np.testing.assert_allclose(means[[0, 1, 3]], [loss[0], (loss[0] + loss[2]) / 2, sum(loss[2:4]) / 2])
    plot.plot_metrics(str(tmp_path / "metrics.jsonl"), str(tmp_path / "curve.svg"))


@pytest.mark.parametrize("mode", ["base", "sharded, fused update"])
def test_weights_that_are_not_finite_are_not_saved(pools, faces, tmp_path, mode):
    """The loss of the one step is finite, the weights after it are not."""
    flags = [str(faces), *RESUME, *MODES[mode], "--output", str(tmp_path), "--max-steps", "1",
             "--lr", "1e38", "--wd", "1e30"]
    errors = pools(2).run(train_with_nan, flags, 0, [])
    assert errors[0] == errors[1]
    assert "step 1 " in errors[0] and "(the backbone of all ranks, the class centers of all ranks)" in errors[0]
    assert np.isfinite(read_metrics(tmp_path)[0]["loss"])
    assert not (tmp_path / "checkpoint.pth.tar").exists()


def many_nonfinite_steps(rank: int, world_size: int, output: str, steps: int) -> tuple[int, str]:
    """(last step, error) of a log and a guard that meet losses of inf, except in step 5."""
    context = DistContext(rank, world_size, world_size, torch.device("cpu"))
    log = TrainingLog(context, output, fresh=True, step=0, total_steps=1000, epochs=1, global_batch=8, print_freq=10,
                      skip_nonfinite=True)
    guard = StepGuard(torch.nn.Identity(), skip=True)
    for step in range(1, steps + 1):
        try:
            guard.check(log.add(step=step, epoch=0, lr=0.1, loss=torch.tensor(1.0 if step == 5 else float("inf")),
                                num_closer=torch.zeros(4), finite=torch.tensor(True)))
        except UserError as error:
            return step, str(error)
    return steps, ""


def test_skip_gives_up_after_a_hundred_steps_in_a_row(pools, tmp_path):
    ((step, error),) = pools(1).run(many_nonfinite_steps, str(tmp_path), 200)
    assert step == 110
    assert error.startswith("step 110: the loss is inf (loss of rank 0; all embeddings were finite")
    assert "105 steps in a row" in error


def many_skipped_steps(rank: int, world_size: int, output: str) -> str:
    log = TrainingLog(DistContext(rank, world_size, world_size, torch.device("cpu")), output, fresh=True, step=0,
                      total_steps=1000, epochs=1, global_batch=8, print_freq=10)
    guard = StepGuard(torch.nn.Identity(), skip=False)
    for step in range(1, 121):
        try:
            guard.check(log.add(step=step, epoch=0, lr=0.1, loss=torch.tensor(2.0), num_closer=torch.zeros(4),
                                finite=torch.tensor(True), skipped=torch.tensor(float(step != 5))))
        except UserError as error:
            return str(error)
    return ""


def test_steps_that_are_skipped_for_their_gradients_are_counted_too(pools, tmp_path):
    """fp16, or a gradient norm that is not finite: the loss alone would not show it."""
    (error,) = pools(1).run(many_skipped_steps, str(tmp_path))
    assert error.startswith("step 110: gradients are inf or NaN (the loss is 2), like the 105 steps in a row")
    lines = read_metrics(tmp_path)
    assert [line["skipped_steps"] for line in lines if "skipped_steps" in line] == [*range(9, 109, 10)] + [109]


def train_with_a_norm_of_inf(rank: int, world_size: int, argv: list[str]) -> int:
    norms = itertools.chain([torch.tensor(float("inf"))], itertools.repeat(torch.tensor(1.0)))
    with mock.patch.object(clip, "get_total_norm", lambda gradients: next(norms)):
        return train(rank, world_size, argv)


def test_a_step_that_the_norm_skips_is_in_the_log(pools, faces, tmp_path):
    flags = [str(faces), *RESUME, "--on-nonfinite", "skip", "--clip-grad-norm", "1", "-p", "1", "--max-steps", "2"]
    pools(1).run(train_with_a_norm_of_inf, [*flags, "--output", str(tmp_path)])
    assert [line["skipped_steps"] for line in read_metrics(tmp_path)] == [1, 1]


def describe(*ranks: tuple[bool, bool]) -> str:
    return StepLoss(7, float("nan"), ranks).describe()


def test_the_message_names_the_ranks():
    both, loss, neither = (True, True), (False, True), (False, False)
    assert describe(both, both).startswith("step 7: the loss is nan")
    assert "embeddings of ranks 1, 3)" in describe(loss, both, loss, both)
    assert "embeddings of all ranks)" in describe(*[both] * 4)
    assert "loss of rank 2; all embeddings were finite" in describe(neither, neither, loss)
    assert "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more" in describe(*[both] * 10, loss)


def test_the_guard_counts_steps_in_a_row_over_calls():
    """Also over epochs, as long as the run has one guard."""
    bad, good = StepLoss(1, float("inf"), [(True, True)]), StepLoss(2, 1.0)
    guard = StepGuard(torch.nn.Identity(), skip=True)
    guard.check([bad] * 99)
    guard.check([good])
    guard.check([bad] * 50)
    with pytest.raises(UserError, match="100 steps in a row"):
        guard.check([bad] * 50)
    with pytest.raises(UserError, match="step 1: .*--on-nonfinite skip"):
        StepGuard(torch.nn.Identity(), skip=False).check([good, bad])
