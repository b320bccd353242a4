"""Reading a checkpoint as a whole, in one process: to compare runs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from utils.checkpoint.layout import read_manifest
from utils.checkpoint.shards import open_shards


def saved_training(output: Path) -> dict[str, Tensor]:
    """{name: tensor} of everything in the newest checkpoint.

    Weights, class centers, the optimizers' state, the loss's statistics and the average of the weights.
    """
    state = torch.load(output / "checkpoint.pth.tar", weights_only=True)
    directory = str((output / "checkpoint.pth.tar").resolve().parent)
    shape = (state["num_classes"] * state.get("sub_centers", 1), state["embedding_size"])
    stored = open_shards(directory, state["shards"], shape, read_manifest(directory))
    tensors = {name: torch.cat([rows for _, rows in matrix.blocks()]) for name, matrix in stored.items()}
    tensors.update({f"weight {name}": tensor for name, tensor in state["state_dict"].items()})
    tensors.update({
        f"{key} {name}": tensor for name, values in state["optimizer"].items() for key, tensor in values.items()
    })
    tensors.update({f"loss {name}": tensor for name, tensor in state.get("loss", {}).get("state", {}).items()})
    if "ema" in state:
        tensors.update({f"ema {name}": tensor for name, tensor in state["ema"]["state_dict"].items()})
        tensors["ema updates"] = state["ema"]["updates"]
    return tensors


def assert_same_training(output: Path, expected: Path, tolerance: float = 0.0) -> None:
    """Both checkpoints hold the same: to the bit, or ||difference|| <= tolerance * ||expected|| for every tensor."""
    found, true = saved_training(output), saved_training(expected)
    assert found.keys() == true.keys()
    for name, tensor in true.items():
        assert tensor.double().isfinite().all(), name
        if tolerance == 0:
            assert torch.equal(found[name], tensor), name
        else:
            difference, norm = (found[name].double() - tensor.double()).norm(), tensor.double().norm()
            assert difference <= tolerance * norm, f"{name}: {difference:.3g} of {norm:.3g}"
