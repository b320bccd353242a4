"""IR: the improved residual network in the names and shapes of AdaFace's and CVLface's published weights.

It is IResNet (models/iresnet.py) but for three things: the first block has no convolution in its shortcut, dropout
precedes the linear layer, and the last BatchNorm has neither gain nor bias. IR-SE adds squeeze-and-excitation to each
block (Hu et al. 2018, https://arxiv.org/abs/1709.01507). Names, shapes, initial values and the dropout rate are those
of AdaFace (Kim, Jain, Liu 2022, https://arxiv.org/abs/2204.00964), whose IR-101 is `ir100` here.

Shapes: n images, c channels, h x h pixels, d embedding size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checkpointing import Block
from models.iresnet import BLOCK_COUNTS, FINAL_MAP_SIZE, STAGE_CHANNELS, STEM_CHANNELS, conv
from models.precision import at_least_float32
from models.randomness import draw_keys, dropout

# name -> residual blocks of the four stages, and whether they have squeeze-and-excitation.
IR_VARIANTS: dict[str, tuple[tuple[int, int, int, int], bool]] = {
    **{f"ir{depth}": (BLOCK_COUNTS[f"iresnet{depth}"], False) for depth in (18, 34, 50, 100)},
    "ir_se50": (BLOCK_COUNTS["iresnet50"], True),
}
DROPOUT = 0.4
SE_REDUCTION = 16


class SqueezeExcitation(nn.Module):
    """y = x * sigmoid(fc2(relu(fc1(mean of each channel)))), (n, c, h, h) -> (n, c, h, h)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = conv(channels, channels // SE_REDUCTION, 1)
        self.fc2 = conv(channels // SE_REDUCTION, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class IRBlock(Block):
    """y = res_layer(x) + shortcut_layer(x), (n, c_in, h, h) -> (n, c_out, h/s, h/s).

    A shortcut between equal numbers of channels takes every s-th pixel.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, squeeze: bool) -> None:
        super().__init__()
        self.stride = stride
        self.shortcut_layer: nn.Sequential | None = None
        if in_channels != out_channels:
            self.shortcut_layer = nn.Sequential(conv(in_channels, out_channels, 1, stride),
                                                nn.BatchNorm2d(out_channels))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(in_channels), conv(in_channels, out_channels, 3), nn.BatchNorm2d(out_channels),
            nn.PReLU(out_channels), conv(out_channels, out_channels, 3, stride), nn.BatchNorm2d(out_channels))
        if squeeze:
            self.res_layer.add_module("se_block", SqueezeExcitation(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x[:, :, ::self.stride, ::self.stride] if self.shortcut_layer is None else self.shortcut_layer(x)
        return self.res_layer(x) + shortcut


class IR(nn.Module):
    """Embedding = bn(linear(dropout(bn(body(prelu(bn(conv(images)))))))).

    block_counts, squeeze: one of IR_VARIANTS.
    """

    takes_keys = True

    def __init__(self, block_counts: tuple[int, int, int, int], squeeze: bool, embedding_size: int = 512) -> None:
        super().__init__()
        self.embedding_size = embedding_size
        self.input_layer = nn.Sequential(conv(3, STEM_CHANNELS, 3), nn.BatchNorm2d(STEM_CHANNELS),
                                         nn.PReLU(STEM_CHANNELS))
        blocks, channels = [], STEM_CHANNELS
        for out_channels, count in zip(STAGE_CHANNELS, block_counts):
            for stride in [2] + [1] * (count - 1):
                blocks.append(IRBlock(channels, out_channels, stride, squeeze))
                channels = out_channels
        self.body = nn.Sequential(*blocks)
        # The published Sequential has dropout and flattening, which have no weights, as 1 and 2.
        self.output_layer = nn.ModuleDict({
            "0": nn.BatchNorm2d(channels), "3": nn.Linear(channels * FINAL_MAP_SIZE**2, embedding_size),
            "4": nn.BatchNorm1d(embedding_size, affine=False)})
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """images: (n, 3, 112, 112) float in [-1, 1] -> embedding (n, d), not L2-normalised.

        keys: int64 (n,), from which dropout is drawn in training; None: torch's generator draws them.
        """
        x = self.output_layer["0"](self.body(self.input_layer(images)))
        if self.training:
            x = dropout(x, draw_keys(images) if keys is None else keys, 0, DROPOUT)
        return at_least_float32(x.flatten(1), self.output_layer["3"], self.output_layer["4"])
