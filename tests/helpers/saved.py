"""Reading a checkpoint as a whole, in one process: to compare runs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from torch import Tensor

from utils.checkpoint.shards import load_shards, read_metadata


def saved_training(output: Path) -> dict[str, Tensor]:
    """{name: tensor} of all that the checkpoint in `output` has: weights, momentum, class centers and their momentum."""
    state = torch.load(output / "checkpoint.pth.tar", weights_only=True)
    directory = (output / "checkpoint.pth.tar").resolve().parent
    files = set(json.loads((directory / "manifest.json").read_text())["files"])
    dtype = state["state_dict"]["fc.weight"].dtype
    names = {"centers", "momentum"} if state["shards"]["has_momentum"] else {"centers"}
    tensors = {name: torch.full((state["num_classes"], state["embedding_size"]), float("nan"), dtype=dtype) for name in names}
    shape = tuple(tensors["centers"].shape)
    metadata = read_metadata(str(directory / "shards"), shape, names, files)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no process group: one process reads all
        assert load_shards(str(directory / "shards"), tensors, metadata, start=0, group=None) is None
    tensors.update({f"weight {name}": tensor for name, tensor in state["state_dict"].items()})
    tensors.update({f"momentum {name}": tensor for name, tensor in state["momentum"].items()})
    return tensors


def assert_same_training(mine: Path, expected: Path, tolerance: float = 0.0) -> None:
    """Both checkpoints hold the same: to the bit, or ||difference|| <= tolerance * ||expected|| of every tensor."""
    mine, expected = saved_training(mine), saved_training(expected)
    assert mine.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.double().isfinite().all(), name
        if tolerance == 0:
            assert torch.equal(mine[name], tensor), name
        else:
            difference = (mine[name].double() - tensor.double()).norm()
            assert difference <= tolerance * tensor.double().norm(), f"{name}: {difference:.3g} of {tensor.double().norm():.3g}"
