"""Save a training run. README.md in this directory describes the files and the entries of state.pth.tar."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from utils.checkpoint import layout, shards
from utils.checkpoint.agreement import RankFailed, run_together
from utils.checkpoint.layout import BEST, LATEST, METADATA_FILE, SHARDS_DIRECTORY, STATE_FILE
from utils.checkpoint.reader import AUTO, BACKBONE_PREFIX, CENTERS, CENTERS_PARAMETER, FORMAT_VERSION, OPTIMIZER
from utils.dist.context import DistContext
from utils.errors import UserError
from utils.files import flush
from utils.memory import free_host_bytes
from utils.training.state import TrainState

# Checkpoints to keep without --keep, beside the best.
KEEP = 2

# The share of the free memory that copies for an asynchronous save may take.
_STAGING_SHARE = 0.5

# How long ranks wait for a rank that writes: long enough for tens of gigabytes on a slow disk, but not forever.
_WRITING_TIMEOUT = datetime.timedelta(hours=2)


class CheckpointWriter:
    """Saves in the background: `save` copies the state to CPU memory, and a thread writes the copy.

    `save` writes in the foreground if the copies would take more than half of the free memory. The thread has a gloo
    group of its own, so its collectives never mix with training's. Only one save runs at a time, so commits are in
    order. If a save fails on any rank, rank 0 reports it, the previous checkpoint stays, and training continues.

    Args:
        options: the run's options, saved for people to read.
        say: prints a line on rank 0.
        keep: number of newest checkpoints to keep, beside the best.
        save_freq: steps between saves; None for no periodic saves.
        enabled: False saves nothing.
    """

    def __init__(
        self, context: DistContext, output: str, *, options: dict[str, Any], say: Callable[[str], None],
        keep: int = KEEP, save_freq: int | None = None, enabled: bool = True,
    ) -> None:
        """Collective. Raises UserError on every rank unless all nodes see the same --output."""
        self._context, self._output, self._options, self._say = context, output, options, say
        self._keep, self._save_freq, self._enabled = keep, save_freq, enabled
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._failure: str | None = None  # why the newest save failed
        self._last_saved = ""
        if enabled:
            self._group: Any = dist.new_group(backend="gloo", timeout=_WRITING_TIMEOUT)
            if context.nodes > 1:
                self._require_shared_output()

    def is_due(self, step: int) -> bool:
        """Whether --save-freq asks for a checkpoint after this step."""
        return self._enabled and self._save_freq is not None and step % self._save_freq == 0

    def save(self, state: TrainState, *, is_best: bool = False) -> float:
        """Collective. Save the present state. Returns the seconds for which this call blocked training."""
        if not self._enabled:
            return 0.0
        started = time.perf_counter()
        self.wait()
        tensors, contents = _split(state, self._options)
        if not self._context.is_main:  # Rank 0 also writes a classifier that every rank has.
            tensors, contents = tensors if state.classifier.group is not None else {}, {}
        # Every node needs memory for its processes' copies, which are about equal.
        needed = (_bytes_in(tensors) + _bytes_in(contents)) * self._context.processes_per_node
        asynchronous = all(self._together(lambda: needed <= _STAGING_SHARE * free_host_bytes()))
        if asynchronous:
            tensors, contents = _copied_to_cpu(tensors), _copied_to_cpu(contents)
        blocked = time.perf_counter() - started if asynchronous else None
        job = contents, tensors, state.classifier.shard.start, state.position.step, is_best, started, blocked
        if asynchronous:
            self._thread = threading.Thread(target=self._write_in_thread, args=job, daemon=True)
            self._thread.start()
        else:
            self._write(*job)
        return time.perf_counter() - started

    def wait(self) -> None:
        """Wait for the save in progress, if any."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def close(self) -> str:
        """Collective. Wait; return the path of what was saved. Raises UserError if the last save failed."""
        self.wait()
        if self._enabled:
            dist.destroy_process_group(self._group)
        if self._failure is not None:
            raise UserError(f"--output {self._output}: the last checkpoint could not be written ({self._failure}); "
                            f"fix the cause, then rerun with --resume {AUTO} to continue from "
                            + (self._last_saved or "the newest earlier checkpoint, if any"))
        return os.path.join(self._output, LATEST) if self._last_saved else "nothing saved"

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        return run_together(work, torch.device("cpu"), self._group)

    def _on_rank_0(self, work: Callable[[], Any]) -> Any:
        """Collective over the group. What work() returns on rank 0; raises its error on every rank."""
        return self._together(lambda: work() if self._context.is_main else None)[0]

    def _require_shared_output(self) -> None:
        """Collective over the group. Raise UserError on every rank unless all see one directory."""
        with contextlib.ExitStack() as probe:
            name = self._on_rank_0(lambda: os.path.basename(probe.enter_context(
                tempfile.NamedTemporaryFile(dir=self._output, prefix=".shared-")).name))
            found = self._together(lambda: (self._output, os.path.exists(os.path.join(self._output, name))))
        for rank, (output, seen) in enumerate(found):
            if not seen:
                raise UserError(f"--output {output}: rank {rank} does not see what rank 0 created there; give a "
                                "directory that all nodes share")

    def _write_in_thread(self, *job: Any) -> None:
        try:
            self._write(*job)
        except BaseException as error:  # A lost peer, for example. `wait` raises it in the main thread.
            self._error = error

    def _write(self, contents: dict[str, Any], tensors: dict[str, Tensor], start: int, step: int, is_best: bool,
               started: float, blocked: float | None) -> None:
        """Collective over the group. Write and commit, or report why not. `blocked` is None for a synchronous save."""
        directory = ""

        def write_own() -> tuple[list[shards.Block], layout.Files]:
            blocks = shards.write_shard(directory, self._context.rank, tensors, start)
            names = {f"{SHARDS_DIRECTORY}/{block.file}" for block in blocks}
            if self._context.is_main:
                with open(os.path.join(directory, STATE_FILE), "wb") as file:
                    torch.save({**contents, "directory": layout.final_name(directory)}, file)
                    flush(file)
                names.add(STATE_FILE)
            return blocks, {name: layout.checksum(os.path.join(directory, name)) for name in names}

        def commit() -> None:
            blocks = [shards.Block(*block) for own, _ in written for block in own]
            shards.write_metadata(directory, tensors, blocks)
            files[METADATA_FILE] = layout.checksum(os.path.join(directory, METADATA_FILE))
            links = (LATEST, BEST) if is_best else (LATEST,)
            layout.commit(self._output, directory, files, links=links, keep=self._keep)

        try:
            name = self._on_rank_0(lambda: os.path.basename(layout.begin(self._output, step)))
            directory = os.path.join(self._output, layout.STEPS_DIRECTORY, name)
            written = self._together(write_own)
            files: layout.Files = {name: file for _, own in written for name, file in own.items()}
            self._on_rank_0(commit)
        except RankFailed as failure:
            if self._context.is_main and directory:
                shutil.rmtree(directory, ignore_errors=True)  # Free the space on a full disk.
            self._failure = str(failure)
            self._say(f"warning: the checkpoint of step {step} could not be written ({failure}); training continues; "
                      f"the last checkpoint is still {self._last_saved or 'the one from before this run, if any'}")
            return
        self._failure = None
        self._last_saved = os.path.join(self._output, layout.final_name(directory))
        seconds, mib = time.perf_counter() - started, sum(size for size, _ in files.values()) / 2**20
        self._say(f"saved {self._last_saved}: {mib:,.1f} MiB in {seconds:.2f} s, training blocked for "
                  f"{seconds if blocked is None else blocked:.2f} s")


def _split(state: TrainState, options: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Collective with ZeRO. This rank's part of shards/, and state.pth.tar without "directory". Nothing is copied."""
    optimizer = state.optimizers.state()
    weight = state.classifier.weight.detach()
    of_centers = optimizer.pop(CENTERS_PARAMETER, {})
    replicated = {parameter.removeprefix(BACKBONE_PREFIX): values for parameter, values in optimizer.items()}
    tensors = {CENTERS: weight}
    for name, value in of_centers.items():
        if value.shape == weight.shape:  # A row per class: sharded like the class centers.
            tensors[f"{OPTIMIZER}/{CENTERS_PARAMETER}/{name}"] = value
        else:  # A scalar such as Adam's step: the same on every rank.
            replicated.setdefault(CENTERS_PARAMETER, {})[name] = value
    return tensors, {
        "format_version": FORMAT_VERSION,
        "arch": state.arch,
        "embedding_size": state.backbone.embedding_size,
        "num_classes": state.classifier.shard.num_classes,
        "state_dict": dict(state.backbone.state_dict()),
        "loss": {"name": state.loss, "settings": dict(state.loss_settings), "state": dict(state.margin.state_dict())},
        OPTIMIZER: replicated,
        "scaler": state.scaler.state_dict(),
        "position": dataclasses.asdict(state.position),
        "sampler": {"num_images": state.num_images, "global_batch": state.global_batch},
        "seed": state.seed,
        "identities": list(state.identities),
        "options": options,
        "shards": list(tensors),
    }


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
