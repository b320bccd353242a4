"""The order of training samples, and the loader that reads batches of uint8 images in that order.

N = global batch, K = micro-batches per global batch, W = world size, r = rank, n = N / (K·W): images per rank and
micro-batch.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import mmap
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from data.decode import IMAGE_SIZE, codec_messages, decode_into, jpeg_operator
from utils.errors import UserError, printable
from utils.signals import STOP_SIGNALS, describe_death

# This many unreadable images in a row are not a few bad files: the disk is gone.
_MAX_BAD_IN_A_ROW = 100
_PREFETCH = 2  # batches that each worker reads ahead
# How long to wait for a batch before new workers replace those that may be stuck (SIGSTOP, a network disk that does not
# answer). After a stop signal there is less time.
STUCK_SECONDS, STUCK_SECONDS_STOPPING = 300.0, 5.0
_LOOK_SECONDS = 1  # how often the main process looks whether workers are dead, and for a stop signal


class NoBatch(UserError):
    """Workers died or were stuck, and so were those that replaced them. The batch was not read."""


def _never() -> bool:
    return False


class GlobalBatchSampler(Sampler[list[int]]):
    """Global batch k of an epoch is perm[k·N : (k+1)·N], the same at every W; iterating yields rank r's part of it.

    perm, a permutation of the num_samples indices, depends on (seed, epoch, num_samples) only. Micro-batch j of global
    batch k is its rows [j·N/K : (j+1)·N/K], and rank r takes the r-th n of these. An epoch has
    steps_per_epoch = num_samples // N steps: the last, incomplete global batch is dropped.

    Iterating yields K lists of n sample indices per step, from the position to the epoch's end. It does not move the
    position, because a loader reads ahead and only the training loop knows which step it has reached: call set_position
    before every epoch.

    Raises UserError if num_samples < N, or if N is not divisible by K·W.
    """

    def __init__(
        self, num_samples: int, global_batch: int, micro_batches: int, rank: int, world_size: int, seed: int
    ) -> None:
        if global_batch % (micro_batches * world_size):
            raise UserError(f"the global batch of {global_batch} is not divisible by {world_size} processes x "
                            f"{micro_batches} micro-batches; change --batch-size or --accumulation-steps")
        if num_samples < global_batch:
            raise UserError(f"{num_samples} images are fewer than one global batch of {global_batch}; "
                            "use a smaller --batch-size")
        self.num_samples, self.global_batch, self.micro_batches = num_samples, global_batch, micro_batches
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.steps_per_epoch = num_samples // global_batch
        self.images_per_batch = global_batch // micro_batches // world_size
        self.set_position(0, 0)

    def set_position(self, epoch: int, step_in_epoch: int) -> None:
        """The next iteration starts at global batch `step_in_epoch` (0 to steps_per_epoch) of `epoch`."""
        assert 0 <= step_in_epoch <= self.steps_per_epoch, f"step {step_in_epoch} of {self.steps_per_epoch}"
        self._epoch, self._step_in_epoch = epoch, step_in_epoch

    def __len__(self) -> int:
        """Micro-batches from the position to the epoch's end."""
        return (self.steps_per_epoch - self._step_in_epoch) * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        first_step = self._step_in_epoch
        permutation = self._permutation(self._epoch)  # freed with this iteration: 4 bytes per sample
        rows, n = self.global_batch // self.micro_batches, self.images_per_batch
        for micro_batch in range(first_step * self.micro_batches, self.steps_per_epoch * self.micro_batches):
            start = micro_batch * rows + self.rank * n
            yield permutation[start : start + n].tolist()

    def _permutation(self, epoch: int) -> np.ndarray:
        """int32 (num_samples,)."""
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        permutation = np.arange(self.num_samples, dtype=np.int32)
        generator.shuffle(permutation)
        return permutation


class TrainBatch(NamedTuple):
    """One rank's micro-batch."""

    images: torch.Tensor  # uint8 (n, 3, 112, 112); in memory (n, 112, 112, 3), as decoders write it
    labels: torch.Tensor  # int64 (n,)
    indices: torch.Tensor  # int64 (n,): the samples actually read
    skipped: int  # how many bad images were replaced


def build_train_loader(
    dataset: Any, sampler: GlobalBatchSampler, *, workers: int, pin_memory: bool,
    stopping: Callable[[], bool] = _never, patience: float = STUCK_SECONDS,
) -> DataLoader[TrainBatch]:
    """A loader of one TrainBatch per list of indices that `sampler` yields. Its workers persist over epochs.

    dataset: dataset.encoded(i) is (the encoded image, its name) and dataset.labels[i] its label; or, without these,
    dataset[i] is (uint8 (3, 112, 112), label). Both raise UserError for a bad image. That error ends the iteration; but
    if dataset.skip_bad is true, the next readable image in index order replaces the bad one.
    stopping: whether this process has received a stop signal.
    patience: seconds to wait for a batch, STUCK_SECONDS at most. Then, and when a worker dies, new workers read on from
        the same batch, with a warning on stderr. If they give no batch either, NoBatch is raised.
    """
    return _BatchLoader(dataset, sampler, sampler.images_per_batch, workers, pin_memory, persistent=True,
                        stopping=stopping, patience=patience)


def read_images(
    dataset: Any, indices: Sequence[int], *, batch_size: int, workers: int,
    ignored: Iterable[signal.Signals] = STOP_SIGNALS, stopping: Callable[[], bool] = _never,
    patience: float = STUCK_SECONDS,
) -> Generator[torch.Tensor, None, None]:
    """The images `indices` of the dataset, in order: uint8 (batch_size or fewer, 3, 112, 112).

    dataset: as for build_train_loader, but without labels. Raises the UserError of the first bad image, and NoBatch.
    ignored: see start_loader_worker. stopping, patience: see build_train_loader.
    """
    batches = [list(indices[start : start + batch_size]) for start in range(0, len(indices), batch_size)]
    loader = _BatchLoader(dataset, batches, batch_size, min(workers, len(batches)), ignored=ignored, stopping=stopping,
                          patience=patience)
    for batch in loader:
        yield batch.images


class DeviceBatches:
    """The batches of `batches` with images and labels on `device`.

    On a GPU they are copied on a stream of their own. The training loop runs ahead of the GPU, so a batch is copied
    while the GPU computes with the one before. Only pinned memory allows that overlap.
    """

    def __init__(self, batches: Iterable[TrainBatch], device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __iter__(self) -> Iterator[TrainBatch]:
        for batch in self._batches:
            images, labels = self._copied(batch.images, batch.labels)
            yield batch._replace(images=images, labels=labels)

    def _copied(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        if self._stream is None:
            return [tensor.to(self._device) for tensor in tensors]
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            copies = [tensor.to(self._device, non_blocking=True) for tensor in tensors]
        computing.wait_stream(self._stream)
        for copy in copies:
            copy.record_stream(computing)  # its memory must not be reused for the next copy before this use is over
        return copies


class _BatchLoader(DataLoader):
    """Copies the batches' images out of the shared slots.

    A bad image arrives as a string in place of a batch and is raised here as a UserError: raised in a worker, it would
    come wrapped in that worker's traceback.
    """

    def __init__(
        self, dataset: Any, batches: Iterable[list[int]], images_per_batch: int, workers: int, pin_memory: bool = False,
        *, persistent: bool = False, ignored: Iterable[signal.Signals] = STOP_SIGNALS,
        stopping: Callable[[], bool] = _never, patience: float = STUCK_SECONDS,
    ) -> None:
        self._stopping, self._patience = stopping, min(patience, STUCK_SECONDS)
        # All batches that workers read ahead, and the one that is being copied out.
        self._slots = _SharedSlots(_PREFETCH * workers + 1, images_per_batch) if workers > 0 else None
        # Not DataLoader's own pinning, which would see the slots' numbers while the pixels lie in the slots.
        self._pins = pin_memory
        super().__init__(
            _BatchReader(dataset, self._slots),
            batch_sampler=_SlotSampler(batches, self._slots),
            collate_fn=_unchanged,
            num_workers=workers,
            persistent_workers=persistent and workers > 0,
            prefetch_factor=_PREFETCH if workers > 0 else None,
            worker_init_fn=functools.partial(start_loader_worker, os.getpid(), ignored=ignored),
            # In a spawned rank the default is to spawn: every worker would import the whole program again.
            multiprocessing_context="fork" if workers > 0 else None,
            # Otherwise each iteration would draw a number from the global generator.
            generator=torch.Generator(),
            timeout=_LOOK_SECONDS if workers > 0 else 0,
        )

    def _get_iterator(self) -> Any:
        try:  # torch leaves half an iterator behind, which prints a traceback when it is deleted
            fork = multiprocessing.get_context("fork")
            [fork.Queue() for _ in range(self.num_workers + 2 if self.num_workers else 0)]
        except OSError as error:
            raise UserError(f"--workers {self.num_workers}: cannot start loading processes ({error.strerror}); is "
                            "there a /dev/shm with a few kilobytes free? --workers 0 needs none") from None
        return super()._get_iterator()

    def check_worker_number_rationality(self) -> None:
        """Stay silent: more workers than cores are the user's choice, and help on network disks."""

    def __iter__(self) -> Iterator[TrainBatch]:  # type: ignore[override]  # torch declares its private iterator class
        for loaded in self._loaded():
            if isinstance(loaded, str):
                raise UserError(loaded)
            images, labels, indices, skipped = loaded
            if self._slots is not None:
                images = self._slots.take_out(images, len(labels), self._pins)
            elif self._pins:
                images = images.pin_memory()
            labels = torch.tensor(labels, dtype=torch.int64, pin_memory=self._pins)
            yield TrainBatch(images, labels, torch.tensor(indices, dtype=torch.int64), skipped)

    def _loaded(self) -> Iterator[Any]:
        """What the workers return, batch by batch. Workers that die or are stuck are replaced, once in a row."""
        assert isinstance(self.batch_sampler, _SlotSampler)
        self.batch_sampler.first, replaced = 0, False
        iterator = self._start()
        try:
            while True:
                trouble = self._wait(iterator)
                if isinstance(trouble, str):
                    _kill_workers(iterator)
                    self._iterator = None
                    if replaced:
                        raise NoBatch(f"{trouble}, and new ones fared no better: can the images still be read?")
                    print(f"warning: {trouble}; new ones read on", file=sys.stderr, flush=True)
                    iterator, replaced = self._start(), True
                    continue
                if trouble is None:
                    return
                replaced = False
                self.batch_sampler.first += 1
                yield trouble[0]
        finally:
            if not self.persistent_workers:
                _kill_workers(iterator)  # they only read; one that is stuck would not end otherwise

    def _start(self) -> Any:
        if self._iterator is not None:  # persistent workers, which first answer what an earlier iteration asked for
            self._iterator._timeout = STUCK_SECONDS_STOPPING
        try:
            iterator = super().__iter__()
        except (RuntimeError, OSError) as error:
            if self._iterator is None:  # of a limit on processes or threads
                raise UserError(f"--workers: {self.num_workers} data loading processes cannot be started "
                                f"({getattr(error, 'strerror', None) or error}); use fewer, or -j 0") from None
            _kill_workers(self._iterator)  # they do not answer
            self._iterator = None
            return self._start()
        iterator._timeout = self.timeout
        if self.num_workers and threading.current_thread() is threading.main_thread():
            # DataLoader's handler raises an error wherever the program is when a worker dies, even between two
            # optimizers' steps. `_wait` notices it where nothing has been changed yet.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return iterator

    def _wait(self, iterator: Any) -> tuple[Any] | str | None:
        """(The next item,); None after the last one; or what is wrong with the workers."""
        started = time.monotonic()
        while True:
            try:
                return (next(iterator),)
            except StopIteration:
                return None
            except RuntimeError as error:
                if not self.num_workers:
                    raise
                dead = [worker for worker in iterator._workers if not worker.is_alive()]
                if not dead and not str(error).startswith("DataLoader timed out"):
                    raise
                waited = time.monotonic() - started
                if dead:
                    codes = sorted({worker.exitcode or 0 for worker in dead})
                    how = ", ".join(describe_death(-code) if code < 0 else f"status {code}" for code in codes)
                    return f"{len(dead)} of {self.num_workers} data loading processes ended by {how}"
                if waited > (STUCK_SECONDS_STOPPING if self._stopping() else self._patience):
                    return f"the data loading processes have given no batch for {waited:.0f} s"


def _kill_workers(iterator: Any) -> None:
    """End the workers of a DataLoader's iterator, also those that are stopped and cannot answer."""
    for worker in getattr(iterator, "_workers", ()):
        worker.kill()
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()


class _SharedSlots:
    """Memory for `count` batches of n images, allocated before the workers are forked, which write it.

    DataLoader's own way, shared memory per batch, touches new pages for each one: workers then take 1.3 times the CPU
    time per image (arrays through a pipe: 1.3 in the workers and 2.4 in this process). It also needs room in /dev/shm,
    of which a container has 64 MB by default. Only this process decides who may write to a slot: its number goes to a
    worker together with the indices, and is free again once the batch has been copied out.
    """

    def __init__(self, count: int, n: int) -> None:
        memory = mmap.mmap(-1, count * n * 3 * IMAGE_SIZE**2)  # anonymous, shared with forked processes
        pixels = np.frombuffer(memory, dtype=np.uint8).reshape(count, n, IMAGE_SIZE, IMAGE_SIZE, 3)
        self.images = torch.from_numpy(pixels).permute(0, 1, 4, 2, 3)  # uint8 (count, n, 3, 112, 112)
        self.free: list[int] = []

    def take_out(self, slot: int, n: int, pin: bool) -> torch.Tensor:
        """A copy of the slot's first n images. The slot is free from then on."""
        images = self.images[slot, :n]
        batch = torch.empty_like(images, pin_memory=pin).copy_(images)
        self.free.append(slot)
        return batch


class _SlotSampler(Sampler):
    """What a worker is asked for: (a free slot, or None without slots; a list of indices)."""

    def __init__(self, batches: Iterable[list[int]], slots: _SharedSlots | None) -> None:
        self._batches, self._slots = batches, slots
        self.first = 0  # batches to leave out: those that were read before workers were replaced

    def __len__(self) -> int:
        assert isinstance(self._batches, Sized)
        return len(self._batches) - self.first

    def __iter__(self) -> Iterator[tuple[int | None, list[int]]]:
        if self._slots is not None:
            # DataLoader asks for the first batch once its workers have answered all earlier requests, and nobody
            # reads the batches of an abandoned iteration.
            self._slots.free = list(range(len(self._slots.images)))
        for indices in itertools.islice(self._batches, self.first, None):
            yield self._slots.free.pop() if self._slots is not None else None, indices


class _BatchReader(Dataset):
    """Reads whole batches of `dataset`, and decodes each image to its place in the batch."""

    def __init__(self, dataset: Any, slots: _SharedSlots | None) -> None:
        self.dataset, self._slots = dataset, slots
        self._decodes = hasattr(dataset, "encoded")
        self._labels: np.ndarray | None = None
        if self._decodes:
            jpeg_operator()  # loaded once, before workers are forked
            if hasattr(dataset, "labels"):
                self._labels = np.asarray(dataset.labels).astype(np.int32)  # one copy for all workers
        self._reported: set[str] = set()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(
        self, request: tuple[int | None, list[int]]
    ) -> tuple[torch.Tensor | int, list[int], list[int], int] | str:
        """DataLoader's hook for a whole batch: a TrainBatch, with the number of the slot in which its images lie.

        Without slots, with the images themselves. A string says what is wrong with a bad image.
        """
        slot, samples = request
        if self._slots is None:
            images = torch.empty((len(samples), IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        else:
            images = self._slots.images[slot, : len(samples)]
        # File descriptor 2 can be redirected in a worker, which has one thread.
        in_worker = get_worker_info() is not None
        messages: list[str] = []
        try:
            with codec_messages(messages) if in_worker and self._decodes else contextlib.nullcontext():
                read = [self._read(i, pixels) for pixels, i in zip(images.unbind(), samples)]
            indices, labels = [index for index, _ in read], [label for _, label in read]
            if messages:
                self._report_damage(indices)
        except UserError as error:
            return str(error)
        skipped = sum(index != i for index, i in zip(indices, samples))
        return images if slot is None else slot, labels, indices, skipped

    def _read(self, i: int, pixels: torch.Tensor) -> tuple[int, int]:
        """Write sample i to `pixels`, or the next readable one if bad ones are skipped. Returns (its index, label)."""
        skip_bad = getattr(self.dataset, "skip_bad", None)
        tries = min(_MAX_BAD_IN_A_ROW, len(self.dataset))
        for k in range(i, i + tries):
            index = k % len(self.dataset)
            try:
                return index, self._read_one(index, pixels)
            except UserError as error:
                if not skip_bad:
                    hint = "" if skip_bad is None else " (--skip-bad-images trains without such files)"
                    raise UserError(f"{error}{hint}") from None
                last_error = str(error)
        raise UserError(f"{tries} bad images in a row, the last one: {last_error}")

    def _read_one(self, index: int, pixels: torch.Tensor) -> int:
        """Write the image to `pixels` and return its label. Raises UserError."""
        if not self._decodes:
            image, label = self.dataset[index]
            pixels.copy_(image)
            return label
        data, name = self.dataset.encoded(index)
        decode_into(data, name, pixels)
        return int(self._labels[index]) if self._labels is not None else 0

    def _report_damage(self, indices: list[int]) -> None:
        """Decode the images of a batch again, to find those that libjpeg has complained about, and name each once."""
        pixels = torch.empty(3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
        for index in indices:
            data, name = self.dataset.encoded(index)
            messages: list[str] = []
            with codec_messages(messages):
                decode_into(data, name, pixels)
            if messages and name not in self._reported:
                self._reported.add(name)
                print(f"warning: {printable(name)}: the image's data is damaged ({messages[0]})", file=sys.stderr,
                      flush=True)


def _unchanged(batch: Any) -> Any:
    return batch


def start_loader_worker(parent: int, worker: int, ignored: Iterable[signal.Signals] = STOP_SIGNALS) -> None:
    """Runs first in every worker. parent: the process that reads from it; worker: its number.

    ignored: signals to ignore. All stop signals, if the parent ends its workers itself; only SIGINT, if it leaves that
    to Python's exit, which sends SIGTERM to the workers and would wait forever for one that ignores it.
    """
    if os.getppid() != parent:  # the parent has died already; torch's own watch would take another process for it
        os._exit(1)
    # Ctrl-C reaches the whole process group, and so may a batch system's signal. Only the main process answers it: it
    # may need more batches until it stops, and then stops its workers.
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
