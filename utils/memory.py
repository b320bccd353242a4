"""Memory of the host."""

from __future__ import annotations


def free_host_bytes() -> int:
    """What this machine, or the container that this process is in, can still allocate without swapping."""
    with open("/proc/meminfo", encoding="ascii") as file:
        free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            limit = file.read().strip()
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as file:
            used = int(file.read())
        with open("/sys/fs/cgroup/memory.stat", encoding="ascii") as file:
            cached = next(int(line.split()[1]) for line in file if line.startswith("inactive_file "))  # given back when needed
    except (OSError, StopIteration):  # no limit of this kind here
        return free
    return free if limit == "max" else min(free, int(limit) - used + cached)
