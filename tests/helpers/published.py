"""The published IResNet, written a second time: its entries, and its embedding by plain functions of them."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
    "iresnet200": (6, 26, 60, 6),
}


def bn_entries(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    vectors = {f"{name}.{key}": (channels,) for key in ("weight", "bias", "running_mean", "running_var")}
    return vectors | {f"{name}.num_batches_tracked": ()}


def iresnet_entries(blocks: tuple[int, ...], features: int = 512) -> dict[str, tuple[int, ...]]:
    """name -> shape, in the order of a published state dict."""
    entries = {"conv1.weight": (64, 3, 3, 3), **bn_entries("bn1", 64), "prelu.weight": (64,)}
    c_in = 64
    for layer, (c, count) in enumerate(zip((64, 128, 256, 512), blocks), start=1):
        for block in range(count):
            p = f"layer{layer}.{block}"
            entries |= bn_entries(f"{p}.bn1", c_in)
            entries[f"{p}.conv1.weight"] = (c, c_in, 3, 3)
            entries |= bn_entries(f"{p}.bn2", c)
            entries[f"{p}.prelu.weight"] = (c,)
            entries[f"{p}.conv2.weight"] = (c, c, 3, 3)
            entries |= bn_entries(f"{p}.bn3", c)
            if block == 0:
                entries[f"{p}.downsample.0.weight"] = (c, c_in, 1, 1)
                entries |= bn_entries(f"{p}.downsample.1", c)
            c_in = c
    entries |= bn_entries("bn2", 512)
    entries |= {"fc.weight": (features, 512 * 7 * 7), "fc.bias": (features,)}
    return entries | bn_entries("features", features)


def random_weights(entries: dict[str, tuple[int, ...]], seed: int = 0) -> OrderedDict[str, Tensor]:
    """Values under which every entry matters to the embedding, and activations neither vanish nor explode."""
    generator = torch.Generator().manual_seed(seed)
    weights = OrderedDict()
    for name, shape in entries.items():
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(7)
        elif len(shape) > 1:
            weights[name] = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        elif name.endswith(("running_mean", "bias")):
            weights[name] = 0.2 * torch.randn(shape, generator=generator)
        else:
            weights[name] = 0.5 + torch.rand(shape, generator=generator)
    return weights


def plain_iresnet(w: dict[str, Tensor], images: Tensor) -> Tensor:
    def bn(x: Tensor, name: str) -> Tensor:
        statistics = w[f"{name}.running_mean"], w[f"{name}.running_var"]
        return F.batch_norm(x, *statistics, w[f"{name}.weight"], w[f"{name}.bias"], training=False, eps=1e-5)

    x = F.conv2d(images, w["conv1.weight"], padding=1)
    x = F.prelu(bn(x, "bn1"), w["prelu.weight"])
    for layer in (1, 2, 3, 4):
        block = 0
        while f"layer{layer}.{block}.conv1.weight" in w:
            p = f"layer{layer}.{block}"
            stride = 2 if block == 0 else 1
            out = F.conv2d(bn(x, f"{p}.bn1"), w[f"{p}.conv1.weight"], padding=1)
            out = F.prelu(bn(out, f"{p}.bn2"), w[f"{p}.prelu.weight"])
            out = bn(F.conv2d(out, w[f"{p}.conv2.weight"], stride=stride, padding=1), f"{p}.bn3")
            if block == 0:
                x = bn(F.conv2d(x, w[f"{p}.downsample.0.weight"], stride=2), f"{p}.downsample.1")
            x = x + out
            block += 1
    x = bn(x, "bn2").reshape(len(images), -1)
    return bn(x @ w["fc.weight"].T + w["fc.bias"], "features")


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def images(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand((count, 3, 112, 112), generator=torch.Generator().manual_seed(5), dtype=dtype) * 2 - 1


def relative_error(value: Tensor, truth: Tensor) -> float:
    return ((value - truth).norm() / truth.norm()).item()
