from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# The suite is about processes on the CPU, and must not depend on how many GPUs there are. With ARCFACE_TEST_CUDA=1 the
# tests that ask for a GPU see it.
if os.environ.get("ARCFACE_TEST_CUDA") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from helpers.pool import Pool  # noqa: E402

from scripts.synthesize import write_identity_set, write_pairs  # noqa: E402


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[[int], Pool]]:
    """`pools(W)`: the pool of W gloo processes, started when a test first asks for it."""
    started: dict[int, Pool] = {}
    yield lambda world_size: started.setdefault(world_size, Pool(world_size))
    for pool in started.values():
        pool.close()


@pytest.fixture(scope="session")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic data set: train/ with 8 identities of 6 images, lfw/ with 60 pairs of 10 others."""
    directory = tmp_path_factory.mktemp("faces")
    write_identity_set(directory / "train", range(8), images=6, seed=1)
    write_pairs(directory / "lfw", 60, range(8, 18), images=4, seed=1)
    return directory
