"""From a uint8 batch to the backbone's input, on the device, as batched operations; randomness from a counter.

Shapes: n images of 3 x 112 x 112. What is drawn for an image depends on (seed, epoch, sample index) only, so it is the
same on every device, at every world size and with any number of loader workers.
"""

from __future__ import annotations

import numpy as np
import torch

AUGMENTS = ("none", "flip", "standard")
MAX_SHIFT = 6  # pixels, of 112

# One stream of numbers for each thing that is drawn.
STREAM_FLIP = 0
STREAM_SHIFT_Y = 1
STREAM_SHIFT_X = 2

_UINT64 = 2**64 - 1


def random_uniform(seed: int, epoch: int, indices: torch.Tensor, stream: int) -> torch.Tensor:
    """u[i] = 2^-53 * (h(h(h(h(seed) ^ epoch) ^ stream) ^ indices[i]) >> 11), h = splitmix64: uniform in [0, 1).

    indices: int64 (n,) on the CPU. Returns float64 (n,) on the CPU. h(z) adds 0x9E3779B97F4A7C15 and applies the
    finalizer of Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014), as published
    with splitmix64: a bijection, so two indices of a stream never share their 64 bits.
    """
    key = np.array([seed & _UINT64], dtype=np.uint64)
    for word in (epoch, stream):
        key = _splitmix64(key) ^ np.uint64(word)
    bits = _splitmix64(_splitmix64(key) ^ indices.numpy().astype(np.uint64))
    return torch.from_numpy((bits >> np.uint64(11)) * 2.0**-53)


def _splitmix64(z: np.ndarray) -> np.ndarray:
    """Arrays only: numpy wraps uint64 arrays in silence and warns for scalars."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def prepare_batch(
    images: torch.Tensor,
    dtype: torch.dtype,
    *,
    augment: str = "none",
    seed: int = 0,
    epoch: int = 0,
    indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """(augmented(u) / 255 - 0.5) / 0.5: uint8 (n, 3, 112, 112) -> `dtype`, same shape and device, in [-1, 1].

    augment:
      "none"      nothing (evaluation)
      "flip"      mirrored left to right with probability 1/2
      "standard"  flip, then moved by (dy, dx), each uniform in -6..6 pixels, the border pixels repeated:
                  out[y, x] = image[clamp(y - dy), clamp(x - dx)]
    indices: int64 (n,) on the CPU, the samples' numbers in the data set: with seed and epoch they decide what is drawn.
    """
    if augment not in AUGMENTS:
        raise ValueError(f"augment is {augment!r}, not one of {', '.join(AUGMENTS)}")
    if augment != "none":
        assert indices is not None and len(indices) == len(images), "augmentation is drawn by sample index"
        images = _augment(images, augment, seed, epoch, indices)
    return images.to(dtype).div_(255).sub_(0.5).div_(0.5)


def _augment(images: torch.Tensor, augment: str, seed: int, epoch: int, indices: torch.Tensor) -> torch.Tensor:
    flip = random_uniform(seed, epoch, indices, STREAM_FLIP) < 0.5
    shift_y = shift_x = torch.zeros(len(indices), dtype=torch.int64)
    if augment == "standard":
        shift_y = _draw_shift(seed, epoch, indices, STREAM_SHIFT_Y)
        shift_x = _draw_shift(seed, epoch, indices, STREAM_SHIFT_X)
    # One small copy to the device for the whole batch.
    drawn = torch.stack([flip.long(), shift_y, shift_x]).to(images.device, non_blocking=True)
    return _flip_and_shift(images, *drawn)


def _draw_shift(seed: int, epoch: int, indices: torch.Tensor, stream: int) -> torch.Tensor:
    """int64 (n,), uniform in -MAX_SHIFT..MAX_SHIFT."""
    return (random_uniform(seed, epoch, indices, stream) * (2 * MAX_SHIFT + 1)).long() - MAX_SHIFT


def _flip_and_shift(
    images: torch.Tensor, flip: torch.Tensor, shift_y: torch.Tensor, shift_x: torch.Tensor
) -> torch.Tensor:
    """Mirror image i where flip[i] is 1, then move it by (shift_y[i], shift_x[i]) pixels; all three int64 (n,).

    One gather over (n, 112 * 112) source positions: on the CPU a third of the time of torch.where on a flipped copy.
    """
    n, channels, height, width = images.shape
    rows = (torch.arange(height, device=images.device) - shift_y[:, None]).clamp_(0, height - 1)
    columns = (torch.arange(width, device=images.device) - shift_x[:, None]).clamp_(0, width - 1)
    columns = torch.where(flip[:, None] == 1, width - 1 - columns, columns)
    source = (rows[:, :, None] * width + columns[:, None, :]).view(n, 1, height * width).expand(-1, channels, -1)
    return images.flatten(2).gather(2, source).view_as(images)
