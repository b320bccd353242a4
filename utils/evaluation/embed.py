"""Images -> L2-normalised embeddings, with any backbone on any device.

Shapes: n images of a batch, N images in all, d embedding size.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from data.augment import prepare_batch
from data.loader import start_loader_worker
from utils.dist.collectives import all_gather_rows
from utils.dist.context import DistContext
from utils.errors import UserError
from utils.signals import STOP_SIGNALS


def choose_device(name: str) -> torch.device:
    """The device of `--device auto|cuda|cpu`: auto is the GPU if there is one; UserError for cuda if there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU on this machine; "
                        "check nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def embed_images(
    backbone: nn.Module,
    dataset: Dataset,
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    flip: bool = False,
    progress: bool = True,
    print_freq: int = 100,
) -> np.ndarray:
    """e / |e| with e = f(x), or with `flip` e = f(x) + f(mirrored x), for every x of the dataset: float32 (N, d).

    backbone: f, in evaluation mode while this runs; it is moved to `device`, and computes in its parameters' dtype.
    dataset: item i is (uint8 (3, 112, 112), label); the label is ignored. A UserError that reading an item raises ends
    the work with that error, whatever the number of workers (reading processes; 0: this process reads).
    progress: a bar on a terminal (stderr), else a line each `print_freq` batches and at the end (stdout).

    An embedding without a direction (zero, NaN or infinite) becomes zero; a warning on stderr tells how many there are.
    """
    rows = _embed_rows(backbone, dataset, batch_size=batch_size, workers=workers, device=device, flip=flip,
                       progress=progress, print_freq=print_freq, ignored=(signal.SIGINT,))
    return _without_unusable(rows, warn=True)


def embed_images_together(
    context: DistContext,
    backbone: nn.Module,
    dataset: Dataset,
    *,
    batch_size: int,
    workers: int,
    flip: bool = False,
    progress: bool = True,
    print_freq: int = 100,
) -> np.ndarray:
    """Collective. `embed_images` with the images shared out: each rank reads and embeds its own, all get all embeddings.

    All ranks must have the same backbone, buffers included, and the same dataset. Rank r takes a contiguous part of
    ceil(N / W) images; what is missing at the end is made up by the last image, embedded again. Rank 0 warns.
    """
    total, world_size = len(dataset), context.world_size
    share = -(-total // world_size)
    mine = [min(i, total - 1) for i in range(context.rank * share, (context.rank + 1) * share)]
    rows = _embed_rows(backbone, Subset(dataset, mine), batch_size=batch_size, workers=workers, device=context.device,
                       flip=flip, progress=progress and context.is_main, print_freq=print_freq,
                       ignored=STOP_SIGNALS, whose=" of rank 0" if world_size > 1 else "")
    if world_size > 1:
        rows = all_gather_rows(torch.from_numpy(rows).to(context.device), dist.group.WORLD).cpu().numpy()
    return _without_unusable(rows[:total], warn=context.is_main)


@contextlib.contextmanager
def buffers_of_rank_0(context: DistContext, module: nn.Module) -> Iterator[None]:
    """Collective. Within it every rank's `module` has the buffers of rank 0, and afterwards its own again, to the bit.

    Between two steps the ranks' BatchNorm statistics differ, as each has seen its own images; a checkpoint holds rank 0's.
    """
    if context.world_size == 1:
        yield
        return
    own = [buffer.clone() for buffer in module.buffers()]
    for buffer in module.buffers():
        dist.broadcast(buffer, src=0)
    try:
        yield
    finally:
        for buffer, value in zip(module.buffers(), own):
            buffer.copy_(value)


def _without_unusable(rows: np.ndarray, warn: bool) -> np.ndarray:
    """Zero instead of the rows that are NaN, in place."""
    not_finite = np.isnan(rows[:, 0])
    zero = np.count_nonzero(~rows.any(axis=1))
    rows[not_finite] = 0
    if warn and (zero or not_finite.any()):
        print(
            f"warning: {zero + np.count_nonzero(not_finite)} of {len(rows)} embeddings are unusable "
            f"({np.count_nonzero(not_finite)} NaN or infinite, {zero} zero); they are set to zero", file=sys.stderr,
        )
    return rows


def _embed_rows(
    backbone: nn.Module,
    dataset: Dataset,
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    flip: bool,
    progress: bool,
    print_freq: int,
    ignored: tuple[signal.Signals, ...],
    whose: str = "",
) -> np.ndarray:
    """What embed_images returns, but for NaN in the rows of embeddings that are NaN or infinite.

    ignored: see start_loader_worker. whose: for the progress.
    """
    total = len(dataset)
    if total == 0:
        raise ValueError("there are no images to embed")
    backbone.to(device)
    dtype = next((p.dtype for p in backbone.parameters() if p.is_floating_point()), torch.float32)
    training = {module: module.training for module in backbone.modules()}
    backbone.eval()
    embeddings: np.ndarray | None = None
    done = 0
    report = _Progress(total, batch_size, print_freq, enabled=progress, whose=whose)
    try:
        with torch.no_grad():
            for images in _uint8_batches(dataset, batch_size, workers, ignored):
                x = prepare_batch(images.to(device), dtype, augment="none")
                output = backbone(x)
                if flip:
                    output = output + backbone(x.flip(3))
                unit = _unit_rows(output)
                if embeddings is None:
                    embeddings = np.empty((total, unit.shape[1]), dtype=np.float32)
                embeddings[done : done + len(unit)] = unit
                done += len(unit)
                report.update(done)
    except torch.OutOfMemoryError:
        raise UserError(f"--batch-size {batch_size}: does not fit into the GPU's memory; use a smaller one") from None
    finally:
        report.close()
        for module, mode in training.items():
            module.training = mode
    return embeddings


def _unit_rows(output: torch.Tensor) -> np.ndarray:
    """(n, d) -> float32 (n, d), its rows divided by their lengths; zero stays zero, NaN where a row is not finite."""
    output = output.double()  # where no length of a float32 vector overflows or vanishes
    length = torch.linalg.vector_norm(output, dim=1, keepdim=True)
    unit = torch.where(length > 0, output / length, 0)
    return torch.where(torch.isfinite(length), unit, torch.nan).float().cpu().numpy()


class _Progress:
    """A bar on a terminal, else a line each `print_freq` batches and at the end."""

    def __init__(self, total: int, batch_size: int, print_freq: int, enabled: bool, whose: str) -> None:
        terminal = sys.stderr.isatty()
        self.whose = whose
        # None, not a disabled bar: tqdm's lock is a semaphore, which a rank that is stopped leaves behind with a warning.
        self.bar = tqdm(total=total, desc="embedding", unit=" images" + whose) if enabled and terminal else None
        self.lines = enabled and not terminal
        self.total, self.step = total, batch_size * print_freq
        self.started = time.perf_counter()

    def update(self, done: int) -> None:
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
        if self.lines and (done % self.step == 0 or done == self.total):
            rate = done / (time.perf_counter() - self.started)
            print(f"embedded {done}/{self.total} images{self.whose}, {rate:.1f} images/s", flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class _BatchReader(Dataset):
    """Whole batches of `dataset`, uint8 (n, 3, 112, 112), or the UserError that one of their images raised.

    As arrays, not tensors: those would travel through /dev/shm, where the default 64 MB of a container hold not two
    batches of 1,024. The error as a value: raised in a context, it would carry its traceback along.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> np.ndarray | UserError:
        """The DataLoader's hook for a batch at once."""
        try:
            return np.stack([np.asarray(self.dataset[i][0]) for i in indices])
        except UserError as error:
            return error


def _uint8_batches(
    dataset: Dataset, batch_size: int, workers: int, ignored: tuple[signal.Signals, ...]
) -> Iterator[torch.Tensor]:
    with warnings.catch_warnings():
        # More workers than cores are the user's choice; they help on network disks.
        warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes in total")
        batches = iter(DataLoader(
            _BatchReader(dataset), batch_size=batch_size, shuffle=False,
            num_workers=min(workers, -(-len(dataset) // batch_size)),  # no more workers than batches
            collate_fn=_unchanged, worker_init_fn=functools.partial(start_loader_worker, os.getpid(), ignored=ignored),
            multiprocessing_context="fork" if workers > 0 else None,  # Python 3.14's default would import all again
            generator=torch.Generator(),  # else it would take a number from the global one, which a training run may use
        ))
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        yield torch.from_numpy(batch)


def _unchanged(batch: np.ndarray | UserError) -> np.ndarray | UserError:
    return batch
