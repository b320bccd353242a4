"""Find, check and load the checkpoint of --resume. README.md in this directory describes format and rules."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from utils.checkpoint import layout
from utils.checkpoint.agreement import RankFailed, run_together
from utils.checkpoint.layout import LATEST, STATE_FILE, DamagedCheckpoint
from utils.checkpoint.safe_load import first_words, read_torch_file
from utils.checkpoint.shards import open_shards
from utils.dist.collectives import all_gather_json
from utils.dist.context import DistContext
from utils.errors import UserError
from utils.files import move_aside
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
    num_classes, seed: None accepts the checkpoint's.
    """

    path: str
    output: str
    arch: str
    num_classes: int | None
    loss: str = "arcface"
    seed: int | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that this run can resume.

    path: its state file, as messages name it.
    contents: of the state file, in terms of format 3. The tensors are mapped from the file: drop them after loading.
    """

    path: str
    directory: str
    contents: dict[str, Any]
    files: layout.Files


def read_resumable(resume: Resume) -> Checkpoint | None:
    """Check --resume before the processes start: read the state, and look at the sizes of the other files.

    Returns None if --resume auto finds no checkpoint in --output. Raises UserError.
    """
    return _newest_undamaged(resume, _candidates(resume), lambda path: _read(path, resume))


def find_checkpoint(resume: Resume, identities: Sequence[str], context: DistContext) -> Checkpoint | None:
    """Collective. The checkpoint to resume, after comparing all its checksums; None if --resume auto finds none.

    With --resume auto, damaged checkpoints are reported, renamed .damaged, and skipped. Raises UserError on every rank.

    Args:
        identities: names of the training set by label. A label must mean the same person as in the checkpoint.
    """
    paths = [resume.path]  # each node's own
    if resume.path == AUTO:  # rank 0 chooses; nodes may see the shared directory at different paths
        found = [os.path.relpath(path, resume.output) for path in _candidates(resume)] if context.is_main else []
        paths = [os.path.join(resume.output, path) for path in all_gather_json(found, context.device)[0]]
    checkpoint = _newest_undamaged(
        resume, paths, lambda path: _read_and_verify(path, resume, context), rename=context.is_main)
    if checkpoint is not None:
        _require_same_identities(checkpoint, identities)
    return checkpoint


def _candidates(resume: Resume) -> list[str]:
    """The state files to try, the newest first. The last resort of --resume auto is a link that a user made."""
    if resume.path != AUTO:
        return [resume.path]
    link = os.path.join(resume.output, LATEST)
    found = [os.path.join(directory, STATE_FILE) for directory in layout.newest_first(resume.output)]
    if not found and not os.path.exists(link) and (older := layout.newest_older_run(resume.output)):
        raise UserError(f"--resume {AUTO}: a fresh run was started in {resume.output} and saved nothing, and an older "
                        f"run's checkpoints are in {older}; continue that one with --output {older}, or drop --resume "
                        "to start from scratch")
    return found or [link] * os.path.exists(link)


def _newest_undamaged(
    resume: Resume, paths: list[str], read: Callable[[str], Checkpoint], *, rename: bool = False
) -> Checkpoint | None:
    """What `read` returns for the first path that is not damaged; None without any path.

    rename: report damaged checkpoints, and rename them so that no later run meets them.
    """
    for path in paths:
        try:
            return read(path)
        except UserError as error:
            ours = resume.path == AUTO and os.path.basename(path) == STATE_FILE
            if not (ours and isinstance(error, DamagedCheckpoint)):
                raise UserError(f"--resume {error}") from None
            if rename:
                directory = os.path.dirname(path)
                move_aside(f"{directory}.damaged")
                os.rename(directory, f"{directory}.damaged")
                print(f"warning: --resume {AUTO}: {error}; renamed to {directory}.damaged; continuing with the "
                      "checkpoint before it", flush=True)
    if paths:
        raise UserError(f"--resume {AUTO}: every checkpoint in {os.path.join(resume.output, layout.STEPS_DIRECTORY)} "
                        f"is damaged; give the {STATE_FILE} of another one with --resume, or remove that directory to "
                        "start from scratch")
    return None


def _read(path: str, resume: Resume) -> Checkpoint:
    """Raises DamagedCheckpoint, or UserError if the checkpoint is undamaged but this run cannot resume it."""
    try:
        contents = read_torch_file(path)
    except UserError as error:
        raise DamagedCheckpoint(str(error)) from None
    if not isinstance(contents, dict) or not {"position", "shards"} <= contents.keys():
        raise UserError(f"{path}: has no training state, perhaps only weights; give a {LATEST} that main.py wrote, or "
                        f"start a new run from these weights with --init-from {path}")
    version = contents.get("format_version")
    if version not in (2, FORMAT_VERSION):
        raise UserError(f"{path}: has format version {version}, this program reads 2 and {FORMAT_VERSION}; continue it "
                        "with the program that wrote it, or start a new run in another --output")
    try:
        contents = _from_format_2(contents) if version == 2 else contents
        stored_values = contents["arch"], contents["num_classes"], contents["loss"]["name"], contents["seed"]
    except (LookupError, TypeError):
        raise DamagedCheckpoint(f"{path}: is not the state of a training run, or is damaged") from None
    given_values = resume.arch, resume.num_classes, resume.loss, resume.seed
    for flag, given, stored in zip(("--arch", "--num-classes", "--loss", "--seed"), given_values, stored_values):
        if given not in (stored, None):
            raise UserError(f"{path}: was trained with {flag} {stored}, this run has {flag} {given}; give {flag} "
                            f"{stored}, or start a run in another --output with --init-from {path}")
    directory = layout.step_directory(path, contents)
    return Checkpoint(path, directory, contents, layout.read_manifest(directory))


def _from_format_2(contents: dict[str, Any]) -> dict[str, Any]:
    """The contents in terms of format 3: SGD's momentum by parameter and state name; the only loss was ArcFace."""
    settings = {name: contents["options"][name] for name in ("scale", "margin", "easy_margin")}
    return {
        **contents,
        "loss": {"name": "arcface", "settings": settings, "state": {}},
        OPTIMIZER: {name: {"momentum_buffer": value} for name, value in contents["momentum"].items()},
        "shards": [CENTERS, *(_FORMAT_2_NAMES if contents["shards"]["has_momentum"] else ())],
    }


def _read_and_verify(path: str, resume: Resume, context: DistContext) -> Checkpoint:
    """Collective. Each rank reads a share of the files. Raises DamagedCheckpoint or UserError on every rank."""
    found: list[Checkpoint] = []

    def read_share() -> None:
        directory = os.path.dirname(path)
        if resume.path == AUTO and not os.path.exists(directory):
            raise UserError(f"{AUTO}: rank {context.rank} does not see {directory}, which rank 0 sees; give an "
                            "--output that all nodes share")
        checkpoint = _read(path, resume)
        # Sorted by size, so that the shares are about equal.
        share = sorted(checkpoint.files, key=lambda name: checkpoint.files[name])[context.rank::context.world_size]
        layout.check_files(checkpoint.directory, {name: checkpoint.files[name] for name in share})
        found.append(checkpoint)

    run_together(read_share, context.device)
    return found[0]


def _require_same_identities(checkpoint: Checkpoint, identities: Sequence[str]) -> None:
    """Raise UserError if a label means another person than in the checkpoint: its class center would be someone else's.

    Identities that are added or removed at the end change no label.
    """
    for label, (stored, given) in enumerate(zip(checkpoint.contents["identities"], identities)):
        if stored != given:
            raise UserError(f"--resume {checkpoint.path}: was trained with {stored} as class {label}, which is {given} "
                            "in this training set; to continue with other people, start a run in another --output "
                            f"with --init-from {checkpoint.path}, which takes class centers by name")


def load_checkpoint(state: TrainState, checkpoint: Checkpoint) -> None:
    """Collective. Load what `find_checkpoint` returned into `state`, and of the shards this rank's classes.

    Raises UserError on every rank.
    """
    try:
        run_together(lambda: _load(state, checkpoint), state.classifier.weight.device)
    except (UserError, RankFailed) as error:
        raise UserError(f"--resume {checkpoint.path}: cannot be loaded: {error}") from None


def _load(state: TrainState, checkpoint: Checkpoint) -> None:
    contents, weight, shard = checkpoint.contents, state.classifier.weight.detach(), state.classifier.shard
    try:
        state.backbone.load_state_dict(contents["state_dict"])
        state.margin.load_state_dict(contents["loss"]["state"])
    except RuntimeError as error:  # Names or shapes differ from what the file says it holds.
        raise UserError(f"does not hold {contents['arch']} with {contents['loss']['name']}: "
                        f"{first_words(error)}") from None
    optimizer = {
        name if name == CENTERS_PARAMETER else BACKBONE_PREFIX + name:
            {key: value.clone() for key, value in values.items()}
        for name, values in contents[OPTIMIZER].items()
    }
    # In format 3, a tensor in shards/ has the name it has here.
    stored_names = _FORMAT_2_NAMES if contents["format_version"] == 2 else {}
    stored = open_shards(checkpoint.directory, [stored_names.get(name, name) for name in contents["shards"]],
                         (shard.num_classes, weight.shape[1]), checkpoint.files)
    for name, rows in zip(contents["shards"], stored.values()):
        target = weight
        if name != CENTERS:
            target = optimizer.setdefault(CENTERS_PARAMETER, {})[name.rpartition("/")[2]] = torch.zeros_like(weight)
        rows.copy_rows(np.arange(shard.start, shard.stop), target)
    state.optimizers.load_state(optimizer)
    if contents["scaler"] and state.scaler.is_enabled():
        state.scaler.load_state_dict(contents["scaler"])
    position, sampler = contents["position"], contents["sampler"]
    vars(state.position).update(position, step_in_epoch=0)
    # The order of an epoch depends on the images and the seed, not on the batch: continue after the images already
    # seen.
    if sampler["num_images"] == state.num_images:
        state.position.step_in_epoch = position["step_in_epoch"] * sampler["global_batch"] // state.global_batch
