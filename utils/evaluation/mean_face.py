"""The mean face of a set of images, which shows whether faces are cropped as in the training set.

A backbone that sees faces shifted, scaled or turned against those of its training set loses several percent of its
accuracy, and nothing else would say so. README.md in this directory has the measurements behind the constants.
"""

from __future__ import annotations

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
LARGEST_DIFFERENCE = 0.05
# What chance adds with n independent images, times this number, because a person's images are alike.
CHANCE = 3.0
_THREADS = 8  # the decoders release the GIL


def relative_faces(images: Tensor) -> Tensor:
    """RGB (n, 3, H, W) -> float32 (n, 3, 28, 28): 0 is the mean gray of each image, and its gray part has length 1.

    So they depend neither on brightness nor on contrast, nor on the unit of `images`.
    """
    small = F.adaptive_avg_pool2d(images.float(), SHAPE[1:])
    small = small - small.mean((1, 2, 3), keepdim=True)
    length = torch.linalg.vector_norm(small.mean(1).flatten(1), dim=1).clamp_min(1e-6)
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
    gray, expected = mean.mean(0).flatten().double(), reference.mean(0).flatten().double()
    difference = 1 - float(F.cosine_similarity(gray, expected, dim=0))
    # The mean of `count` independent vectors of length 1 differs so much from that of all, on average.
    length = float(gray @ gray)
    chance = (1 - length) / (2 * count * length) if length else 0.0
    if difference > LARGEST_DIFFERENCE + CHANCE * chance:
        return ("the faces have another position, size or angle than in the training images (difference of the mean "
                f"faces: {difference:.2f}, expected up to {LARGEST_DIFFERENCE + CHANCE * chance:.2f}); crop and align "
                "both in the same way, or expect a lower accuracy")
    red, expected_red = (float((face[0] - face[2]).mean()) for face in (mean, reference))
    if red * expected_red < 0 and abs(red) > 0.5 * abs(expected_red):
        return ("red and blue have other places than in the training images; store both as RGB, or expect a lower "
                "accuracy")
    return None
