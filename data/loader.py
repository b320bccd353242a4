"""The order of training samples, and the loader that turns it into uint8 batches.

N = global batch, K = micro-batches that make one global batch, W = world size, r = rank, n = N / (K·W): the images
that a rank takes at a time.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.decode import IMAGE_SIZE
from utils.errors import UserError
from utils.preemption import STOP_SIGNALS

# So many unreadable images in a row are not a few bad files but a disk that is gone.
_MAX_BAD_IN_A_ROW = 100


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
        rows = self.global_batch // self.micro_batches
        n = rows // self.world_size
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

    images: torch.Tensor  # uint8 (n, 3, 112, 112)
    labels: torch.Tensor  # int64 (n,)
    indices: torch.Tensor  # int64 (n,): the samples really taken
    skipped: int  # how many bad images were replaced


def build_train_loader(
    dataset: Dataset, sampler: GlobalBatchSampler, *, workers: int, pin_memory: bool
) -> DataLoader[TrainBatch]:
    """A loader of TrainBatch, one for each list of indices that `sampler` yields.

    dataset[i] is (uint8 (3, 112, 112), label); a bad image raises UserError there. It ends the iteration with that
    UserError, in one line, whatever the number of workers; if the attribute dataset.skip_bad is true, the next
    readable image in index order takes its place instead, and the batch counts it in `skipped`.
    """
    return _TrainLoader(
        _BatchReader(dataset),
        batch_sampler=sampler,
        collate_fn=_unchanged,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=functools.partial(start_loader_worker, os.getpid()),
        # Within a spawned rank the default is to spawn: every loading process would import the whole program again.
        multiprocessing_context="fork" if workers > 0 else None,
        pin_memory=pin_memory,
    )


class _TrainLoader(DataLoader):
    """Raises a UserError for a message that arrives in place of a batch: raised in a worker it would come wrapped in
    that worker's traceback."""

    def __iter__(self) -> Iterator[TrainBatch]:
        for batch in super().__iter__():
            if isinstance(batch, str):
                raise UserError(batch)
            yield batch


class _BatchReader(Dataset):
    """Whole batches of `dataset`, written where they belong without a list of images in between."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, wanted: list[int]) -> TrainBatch | str:
        """The DataLoader's hook for a batch at once; a string is what is wrong with a bad image."""
        images = torch.empty((len(wanted), 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
        labels = torch.empty(len(wanted), dtype=torch.int64)
        indices = torch.empty(len(wanted), dtype=torch.int64)
        try:
            for row, i in enumerate(wanted):
                images[row], labels[row], indices[row] = self._read(i)
        except UserError as error:
            return str(error)
        skipped = int((indices != torch.tensor(wanted)).sum())
        return TrainBatch(images, labels, indices, skipped)

    def _read(self, i: int) -> tuple[torch.Tensor, int, int]:
        """(image, label, index): sample i, or the next readable one if bad ones are to be skipped."""
        skip_bad = getattr(self.dataset, "skip_bad", False)
        tries = min(_MAX_BAD_IN_A_ROW, len(self.dataset))
        for k in range(i, i + tries):
            index = k % len(self.dataset)
            try:
                return *self.dataset[index], index
            except UserError as error:
                if not skip_bad:
                    raise UserError(f"{error} (--skip-bad-images trains without such files)") from None
                last_error = str(error)
        raise UserError(f"{tries} bad images in a row, the last one: {last_error}")


def _unchanged(batch: TrainBatch | str) -> TrainBatch | str:
    return batch


def start_loader_worker(parent: int, worker: int) -> None:
    """In every loading process: `parent` is the process that reads from it, `worker` its number."""
    if os.getppid() != parent:  # it has died already, and torch's own watch would take another for it
        os._exit(1)
    # Ctrl-C reaches the whole process group, and so may a batch system's signal: the main process alone answers, and may
    # need more batches until it does; it stops its workers.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
