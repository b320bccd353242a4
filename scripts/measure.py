"""What the benchmarks share: flags and processes, taking turns, peak memory, tables and CSV files."""

from __future__ import annotations

import csv
import ctypes
import datetime
import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from utils.dist.context import MatmulFlag, check_gpus, choose_device, choose_matmul, describe_gpu
from utils.errors import UserError
from utils.files import require_writable
from utils.flags import flag
from utils.launch.plan import ProcessPlan
from utils.memory import free_host_bytes
from utils.options import EMBEDDING_SIZE

CPU = torch.device("cpu")
MIB = 2**20
PERCENTILES = (20, 50, 80)


@dataclass(frozen=True, kw_only=True)
class StepFlags(MatmulFlag):
    """The flags of the benchmarks that time training steps."""

    classes: int = flag("--classes", required=True, metavar="C", at_least=2, help="classes of all processes")
    batch: int = flag("--batch", required=True, metavar="N", at_least=1, help="images per step of all processes")
    world_size: int = flag("--processes", "--world-size", default=1, metavar="W", at_least=1, help="processes")
    device: str = flag("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: GPUs if there are any")
    csv: str | None = flag("--csv", metavar="FILE", help="append a row per implementation to this file")

    def plan(self) -> ProcessPlan:
        """The processes, all on this machine. Raises UserError if they cannot have a GPU each, or divide the batch."""
        if self.batch % self.world_size:
            raise UserError(f"--batch {self.batch}: must divide by --processes {self.world_size}")
        device = choose_device(self.device).type
        if device == "cuda":
            if self.world_size > (gpus := torch.cuda.device_count()):
                raise UserError(f"--processes {self.world_size}: only {gpus} GPUs are visible; give at most {gpus}")
            check_gpus(range(self.world_size))
        return ProcessPlan("spawn" if self.world_size > 1 else "single", nodes=1, node_rank=0,
                           processes_per_node=self.world_size, device_type=device, gpu=None,
                           backend="nccl" if device == "cuda" else "gloo", host="127.0.0.1", port=0,
                           matmul=choose_matmul(self.matmul, device))

    @property
    def logits_bytes(self) -> int:
        """A process's part of a step that holds all logits: about ten float32 (N, C / W) and four (C / W, d)."""
        return 4 * -(-self.classes // self.world_size) * (10 * self.batch + 4 * EMBEDDING_SIZE)


def alternate(works: Mapping[Any, Callable[[], Any]], turns: int) -> dict[Any, list[Any]]:
    """What each function returned in `turns` calls. They take turns, so that a change of the machine hits all alike."""
    results: dict[Any, list[Any]] = {name: [] for name in works}
    for _ in range(turns):
        for name, work in works.items():
            results[name].append(work())
    return results


def timed(work: Callable[[], object], device: torch.device = CPU) -> float:
    """Collective in a process group: all ranks start together. The seconds `work` takes on the slowest rank."""
    if dist.is_initialized():
        dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return of_worst_rank(time.perf_counter() - start, device)


def of_worst_rank(value: float, device: torch.device) -> float:
    """Collective in a process group. The largest value of all ranks."""
    largest = torch.tensor(value, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


def spread(values: Sequence[float] | np.ndarray, unit: str = "") -> dict[str, float]:
    """The percentiles under their columns' names: {"p20_s": 0.1, "p50_s": 0.2, "p80_s": 0.3} for the unit "_s"."""
    return {f"p{p}{unit}": float(value) for p, value in zip(PERCENTILES, np.percentile(values, PERCENTILES))}


def fits_in_memory(name: str, work: Callable[[], object], device: torch.device, cpu_bytes: int = 0) -> bool:
    """Collective. Run `work`. If a GPU runs out of memory (all do, at the same place), say so and return False.

    cpu_bytes: what `work` will allocate in each process. A CPU without it does not run `work`: Linux would kill it.
    """
    lacks = device.type == "cpu" and cpu_bytes * dist.get_world_size() > free_host_bytes()
    if not (lacks := of_worst_rank(lacks, device) > 0):
        try:
            work()
        except torch.OutOfMemoryError:
            lacks = True  # release only after the exception is gone: its frames hold tensors
        lacks = of_worst_rank(lacks, device) > 0
    if lacks:
        release_memory(device)
        if dist.get_rank() == 0:
            print(f"{name}: out of memory", flush=True)
    return not lacks


def release_memory(device: torch.device) -> None:
    """Collect Python's cycles and return the blocks that the allocators keep."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        ctypes.CDLL(None).malloc_trim(0)


def restart_peak(device: torch.device) -> float:
    """Start to measure the peak memory of this process, and return the MiB that it holds now.

    On a GPU: what PyTorch has allocated, without its cache. On a CPU: the resident set, whose peak Linux resets when 5
    is written to /proc/self/clear_refs (proc(5)). Memory that malloc keeps is returned: its reuse would not show.
    """
    release_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / MIB
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    return process_mib("VmRSS", file="status")


def peak_mib(device: torch.device, held: float = 0.0) -> float:
    """Collective in a process group. The largest peak of all ranks beyond the MiB that each had `held`."""
    peak = (torch.cuda.max_memory_allocated(device) / MIB if device.type == "cuda"
            else process_mib("VmHWM", file="status"))
    return of_worst_rank(peak - held, device)


def process_mib(field: str, file: str = "smaps_rollup") -> float:
    """The sum of the lines of /proc/self/<file> that begin with `field`, such as Rss or Private_ (proc(5))."""
    with open(f"/proc/self/{file}", encoding="utf-8") as lines:
        return sum(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def check_csv(path: str | None, columns: Sequence[str]) -> None:
    """Raise UserError unless rows with these columns can be appended to the file of --csv. None: there is none."""
    if path is None:
        return
    require_writable("--csv", path, force=True)  # rows are appended
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            if next(csv.reader(file), list(columns)) != list(columns):
                raise UserError(f"--csv {path}: has other columns than this benchmark writes; give another file")


def describe_machine(device: torch.device = CPU) -> dict[str, object]:
    """Date, device, PyTorch version and threads of this measurement."""
    if device.type == "cuda":
        name = describe_gpu(device)
    else:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "CPU")
        name = f"{model}, {len(os.sched_getaffinity(0))} cores"
    return {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "device": name,
            "torch": torch.__version__, "threads": torch.get_num_threads()}


def report(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], table: str, path: str | None) -> None:
    """Print the rows, and append them to the file that check_csv has checked.

    table: the first column of the printed table. Those before it are the same in all rows and stand above the table.
    """
    first = columns.index(table)
    if rows:
        print(", ".join(f"{name} {_text(rows[0].get(name))}" for name in columns[:first]) + "\n")
    names = [name for name in columns[first:] if any(row.get(name) is not None for row in rows)]
    cells = [names, *([_text(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip(), flush=True)
    if path is not None:
        with open(path, "a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerows(rows)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if type(value) is int else "-" if value is None else str(value)
