"""Random numbers of a network's layers, the same at any number of processes.

Each image has a key, which depends on (seed, step, index of the image in the data set) only. A layer hashes the keys:
the masks of an image do not depend on the rank that trains it, on its place in the batch, or on the other images.
Everything runs on the device in integer operations, without a host synchronisation.

Shapes: n images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from data.augment import random_bits

# Beyond the streams of data.augment, so that masks and augmentation never share numbers.
_STREAM = 2**32


def image_keys(seed: int, step: int, indices: Tensor) -> Tensor:
    """int64 (n,) on the CPU: the keys of images `indices`, int64 (n,) on the CPU, in a step counted over all epochs."""
    return torch.from_numpy(random_bits(seed, step, indices, _STREAM).view("int64"))


def draw_keys(images: Tensor) -> Tensor:
    """Keys (n,) from torch's generator, for who trains without seed and step."""
    return torch.randint(2**62, images.shape[:1], device=images.device)


def random_integers(keys: Tensor, stream: int, count: int) -> Tensor:
    """int64 (n, count) of 64 random bits each. keys: int64 (n,). stream: another one for each layer."""
    return _splitmix64(_splitmix64(keys ^ stream)[:, None] + torch.arange(count, device=keys.device))


def random_uniform(keys: Tensor, stream: int, count: int) -> Tensor:
    """float32 (n, count), uniform in [0, 1), in multiples of 2^-24. Arguments as for `random_integers`."""
    return (random_integers(keys, stream, count) >> 40 & 0xFFFFFF) * 2.0**-24


def dropout(x: Tensor, keys: Tensor, stream: int, probability: float) -> Tensor:
    """Set each value of x (n, ...) to 0 with this probability, and divide the others by 1 - probability."""
    keep = random_uniform(keys, stream, x[0].numel()).view(x.shape) >= probability
    return torch.where(keep, x / (1 - probability), 0)


def drop_path(x: Tensor, keys: Tensor, stream: int, probability: float) -> Tensor:
    """`dropout` of whole images (stochastic depth; Huang et al. 2016, https://arxiv.org/abs/1603.09382)."""
    if probability == 0:
        return x
    keep = random_uniform(keys, stream, 1).view(-1, *[1] * (x.dim() - 1)) >= probability
    return torch.where(keep, x / (1 - probability), 0)


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant


def _splitmix64(z: Tensor) -> Tensor:
    """data.augment's, of int64: products wrap as those of uint64, and the masks make its shifts logical."""
    z = z + _signed(0x9E3779B97F4A7C15)
    z = (z ^ (z >> 30 & 2**34 - 1)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> 27 & 2**37 - 1)) * _signed(0x94D049BB133111EB)
    return z ^ (z >> 31 & 2**33 - 1)
