"""Small images, encoded, and folders of them."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

REAL_FACES = os.environ.get("ARCFACE_REAL_FACES", "")


def smooth_pixels(seed: int = 0, size: int = 112) -> np.ndarray:
    """uint8 (size, size, 3): a picture that JPEG keeps well."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def smooth_image(seed: int = 0, size: int = 112) -> Image.Image:
    return Image.fromarray(smooth_pixels(seed, size))


def encode(image: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def make_folder(root: Path, counts: dict[str, int]) -> Path:
    for identity, count in counts.items():
        (root / identity).mkdir(parents=True)
        for k in range(count):
            smooth_image(k).save(root / identity / f"{k:03d}.jpg")
    return root


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


JPEG_KINDS = {
    "baseline": lambda: encode(smooth_image(), "JPEG"),
    "progressive": lambda: encode(smooth_image(), "JPEG", progressive=True),
    "4:4:4": lambda: encode(smooth_image(), "JPEG", subsampling=0, quality=98),
    "optimized": lambda: encode(smooth_image(), "JPEG", optimize=True),
    "restart markers": lambda: encode(smooth_image(), "JPEG", restart_marker_blocks=4),
    "stored as RGB": lambda: encode(smooth_image(), "JPEG", keep_rgb=True),
    "big comment first": lambda: encode(smooth_image(), "JPEG", comment=b"c" * 60_000),
    "Exif": lambda: encode(smooth_image(), "JPEG", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x00\x00" + bytes(20_000)),
    "bytes after the end": lambda: encode(smooth_image(), "JPEG") + bytes(100),
}
