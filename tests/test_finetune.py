"""Fine-tuning: frozen parts and the backbone's own learning rate, against plain PyTorch in one process in float64."""

from __future__ import annotations

import shutil
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import parity
from helpers.margins import true_arcface, true_softmax
from helpers.parity import BATCH, SEED, SETTINGS, STEPS, Outcome, assert_equal, run_training
from helpers.saved import assert_same_training, saved_training
from helpers.tiny import TinyBackbone
from helpers.training import RandomFaces, train
from torch import nn

from data.augment import prepare_batch
from data.loader import GlobalBatchSampler
from models import BACKBONES, build_backbone
from models.classifier import initial_centers
from models.freeze import freeze, list_parts
from utils import build
from utils.dist.sharding import ClassShard
from utils.errors import UserError
from utils.options import parse_options
from utils.preflight import check_freeze

LR_SCALE, CLASSES = 0.25, 5
FROZEN = {"conv,bn": ["conv.", "bn."], "backbone": [""]}
SHARDED = ["--enable-model-parallel"]
MODES = {
    "base": [], "base, ZeRO": ["--enable-zero-optim"], "base, skip": ["--on-nonfinite", "skip"],
    "sharded, ZeRO": [*SHARDED, "--enable-zero-optim"],
    "sharded, accumulation": [*SHARDED, "--accumulation-steps", "2"],
    "sharded, fused update, skip": [*SHARDED, "--fuse-classifier-update", "--on-nonfinite", "skip"],
}


class TrainedBackbone(TinyBackbone):
    """With statistics that are not those at the start, as published weights have them."""

    def __init__(self, batch_norm: bool) -> None:
        super().__init__(batch_norm)
        generator = torch.Generator().manual_seed(1)
        for tensor in (self.bn.running_mean, self.bn.running_var, self.bn.weight.data, self.bn.bias.data):
            tensor.add_(torch.rand(tensor.shape, generator=generator))


def finetune(rank: int, world_size: int, frozen: str, flags: list[str]) -> tuple[Outcome, set[str]]:
    """Three steps of main.py's training loop. Returns also the names of the parameters that the optimizers know."""
    states, original = [], build.build_training

    def keep_state(*arguments):
        states.append(original(*arguments))
        return states[0]

    with mock.patch.object(parity, "TinyBackbone", TrainedBackbone), mock.patch.object(
            build, "build_training", keep_state):
        outcome = run_training(rank, world_size, CLASSES, True, [
            "--freeze", frozen, "--init-from", "unused", "--sync-bn",
            *([] if frozen == "backbone" else ["--backbone-lr-scale", str(LR_SCALE)]),
            "--warmup-epochs", "1", *flags])
    (state, model), = states
    modes = {name: module.training for name, module in state.backbone.named_modules() if name}
    assert modes == {name: not f"{name}.".startswith(tuple(FROZEN[frozen])) for name in modes}
    return outcome, set(state.optimizers.state())


def true_finetuning(frozen: str, micro_batches: int) -> Outcome:
    """The same in plain PyTorch: frozen modules in eval mode, two groups of parameters, a rate that rises linearly."""
    torch.manual_seed(SEED)
    backbone = TrainedBackbone(True).double()
    centers = nn.Parameter(initial_centers(ClassShard(CLASSES, 0, 1), 512, SEED).double())
    trained = {f"backbone.{name}": parameter for name, parameter in backbone.named_parameters()
               if not name.startswith(tuple(FROZEN[frozen]))}
    groups = [[centers], *([list(trained.values())] if trained else [])]
    optimizer = torch.optim.SGD([{"params": group} for group in groups], lr=1.0, momentum=SETTINGS["momentum"],
                                weight_decay=SETTINGS["weight_decay"])
    dataset = RandomFaces(CLASSES)
    order = [index for batch in GlobalBatchSampler(len(dataset), BATCH, 1, 0, 1, SEED) for index in batch]
    backbone.train()
    for name, module in backbone.named_modules():
        if name and f"{name}.".startswith(tuple(FROZEN[frozen])):
            module.eval()
    outcome = Outcome([], [], {}, [])
    named = {**trained, "classifier.weight": centers}
    for step in range(STEPS):
        for group, scale in zip(optimizer.param_groups, (1.0, LR_SCALE)):
            group["lr"] = SETTINGS["lr"] * (step + 1) / STEPS * scale
        optimizer.zero_grad()
        losses, closer = [], []
        for indices in torch.tensor(order[step * BATCH:(step + 1) * BATCH]).chunk(micro_batches):
            images = prepare_batch(dataset.images[indices], torch.float64, augment="none", seed=0, epoch=0,
                                   indices=indices)
            loss, num_closer = true_softmax(F.normalize(backbone(images)), torch.from_numpy(
                dataset.labels[indices.numpy()]), centers, SETTINGS["scale"], partial(true_arcface))
            (loss / micro_batches).backward()
            losses.append(loss.item())
            closer.append(num_closer)
        outcome.gradients.append({name: parameter.grad.numpy().copy() for name, parameter in named.items()})
        optimizer.step()
        outcome.losses.append(sum(losses) / micro_batches)
        outcome.num_closer.append(torch.cat(closer).numpy())
    outcome.weights = {f"backbone.{name}": tensor.numpy().copy() for name, tensor in backbone.state_dict().items()}
    outcome.weights["classifier.weight"] = centers.detach().numpy()
    return outcome


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parts_and_the_rate_of_the_backbone_equal_a_single_process(pools, frozen, mode, world_size):
    flags = [*MODES[mode], "--precision", "float64"]
    truth = true_finetuning(frozen, 2 if "accumulation" in mode else 1)
    before = TrainedBackbone(True).double().state_dict()
    results = pools(world_size).run(finetune, frozen, flags)
    assert_equal([outcome for outcome, _ in results], truth, SHARDED[0] in flags, 1e-9, CLASSES)
    for outcome, optimized in results:
        fused = {"classifier.weight"} if "--fuse-classifier-update" in flags else set()
        assert outcome.gradients[0].keys() == truth.gradients[0].keys() - fused
        assert optimized <= truth.gradients[0].keys() and (world_size > 1 or optimized == truth.gradients[0].keys())
        for name in ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"):
            np.testing.assert_array_equal(outcome.weights[f"backbone.{name}"], before[name].numpy())


def test_the_truth_depends_on_what_is_tested(pools):
    (outcome, _), = pools(1).run(finetune, "conv,bn", ["--precision", "float64", "--backbone-lr-scale", "0.26"])
    with pytest.raises(AssertionError):
        assert_equal([outcome], true_finetuning("conv,bn", 1), False, 1e-9, CLASSES)


def test_mixed_precision_is_near(pools):
    flags = ["--enable-amp-mode", "--amp-dtype", "bf16", *SHARDED]
    results = pools(2).run(finetune, "conv,bn", flags)
    assert_equal([outcome for outcome, _ in results], true_finetuning("conv,bn", 1), True, 0.1, CLASSES)


@pytest.mark.parametrize("flags", [["--enable-zero-optim"], [*SHARDED, "--fuse-classifier-update"]])
def test_a_run_is_resumed_with_other_parts_frozen(pools, faces, tmp_path, flags):
    """A part that was frozen starts its momentum at zero: there is none in the checkpoint."""
    argv = [str(faces), "-b", "12", "--num-classes", "9", "-j", "0", "--epochs", "3", "--seed", "4", "--resume", "auto",
            *flags]
    stages = {"all": (2, []), "some": (4, ["--freeze", "conv,bn"]), "centers": (6, ["--freeze", "backbone"]),
              "again": (8, [])}
    previous, saved = None, {}
    for stage, (steps, frozen) in stages.items():
        if previous is not None:
            shutil.copytree(previous, tmp_path / stage, symlinks=True)
        pools(2).run(train, [*argv, "--output", str(tmp_path / stage), "--max-steps", str(steps), *frozen])
        previous, saved[stage] = tmp_path / stage, saved_training(tmp_path / stage)
    momentum = {stage: {name for name in tensors if name.startswith("momentum_buffer")}
                for stage, tensors in saved.items()}
    conv = "momentum_buffer conv.weight"
    assert conv in momentum["all"] == momentum["again"] and conv not in momentum["some"]
    assert not any(name.startswith("momentum_buffer f") for name in momentum["centers"])
    for name, tensor in saved["all"].items():
        if name.startswith(("weight conv.", "weight bn.")):
            assert torch.equal(tensor, saved["some"][name]) and torch.equal(tensor, saved["centers"][name]), name
            assert not torch.equal(tensor, saved["again"][name]), name
    assert not torch.equal(saved["some"]["weight fc.weight"], saved["all"]["weight fc.weight"])
    assert torch.equal(saved["some"]["weight fc.weight"], saved["centers"]["weight fc.weight"])
    assert not torch.equal(saved["some"]["centers"], saved["centers"]["centers"])
    # The same steps with an interruption, bit for bit.
    shutil.copytree(tmp_path / "all", tmp_path / "interrupted", symlinks=True)
    for steps in ("3", "4"):
        pools(2).run(train, [*argv, "--output", str(tmp_path / "interrupted"), "--max-steps", steps, "--freeze",
                             "conv,bn"])
    assert_same_training(tmp_path / "interrupted", tmp_path / "some")


def test_names_of_parts():
    parts = list_parts(build_backbone("iresnet18"))
    assert list(parts) == ["stem", "conv1", "bn1", "prelu", "layer1", "layer2", "layer3", "layer4", "bn2", "fc",
                           "features", "backbone"]
    mobile = build_backbone("mobilefacenet")
    freeze(mobile, ["stem", "bottlenecks.0", "fc"])
    frozen = {name.split(".")[0] for name, parameter in mobile.named_parameters() if not parameter.requires_grad}
    assert frozen == {"stem", "stem_depthwise", "bottlenecks", "fc", "features"}  # features.weight is always fixed
    assert mobile.bottlenecks[1].project[0].weight.requires_grad
    for arch in BACKBONES:
        with torch.device("meta"):
            backbone = build_backbone(arch)
        freeze(backbone, ["backbone"])
        assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_parameters_of_the_backbone_itself_belong_to_the_stem():
    class WithPositions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Parameter(torch.zeros(3))
            self.patches, self.blocks = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))

    backbone = WithPositions()
    freeze(backbone, ["stem"])
    trained = {"blocks.0.weight", "blocks.0.bias"}
    assert {name for name, parameter in backbone.named_parameters() if parameter.requires_grad} == trained
    for own in "network", "body":  # of another library; models.timm_backbone calls it body, a name of ir's blocks
        wrapped = nn.ModuleDict({own: WithPositions(), "fc": nn.Linear(2, 2)})
        assert list(list_parts(wrapped)) == ["stem", own, "fc", "backbone"]
        freeze(wrapped, ["stem"])
        assert {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad} == {
            f"{own}.{name}" for name in trained} | {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(("flags", "words"), [
    (["--freeze", "stem"], "--freeze stem: would keep random initial weights.*--init-from"),
    (["--freeze", "stem", "--evaluate", "--resume", "x", "--imgs-root", "x", "--pair-list", "x"], "nothing is trained"),
    (["--freeze", "backbone", "--init-from", "x", "--ema", "0.9"], "--ema with --freeze backbone: has no effect"),
    (["--freeze", "fc,backbone", "--init-from", "x", "--clip-grad-norm", "5"], "--clip-grad-norm with --freeze fc"),
    (["--freeze", "backbone", "--init-from", "x", "--backbone-lr-scale", "0.5"], "--backbone-lr-scale with --freeze"),
    (["--freeze", "backbone", "--init-from", "x", "--no-decay", "norm"], "--no-decay with --freeze backbone"),
    (["--backbone-lr-scale", "0"], "--backbone-lr-scale 0: give a number above 0"),
])
def test_flags_without_a_meaning(flags, words):
    with pytest.raises(UserError, match=words):
        parse_options(["unused", *flags])


def test_parts_are_checked_before_the_start():
    options = parse_options(["unused", "--init-from", "x", "--freeze", "stem,layer9"])
    with pytest.raises(UserError, match="--freeze stem,layer9: the backbone has no layer9; its parts are stem, conv1.*"
                                        "backbone, and modules within them such as layer1.0"):
        check_freeze(options, fresh=True)
    options = parse_options(["unused", "--resume", "auto", "--freeze", "stem"])
    check_freeze(options, fresh=False)
    with pytest.raises(UserError, match="--freeze stem: --resume auto finds no checkpoint.*--init-from"):
        check_freeze(options, fresh=True)
