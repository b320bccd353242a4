"""The mean face of a set of images, which shows whether faces are cropped as in the training set.

A backbone that sees faces shifted, scaled or turned against those of its training set loses several percent of its
accuracy, and nothing else would say so. README.md in this directory has the measurements behind the constants.
"""

from __future__ import annotations

import math
from collections.abc import Sized
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import UserError

SHAPE = (3, 28, 28)
SAMPLE = 512  # images of the training set, evenly spaced: a second on a slow disk
FEWEST = 50  # images that can be compared
# 1 - cosine of two mean faces. A set of other people is below 0.01, faces moved by 8 pixels are above 0.14.
LARGEST_DIFFERENCE = 0.04
# What chance adds with n independent images, times this number.
CHANCE = 3.0
# Images of few people may differ by more than chance. Moving the mean face of the training images leaves less than this
# part of the difference only if the crops differ.
LARGEST_REMAINDER = 0.5
_INNER = slice(5, 23)  # without the black frame that some programs leave around a face
_THREADS = 8  # the decoders release the GIL


def relative_faces(images: Tensor) -> Tensor:
    """RGB (n, 3, H, W) -> float32 (n, 3, 28, 28): 0 is the mean gray of each image, and its gray part has length 1
    (less in images of almost one color).

    So they depend neither on brightness nor on contrast, nor on the unit of `images`.
    """
    small = F.adaptive_avg_pool2d(images.float(), SHAPE[1:])
    small = small - small.mean((1, 2, 3), keepdim=True)
    length = torch.linalg.vector_norm(small.mean(1).flatten(1), dim=1)
    # The second bound limits images without a gray part, such as a plain color: one must not outweigh all others.
    length = length.maximum(0.1 * torch.linalg.vector_norm(small.flatten(1), dim=1)).clamp_min(1e-6)
    return small / length[:, None, None, None]


def sample_mean_face(dataset: Any) -> Tensor | None:
    """The mean of `relative_faces` over SAMPLE images: float32 (3, 28, 28), the same for the same images.

    dataset: dataset[i] is (uint8 (3, 112, 112), label). Images that cannot be read are left out; None if all are.
    """
    def read(i: int) -> Tensor | None:
        try:
            return relative_faces(dataset[i][0][None])[0]
        except UserError:
            return None

    assert isinstance(dataset, Sized)
    indices = torch.linspace(0, len(dataset) - 1, min(SAMPLE, len(dataset)), dtype=torch.float64).long().tolist()
    with ThreadPoolExecutor(_THREADS) as threads:
        faces = [face for face in threads.map(read, indices) if face is not None]
    return torch.stack(faces).mean(0) if faces else None


def describe_difference(mean: Tensor, count: int, reference: Tensor) -> str | None:
    """What is wrong with the images whose mean face is `mean`, in words, or None.

    mean, reference: (3, 28, 28), the means of `relative_faces` over `count` images and over training images.
    """
    if count < FEWEST:
        return None
    gray, expected = mean.mean(0).cpu().double(), reference.mean(0).cpu().double()
    difference = float(_differences(gray, expected[None]))
    # The mean of `count` independent vectors of length 1 differs so much from that of all, on average.
    length = float(gray.square().sum())
    chance = (1 - length) / (2 * count * length) if length else 0.0
    limit = LARGEST_DIFFERENCE + CHANCE * chance
    if difference > limit:
        inner = gray[_INNER, _INNER]
        unmoved = _differences(inner, expected[None, _INNER, _INNER])
        if _differences(inner, _moved(expected)[:, _INNER, _INNER]).min() < LARGEST_REMAINDER * unmoved:
            return ("the faces have another position, size or angle than in the training images (difference of the "
                    f"mean faces: {difference:.2f}, expected up to {limit:.2f}); crop and align both in the same way, "
                    "or expect a lower accuracy")
    red, expected_red = (float((face[0] - face[2]).mean()) for face in (mean, reference))
    if red * expected_red < 0 and abs(red) > 0.5 * abs(expected_red):
        return ("red and blue have other places than in the training images; store both as RGB, or expect a lower "
                "accuracy")
    return None


def _differences(face: Tensor, others: Tensor) -> Tensor:
    """(h, w), (k, h, w) -> (k,): 1 - cosine; a constant added to a face does not matter."""
    face, others = (x - x.mean((-2, -1), keepdim=True) for x in (face, others))
    return 1 - F.cosine_similarity(face.flatten()[None], others.flatten(1))


def _moved(face: Tensor) -> Tensor:
    """(28, 28) -> (k, 28, 28): the face in other crops, of which edges are repeated: shifted by up to 12 pixels and
    scaled by 0.55 to 1.5, or turned, or upside down."""
    size = len(face)
    crops = [[[1 / scale, 0, -right / scale], [0, 1 / scale, -down / scale]]
             for scale in (0.55, 0.7, 0.85, 1, 1.15, 1.3, 1.5)
             for right in torch.linspace(-6 / size, 6 / size, 7).tolist()
             for down in torch.linspace(-6 / size, 6 / size, 7).tolist()]
    for angle in map(math.radians, (-30, -15, 15, 30, 90, 180, 270)):
        crops.append([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]])
    crops.append([[1, 0, 0], [0, -1, 0]])
    grid = F.affine_grid(torch.tensor(crops, dtype=face.dtype), [len(crops), 1, size, size], align_corners=False)
    return F.grid_sample(face.expand(len(crops), 1, size, size), grid, padding_mode="border", align_corners=False)[:, 0]
