"""The order of training samples, and the loader that turns it into uint8 batches.

N = global batch, K = micro-batches that make one global batch, W = world size, r = rank, n = N / (K·W): the images
that a rank takes at a time.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import signal
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from data.decode import IMAGE_SIZE, CodecMessages, decode_into, jpeg_operator
from utils.errors import UserError
from utils.signals import STOP_SIGNALS

# So many unreadable images in a row are not a few bad files but a disk that is gone.
_MAX_BAD_IN_A_ROW = 100
_PREFETCH = 2  # batches that each worker is asked for ahead of the loop


class GlobalBatchSampler(Sampler[list[int]]):
    """Global batch k of an epoch is perm[k·N : (k+1)·N], the same at every W; iterating yields rank r's part of it.

    perm, a permutation of the num_samples indices, depends on (seed, epoch, num_samples) only. Micro-batch j of global
    batch k is its rows [j·N/K : (j+1)·N/K], and rank r takes the r-th n of these. An epoch has
    steps_per_epoch = num_samples // N steps: its last incomplete global batch is dropped.

    Iterating yields K lists of n sample indices for each step from the position to the epoch's end. It does not move
    the position, because a loader reads ahead and only the training loop knows where it is: call set_position for
    every epoch.

    Raises UserError where num_samples < N or where N does not divide by K·W.
    """

    def __init__(
        self, num_samples: int, global_batch: int, micro_batches: int, rank: int, world_size: int, seed: int
    ) -> None:
        if global_batch % (micro_batches * world_size):
            raise UserError(
                f"the global batch of {global_batch} does not divide by {world_size} processes x "
                f"{micro_batches} micro-batches; change --batch-size or --accumulation-steps"
            )
        if num_samples < global_batch:
            raise UserError(
                f"{num_samples} images are fewer than one global batch of {global_batch}; use a smaller --batch-size"
            )
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        self.num_samples = num_samples
        self.global_batch = global_batch
        self.micro_batches = micro_batches
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.steps_per_epoch = num_samples // global_batch
        self.images_per_batch = global_batch // micro_batches // world_size
        self.set_position(0, 0)

    def set_position(self, epoch: int, step_in_epoch: int) -> None:
        """The next iteration starts at global batch `step_in_epoch` (0 to steps_per_epoch) of `epoch`."""
        assert 0 <= step_in_epoch <= self.steps_per_epoch, f"step {step_in_epoch} of {self.steps_per_epoch}"
        self._epoch = epoch
        self._step_in_epoch = step_in_epoch

    def __len__(self) -> int:
        """Micro-batches from the position to the epoch's end."""
        return (self.steps_per_epoch - self._step_in_epoch) * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        first_step = self._step_in_epoch
        permutation = self._permutation(self._epoch)  # lives as long as this iteration: 4 bytes per sample
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

    images: torch.Tensor  # uint8 (n, 3, 112, 112); in memory (n, 112, 112, 3), as decoders give it
    labels: torch.Tensor  # int64 (n,)
    indices: torch.Tensor  # int64 (n,): the samples really taken
    skipped: int  # how many bad images were replaced


def build_train_loader(
    dataset: Dataset, sampler: GlobalBatchSampler, *, workers: int, pin_memory: bool
) -> DataLoader[TrainBatch]:
    """A loader of TrainBatch, one for each list of indices that `sampler` yields.

    dataset.encoded(i) is (the undecoded image, its name) and dataset.labels[i] its label; of a dataset without these
    dataset[i] is (uint8 (3, 112, 112), label). A bad image raises UserError there. It ends the iteration with that
    UserError, in one line, whatever the number of workers; if the attribute dataset.skip_bad is true, the next
    readable image in index order takes its place instead, and the batch counts it in `skipped`.
    """
    slots = _SharedSlots(_PREFETCH * workers + 1, sampler.images_per_batch) if workers > 0 else None
    return _TrainLoader(_BatchReader(dataset, slots), sampler, slots, workers, pin_memory)


class DeviceBatches:
    """The batches of `batches` with images and labels on `device`.

    On a GPU they are copied on a stream of their own. The training loop runs ahead of the GPU, so that the copy of a batch
    goes on beside the computation with the one before it; from pageable memory there would be no such overlap: pin it.
    """

    def __init__(self, batches: Iterable[TrainBatch], device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __iter__(self) -> Iterator[TrainBatch]:
        for images, labels, indices, skipped in self._batches:
            yield TrainBatch(*self._copied(images, labels), indices, skipped)

    def _copied(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        if self._stream is None:
            return [tensor.to(self._device) for tensor in tensors]
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            copies = [tensor.to(self._device, non_blocking=True) for tensor in tensors]
        computing.wait_stream(self._stream)
        for copy in copies:
            copy.record_stream(computing)  # its memory must not be given to the next copy before this use of it is over
        return copies


class _TrainLoader(DataLoader):
    """Takes the batches' images out of the shared slots, and raises a UserError for a message that arrives in place of a
    batch: raised in a worker it would come wrapped in that worker's traceback."""

    def __init__(
        self, reader: _BatchReader, sampler: GlobalBatchSampler, slots: _SharedSlots | None, workers: int, pin_memory: bool
    ) -> None:
        super().__init__(
            reader,
            batch_sampler=_SlotSampler(sampler, slots),
            collate_fn=_unchanged,
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=_PREFETCH if workers > 0 else None,
            worker_init_fn=functools.partial(start_loader_worker, os.getpid()),
            # Within a spawned rank the default is to spawn: every loading process would import the whole program again.
            multiprocessing_context="fork" if workers > 0 else None,
        )
        # Not DataLoader's own pinning, which would look at the slots' numbers while the pixels lie in the slots.
        self._slots, self._pins = slots, pin_memory

    def __iter__(self) -> Iterator[TrainBatch]:
        for loaded in super().__iter__():
            if isinstance(loaded, str):
                raise UserError(loaded)
            images, labels, indices, skipped = loaded
            if isinstance(images, int):
                images = self._slots.take_out(images, self._pins)
            elif self._pins:
                images = images.pin_memory()
            labels = torch.tensor(labels, dtype=torch.int64, pin_memory=self._pins)
            yield TrainBatch(images, labels, torch.tensor(indices, dtype=torch.int64), skipped)


class _SharedSlots:
    """Memory for `count` batches, which the loading processes write and this process reads: made before they are forked.

    A batch that went through shared memory of its own, as DataLoader's do, would touch new pages each time, which took a
    fifth of all time, and would need room in /dev/shm, of which a container has 64 MB. This process alone says who may
    write to a slot: its number goes to a worker with the indices of the batch, and is free again once the batch is out.
    """

    def __init__(self, count: int, n: int) -> None:
        memory = mmap.mmap(-1, count * n * 3 * IMAGE_SIZE**2)  # anonymous, shared with forked processes
        pixels = np.frombuffer(memory, dtype=np.uint8).reshape(count, n, IMAGE_SIZE, IMAGE_SIZE, 3)
        self.images = torch.from_numpy(pixels).permute(0, 1, 4, 2, 3)  # uint8 (count, n, 3, 112, 112)
        self._free: list[int] = []

    def free_all(self) -> None:
        """At an iteration's start: batches of one that was left in the middle are not read any more."""
        self._free = list(range(len(self.images)))

    def lend(self) -> int | None:
        return self._free.pop() if self._free else None

    def take_out(self, slot: int, pin: bool) -> torch.Tensor:
        """A copy of the batch in the slot, which is free from then on."""
        batch = torch.empty_like(self.images[slot], pin_memory=pin).copy_(self.images[slot])
        self._free.append(slot)
        return batch


class _SlotSampler(Sampler):
    """What a worker is asked for: (a free slot or None, the sampler's list of indices)."""

    def __init__(self, sampler: GlobalBatchSampler, slots: _SharedSlots | None) -> None:
        self._sampler, self._slots = sampler, slots

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[tuple[int | None, list[int]]]:
        # DataLoader asks for the first batch once its workers have answered all that they were asked for before.
        if self._slots is not None:
            self._slots.free_all()
        for indices in self._sampler:
            yield self._slots.lend() if self._slots is not None else None, indices


class _Loaded(NamedTuple):
    """A TrainBatch on its way: what travels through a pipe in full is small."""

    images: int | torch.Tensor  # the slot that they lie in
    labels: list[int]
    indices: list[int]
    skipped: int


class _BatchReader(Dataset):
    """Whole batches of `dataset`, each image decoded to where it belongs."""

    def __init__(self, dataset: Dataset, slots: _SharedSlots | None) -> None:
        self.dataset, self._slots = dataset, slots
        self._decodes = hasattr(dataset, "encoded")
        if self._decodes:
            self._labels = np.asarray(dataset.labels).astype(np.int32)  # one copy for all workers
            jpeg_operator()  # loaded once, before there are workers
        self._messages: CodecMessages | None = None
        self._told: set[str] = set()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, wanted: tuple[int | None, list[int]]) -> _Loaded | str:
        """The DataLoader's hook for a batch at once; a string is what is wrong with a bad image."""
        slot, samples = wanted
        if slot is None:
            images = torch.empty((len(samples), IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        else:
            images = self._slots.images[slot]
        indices, labels = [], []
        try:
            with self._codec_messages() as messages:
                for pixels, i in zip(images.unbind(), samples):
                    index, label = self._read(i, pixels, messages)
                    indices.append(index)
                    labels.append(label)
        except UserError as error:
            return str(error)
        skipped = sum(index != i for index, i in zip(indices, samples))
        return _Loaded(images if slot is None else slot, labels, indices, skipped)

    def _codec_messages(self) -> contextlib.AbstractContextManager[CodecMessages | None]:
        """In a worker, which has one thread, libjpeg's messages are given the name of the image that they are about."""
        if get_worker_info() is None or not self._decodes:
            return contextlib.nullcontext()
        self._messages = self._messages or CodecMessages()
        return self._messages

    def _read(self, i: int, pixels: torch.Tensor, messages: CodecMessages | None) -> tuple[int, int]:
        """Write sample i, or the next readable one if bad ones are to be skipped, to `pixels`; (its index, its label)."""
        skip_bad = getattr(self.dataset, "skip_bad", False)
        tries = min(_MAX_BAD_IN_A_ROW, len(self.dataset))
        for k in range(i, i + tries):
            index = k % len(self.dataset)
            try:
                return index, self._read_one(index, pixels, messages)
            except UserError as error:
                if not skip_bad:
                    raise UserError(f"{error} (--skip-bad-images trains without such files)") from None
                last_error = str(error)
        raise UserError(f"{tries} bad images in a row, the last one: {last_error}")

    def _read_one(self, index: int, pixels: torch.Tensor, messages: CodecMessages | None) -> int:
        """Write the image to `pixels` and return its label. Raises UserError."""
        if not self._decodes:
            image, label = self.dataset[index]
            pixels.copy_(image)
            return label
        data, name = self.dataset.encoded(index)
        try:
            decode_into(data, name, pixels)
        finally:
            text = messages.take() if messages is not None else ""
        if text and name not in self._told:
            self._told.add(name)
            messages.pass_on(f"warning: {name}: the image's data is damaged ({text})\n")
        return int(self._labels[index])


def _unchanged(batch: _Loaded | str) -> _Loaded | str:
    return batch


def start_loader_worker(parent: int, worker: int, ignored: Iterable[signal.Signals] = STOP_SIGNALS) -> None:
    """In every loading process: `parent` is the process that reads from it, `worker` its number.

    ignored: for a reader that ends its loading processes itself. One that leaves it to Python's exit gives SIGINT alone:
    Python sends SIGTERM to them, and would wait for ever for a process that ignores it.
    """
    if os.getppid() != parent:  # it has died already, and torch's own watch would take another for it
        os._exit(1)
    # Ctrl-C reaches the whole process group, and so may a batch system's signal: the main process alone answers, and may
    # need more batches until it does; it stops its workers.
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
