"""Backbones: the field's names and values for IResNet, the paper's table for MobileFaceNet, and what files load."""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import BACKBONES, build_backbone
from models.mobilefacenet import Bottleneck, Conv2d, PReLU, activated
from utils.checkpoint.weights import load_backbone
from utils.errors import UserError

BLOCKS = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
    "iresnet200": (6, 26, 60, 6),
}
PARAMETERS = {
    "iresnet18": 24_025_600,
    "iresnet34": 34_139_328,
    "iresnet50": 43_590_848,
    "iresnet100": 65_156_160,
    "iresnet200": 118_833_920,
    "mobilefacenet": 1_200_512,
}
FILE_FEATURES = 32  # embedding size of the files written here: a small `fc` makes them small


# ---- The published IResNet, written a second time: its entries, and its embedding by plain functions of them.


def bn_entries(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    vectors = {f"{name}.{key}": (channels,) for key in ("weight", "bias", "running_mean", "running_var")}
    return vectors | {f"{name}.num_batches_tracked": ()}


def iresnet_entries(blocks: tuple[int, ...], features: int = 512) -> dict[str, tuple[int, ...]]:
    """name -> shape, in the order of a published state dict."""
    entries = {"conv1.weight": (64, 3, 3, 3), **bn_entries("bn1", 64), "prelu.weight": (64,)}
    c_in = 64
    for layer, (c, count) in enumerate(zip((64, 128, 256, 512), blocks), start=1):
        for block in range(count):
            p = f"layer{layer}.{block}"
            entries |= bn_entries(f"{p}.bn1", c_in)
            entries[f"{p}.conv1.weight"] = (c, c_in, 3, 3)
            entries |= bn_entries(f"{p}.bn2", c)
            entries[f"{p}.prelu.weight"] = (c,)
            entries[f"{p}.conv2.weight"] = (c, c, 3, 3)
            entries |= bn_entries(f"{p}.bn3", c)
            if block == 0:
                entries[f"{p}.downsample.0.weight"] = (c, c_in, 1, 1)
                entries |= bn_entries(f"{p}.downsample.1", c)
            c_in = c
    entries |= bn_entries("bn2", 512)
    entries |= {"fc.weight": (features, 512 * 7 * 7), "fc.bias": (features,)}
    return entries | bn_entries("features", features)


def random_weights(entries: dict[str, tuple[int, ...]], seed: int = 0) -> OrderedDict[str, Tensor]:
    """Values under which every entry matters to the embedding, and activations neither vanish nor explode."""
    generator = torch.Generator().manual_seed(seed)
    weights = OrderedDict()
    for name, shape in entries.items():
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(7)
        elif len(shape) > 1:
            weights[name] = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        elif name.endswith(("running_mean", "bias")):
            weights[name] = 0.2 * torch.randn(shape, generator=generator)
        else:
            weights[name] = 0.5 + torch.rand(shape, generator=generator)
    return weights


def plain_iresnet(w: dict[str, Tensor], images: Tensor) -> Tensor:
    def bn(x: Tensor, name: str) -> Tensor:
        statistics = w[f"{name}.running_mean"], w[f"{name}.running_var"]
        return F.batch_norm(x, *statistics, w[f"{name}.weight"], w[f"{name}.bias"], training=False, eps=1e-5)

    x = F.conv2d(images, w["conv1.weight"], padding=1)
    x = F.prelu(bn(x, "bn1"), w["prelu.weight"])
    for layer in (1, 2, 3, 4):
        block = 0
        while f"layer{layer}.{block}.conv1.weight" in w:
            p = f"layer{layer}.{block}"
            stride = 2 if block == 0 else 1
            out = F.conv2d(bn(x, f"{p}.bn1"), w[f"{p}.conv1.weight"], padding=1)
            out = F.prelu(bn(out, f"{p}.bn2"), w[f"{p}.prelu.weight"])
            out = bn(F.conv2d(out, w[f"{p}.conv2.weight"], stride=stride, padding=1), f"{p}.bn3")
            if block == 0:
                x = bn(F.conv2d(x, w[f"{p}.downsample.0.weight"], stride=2), f"{p}.downsample.1")
            x = x + out
            block += 1
    x = bn(x, "bn2").reshape(len(images), -1)
    return bn(x @ w["fc.weight"].T + w["fc.bias"], "features")


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def images(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand((count, 3, 112, 112), generator=torch.Generator().manual_seed(5), dtype=dtype) * 2 - 1


def relative_error(value: Tensor, truth: Tensor) -> float:
    return ((value - truth).norm() / truth.norm()).item()


# ---- Architectures


def test_archs():
    assert set(BACKBONES) == PARAMETERS.keys()


@pytest.mark.parametrize("arch", BACKBONES)
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
    with pytest.raises(UserError, match="embedding size 0"):
        build_backbone("iresnet18", 0)


# ---- Files


@pytest.fixture(scope="module")
def published() -> OrderedDict[str, Tensor]:
    return random_weights(iresnet_entries(BLOCKS["iresnet18"], FILE_FEATURES))


@pytest.fixture(scope="module")
def published_embedding(published) -> Tensor:
    return plain_iresnet(published, images(1))


@pytest.fixture(scope="module")
def small() -> OrderedDict[str, Tensor]:
    """A MobileFaceNet's weights: quick to write and read."""
    return random_weights(shapes(build_backbone("mobilefacenet", 16)))


def without_counters(weights: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
    return OrderedDict((name, value) for name, value in weights.items() if not name.endswith("num_batches_tracked"))


def prefixed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": value for name, value in weights.items()}


def as_torchshard(weights: dict[str, Tensor]) -> dict[str, object]:
    centers = {"module.arcface_linear.weight": torch.randn(10, FILE_FEATURES)}
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return {"epoch": 3, "arch": "iresnet18", "state_dict": prefixed(weights) | centers, "optimizer": optimizer}


def as_checkpoint(weights: dict[str, Tensor], arch: str, embedding_size: int) -> dict[str, object]:
    return {"format_version": 1, "arch": arch, "embedding_size": embedding_size, "num_classes": 10,
            "state_dict": weights, "step": 5, "options": {"data": "faces"}}


PUBLISHED_FORMS = {
    "bare": dict,
    "without counters": without_counters,
    "module prefix": prefixed,
    "torchshard": as_torchshard,
    "checkpoint": lambda weights: as_checkpoint(weights, "iresnet18", FILE_FEATURES),
    "parameters": lambda weights: {name: nn.Parameter(value, requires_grad=False) for name, value in weights.items()},
}


@pytest.mark.parametrize("form", PUBLISHED_FORMS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_published_iresnet_gives_its_embedding(tmp_path, published, published_embedding, form, zipped):
    path = str(tmp_path / "backbone.pth")
    torch.save(PUBLISHED_FORMS[form](published), path, _use_new_zipfile_serialization=zipped)
    random_state = torch.get_rng_state()
    model, arch = load_backbone(path)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert arch == "iresnet18"
    assert model.embedding_size == FILE_FEATURES
    assert not model.training and not model.features.weight.requires_grad
    assert model.bn1.num_batches_tracked.item() == (0 if form == "without counters" else 7)
    os.remove(path)  # the module must not depend on the file any more
    with torch.no_grad():
        assert relative_error(model(images(1)), published_embedding) < 1e-5


@pytest.mark.parametrize("arch", ["iresnet34", "iresnet50", "iresnet100", "iresnet200"])
def test_arch_and_embedding_size_from_names_and_shapes(tmp_path, arch):
    path = str(tmp_path / "backbone.pth")
    # One number per entry, expanded: the file is small, as torch.save writes the storage behind it.
    weights = {name: torch.full((1,), 0.5).expand(shape) if shape else torch.tensor(0)
               for name, shape in iresnet_entries(BLOCKS[arch], 4).items()}
    torch.save(weights, path)
    model, found = load_backbone(path)
    assert (found, model.embedding_size) == (arch, 4)
    assert (model.fc.weight == 0.5).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_mobilefacenet_file_of_any_precision(tmp_path, small, dtype):
    path = str(tmp_path / "checkpoint.pth.tar")
    stored = {name: value.to(dtype) if value.is_floating_point() else value for name, value in small.items()}
    torch.save(as_checkpoint(stored, "mobilefacenet", 16), path)
    model, arch = load_backbone(path, "mobilefacenet")
    assert (arch, model.embedding_size) == ("mobilefacenet", 16)
    for name, value in model.state_dict().items():
        assert value.dtype == small[name].dtype
        assert torch.equal(value, stored[name].to(value.dtype)), name


def refusal(path: object, arch: str | None = None) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(UserError) as caught:
        load_backbone(str(path), arch)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 400 + len(str(path))
    return message


def test_missing_file_and_directory(tmp_path):
    assert "no such file" in refusal(tmp_path / "missing.pth.tar")
    assert "is a directory" in refusal(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "no such file" in refusal(tmp_path / "link")


def saved(content: object, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def other_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("document.xml", "<xml/>")
    return buffer.getvalue()


@pytest.mark.parametrize("data", [
    b"", b"P", b"PK\x03\x04", b"\x80", b"\x80\x02", b"hello, this is a text file\n", b".", b"version https://x\n",
    bytes(range(256)) * 40, b"\x00" * 1000, b"\x80\x02}q\x00.", b"\x89PNG\r\n\x1a\n" + b"\x00" * 100, other_zip(),
], ids=repr)
def test_not_a_checkpoint(tmp_path, data):
    path = tmp_path / "file.pth.tar"
    path.write_bytes(data)
    assert ("is empty" if not data else "not a checkpoint") in refusal(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("part", [0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.99999])
def test_truncated(tmp_path, small, zipped, part):
    whole = saved(as_checkpoint(small, "mobilefacenet", 16), zipped)
    path = tmp_path / "checkpoint.pth.tar"
    path.write_bytes(whole[:int(part * len(whole))])
    assert "truncated" in refusal(path)


class Malicious:
    """Unpickled, it makes a directory: a harmless stand-in for any command."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("writer", ["zip", "legacy", "pickle 0", "pickle 2", "pickle 4", "pickle 5"])
def test_code_in_a_file_is_not_run(tmp_path, small, writer):
    target = tmp_path / "executed"
    content = as_checkpoint({**small, "fc.weight": Malicious(str(target))}, "mobilefacenet", 16)
    if writer.startswith("pickle"):
        data = pickle.dumps(Malicious(str(target)), protocol=int(writer.split()[1]))
    else:
        data = saved(content, zipped=writer == "zip")
    path = tmp_path / "checkpoint.pth.tar"
    path.write_bytes(data)
    message = refusal(path)
    assert "code" in message and "was not loaded" in message
    assert not target.exists()
    if writer.startswith("pickle"):  # the test would notice: without the precaution the code does run
        pickle.loads(data)
        assert target.exists()


def test_whole_module(tmp_path):
    path = tmp_path / "model.pth"
    torch.save(nn.Linear(2, 2), path)
    assert "holds code (torch.nn.modules.linear.Linear) and was not loaded" in refusal(path)


@pytest.mark.parametrize("content", [[1, 2], 3.5, {}, {"state_dict": {}}, {"state_dict": [1]}, {1: torch.zeros(2)}],
                         ids=repr)
def test_no_state_dict(tmp_path, content):
    path = tmp_path / "file.pth"
    torch.save(content, path)
    assert "holds no state_dict" in refusal(path)


def test_other_networks(tmp_path, published):
    path = tmp_path / "file.pth"
    torch.save({"blocks.0.weight": torch.zeros(2), "epoch": 3}, path)
    assert "holds none of iresnet18, " in refusal(path) and "blocks.0.weight" in refusal(path)
    torch.save({name: value for name, value in published.items() if "prelu" not in name}, path)
    message = refusal(path)
    assert "iresnet18" in message
    assert "missing prelu.weight, layer1.0.prelu.weight, layer1.1.prelu.weight and 6 more" in message


def test_missing_and_unexpected_names(tmp_path, small):
    path = tmp_path / "file.pth"
    weights = {name: value for name, value in small.items() if name not in ("stem.0.weight", "features.bias")}
    torch.save({**weights, "gate.weight": torch.zeros(3), "gate.num_batches_tracked": torch.tensor(0)}, path)
    message = refusal(path)
    assert "missing stem.0.weight, features.bias; unexpected gate.weight, gate.num_batches_tracked" in message


@pytest.mark.parametrize("extra, accepted", [
    ("arcface_linear.weight", True), ("classifier.weight", True), ("classifier.bias", True),
    ("head.weight", False), ("weight", False), ("classifier.0.weight", False), ("fc2.weight", False),
])
def test_only_a_classifier_may_lie_beside_the_backbone(tmp_path, small, extra, accepted):
    path = tmp_path / "file.pth"
    torch.save({**small, extra: torch.zeros(5, 16)}, path)
    if accepted:
        assert load_backbone(str(path))[1] == "mobilefacenet"
    else:
        assert f"unexpected {extra}" in refusal(path)


def test_same_weights_twice(tmp_path, small):
    path = tmp_path / "file.pth"
    torch.save(small | prefixed(small), path)
    assert "with and without 'module.'" in refusal(path)


@pytest.mark.parametrize("name, value, said", [
    ("fc.weight", torch.zeros(16, 100), "fc.weight (16, 100) instead of (16, 512)"),
    ("features.bias", torch.zeros(8), "fc.weight (16, 512) instead of (8, 512)"),
    ("features.bias", torch.zeros(()), "instead of (512,)"),
    ("features.bias", torch.zeros(0), "instead of (512,)"),
    ("stem.0.weight", torch.zeros(64, 3, 3, 3, dtype=torch.int8), "stem.0.weight (64, 3, 3, 3) integer instead of"),
    ("stem.1.bias", torch.zeros(64).to_sparse(), "stem.1.bias (64,) sparse instead of (64,)"),
    ("stem.1.bias", "text", "stem.1.bias str instead of (64,)"),
])
def test_wrong_shapes(tmp_path, small, name, value, said):
    path = tmp_path / "file.pth"
    torch.save({**small, name: value}, path)
    message = refusal(path)
    assert "wrong shapes for mobilefacenet" in message and said in message


def test_another_arch_than_asked_for(tmp_path, small):
    path = tmp_path / "file.pth"
    torch.save(small, path)
    assert "holds mobilefacenet, but --arch says iresnet50" in refusal(path, "iresnet50")
    with pytest.raises(UserError, match="--arch resnet50 is unknown; choose one of iresnet18, "):
        load_backbone(str(path), "resnet50")


def test_file_that_says_what_it_is_not(tmp_path, small):
    path = tmp_path / "file.pth"
    torch.save(as_checkpoint(small, "iresnet18", 16), path)
    assert "says that it is iresnet18, but holds mobilefacenet" in refusal(path)
    torch.save(as_checkpoint(small, "mobilefacenet", 512), path)
    assert "says embedding size 512, but holds 16" in refusal(path)
    torch.save(as_checkpoint(small, "another program's name", 16), path)
    assert load_backbone(str(path))[1] == "mobilefacenet"
