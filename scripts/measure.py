"""What the benchmarks share: processes, clock, peak memory, percentiles, tables and CSV files."""

from __future__ import annotations

import csv
import ctypes
import datetime
import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from utils.dist.context import DistContext
from utils.errors import UserError
from utils.launch.plan import ProcessPlan
from utils.launch.spawn import launch
from utils.memory import free_host_bytes, keep_freed_memory

MIB = 2**20
PERCENTILES = (20, 50, 80)


def choose_device_type(name: str, world_size: int) -> str:
    """"cuda" or "cpu" for --device auto|cuda|cpu. Raises UserError if there are fewer GPUs than processes."""
    if name == "cpu" or name == "auto" and not torch.cuda.is_available():
        return "cpu"
    gpus = torch.cuda.device_count()
    if world_size > gpus:
        raise UserError(f"--world-size {world_size}: each process needs a GPU, and PyTorch sees {gpus}; give "
                        + (f"at most {gpus}, or " if gpus else "") + "--device cpu")
    return "cuda"


def choose_implementations(text: str, known: Sequence[str]) -> tuple[str, ...]:
    """--impl A,B -> ("A", "B"). Raises UserError."""
    names = tuple(text.split(","))
    for name in names:
        if name not in known:
            raise UserError(f"--impl {text}: there is no {name!r}; choose from {','.join(known)}")
    if len(set(names)) < len(names):
        raise UserError(f"--impl {text}: names an implementation twice")
    return names


def check_csv(path: str, columns: Sequence[str]) -> None:
    """Create the directory of --csv, and raise UserError unless rows with these columns can be appended to the file."""
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(path, "a+", encoding="utf-8", newline="") as file:
            file.seek(0)
            header = next(csv.reader(file), None)
    except OSError as error:
        raise UserError(f"--csv {path}: cannot be written ({error.strerror})") from None
    if header is not None and header != list(columns):
        raise UserError(f"--csv {path}: has other columns than this benchmark writes; give another file")


def launch_local(work: Callable[..., None], world_size: int, device_type: str, *args: Any) -> None:
    """Run `work(context, *args)` in `world_size` processes of this machine; a single one is this process.

    Processes on the CPU divide the cores among them, unless OMP_NUM_THREADS sets the threads of each. All keep freed
    memory, as main.py does on a CPU, so that all implementations are measured under the same allocator.
    """
    plan = ProcessPlan(
        launcher="single" if world_size == 1 else "spawn", nodes=1, node_rank=0, processes_per_node=world_size,
        device_type=device_type, gpu=None, backend="nccl" if device_type == "cuda" else "gloo",
        host="127.0.0.1", port=0,
    )
    launch(_keep_memory_and, plan, work, *args)


def _keep_memory_and(context: DistContext, work: Callable[..., None], *args: Any) -> None:
    keep_freed_memory()
    work(context, *args)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Collective. The seconds `work` takes in this process; all processes start together."""
    dist.barrier()
    _synchronize(device)
    start = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - start


def of_slowest_rank(values: Sequence[float], device: torch.device) -> list[float]:
    """Collective. The maximum over the ranks of each element."""
    largest = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.tolist()


def percentiles(values: Sequence[float]) -> list[float]:
    """The 20th, 50th and 80th percentile."""
    return np.percentile(values, PERCENTILES).tolist()


def fits_in_memory(work: Callable[[], object], device: torch.device) -> bool:
    """Collective. Run `work`. Returns False, with its memory freed, if any rank's GPU runs out of memory.

    All ranks allocate nearly the same (shards differ by less than W classes), so all run out at the same place and none
    waits for the others in a collective.
    """
    fits = True
    try:
        work()
    except torch.OutOfMemoryError:
        fits = False  # release only after the exception is gone: its frames hold tensors
    if of_slowest_rank([float(not fits)], device)[0]:
        release_memory(device)
        return False
    return True


def release_memory(device: torch.device) -> None:
    """Collect Python's cycles and return the blocks that the allocators keep."""
    gc.collect()
    if device.type == "cuda":
        _synchronize(device)
        torch.cuda.empty_cache()
    else:
        ctypes.CDLL(None).malloc_trim(0)


def available_bytes(device: torch.device, world_size: int) -> int:
    """What one of `world_size` processes can still allocate: its GPU's free memory, or its share of the host's."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_bytes() // world_size


class PeakMemory:
    """The peak memory of this process above what it held when this object was created.

    On a GPU: what PyTorch has allocated, without its cache. On a CPU: the resident set, whose peak Linux resets when 5
    is written to /proc/self/clear_refs (proc(5)). Memory that malloc keeps is returned first, because its reuse would
    not show.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart()
        self._baseline = (torch.cuda.memory_allocated(device) if device.type == "cuda"
                          else _status_kib("VmRSS") * 1024)

    def restart(self) -> None:
        """Reset the peak, but not the baseline."""
        release_memory(self._device)
        self._works = True
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        try:
            with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
                file.write("5")
        except OSError:
            self._works = False

    def bytes(self) -> int | None:
        """None if this system does not allow the measurement."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._baseline
        return _status_kib("VmHWM") * 1024 - self._baseline if self._works else None


def _status_kib(name: str) -> int:
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(f"{name}:"))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_machine(device: torch.device) -> dict[str, object]:
    """Date, device, PyTorch version and threads of this measurement."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "CPU")
        name = f"{model}, {len(os.sched_getaffinity(0))} cores"
    return {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "device": name,
            "torch": torch.__version__, "threads": torch.get_num_threads()}


def append_csv(path: str, columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Append the `columns` of `rows` to the file that check_csv has checked. None becomes an empty field."""
    with open(path, "a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table with the first column aligned left and the others right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    )
