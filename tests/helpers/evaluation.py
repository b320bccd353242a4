"""Image pairs, a checkpoint, and backbones whose embeddings can be computed by hand."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from models import build_backbone
from utils.dist.context import DistContext
from utils.errors import UserError

CPU = torch.device("cpu")
ALONE = DistContext(0, 1, 1, CPU)


def write_pairs(root: Path) -> Path:
    """imgs/, pair.list (10 same, 10 different pairs of 8 identities) and checkpoint.pth.tar of a MobileFaceNet."""
    rng = np.random.default_rng(0)
    for identity in range(8):
        base = rng.integers(0, 256, (7, 7, 3))
        (root / "imgs" / str(identity)).mkdir(parents=True)
        for image in range(3):
            pixels = np.clip(base + rng.integers(-40, 40, (7, 7, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).resize((112, 112)).save(root / "imgs" / str(identity) / f"{image}.jpg")
    same = [f"{k % 8}/{k // 8}.jpg {k % 8}/2.jpg 1" for k in range(10)]
    different = [f"{k % 8}/0.jpg {(k + 1 + k // 8) % 8}/1.jpg 0" for k in range(10)]
    (root / "pair.list").write_text("\n".join(same + different) + "\n")
    torch.manual_seed(3)
    save_checkpoint(build_backbone("mobilefacenet"), root / "checkpoint.pth.tar")
    return root


def save_checkpoint(backbone: nn.Module, path: Path) -> None:
    torch.save({
        "format_version": 1, "arch": "mobilefacenet", "embedding_size": 512, "num_classes": 8,
        "state_dict": backbone.state_dict(),
    }, path)


def pack(faces: Path, path: Path) -> Path:
    """The pairs of `faces` as a .bin."""
    images, labels = [], []
    for line in (faces / "pair.list").read_text().splitlines():
        path1, path2, label = line.split()
        images += [(faces / "imgs" / path1).read_bytes(), (faces / "imgs" / path2).read_bytes()]
        labels.append(label == "1")
    path.write_bytes(pickle.dumps((images, labels), 2))
    return path


class Pixels(nn.Module):
    """The embedding is the mean pixel of the left and of the right half, per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.BatchNorm2d(3).eval()
        self.batches: list[int] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training and not torch.is_grad_enabled() and images.dtype == self.scale.dtype
        self.batches.append(len(images))
        return torch.cat([images[..., :56].mean((2, 3)), images[..., 56:].mean((2, 3))], dim=1) * self.scale


class Colours(Dataset):
    """Image i has a left half of one colour and a right half of another. With `broken` item 13 cannot be read."""

    def __init__(self, count: int, broken: bool = False) -> None:
        self.colours = np.random.default_rng(0).integers(0, 256, (count, 3, 2), dtype=np.uint8)
        self.broken = broken

    def __len__(self) -> int:
        return len(self.colours)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        assert torch.utils.data.get_worker_info() is None or torch.get_num_threads() == 1
        if self.broken and i == 13:
            raise UserError("13.jpg: the file is empty")
        return torch.from_numpy(np.repeat(self.colours[i], 56, axis=1)[:, None].repeat(112, axis=1)), 0

    def expected(self, flip: bool) -> np.ndarray:
        """The embeddings by Pixels."""
        pixels = (self.colours / 255 - 0.5) / 0.5
        embedding = pixels.transpose(0, 2, 1).reshape(len(self), 6)
        if flip:
            embedding = embedding + pixels[:, :, ::-1].transpose(0, 2, 1).reshape(len(self), 6)
        return embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
