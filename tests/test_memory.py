"""The machine's memory: how much there is, what the C allocator keeps, and what an allocation that fails says."""

from __future__ import annotations

import mmap
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils import memory
from utils.errors import UserError
from utils.memory import explain_out_of_memory, free_host_bytes, keep_freed_memory

PAGE_FAULTS = """
import resource, torch
from utils.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for step in range(8):
        tensors = [torch.ones(2**22) for layer in range(8)]  # 128 MiB, as the activations of a network
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

fresh = faults()
keep_freed_memory()
faults()
print(fresh, faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_freed_memory_is_reused():
    result = subprocess.run([sys.executable, "-c", PAGE_FAULTS], capture_output=True, text=True, check=True)
    fresh, kept = map(int, result.stdout.split())
    assert kept < fresh / 4


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    keep_freed_memory()


def test_free_memory_is_a_plausible_number():
    assert 2**20 < free_host_bytes() < 2**50


def test_control_groups_limit_the_memory(tmp_path, monkeypatch):
    """A limit counts in the process's own group and in those above it, in both versions of control groups."""
    (tmp_path / "proc").write_text("9:memory:/job/step\n3:cpuset:/\n0::/job/step\n")
    for group, values in (
        ("memory/job", {"limit_in_bytes": 5000, "usage_in_bytes": 3000, "stat": "total_inactive_file 500\n"}),
        ("job/step", {"max": 4000, "current": 100, "stat": "anon 1\ninactive_file 50\n"}),
        ("job", {"max": "max", "current": 100, "stat": "inactive_file 50\n"}),
    ):
        (tmp_path / "groups" / group).mkdir(parents=True, exist_ok=True)
        for name, value in values.items():
            (tmp_path / "groups" / group / f"memory.{name}").write_text(str(value))
    moved = {"/proc/self/cgroup": "proc", "/sys/fs/cgroup": "groups", "/sys/fs/cgroup/memory": "groups/memory"}
    monkeypatch.setattr(memory, "Path", lambda path: tmp_path / moved[path] if path in moved else Path(path))
    assert memory.host_bytes() == 4000 and memory.free_host_bytes() == 2500


@pytest.mark.parametrize("allocate", [
    lambda: torch.empty(2**55), lambda: bytearray(2**62), lambda: mmap.mmap(-1, 2**60),
    lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
], ids=["torch", "python", "mmap", "cuda"])
def test_an_allocation_that_fails_is_one_line(allocate):
    with pytest.raises(UserError, match="^out of memory .*; buy more$"), explain_out_of_memory("buy more"):
        list(allocate())
    with pytest.raises(RuntimeError, match="^other$"), explain_out_of_memory("buy more"):
        raise RuntimeError("other")
