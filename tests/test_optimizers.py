"""AdamW, weight decay by kind of parameter, and clipped gradients, against torch.optim in one process."""

from __future__ import annotations

from functools import partial
from unittest import mock

import pytest
import torch
from helpers.margins import TrueLoss, true_arcface
from helpers.parity import BATCH, SEED, SETTINGS, Outcome, Parameters, assert_equal, run_training, true_training
from helpers.saved import assert_same_training
from helpers.tiny import TinyBackbone
from helpers.training import IMAGES, RESUME, train

import main
from models import build_backbone
from utils import build
from utils.checkpoint.reader import read_resumable
from utils.dist.context import DistContext
from utils.errors import UserError
from utils.options import parse_options
from utils.training.clip import GradientClip
from utils.training.optim import Optimizers, RowAdamW, undecayed

SHARDED, ZERO, FUSED = ["--enable-model-parallel"], ["--enable-zero-optim"], ["--fuse-classifier-update"]
ADAMW = ["--optimizer", "adamw", "--lr", "0.01", "--wd", "0.1"]
CLIP = ["--clip-grad-norm", "0.02"]
NORMS = {f"backbone.{layer}.{name}" for layer in ("bn", "features") for name in ("weight", "bias")}
CASES = {
    "AdamW": ADAMW,
    "AdamW, ZeRO": [*ADAMW, *ZERO],
    "AdamW, sharded": [*ADAMW, *SHARDED],
    "AdamW, sharded, skip": [*ADAMW, *SHARDED, *ZERO, "--on-nonfinite", "skip"],
    "AdamW, fused update": [*ADAMW, *SHARDED, *FUSED],
    "AdamW, fused update, all": [*ADAMW, *SHARDED, *FUSED, *ZERO, *CLIP, "--no-decay", "norm,bias", "--on-nonfinite",
                                 "skip"],
    "AdamW, sharded, all": [*ADAMW, *SHARDED, *ZERO, *CLIP, "--clip-centers", "--no-decay", "norm",
                            "--accumulation-steps", "2"],
    "SGD, clip": CLIP,
    "SGD, clip, sharded": [*SHARDED, *CLIP, "--accumulation-steps", "2"],
    "SGD, clip, ZeRO": [*ZERO, *CLIP, "--clip-centers"],
    "SGD, clip centers, sharded": [*SHARDED, *CLIP, "--clip-centers", "--on-nonfinite", "skip"],
    "SGD, fused update, clip": [*SHARDED, *FUSED, *CLIP],
    "SGD, no decay": ["--no-decay", "norm"],
    "SGD, no decay, ZeRO": [*SHARDED, *ZERO, "--no-decay", "bias,norm"],
}
_truths: dict[tuple, Outcome] = {}


def truth_of(flags: list[str], num_classes: int) -> Outcome:
    """The weights after three steps with torch.optim and torch.nn.utils.clip_grad_norm_."""
    adamw, clips, centers = "adamw" in flags, "--clip-grad-norm" in flags, "--clip-centers" in flags
    without = "--no-decay" in flags
    micro_batches = 2 if "--accumulation-steps" in flags else 1

    def make_optimizer(named: Parameters) -> torch.optim.Optimizer:
        groups = [{"params": [p for name, p in named.items() if not (without and name in NORMS)]},
                  {"params": [p for name, p in named.items() if without and name in NORMS], "weight_decay": 0.0}]
        if adamw:
            return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)
        return torch.optim.SGD(groups, lr=SETTINGS["lr"], momentum=SETTINGS["momentum"],
                               weight_decay=SETTINGS["weight_decay"])

    def clip(named: Parameters) -> None:
        if clips:
            clipped = [p for name, p in named.items() if name.startswith("backbone.") or centers]
            assert torch.nn.utils.clip_grad_norm_(clipped, 0.02) > 0.02

    key = num_classes, adamw, clips, centers, without, micro_batches
    if key not in _truths:
        _truths[key] = true_training(num_classes, True, TrueLoss(partial(true_arcface, easy_margin=True), []),
                                     micro_batches, make_optimizer, clip)
    return _truths[key]


def run_cases(rank: int, world_size: int, cases: list[tuple[str, int]]) -> list[Outcome]:
    return [run_training(rank, world_size, num_classes, True, [*CASES[name], "--precision", "float64", "--sync-bn"])
            for name, num_classes in cases]


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2,
                                        pytest.param(3, marks=pytest.mark.slow)])
def test_equals_torch_optim_in_one_process(pools, world_size):
    """5 classes: 5; 3, 2; 2, 2, 1. 2 classes leave the third rank none."""
    cases = [(name, 5) for name in CASES]
    if world_size == 3:
        cases += [(name, 2) for name in ("AdamW, fused update, all", "AdamW, sharded, all")]
    outcomes = pools(world_size).run(run_cases, cases)
    for (name, num_classes), *of_ranks in zip(cases, *outcomes):
        sharded = "--enable-model-parallel" in CASES[name]
        try:
            assert_equal(of_ranks, truth_of(CASES[name], num_classes), sharded, 1e-9, num_classes)
        except AssertionError as error:
            raise AssertionError(f"{name}, {num_classes} classes: {error}") from None


def test_which_parameters_do_not_decay():
    plain = TinyBackbone(batch_norm=False)
    assert undecayed(plain, ["norm"]) == set() and undecayed(plain, ["bias"]) == {"conv.bias", "fc.bias"}
    normed = TinyBackbone(batch_norm=True)
    assert undecayed(normed, ["norm"]) == {name.removeprefix("backbone.") for name in NORMS}
    assert undecayed(normed, ["bias"]) == {"bn.bias", "features.bias"}  # not the slopes of PReLU
    vector = torch.nn.Sequential(torch.nn.LayerNorm(3), torch.nn.MultiheadAttention(4, 2), torch.nn.PReLU())
    assert undecayed(vector, ["norm", "bias"]) == {"0.weight", "0.bias", "1.in_proj_bias", "1.out_proj.bias"}
    for arch in ("iresnet18", "mobilefacenet"):
        backbone = build_backbone(arch)
        names = undecayed(backbone, ["norm", "bias"])
        assert all(parameter.ndim == 1 for name, parameter in backbone.named_parameters() if name in names)
        rest = [name for name, parameter in backbone.named_parameters() if parameter.ndim == 1 and name not in names]
        assert rest and all("prelu" in name or name.endswith("weight") for name in rest)


def test_state_belongs_to_its_parameter_whatever_decays():
    settings = dict(lr=0.1, weight_decay=0.1)
    model = TinyBackbone(batch_norm=True)
    model(torch.randn(4, 3, 112, 112)).square().sum().backward()
    first = Optimizers(model, "adamw", settings)
    first.all[0].step()
    second = Optimizers(model, "adamw", settings, no_decay=["norm", "bias"])
    second.load_state(first.state())
    assert second.state().keys() == first.state().keys() == dict(model.named_parameters()).keys()
    for name, values in first.state().items():
        assert all(torch.equal(values[key], second.state()[name][key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    assert [group["weight_decay"] for group in second.all[0].param_groups] == [0.1, 0.0]


def test_rows_that_are_stepped_in_parts_and_late():
    """The bias correction counts the steps of the run, not those of a row."""
    torch.manual_seed(0)
    weight, gradients = torch.nn.Parameter(torch.randn(5, 3).double()), torch.randn(3, 5, 3).double()
    true, average, square = weight.detach().clone(), torch.zeros(5, 3).double(), torch.zeros(5, 3).double()
    optimizer, finite = RowAdamW(weight, skip_nonfinite=True, lr=0.1, weight_decay=0.2), torch.tensor(True)
    for step, parts in enumerate(([slice(0, 2), slice(2, 5)], [slice(0, 1)], [slice(0, 3), slice(3, 4)]), 1):
        for rows in parts:
            gradient = gradients[step - 1, rows]
            average[rows] = 0.9 * average[rows] + 0.1 * gradient
            square[rows] = 0.999 * square[rows] + 0.001 * gradient**2
            true[rows] -= 0.1 * 0.2 * true[rows] + 0.1 * (average[rows] / (1 - 0.9**step)) / (
                (square[rows] / (1 - 0.999**step)).sqrt() + 1e-8)
            optimizer.update_rows(rows, gradient.clone(), finite)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), true, rtol=1e-10, atol=1e-12)
    before = [value.clone() for value in (weight.detach(), *optimizer.state[weight].values())]
    optimizer.update_rows(slice(0, 3), torch.full((3, 3), float("nan")).double(), ~finite)
    optimizer.found_inf = torch.ones(())  # as SharedGradScaler.step_all sets it
    optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, (weight.detach(), *optimizer.state[weight].values())))


def step_with_overflow(rank: int, world_size: int, flags: list[str]) -> list[bool]:
    """Whether anything changed in a step whose loss is finite, but one gradient of the last rank's centers is not."""
    options = parse_options(["unused", "--num-classes", "5", "--batch-size", str(BATCH), *SHARDED, *ADAMW, *CLIP,
                             "--clip-centers", *flags])
    context = DistContext(rank, world_size, world_size, torch.device("cpu"))
    with mock.patch.object(build, "build_backbone", lambda arch, embedding_size: TinyBackbone(False)):
        state, model = build.build_training(context, options, SEED, IMAGES, BATCH)
    changed = []
    for gradient in (float("inf"), 1.0):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        if rank == world_size - 1:
            model.module.classifier.weight.grad[0, 0] = gradient
        state.scaler.scale(torch.ones(()))  # makes the scale tensor of fp16
        nonfinite = torch.zeros(()) if options.on_nonfinite == "skip" else None
        state.scaler.step_all(state.optimizers.all, nonfinite, state.clip)
        changed.append(any(not torch.equal(old, new) for old, new in zip(before, model.parameters())))
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert {float(values["step"]) for values in state.optimizers.state().values()} <= {float(sum(changed))}
    return changed


@pytest.mark.parametrize("flags", [["--on-nonfinite", "skip"], ["--enable-amp-mode", "--amp-dtype", "fp16"],
                                   [*ZERO, "--on-nonfinite", "skip"]])
def test_a_norm_that_is_not_finite_skips_the_step(pools, flags):
    assert pools(2).run(step_with_overflow, flags) == [[False, True]] * 2


def test_the_norm_of_a_frozen_backbone_is_on_the_parameters_device():
    """It joins masks on the device. GPUs are not at hand here, and "meta" is a device that is not the CPU."""
    norm = GradientClip(1.0, [torch.nn.Parameter(torch.empty(3, device="meta"))])()
    assert norm.device.type == "meta"


ALL = [*RESUME, *ADAMW, "--clip-grad-norm", "0.5", "--no-decay", "norm", "--ema", "0.5", "--seed", "5"]


def test_resume_to_the_bit(pools, faces, tmp_path):
    flags = [str(faces), *ALL, *SHARDED, *ZERO]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pools(2).run(train, [*flags, "--max-steps", "6", "--output", str(whole)])
    pools(2).run(train, [*flags, "--max-steps", "3", "--output", str(parts)])
    pools(2).run(train, [*flags, "--max-steps", "6", "--output", str(parts), "--resume", "auto"])
    assert_same_training(parts, whole)
    contents = torch.load(parts / "checkpoint.pth.tar", weights_only=True)
    assert contents["shards"] == ["centers", *(
        f"optimizer/classifier.weight/{name}" for name in ("exp_avg", "exp_avg_sq"))]
    assert {float(values["step"]) for values in contents["optimizer"].values()} == {6.0}
    assert contents["optimizer"].keys() == {"classifier.weight", "conv.weight", "prelu.weight", "fc.weight", *(
        name.removeprefix("backbone.") for name in NORMS)}

    for resume in ("auto", str(parts / "checkpoint.pth.tar")):
        sgd = parse_options([str(faces), *RESUME, "--output", str(parts), "--resume", resume])
        with pytest.raises(UserError, match="was trained with --optimizer adamw, this run has --optimizer sgd") as one:
            read_resumable(main.resume_request(sgd))
        assert "--init-from" in str(one.value) and "\n" not in str(one.value)
        larger = parse_options([str(faces), *RESUME, *ADAMW, "--output", str(parts), "--resume", resume,
                                "--embedding-size", "1000"])
        with pytest.raises(UserError, match="this run has --embedding-size 1000.*start a run in another --output$"):
            read_resumable(main.resume_request(larger))  # --init-from would refuse these weights too


@pytest.mark.slow
def test_resume_at_other_numbers_of_processes_and_in_other_modes(pools, faces, tmp_path):
    """2 -> 1 -> 3, and with other kinds of undecayed parameters the state still belongs to the same parameters."""
    flags = [str(faces), *ALL, "--precision", "float64", "--sync-bn"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pools(1).run(train, [*flags, "--max-steps", "6", "--output", str(whole)])
    for world_size, mode, steps in (
            (2, [*SHARDED, *ZERO], 2), (1, ["--on-nonfinite", "skip"], 4), (3, [*SHARDED, *FUSED], 6)):
        pools(world_size).run(
            train, [*flags, *mode, "--max-steps", str(steps), "--output", str(parts), "--resume", "auto"])
    assert_same_training(parts, whole, tolerance=1e-8)
