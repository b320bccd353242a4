"""Every mode of training against the truth: one process, the full batch, the full softmax by its definition, in float64.

The distributed side runs main.py's own build_training and train_one_epoch; the truth is written out here with nothing of
the project's but the initial weights.
"""

from __future__ import annotations

import dataclasses
import math
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.tiny import TinyBackbone
from helpers.training import IMAGES, RandomFaces, RecordingLog
from torch import Tensor, nn

import main
from data.augment import prepare_batch
from data.loader import GlobalBatchSampler, build_train_loader
from models.classifier import initial_centers
from utils.dist.context import DistContext
from utils.dist.sharding import ClassShard
from utils.options import parse_options

SEED, STEPS, BATCH = 5, 3, 24
SETTINGS = dict(lr=0.3, momentum=0.9, weight_decay=1e-3, scale=8.0, margin=0.5)


@dataclasses.dataclass
class Outcome:
    losses: list[float]
    gradients: list[dict[str, np.ndarray]]  # per step, by parameter name
    weights: dict[str, np.ndarray]  # after the steps, buffers too
    num_closer: list[np.ndarray]


def run_training(rank: int, world_size: int, num_classes: int, batch_norm: bool, flags: list[str]) -> Outcome:
    """Three steps of main.py's training loop on this rank."""
    options = parse_options(
        ["unused", "--num-classes", str(num_classes), "--batch-size", str(BATCH), "--augment", "none",
         "--lr", str(SETTINGS["lr"]), "--momentum", str(SETTINGS["momentum"]), "--wd", str(SETTINGS["weight_decay"]),
         "--scale", str(SETTINGS["scale"]), "--margin", str(SETTINGS["margin"]), *flags]
    )
    context = DistContext(rank, world_size, world_size, torch.device("cpu"))
    dataset = RandomFaces(num_classes)
    with mock.patch.object(main, "build_backbone", lambda arch, embedding_size: TinyBackbone(batch_norm)):
        state, model = main.build_training(context, options, SEED, len(dataset), BATCH)
    sampler = GlobalBatchSampler(len(dataset), BATCH, options.accumulation_steps, rank, world_size, SEED)
    sampler.set_position(0, 0)
    loader = build_train_loader(dataset, sampler, workers=0, pin_memory=False)

    gradients, zero_grad = [], state.optimizers.zero_grad

    def keep_then_zero() -> None:
        gradients.append({
            name: parameter.grad.numpy().copy()
            for name, parameter in model.module.named_parameters()
            if parameter.grad is not None or not options.fuse_classifier_update
        })
        zero_grad()

    state.optimizers.zero_grad = keep_then_zero
    log = RecordingLog()
    main.train_one_epoch(context, options, state, model, loader, STEPS, sampler.steps_per_epoch, log)
    return Outcome(
        losses=[mean_over_ranks(step["loss"]) for step in log.steps],
        gradients=gradients,
        weights={name: tensor.numpy().copy() for name, tensor in model.module.state_dict().items()},
        num_closer=[step["num_closer"].numpy() for step in log.steps],
    )


def mean_over_ranks(loss: Tensor) -> float:
    total = loss.detach().double().clone()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def true_margin_logits(cosine: Tensor, label: Tensor, easy: bool) -> Tensor:
    """s * cos(theta + m) on the target by its definition, through the angle."""
    scale, margin = SETTINGS["scale"], SETTINGS["margin"]
    theta = cosine.acos()
    inside = cosine > 0 if easy else theta < math.pi - margin
    phi = torch.where(inside, (theta + margin).cos(), cosine if easy else cosine - margin * math.sin(margin))
    return scale * torch.where(F.one_hot(label, cosine.shape[1]).bool(), phi, cosine)


def true_training(num_classes: int, batch_norm: bool, easy: bool = True, micro_batches: int = 1) -> Outcome:
    """The same steps with plain PyTorch in one process."""
    torch.manual_seed(SEED)
    backbone = TinyBackbone(batch_norm).double()
    centers = nn.Parameter(initial_centers(ClassShard(num_classes, 0, 1), 512, SEED).double())
    named = {f"backbone.{name}": parameter for name, parameter in backbone.named_parameters()}
    named["classifier.weight"] = centers
    optimizer = torch.optim.SGD(named.values(), lr=SETTINGS["lr"], momentum=SETTINGS["momentum"],
                                weight_decay=SETTINGS["weight_decay"])
    dataset = RandomFaces(num_classes)
    order = [index for batch in GlobalBatchSampler(len(dataset), BATCH, 1, 0, 1, SEED) for index in batch]
    outcome = Outcome([], [], {}, [])
    for step in range(STEPS):
        optimizer.zero_grad()
        losses, ranks = [], []
        for indices in torch.tensor(order[step * BATCH:(step + 1) * BATCH]).chunk(micro_batches):
            images = prepare_batch(dataset.images[indices], torch.float64, augment="none", seed=0, epoch=0, indices=indices)
            label = torch.from_numpy(dataset.labels[indices.numpy()])
            cosine = F.normalize(backbone(images)) @ F.normalize(centers).t()
            loss = F.cross_entropy(true_margin_logits(cosine, label, easy), label)
            (loss / micro_batches).backward()
            losses.append(loss.item())
            ranks.append((cosine > cosine.gather(1, label[:, None])).sum(dim=1))
        outcome.gradients.append({name: parameter.grad.numpy().copy() for name, parameter in named.items()})
        optimizer.step()
        outcome.losses.append(sum(losses) / micro_batches)
        outcome.num_closer.append(torch.cat(ranks).numpy())
    outcome.weights = {f"backbone.{name}": tensor.numpy().copy() for name, tensor in backbone.state_dict().items()}
    outcome.weights["classifier.weight"] = centers.detach().numpy()
    return outcome


def assert_equal(outcomes: list[Outcome], truth: Outcome, sharded: bool, tolerance: float, num_classes: int) -> None:
    world_size = len(outcomes)

    def whole(name: str, parts: list[np.ndarray]) -> np.ndarray:
        if sharded and name == "classifier.weight":
            for rank, part in enumerate(parts):
                assert len(part) == ClassShard(num_classes, rank, world_size).size
            return np.concatenate(parts)
        for part in parts[1:]:  # replicas must be the same to the bit
            np.testing.assert_array_equal(part, parts[0], err_msg=name)
        return parts[0]

    def close(mine: np.ndarray, true: np.ndarray, what: str) -> None:
        assert np.isfinite(mine).all(), what
        error, size = np.linalg.norm(mine - true), np.linalg.norm(true)
        assert error <= tolerance * size + 1e-300, f"{what}: |difference| {error:.3g} of {size:.3g}"

    for outcome in outcomes:
        assert outcome.losses == pytest.approx(truth.losses, rel=tolerance)
    for step in range(STEPS):
        for name, true in truth.gradients[step].items():
            if name == "classifier.weight" and name not in outcomes[0].gradients[step]:
                continue  # --fuse-classifier-update: there is none; the weights below tell
            close(whole(name, [outcome.gradients[step][name] for outcome in outcomes]), true, f"step {step}, gradient of {name}")
    for name, true in truth.weights.items():
        if not name.endswith("num_batches_tracked"):
            close(whole(name, [outcome.weights[name] for outcome in outcomes]), true, f"weights {name}")
    for step in range(STEPS):
        parts = [outcome.num_closer[step] for outcome in outcomes]
        mine = parts[0] if sharded else np.concatenate(parts)
        if tolerance < 1e-6:
            np.testing.assert_array_equal(np.sort(mine), np.sort(truth.num_closer[step]))


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
    key = (num_classes, batch_norm, "--no-easy-margin" not in flags, micro_batches if batch_norm else 1)
    if key not in _truths:
        _truths[key] = true_training(*key)
    return _truths[key]


# 2 leaves shards empty at 3 and 4; 5 gives 2, 2, 1, 0 at 4; 12 divides by all; 13 by none.
CASES = [(mode, num_classes) for mode in MODES for num_classes in ((5,) if mode in CLASSIFIERS else (5, 12))]
CASES += [(mode, num_classes) for mode in ("base", "sharded") for num_classes in (2, 13)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(("mode", "num_classes"), CASES)
def test_equals_single_process_in_float64(pools, mode, world_size, num_classes):
    flags = [*MODES[mode], "--precision", "float64"]
    outcomes = pools(world_size).run(run_training, num_classes, False, flags)
    assert_equal(outcomes, truth_for(num_classes, False, flags), "--enable-model-parallel" in flags, 1e-9, num_classes)


def test_fused_update_with_one_process_and_no_model_parallel(pools):
    flags = ["--fuse-classifier-update", "--precision", "float64"]
    assert_equal(pools(1).run(run_training, 12, False, flags), truth_for(12, False, flags), True, 1e-9, 12)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", ["base", "base, ZeRO", "base, accumulation", "sharded", "sharded, ZeRO", "sharded, accumulation"])
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
    with mock.patch.object(main, "build_backbone", lambda arch, embedding_size: TinyBackbone(False)):
        state, model = main.build_training(context, options, SEED, IMAGES, BATCH)
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
