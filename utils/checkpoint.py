"""Save a training run and continue it. utils/checkpoint_files.py shows the tree on disk, utils/shard_files.py writes the classes.

state.pth.tar, to which checkpoint.pth.tar refers, is all that valid.py needs: a dict for torch.load(weights_only=True):

    format_version  2
    arch, embedding_size, num_classes
    state_dict      backbone weights under their plain names
    momentum        {parameter name: tensor} of the backbone
    scaler          fp16 scaler, {} without
    position        {"epoch", "step_in_epoch", "step", ...}: where to go on; step counts over all epochs
    sampler         {"num_images", "global_batch"}: what step_in_epoch was counted in
    seed            everything random derives from it and from the position: there is no state of random numbers to save
    identities      the training set's identity names, by label
    options         the run's options, for people to read
    directory       of this checkpoint, relative to --output
    shards          {"directory": "shards", beside this file, "has_momentum": bool}

The schedule is a function of the position and the options. Nobody ever holds the whole classifier: each rank writes and reads
its own classes.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models import read_torch_file
from models.classifier import ArcFaceClassifier
from utils import checkpoint_files
from utils.checkpoint_files import BEST, LATEST, SHARDS_DIRECTORY, STATE_FILE, DamagedCheckpoint
from utils.distributed import Worker
from utils.errors import UserError
from utils.memory import free_host_bytes
from utils.meters import put_aside
from utils.optim import Optimizers, SharedGradScaler
from utils.options import AUTO, Options

FORMAT_VERSION = 2
# Names of the two modules in the training model: optimizer parameters are called "backbone.*" and "classifier.weight".
BACKBONE_PREFIX, CENTERS_NAME = "backbone.", "classifier.weight"

# Checkpoints that stay without --keep, beside the best.
KEEP = 2

# Of the memory that is free, what copies for saving beside training may take.
_STAGING_SHARE = 0.5
# Others wait so long for a rank that is writing: tens of gigabytes on a slow disk, but not for ever.
_WRITING_TIMEOUT = datetime.timedelta(hours=2)


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
    """All that a run changes while it trains, and what it is trained on."""

    backbone: nn.Module
    classifier: ArcFaceClassifier
    optimizers: Optimizers
    scaler: SharedGradScaler
    position: Position
    seed: int
    num_images: int
    global_batch: int
    identities: list[str] = field(default_factory=list)


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
    for directory in (candidates := checkpoint_files.newest_first(options.output)):
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
        directory = checkpoint_files.step_directory(path, contents)
        files = checkpoint_files.read_manifest(directory)
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
    parent = os.path.join(options.output, checkpoint_files.STEPS_DIRECTORY)
    return (f"--resume {AUTO}: no checkpoint in {parent} is whole; give another one's {STATE_FILE} with --resume, or remove that "
            "directory to start anew")


# ---------------------------------------------------------------------------------------------------------------------
# In every process: reading


def find_checkpoint(options: Options, worker: Worker) -> Checkpoint | None:
    """Collective. The checkpoint to continue, read whole and compared with its checksums; None for a fresh run.

    Each rank reads its share of the files. With --resume auto a damaged checkpoint is told, put aside, and the one before it
    taken. Raises UserError on every rank.
    """
    if not options.resume:
        return None
    if options.resume != AUTO:
        checkpoint, problem = _read_and_compare(options.resume, options, worker)
        if problem:
            raise problem
        return checkpoint
    names = [[os.path.basename(path) for path in checkpoint_files.newest_first(options.output)] if worker.is_main else []]
    latest = os.path.join(options.output, LATEST)
    if worker.is_main and not names[0] and os.path.exists(latest):
        names = [None]
    dist.broadcast_object_list(names, src=0, device=worker.device)
    if names[0] is None:  # its steps lie elsewhere: a link that somebody made, say
        checkpoint, problem = _read_and_compare(latest, options, worker)
        if problem:
            raise problem
        return checkpoint
    for name in names[0]:
        seen = os.path.isdir(os.path.join(options.output, checkpoint_files.STEPS_DIRECTORY, name))
        problem = None if seen else UserError(
            f"--output {options.output}: rank {worker.rank} sees no {checkpoint_files.STEPS_DIRECTORY}/{name} there, which rank 0 "
            "sees; give a directory that all nodes share")
        if problem := _first(problem, dist.group.WORLD):
            raise problem
        directory = os.path.join(options.output, checkpoint_files.STEPS_DIRECTORY, name)
        checkpoint, problem = _read_and_compare(os.path.join(directory, STATE_FILE), options, worker)
        if problem is None:
            return checkpoint
        if not isinstance(problem, DamagedCheckpoint):
            raise problem
        if worker.is_main:
            aside = checkpoint_files.put_damaged_aside(directory)
            print(f"warning: {problem}; put aside as {aside}, going on from the one before it", flush=True)
    if names[0]:
        raise UserError(_none_is_whole(options))
    return None


def _read_and_compare(path: str, options: Options, worker: Worker) -> tuple[Checkpoint | None, UserError | None]:
    """Collective. The checkpoint, or what is wrong with it: the same on every rank."""
    checkpoint = problem = None
    try:
        checkpoint = _read(path, options)
        # Files of other ranks at the end of the list and small ones at its beginning: shares are about equal.
        share = sorted(checkpoint.files, key=lambda name: checkpoint.files[name])[worker.rank::worker.world_size]
        checkpoint_files.check_files(checkpoint.directory, {name: checkpoint.files[name] for name in share})
    except DamagedCheckpoint as error:
        text = str(error)
        problem = DamagedCheckpoint(text if text.startswith("--resume") else f"--resume {options.resume}: {text}")
    except UserError as error:
        problem = error
    problem = _first(problem, dist.group.WORLD)
    return (None, problem) if problem else (checkpoint, None)


def _require_shared_output(output: str, worker: Worker, group: dist.ProcessGroup) -> None:
    """Collective over the group. Raise UserError on every rank unless all see one directory: better now than at the first save."""
    name = [f".shared-{secrets.token_hex(8)}"]
    dist.broadcast_object_list(name, src=0, group=group)
    probe = os.path.join(output, name[0])
    if worker.is_main:
        open(probe, "x").close()
    dist.barrier(group)
    problem = None if os.path.exists(probe) else UserError(
        f"--output {output}: rank {worker.rank} does not see there what rank 0 writes; give a directory that all nodes share")
    try:
        if problem := _first(problem, group):
            raise problem
    finally:
        if worker.is_main:
            os.remove(probe)


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
    from utils import shard_files  # here: half of a process's start-up time

    contents, weight, shard = checkpoint.contents, state.classifier.weight.detach(), state.classifier.shard
    momentum = {BACKBONE_PREFIX + name: tensor.clone() for name, tensor in contents["momentum"].items()}
    tensors = {"centers": weight}
    if contents["shards"]["has_momentum"]:
        momentum[CENTERS_NAME] = tensors["momentum"] = torch.zeros_like(weight)
    shards = os.path.join(checkpoint.directory, SHARDS_DIRECTORY)
    metadata = problem = None
    try:
        state.backbone.load_state_dict(contents["state_dict"])
        metadata = shard_files.read_metadata(shards, (shard.num_classes, weight.shape[1]), set(tensors), set(checkpoint.files))
    except DamagedCheckpoint as error:
        problem = UserError(f"--resume {options.resume}: {error}")
    except RuntimeError as error:  # names or shapes of another network than the file says it holds
        problem = UserError(f"--resume {options.resume}: {checkpoint.path} does not hold {contents['arch']}: "
                            f"{' '.join(str(error).split())[:200]}")
    if problem := _first(problem, dist.group.WORLD):
        raise problem
    failure = shard_files.load_shards(shards, tensors, metadata, start=shard.start, group=None)
    if failure := _first(failure and _in_words(failure), dist.group.WORLD):
        raise UserError(f"--resume {options.resume}: the class centers in {shards} cannot be read ({failure})")
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


# ---------------------------------------------------------------------------------------------------------------------
# In every process: writing


class CheckpointWriter:
    """Saves beside training: `save` copies what is to be saved to the CPU's memory, a thread writes it.

    Where the copies would take more than half of the free memory, `save` writes at once instead. The thread has a gloo group
    of its own, so that its collectives never meet those of the training; there is at most one save at a time, so they are
    committed in their order. What goes wrong on any rank is known to all, told once, and leaves the last checkpoint as it is;
    training goes on.

    Args:
        options: --output, --keep, --no-save, and all that is saved with the state.
        worker: this process.
        say: prints a line on rank 0.
        fresh: a new run, which puts an older run's best checkpoint aside.
    """

    def __init__(self, options: Options, worker: Worker, say: Callable[[str], None], *, fresh: bool) -> None:
        """Collective."""
        self._options, self._worker, self._say, self._fresh = options, worker, say, fresh
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._failure: str | None = None  # of the newest save
        self._last_saved = ""
        if not options.no_save:
            self._group = dist.new_group(backend="gloo", timeout=_WRITING_TIMEOUT)
            if worker.nodes > 1:
                _require_shared_output(options.output, worker, self._group)

    def is_due(self, step: int) -> bool:
        """Whether --save-freq asks for a checkpoint after this step."""
        return not self._options.no_save and self._options.save_freq is not None and step % self._options.save_freq == 0

    def save(self, state: TrainState, *, is_best: bool = False) -> float:
        """Collective. Save the state as it is now. Returns the seconds for which training has waited."""
        if self._options.no_save:
            return 0.0
        started = time.perf_counter()
        self.wait()
        momentum = state.optimizers.momentum()
        tensors, start = _rows_to_write(state.classifier, momentum, self._worker.is_main)
        contents = self._contents(state, momentum) if self._worker.is_main else {}
        beside = self._fits(tensors, contents)
        if beside:
            tensors = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
            contents = _copied_to_cpu(contents)
        job = (contents, tensors, start, state.classifier.shard.num_classes, state.position.step, is_best, started)
        if beside:
            self._thread = threading.Thread(target=self._write_in_thread, args=(*job, time.perf_counter() - started), daemon=True)
            self._thread.start()
        else:
            self._write(*job, None)
        return time.perf_counter() - started

    def wait(self) -> None:
        """Return when nothing is being written any more."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def close(self) -> str:
        """Collective. Wait, and return what `main` says was saved. Raises UserError if the newest state could not be saved."""
        self.wait()
        if self._options.no_save:
            return "nothing saved"
        dist.destroy_process_group(self._group)
        if self._failure is not None:
            raise UserError(f"--output {self._options.output}: the last checkpoint could not be written ({self._failure}); "
                            f"see to it and continue with --resume {AUTO} from "
                            + (self._last_saved or "the checkpoint that was there before, if any"))
        return os.path.join(self._options.output, LATEST) if self._last_saved else "nothing saved"

    def _fits(self, tensors: dict[str, Tensor], contents: dict[str, Any]) -> bool:
        """Collective. Whether every node has memory for copies; its processes copy about as much each."""
        needed = _bytes_in(tensors) + _bytes_in(contents)
        enough: list[Any] = [None] * self._worker.world_size
        mine = needed * self._worker.processes_per_node <= _STAGING_SHARE * free_host_bytes()
        dist.all_gather_object(enough, mine, group=self._group)
        return all(enough)

    def _contents(self, state: TrainState, momentum: dict[str, Tensor]) -> dict[str, Any]:
        """What state.pth.tar holds, but for `directory`; its tensors are those of the training, on their device."""
        return {
            "format_version": FORMAT_VERSION,
            "arch": self._options.training_arch,
            "embedding_size": state.backbone.embedding_size,
            "num_classes": state.classifier.shard.num_classes,
            "state_dict": dict(state.backbone.state_dict()),
            "momentum": {
                name.removeprefix(BACKBONE_PREFIX): tensor for name, tensor in momentum.items() if name.startswith(BACKBONE_PREFIX)
            },
            "scaler": state.scaler.state_dict(),
            "position": dataclasses.asdict(state.position),
            "sampler": {"num_images": state.num_images, "global_batch": state.global_batch},
            "seed": state.seed,
            "identities": list(state.identities),
            "options": dataclasses.asdict(self._options),
            "shards": {"directory": SHARDS_DIRECTORY, "has_momentum": CENTERS_NAME in momentum},
        }

    def _write_in_thread(self, *job: Any) -> None:
        try:
            self._write(*job)
        except BaseException as error:  # a lost peer, say: `wait` raises it where the training can end
            self._error = error

    def _write(self, contents: dict[str, Any], tensors: dict[str, Tensor], start: int, num_classes: int, step: int, is_best: bool,
               started: float, waited: float | None) -> None:
        """Collective over the group. Write and commit, or tell why not. `waited` is None where training waits for all of it."""
        output, files = self._options.output, {}
        try:
            name = self._together(lambda: os.path.basename(checkpoint_files.begin(output, step)) if self._worker.is_main else "")[0]
            directory = os.path.join(output, checkpoint_files.STEPS_DIRECTORY, name)
            try:
                for found in self._write_files(directory, contents, tensors, start, num_classes):
                    files.update(found)
                self._together(lambda: self._commit(directory, files, is_best) if self._worker.is_main else None)
            except _SaveFailed:
                if self._worker.is_main:
                    shutil.rmtree(directory, ignore_errors=True)  # a full disk has room again
                raise
        except _SaveFailed as failure:
            self._failure = str(failure)
            self._say(f"warning: the checkpoint of step {step} could not be written ({failure}); training goes on, and "
                      + (f"{self._last_saved} is as it was" if self._last_saved else "what was there before is as it was"))
            return
        self._failure, self._fresh, self._last_saved = None, False, os.path.join(output, checkpoint_files.final_name(directory))
        seconds, mib = time.perf_counter() - started, sum(size for size, _ in files.values()) / 2**20
        self._say(f"saved {self._last_saved}: {mib:,.1f} MiB in {seconds:.2f} s, for which training waited "
                  f"{seconds if waited is None else waited:.2f} s")

    def _write_files(self, directory: str, contents: dict[str, Any], tensors: dict[str, Tensor], start: int, num_classes: int
                     ) -> list[dict[str, tuple[int, int]]]:
        """Collective over the group. Write everything but the manifest; every rank's {name: (bytes, CRC-32)}."""
        from utils import shard_files  # here: half of a process's start-up time, and not all save

        shards = os.path.join(directory, SHARDS_DIRECTORY)
        self._together(lambda: _require_shared(shards))
        problem = shard_files.save_shards(shards, tensors, start=start, num_classes=num_classes, group=self._group)

        def write_state_and_read_back() -> dict[str, tuple[int, int]]:
            if problem is not None:
                raise problem
            mine = [f"{SHARDS_DIRECTORY}/{name}" for name in os.listdir(shards) if name.startswith(f"__{self._worker.rank}_")]
            if self._worker.is_main:
                whole = {**contents, "directory": checkpoint_files.final_name(directory)}
                checkpoint_files.write_flushed(os.path.join(directory, STATE_FILE), lambda file: torch.save(whole, file))
                mine += [STATE_FILE, f"{SHARDS_DIRECTORY}/{shard_files.METADATA_FILE}"]
            return {name: checkpoint_files.checksum(os.path.join(directory, name)) for name in mine}

        return self._together(write_state_and_read_back)

    def _commit(self, directory: str, files: dict[str, tuple[int, int]], is_best: bool) -> None:
        if self._fresh:
            put_aside(os.path.join(self._options.output, BEST))
        checkpoint_files.finish(self._options.output, directory, files, links=(LATEST, BEST) if is_best else (LATEST,),
                                keep=self._options.keep or KEEP)

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """Collective over the group. What `work` returned on every rank, or _SaveFailed on all of them if it failed on one."""
        result = problem = None
        try:
            result = work()
        except Exception as error:
            problem = _in_words(error)
        outcomes: list[Any] = [None] * self._worker.world_size
        dist.all_gather_object(outcomes, (problem, result), group=self._group)
        for rank, (problem, _) in enumerate(outcomes):
            if problem is not None:
                raise _SaveFailed(problem + (f", on rank {rank}" if self._worker.world_size > 1 else ""))
        return [result for _, result in outcomes]


class _SaveFailed(Exception):
    """Raised on every rank; the message is the first failing rank's."""


def _rows_to_write(classifier: ArcFaceClassifier, momentum: dict[str, Tensor], is_main: bool) -> tuple[dict[str, Tensor], int]:
    """This rank's part of class centers and momentum, and its first class; rank 0 writes a classifier that all have."""
    tensors = {"centers": classifier.weight.detach()}
    if CENTERS_NAME in momentum:
        tensors["momentum"] = momentum[CENTERS_NAME]
    if classifier.group is None and not is_main:
        return {name: tensor[:0] for name, tensor in tensors.items()}, 0
    return tensors, classifier.shard.start


def _require_shared(directory: str) -> None:
    if not os.path.isdir(directory):
        raise FileNotFoundError(2, "not seen here: --output must be a directory that all nodes share", directory)


def _in_words(error: Exception) -> str:
    cause: BaseException | None = error
    while cause is not None:  # torch.save ends in an error of its own when a write fails: the system's is behind it
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror + (f": {cause.filename}" if cause.filename else "")
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def _bytes_in(value: Any) -> int:
    """Of all tensors in nested dicts."""
    if isinstance(value, dict):
        return sum(map(_bytes_in, value.values()))
    return value.nbytes if isinstance(value, Tensor) else 0


def _copied_to_cpu(value: Any) -> Any:
    """Nested dicts with copies of their tensors."""
    if isinstance(value, dict):
        return {key: _copied_to_cpu(part) for key, part in value.items()}
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
