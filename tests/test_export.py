"""scripts/export.py: what it writes, other programs and this one read."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import ROOT, run
from helpers.exported import NAMES, SHARDED, backbone_of, centers, export, export_to, make_checkpoint, save

from utils.checkpoint.weights import Weights, open_weights
from utils.dist.sharding import ClassShard
from utils.errors import UserError


@pytest.fixture(scope="module")
def checkpoint(pools, tmp_path_factory) -> Path:
    return make_checkpoint(pools, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def torchshard_file(checkpoint) -> Path:
    return export_to(checkpoint, "torchshard", checkpoint.parent / "torchshard.pth.tar")


@pytest.fixture(scope="module")
def safetensors_file(checkpoint) -> Path:
    pytest.importorskip("safetensors")
    return export_to(checkpoint, "safetensors", checkpoint.parent / "all.safetensors", "--centers")


def test_torchshard_file(checkpoint, torchshard_file):
    contents = torch.load(torchshard_file, weights_only=True)
    assert contents["epoch"] == 0 and contents["arch"] == "mobilefacenet" and contents["identities"] == NAMES
    entries = contents["state_dict"]
    assert all(name.startswith("module.") for name in entries)
    np.testing.assert_array_equal(entries["module.arcface_linear.weight"].numpy(), centers(11, 1))
    assert {f"module.{name}" for name in backbone_of(checkpoint)} == entries.keys() - {"module.arcface_linear.weight"}
    assert_same_backbone(torchshard_file, checkpoint)


@pytest.mark.slow
def test_insightface_and_safetensors_files(checkpoint, safetensors_file, tmp_path):
    path = export_to(checkpoint, "insightface", tmp_path / "backbone.pth")
    assert torch.load(path, weights_only=True).keys() == backbone_of(checkpoint).keys()
    for file in (path, export_to(checkpoint, "safetensors", tmp_path / "backbone.safetensors"), safetensors_file):
        assert_same_backbone(file, checkpoint)
    from safetensors import safe_open

    with safe_open(safetensors_file, framework="np") as file:
        np.testing.assert_array_equal(file.get_tensor("arcface_linear.weight"), centers(11, 1))
        assert file.metadata()["arch"] == "mobilefacenet"
    with safe_open(tmp_path / "backbone.safetensors", framework="np") as file:
        assert "arcface_linear.weight" not in file.keys()


def assert_same_backbone(path: Path, expected: Path) -> None:
    assert open_weights(str(path)).arch == open_weights(str(expected)).arch
    found = backbone_of(path)
    for name, tensor in backbone_of(expected).items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.slow
def test_onnx_file(checkpoint, tmp_path, monkeypatch, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = export_to(checkpoint, "onnx", tmp_path / "backbone.onnx")
    assert "onnxruntime agrees with PyTorch" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (network_input,), (output,) = session.get_inputs(), session.get_outputs()
    assert (network_input.name, network_input.shape[1:], output.name) == ("input", [3, 112, 112], "embedding")
    assert isinstance(network_input.shape[0], str)
    assert str(ROOT).encode() not in path.read_bytes()  # nothing of where it was made
    backbone = open_weights(str(checkpoint)).backbone
    images = torch.rand(7, 3, 112, 112)
    with torch.inference_mode():
        np.testing.assert_allclose(session.run(None, {"input": images.numpy()})[0], backbone(images).numpy(), atol=1e-3)
    # Another network than the one asked for does not get the name.
    written = path.read_bytes()
    with torch.no_grad():
        next(backbone.parameters()).mul_(1.5)
    monkeypatch.setattr(export, "export_onnx", lambda _, temporary: Path(temporary).write_bytes(written))
    weights = Weights(backbone, "mobilefacenet", 0, None, None)
    monkeypatch.setattr(export, "open_weights", lambda *_, **__: weights)
    with pytest.raises(UserError, match="onnxruntime's embeddings differ from PyTorch's"):
        export_to(checkpoint, "onnx", tmp_path / "wrong.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["backbone.onnx"]


def data_bytes() -> int:
    """What counts against RLIMIT_DATA: memory of the process's own, not files that are mapped into it."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")]
    return int(line.split()[1]) * 1024


@pytest.mark.slow
def test_no_process_holds_the_classifier(pools, tmp_path):
    """A process that may allocate 48 MiB exports a classifier of 117 MiB, and reads a third of it."""
    num_classes = 60_000
    pools(2).run(save, str(tmp_path), num_classes, [], SHARDED)
    checkpoint = tmp_path / "checkpoint.pth.tar"
    export_to(checkpoint, "insightface", tmp_path / "warm-up.pth")  # what is imported and allocated once
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    shard = ClassShard(num_classes, 1, 3)
    mine = torch.zeros(shard.size, 512)
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + 48 * 2**20, limits[1]))
    try:
        with pytest.raises((RuntimeError, MemoryError)):  # the limit is one
            torch.zeros(num_classes, 512)
        export_to(checkpoint, "torchshard", tmp_path / "exported.pth.tar")
        open_weights(str(checkpoint), with_centers=True).centers.copy_rows(np.arange(shard.start, shard.stop), mine)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    expected = torch.from_numpy(centers(num_classes, 1))
    assert torch.equal(mine, expected[shard.start:shard.stop])
    exported = torch.load(tmp_path / "exported.pth.tar", weights_only=True, mmap=True)
    assert torch.equal(exported["state_dict"]["module.arcface_linear.weight"], expected)


@pytest.mark.parametrize(("arguments", "words"), [
    (["--format", "onnx", "--output", "x.onnx"], "required: --resume"),
    (["--resume", "x", "--output", "x.onnx"], "required: --format"),
    (["--resume", "x", "--format", "onnx"], "required: --output"),
    (["--resume", "x", "--format", "onnx", "--output", "x.pth"], "ends in .onnx"),
    (["--resume", "x", "--format", "safetensors", "--output", "x.pth"], "ends in .safetensors"),
    (["--resume", "x", "--format", "onnx", "--output", "x.onnx", "--centers"], "--centers with --format onnx"),
    (["--resume", "x", "--format", "onnx", "--output", "x.onnx", "-a", "vgg"], "--arch vgg is unknown"),
    (["--resume", "x", "--format", "tflite", "--output", "x"], "--format tflite: choose one of"),
])
def test_mistakes_on_the_command_line(arguments, words):
    with pytest.raises(UserError, match=words):
        export.parse_options(arguments)


def test_what_cannot_be_exported(checkpoint, tmp_path, monkeypatch):
    backbone = export_to(checkpoint, "insightface", tmp_path / "backbone.pth")
    with pytest.raises(UserError, match="no class centers.*--format torchshard"):
        export_to(backbone, "torchshard", tmp_path / "x")
    with pytest.raises(UserError, match="there is no directory"):
        export_to(backbone, "torchshard", tmp_path / "nowhere" / "x")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    with pytest.raises(UserError, match="the package onnxruntime is missing.*pip install -r scripts/requirements.txt"):
        export_to(backbone, "onnx", tmp_path / "x.onnx")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match="the package safetensors is missing"):
        open_weights(str(tmp_path / "x.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["backbone.pth"]


def test_an_export_never_replaces_the_checkpoint(checkpoint, tmp_path):
    state = checkpoint.resolve()
    before = state.read_bytes()
    for source in (checkpoint, state):
        with pytest.raises(UserError, match="is the same file as"):
            export_to(source, "insightface", state, "--force")
    (tmp_path / "x.pth").write_text("a file in use")
    with pytest.raises(UserError, match="exists.*--force"):
        export_to(checkpoint, "insightface", tmp_path / "x.pth")
    assert state.read_bytes() == before and (tmp_path / "x.pth").read_text() == "a file in use"
    export_to(checkpoint, "insightface", tmp_path / "x.pth", "--force")


@pytest.mark.slow
def test_export_as_a_program(checkpoint, tmp_path):
    output = run("scripts/export.py", "--resume", checkpoint, "--format", "torchshard",
                 "--output", tmp_path / "x.pth.tar")
    assert "mobilefacenet of" in output and "backbone and 11 class centers" in output
