"""Backbones in files: published ones, checkpoints of this program, and others. No code in a file is executed."""

from __future__ import annotations

import argparse
import datetime
import io
import os
import pickle
import zipfile
from collections import OrderedDict
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.published import BLOCKS, images, iresnet_entries, plain_iresnet, random_weights, relative_error, shapes
from torch import Tensor, nn

from models import build_backbone
from utils.checkpoint.safe_load import read_torch_file
from utils.checkpoint.weights import open_weights
from utils.errors import UserError

FILE_FEATURES = 32  # embedding size of the files written here: a small `fc` makes them small


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


@pytest.mark.slow
@pytest.mark.parametrize("form", PUBLISHED_FORMS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_published_iresnet_gives_its_embedding(tmp_path, published, published_embedding, form, zipped):
    path = str(tmp_path / "backbone.pth")
    torch.save(PUBLISHED_FORMS[form](published), path, _use_new_zipfile_serialization=zipped)
    random_state = torch.get_rng_state()
    weights = open_weights(path)
    model, arch = weights.backbone, weights.arch
    assert torch.equal(torch.get_rng_state(), random_state)
    assert arch == "iresnet18"
    assert model.embedding_size == FILE_FEATURES
    assert not model.training and not model.features.weight.requires_grad
    assert model.bn1.num_batches_tracked.item() == (0 if form == "without counters" else 7)
    os.remove(path)  # the module must not depend on the file any more
    with torch.no_grad():
        assert relative_error(model(images(1)), published_embedding) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["iresnet34", "iresnet50", "iresnet100", "iresnet200"])
def test_arch_and_embedding_size_from_names_and_shapes(tmp_path, arch):
    path = str(tmp_path / "backbone.pth")
    # One number per entry, expanded: the file is small, as torch.save writes the storage behind it.
    weights = {name: torch.full((1,), 0.5).expand(shape) if shape else torch.tensor(0)
               for name, shape in iresnet_entries(BLOCKS[arch], 4).items()}
    torch.save(weights, path)
    weights = open_weights(path)
    model, found = weights.backbone, weights.arch
    assert (found, model.embedding_size) == (arch, 4)
    assert (model.fc.weight == 0.5).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_mobilefacenet_file_of_any_precision(tmp_path, small, dtype):
    path = str(tmp_path / "checkpoint.pth.tar")
    stored = {name: value.to(dtype) if value.is_floating_point() else value for name, value in small.items()}
    torch.save(as_checkpoint(stored, "mobilefacenet", 16), path)
    weights = open_weights(path, "mobilefacenet")
    model, arch = weights.backbone, weights.arch
    assert (arch, model.embedding_size) == ("mobilefacenet", 16)
    for name, value in model.state_dict().items():
        assert value.dtype == small[name].dtype
        assert torch.equal(value, stored[name].to(value.dtype)), name


def refusal(path: object, arch: str | None = None) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(UserError) as caught:
        open_weights(str(path), arch)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 400 + len(str(path))
    return message


def test_missing_file_and_directory(tmp_path):
    assert "No such file" in refusal(tmp_path / "missing.pth.tar")
    assert "Is a directory" in refusal(tmp_path)
    (tmp_path / "checkpoint.pth.tar").touch()
    assert f"give the file in it, {tmp_path}/checkpoint.pth.tar" in refusal(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "No such file" in refusal(tmp_path / "link")


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
    assert "not a checkpoint" in refusal(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("part", [0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.99999])
def test_truncated(tmp_path, small, zipped, part):
    whole = saved(as_checkpoint(small, "mobilefacenet", 16), zipped)
    path = tmp_path / "checkpoint.pth.tar"
    path.write_bytes(whole[:int(part * len(whole))])
    assert "truncated" in refusal(path)


@pytest.mark.parametrize("wrap", [
    lambda w: {"state_dict_backbone": prefixed(w), "state_optimizer": {"state": {0: torch.zeros(3)}}, "epoch": 4},
    lambda w: {"_orig_mod." + name: value for name, value in w.items()},
    lambda w: {"state_dict": {f"model.backbone.module.{name}": value for name, value in w.items()}
               | {"model.head.weight": torch.zeros(5, 16), "loss.centers": torch.zeros(2)}, "hyper_parameters": {}},
    lambda w: {"model": w, "ema": {name: torch.zeros_like(value) for name, value in w.items()}},
    lambda w: {"net": {"state_dict": w}, "best": np.float64(0.25), "step": np.int64(7), "flag": np.bool_(True)},
    lambda w: {"ema": prefixed(w)},
])
def test_containers_of_other_programs(tmp_path, small, wrap):
    path = tmp_path / "backbone.pt"
    torch.save(wrap(small), path)
    found = open_weights(str(path), "mobilefacenet").backbone.state_dict()
    assert all(torch.equal(found[name], value) for name, value in small.items())


def test_class_centers_of_insightface(tmp_path, small):
    path, centers = tmp_path / "checkpoint_gpu_0.pt", torch.randn(5, 16)
    torch.save({"epoch": 1, "state_dict_backbone": small, "state_dict_softmax_fc": {"weight": centers}}, path)
    stored = open_weights(str(path), with_centers=True).centers
    assert torch.equal(torch.cat([rows for _, rows in stored.blocks()]), centers)


def test_two_backbones_in_a_file(tmp_path, small):
    path = tmp_path / "backbone.pth"
    torch.save({f"{who}.{name}": value for who in ("student", "teacher") for name, value in small.items()}, path)
    assert "'student.' and 'teacher.'" in refusal(path)


def test_numpy_scalars_become_numbers(tmp_path):
    values = {"a": np.float64(0.25), "b": np.int64(-7), "c": np.float32(1.5), "d": np.bool_(True), "e": np.uint8(3)}
    torch.save(values, tmp_path / "x.pth")
    found = read_torch_file(str(tmp_path / "x.pth"))
    assert found == {name: value.item() for name, value in values.items()}
    assert all(type(value) in (float, int, bool) for value in found.values())


@pytest.mark.parametrize("extra, name", [
    (datetime.date(2026, 1, 1), "datetime.date"), (argparse.Namespace(lr=1), "argparse.Namespace"),
    (np.zeros(3), "numpy._core.multiarray._reconstruct"),
])
def test_what_to_do_with_other_objects_beside_the_weights(tmp_path, small, extra, name):
    path = tmp_path / "backbone.pth"
    torch.save({"state_dict": small, "args": extra}, path)
    assert f"holds code ({name})" in (message := refusal(path)) and "weights_only=False" in message


def test_files_of_other_kinds_are_named(tmp_path, small):
    path = tmp_path / "backbone.pt"
    torch.jit.script(nn.Linear(2, 2)).save(path)
    assert "is a TorchScript file" in refusal(path) and "torch.jit.load" in refusal(path)
    for data, kind in ((b"\x08\x08\x12\x07pytorch", "is an ONNX file"), (b"version https://git-lfs", "git lfs pull"),
                       (b"<!DOCTYPE html>", "is a web page")):
        path.write_bytes(data)
        assert kind in refusal(path)


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
    if writer in ("zip", "legacy"):
        assert "holds code" in message and "was not loaded" in message
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


def test_no_state_dict_says_what_there_is(tmp_path):
    path = tmp_path / "file.pth"
    torch.save({"epoch": 3, "student": {"conv1.weight": torch.zeros(2)}}, path)
    assert "holds no state_dict, but epoch, student;" in refusal(path)


def test_other_networks(tmp_path, published):
    path = tmp_path / "file.pth"
    torch.save({"blocks.0.weight": torch.zeros(2), "epoch": 3}, path)
    assert "holds none of iresnet18, " in refusal(path) and "blocks.0.weight" in refusal(path)
    torch.save({name: value for name, value in published.items() if "prelu" not in name}, path)
    message = refusal(path)
    assert "iresnet18" in message
    assert 'Missing key(s) in state_dict: "prelu.weight", "layer1.0.prelu.weight"' in message


def test_missing_and_unexpected_names(tmp_path, small):
    path = tmp_path / "file.pth"
    weights = {name: value for name, value in small.items() if name not in ("stem.0.weight", "features.bias")}
    torch.save({**weights, "gate.weight": torch.zeros(3)}, path)
    message = refusal(path)
    assert 'Missing key(s) in state_dict: "stem.0.weight", "features.bias"' in message
    assert 'Unexpected key(s) in state_dict: "gate.weight"' in message


@pytest.mark.parametrize("extra, accepted", [
    ("arcface_linear.weight", True), ("classifier.weight", True), ("classifier.bias", True),
    ("head.weight", False), ("weight", False), ("classifier.0.weight", False), ("fc2.weight", False),
])
def test_only_a_classifier_may_lie_beside_the_backbone(tmp_path, small, extra, accepted):
    path = tmp_path / "file.pth"
    torch.save({**small, extra: torch.zeros(5, 16)}, path)
    if accepted:
        assert open_weights(str(path)).arch == "mobilefacenet"
    else:
        assert f'Unexpected key(s) in state_dict: "{extra}"' in refusal(path)


@pytest.mark.parametrize("name, value, said", [
    ("fc.weight", torch.zeros(16, 100), "size mismatch for fc.weight"),
    ("features.bias", torch.zeros(8), "size mismatch for fc.weight"),
    ("features.bias", torch.zeros(()), "size mismatch for fc.weight"),
    ("features.bias", torch.zeros(0), "size mismatch for fc.weight"),
    ("stem.0.weight", torch.zeros(64, 3, 3, 3, dtype=torch.int8), "stem.0.weight is not a tensor of floating"),
    ("stem.1.bias", torch.zeros(64).to_sparse(), "stem.1.bias"),
    ("stem.1.bias", "text", "stem.1.bias is not a tensor of floating"),
])
def test_wrong_shapes(tmp_path, small, name, value, said):
    path = tmp_path / "file.pth"
    torch.save({**small, name: value}, path)
    message = refusal(path)
    assert "mobilefacenet" in message and said in message


def test_another_arch_than_asked_for(tmp_path, small):
    path = tmp_path / "file.pth"
    torch.save(small, path)
    assert "holds mobilefacenet, but --arch says iresnet50" in refusal(path, "iresnet50")
    with pytest.raises(UserError, match="--arch resnet50 is unknown; choose one of iresnet18, "):
        open_weights(str(path), "resnet50")


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("unable to mmap 9843897 bytes from file <x>: Cannot allocate memory (12)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ..."),
])
def test_a_lack_of_memory_is_not_called_damage(tmp_path, error):
    torch.save({"state_dict": {}}, path := tmp_path / "weights.pth")
    words = r"there is not enough memory \(.+\); free some"
    with mock.patch("torch.load", side_effect=error), pytest.raises(UserError, match=words):
        open_weights(str(path))
