"""Find, check and load the checkpoint of --resume. README.md in this directory describes format and rules."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from utils.checkpoint import layout
from utils.checkpoint.agreement import RankFailed, run_together
from utils.checkpoint.identities import can_be_compared
from utils.checkpoint.layout import BEST, LATEST, STATE_FILE, DamagedCheckpoint
from utils.checkpoint.safe_load import NotEnoughMemory, first_words, read_torch_file
from utils.checkpoint.shards import open_shards
from utils.checkpoint.transfer import PIECE_BYTES, Exchange, ReadBytes
from utils.dist.collectives import all_gather_json
from utils.dist.context import DistContext
from utils.errors import UserError
from utils.files import move_aside
from utils.training.state import TrainState

FORMAT_VERSION = 3
AUTO = "auto"  # --resume auto: the newest undamaged checkpoint in --output

# Parameters of the training model are called backbone.<name> and classifier.weight.
BACKBONE_PREFIX, CENTERS_PARAMETER = "backbone.", "classifier.weight"
EMA = "ema"  # the entry of --ema: {"updates", "state_dict"}
CENTERS, OPTIMIZER = "centers", "optimizer"  # tensors in shards/: centers, optimizer/classifier.weight/<state>
# What format 2 calls a tensor in shards/.
_FORMAT_2_NAMES = {f"{OPTIMIZER}/{CENTERS_PARAMETER}/momentum_buffer": "momentum"}


@dataclass(frozen=True)
class Resume:
    """What --resume asks for, and what the checkpoint must agree with.

    path: --resume: a state file, a link to one, or "auto". Rank 0's counts.
    output: --output, where "auto" looks.
    num_classes, embedding_size, seed, optimizer: None accepts the checkpoint's.
    timeout: seconds to wait for another rank that reads or sends.
    """

    path: str
    output: str
    arch: str
    num_classes: int | None
    embedding_size: int | None = None
    loss: str = "arcface"
    sub_centers: int = 1
    seed: int | None = None
    optimizer: str | None = None
    timeout: float = 1800.0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that this run can resume.

    path: its state file, as messages name it.
    contents: of the state file, in terms of format 3. The tensors are mapped from the file: drop them after loading.
    exchange: how ranks that do not see the directory read it; None if all see it.
    """

    path: str
    directory: str
    contents: dict[str, Any]
    files: layout.Files
    exchange: Exchange | None = None

    def is_of_run_in(self, output: str) -> bool:
        """Whether it is in this directory, or a link there leads to it: then this run continues the directory's own."""
        steps = os.path.realpath(os.path.join(output, layout.STEPS_DIRECTORY))
        return (os.path.realpath(os.path.dirname(self.directory)) == steps
                or os.path.realpath(os.path.dirname(self.path)) == os.path.realpath(output))


def read_resumable(resume: Resume) -> Checkpoint | None:
    """Check --resume before the processes start, on node 0: read the state, and look at the sizes of the other files.

    Returns None if --resume auto finds no checkpoint in --output. Raises UserError.
    """
    return _newest_undamaged(resume, _candidates(resume), lambda path: _read(path, resume))


def find_checkpoint(resume: Resume, identities: Sequence[str], context: DistContext) -> Checkpoint | None:
    """Collective. The checkpoint to resume, after comparing all its checksums; None if --resume auto finds none.

    Rank 0 chooses it. A rank that does not see the same files receives them from node 0. With --resume auto, damaged
    checkpoints are reported, renamed .damaged, and skipped. Raises UserError on every rank.

    Args:
        identities: names of the training set by label. A label must mean the same person as in the checkpoint.
    """
    try:
        checkpoint = _find_on_all_ranks(resume, context)
    except RankFailed as failure:
        raise UserError(f"--resume {resume.path}: cannot be read: {failure}") from None
    if checkpoint is not None:
        _require_same_identities(checkpoint, identities)
    return checkpoint


def _find_on_all_ranks(resume: Resume, context: DistContext) -> Checkpoint | None:
    """Collective. `find_checkpoint`, without its comparison of identities. Raises UserError or RankFailed."""
    paths = [resume.path]
    if resume.path == AUTO:  # nodes may see a shared directory at different paths
        found = run_together(lambda: _own_candidates(resume, context), context.device)
        _require_checkpoints_on_node_0(resume, found, context)
        paths = [os.path.join(resume.output, path) for path in found[0]]
    return _newest_undamaged(resume, paths, lambda path: _read_and_verify(path, resume, context),
                             set_aside=lambda path, damage: _set_aside(path, damage, context))


def _candidates(resume: Resume) -> list[str]:
    """The state files to try, the newest first. The last resort of --resume auto is a link that a user made."""
    if resume.path != AUTO:
        return [resume.path]
    link = os.path.join(resume.output, LATEST)
    try:
        found = [os.path.join(directory, STATE_FILE) for directory in layout.newest_first(resume.output)]
    except OSError as error:
        raise UserError(f"--resume {AUTO}: {error.filename}: cannot be read ({error.strerror}); make it readable, or "
                        "give another --output") from None
    if not found and not os.path.exists(link) and (older := layout.newest_older_run(resume.output)):
        raise UserError(f"--resume {AUTO}: a new run was started in {resume.output} and saved nothing, and an older "
                        f"run's checkpoints are in {older}; continue that one with --output {older}, or drop --resume "
                        "to start from scratch")
    return found or [link] * os.path.exists(link)


def _own_candidates(resume: Resume, context: DistContext) -> list[str]:
    """What --resume auto finds in this rank's --output, relative to it; nothing if it cannot be read."""
    with contextlib.nullcontext() if context.is_main else contextlib.suppress(UserError):
        return [os.path.relpath(path, resume.output) for path in _candidates(resume)]
    return []


def _require_checkpoints_on_node_0(resume: Resume, found: list[list[str]], context: DistContext) -> None:
    """Raise UserError if another node has checkpoints and node 0 has none: the nodes may have changed their numbers."""
    for rank, paths in enumerate(found):
        if paths and not found[0]:
            raise UserError(f"--resume {AUTO}: node 0 has no checkpoint in its --output, but node "
                            f"{rank // context.processes_per_node} has {paths[0]}; start that node with --rank 0 or "
                            "copy its --output to node 0 to continue that run, or remove it to start a new one")


def _newest_undamaged(
    resume: Resume, paths: list[str], read: Callable[[str], Checkpoint],
    set_aside: Callable[[str, UserError], None] = lambda path, damage: None,
) -> Checkpoint | None:
    """What `read` returns for the first path that is not damaged; None without any path.

    set_aside: what to do with a damaged checkpoint, given its path and the error.
    """
    for path in paths:
        try:
            return read(path)
        except UserError as error:
            ours = resume.path == AUTO and os.path.basename(path) == STATE_FILE
            if not (ours and isinstance(error, DamagedCheckpoint)):
                raise UserError(f"--resume {error}") from None
            damage = error
        set_aside(path, damage)
    if paths:
        raise UserError(f"--resume {AUTO}: every checkpoint in {os.path.join(resume.output, layout.STEPS_DIRECTORY)} "
                        f"is damaged; give the {STATE_FILE} of another one with --resume, or remove that directory to "
                        "start from scratch")
    return None


def _set_aside(path: str, damage: UserError, context: DistContext) -> None:
    """Collective. Report a damaged checkpoint, and rename its directory so that no later run meets it."""
    directory = os.path.dirname(path)

    def rename() -> None:
        if context.is_main:
            try:
                move_aside(f"{directory}.damaged")
                os.rename(directory, f"{directory}.damaged")
            except OSError as error:
                raise UserError(f"--resume {AUTO}: {damage}; it cannot be renamed to {directory}.damaged "
                                f"({error.strerror}); rename or remove it") from None
            print(f"warning: --resume {AUTO}: {damage}; renamed to {directory}.damaged; continuing with the checkpoint "
                  "before it", flush=True)

    run_together(rename, context.device)


def _read(path: str, resume: Resume) -> Checkpoint:
    """Raises DamagedCheckpoint, or UserError if the checkpoint is undamaged but this run cannot resume it."""
    try:
        contents = _read_state(path, path, resume)
    except DamagedCheckpoint:
        raise
    except UserError:
        # Another file in the place of the state file is damage, and no reason to refuse the run.
        directory, name = os.path.split(os.path.realpath(path))
        if resume.path == AUTO and name == STATE_FILE:
            layout.check_files(directory, {name: layout.read_manifest(directory)[name]})
        raise
    directory = layout.step_directory(path, contents)
    return Checkpoint(path, directory, contents, layout.read_manifest(directory))


def _read_state(file: str, path: str, resume: Resume) -> dict[str, Any]:
    """The contents of a state file, in terms of format 3. path: what messages call it. Raises as `_read` does."""
    try:
        contents = read_torch_file(file)
    except NotEnoughMemory as error:
        raise NotEnoughMemory(str(error).replace(file, path)) from None
    except UserError as error:
        own = resume.path == AUTO or os.path.basename(path) in (LATEST, BEST, STATE_FILE) or os.path.isdir(path)
        hint = "" if own else f"; to start a run from weights of another program, use --init-from {path}"
        raise DamagedCheckpoint(f"{str(error).replace(file, path)}{hint}") from None
    if not isinstance(contents, dict) or not {"position", "shards"} <= contents.keys():
        raise UserError(f"{path}: has no training state, perhaps only weights; give a {LATEST} that main.py wrote, or "
                        f"start a new run from these weights with --init-from {path}")
    version = contents.get("format_version")
    if not isinstance(version, int) or version not in (2, FORMAT_VERSION):
        raise UserError(f"{path}: has format version {version}, this program reads 2 and {FORMAT_VERSION}; continue it "
                        "with the program that wrote it, or start a new run in another --output")
    try:
        contents = _from_format_2(contents) if version == 2 else contents
        contents = {"sub_centers": 1, **contents}  # older files have one center per class
        stored_values = (contents["arch"], contents["num_classes"], contents["embedding_size"],
                         contents["loss"]["name"], contents["sub_centers"], contents["seed"],
                         contents["options"].get("optimizer", "sgd"))  # the only one of older versions
        if not all(isinstance(value, (str, int)) for value in stored_values):
            raise TypeError
    except (LookupError, TypeError, AttributeError, RuntimeError):  # any entry can be a tensor
        raise DamagedCheckpoint(f"{path}: is not the state of a training run, or is damaged") from None
    given_values = (resume.arch, resume.num_classes, resume.embedding_size, resume.loss, resume.sub_centers,
                    resume.seed, resume.optimizer)
    flags = "--arch", "--num-classes", "--embedding-size", "--loss", "--sub-centers", "--seed", "--optimizer"
    for flag, given, stored in zip(flags, given_values, stored_values):
        if given not in (stored, None):
            # --init-from takes no weights of another network or size, and no centers for fewer of them.
            refuses = flag in ("--arch", "--embedding-size") or flag == "--sub-centers" and given < stored
            raise UserError(f"{path}: was trained with {flag} {stored}, this run has {flag} {given}; give {flag} "
                            f"{stored}, or start a run in another --output"
                            + ("" if refuses else f" with --init-from {path}"))
    return contents


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
    """Collective. Rank 0's checkpoint, whose files are read once: each rank that sees them takes a share.

    path: where this rank looks for what rank 0 has at its own path. Raises DamagedCheckpoint, UserError on every rank.
    """
    found: list[Checkpoint] = []

    def read_on_rank_0() -> object:
        if context.is_main:
            found.append(_read(path, resume))
            return path, found[0].directory, found[0].files, _manifest_identity(found[0].directory)
        return None

    name, directory, files, identity = run_together(read_on_rank_0, context.device)[0]
    if not context.is_main:
        with contextlib.suppress(UserError, OSError):
            own = _read(path, resume)
            if list(_manifest_identity(own.directory)) == identity:
                found.append(own)
    seen = all_gather_json(bool(found), context.device)

    def verify_share() -> None:
        if found:
            own, sharing = found[0], [rank for rank, sees in enumerate(seen) if sees]
            # Sorted by size, so that the shares are about equal.
            share = sorted(own.files, key=lambda name: own.files[name])[sharing.index(context.rank)::len(sharing)]
            layout.check_files(own.directory, {name: own.files[name] for name in share})

    run_together(verify_share, context.device)
    if all(seen):
        return found[0]
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=resume.timeout))
    exchange = Exchange(context.rank, context.processes_per_node, seen, group)
    files = {file: (size, crc) for file, (size, crc) in files.items()}

    def receive(read: ReadBytes) -> None:
        with os.fdopen(os.memfd_create(STATE_FILE), "wb") as file:  # mapped into memory, as from a disk
            for offset in range(0, files[STATE_FILE][0], PIECE_BYTES):
                file.write(read(STATE_FILE, offset, min(PIECE_BYTES, files[STATE_FILE][0] - offset)))
            file.flush()
            contents = _read_state(f"/proc/self/fd/{file.fileno()}", name, resume)
        found.append(Checkpoint(name, directory, contents, files))

    run_together(lambda: exchange.send_files(directory, files, receive), context.device)
    return dataclasses.replace(found[0], exchange=exchange)


def _manifest_identity(directory: str) -> tuple[int, int, int, str]:
    """What the manifest of another checkpoint, or of a copy, differs in. Raises OSError."""
    with open(os.path.join(directory, layout.MANIFEST_FILE), encoding="utf-8") as file:
        status = os.fstat(file.fileno())
        return status.st_ino, status.st_size, status.st_mtime_ns, file.read()


def _require_same_identities(checkpoint: Checkpoint, identities: Sequence[str]) -> None:
    """Raise UserError if a label means another person than in the checkpoint: its class center would be someone else's.

    Identities that are added or removed at the end change no label.
    """
    if not can_be_compared(checkpoint.contents["identities"], identities):
        return  # a package without names, which it may have got or lost since
    for label, (stored, given) in enumerate(zip(checkpoint.contents["identities"], identities)):
        if stored != given:
            raise UserError(f"--resume {checkpoint.path}: was trained with {stored} as class {label}, which is {given} "
                            "in this training set; to continue with other people, start a run in another --output "
                            f"with --init-from {checkpoint.path}, which takes class centers by name")


def load_checkpoint(state: TrainState, checkpoint: Checkpoint) -> None:
    """Collective. Load what `find_checkpoint` returned into `state`, and of the shards this rank's classes.

    Raises UserError on every rank.
    """
    exchange, device = checkpoint.exchange, state.classifier.weight.device
    try:
        run_together(lambda: None if exchange and exchange.partner is not None else _load(state, checkpoint), device)
        if exchange is not None:
            run_together(lambda: exchange.send_files(
                checkpoint.directory, checkpoint.files, lambda read: _load(state, checkpoint, read)), device)
            dist.destroy_process_group(exchange.group)
    except (UserError, RankFailed) as error:
        raise UserError(f"--resume {checkpoint.path}: cannot be loaded: {error}") from None
    # Rank 0's, because other nodes may not see the file. Checkpoints were once saved after their evaluation.
    best_score = layout.read_best_score(checkpoint.directory)
    best_score = all_gather_json(best_score, state.classifier.weight.device)[0]
    if best_score is not None:
        state.position.best_score, state.position.to_evaluate = best_score, False


def _load(state: TrainState, checkpoint: Checkpoint, read: ReadBytes | None = None) -> None:
    contents, weight, shard = checkpoint.contents, state.classifier.weight.detach(), state.classifier.shard
    sub_centers = state.classifier.sub_centers
    try:
        state.backbone.load_state_dict(contents["state_dict"])
        state.margin.load_state_dict(contents["loss"]["state"])
        if state.ema is not None:
            state.ema.restart()
            if EMA in contents:
                state.ema.load(contents[EMA])
    except RuntimeError as error:  # Names or shapes differ from what the file says it holds.
        raise UserError(f"does not hold {contents['arch']} with {contents['loss']['name']}: "
                        f"{first_words(error)}") from None
    optimizer = {
        name if name == CENTERS_PARAMETER else BACKBONE_PREFIX + name:
            {key: value.clone() for key, value in values.items()}
        for name, values in contents[OPTIMIZER].items()
    }
    state.optimizers.drop_state()
    # In format 3, a tensor in shards/ has the name it has here.
    stored_names = _FORMAT_2_NAMES if contents["format_version"] == 2 else {}
    stored = open_shards(checkpoint.directory, [stored_names.get(name, name) for name in contents["shards"]],
                         (shard.num_classes * sub_centers, weight.shape[1]), checkpoint.files, read)
    for name, rows in zip(contents["shards"], stored.values()):
        target = weight
        if name != CENTERS:
            target = optimizer.setdefault(CENTERS_PARAMETER, {})[name.rpartition("/")[2]] = torch.zeros_like(weight)
        rows.copy_rows(np.arange(shard.start * sub_centers, shard.stop * sub_centers), target)
    state.optimizers.load_state(optimizer)
    if contents["scaler"] and state.scaler.is_enabled():
        state.scaler.load_state_dict(contents["scaler"])
    position, sampler = contents["position"], contents["sampler"]
    vars(state.position).update(position, step_in_epoch=0)
    # The order of an epoch depends on the images and the seed, not on the batch: continue after the images already
    # seen.
    if state.has_same_images(sampler):
        state.position.step_in_epoch = position["step_in_epoch"] * sampler["global_batch"] // state.global_batch
