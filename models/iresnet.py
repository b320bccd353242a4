"""IResNet: images -> embedding.

The residual network of the face recognition field: ArcFace (Deng et al. 2019, https://arxiv.org/abs/1801.07698,
section 3.1), with the block of Han et al. 2017 (https://arxiv.org/abs/1610.02915: BN first, BN last, nothing after
the addition), a 3x3 convolution as stem, and a strided 1x1 convolution as the shortcut of each stage's first block.
Module names, shapes, initial values and eps are those of the published weights: their state dicts load unchanged.

Shapes: n images, c channels, h x h pixels, d embedding size.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.checkpointing import Block
from models.precision import at_least_float32

# Residual blocks of layer1 .. layer4.
BLOCK_COUNTS: dict[str, tuple[int, int, int, int]] = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
    "iresnet200": (6, 26, 60, 6),
}

STEM_CHANNELS, STAGE_CHANNELS = 64, (64, 128, 256, 512)
FINAL_MAP_SIZE = 7  # 112 pixels, halved by each of the four stages


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """Convolution without bias (a BatchNorm always follows) that keeps the map's size at stride 1."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)


class IBasicBlock(Block):
    """y = bn3(conv2(prelu(bn2(conv1(bn1(x)))))) + shortcut(x), (n, c_in, h, h) -> (n, c_out, h/s, h/s)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.prelu = nn.PReLU(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, stride)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        out += x if self.downsample is None else self.downsample(x)
        return out


def stage(in_channels: int, out_channels: int, blocks: int) -> nn.Sequential:
    """`blocks` residual blocks, of which the first halves the map: (n, c_in, h, h) -> (n, c_out, h / 2, h / 2)."""
    first = IBasicBlock(in_channels, out_channels, stride=2)
    return nn.Sequential(first, *(IBasicBlock(out_channels, out_channels, stride=1) for _ in range(blocks - 1)))


class IResNet(nn.Module):
    """Embedding = features(fc(flatten(bn2(layer4(layer3(layer2(layer1(prelu(bn1(conv1(images)))))))))).

    block_counts: residual blocks of the four stages, one of BLOCK_COUNTS.
    """

    def __init__(self, block_counts: tuple[int, int, int, int], embedding_size: int = 512) -> None:
        super().__init__()
        self.embedding_size = embedding_size
        self.conv1 = conv(3, STEM_CHANNELS, 3)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)
        self.prelu = nn.PReLU(STEM_CHANNELS)
        self.layer1, self.layer2, self.layer3, self.layer4 = map(
            stage, (STEM_CHANNELS, *STAGE_CHANNELS), STAGE_CHANNELS, block_counts)
        self.bn2 = nn.BatchNorm2d(STAGE_CHANNELS[3])
        self.fc = nn.Linear(STAGE_CHANNELS[3] * FINAL_MAP_SIZE**2, embedding_size)
        self.features = nn.BatchNorm1d(embedding_size)
        self.features.weight.requires_grad_(False)  # fixed, because the embedding is L2-normalised afterwards
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, mean=0.0, std=0.1)

    def forward(self, images: Tensor) -> Tensor:
        """images: (n, 3, 112, 112) float in [-1, 1] -> embedding (n, d), not L2-normalised."""
        x = self.prelu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return at_least_float32(self.bn2(x).flatten(1), self.fc, self.features)
