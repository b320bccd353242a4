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
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.classifier import MarginClassifier
from utils.checkpoint import layout
from utils.checkpoint.layout import BEST, LATEST, SHARDS_DIRECTORY, STATE_FILE
from utils.checkpoint.reader import BACKBONE_PREFIX, CENTERS_NAME, FORMAT_VERSION, _first, _in_words
from utils.dist.context import DistContext
from utils.errors import UserError
from utils.files import move_aside
from utils.memory import free_host_bytes
from utils.options import AUTO, Options
from utils.training.state import TrainState

# Checkpoints that stay without --keep, beside the best.
KEEP = 2


# Of the memory that is free, what copies for saving beside training may take.
_STAGING_SHARE = 0.5


# Others wait so long for a rank that is writing: tens of gigabytes on a slow disk, but not for ever.
_WRITING_TIMEOUT = datetime.timedelta(hours=2)


def _require_shared_output(output: str, context: DistContext, group: dist.ProcessGroup) -> None:
    """Collective over the group. Raise UserError on every rank unless all see one directory: better now than at the first save."""
    name = [f".shared-{secrets.token_hex(8)}"]
    dist.broadcast_object_list(name, src=0, group=group)
    probe = os.path.join(output, name[0])
    if context.is_main:
        open(probe, "x").close()
    dist.barrier(group)
    problem = None if os.path.exists(probe) else UserError(
        f"--output {output}: rank {context.rank} does not see there what rank 0 writes; give a directory that all nodes share")
    try:
        if problem := _first(problem, group):
            raise problem
    finally:
        if context.is_main:
            os.remove(probe)


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
        context: this process.
        say: prints a line on rank 0.
        fresh: a new run, which puts an older run's best checkpoint aside.
    """

    def __init__(self, options: Options, context: DistContext, say: Callable[[str], None], *, fresh: bool) -> None:
        """Collective."""
        self._options, self._context, self._say, self._fresh = options, context, say, fresh
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._failure: str | None = None  # of the newest save
        self._last_saved = ""
        if not options.no_save:
            self._group = dist.new_group(backend="gloo", timeout=_WRITING_TIMEOUT)
            if context.nodes > 1:
                _require_shared_output(options.output, context, self._group)

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
        tensors, start = _rows_to_write(state.classifier, momentum, self._context.is_main)
        contents = self._contents(state, momentum) if self._context.is_main else {}
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
        enough: list[Any] = [None] * self._context.world_size
        mine = needed * self._context.processes_per_node <= _STAGING_SHARE * free_host_bytes()
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
            name = self._together(lambda: os.path.basename(layout.begin(output, step)) if self._context.is_main else "")[0]
            directory = os.path.join(output, layout.STEPS_DIRECTORY, name)
            try:
                for found in self._write_files(directory, contents, tensors, start, num_classes):
                    files.update(found)
                self._together(lambda: self._commit(directory, files, is_best) if self._context.is_main else None)
            except _SaveFailed:
                if self._context.is_main:
                    shutil.rmtree(directory, ignore_errors=True)  # a full disk has room again
                raise
        except _SaveFailed as failure:
            self._failure = str(failure)
            self._say(f"warning: the checkpoint of step {step} could not be written ({failure}); training goes on, and "
                      + (f"{self._last_saved} is as it was" if self._last_saved else "what was there before is as it was"))
            return
        self._failure, self._fresh, self._last_saved = None, False, os.path.join(output, layout.final_name(directory))
        seconds, mib = time.perf_counter() - started, sum(size for size, _ in files.values()) / 2**20
        self._say(f"saved {self._last_saved}: {mib:,.1f} MiB in {seconds:.2f} s, for which training waited "
                  f"{seconds if waited is None else waited:.2f} s")

    def _write_files(self, directory: str, contents: dict[str, Any], tensors: dict[str, Tensor], start: int, num_classes: int
                     ) -> list[dict[str, tuple[int, int]]]:
        """Collective over the group. Write everything but the manifest; every rank's {name: (bytes, CRC-32)}."""
        from utils.checkpoint import shards  # here: half of a process's start-up time, and not all save

        shards_directory = os.path.join(directory, SHARDS_DIRECTORY)
        self._together(lambda: _require_shared(shards_directory))
        problem = shards.save_shards(shards_directory, tensors, start=start, num_classes=num_classes, group=self._group)

        def write_state_and_read_back() -> dict[str, tuple[int, int]]:
            if problem is not None:
                raise problem
            mine = [f"{SHARDS_DIRECTORY}/{name}" for name in os.listdir(shards_directory) if name.startswith(f"__{self._context.rank}_")]
            if self._context.is_main:
                whole = {**contents, "directory": layout.final_name(directory)}
                layout.write_flushed(os.path.join(directory, STATE_FILE), lambda file: torch.save(whole, file))
                mine += [STATE_FILE, f"{SHARDS_DIRECTORY}/{shards.METADATA_FILE}"]
            return {name: layout.checksum(os.path.join(directory, name)) for name in mine}

        return self._together(write_state_and_read_back)

    def _commit(self, directory: str, files: dict[str, tuple[int, int]], is_best: bool) -> None:
        if self._fresh:
            move_aside(os.path.join(self._options.output, BEST))
        layout.finish(self._options.output, directory, files, links=(LATEST, BEST) if is_best else (LATEST,),
                                keep=self._options.keep or KEEP)

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """Collective over the group. What `work` returned on every rank, or _SaveFailed on all of them if it failed on one."""
        result = problem = None
        try:
            result = work()
        except Exception as error:
            problem = _in_words(error)
        outcomes: list[Any] = [None] * self._context.world_size
        dist.all_gather_object(outcomes, (problem, result), group=self._group)
        for rank, (problem, _) in enumerate(outcomes):
            if problem is not None:
                raise _SaveFailed(problem + (f", on rank {rank}" if self._context.world_size > 1 else ""))
        return [result for _, result in outcomes]


class _SaveFailed(Exception):
    """Raised on every rank; the message is the first failing rank's."""


def _rows_to_write(classifier: MarginClassifier, momentum: dict[str, Tensor], is_main: bool) -> tuple[dict[str, Tensor], int]:
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
