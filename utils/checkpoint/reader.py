"""Find, check and load the checkpoint of --resume. README.md in this directory describes format and rules."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from utils.checkpoint import layout
from utils.checkpoint.agreement import RankFailed, run_together
from utils.checkpoint.layout import LATEST, STATE_FILE, DamagedCheckpoint
from utils.checkpoint.safe_load import read_torch_file
from utils.checkpoint.shards import open_shards
from utils.dist.context import DistContext
from utils.errors import UserError
from utils.training.state import TrainState

FORMAT_VERSION = 3
AUTO = "auto"  # --resume auto: the newest undamaged checkpoint in --output

# Parameters of the training model are called backbone.<name> and classifier.weight.
BACKBONE_PREFIX, CENTERS_PARAMETER = "backbone.", "classifier.weight"
CENTERS, OPTIMIZER = "centers", "optimizer"  # tensors in shards/: centers, optimizer/classifier.weight/<state>
# What format 2 calls a tensor in shards/.
_FORMAT_2_NAMES = {f"{OPTIMIZER}/{CENTERS_PARAMETER}/momentum_buffer": "momentum"}


@dataclass(frozen=True)
class Resume:
    """What --resume asks for, and what the checkpoint must agree with.

    path: --resume: a state file, a link to one, or "auto".
    output: --output, where "auto" looks.
    seed: None accepts the checkpoint's.
    """

    path: str
    output: str
    arch: str
    num_classes: int
    loss: str = "arcface"
    seed: int | None = None

    @property
    def flag(self) -> str:
        return f"--resume {self.path}"


@dataclass(frozen=True)
class Checkpoint:
    """A validated checkpoint that this run can resume.

    path: its state file, as messages name it.
    flag: --resume PATH, for messages.
    contents: of the state file, in terms of format 3. The tensors are mapped from the file: drop them after loading.
    """

    path: str
    flag: str
    directory: str
    contents: dict[str, Any]
    files: layout.Files


# ---------------------------------------------------------------------------------------------------------------------
# Before the processes start


def read_resumable(resume: Resume) -> Checkpoint | None:
    """Check --resume: read the state, and look at the sizes of the other files. Raises UserError.

    Returns None if --resume auto finds no checkpoint in --output.
    """
    if resume.path != AUTO:
        return _read(resume.path, resume)
    candidates = _candidates(resume.output)
    return _newest_undamaged(resume, candidates, lambda path: _read(path, resume), lambda path, error: None)


def _newest_undamaged(
    resume: Resume, names: list[str], read: Callable[[str], Checkpoint], skip: Callable[[str, DamagedCheckpoint], None]
) -> Checkpoint | None:
    """What `read` returns for the first undamaged state file, after `skip` for the others; None without any file."""
    for path in [os.path.join(resume.output, name) for name in names]:
        try:
            return read(path)
        except DamagedCheckpoint as error:
            if os.path.basename(path) == LATEST:  # A link that a user made: what it points to is not ours to rename.
                raise
            skip(path, error)
    if names:
        parent = os.path.join(resume.output, layout.STEPS_DIRECTORY)
        raise UserError(f"{resume.flag}: every checkpoint in {parent} is damaged; give the {STATE_FILE} of another "
                        "one with "
                        "--resume, or remove that directory to start from scratch")
    return None


def _candidates(output: str) -> list[str]:
    """State files for --resume auto, relative to --output, newest first. The last resort is a link that a user made."""
    found = [os.path.relpath(os.path.join(directory, STATE_FILE), output) for directory in layout.newest_first(output)]
    return found or [LATEST] * os.path.exists(os.path.join(output, LATEST))


def _read(path: str, resume: Resume) -> Checkpoint:
    """Raises DamagedCheckpoint, or UserError if the checkpoint is undamaged but this run cannot resume it."""
    flag = resume.flag
    try:
        contents = read_torch_file(path)
    except UserError as error:
        kind = DamagedCheckpoint if os.path.basename(path) == STATE_FILE else UserError
        raise kind(f"--resume {error}" if path == resume.path else f"{flag}: {error}") from None
    if not isinstance(contents, dict) or "position" not in contents or "shards" not in contents:
        raise UserError(f"{flag}: {path} has no training state, perhaps only weights; give a {LATEST} that main.py "
                        "wrote, or start "
                        f"a new run from these weights with --init-from {path}")
    version = contents.get("format_version")
    if version not in (2, FORMAT_VERSION):
        raise UserError(f"{flag}: {path} has format version {version}, this program reads 2 and {FORMAT_VERSION}; "
                        "continue it with "
                        "the program that wrote it, or start a new run in another --output")
    try:
        contents = _from_format_2(contents) if version == 2 else contents
        well_formed = _is_well_formed(contents)
    except (AttributeError, LookupError, TypeError):
        well_formed = False
    if not well_formed:
        raise DamagedCheckpoint(f"{flag}: {path}: is not the state of a training run, or is damaged")
    for name, given, stored in (
        ("--arch", resume.arch, contents["arch"]),
        ("--num-classes", resume.num_classes, contents["num_classes"]),
    ):
        if given != stored:
            raise UserError(f"{flag}: was trained with {name} {stored}, this run has {name} {given}; give {name} "
                            f"{stored}")
    if resume.loss != contents["loss"]["name"]:
        raise UserError(f"{flag}: was trained with --loss {contents['loss']['name']}, this run has --loss "
                        f"{resume.loss}; to continue "
                        f"with another loss, start a run in another --output with --init-from {path}")
    if resume.seed is not None and resume.seed != contents["seed"]:
        raise UserError(f"--seed {resume.seed}: the run of {flag} has seed {contents['seed']}; drop --seed")
    try:
        directory = layout.step_directory(path, contents)
        files = layout.read_manifest(directory)
    except UserError as error:
        raise type(error)(f"{flag}: {error}") from None
    return Checkpoint(path, flag, directory, contents, files)


def _from_format_2(contents: dict[str, Any]) -> dict[str, Any]:
    """The contents in terms of format 3: SGD's momentum by parameter and state name; the only loss was ArcFace."""
    options = contents["options"]
    settings = {name: options[name] for name in ("scale", "margin", "easy_margin")}
    of_centers = list(_FORMAT_2_NAMES) if contents["shards"]["has_momentum"] is True else []
    return {
        **contents,
        "loss": {"name": "arcface", "settings": settings, "state": {}},
        OPTIMIZER: {name: {"momentum_buffer": value} for name, value in contents["momentum"].items()},
        "shards": [CENTERS, *of_centers],
    }


def _is_well_formed(contents: dict[str, Any]) -> bool:
    """Whether the entries have the right types: a foreign file must not cause a traceback. May raise KeyError etc."""
    def counts(name: str, *keys: str) -> bool:
        return all(isinstance(contents[name][key], int) and contents[name][key] >= 0 for key in keys)

    def all_are(kind: type, values: Any) -> bool:
        return all(isinstance(value, kind) for value in values)

    loss, optimizer, names = contents["loss"], contents[OPTIMIZER], contents["shards"]
    return (
        all_are(int, (contents["seed"], contents["embedding_size"], contents["num_classes"]))
        and counts("position", "epoch", "step_in_epoch", "step") and counts("sampler", "num_images", "global_batch")
        and isinstance(loss["name"], str)
        and all_are(dict, (loss["settings"], loss["state"], contents["scaler"], contents["options"]))
        and all_are(Tensor, contents["state_dict"].values()) and all_are(Tensor, loss["state"].values())
        and all_are(dict, optimizer.values()) and all(all_are(Tensor, values.values()) for values in optimizer.values())
        and isinstance(contents["identities"], list) and all_are(str, names) and names[0] == CENTERS
    )


# ---------------------------------------------------------------------------------------------------------------------
# In every process


def find_checkpoint(resume: Resume, identities: Sequence[str], context: DistContext) -> Checkpoint | None:
    """Collective. The checkpoint to resume, after comparing all its checksums; None if --resume auto finds none.

    With --resume auto, damaged checkpoints are reported, renamed .damaged, and skipped. Raises UserError on every rank.

    Args:
        identities: names of the training set by label. A label must mean the same person as in the checkpoint.
    """
    def read(path: str) -> Checkpoint:
        return _read_and_verify(path, resume, context)

    def skip(path: str, error: DamagedCheckpoint) -> None:
        if context.is_main:
            moved = layout.move_damaged_aside(os.path.dirname(path))
            print(f"warning: {error}; renamed to {moved}; continuing with the checkpoint before it", flush=True)

    if resume.path != AUTO:
        checkpoint: Checkpoint | None = read(resume.path)
    else:
        names: list[Any] = [_candidates(resume.output) if context.is_main else []]
        dist.broadcast_object_list(names, src=0, device=context.device)
        checkpoint = _newest_undamaged(resume, names[0], read, skip)
    if checkpoint is not None:
        _require_same_identities(checkpoint, identities)
    return checkpoint


def _read_and_verify(path: str, resume: Resume, context: DistContext) -> Checkpoint:
    """Collective. Each rank reads a share of the files. Raises DamagedCheckpoint or UserError on every rank."""
    found: list[Checkpoint] = []

    def read_share() -> None:
        directory = os.path.dirname(path)
        if resume.path == AUTO and not os.path.exists(directory):
            raise UserError(f"--output {resume.output}: rank {context.rank} does not see {directory}, which rank 0 "
                            "sees; give a "
                            "directory that all nodes share")
        checkpoint = _read(path, resume)
        # Sorted by size, so that the shares are about equal.
        share = sorted(checkpoint.files, key=lambda name: checkpoint.files[name])[context.rank::context.world_size]
        try:
            layout.check_files(checkpoint.directory, {name: checkpoint.files[name] for name in share})
        except DamagedCheckpoint as error:
            raise DamagedCheckpoint(f"{resume.flag}: {error}") from None
        found.append(checkpoint)

    run_together(read_share)
    return found[0]


def _require_same_identities(checkpoint: Checkpoint, identities: Sequence[str]) -> None:
    """Raise UserError if a label means another person than in the checkpoint: its class center would be someone else's.

    Identities that are added or removed at the end change no label.
    """
    for label, (stored, given) in enumerate(zip(checkpoint.contents["identities"], identities)):
        if stored != given:
            raise UserError(
                f"{checkpoint.flag}: {checkpoint.path} was trained with {stored} as class {label}, which is {given} "
                "in this training "
                "set; to continue with other people, start a run in another --output with --init-from "
                f"{checkpoint.path}, which "
                "takes class centers by name"
            )


def load_checkpoint(state: TrainState, checkpoint: Checkpoint) -> None:
    """Collective. Load what `find_checkpoint` returned into `state`, and of the shards this rank's classes.

    Raises UserError on every rank.
    """
    contents = checkpoint.contents
    try:
        run_together(lambda: _load_tensors(state, checkpoint))
    except RankFailed as error:
        raise UserError(f"{checkpoint.flag}: {checkpoint.directory} cannot be loaded ({error})") from error
    if contents["scaler"] and state.scaler.is_enabled():
        state.scaler.load_state_dict(contents["scaler"])
    position, sampler = contents["position"], contents["sampler"]
    for name in vars(state.position).keys() & position.keys():
        setattr(state.position, name, position[name])
    # The order of an epoch depends on the images and the seed, not on the batch: continue after the images already
    # seen.
    state.position.step_in_epoch = 0
    if sampler["num_images"] == state.num_images:
        state.position.step_in_epoch = position["step_in_epoch"] * sampler["global_batch"] // state.global_batch


def _load_tensors(state: TrainState, checkpoint: Checkpoint) -> None:
    """Backbone, margin, class centers and the optimizers' state."""
    contents, weight, shard = checkpoint.contents, state.classifier.weight.detach(), state.classifier.shard
    try:
        state.backbone.load_state_dict(contents["state_dict"])
        state.margin.load_state_dict(contents["loss"]["state"])
    except RuntimeError as error:  # Names or shapes differ from what the file says it holds.
        raise UserError(f"{checkpoint.flag}: {checkpoint.path} does not hold {contents['arch']} with "
                        f"{contents['loss']['name']}: "
                        f"{' '.join(str(error).split())[:200]}") from None
    optimizer = {
        name if name == CENTERS_PARAMETER else BACKBONE_PREFIX + name:
            {key: value.clone() for key, value in values.items()}
        for name, values in contents[OPTIMIZER].items()
    }
    # In format 3, a tensor in shards/ has the name it has here.
    stored_names = _FORMAT_2_NAMES if contents["format_version"] == 2 else {}
    try:
        stored = open_shards(checkpoint.directory, [stored_names.get(name, name) for name in contents["shards"]],
                             (shard.num_classes, weight.shape[1]), checkpoint.files)
    except DamagedCheckpoint as error:
        raise UserError(f"{checkpoint.flag}: {error}") from None
    for name, rows in zip(contents["shards"], stored.values()):
        target = weight
        if name != CENTERS:
            target = optimizer.setdefault(CENTERS_PARAMETER, {})[name.rpartition("/")[2]] = torch.zeros_like(weight)
        rows.copy_rows(np.arange(shard.start, shard.stop), target)
    state.optimizers.load_state(optimizer)
