"""What the benchmarks share: processes, clock, peak memory, percentiles, and the rows they leave in a file."""

from __future__ import annotations

import csv
import ctypes
import datetime
import gc
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from utils.errors import UserError
from utils.launch.plan import ProcessPlan
from utils.launch.spawn import launch

MIB = 2**20
PERCENTILES = (20, 50, 80)


# ---------------------------------------------------------------------------------------------------------------------
# Before the processes start


def choose_device_type(name: str, world_size: int) -> str:
    """"cuda" or "cpu" for --device auto|cuda|cpu. Raises UserError where there are not as many GPUs as processes."""
    if name == "cpu" or name == "auto" and not torch.cuda.is_available():
        return "cpu"
    gpus = torch.cuda.device_count()
    if world_size > gpus:
        raise UserError(f"--world-size {world_size}: every process needs a GPU, and PyTorch sees {gpus}; give "
                        + (f"at most {gpus}, or " if gpus else "") + "--device cpu")
    return "cuda"


def choose_implementations(text: str, known: Sequence[str]) -> tuple[str, ...]:
    """--impl A,B -> ("A", "B"). Raises UserError."""
    names = tuple(text.split(","))
    for name in names:
        if name not in known:
            raise UserError(f"--impl {text}: there is no {name!r}; give one or more of {','.join(known)}")
    if len(set(names)) < len(names):
        raise UserError(f"--impl {text}: names an implementation twice")
    return names


def check_csv(path: str, columns: Sequence[str]) -> None:
    """Make the directory of --csv and see that rows of these columns can be appended. Raises UserError."""
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
    """Run `work(context, *args)` in `world_size` processes of this machine (one: in this process), in one group.

    On the CPU they share the cores out, unless OMP_NUM_THREADS says how many threads each is to have.
    """
    plan = dict(nodes=1, node_rank=0, processes_per_node=world_size, device_type=device_type, gpu=None,
                backend="nccl" if device_type == "cuda" else "gloo", host="127.0.0.1", port=0)
    launch(work, ProcessPlan(launcher="single" if world_size == 1 else "spawn", **plan), *args)


# ---------------------------------------------------------------------------------------------------------------------
# In every process


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Collective. The seconds that `work` takes in this process, when all processes begin together."""
    dist.barrier()
    _synchronize(device)
    start = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - start


def of_slowest_rank(values: Sequence[float], device: torch.device) -> list[float]:
    """Collective. Element by element the largest of all ranks'."""
    largest = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.tolist()


def percentiles(values: Sequence[float]) -> list[float]:
    """The 20th, 50th and 80th percentile."""
    levels = torch.tensor(PERCENTILES, dtype=torch.float64) / 100
    return torch.tensor(values, dtype=torch.float64).quantile(levels).tolist()


def fits_in_memory(work: Callable[[], object], device: torch.device) -> bool:
    """Collective. Run `work`; False, and its memory is free again, where a GPU has not enough for it.

    All ranks allocate the same (shards differ by less than W classes), so that all of them run out at the same place
    and none waits in a collective for the others.
    """
    fits = True
    try:
        work()
    except torch.OutOfMemoryError:
        fits = False  # what is freed must wait until the exception, and with it the frames that hold tensors, is gone
    if of_slowest_rank([float(not fits)], device)[0]:
        release_memory(device)
        return False
    return True


def release_memory(device: torch.device) -> None:
    """Give back what was freed: Python's cycles, and the blocks that the allocators keep for the next request."""
    gc.collect()
    if device.type == "cuda":
        _synchronize(device)
        torch.cuda.empty_cache()
    else:
        ctypes.CDLL(None).malloc_trim(0)


def available_bytes(device: torch.device, world_size: int) -> int:
    """What one of `world_size` processes can still allocate: the GPU's free memory, or its share of MemAvailable."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _proc_kib("/proc/meminfo", "MemAvailable") * 1024 // world_size


class PeakMemory:
    """The most memory that this process holds above what it held when this object was made.

    On a GPU that is what PyTorch has allocated, not what its cache keeps. On the CPU it is the resident set, whose high
    water mark Linux forgets when 5 is written to /proc/self/clear_refs (proc(5)); freed memory that malloc had kept
    is given back first, or its reuse would not be seen.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart()
        self._baseline = (torch.cuda.memory_allocated(device) if device.type == "cuda"
                          else _proc_kib("/proc/self/status", "VmRSS") * 1024)

    def restart(self) -> None:
        """Forget the peak so far, but not what the process held at the beginning."""
        release_memory(self._device)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._works = _reset_high_water_mark()

    def bytes(self) -> int | None:
        """None where this system does not tell."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._baseline
        return _proc_kib("/proc/self/status", "VmHWM") * 1024 - self._baseline if self._works else None


def _reset_high_water_mark() -> bool:
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _proc_kib(path: str, name: str) -> int:
    with open(path, encoding="utf-8") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(f"{name}:"))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------------------------------------------------------------
# What is reported


def describe_machine(device: torch.device) -> dict[str, object]:
    """When, on what, and with which PyTorch this process measures."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        name = f"{models[0] if models else 'CPU'}, {len(os.sched_getaffinity(0))} cores"
    return {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "device": name,
            "torch": torch.__version__, "threads": torch.get_num_threads()}


def append_csv(path: str, columns: Sequence[str], rows: Sequence[dict[str, object]]) -> None:
    """Append `rows` to the file that check_csv has seen; a new one gets a header. None becomes an empty field."""
    with open(path, "a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    )
