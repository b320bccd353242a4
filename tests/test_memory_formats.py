"""--channels-last, and which layers autocast leaves in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.published import images, relative_error
from torch import nn
from torch._subclasses import FakeTensorMode

from data.augment import prepare_batch
from models import build_backbone
from models.channels_last import store_channels_last


@pytest.mark.parametrize("arch", ["mobilefacenet", "iresnet18", "mbf", "ir_se50"])
def test_every_map_is_nhwc_on_a_gpu(arch):
    maps = []
    with FakeTensorMode(), torch.device("cuda"):
        backbone = build_backbone(arch, 16)
        store_channels_last(backbone)
        for module in backbone.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda _, inputs, out: maps.extend((*inputs, out)))
        pixels = torch.empty(2, 112, 112, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        backbone(prepare_batch(pixels, torch.float32, channels_last=True))
    assert len(maps) > 40 and {x.device.type for x in maps} == {"cuda"}
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)


def test_weights_have_the_strides_of_their_nhwc_gradients():
    """cuDNN gives gradients these strides, also in dimensions of size 1."""
    backbone = build_backbone("mobilefacenet", 16)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    store_channels_last(backbone)
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name])
        if value.dim() == 4:
            assert value.stride() == torch.empty(value.shape, memory_format=torch.channels_last).stride()


@pytest.mark.parametrize("arch", ["mobilefacenet", "iresnet18", "ir18", "mbf", "vit_t"])
def test_the_embedding_keeps_float32_under_autocast(arch):
    """The last layers in bfloat16 would give an embedding of 8 bits, in bfloat16."""
    torch.manual_seed(0)
    backbone = build_backbone(arch, 64).eval()
    linear = [module for module in backbone.modules() if isinstance(module, nn.Linear)][-1]
    norm = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm1d)][-1]
    seen = []
    linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        embedding = backbone(images(1))
    exact = copy.deepcopy(norm).double()(copy.deepcopy(linear).double().forward(seen[0].double()))
    assert embedding.dtype == torch.float32 and relative_error(embedding, exact) < 1e-5
