"""Claims in damaged or hostile files are checked before they cost memory or time."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.published import random_weights, shapes

from data.insightface_bin import _Name
from models import build_backbone
from utils.checkpoint.layout import DamagedCheckpoint, newest_first, read_manifest
from utils.checkpoint.safe_load import load_tensor
from utils.checkpoint.shards import open_shards
from utils.checkpoint.weights import open_weights
from utils.errors import UserError


def test_a_call_in_a_bin_file_takes_no_more_arguments_than_numpy_writes():
    assert _Name("scalar")(1, 2, 3, 4).arguments == (1, 2, 3, 4)
    with pytest.raises(ValueError, match="numpy"):
        _Name("scalar")(*b"12345")


@pytest.mark.parametrize("name", ["/dev/zero", "../state.pth.tar", "shards/../../x"])
def test_a_manifest_names_files_of_its_checkpoint_only(tmp_path, name):
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {
        "state.pth.tar": [0, 0], "shards/.metadata": [0, 0], name: [0, 0]}}))
    with pytest.raises(DamagedCheckpoint, match="manifest.json"):
        read_manifest(str(tmp_path))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"saved_at": ' + "9" * 400 + "}", "{}"])
def test_a_damaged_manifest_does_not_end_the_search_for_checkpoints(tmp_path, text):
    step = tmp_path / "checkpoints" / "step-00000001"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text(text)
    assert newest_first(str(tmp_path)) == [str(step)]


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def deflated(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    return buffer.getvalue()


class Zeros:
    """Unpickled, it is a bytearray of any size."""

    def __reduce__(self):
        return bytearray, (2**34,)


def test_compressed_weights_are_refused_before_they_are_read(tmp_path):
    data = deflated(saved({"fc.weight": torch.zeros(2**20)}))
    path = tmp_path / "backbone.pth"
    path.write_bytes(data)
    with pytest.raises(UserError, match="is compressed"):
        open_weights(str(path))
    with pytest.raises(ValueError, match="is compressed"):
        load_tensor(data)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_cannot_ask_for_zeros(tmp_path, zipped):
    path = tmp_path / "backbone.pth"
    torch.save({"state_dict": Zeros()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="bytearray"):
        open_weights(str(path))


HUGE = torch.zeros(1, 1).expand(2**40, 16)


@pytest.mark.parametrize("centers", [HUGE, torch.zeros(5, 16).to_sparse(),
                                     torch.zeros(5, 16).to(torch.int8), torch.zeros(5, 16, device="meta")])
def test_class_centers_that_a_file_does_not_contain(tmp_path, centers):
    path = tmp_path / "backbone.pth"
    weights = random_weights(shapes(build_backbone("mobilefacenet", 16)))
    torch.save({**weights, "arcface_linear.weight": centers}, path)
    with pytest.raises(UserError, match="arcface_linear.weight is not a matrix"):
        open_weights(str(path), with_centers=True)
    torch.save({"state_dict": weights, "embedding_size": 10**9}, path)
    with pytest.raises(UserError, match="embedding size of 1000000000"):
        open_weights(str(path))
    with pytest.raises((ValueError, RuntimeError)):
        load_tensor(saved(centers))


@pytest.mark.parametrize("data", [
    b"\x80\x05\x96" + struct.pack("<Q", 2**36) + b".",  # BYTEARRAY8
    b"\x80\x04\x8e" + struct.pack("<Q", 2**36) + b".",  # BINBYTES8
    b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".",  # LONG4
    b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b".",  # LONG_BINPUT: a memo index
    pickle.dumps(Zeros()),
])
def test_metadata_of_shards_takes_no_memory_that_it_claims(tmp_path, data):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/.metadata").write_bytes(data)
    before = peak_kib()
    with pytest.raises(DamagedCheckpoint):
        open_shards(str(tmp_path), ["centers"], (5, 16), {"shards/.metadata": (len(data), 0)})
    assert peak_kib() < before + 2**16


def peak_kib() -> int:
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1])


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_devices_and_pipes_are_not_weights(tmp_path, name):
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    path = tmp_path / name
    path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="a device or a pipe"):
        open_weights(str(path))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="a device or a pipe"):
        open_weights(str(path))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": 1}'])
def test_odd_identities_in_safetensors(tmp_path, text):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "x.safetensors"
    weights = random_weights(shapes(build_backbone("mobilefacenet", 16)))
    for names in (torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8), torch.zeros(3, dtype=torch.bfloat16)):
        safetensors.save_file({**weights, "identities.json": names}, path)
        with pytest.raises(UserError, match="damaged"):
            open_weights(str(path))


@pytest.mark.parametrize("place", ["state.pth.tar", "manifest.json"])
def test_a_checkpoint_with_a_pipe_is_damaged(tmp_path, place):
    step = tmp_path / "checkpoints" / "step-00000001"
    (step / "shards").mkdir(parents=True)
    files = {"state.pth.tar": [0, 0], "shards/.metadata": [0, 0]}
    for name, text in {"state.pth.tar": "", "shards/.metadata": "", "manifest.json": json.dumps(
            {"files": files})}.items():
        os.mkfifo(step / name) if name == place else (step / name).write_text(text)
    assert newest_first(str(tmp_path)) == [str(step)]
    with pytest.raises(DamagedCheckpoint, match=f"{place}.*a device or a pipe"):
        read_manifest(str(step))
