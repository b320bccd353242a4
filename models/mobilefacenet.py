"""MobileFaceNet: images -> embedding in 1.2 million parameters; the choice for CPUs.

Chen, Liu, Gao, Han 2018, "MobileFaceNets: Efficient CNNs for Accurate Real-time Face Verification on Mobile Devices"
(https://arxiv.org/abs/1804.07573), table 1: inverted bottlenecks with PReLU, and a global depthwise convolution, which
learns a weight for each position of the last map where other networks average.

Shapes: n images, c channels, h x h pixels, d embedding size (128 in the paper).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checkpointing import Block
from models.precision import at_least_float32

# Rows of table 1: (expansion t, output channels c, blocks n, stride s of the first block).
BOTTLENECKS = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))

STEM_CHANNELS = 64
FINAL_CHANNELS = 512
FINAL_MAP_SIZE = 7  # 112 pixels, halved by the stem and by three bottlenecks
PRELU_SLOPE = 0.25
RESIDUAL_GAIN = 0.2


class _CpuPReLU(torch.autograd.Function):
    """PReLU whose backward is vectorised: torch's own branches on every element and takes a quarter of this network's
    training step on a CPU.
    """

    @staticmethod
    def forward(ctx, x, slope):
        ctx.save_for_backward(x, slope)
        return F.prelu(x, slope)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, slope = ctx.saved_tensors
        grad_slope = (grad * x.clamp(max=0)).sum((0, 2, 3))
        grad_where_positive = torch.ops.aten.threshold_backward(grad, x, 0)
        return torch.lerp(grad_where_positive, grad, slope.view(1, -1, 1, 1)), grad_slope


class PReLU(nn.PReLU):
    """PReLU with one slope per channel, (n, c, h, h) -> (n, c, h, h); faster than torch's when training on a CPU."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, init=PRELU_SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast x and the slope may differ in dtype, which only torch's own operator handles.
        if self.training and x.is_cpu and not torch.is_autocast_enabled("cpu"):
            return _CpuPReLU.apply(x, self.weight)
        return super().forward(x)


class Conv2d(nn.Conv2d):
    """Convolution without bias: a BatchNorm always follows."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0, groups: int = 1
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        stored_nhwc = weight.stride(1) == 1 and weight.stride(3) == weight.size(1)  # as `store_channels_last` leaves it
        if x.is_cpu and not stored_nhwc:
            # Two free views. Through them the gradient gets the weight's own strides. On a CPU the maps are always
            # channels-last, so it would have others, and DDP would warn about them.
            weight = weight.flatten(1).view_as(weight)
        return F.conv2d(x, weight, None, self.stride, self.padding, groups=self.groups)


def activated(conv: Conv2d) -> nn.Sequential:
    """Convolution, BatchNorm, PReLU."""
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), PReLU(conv.out_channels))


def linear(conv: Conv2d) -> nn.Sequential:
    """Convolution and BatchNorm. With few channels an activation would lose information."""
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels))


class Bottleneck(Block):
    """y = project(depthwise(expand(x))), + x where the shapes agree: (n, c_in, h, h) -> (n, c_out, h/s, h/s)."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        width = in_channels * expansion
        self.expand = activated(Conv2d(in_channels, width, 1))
        self.depthwise = activated(Conv2d(width, width, 3, stride, padding=1, groups=width))
        self.project = linear(Conv2d(width, out_channels, 1))
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(self.depthwise(self.expand(x)))
        if self.has_shortcut:
            out += x
        return out


class MobileFaceNet(nn.Module):
    """Embedding = features(fc(global_depthwise(widen(bottlenecks(stem_depthwise(stem(images)))))))."""

    def __init__(self, embedding_size: int = 512) -> None:
        super().__init__()
        self.embedding_size = embedding_size
        self.stem = activated(Conv2d(3, STEM_CHANNELS, 3, stride=2, padding=1))
        self.stem_depthwise = activated(Conv2d(STEM_CHANNELS, STEM_CHANNELS, 3, padding=1, groups=STEM_CHANNELS))
        blocks, channels = [], STEM_CHANNELS
        for expansion, out_channels, count, first_stride in BOTTLENECKS:
            for stride in [first_stride] + [1] * (count - 1):
                blocks.append(Bottleneck(channels, out_channels, expansion, stride))
                channels = out_channels
        self.bottlenecks = nn.Sequential(*blocks)
        self.widen = activated(Conv2d(channels, FINAL_CHANNELS, 1))
        self.global_depthwise = linear(Conv2d(FINAL_CHANNELS, FINAL_CHANNELS, FINAL_MAP_SIZE, groups=FINAL_CHANNELS))
        self.fc = nn.Linear(FINAL_CHANNELS, embedding_size, bias=False)
        self.features = nn.BatchNorm1d(embedding_size)
        self.features.weight.requires_grad_(False)  # fixed, because the embedding is L2-normalised afterwards

        # Weights normal(0, gain^2 / fan_in) (He et al. 2015, eq. 10 and 15), gain by the activation that follows.
        # fan_in, because torch's fan_out ignores groups and would make the depthwise weights 8 to 23 times too small.
        # A block with a shortcut starts close to the identity. models/README.md says why.
        for module in self.modules():
            if isinstance(module, Conv2d):
                nn.init.kaiming_normal_(module.weight, a=PRELU_SLOPE)
            elif isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            elif isinstance(module, Bottleneck) and module.has_shortcut:
                nn.init.constant_(module.project.get_submodule("1").get_parameter("weight"), RESIDUAL_GAIN)

    def forward(self, images: Tensor) -> Tensor:
        """images: (n, 3, 112, 112) float in [-1, 1] -> embedding (n, d), not L2-normalised."""
        # On a CPU channels-last is a sixth faster in float32, but half as fast in float64.
        if images.is_cpu and images.dtype != torch.float64:
            images = images.contiguous(memory_format=torch.channels_last)
        x = self.stem_depthwise(self.stem(images))
        x = self.global_depthwise(self.widen(self.bottlenecks(x)))
        return at_least_float32(x.flatten(1), self.fc, self.features)
