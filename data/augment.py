"""Augmentation: a uint8 batch to the backbone's input, on the device, in batched operations.

Shapes: n images of 3 x 112 x 112, of which m are chosen. Random numbers are counted, not streamed: those of an image
depend on (seed, epoch, sample index) only, and so are the same on every device, at every world size and with any number
of loader workers. What is computed from them is bit-identical in any batch: only gathers, sums of integers, and
elementwise operations, whose results do not depend on an element's position in a tensor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

AUGMENTS = ("none", "flip", "standard", "strong")
MAX_SHIFT = 6  # pixels, of 112

# What "strong" does to an image, each with its own probability.
CROP_PROBABILITY = 0.2
CROP_SIDES = (84, 111)  # pixels, both included
LOW_RESOLUTION_PROBABILITY = 0.2
LOW_RESOLUTIONS = (16, 64)
BLUR_PROBABILITY = 0.1
BLUR_SIGMAS = (0.5, 2.0)  # pixels
COLOR_PROBABILITY = 0.2
COLOR_FACTORS = (0.6, 1.4)  # of brightness, contrast and saturation
GRAY_PROBABILITY = 0.05
_BLUR_RADIUS = 4  # two of the largest sigma
_NO_BLUR = [0.0] * (2 * _BLUR_RADIUS + 1)  # of an image that is not blurred; never applied
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in JPEG

# One stream of random numbers for each decision.
(STREAM_FLIP, STREAM_SHIFT_Y, STREAM_SHIFT_X, STREAM_CROP, STREAM_CROP_SIDE, STREAM_CROP_Y, STREAM_CROP_X,
 STREAM_LOW_RESOLUTION, STREAM_RESOLUTION, STREAM_BLUR, STREAM_BLUR_SIGMA, STREAM_COLOR, STREAM_BRIGHTNESS,
 STREAM_CONTRAST, STREAM_SATURATION, STREAM_GRAY) = range(16)

_UINT64 = 2**64 - 1


def random_uniform(seed: int, epoch: int, indices: torch.Tensor, stream: int) -> torch.Tensor:
    """u[i] = 2^-53 * (random_bits[i] >> 11): uniform in [0, 1), float64 (n,) on the CPU. Arguments of `random_bits`."""
    return torch.from_numpy((random_bits(seed, epoch, indices, stream) >> np.uint64(11)) * 2.0**-53)


def random_bits(seed: int, epoch: int, indices: torch.Tensor, stream: int) -> np.ndarray:
    """uint64 (n,): h(h(h(h(seed) ^ epoch) ^ stream) ^ indices[i]), h = splitmix64.

    indices: int64 (n,) on the CPU. h(z) adds 0x9E3779B97F4A7C15 and applies the finalizer of Steele, Lea and Flood,
    "Fast splittable pseudorandom number generators" (OOPSLA 2014), as published with splitmix64: a bijection, so two
    indices of a stream never share their 64 bits.
    """
    key = np.array([seed & _UINT64], dtype=np.uint64)
    for word in (epoch, stream):
        key = _splitmix64(key) ^ np.uint64(word)
    return _splitmix64(_splitmix64(key) ^ indices.numpy().astype(np.uint64))


def _splitmix64(z: np.ndarray) -> np.ndarray:
    """uint64 arrays, whose overflow numpy wraps silently; it warns for scalars."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def prepare_batch(
    images: torch.Tensor, dtype: torch.dtype, *,
    augment: str = "none", seed: int = 0, epoch: int = 0, indices: torch.Tensor | None = None,
    channels_last: bool = False,
) -> torch.Tensor:
    """(augmented(u) / 255 - 0.5) / 0.5: uint8 (n, 3, 112, 112) -> `dtype`, same shape and device, in [-1, 1].

    augment:
      "none"      nothing (evaluation)
      "flip"      mirrored left to right with probability 1/2
      "standard"  flip, then shifted by (dy, dx), each uniform in -6..6 pixels, repeating the border pixels:
                  out[y, x] = image[clamp(y - dy), clamp(x - dx)]
      "strong"    standard, then in this order, each with its probability (the constants above): a random square crop,
                  enlarged; a lower resolution, enlarged; Gaussian blur; brightness, contrast and saturation; gray
    images may have any strides (a loader's batch has its channels last); the result is contiguous, or has its channels
    last with `channels_last`.
    indices: int64 (n,) on the CPU, the samples' numbers in the data set, which with seed and epoch key the random
    numbers.
    """
    if augment not in AUGMENTS:
        raise ValueError(f"augment is {augment!r}, not one of {', '.join(AUGMENTS)}")
    if augment != "none":
        assert indices is not None and len(indices) == len(images), "random numbers are drawn by sample index"
        uniform = functools.partial(random_uniform, seed, epoch, indices)
        images = _flip_and_shift(images, uniform, shifts=augment != "flip")
        if augment == "strong":
            images = _degrade(images.float(), uniform)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return images.to(dtype, memory_format=memory_format).div_(255).sub_(0.5).div_(0.5)


def _integers(uniform: torch.Tensor, low: int, high: int | torch.Tensor) -> torch.Tensor:
    """int64 (n,) in low..high from uniform numbers (n,)."""
    return low + (uniform * (high - low + 1)).long()


def _flip_and_shift(images: torch.Tensor, uniform: Callable[[int], torch.Tensor], shifts: bool) -> torch.Tensor:
    """Mirror every other image, then shift all by as many pixels as are drawn, if `shifts`.

    One gather over (n, 112 * 112) source positions: on the CPU a third of the time of torch.where on a flipped copy.
    """
    flip = uniform(STREAM_FLIP) < 0.5
    shift_y, shift_x = (
        _integers(uniform(stream), -MAX_SHIFT, MAX_SHIFT) if shifts else torch.zeros(len(flip), dtype=torch.int64)
        for stream in (STREAM_SHIFT_Y, STREAM_SHIFT_X)
    )
    # One small copy to the device for the whole batch.
    flip, shift_y, shift_x = torch.stack([flip.long(), shift_y, shift_x]).to(images.device, non_blocking=True)
    n, channels, height, width = images.shape
    rows = (torch.arange(height, device=images.device) - shift_y[:, None]).clamp_(0, height - 1)
    columns = (torch.arange(width, device=images.device) - shift_x[:, None]).clamp_(0, width - 1)
    columns = torch.where(flip[:, None] == 1, width - 1 - columns, columns)
    source = (rows[:, :, None] * width + columns[:, None, :]).view(n, 1, height * width).expand(-1, channels, -1)
    return images.flatten(2).gather(2, source).view_as(images)


# ---------------------------------------------------------------------------------------------------------------------
# "strong": pixels as float32 from 0 to 255


def _degrade(images: torch.Tensor, uniform: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """Crop, low resolution, blur, colours and gray, in place, each in the images for which it is drawn."""

    def between(stream: int, bounds: tuple[float, float]) -> torch.Tensor:
        return bounds[0] + (bounds[1] - bounds[0]) * uniform(stream)

    size = images.shape[2]
    crop = uniform(STREAM_CROP) < CROP_PROBABILITY
    side = torch.where(crop, _integers(uniform(STREAM_CROP_SIDE), *CROP_SIDES), size)
    top, left = (_integers(uniform(stream), 0, size - side) for stream in (STREAM_CROP_Y, STREAM_CROP_X))
    low = uniform(STREAM_LOW_RESOLUTION) < LOW_RESOLUTION_PROBABILITY
    resolution = torch.where(low, _integers(uniform(STREAM_RESOLUTION), *LOW_RESOLUTIONS), side)
    _change(images, crop | low, _resample, torch.stack([top, left, side, resolution]))

    blur = uniform(STREAM_BLUR) < BLUR_PROBABILITY
    sigmas = between(STREAM_BLUR_SIGMA, BLUR_SIGMAS).tolist()
    kernels = [_gaussian(sigma) if blurred else _NO_BLUR for sigma, blurred in zip(sigmas, blur.tolist())]
    _change(images, blur, _blur, torch.tensor(kernels).T)

    jitter, gray = uniform(STREAM_COLOR) < COLOR_PROBABILITY, uniform(STREAM_GRAY) < GRAY_PROBABILITY
    brightness, contrast, saturation = (
        torch.where(jitter, between(stream, COLOR_FACTORS), 1.0)
        for stream in (STREAM_BRIGHTNESS, STREAM_CONTRAST, STREAM_SATURATION)
    )
    factors = torch.stack([brightness, contrast, torch.where(gray, 0.0, saturation)]).float()
    _change(images, jitter | gray, _change_colors, factors)
    return images


def _change(
    images: torch.Tensor, which: torch.Tensor, change: Callable[..., torch.Tensor], drawn: torch.Tensor
) -> None:
    """images[which] = change(images[which], *drawn[:, which]); which bool (n,) and drawn (k, n) are on the CPU."""
    chosen = which.nonzero().flatten()
    if len(chosen):
        drawn, rows = (tensor.to(images.device, non_blocking=True) for tensor in (drawn[:, chosen], chosen))
        images.index_copy_(0, rows, change(images[rows], *drawn))


def _resample(
    images: torch.Tensor, top: torch.Tensor, left: torch.Tensor, side: torch.Tensor, resolution: torch.Tensor
) -> torch.Tensor:
    """The window of side x side pixels at (top, left), averaged to resolution x resolution, enlarged to the full size.

    Equals F.adaptive_avg_pool2d, then F.interpolate(mode="bilinear"), of each image. images: float32 with integer
    values; the four others: int64 (m,).
    """
    size = images.shape[2]
    # Cell k of r covers pixels floor(k·s/r) up to ceil((k + 1)·s/r) of s; cells beyond r repeat the last one.
    k = torch.arange(size, device=images.device).minimum(resolution[:, None] - 1)
    first = k * side[:, None] // resolution[:, None]
    last = -(-(k + 1) * side[:, None] // resolution[:, None])
    # Sums of integers below 2^24 are exact in float32, in any order.
    sums = F.pad(images.cumsum(2).cumsum(3), (1, 0, 1, 0))
    sums = _take(sums, 2, top[:, None] + last) - _take(sums, 2, top[:, None] + first)
    sums = _take(sums, 3, left[:, None] + last) - _take(sums, 3, left[:, None] + first)
    area = (last - first)[:, None, :, None] * (last - first)[:, None, None, :]
    cells = sums / area

    position = (2 * torch.arange(size, device=images.device) + 1) * resolution[:, None] / (2 * size) - 0.5
    position = position.clamp(min=0).minimum(resolution[:, None] - 1)
    below = position.long()
    above = (below + 1).minimum(resolution[:, None] - 1)
    weight = (position - below)[:, None, :, None]
    rows = _take(cells, 2, below)
    rows += (_take(cells, 2, above) - rows) * weight
    out = _take(rows, 3, below)
    return out.add_((_take(rows, 3, above) - out) * weight.transpose(2, 3))


def _take(images: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """Rows (dim 2) or columns (dim 3) index[i] of image i: (m, 3, h, w), int64 (m, k) -> (m, 3, k, w) or (m, 3, h, k).

    Rows are gathered as columns of the transposed image: on the CPU in half the time of a gather along dim 2.
    """
    lines = images.transpose(2, 3) if dim == 2 else images
    taken = lines.gather(3, index[:, None, None, :].expand(*lines.shape[:3], -1))
    return taken.transpose(2, 3) if dim == 2 else taken


def _gaussian(sigma: float) -> list[float]:
    """(2·radius + 1,) weights whose sum is 1."""
    weights = [math.exp(-((k / sigma) ** 2) / 2) for k in range(-_BLUR_RADIUS, _BLUR_RADIUS + 1)]
    return [weight / sum(weights) for weight in weights]


def _blur(images: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    """sum_k weights[k]·(image shifted by k pixels), along rows and then along columns, repeating the border pixels.

    weights: float32 (m,) for each k from -radius to radius.
    """
    for dim in (3, 2):
        size = images.shape[dim]
        padded = F.pad(images, (_BLUR_RADIUS, _BLUR_RADIUS, 0, 0) if dim == 3 else (0, 0, _BLUR_RADIUS, _BLUR_RADIUS),
                       mode="replicate")
        images = torch.zeros_like(images)
        for k, weight in enumerate(weights):
            images += padded.narrow(dim, k, size) * weight[:, None, None, None]
    return images


def _change_colors(
    images: torch.Tensor, brightness: torch.Tensor, contrast: torch.Tensor, saturation: torch.Tensor
) -> torch.Tensor:
    """c·(b·(s·x + (1 - s)·luma(x)) - 127.5) + 127.5 within 0 to 255; b, c, s float32 (m,)."""
    scale = contrast * brightness
    red, green, blue = images.unbind(1)
    luma = red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]
    same_in_all = luma * (scale * (1 - saturation))[:, None, None] + (127.5 * (1 - contrast))[:, None, None]
    return (images * (scale * saturation)[:, None, None, None] + same_in_all[:, None]).clamp_(0, 255)
