"""Backbones: the field's names and values for IResNet, and the paper's table for MobileFaceNet."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.published import BLOCKS, images, iresnet_entries, plain_iresnet, random_weights, relative_error, shapes
from torch import Tensor, nn

from models import build_backbone
from models.mobilefacenet import Bottleneck, Conv2d, PReLU, activated
from utils.errors import UserError

PARAMETERS = {
    "iresnet18": 24_025_600,
    "iresnet34": 34_139_328,
    "iresnet50": 43_590_848,
    "iresnet100": 65_156_160,
    "iresnet200": 118_833_920,
    "mobilefacenet": 1_200_512,
}


@pytest.mark.slow
@pytest.mark.parametrize("arch", PARAMETERS)  # the others: test_backbones.py
def test_names_shapes_and_counts(arch):
    model = build_backbone(arch)
    assert model.embedding_size == 512
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[arch]
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["features.weight"]
    assert torch.equal(model.features.weight, torch.ones(512))
    if arch in BLOCKS:
        assert list(shapes(model).items()) == list(iresnet_entries(BLOCKS[arch]).items())


@pytest.mark.parametrize("arch", ["iresnet18", "mobilefacenet"])
def test_embedding_size(arch):
    model = build_backbone(arch, embedding_size=40).eval()
    assert model.embedding_size == 40
    with torch.no_grad():
        assert model(images(1)).shape == (1, 40)


def test_iresnet_initial_values():
    torch.manual_seed(0)
    model = build_backbone("iresnet18")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None, name
            assert module.weight.std().item() == pytest.approx(0.1, rel=0.1), name
            assert abs(module.weight.mean().item()) < 0.01, name
        elif isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)):
            assert (module.eps, module.momentum) == (1e-5, 0.1), name
            assert (module.weight == 1).all() and (module.bias == 0).all(), name
        elif isinstance(module, nn.PReLU):
            assert (module.weight == 0.25).all(), name


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["iresnet50", "iresnet100"])  # iresnet18: test_published_iresnet_gives_its_embedding
def test_iresnet_equals_plain_functions(arch):
    weights = random_weights(iresnet_entries(BLOCKS[arch]))
    model = build_backbone(arch)
    model.load_state_dict(weights, strict=True)
    with torch.no_grad():
        assert relative_error(model.eval()(images(1)), plain_iresnet(weights, images(1))) < 1e-5


def plain_mobilefacenet(w: dict[str, Tensor], images: Tensor) -> Tensor:
    """Table 1 of the paper, row by row."""

    def bn(x: Tensor, name: str) -> Tensor:
        statistics = w[f"{name}.running_mean"], w[f"{name}.running_var"]
        return F.batch_norm(x, *statistics, w[f"{name}.weight"], w[f"{name}.bias"], training=False, eps=1e-5)

    def layer(x: Tensor, name: str, stride: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
        x = bn(F.conv2d(x, w[f"{name}.0.weight"], stride=stride, padding=padding, groups=groups), f"{name}.1")
        return F.prelu(x, w[f"{name}.2.weight"]) if f"{name}.2.weight" in w else x

    x = layer(images, "stem", 2, 1)
    x = layer(x, "stem_depthwise", 1, 1, groups=64)
    assert x.shape[1:] == (64, 56, 56)
    block = 0
    for t, c, n, s, size in ((2, 64, 5, 2, 28), (4, 128, 1, 2, 14), (2, 128, 6, 1, 14), (4, 128, 1, 2, 7),
                             (2, 128, 2, 1, 7)):
        for repeat in range(n):
            p = f"bottlenecks.{block}"
            out = layer(x, f"{p}.expand")
            assert out.shape[1] == t * x.shape[1]
            out = layer(out, f"{p}.depthwise", s if repeat == 0 else 1, 1, groups=out.shape[1])
            out = layer(out, f"{p}.project")
            assert out.shape[1:] == (c, size, size)
            x = x + out if x.shape == out.shape else out
            block += 1
    x = layer(x, "widen")
    assert x.shape[1:] == (512, 7, 7)
    x = layer(x, "global_depthwise", groups=512)
    return bn(x.flatten(1) @ w["fc.weight"].T, "features")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_mobilefacenet_equals_table_1(dtype, tolerance):
    model = build_backbone("mobilefacenet").to(dtype).eval()
    weights = random_weights(shapes(model))
    model.load_state_dict(weights)
    plain = plain_mobilefacenet({name: value.to(dtype) for name, value in weights.items()}, images(2, dtype))
    with torch.no_grad():
        assert relative_error(model(images(2, dtype)), plain) < tolerance


def test_mobilefacenet_initial_values():
    torch.manual_seed(0)
    for name, module in build_backbone("mobilefacenet").named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_in = module.weight[0].numel()
            gain = math.sqrt(2 / (1 + 0.25**2)) if isinstance(module, nn.Conv2d) else 1.0
            assert module.weight.std().item() == pytest.approx(gain / math.sqrt(fan_in), rel=0.12), name
        elif isinstance(module, Bottleneck):
            assert (module.project[1].weight == (0.2 if module.has_shortcut else 1.0)).all(), name


@pytest.mark.slow
def test_mobilefacenet_learns():
    """Four images, each its own class: a few steps lower the loss, and every trained parameter takes part."""
    torch.manual_seed(0)
    model = build_backbone("mobilefacenet", embedding_size=32)
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    centers = F.normalize(torch.randn(4, 32))
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(16 * F.normalize(model(images(4))) @ centers.T, torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
    unchanged = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert unchanged == ["features.weight"]
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_cpu_prelu_has_torchs_value_and_gradients(memory_format):
    torch.manual_seed(0)
    own, torchs = PReLU(6).double(), nn.PReLU(6).double()
    with torch.no_grad():
        own.weight.copy_(torch.tensor([-0.5, 0.0, 0.25, 0.7, 1.0, 1.5]))
        torchs.weight.copy_(own.weight)
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    x[0, :, 0, 0] = 0.0
    x = x.contiguous(memory_format=memory_format)
    weight = torch.randn_like(x)
    results = []
    for prelu in (own, torchs):
        leaf = x.clone().requires_grad_()
        y = prelu(leaf)
        (y * weight).sum().backward()
        results.append((y, leaf.grad, prelu.weight.grad))
    for value, truth in zip(*results):
        torch.testing.assert_close(value, truth, rtol=1e-13, atol=1e-13)


def test_mobilefacenets_layers_under_autocast():
    layers = nn.Sequential(activated(Conv2d(3, 8, 3)), Bottleneck(8, 8, expansion=2, stride=1))
    with torch.autocast("cpu", torch.bfloat16):
        out = layers(torch.randn(2, 3, 9, 9))
    out.float().square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in layers.parameters())


def test_convolution_gradient_has_the_weights_strides():
    """DDP warns about other strides, which channels-last maps otherwise give to 1x1 and depthwise weights."""
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    for conv in (Conv2d(8, 4, 1), Conv2d(8, 8, 3, padding=1, groups=8), Conv2d(8, 4, 3)):
        conv(x).square().sum().backward()
        assert conv.weight.grad.stride() == conv.weight.stride()


def test_build_backbone_errors():
    with pytest.raises(UserError, match="resnet50.*iresnet18, .*mobilefacenet"):
        build_backbone("resnet50")
