"""insightface's `mbf` and `mbf_large`: MobileFaceNets of two and four times the width, with its names and shapes.

The layers are those of models/mobilefacenet.py. The numbers of groups are insightface's: they do not grow with the
width, so that the "depthwise" convolution of the stem and the expansions differ from the paper's. Initial values are
insightface's too.

Shapes: n images, c channels, h x h pixels, d embedding size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.checkpointing import Block
from models.mobilefacenet import FINAL_CHANNELS, FINAL_MAP_SIZE, Conv2d, activated, linear
from models.precision import at_least_float32

# name -> width, and blocks of the four stages. A single block in the first stage is one grouped convolution.
MBF_VARIANTS: dict[str, tuple[int, tuple[int, int, int, int]]] = {
    "mbf": (2, (1, 4, 6, 2)),
    "mbf_large": (4, (2, 8, 12, 4)),
}


class Layers(nn.Module):
    """layers(x): insightface puts each sequence below a name `layers` of its own."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _grouped(in_channels: int, out_channels: int, kernel: int, stride: int, groups: int,
             kind: Callable[[Conv2d], nn.Sequential] = activated) -> Layers:
    padding = kernel // 2 if kernel < FINAL_MAP_SIZE else 0
    return Layers(kind(Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups)))


class DepthWise(Block):
    """y = project(depthwise(expand(x))), + x with `residual`: (n, c_in, h, h) -> (n, c_out, h/s, h/s)."""

    def __init__(self, in_channels: int, out_channels: int, width: int, stride: int, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.layers = nn.Sequential(
            _grouped(in_channels, width, 1, 1, 1), _grouped(width, width, 3, stride, width),
            _grouped(width, out_channels, 1, 1, 1, linear))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + x if self.residual else self.layers(x)


def _residuals(channels: int, count: int, width: int) -> Layers:
    return Layers(nn.Sequential(*(DepthWise(channels, channels, width, 1, True) for _ in range(count))))


class MBF(nn.Module):
    """Embedding = features(conv_sep(layers(images))). scale, blocks: one of MBF_VARIANTS."""

    def __init__(self, scale: int, blocks: tuple[int, int, int, int], embedding_size: int = 512) -> None:
        super().__init__()
        self.embedding_size = embedding_size
        narrow, wide = 64 * scale, 128 * scale
        self.layers = nn.Sequential(
            _grouped(3, narrow, 3, 2, 1),
            _grouped(narrow, narrow, 3, 1, 64) if blocks[0] == 1 else _residuals(narrow, blocks[0], 128),
            DepthWise(narrow, narrow, 128, 2, False), _residuals(narrow, blocks[1], 128),
            DepthWise(narrow, wide, 256, 2, False), _residuals(wide, blocks[2], 256),
            DepthWise(wide, wide, 512, 2, False), _residuals(wide, blocks[3], 256))
        self.conv_sep = _grouped(wide, FINAL_CHANNELS, 1, 1, 1)
        self.features = Layers(nn.Sequential(
            _grouped(FINAL_CHANNELS, FINAL_CHANNELS, FINAL_MAP_SIZE, 1, FINAL_CHANNELS, linear), nn.Flatten(),
            nn.Linear(FINAL_CHANNELS, embedding_size, bias=False), nn.BatchNorm1d(embedding_size)))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """images: (n, 3, 112, 112) float in [-1, 1] -> embedding (n, d), not L2-normalised."""
        # As in models/mobilefacenet.py: faster on a CPU, but not in float64.
        if images.is_cpu and images.dtype != torch.float64:
            images = images.contiguous(memory_format=torch.channels_last)
        depthwise, flatten, last_linear, norm = self.features.layers
        x = flatten(depthwise(self.conv_sep(self.layers(images))))
        return at_least_float32(x, last_linear, norm)
