#!/usr/bin/env python3
"""Images per second of the training loader and of the published one; start-up time with and without an index.

    python3 scripts/bench_data.py data/ms1m
    python3 scripts/bench_data.py --files 1000000

DIR: the loaders take turns on the same batches of the same files. "ours" is data.loader as main.py uses it: uint8
batches. "published" is torchvision's ImageFolder (Pillow) with ToTensor, Normalize and PyTorch's default collation:
float batches. prepare_batch, which ours leaves to the device, is timed on one core.

--files: creates a folder of that many empty files below $TMPDIR and opens it in fresh processes: by FaceFolder, at the
first start, which scans and writes the index, and at later ones; and by ImageFolder. Memory is what opening adds to the
process, and what is private to a forked worker after it has looked at every sample.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from typing import Any

# The script's own directory is on sys.path, the repository's root is not.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

if __name__ == "__main__":
    from utils.packages import require_packages

    require_packages()

import PIL
import torch
import torchvision
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, Normalize, ToTensor

from data.augment import AUGMENTS, prepare_batch  # noqa: E402
from data.folder import FaceFolder  # noqa: E402
from data.loader import GlobalBatchSampler, build_train_loader  # noqa: E402
from scripts import measure  # noqa: E402
from utils.errors import UserError, exit_on_user_error  # noqa: E402
from utils.flags import flag, parse_flags  # noqa: E402

Rows = list[dict[str, Any]]
SEED = 0
STARTS = 3  # of each kind
CSV_COLUMNS = (
    "date", "device", "torch", "torchvision", "pillow", "measure", "impl", "workers", "batch", "files", "directories",
    "unit", "p20", "p50", "p80", "over_published", "worker_private_mib", "process_mib",
)


@dataclass(frozen=True)
class Options:
    """The command line."""

    data: str | None = flag("data", metavar="DIR", help="measure the loaders on these JPEGs, laid out as for main.py")
    workers: tuple[int, ...] = flag("--workers", default=(0, 1, 2), metavar="N,N", at_least=0, help="loader processes")
    batch: int = flag("--batch", default=64, metavar="N", at_least=1, help="images per batch")
    rounds: int = flag("--rounds", default=9, metavar="N", at_least=1, help="turns per loader")
    batches: int = flag("--batches", default=15, metavar="N", at_least=1, help="batches per turn")
    files: int | None = flag("--files", metavar="N", at_least=1, help="measure the start on this many empty files")
    directories: int = flag("--directories", default=10_000, metavar="N", at_least=1, help="directories of the files")
    csv: str | None = flag("--csv", metavar="FILE", help="append the rows to this file")


def main() -> None:
    options = parse_options()
    measure.check_csv(options.csv, CSV_COLUMNS)
    torch.set_num_threads(1)
    rows: Rows = []
    if options.data is not None:
        folder = FaceFolder(options.data)
        sampler = GlobalBatchSampler(len(folder), options.batch, 1, 0, 1, SEED)
        for workers in options.workers:
            rows += measure_loaders(folder, sampler, workers, options)
        rows += measure_augmentation(folder, sampler, options)
    if options.files is not None:
        rows += measure_starts(options.files, options)
    common = {**measure.describe_machine(), "torchvision": torchvision.__version__, "pillow": PIL.__version__}
    measure.report([{**common, **row} for row in rows], CSV_COLUMNS, "measure", options.csv)


def measure_loaders(folder: FaceFolder, sampler: GlobalBatchSampler, workers: int, options: Options) -> Rows:
    """Rows of both loaders with this many workers each."""
    published = ImageFolder(folder.root, transform=Compose([ToTensor(), Normalize((0.5,) * 3, (0.5,) * 3)]))
    if [path for path, _ in published.samples] != [folder.path(i) for i in range(len(folder))]:
        raise UserError(f"{folder.root}: ImageFolder and FaceFolder find different images; give a folder of JPEGs")
    loaders: dict[str, DataLoader] = {
        "ours": build_train_loader(folder, sampler, workers=workers, pin_memory=False),
        "published": DataLoader(published, batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0,
                                multiprocessing_context="fork" if workers else None),
    }
    turns = {name: partial(images_per_second, chain.from_iterable(repeat(loader)), 2 * workers, options)
             for name, loader in loaders.items()}
    measure.alternate(turns, 1)  # the first turn starts the workers and reads files for the first time
    common = {"measure": "loader", "workers": workers, "batch": options.batch, "files": len(folder),
              "directories": len(folder.identities), "unit": "images/s"}
    rows: Rows = [{**common, "impl": name, **measure.spread(rates)}
                                  for name, rates in measure.alternate(turns, options.rounds).items()]
    rows[0]["over_published"] = rows[0]["p50"] / rows[1]["p50"]
    return rows


def images_per_second(batches: Iterator[Any], ahead: int, options: Options) -> float:
    """Take the batches that were read ahead, time others, and wait until the workers cannot disturb the next turn."""
    for _ in range(ahead):
        next(batches)
    started = time.perf_counter()
    images = sum(len(next(batches)[0]) for _ in range(options.batches))
    seconds = time.perf_counter() - started
    time.sleep(2 * ahead * seconds / options.batches)
    return images / seconds


def measure_augmentation(folder: FaceFolder, sampler: GlobalBatchSampler, options: Options) -> Rows:
    """Rows of prepare_batch with each --augment, in turns, on one thread."""
    batch = next(iter(build_train_loader(folder, sampler, workers=0, pin_memory=False)))
    works = {augment: partial(measure.timed, partial(prepare_batch, batch.images, torch.float32, augment=augment,
                                                     seed=SEED, epoch=0, indices=batch.indices))
             for augment in AUGMENTS}
    measure.alternate(works, 1)  # warms up
    seconds = measure.alternate(works, max(options.rounds, 3))
    return [{"measure": "prepare_batch", "batch": options.batch, "unit": "images/s", "impl": augment,
             **measure.spread([options.batch / value for value in values])} for augment, values in seconds.items()]


def measure_starts(files: int, options: Options) -> Rows:
    """Rows of opening a folder of `files` empty files."""
    directories = min(options.directories, files)
    with tempfile.TemporaryDirectory() as directory:
        root, index = os.path.join(directory, "images"), os.path.join(directory, "index")
        make_empty_files(root, files, directories)
        time.sleep(3)  # a directory that has just changed would not count as settled

        def scan() -> dict[str, float]:
            with contextlib.suppress(FileNotFoundError):
                os.remove(index)
            return open_in_a_fresh_process(root, index)

        open_in_a_fresh_process(root, None)  # pays for what the system has not cached yet
        starts = measure.alternate({
            "published": lambda: open_in_a_fresh_process(root, None),
            "first, scans": scan,
            "later, by the index": lambda: open_in_a_fresh_process(root, index),
        }, STARTS)
    common = {"measure": "start", "files": files, "directories": directories, "unit": "s"}
    rows: Rows = [{**common, "impl": name, **measure.spread([result["seconds"] for result in results]),
                   "worker_private_mib": max(result["worker_private_mib"] for result in results),
                   "process_mib": max(result["process_mib"] for result in results)}
                  for name, results in starts.items()]
    for row in rows[1:]:
        row["over_published"] = rows[0]["p50"] / row["p50"]
    return rows


def make_empty_files(root: str, files: int, directories: int) -> None:
    for d in range(directories):
        directory = os.path.join(root, f"{d:07d}")
        os.makedirs(directory)
        for k in range(d, files, directories):
            os.close(os.open(f"{directory}/{k:08d}.jpg", os.O_CREAT | os.O_WRONLY))


def open_in_a_fresh_process(root: str, index: str | None) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(open_folder, (root, index))


def open_folder(root: str, index: str | None) -> dict[str, float]:
    """Open a FaceFolder with this index file; without one, an ImageFolder.

    Returns seconds, MiB added to this process, and MiB private to a forked worker after it has looked at all samples.
    """
    before, started = measure.process_mib("Rss"), time.perf_counter()
    folder = ImageFolder(root) if index is None else FaceFolder(root, index=index)
    seconds = time.perf_counter() - started
    process_mib = measure.process_mib("Rss") - before
    look_at = folder.samples.__getitem__ if isinstance(folder, ImageFolder) else folder.path
    reading, writing = os.pipe()
    worker = os.fork()
    if worker == 0:
        alone = measure.process_mib("Private_")
        order = random.Random(SEED)
        for _ in range(len(folder)):
            look_at(order.randrange(len(folder)))
        os.write(writing, str(measure.process_mib("Private_") - alone).encode())
        os._exit(0)
    worker_private_mib = float(os.read(reading, 100))
    os.waitpid(worker, 0)
    return {"seconds": seconds, "process_mib": process_mib, "worker_private_mib": worker_private_mib}


def parse_options(argv: list[str] | None = None) -> Options:
    """Parse and check all that can be checked without looking at the images. Raises UserError."""
    options = parse_flags(Options, "bench_data.py",
                          "Images per second of the training loader; start-up time with and without an index.", argv)
    if options.data is None and options.files is None:
        raise UserError("nothing to measure: give a folder of images, --files N to time the start, or both")
    return options


if __name__ == "__main__":
    exit_on_user_error(main)
