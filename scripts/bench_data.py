#!/usr/bin/env python3
"""Images per second of the training loader beside the published way of loading; start-up time with and without an index.

    python3 scripts/bench_data.py data/ms1m
    python3 scripts/bench_data.py --files 1000000

DIR: the loaders take turns on the same batches of the same files. "ours" is data.loader as main.py uses it: uint8 batches.
"published" is torchvision's ImageFolder (Pillow, converted to RGB) with ToTensor, Normalize and PyTorch's default
collation: float batches. Each turn is timed once the batches read ahead before it are used up. What ours leaves to the
device, prepare_batch, is timed on one core.

--files: a folder of that many empty files is made in a temporary directory, and opened in fresh processes: by FaceFolder as
at the first start, which scans and writes the index, and as at later ones, and by ImageFolder. Memory is what opening adds to
the process, and what a forked worker has for itself after it has looked at every sample.
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
    "date", "device", "torch", "torchvision", "pillow", "measure", "impl", "workers", "batch", "files", "directories", "unit",
    "p20", "p50", "p80", "over_published", "worker_private_mib", "process_mib",
)


@dataclass(frozen=True)
class Options:
    """What the user asked for, one field per flag (see `parse_options` for their meaning)."""

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
    rows: list[dict[str, object]] = []
    if options.data is not None:
        folder = FaceFolder(options.data)
        for workers in options.workers:
            rows += measure_loaders(folder, workers, options)
        rows += measure_augmentation(folder, options)
    if options.files is not None:
        rows += measure_starts(options)
    rows = [{**dict.fromkeys(CSV_COLUMNS), **common, **row} for row in rows]
    print(json.dumps(rows) if options.json else as_text(rows), flush=True)
    if options.csv is not None:
        append_csv(options.csv, CSV_COLUMNS, rows)


# ---------------------------------------------------------------------------------------------------------------------
# Loaders


def measure_loaders(folder: FaceFolder, workers: int, options: Options) -> list[dict[str, object]]:
    """Rows of both loaders with so many workers each."""
    published = ImageFolder(folder.root, transform=Compose([ToTensor(), Normalize((0.5,) * 3, (0.5,) * 3)]))
    if [path for path, _ in published.samples] != [folder.path(i) for i in range(len(folder))]:
        raise UserError(f"{folder.root}: ImageFolder finds other images there than FaceFolder; give a folder of JPEGs alone")
    forked = dict(num_workers=workers, persistent_workers=workers > 0, multiprocessing_context="fork" if workers else None)
    loaders = {
        "ours": build_train_loader(folder, sampler(folder, options), workers=workers, pin_memory=False),
        "published": DataLoader(published, batch_sampler=sampler(folder, options), **forked),
    }
    turns: dict[str, Turns] = {}
    for name, loader in loaders.items():
        turns[name] = Turns(loader, workers, options)
        turns[name].take()  # the first one starts the workers and opens files for the first time
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(options.rounds):
        for name in loaders:
            rates[name].append(turns[name].take())
    rows = []
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
    """A loader's batches, over as many epochs as it takes, a turn at a time."""

    def __init__(self, loader: DataLoader, workers: int, options: Options) -> None:
        self._loader, self._ahead, self._options = loader, 2 * workers, options
        before = set(multiprocessing.active_children())
        self._batches = iter(loader)
        self._last = 0.0
        self._next()
        self.processes = [process.pid for process in set(multiprocessing.active_children()) - before]

    def take(self) -> float:
        """Images per second of one turn. Afterwards the workers are idle, so that they do not disturb the next one's."""
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


def measure_augmentation(folder: FaceFolder, options: Options) -> list[dict[str, object]]:
    """Rows of prepare_batch with each --augment, in turns, on one thread."""
    batch = next(iter(build_train_loader(folder, sampler(folder, options), workers=0, pin_memory=False)))
    rates: dict[str, list[float]] = {augment: [] for augment in AUGMENTS}
    for epoch in range(max(options.rounds, 3)):
        for augment in AUGMENTS:
            started = time.perf_counter()
            prepare_batch(batch.images, torch.float32, augment=augment, seed=SEED, epoch=epoch, indices=batch.indices)
            rates[augment].append(options.batch / (time.perf_counter() - started))
    return [{"measure": "prepare_batch", "impl": augment, "batch": options.batch, "unit": "images/s", **spread(values[1:])}
            for augment, values in rates.items()]


# ---------------------------------------------------------------------------------------------------------------------
# Starts


def measure_starts(options: Options) -> list[dict[str, object]]:
    """Rows of opening a folder of empty files."""
    with tempfile.TemporaryDirectory(prefix="arcface-bench-", dir=options.temporary) as directory:
        root = os.path.join(directory, "images")
        started = time.perf_counter()
        make_empty_files(root, options.files, options.directories)
        print(f"made {options.files:,} files in {options.directories:,} directories in {time.perf_counter() - started:.0f} s; "
              "waiting until their directories count as settled", file=sys.stderr, flush=True)
        time.sleep(3)
        in_a_fresh_process(open_published, root)  # whoever comes first would pay for what the system has not cached yet
        starts: dict[str, list[dict[str, float]]] = {"published": [], "first, scans": [], "later, by the index": []}
        for k in range(LATER_STARTS):
            index = os.path.join(directory, f"index-{k}")
            starts["published"].append(in_a_fresh_process(open_published, root))
            starts["first, scans"].append(in_a_fresh_process(open_ours, root, index))
            starts["later, by the index"].append(in_a_fresh_process(open_ours, root, index))
        started = time.perf_counter()
    print(f"removed them in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    rows = []
    for name, results in starts.items():
        rows.append({
            "measure": "start", "impl": name, "files": options.files, "directories": options.directories, "unit": "s",
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


def opened(open_folder: Callable[[], object], look_at: Callable[[object, int], object]) -> dict[str, float]:
    """How long it takes, what it adds to this process, and what a forked worker has for itself after `look_at` all."""
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
    """The pages that this process has in memory, mapped files among them."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / MIB


def private_mib(process: int) -> float:
    """The pages that no other process shares."""
    with open(f"/proc/{process}/smaps_rollup", encoding="ascii") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private_")) * 1024 / MIB


def spread(values: list[float]) -> dict[str, float]:
    return dict(zip(("p20", "p50", "p80"), percentiles(values)))


def as_text(rows: list[dict[str, object]]) -> str:
    def cell(value: object) -> str:
        return "" if value is None else f"{value:,.4g}" if isinstance(value, float) and abs(value) < 100 else (
            f"{value:,.0f}" if isinstance(value, float) else str(value))

    columns = [name for name in CSV_COLUMNS[5:] if any(row[name] is not None for row in rows)]
    head = f"{rows[0]['device']}, torch {rows[0]['torch']}, torchvision {rows[0]['torchvision']}, pillow {rows[0]['pillow']}"
    decoder = "torchvision's operator" if jpeg_operator() is not None else "Pillow: this torchvision has no operator for it"
    return "\n".join([head, f"JPEG by {decoder}", aligned([columns, *([cell(row[name]) for name in columns] for row in rows)])])


def parse_options(argv: list[str] | None = None) -> Options:
    """Parse and check all that can be checked without looking at the machine. Raises UserError."""
    parser = Parser("bench_data.py", "Images per second of the training loader; start-up time with and without an index.")
    parser.add_argument("data", metavar="DIR", nargs="?", help="a folder of JPEGs as main.py takes it, to measure the loaders on")
    parser.add_argument("--workers", default="0,1,2", metavar="N,N,...", help="loading processes (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images of a batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="turns of each loader (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=15, metavar="N", help="batches of a turn (default: %(default)s)")
    parser.add_argument("--files", type=int, metavar="N", help="measure the start on so many empty files, such as 1000000")
    parser.add_argument("--directories", type=int, default=10_000, metavar="N", help="that they lie in (default: %(default)s)")
    parser.add_argument("--temporary", metavar="DIR", help="where they are made for the time (default: the system's)")
    parser.add_argument("--json", action="store_true", help="print rows as JSON instead of a table")
    parser.add_argument("--csv", metavar="FILE", help="append the rows to FILE")
    values = vars(parser.parse_args(argv))
    try:
        values["workers"] = tuple(int(number) for number in values["workers"].split(","))
    except ValueError:
        raise UserError(f"--workers {values['workers']}: give numbers such as 0,1,2") from None
    options = Options(**values)
    if options.data is None and options.files is None:
        raise UserError("nothing to measure: give a folder of images, or --files N for the start on N empty files, or both")
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
