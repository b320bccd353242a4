"""A backbone for tests of everything around it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class TinyBackbone(nn.Module):
    """Images (n, 3, 112, 112) -> (n, 512), with or without BatchNorm: small enough for hundreds of steps a second."""

    embedding_size = 512

    def __init__(self, batch_norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, bias=not batch_norm)
        self.bn = nn.BatchNorm2d(6) if batch_norm else nn.Identity()
        self.prelu = nn.PReLU(6)
        self.fc = nn.Linear(6 * 6 * 6, 512, bias=not batch_norm)  # before BatchNorm its gradient is 0
        self.features = nn.BatchNorm1d(512) if batch_norm else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.features(self.fc(self.prelu(self.bn(self.conv(F.avg_pool2d(images, 8)))).flatten(1)))
