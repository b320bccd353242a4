"""Save a training run and continue it. On disk, in --output:

    checkpoint.pth.tar              one file, written by rank 0 and switched atomically; all that valid.py needs
    model_best.pth.tar              the same of the step with the best evaluation, if there was one. Each of them names:
    checkpoint-shards/<step>-<id>/  class centers and their momentum, by torch.distributed.checkpoint

checkpoint.pth.tar is a dict for torch.load(weights_only=True):

    format_version  1
    arch, embedding_size, num_classes
    state_dict      backbone weights under their plain names
    momentum        {parameter name: tensor} of the backbone
    scaler          fp16 scaler, {} without
    position        {"epoch", "step_in_epoch", "step", "best_score"}: where to go on; step counts over all epochs
    sampler         {"num_images", "global_batch"}: what step_in_epoch was counted in
    seed            everything random derives from it
    options         the run's options, for people to read
    shards          {"directory": relative path, "has_momentum": bool}

Nobody ever holds the whole classifier: each rank writes and reads its own classes.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import shutil
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models import read_torch_file
from models.classifier import ArcFaceClassifier
from utils.distributed import Worker, broadcast_integer
from utils.errors import UserError
from utils.optim import Optimizers, SharedGradScaler
from utils.options import Options

FORMAT_VERSION = 1
FILE_NAME = "checkpoint.pth.tar"
BEST_FILE_NAME = "model_best.pth.tar"
SHARDS_DIRECTORY = "checkpoint-shards"
# Names of the two modules in the training model: optimizer parameters are called "backbone.*" and "classifier.weight".
BACKBONE_PREFIX, CENTERS_NAME = "backbone.", "classifier.weight"


@dataclass
class Position:
    """Where the run is: `step` steps are done in all, `step_in_epoch` of them in epoch `epoch` (from 0).

    best_score: the best mean accuracy of --val-pairs and --val-bin so far.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    best_score: float | None = None


@dataclass(frozen=True)
class TrainState:
    """All that a run changes while it trains."""

    backbone: nn.Module
    classifier: ArcFaceClassifier
    optimizers: Optimizers
    scaler: SharedGradScaler
    position: Position
    seed: int
    num_images: int
    global_batch: int


# ---------------------------------------------------------------------------------------------------------------------
# Before the processes start


def read_resumable(options: Options) -> dict[str, Any]:
    """Read --resume's file and check that this run can continue it. Raises UserError naming flag, value and remedy."""
    path = options.resume
    state = read_torch_file(path)
    if not isinstance(state, dict) or "position" not in state or "shards" not in state:
        raise UserError(f"--resume {path}: holds no training state, only weights perhaps; give a {FILE_NAME} that main.py wrote")
    version = state.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"--resume {path}: has format version {version}, this program reads {FORMAT_VERSION}")
    for flag, mine, its in (
        ("--arch", options.training_arch, state["arch"]),
        ("--num-classes", options.num_classes, state["num_classes"]),
    ):
        if mine != its:
            raise UserError(f"--resume {path}: was trained with {flag} {its}, this run has {flag} {mine}; give {flag} {its}")
    if options.seed is not None and options.seed != state["seed"]:
        raise UserError(f"--seed {options.seed}: the run of --resume {path} goes on with its own seed, {state['seed']}; drop --seed")
    shards = _shards_path(path, state)
    if not os.path.isfile(os.path.join(shards, ".metadata")):
        raise UserError(f"--resume {path}: its class centers are missing: {shards} is not there or not complete")
    return state


def _shards_path(path: str, state: dict[str, Any]) -> str:
    return os.path.join(os.path.dirname(os.path.abspath(path)), state["shards"]["directory"])


# ---------------------------------------------------------------------------------------------------------------------
# In every process


def save_checkpoint(state: TrainState, options: Options, worker: Worker, *, is_best: bool = False) -> None:
    """Collective. Write shards, then the file that names them; then remove the shards that no file names any more.

    is_best: it is model_best.pth.tar too, until a better one comes.

    Until the new file takes the old one's place the old checkpoint is whole. Raises OSError (a full disk, say).
    """
    import torch.distributed.checkpoint as dcp  # here: half of a process's start-up time, and not all save

    momentum = state.optimizers.momentum()
    identifier = broadcast_integer(secrets.randbits(32) if worker.is_main else 0, worker.device)
    directory = f"{SHARDS_DIRECTORY}/{state.position.step:08d}-{identifier:08x}"
    dcp.save(
        _class_tensors(state.classifier, state.classifier.weight.detach(), momentum.get(CENTERS_NAME)),
        checkpoint_id=os.path.join(options.output, directory),
    )
    if worker.is_main:
        backbone = state.backbone.state_dict()
        contents = {
            "format_version": FORMAT_VERSION,
            "arch": options.training_arch,
            "embedding_size": state.backbone.embedding_size,
            "num_classes": state.classifier.shard.num_classes,
            "state_dict": {name: tensor.cpu() for name, tensor in backbone.items()},
            "momentum": {
                name.removeprefix(BACKBONE_PREFIX): tensor.cpu()
                for name, tensor in momentum.items()
                if name.startswith(BACKBONE_PREFIX)
            },
            "scaler": state.scaler.state_dict(),
            "position": dataclasses.asdict(state.position),
            "sampler": {"num_images": state.num_images, "global_batch": state.global_batch},
            "seed": state.seed,
            "options": dataclasses.asdict(options),
            "shards": {"directory": directory, "has_momentum": CENTERS_NAME in momentum},
        }
        path = os.path.join(options.output, FILE_NAME)
        with open(path + ".part", "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        best_path = os.path.join(options.output, BEST_FILE_NAME)
        if is_best:
            shutil.copyfile(path + ".part", best_path + ".part")
            os.replace(best_path + ".part", best_path)
        os.replace(path + ".part", path)
        _remove_shards(options.output, keep={directory, _shards_of(best_path)})
    dist.barrier()


def _shards_of(path: str) -> str | None:
    """The directory that the checkpoint `path` names, if there is one and it can be read."""
    try:
        return read_torch_file(path)["shards"]["directory"]
    except (UserError, KeyError, TypeError):
        return None


def _remove_shards(output: str, keep: set[str | None]) -> None:
    for name in os.listdir(os.path.join(output, SHARDS_DIRECTORY)):
        if f"{SHARDS_DIRECTORY}/{name}" not in keep:
            shutil.rmtree(os.path.join(output, SHARDS_DIRECTORY, name), ignore_errors=True)


def load_checkpoint(state: TrainState, contents: dict[str, Any], options: Options) -> None:
    """Collective. Put `contents`, which `read_resumable` returned, and this rank's classes into `state`."""
    import torch.distributed.checkpoint as dcp

    state.backbone.load_state_dict(contents["state_dict"])
    if contents["scaler"] and state.scaler.is_enabled():
        state.scaler.load_state_dict(contents["scaler"])

    weight = state.classifier.weight.detach()
    momentum = {BACKBONE_PREFIX + name: tensor for name, tensor in contents["momentum"].items()}
    if contents["shards"]["has_momentum"]:
        momentum[CENTERS_NAME] = torch.zeros_like(weight)
    # In place: the DTensors are views of `weight` and of the momentum.
    shards = _shards_path(options.resume, contents)
    try:
        dcp.load(_class_tensors(state.classifier, weight, momentum.get(CENTERS_NAME)), checkpoint_id=shards)
    except dcp.CheckpointException as failures:  # on all ranks: which of them could not read what
        first = str(next(iter(failures.failures.values()))[0]).splitlines()[0]
        raise UserError(f"--resume {options.resume}: its class centers in {shards} are damaged ({first})") from failures
    state.optimizers.load_momentum(momentum)

    position, sampler = contents["position"], contents["sampler"]
    state.position.step = position["step"]
    state.position.epoch = position["epoch"]
    state.position.best_score = position.get("best_score")
    # An epoch's order depends on the images and the seed, not on the batch: go on behind the images that it has seen.
    if sampler["num_images"] == state.num_images:
        state.position.step_in_epoch = position["step_in_epoch"] * sampler["global_batch"] // state.global_batch


def _class_tensors(classifier: ArcFaceClassifier, centers: Tensor, momentum: Tensor | None) -> dict[str, Tensor]:
    """What torch.distributed.checkpoint writes or fills: shards as DTensors over all ranks, so that any W reads them."""
    tensors = {"centers": centers} if momentum is None else {"centers": centers, "momentum": momentum}
    if classifier.group is None:
        return tensors
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = DeviceMesh.from_group(classifier.group, centers.device.type)
    shape = torch.Size([classifier.shard.num_classes, centers.shape[1]])
    return {
        name: DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False, shape=shape, stride=(shape[1], 1))
        for name, tensor in tensors.items()
    }
