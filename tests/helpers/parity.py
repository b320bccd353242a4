"""main.py's own training steps, and the same steps in plain PyTorch in one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import main
from data.augment import prepare_batch
from data.loader import GlobalBatchSampler, build_train_loader
from helpers.margins import TRUTH, TrueLoss, true_softmax
from helpers.tiny import TinyBackbone
from helpers.training import RandomFaces, RecordingLog, make_run
from models.classifier import initial_centers
from utils import build
from utils.dist.context import DistContext
from utils.dist.sharding import ClassShard
from utils.options import parse_options

SEED, STEPS, BATCH = 5, 3, 24
SETTINGS = dict(lr=0.3, momentum=0.9, weight_decay=1e-3, scale=8.0)


@dataclasses.dataclass
class Outcome:
    losses: list[float]
    gradients: list[dict[str, np.ndarray]]  # per step, by parameter name
    weights: dict[str, np.ndarray]  # after the steps, buffers too
    num_closer: list[np.ndarray]


def run_training(
    rank: int, world_size: int, num_classes: int, batch_norm: bool, flags: list[str], loss: str | None = None
) -> Outcome:
    """Three steps of main.py's training loop on this rank; `loss`: one of MARGINS with its default settings."""
    options = parse_options(
        ["unused", "--num-classes", str(num_classes), "--batch-size", str(BATCH), "--augment", "none",
         "--lr", str(SETTINGS["lr"]), "--wd", str(SETTINGS["weight_decay"]), "--scale", str(SETTINGS["scale"]),
         *([] if "adamw" in flags else ["--momentum", str(SETTINGS["momentum"])]), *flags,
         *([] if loss is None else ["--loss", loss]),
         *(f"--{name.replace('_', '-')}={value}" for name, value in (TRUTH[loss].trained if loss else {}).items())]
    )
    context = DistContext(rank, world_size, world_size, torch.device("cpu"))
    dataset = RandomFaces(num_classes)
    with mock.patch.object(build, "build_backbone", lambda arch, embedding_size: TinyBackbone(batch_norm)):
        state, model = build.build_training(context, options, SEED, len(dataset), BATCH)
    sampler = GlobalBatchSampler(len(dataset), BATCH, options.accumulation_steps, rank, world_size, SEED)
    sampler.set_position(0, 0)
    loader = build_train_loader(dataset, sampler, workers=0, pin_memory=False)

    gradients, zero_grad = [], state.optimizers.zero_grad

    def keep_then_zero() -> None:
        gradients.append({
            name: parameter.grad.numpy().copy()
            for name, parameter in model.module.named_parameters()
            if parameter.grad is not None
        })
        zero_grad()

    state.optimizers.zero_grad = keep_then_zero
    log = RecordingLog()
    main.train_one_epoch(make_run(context, options, state, model, sampler.steps_per_epoch, log), loader, STEPS)
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


Parameters = dict[str, nn.Parameter]  # by name, "backbone.conv.weight"


def true_sgd(named: Parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(named.values(), lr=SETTINGS["lr"], momentum=SETTINGS["momentum"],
                           weight_decay=SETTINGS["weight_decay"])


def true_training(
    num_classes: int, batch_norm: bool, true: TrueLoss, micro_batches: int = 1,
    make_optimizer: Callable[[Parameters], torch.optim.Optimizer] = true_sgd,
    clip: Callable[[Parameters], object] = lambda named: None, sub_centers: int = 1,
) -> Outcome:
    """The same steps with plain PyTorch in one process."""
    statistics: dict[str, Any] = dict(true.statistics)
    torch.manual_seed(SEED)
    backbone = TinyBackbone(batch_norm).double()
    centers = nn.Parameter(initial_centers(ClassShard(num_classes * sub_centers, 0, 1), 512, SEED).double())
    named: Parameters = {f"backbone.{name}": parameter for name, parameter in backbone.named_parameters()}
    named["classifier.weight"] = centers
    optimizer = make_optimizer(named)
    dataset = RandomFaces(num_classes)
    order = [index for batch in GlobalBatchSampler(len(dataset), BATCH, 1, 0, 1, SEED) for index in batch]
    outcome = Outcome([], [], {}, [])
    for step in range(STEPS):
        optimizer.zero_grad()
        losses, closer, cosines, norms = [], [], [], []
        phi, negatives, penalty = true.parts(**statistics, **true.trained)
        for indices in torch.tensor(order[step * BATCH:(step + 1) * BATCH]).chunk(micro_batches):
            images = prepare_batch(dataset.images[indices], torch.float64, augment="none", seed=0, epoch=0,
                                   indices=indices)
            label = torch.from_numpy(dataset.labels[indices.numpy()])
            embedding = backbone(images)
            norm = embedding.norm(dim=1)
            loss, num_closer = true_softmax(F.normalize(embedding), label, centers, SETTINGS["scale"], phi, negatives,
                                            norm, penalty, sub_centers)
            own = F.normalize(centers).view(num_classes, sub_centers, -1)[label]
            cosines.append((F.normalize(embedding)[:, None] * own).sum(2).amax(1).detach())
            norms.append(norm.detach())
            (loss / micro_batches).backward()
            losses.append(loss.item())
            closer.append(num_closer)
        clip(named)
        outcome.gradients.append({name: parameter.grad.numpy().copy() for name, parameter in named.items()})
        optimizer.step()
        if true.update is not None:
            statistics = true.update(torch.cat(cosines), torch.cat(norms), **statistics)
        outcome.losses.append(sum(losses) / micro_batches)
        outcome.num_closer.append(torch.cat(closer).numpy())
    outcome.weights = {f"backbone.{name}": tensor.numpy().copy() for name, tensor in backbone.state_dict().items()}
    outcome.weights["classifier.weight"] = centers.detach().numpy()
    outcome.weights |= {f"classifier.margin.{name}": np.float64(value) for name, value in statistics.items()}
    return outcome


def assert_equal(
    outcomes: list[Outcome], truth: Outcome, sharded: bool, tolerance: float, num_classes: int, sub_centers: int = 1
) -> None:
    """Losses, gradients of every parameter, weights after the steps, num_closer; replicas equal to the bit."""

    def whole(name: str, parts: list[np.ndarray]) -> np.ndarray:
        if sharded and name == "classifier.weight":
            for rank, part in enumerate(parts):
                assert len(part) == ClassShard(num_classes, rank, len(outcomes)).size * sub_centers
            return np.concatenate(parts)
        for part in parts[1:]:
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
                continue  # --fuse-classifier-update makes none; the weights below show its steps
            mine = whole(name, [outcome.gradients[step][name] for outcome in outcomes])
            close(mine, true, f"step {step}, gradient of {name}")
    for name, true in truth.weights.items():
        if not name.endswith("num_batches_tracked"):
            close(whole(name, [outcome.weights[name] for outcome in outcomes]), true, f"weights {name}")
    for step in range(STEPS):
        parts = [outcome.num_closer[step] for outcome in outcomes]
        mine = parts[0] if sharded else np.concatenate(parts)
        if tolerance < 1e-6:
            np.testing.assert_array_equal(np.sort(mine), np.sort(truth.num_closer[step]))
