"""Memory of the host: how much there is, what the C allocator keeps, and one line where there is too little."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import re
from collections.abc import Iterator
from pathlib import Path

from utils.errors import UserError

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
    """Bytes that this machine, or the container or job of this process, can still allocate without swapping."""
    return min([_meminfo("MemAvailable"), *(limit - used for limit, used in _cgroup_limits())])


def host_bytes() -> int:
    """Bytes that this machine, swap included, or the container or job of this process can ever allocate."""
    return min([_meminfo("MemTotal") + _meminfo("SwapTotal"), *(limit for limit, _ in _cgroup_limits())])


def _meminfo(name: str) -> int:
    return int(re.findall(rf"^{name}: +(\d+) kB", Path("/proc/meminfo").read_text(), re.M)[0]) * 1024


def _cgroup_limits() -> Iterator[tuple[int, int]]:
    """(limit, bytes in use that cannot be reclaimed) of this process's control groups, versions 1 and 2."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, names, inactive = ((Path("/sys/fs/cgroup/memory"), ("limit_in_bytes", "usage_in_bytes"),
                                  "total_inactive_file") if controllers else
                                 (Path("/sys/fs/cgroup"), ("max", "current"), "inactive_file"))
        own = root / path.lstrip("/")
        for directory in (own, *own.parents):  # a limit of any ancestor holds; some are not visible in a container
            if directory.is_relative_to(root):
                with contextlib.suppress(OSError, LookupError, ValueError):  # no limit, or "max"
                    limit, used = (int((directory / f"memory.{name}").read_text()) for name in names)
                    statistics = (directory / "memory.stat").read_text()
                    yield limit, used - int(re.findall(rf"^{inactive} (\d+)", statistics, re.M)[0])


@contextlib.contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Turn the errors of all allocators into a UserError of one line that ends with `advice`."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        # torch.OutOfMemoryError is a RuntimeError; the CPU's allocator, cuDNN and NCCL raise plain ones.
        text = str(error).strip().splitlines()[:1] or [type(error).__name__]
        if isinstance(error, UserError) or not (
                isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
                or re.search("out of memory|allocate memory|not enough memory|bad_alloc", str(error), re.I)):
            raise
        raise UserError(f"out of memory ({text[0][:300]}); {advice}") from error
