from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from pool import Pool  # noqa: E402


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[[int], Pool]]:
    """`pools(W)`: the pool of W gloo processes, started when a test first asks for it."""
    started: dict[int, Pool] = {}
    yield lambda world_size: started.setdefault(world_size, Pool(world_size))
    for pool in started.values():
        pool.close()
