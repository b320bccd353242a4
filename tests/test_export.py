"""scripts/export.py: what it writes, other programs and this one read."""

from __future__ import annotations

import contextlib
import re
import resource
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import ROOT, run
from helpers.exported import NAMES, SHARDED, backbone_of, centers, export, export_to, make_checkpoint, save
from helpers.pool import Pool
from PIL import Image
from torch import nn

from data.augment import prepare_batch
from data.decode import read_image
from scripts.synthetic import draw_face
from utils.checkpoint.weights import Weights, open_weights, weights_fingerprint
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
    opened = [open_weights(str(file)) for file in (path, expected)]
    assert opened[0].arch == opened[1].arch
    assert len({weights_fingerprint(weights.backbone) for weights in opened}) == 1
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
    monkeypatch.setattr(export, "export_onnx", lambda _, temporary, example: Path(temporary).write_bytes(written))
    weights = Weights(backbone, "mobilefacenet", 0, None, None)
    monkeypatch.setattr(export, "open_weights", lambda *_, **__: weights)
    with pytest.raises(UserError, match="onnxruntime's embeddings differ from PyTorch's"):
        export_to(checkpoint, "onnx", tmp_path / "wrong.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["backbone.onnx"]


def options(*flags: str) -> export.Options:
    return export.parse_options(["--resume", "x", "--format", "onnx", "--output", "x.onnx", *flags])


@pytest.mark.parametrize("kind", ["float", "uint8"])
@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("normalize", [False, True])
def test_what_the_exported_network_takes_and_gives(kind, order, normalize):
    """By hand: the network gets what data.augment.prepare_batch gives, whatever the form of its input."""
    images = torch.randint(256, (3, 3, 112, 112), dtype=torch.uint8)
    seen = []

    class Backbone(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x.mean((2, 3)) * 7

    chosen = options("--input", kind, "--input-order", order, *["--normalize"] * normalize)
    given = export.to_input(images, chosen)
    assert given.shape == ((3, 112, 112, 3) if kind == "uint8" else (3, 3, 112, 112)) and given.is_contiguous()
    assert given.dtype == (torch.uint8 if kind == "uint8" else torch.float32)
    blue = given[..., 0] if kind == "uint8" else given[:, 0] * 127.5 + 127.5  # of BGR images the first channel
    torch.testing.assert_close(blue.float(), images[:, 2 if order == "bgr" else 0].float(), rtol=0, atol=1e-4)
    embeddings = export.deployed(Backbone(), chosen)(given)
    torch.testing.assert_close(seen[0], prepare_batch(images, torch.float32), rtol=0, atol=1e-6)
    expected = prepare_batch(images, torch.float64).mean((2, 3)) * 7
    if normalize:
        expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(embeddings.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_onnx_for_deployment(checkpoint, tmp_path, monkeypatch, capsys):
    """uint8 BGR in, embeddings of length 1 out; and the same in int8, calibrated on drawn faces."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    faces, lines = tmp_path / "faces", []
    for person in range(6):
        (faces / str(person)).mkdir(parents=True)
        for number in range(4):
            draw_face(person, number).save(faces / str(person) / f"{number}.png")
        lines += [f"{person}/0.png {person}/1.png 1", f"{person}/2.png {(person + 1) % 6}/3.png 0"]
    (tmp_path / "pair.list").write_text("\n".join(lines))
    flags = ["--input", "uint8", "--input-order", "bgr", "--normalize"]
    kept = []

    def keep(source, *arguments):
        kept.append(Path(source).read_bytes())
        quantize(source, *arguments)

    quantize = export.quantize_onnx
    monkeypatch.setattr(export, "quantize_onnx", keep)
    path = export_to(checkpoint, "onnx", tmp_path / "int8.onnx", *flags, "--int8", str(faces), "--pair-list",
                     str(tmp_path / "pair.list"), "--imgs-root", str(faces))
    output = capsys.readouterr().out
    assert "calibrated on 24 images" in output and re.search(r"accuracy +\d\.\d{4} +\d\.\d{4}\n", output)
    cosines = re.search(r"both embeddings of 24 images: mean (\d\.\d{4}), least (\d\.\d{4})", output)

    backbone = open_weights(str(checkpoint)).backbone
    images = torch.stack([read_image(str(file)) for file in sorted(faces.rglob("*.png"))])
    with torch.inference_mode():
        expected = nn.functional.normalize(backbone(prepare_batch(images, torch.float32))).numpy()
    found = []
    for content in (kept[0], path.read_bytes()):
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        (network_input,), (network_output,) = session.get_inputs(), session.get_outputs()
        assert (network_input.type, network_input.shape[1:]) == ("tensor(uint8)", [112, 112, 3])
        assert (network_input.name, network_output.name) == ("input", "embedding")
        bgr = np.ascontiguousarray(images.numpy()[:, ::-1].transpose(0, 2, 3, 1))
        found.append(session.run(None, {"input": bgr})[0])
    np.testing.assert_allclose(found[0], expected, atol=2e-5)
    for embeddings in found:
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    cosine = np.sum(found[0] * found[1], axis=1)
    assert cosine.min() > 0.95  # random weights lose more than trained ones
    np.testing.assert_allclose([cosine.mean(), cosine.min()], [float(cosines[1]), float(cosines[2])], atol=2e-4)
    assert path.stat().st_size < 0.45 * len(kept[0])  # a quarter, and the scales

    with pytest.raises(UserError, match="--int8 .*nowhere: no such directory"):
        export_to(checkpoint, "onnx", tmp_path / "x.onnx", "--int8", str(tmp_path / "nowhere"))


def data_bytes() -> int:
    """What counts against RLIMIT_DATA: memory of the process's own, not files that are mapped into it."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")]
    return int(line.split()[1]) * 1024


def export_in_little_memory(rank: int, world_size: int, directory: str, num_classes: int) -> torch.Tensor:
    """The rows of a third of the centers."""
    checkpoint = Path(directory, "checkpoint.pth.tar")
    export_to(checkpoint, "insightface", Path(directory, "warm-up.pth"))  # what is imported and allocated once
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    shard = ClassShard(num_classes, 1, 3)
    mine = torch.zeros(shard.size, 512)
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + 72 * 2**20, limits[1]))
    try:
        with pytest.raises((RuntimeError, MemoryError)):  # the limit is one
            torch.zeros(num_classes, 512)
        export_to(checkpoint, "torchshard", Path(directory, "exported.pth.tar"))
        open_weights(str(checkpoint), with_centers=True).centers.copy_rows(np.arange(shard.start, shard.stop), mine)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    return mine


@pytest.mark.slow
def test_no_process_holds_the_classifier(pools, tmp_path):
    """A process that may allocate 72 MiB exports a classifier of 117 MiB, and reads a third of it. A new process: one
    that has run other tests may hold memory that it freed, in pieces."""
    num_classes = 60_000
    pools(2).run(save, str(tmp_path), num_classes, [], SHARDED)
    with contextlib.closing(Pool(1)) as pool:
        [mine] = pool.run(export_in_little_memory, str(tmp_path), num_classes)
    shard = ClassShard(num_classes, 1, 3)
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
    (["--resume", "x", "--format", "insightface", "--output", "x", "--input", "uint8"], "--input with --format"),
    (["--resume", "x", "--format", "insightface", "--output", "x", "--input-order", "bgr"], "--input-order with"),
    (["--resume", "x", "--format", "safetensors", "--output", "x", "--normalize"], "--normalize with --format safeten"),
    (["--resume", "x", "--format", "torchshard", "--output", "x", "--int8", "d"], "--int8 with --format torchshard"),
    (["--resume", "x", "--format", "onnx", "--output", "x.onnx", "--input", "int4"], "--input int4: choose one of"),
    (["--resume", "x", "--format", "onnx", "--output", "x.onnx", "--pair-list", "p"], "p: .* without --int8"),
    (["--resume", "x", "--format", "onnx", "--output", "x.onnx", "--int8", "d", "--pair-list", "p"],
     "--pair-list p: has no effect without --imgs-root"),
    (["--resume", "x", "--format", "onnx", "--output", "x.onnx", "--imgs-root", "d"],
     "--imgs-root d: has no effect without --pair-list"),
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


@pytest.mark.parametrize(("lines", "words"), [
    ("a.jpg b.jpg 1\na.jpg a.jpg 1\n", "2 same .label 1. and 0 different"),
    ("a.jpg b.jpg 1\nb.jpg a.jpg 1\na.jpg a.jpg 0\na.jpg bad.jpg 0\n", "bad.jpg"),
])
def test_pairs_that_cannot_be_used_are_found_before_the_export(checkpoint, tmp_path, monkeypatch, lines, words):
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module)
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (112, 112)).save(tmp_path / name)
    shutil.copytree(tmp_path, tmp_path / "calibration")
    (tmp_path / "bad.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:300])
    (tmp_path / "pair.list").write_text(lines)
    monkeypatch.setattr(export, "export_onnx", None)
    with pytest.raises(UserError, match=words):
        export_to(checkpoint, "onnx", tmp_path / "x.onnx", "--int8", str(tmp_path / "calibration"), "--pair-list",
                  str(tmp_path / "pair.list"), "--imgs-root", str(tmp_path))


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
