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
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from utils.checkpoint import layout, shards
from utils.checkpoint.agreement import RankFailed, run_together
from utils.checkpoint.layout import LATEST, METADATA_FILE, STATE_FILE
from utils.checkpoint.reader import AUTO, BACKBONE_PREFIX, CENTERS, CENTERS_PARAMETER, EMA, FORMAT_VERSION, OPTIMIZER
from utils.checkpoint.transfer import Asking, Exchange, PeerFailed, answer
from utils.dist.context import DistContext
from utils.errors import UserError
from utils.files import flush
from utils.memory import free_host_bytes
from utils.training.state import TrainState

# Checkpoints to keep without --keep, beside the best.
KEEP = 2

# The share of the free memory that copies for an asynchronous save may take.
_STAGING_SHARE = 0.5

# How long ranks wait for a rank that writes: long enough for tens of gigabytes on a slow disk, but not forever. This
# keeps no dead run alive: while the main threads wait they meet again and again, within --dist-timeout.
_WRITING_TIMEOUT = datetime.timedelta(hours=2)
_MEETING_SECONDS = 2.0  # between two meetings


class CheckpointWriter:
    """Saves in the background: `save` copies the state to CPU memory, and a thread writes the copy.

    `save` writes in the foreground if the copies would take more than half of the free memory, or if the memory for
    them cannot be pinned, which a GPU needs for fast copies; then the next save uses it again. The thread has a gloo
    group of its own, so its collectives never mix with training's. Only one save runs at a time, so commits are in
    order. If a save fails on any rank, rank 0 reports it, the previous checkpoint stays, and training continues.

    Checkpoints are in node 0's --output. Ranks that do not see it send their class centers to ranks that do.

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
        """Collective. Raises UserError on every rank if rank 0 cannot write in --output."""
        self._context, self._output, self._options, self._say = context, output, options, say
        self._keep, self._save_freq, self._enabled = keep, save_freq, enabled
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._failure: str | None = None  # why the newest save failed
        self._last_saved = ""
        self._staging = Staging()
        if enabled:
            dist.barrier()  # all ranks are alive: the next line would wait for one that is not as long as for a writer
            self._group: Any = dist.new_group(backend="gloo", timeout=_WRITING_TIMEOUT)
            self._exchange = Exchange(
                context.rank, context.processes_per_node, self._find_who_sees_output(), self._group)

    def is_due(self, step: int) -> bool:
        """Whether --save-freq asks for a checkpoint after this step."""
        return self._enabled and self._save_freq is not None and step % self._save_freq == 0

    def save(self, state: TrainState) -> float:
        """Collective. Save the present state. Returns the seconds for which this call blocked training."""
        if not self._enabled:
            return 0.0
        started = time.perf_counter()
        self.wait()
        tensors, contents = _split(state, self._options)
        if not self._context.is_main:  # Rank 0 also writes a classifier that every rank has.
            tensors, contents = tensors if state.classifier.group is not None else {}, {}
        # Every node needs memory for its processes' copies, which are about equal.
        parts = {"shards": tensors, "state": contents}
        needed = self._staging.missing_bytes(parts) * self._context.processes_per_node
        asynchronous = all(self._together(
            lambda: needed <= _STAGING_SHARE * free_host_bytes() and self._staging.pin(parts)))
        if asynchronous:
            tensors, contents = self._staging.copy(parts).values()
        blocked = time.perf_counter() - started if asynchronous else None
        first_row = state.classifier.shard.start * state.classifier.sub_centers
        job = contents, tensors, first_row, state.position.step, started, blocked
        self._thread = threading.Thread(target=self._write_in_thread, args=job, daemon=True)
        self._thread.start()
        if not asynchronous:
            self.wait()
        return time.perf_counter() - started

    def wait(self) -> None:
        """Collective. Wait for the save in progress, if any, as long as all ranks are alive."""
        thread, self._thread = self._thread, None
        while thread is not None:
            # A rank that stands still would be missed only after _WRITING_TIMEOUT.
            writing = torch.tensor(thread.is_alive(), dtype=torch.uint8, device=self._context.device)
            dist.all_reduce(writing, op=dist.ReduceOp.MAX)
            if not writing:
                break
            thread.join(_MEETING_SECONDS)
        if self._error is not None:
            raise self._error

    def note_evaluation(self, score: float, best_score: float, *, is_best: bool) -> bool:
        """Collective. Keep the score of the last checkpoint, and that it is the best. Returns whether that worked."""
        self.wait()
        if not self._enabled:
            return True
        if self._failure is not None:  # the checkpoint was not written
            return False
        name = os.path.relpath(self._last_saved, self._output)
        try:
            self._on_rank_0(lambda: layout.note_evaluation(self._output, name, score=score, best_score=best_score,
                                                           is_best=is_best, keep=self._keep))
        except RankFailed as failure:
            self._say(f"warning: the score of {self._last_saved} could not be written ({failure}); training continues")
            return False
        return True

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

    def _find_who_sees_output(self) -> list[bool]:
        """Collective over the group. By rank, whether it can write where rank 0 does."""
        if self._context.nodes == 1:
            return [True] * self._context.world_size
        with contextlib.ExitStack() as probe:
            try:
                name = self._on_rank_0(lambda: os.path.basename(probe.enter_context(
                    tempfile.NamedTemporaryFile(dir=self._output, prefix=".shared-")).name))
            except RankFailed as failure:
                raise UserError(f"--output {self._output}: cannot be written ({failure}); give another directory"
                                ) from None
            seen = self._together(lambda: self._context.is_main or os.path.exists(os.path.join(self._output, name))
                                  and os.access(self._output, os.W_OK | os.X_OK))
        if not all(seen):
            self._say(f"--output is on node 0 only, in {os.path.abspath(self._output)}: {seen.count(False)} of "
                      f"{len(seen)} ranks do not see it and send node 0 what they save")
        return seen

    def _write_in_thread(self, *job: Any) -> None:
        try:
            self._write(*job)
        except BaseException as error:  # A lost peer, for example. `wait` raises it in the main thread.
            self._error = error

    def _write(self, contents: dict[str, Any], tensors: dict[str, Tensor], start: int, step: int, started: float,
               blocked: float | None) -> None:
        """Collective over the group. Write and commit, or report why not. `blocked` is None for a synchronous save."""
        directory = ""
        rank, exchange = self._context.rank, self._exchange

        def checksums(names: set[str]) -> layout.Files:
            return {name: layout.checksum(os.path.join(directory, name)) for name in names}

        def write_own() -> tuple[list[shards.Block], layout.Files]:
            blocks, names = list[shards.Block](), set[str]()
            if exchange.seen[rank] and shards.write_pieces(
                    directory, rank, shards.pieces(rank, tensors, start, blocks)):
                names.add(shards.shard_name(rank))
            if self._context.is_main:
                with open(os.path.join(directory, STATE_FILE), "wb") as file:
                    torch.save({**contents, "directory": layout.final_name(directory)}, file)
                    flush(file)
                names.add(STATE_FILE)
            return blocks, checksums(names)

        def send() -> tuple[list[shards.Block], layout.Files]:
            """Send this rank's rows if it does not see the directory; write those that other ranks send to this one."""
            blocks, names = list[shards.Block](), set[str]()
            if exchange.partner is not None:
                pieces = shards.pieces(rank, tensors, start, blocks)
                answer(exchange.partner, self._group, lambda *_: next(pieces, memoryview(b"")))
            with contextlib.ExitStack() as stack:  # after an error it tells all clients
                asked = {client: stack.enter_context(Asking(client, self._group)) for client in exchange.clients}
                for client, asking in asked.items():
                    with contextlib.suppress(PeerFailed):
                        if shards.write_pieces(directory, client, asking.pieces()):
                            names.add(shards.shard_name(client))
            return blocks, checksums(names)

        def commit() -> None:
            blocks = [shards.Block(*block) for own, _ in written for block in own]
            shards.write_metadata(directory, tensors, blocks)
            files[METADATA_FILE] = layout.checksum(os.path.join(directory, METADATA_FILE))
            layout.commit(self._output, directory, files, links=(LATEST,), keep=self._keep)

        try:
            name = self._on_rank_0(lambda: os.path.basename(layout.begin(self._output, step)))
            directory = os.path.join(self._output, layout.STEPS_DIRECTORY, name)
            written = self._together(write_own)
            if not all(exchange.seen):
                written += self._together(send)
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
        if value.shape == weight.shape:  # A row per class center: sharded like the class centers.
            tensors[f"{OPTIMIZER}/{CENTERS_PARAMETER}/{name}"] = value
        else:  # A scalar such as Adam's step: the same on every rank.
            replicated.setdefault(CENTERS_PARAMETER, {})[name] = value
    return tensors, {
        "format_version": FORMAT_VERSION,
        "arch": state.arch,
        "embedding_size": state.backbone.embedding_size,
        "channel_order": "rgb",
        "num_classes": state.classifier.shard.num_classes,
        "sub_centers": state.classifier.sub_centers,
        "state_dict": dict(state.backbone.state_dict()),
        "loss": {"name": state.loss, "settings": dict(state.loss_settings), "state": dict(state.margin.state_dict())},
        OPTIMIZER: replicated,
        "scaler": state.scaler.state_dict(),
        "position": dataclasses.asdict(state.position),
        "sampler": {"num_images": state.num_images, "global_batch": state.global_batch, "images": state.images},
        "seed": state.seed,
        "identities": list(state.identities),
        "mean_face": state.mean_face,
        "options": options,
        "shards": list(tensors),
        **({EMA: state.ema.state()} if state.ema is not None else {}),
    }


class Staging:
    """Copies of tensors in CPU memory, for `CheckpointWriter`'s thread.

    A value is a tensor, a dict of values, or anything else, which is not copied.

    What is on a GPU is copied into pinned memory, many times as fast as into other memory. Pinning takes about as long
    as such a copy, so each tensor's buffer is kept for its next copy: a tensor is known by its place in the value.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def missing_bytes(self, value: Any) -> int:
        """The memory that `copy` will allocate, or `pin` before it."""
        return sum(_pinned_bytes(tensor) if tensor.is_cuda else tensor.nbytes
                   for place, tensor in _tensors_in(value) if self._buffer(place, tensor) is None)

    def pin(self, value: Any) -> bool:
        """Allocate the buffers of all tensors that are on a GPU. Returns False if there is no memory to pin."""
        try:
            for place, tensor in _tensors_in(value):
                if tensor.is_cuda and self._buffer(place, tensor) is None:
                    self._buffers.pop(place, None)
                    self._buffers[place] = torch.empty_like(tensor, device="cpu", pin_memory=True)
        except RuntimeError:
            self._buffers.clear()
            return False
        return True

    def copy(self, value: Any) -> Any:
        """The value with copies of its tensors, complete when this returns: the caller may then change the originals.

        `pin` comes first. The copies of tensors on a GPU are valid until the next call.
        """
        devices = {tensor.device for _, tensor in _tensors_in(value) if tensor.is_cuda}
        copied = self._copy(value, "")
        for device in devices:
            torch.cuda.current_stream(device).synchronize()  # all copies were issued there, after the last step
        return copied

    def _copy(self, value: Any, place: str) -> Any:
        if isinstance(value, dict):
            return {key: self._copy(part, f"{place}/{key}") for key, part in value.items()}
        if not isinstance(value, Tensor):
            return value
        if value.is_cuda:
            return self._buffers[place].copy_(value.detach(), non_blocking=True)
        return value.detach().to("cpu", copy=True)

    def _buffer(self, place: str, tensor: Tensor) -> Tensor | None:
        """The buffer of the tensor in this place, if there is one and it fits."""
        buffer = self._buffers.get(place)
        fits = buffer is not None and (buffer.shape, buffer.stride(), buffer.dtype) == (
            tensor.shape, tensor.stride(), tensor.dtype)
        return buffer if fits else None


def _tensors_in(value: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """(place, tensor) of all tensors in a value of `Staging`."""
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _tensors_in(part, f"{place}/{key}")


def _pinned_bytes(tensor: Tensor) -> int:
    """PyTorch pins a power of two."""
    return 1 << max(0, tensor.nbytes - 1).bit_length()
