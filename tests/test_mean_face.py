"""The warning about faces that are cropped otherwise than those that a backbone was trained on."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.evaluation import ALONE, Pixels
from PIL import Image

from utils.dist.context import DistContext
from utils.errors import UserError
from utils.evaluation.embed import embed_images
from utils.evaluation.mean_face import FEWEST, SHAPE, describe_difference, relative_faces, sample_mean_face


class Faces:
    """Item i is (image i, 0). Items from `readable` on cannot be read."""

    def __init__(self, images: torch.Tensor, readable: int = 10**6) -> None:
        self.images, self.readable = images, readable

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        if i >= self.readable:
            raise UserError("damaged")
        return self.images[i], 0


def painted(count: int, seed: int) -> torch.Tensor:
    """Skin, two eyes and a mouth, under patches of light and background that differ from one image to the next."""
    y, x = np.mgrid[-1:1:112j, -1:1:112j]
    face = np.exp(-((x / 0.6) ** 2 + (y / 0.8) ** 2) ** 2)
    marks = sum(np.exp(-((x - right) ** 2 + (y - down) ** 2) / 0.02)
                for right, down in ((-0.3, -0.2), (0.3, -0.2), (0, 0.4)))
    base = (face * (1 - marks))[..., None] * (170, 130, 110) + 40
    patches = np.random.default_rng(seed).normal(0, 40, (count, 3, 7, 7))
    noise = F.interpolate(torch.from_numpy(patches), size=(112, 112), mode="bilinear")
    return (torch.from_numpy(base).permute(2, 0, 1) + noise).clamp(0, 255).byte()


def scaled(images: torch.Tensor, factor: float) -> torch.Tensor:
    size = round(112 * factor)
    images = F.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True)
    border = (112 - size) // 2  # negative: cut off
    return F.pad(images, (border, 112 - size - border) * 2, mode="replicate" if border > 0 else "constant").byte()


def lit_from_above(images: torch.Tensor) -> torch.Tensor:
    """Other people or light, in the same place."""
    return (images * 0.6 + torch.linspace(100, 0, 112)[:, None]).clamp(0, 255).byte()


def shifted(images: torch.Tensor, right: int, down: int) -> torch.Tensor:
    return F.pad(images.float(), (8, 8, 8, 8), mode="replicate")[..., 8 - down:120 - down, 8 - right:120 - right].byte()


def warning(images: torch.Tensor, reference: torch.Tensor) -> str | None:
    return describe_difference(relative_faces(images).mean(0), len(images), reference)


@pytest.fixture(scope="module")
def sets() -> tuple[torch.Tensor, torch.Tensor]:
    return painted(200, 1), painted(200, 2)


def test_faces_that_lie_otherwise(sets):
    reference, images = sample_mean_face(Faces(sets[0])), sets[1]
    assert reference.shape == SHAPE and reference.dtype == torch.float32
    darker = (images.float() * 0.5 + 30).byte()
    gray = images.float().mean(1, keepdim=True).expand_as(images).byte()
    for same in (images, images[:100], darker, gray, images.flip(3), images[:FEWEST - 1].flip(2)):
        assert warning(same, reference) is None
    for other in (images.flip(2), scaled(images, 0.8), scaled(images, 1.2), shifted(images, -8, 0),
                  shifted(images, 0, 8)):
        assert "position, size or angle" in warning(other, reference)
    framed = torch.zeros_like(images)
    framed[..., 17:95, 17:95] = F.interpolate(images.float(), size=(78, 78), mode="bilinear").byte()
    assert "position, size or angle" in warning(framed, reference)
    assert "red and blue" in warning(images.flip(1), reference)
    assert warning(images, torch.full(SHAPE, torch.nan)) is None  # of a damaged file


def test_what_is_not_the_crop(sets):
    reference = sample_mean_face(Faces(sets[0]))
    gray, expected = (face.mean(0).flatten() for face in (relative_faces(lit_from_above(sets[1])).mean(0), reference))
    assert 1 - F.cosine_similarity(gray, expected, dim=0) > 0.2  # far off, but not moved
    assert warning(lit_from_above(sets[1]), reference) is None
    blue = torch.zeros(1, 3, 112, 112, dtype=torch.uint8)
    blue[:, 2] = 200
    assert warning(torch.cat([sets[1], blue]), reference) is None  # one plain image does not outweigh the others
    assert torch.equal(relative_faces(torch.full((1, 3, 112, 112), 77.0)), torch.zeros(1, *SHAPE))


def test_the_sample_is_deterministic_and_leaves_bad_images_out(sets):
    whole = sample_mean_face(Faces(sets[0]))
    assert torch.equal(whole, sample_mean_face(Faces(sets[0])))
    assert torch.allclose(sample_mean_face(Faces(sets[0], 150)), relative_faces(sets[0][:150]).mean(0), atol=1e-6)
    assert sample_mean_face(Faces(sets[0], 0)) is None


def embed_share(rank: int, world_size: int, images: torch.Tensor, reference: torch.Tensor) -> str:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        embed_images(Pixels(), Faces(images), DistContext(rank, world_size, world_size, torch.device("cpu")),
                     batch_size=16, workers=0, progress=False, name="lfw", mean_face=reference if rank == 0 else None)
    return errors.getvalue()


def test_embedding_warns_once_for_all_ranks(sets, pools, capsys):
    reference = sample_mean_face(Faces(sets[0]))
    images = sets[1][:71].flip(2)  # the last rank's share is padded
    embed_images(Pixels(), Faces(images), ALONE, batch_size=64, workers=0, progress=False, name="lfw",
                 mean_face=reference)
    alone = capsys.readouterr().err
    assert alone.startswith("warning: lfw: the faces ") and alone.count("\n") == 1
    assert pools(2).run(embed_share, images, reference) == [alone, ""]
    assert pools(2).run(embed_share, sets[1][:71], reference) == ["", ""]


@pytest.mark.slow
@pytest.mark.skipif("ARCFACE_REAL_FACES" not in os.environ, reason="no real faces")
def test_real_faces():
    root = Path(os.environ["ARCFACE_REAL_FACES"])

    def read(paths: list[Path]) -> torch.Tensor:
        return torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths])).permute(0, 3, 1, 2)

    reference = sample_mean_face(Faces(read(sorted(root.glob("train/*/*.jpg"))[::13])))
    images = read(sorted(root.glob("lfw/imgs/*/*.jpg")))
    for start in range(0, 1200, 400):
        some = images[start:start + 200]
        assert warning(some, reference) is None
        for other in (shifted(some, 8, 0), shifted(some, -8, 0), shifted(some, 0, 8), shifted(some, 0, -8),
                      scaled(some, 1.15), scaled(some, 0.85), scaled(some, 0.78), some.flip(1), some.flip(2)):
            assert warning(other, reference) is not None
