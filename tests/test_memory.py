"""What the process asks of the C allocator."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from utils.memory import free_host_bytes, keep_freed_memory

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
