"""Memory of the host: how much is free, and what the C allocator does with what PyTorch frees."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3

# Tensors of up to this size are kept. Keeping larger ones would save clearing them, 0.2 s per GiB, but malloc rarely
# fits an aligned block into the place that it had before: with 500,000 classes in one process (a gradient of 1 GB) the
# peak rose by 14 %. With this limit it does not rise.
_KEPT_BYTES = 128 * 2**20


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next allocation in this process. Without glibc this does nothing.

    malloc, from which PyTorch takes CPU tensors, returns large freed blocks to the system. Each training step then gets
    its activations as fresh pages, which the kernel clears one by one. In small networks this takes half of the time.
    Call it once, before the first tensors, in processes that compute on a CPU.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    mallopt(_M_TRIM_THRESHOLD, -1)  # never
    mallopt(_M_TOP_PAD, 64 * 2**20)
    if not mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES):  # before glibc 2.35 or so
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)


def free_host_bytes() -> int:
    """Bytes that this machine, or the container of this process, can still allocate without swapping."""
    free = int(re.findall(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.M)[0]) * 1024
    try:
        limit, used, statistics = (Path("/sys/fs/cgroup", name).read_text()
                                   for name in ("memory.max", "memory.current", "memory.stat"))
    except OSError:  # no cgroup limit
        return free
    reclaimable = int(re.findall(r"^inactive_file (\d+)", statistics, re.M)[0])
    return free if limit == "max\n" else min(free, int(limit) - int(used) + reclaimable)
