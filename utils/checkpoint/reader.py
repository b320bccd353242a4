"""Find, verify and load a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from utils.checkpoint import layout
from utils.checkpoint.layout import LATEST, SHARDS_DIRECTORY, STATE_FILE, DamagedCheckpoint
from utils.checkpoint.weights import read_torch_file
from utils.dist.context import DistContext
from utils.errors import UserError
from utils.options import AUTO, Options
from utils.training.state import TrainState

FORMAT_VERSION = 2


# Names of the two modules in the training model: optimizer parameters are called "backbone.*" and "classifier.weight".
BACKBONE_PREFIX, CENTERS_NAME = "backbone.", "classifier.weight"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found to be whole, and to be one that this run can continue."""

    path: str  # as messages call it
    directory: str
    contents: dict[str, Any]  # of its state file
    files: dict[str, tuple[int, int]]  # {name: (bytes, CRC-32)}


# ---------------------------------------------------------------------------------------------------------------------
# Before the processes start


def read_resumable(options: Options) -> Checkpoint | None:
    """Check --resume: the state is read, of other files the size. Raises UserError naming flag, value and remedy.

    None if --resume auto finds no checkpoint in --output.
    """
    if options.resume != AUTO:
        return _read(options.resume, options)
    for directory in (candidates := layout.newest_first(options.output)):
        try:
            return _read(os.path.join(directory, STATE_FILE), options)
        except DamagedCheckpoint:
            continue  # `find_checkpoint` reads all of it, and says so
    if candidates:
        raise UserError(_none_is_whole(options))
    old = os.path.join(options.output, LATEST)
    if os.path.exists(old):
        return _read(old, options)
    return None


def _read(path: str, options: Options) -> Checkpoint:
    """Raises DamagedCheckpoint, or UserError where the checkpoint is whole but not one that this run can continue."""
    flag = f"--resume {options.resume}"
    try:
        contents = read_torch_file(path)
    except UserError as error:
        kind = DamagedCheckpoint if os.path.basename(path) == STATE_FILE else UserError
        raise kind(f"--resume {error}" if path == options.resume else f"{flag}: {error}") from None
    if not isinstance(contents, dict) or "position" not in contents or "shards" not in contents:
        raise UserError(f"{flag}: {path} holds no training state, only weights perhaps; give a {LATEST} that main.py wrote")
    version = contents.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"{flag}: {path} has format version {version}, this program reads {FORMAT_VERSION}; continue it with the "
                        "program that wrote it, or start anew in another --output")
    if not _is_well_formed(contents):
        raise DamagedCheckpoint(f"{flag}: {path}: is no state of a training run, or a damaged one")
    for name, mine, its in (
        ("--arch", options.training_arch, contents["arch"]),
        ("--num-classes", options.num_classes, contents["num_classes"]),
    ):
        if mine != its:
            raise UserError(f"{flag}: was trained with {name} {its}, this run has {name} {mine}; give {name} {its}")
    if options.seed is not None and options.seed != contents["seed"]:
        raise UserError(f"--seed {options.seed}: the run of {flag} goes on with its own seed, {contents['seed']}; drop --seed")
    try:
        directory = layout.step_directory(path, contents)
        files = layout.read_manifest(directory)
    except UserError as error:
        raise type(error)(f"{flag}: {error}") from None
    return Checkpoint(path, directory, contents, files)


def _is_well_formed(contents: dict) -> bool:
    """Whether the entries are of their types: a file made by somebody else must not end in a traceback."""
    def integers(name: str, *keys: str) -> bool:
        values = contents[name]
        return isinstance(values, dict) and all(isinstance(values.get(key), int) and values[key] >= 0 for key in keys)

    def tensors(name: str) -> bool:
        return isinstance(contents[name], dict) and all(isinstance(value, Tensor) for value in contents[name].values())

    try:
        return (
            all(isinstance(contents[name], int) for name in ("seed", "embedding_size", "num_classes"))
            and integers("position", "epoch", "step_in_epoch", "step") and integers("sampler", "num_images", "global_batch")
            and tensors("state_dict") and tensors("momentum") and isinstance(contents["scaler"], dict)
            and isinstance(contents["identities"], list) and isinstance(contents["shards"]["has_momentum"], bool)
        )
    except (KeyError, TypeError):
        return False


def _none_is_whole(options: Options) -> str:
    parent = os.path.join(options.output, layout.STEPS_DIRECTORY)
    return (f"--resume {AUTO}: no checkpoint in {parent} is whole; give another one's {STATE_FILE} with --resume, or remove that "
            "directory to start anew")


# ---------------------------------------------------------------------------------------------------------------------
# In every process: reading


def find_checkpoint(options: Options, context: DistContext) -> Checkpoint | None:
    """Collective. The checkpoint to continue, read whole and compared with its checksums; None for a fresh run.

    Each rank reads its share of the files. With --resume auto a damaged checkpoint is told, put aside, and the one before it
    taken. Raises UserError on every rank.
    """
    if not options.resume:
        return None
    if options.resume != AUTO:
        checkpoint, problem = _read_and_compare(options.resume, options, context)
        if problem:
            raise problem
        return checkpoint
    names = [[os.path.basename(path) for path in layout.newest_first(options.output)] if context.is_main else []]
    latest = os.path.join(options.output, LATEST)
    if context.is_main and not names[0] and os.path.exists(latest):
        names = [None]
    dist.broadcast_object_list(names, src=0, device=context.device)
    if names[0] is None:  # its steps lie elsewhere: a link that somebody made, say
        checkpoint, problem = _read_and_compare(latest, options, context)
        if problem:
            raise problem
        return checkpoint
    for name in names[0]:
        seen = os.path.isdir(os.path.join(options.output, layout.STEPS_DIRECTORY, name))
        problem = None if seen else UserError(
            f"--output {options.output}: rank {context.rank} sees no {layout.STEPS_DIRECTORY}/{name} there, which rank 0 "
            "sees; give a directory that all nodes share")
        if problem := _first(problem, dist.group.WORLD):
            raise problem
        directory = os.path.join(options.output, layout.STEPS_DIRECTORY, name)
        checkpoint, problem = _read_and_compare(os.path.join(directory, STATE_FILE), options, context)
        if problem is None:
            return checkpoint
        if not isinstance(problem, DamagedCheckpoint):
            raise problem
        if context.is_main:
            aside = layout.put_damaged_aside(directory)
            print(f"warning: {problem}; put aside as {aside}, going on from the one before it", flush=True)
    if names[0]:
        raise UserError(_none_is_whole(options))
    return None


def _read_and_compare(path: str, options: Options, context: DistContext) -> tuple[Checkpoint | None, UserError | None]:
    """Collective. The checkpoint, or what is wrong with it: the same on every rank."""
    checkpoint = problem = None
    try:
        checkpoint = _read(path, options)
        # Files of other ranks at the end of the list and small ones at its beginning: shares are about equal.
        share = sorted(checkpoint.files, key=lambda name: checkpoint.files[name])[context.rank::context.world_size]
        layout.check_files(checkpoint.directory, {name: checkpoint.files[name] for name in share})
    except DamagedCheckpoint as error:
        text = str(error)
        problem = DamagedCheckpoint(text if text.startswith("--resume") else f"--resume {options.resume}: {text}")
    except UserError as error:
        problem = error
    problem = _first(problem, dist.group.WORLD)
    return (None, problem) if problem else (checkpoint, None)


def _first(problem: Exception | None, group: dist.ProcessGroup | None) -> Any:
    """Collective over the group. The problem of the first rank that has one, on every rank."""
    problems: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(problems, problem, group=group)
    return next((found for found in problems if found is not None), None)


def require_same_identities(checkpoint: Checkpoint, identities: Sequence[str], resume: str) -> None:
    """The same label must mean the same person: else the class centers would be those of others, without a word.

    Identities that are added or missing behind all others change no label. Raises UserError.
    """
    for label, (its, mine) in enumerate(zip(checkpoint.contents["identities"], identities)):
        if its != mine:
            raise UserError(
                f"--resume {resume}: {checkpoint.path} was trained with {its} as class {label}, and in this training set that is "
                f"{mine}; to go on with other people begin a run in another --output with --init-from {checkpoint.path}, which "
                "takes class centers by name"
            )


def load_checkpoint(state: TrainState, checkpoint: Checkpoint, options: Options) -> None:
    """Collective. Put what `find_checkpoint` returned, and this rank's classes, into `state`. Raises UserError on every rank.

    `checkpoint.contents` is empty afterwards.
    """
    from utils.checkpoint import shards  # here: half of a process's start-up time

    contents, weight, shard = checkpoint.contents, state.classifier.weight.detach(), state.classifier.shard
    momentum = {BACKBONE_PREFIX + name: tensor.clone() for name, tensor in contents["momentum"].items()}
    tensors = {"centers": weight}
    if contents["shards"]["has_momentum"]:
        momentum[CENTERS_NAME] = tensors["momentum"] = torch.zeros_like(weight)
    directory = os.path.join(checkpoint.directory, SHARDS_DIRECTORY)
    metadata = problem = None
    try:
        state.backbone.load_state_dict(contents["state_dict"])
        metadata = shards.read_metadata(directory, (shard.num_classes, weight.shape[1]), set(tensors), set(checkpoint.files))
    except DamagedCheckpoint as error:
        problem = UserError(f"--resume {options.resume}: {error}")
    except RuntimeError as error:  # names or shapes of another network than the file says it holds
        problem = UserError(f"--resume {options.resume}: {checkpoint.path} does not hold {contents['arch']}: "
                            f"{' '.join(str(error).split())[:200]}")
    if problem := _first(problem, dist.group.WORLD):
        raise problem
    failure = shards.load_shards(directory, tensors, metadata, start=shard.start, group=None)
    if failure := _first(failure and _in_words(failure), dist.group.WORLD):
        raise UserError(f"--resume {options.resume}: the class centers in {directory} cannot be read ({failure})")
    state.optimizers.load_momentum(momentum)
    if contents["scaler"] and state.scaler.is_enabled():
        state.scaler.load_state_dict(contents["scaler"])

    position, sampler = contents["position"], contents["sampler"]
    for name in vars(state.position).keys() & position.keys():
        setattr(state.position, name, position[name])
    # An epoch's order depends on the images and the seed, not on the batch: go on behind the images that it has seen.
    state.position.step_in_epoch = 0
    if sampler["num_images"] == state.num_images:
        state.position.step_in_epoch = position["step_in_epoch"] * sampler["global_batch"] // state.global_batch
    contents.clear()  # its tensors are mapped from the file, which is to be removed one day


def _in_words(error: Exception) -> str:
    cause: BaseException | None = error
    while cause is not None:  # torch.save ends in an error of its own when a write fails: the system's is behind it
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror + (f": {cause.filename}" if cause.filename else "")
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
