"""The autocast dtype of a run whose GPUs differ."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from helpers.tiny import TinyBackbone

from utils import build
from utils.dist.context import DistContext
from utils.errors import UserError
from utils.options import parse_options
from utils.training import scaler


def build_on_different_gpus(rank: int, world_size: int, dtypes: list[str], flags: list[str]) -> tuple[str, bool, str]:
    """The autocast dtype of the model, whether the loss is scaled, and the error, if rank r's GPU prefers dtypes[r]."""
    options = parse_options(["unused", "--num-classes", "5", "-a", "mobilefacenet", "--enable-amp-mode",
                             "--enable-model-parallel", *flags])
    context = DistContext(rank, world_size, world_size, torch.device("cpu"))
    with (mock.patch.object(build, "build_backbone", lambda arch, embedding_size: TinyBackbone(batch_norm=True)),
          mock.patch.object(scaler, "amp_dtype", lambda choice, device: getattr(torch, dtypes[rank]))):
        try:
            state, model = build.build_training(context, options, 1, 48, 12)
        except UserError as error:
            return "", False, str(error)
    return str(model.module.autocast_dtype), state.scaler.is_enabled(), ""


@pytest.mark.parametrize(("dtypes", "shared"), [
    (["bfloat16", "bfloat16"], "bfloat16"), (["bfloat16", "float16"], "float16"), (["float16", "bfloat16"], "float16"),
    (["float16", "float16"], "float16"),
])
def test_all_ranks_use_one_dtype(pools, dtypes, shared):
    """Else fp16's scaler would wait, on some ranks alone, in a collective that the others never join."""
    found = pools(2).run(build_on_different_gpus, dtypes, [])
    assert found == [(f"torch.{shared}", shared == "float16", "")] * 2
    for *_, error in pools(2).run(build_on_different_gpus, dtypes, ["--fuse-classifier-update"]):
        assert ("--fuse-classifier-update with fp16" in error) == (shared == "float16")


def say_which(rank: int, world_size: int, dtypes: list[str]) -> None:
    context = DistContext(rank, world_size, world_size, torch.device("cpu"))
    with (mock.patch.object(scaler, "amp_dtype", lambda choice, device: getattr(torch, dtypes[rank])),
          mock.patch("builtins.print") as printed):
        scaler.shared_amp_dtype("auto", context)
    assert printed.called == (rank == 0 and len(set(dtypes)) > 1)


def test_rank_0_says_that_a_gpu_lacks_bf16(pools):
    for dtypes in (["bfloat16", "float16"], ["float16", "float16"]):
        pools(2).run(say_which, dtypes)
