#!/usr/bin/env python3
"""Images per second of the training loader and of the published one; start-up time with and without an index.

    python3 scripts/bench_data.py data/ms1m
    python3 scripts/bench_data.py --files 1000000

DIR: the loaders take turns on the same batches of the same files. "ours" is data.loader as main.py uses it: uint8
batches. "published" is torchvision's ImageFolder (Pillow, converted to RGB) with ToTensor, Normalize and PyTorch's
default collation: float batches. A turn is timed after the batches that were read ahead have been used up.
prepare_batch, which ours leaves to the device, is timed on one core.

--files: creates a folder of that many empty files in a temporary directory and opens it in fresh processes: by
FaceFolder, at the first start, which scans and writes the index, and at later ones; and by ImageFolder. Memory is what
opening adds to the process, and what is private to a forked worker after it has looked at every sample.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import PIL
import torch
import torchvision
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, Normalize, ToTensor

# The script's own directory is on sys.path, the repository's root is not.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data.augment import AUGMENTS, prepare_batch  # noqa: E402
from data.decode import jpeg_operator  # noqa: E402
from data.folder import FaceFolder  # noqa: E402
from data.loader import GlobalBatchSampler, build_train_loader  # noqa: E402
from scripts.measure import MIB, aligned, append_csv, check_csv, describe_machine, percentiles  # noqa: E402
from utils.errors import Parser, UserError, exit_on_user_error  # noqa: E402

CPU = torch.device("cpu")
SEED = 0
LATER_STARTS = 3
CSV_COLUMNS = (
    "date", "device", "torch", "torchvision", "pillow", "measure", "impl", "workers", "batch", "files", "directories",
    "unit", "p20", "p50", "p80", "over_published", "worker_private_mib", "process_mib",
)


@dataclass(frozen=True)
class Options:
    """The command line, one field per flag; `parse_options` explains them."""

    data: str | None
    workers: tuple[int, ...]
    batch: int
    rounds: int
    batches: int
    files: int | None
    directories: int
    temporary: str | None
    json: bool
    csv: str | None


def main() -> None:
    options = parse_options()
    if options.csv is not None:
        check_csv(options.csv, CSV_COLUMNS)
    torch.set_num_threads(1)
    machine = describe_machine(CPU)
    common = {"date": machine["date"], "device": machine["device"], "torch": machine["torch"],
              "torchvision": torchvision.__version__, "pillow": PIL.__version__}
    rows: list[dict[str, Any]] = []
    if options.data is not None:
        folder = FaceFolder(options.data)
        for workers in options.workers:
            rows += measure_loaders(folder, workers, options)
        rows += measure_augmentation(folder, options)
    if options.files is not None:
        rows += measure_starts(options.files, options)
    rows = [{**dict.fromkeys(CSV_COLUMNS), **common, **row} for row in rows]
    print(json.dumps(rows) if options.json else as_text(rows), flush=True)
    if options.csv is not None:
        append_csv(options.csv, CSV_COLUMNS, rows)


# ---------------------------------------------------------------------------------------------------------------------
# Loaders


def measure_loaders(folder: FaceFolder, workers: int, options: Options) -> list[dict[str, Any]]:
    """Rows of both loaders with this many workers each."""
    published = ImageFolder(folder.root, transform=Compose([ToTensor(), Normalize((0.5,) * 3, (0.5,) * 3)]))
    if [path for path, _ in published.samples] != [folder.path(i) for i in range(len(folder))]:
        raise UserError(f"{folder.root}: ImageFolder and FaceFolder find different images; give a folder of JPEGs")
    loaders = {
        "ours": build_train_loader(folder, sampler(folder, options), workers=workers, pin_memory=False),
        "published": DataLoader(
            published, batch_sampler=sampler(folder, options), num_workers=workers, persistent_workers=workers > 0,
            multiprocessing_context="fork" if workers else None,
        ),
    }
    turns: dict[str, Turns] = {}
    for name, loader in loaders.items():
        turns[name] = Turns(loader, workers, options)
        turns[name].take()  # the first turn starts the workers and reads files for the first time
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(options.rounds):
        for name in loaders:
            rates[name].append(turns[name].take())
    rows: list[dict[str, Any]] = []
    for name in loaders:
        private = [private_mib(process) for process in turns[name].processes]
        rows.append({
            "measure": "loader", "impl": name, "workers": workers, "batch": options.batch, "files": len(folder),
            "directories": len(folder.identities), "unit": "images/s", **spread(rates[name]),
            "worker_private_mib": max(private, default=None),
        })
    rows[0]["over_published"] = rows[0]["p50"] / rows[1]["p50"]
    return rows


class Turns:
    """A loader's batches, over as many epochs as needed, one turn at a time."""

    def __init__(self, loader: DataLoader, workers: int, options: Options) -> None:
        self._loader, self._ahead, self._options = loader, 2 * workers, options
        before = set(multiprocessing.active_children())
        self._batches = iter(loader)
        self._last = 0.0
        self._next()
        started = set(multiprocessing.active_children()) - before
        self.processes = [process.pid for process in started if process.pid is not None]

    def take(self) -> float:
        """Images per second of one turn. Then waits until the workers are idle and cannot disturb the next turn."""
        for _ in range(self._ahead):
            self._next()
        started = time.perf_counter()
        for _ in range(self._options.batches):
            self._next()
        seconds = time.perf_counter() - started
        time.sleep(2 * self._ahead * seconds / self._options.batches)
        return self._options.batches * self._options.batch / seconds

    def _next(self) -> None:
        try:
            batch = next(self._batches)
        except StopIteration:
            self._batches = iter(self._loader)
            batch = next(self._batches)
        assert len(batch[0]) == self._options.batch


def sampler(folder: FaceFolder, options: Options) -> GlobalBatchSampler:
    return GlobalBatchSampler(len(folder), options.batch, 1, 0, 1, SEED)


def measure_augmentation(folder: FaceFolder, options: Options) -> list[dict[str, Any]]:
    """Rows of prepare_batch with each --augment, in turns, on one thread."""
    batch = next(iter(build_train_loader(folder, sampler(folder, options), workers=0, pin_memory=False)))
    rates: dict[str, list[float]] = {augment: [] for augment in AUGMENTS}
    for epoch in range(max(options.rounds, 3)):
        for augment in AUGMENTS:
            started = time.perf_counter()
            prepare_batch(batch.images, torch.float32, augment=augment, seed=SEED, epoch=epoch, indices=batch.indices)
            rates[augment].append(options.batch / (time.perf_counter() - started))
    common = {"measure": "prepare_batch", "batch": options.batch, "unit": "images/s"}
    return [{**common, "impl": augment, **spread(values[1:])} for augment, values in rates.items()]


# ---------------------------------------------------------------------------------------------------------------------
# Starts


def measure_starts(files: int, options: Options) -> list[dict[str, Any]]:
    """Rows of opening a folder of `files` empty files."""
    with tempfile.TemporaryDirectory(prefix="arcface-bench-", dir=options.temporary) as directory:
        root = os.path.join(directory, "images")
        started = time.perf_counter()
        make_empty_files(root, files, options.directories)
        seconds = time.perf_counter() - started
        print(f"created {files:,} files in {options.directories:,} directories in {seconds:.0f} s; waiting until their "
              "directories count as settled", file=sys.stderr, flush=True)
        time.sleep(3)
        in_a_fresh_process(open_published, root)  # the first one pays for what the system has not cached yet
        starts: dict[str, list[dict[str, float]]] = {"published": [], "first, scans": [], "later, by the index": []}
        for k in range(LATER_STARTS):
            index = os.path.join(directory, f"index-{k}")
            starts["published"].append(in_a_fresh_process(open_published, root))
            starts["first, scans"].append(in_a_fresh_process(open_ours, root, index))
            starts["later, by the index"].append(in_a_fresh_process(open_ours, root, index))
        started = time.perf_counter()
    print(f"removed them in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    rows: list[dict[str, Any]] = []
    for name, results in starts.items():
        rows.append({
            "measure": "start", "impl": name, "files": files, "directories": options.directories, "unit": "s",
            **spread([result["seconds"] for result in results]),
            "worker_private_mib": max(result["worker_private_mib"] for result in results),
            "process_mib": max(result["process_mib"] for result in results),
        })
    for row in rows[1:]:
        row["over_published"] = rows[0]["p50"] / row["p50"]
    return rows


def make_empty_files(root: str, files: int, directories: int) -> None:
    for d in range(directories):
        directory = os.path.join(root, f"{d:07d}")
        os.makedirs(directory)
        for k in range(d, files, directories):
            os.close(os.open(f"{directory}/{k:08d}.jpg", os.O_CREAT | os.O_WRONLY))


def in_a_fresh_process(work: Callable[..., dict[str, float]], *args: str) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, args)


def open_published(root: str) -> dict[str, float]:
    return opened(lambda: ImageFolder(root), lambda folder, i: folder.samples[i])


def open_ours(root: str, index: str) -> dict[str, float]:
    return opened(lambda: FaceFolder(root, index=index), lambda folder, i: folder.path(i))


def opened(open_folder: Callable[[], Any], look_at: Callable[[Any, int], object]) -> dict[str, float]:
    """Seconds, MiB added to this process, and MiB private to a forked worker after it has looked at all samples."""
    before = resident_mib()
    started = time.perf_counter()
    folder = open_folder()
    seconds = time.perf_counter() - started
    process_mib = resident_mib() - before
    reading, writing = os.pipe()
    worker = os.fork()
    if worker == 0:
        alone = private_mib(os.getpid())
        order = random.Random(SEED)
        for _ in range(len(folder)):
            look_at(folder, order.randrange(len(folder)))
        os.write(writing, str(private_mib(os.getpid()) - alone).encode())
        os._exit(0)
    worker_private_mib = float(os.read(reading, 100))
    os.waitpid(worker, 0)
    return {"seconds": seconds, "process_mib": process_mib, "worker_private_mib": worker_private_mib}


# ---------------------------------------------------------------------------------------------------------------------
# Around them


def resident_mib() -> float:
    """The pages of this process in memory, mapped files included."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / MIB


def private_mib(process: int) -> float:
    """The pages that no other process shares."""
    with open(f"/proc/{process}/smaps_rollup", encoding="ascii") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private_")) * 1024 / MIB


def spread(values: list[float]) -> dict[str, float]:
    return dict(zip(("p20", "p50", "p80"), percentiles(values)))


def as_text(rows: list[dict[str, Any]]) -> str:
    def cell(value: object) -> str:
        if isinstance(value, float):
            return f"{value:,.4g}" if abs(value) < 100 else f"{value:,.0f}"
        return "" if value is None else str(value)

    columns = [name for name in CSV_COLUMNS[5:] if any(row[name] is not None for row in rows)]
    first = rows[0]
    head = f"{first['device']}, torch {first['torch']}, torchvision {first['torchvision']}, pillow {first['pillow']}"
    decoder = "torchvision's operator" if jpeg_operator() is not None else "Pillow, because torchvision has no operator"
    table = aligned([columns, *([cell(row[name]) for name in columns] for row in rows)])
    return f"{head}\nJPEG by {decoder}\n{table}"


def parse_options(argv: list[str] | None = None) -> Options:
    """Parse and check all that can be checked without looking at the machine. Raises UserError."""
    parser = Parser("bench_data.py",
                    "Images per second of the training loader; start-up time with and without an index.")
    parser.add_argument("data", metavar="DIR", nargs="?",
                        help="measure the loaders on this folder of JPEGs, laid out as for main.py")
    parser.add_argument("--workers", default="0,1,2", metavar="N,N,...", help="loader processes (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images per batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="turns per loader (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=15, metavar="N", help="batches per turn (default: %(default)s)")
    parser.add_argument("--files", type=int, metavar="N", help="measure the start on N empty files, such as 1000000")
    parser.add_argument("--directories", type=int, default=10_000, metavar="N",
                        help="the directories that hold them (default: %(default)s)")
    parser.add_argument("--temporary", metavar="DIR", help="where to create them (default: the system's)")
    parser.add_argument("--json", action="store_true", help="print rows as JSON instead of a table")
    parser.add_argument("--csv", metavar="FILE", help="append the rows to FILE")
    values = vars(parser.parse_args(argv))
    try:
        values["workers"] = tuple(int(number) for number in values["workers"].split(","))
    except ValueError:
        raise UserError(f"--workers {values['workers']}: give numbers such as 0,1,2") from None
    options = Options(**values)
    if options.data is None and options.files is None:
        raise UserError("nothing to measure: give a folder of images, --files N to time the start, or both")
    for flag, value, minimum in (
        ("--workers", min(options.workers), 0), ("--batch", options.batch, 1), ("--rounds", options.rounds, 1),
        ("--batches", options.batches, 1), ("--files", options.files, 1), ("--directories", options.directories, 1),
    ):
        if value is not None and value < minimum:
            raise UserError(f"{flag} {value}: give at least {minimum}")
    if options.files is not None and options.files < options.directories:
        raise UserError(f"--files {options.files}: fewer than the {options.directories} of --directories")
    if options.temporary is not None and not os.path.isdir(options.temporary):
        raise UserError(f"--temporary {options.temporary}: no such directory")
    return options


if __name__ == "__main__":
    exit_on_user_error(main)
