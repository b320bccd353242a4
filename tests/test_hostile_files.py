"""Claims in damaged or hostile files are checked before they cost memory or time."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.images import encode, make_folder, smooth_image, smooth_pixels
from helpers.packages import LABELS, im2rec, insightface, write
from helpers.published import random_weights, shapes

from data.cache import _HEAD, _MAGIC, read_cache, save_cache
from data.decode import MAX_IMAGE_BYTES, check_encoded, check_header, decode_image, decode_into, read_bytes
from data.folder import FaceFolder
from data.insightface_bin import PairBin, _Call, _Name
from data.pairs import PairList
from data.recordio import RecordIODataset
from models import build_backbone
from scripts import pack
from utils.checkpoint.layout import DamagedCheckpoint, newest_first, read_manifest
from utils.checkpoint.safe_load import load_tensor
from utils.checkpoint.shards import open_shards
from utils.checkpoint.weights import open_weights
from utils.errors import UserError, escape_output, printable

GIB = 2**30


def test_a_call_in_a_bin_file_takes_no_more_arguments_than_numpy_writes():
    assert _Name("scalar")(1, 2, 3, 4).arguments == (1, 2, 3, 4)
    with pytest.raises(ValueError, match="numpy"):
        _Name("scalar")(*b"12345")


@pytest.mark.parametrize("shape", [(2, 2), (4.0,), ([4],), ([0] * 10,), (-2, -2), (2**40, 2**40), "four"])
def test_an_array_in_a_bin_file_has_the_shape_of_its_data(shape):
    dtype = _Call("dtype", ("u1",))
    dtype.state = (3, "|")
    array = _Call("_reconstruct", ())
    array.state = (1, shape, dtype, False, b"123")
    with pytest.raises((ValueError, TypeError)):
        array.array()
    array.state = (1, (1, 3), dtype, False, b"123")
    assert array.array().tobytes() == b"123"


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
    if zipped:  # torch finds the pickle by its name in capitals too
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "other.pth", "w") as target:
            for name in source.namelist():
                target.writestr(name.replace("data.pkl", "DATA.PKL"), source.read(name))
        with pytest.raises(UserError, match="bytearray"):
            open_weights(str(tmp_path / "other.pth"))


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


# ---------------------------------------------------------------------------------------------------------------------
# Files that never end, or are much larger than what they should hold


def sparse(path: Path, size: int, begin: bytes = b"") -> None:
    path.write_bytes(begin)
    os.truncate(path, size)


ENDLESS: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipe": (os.mkfifo, "a pipe, not a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "a device"),
    "large": (lambda path: sparse(path, 3 * GIB, encode(smooth_image(), "JPEG")), "has 3,221,225,472 bytes"),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_an_image_is_a_file_of_sensible_size(tmp_path, kind):
    make, message = ENDLESS[kind]
    root = make_folder(tmp_path, {"a": 1, "b": 1})
    make(root / "b" / "x.jpg")
    for read in (check_header, read_bytes):
        with pytest.raises(UserError, match=f"b/x.jpg: .*{message}"):
            read(str(root / "b" / "x.jpg"))
    with pytest.raises(UserError, match=f"b/x.jpg: .*{message}.*1 of 3 images is bad"):
        FaceFolder(root).check_headers(skip_bad=False, progress=False)


def test_a_link_to_an_image_is_an_image(tmp_path):
    root = make_folder(tmp_path / "data", {"a": 2})
    (root / "a" / "x.jpg").symlink_to(root / "a" / "000.jpg")
    folder = FaceFolder(root)
    assert folder.check_headers(skip_bad=False, progress=False) == 0 and len(folder) == 3
    assert torch.equal(folder[2][0], folder[0][0])


def fail_reading(path: Path, read: Callable[[], object], size: int = 2**40) -> str:
    """The common message of a pipe and of a huge file in the place of `path`."""
    whole = path.read_bytes()
    for make, message in ((os.mkfifo, "pipe"), (lambda path: sparse(path, size, whole), f"has {size:,} bytes")):
        path.unlink()
        make(path)
        with pytest.raises(UserError, match=f"{path.name}.*{message}"):
            read()
    path.unlink()
    path.write_bytes(whole)


def test_lists_and_sets_are_files_of_sensible_size(tmp_path):
    root = make_folder(tmp_path / "data", {"a": 2, "b": 2})
    pairs, packed, packed_bin = tmp_path / "pair.list", tmp_path / "rec", tmp_path / "x.bin"
    pairs.write_text("a/000.jpg a/001.jpg 1\n")
    fail_reading(pairs, lambda: PairList(root, pairs))
    pack.main(["bin", "--imgs-root", str(root), "--pair-list", str(pairs), str(packed_bin)])
    fail_reading(packed_bin, lambda: PairBin(packed_bin))
    pack.main(["rec", str(root), str(packed)])
    fail_reading(packed / "train.idx", lambda: RecordIODataset(packed, index="none"))
    fail_reading(packed / "train.identities.txt", lambda: RecordIODataset(packed, index="none"))
    fail_reading(packed / "train.files.txt", lambda: pack.main(["folder", str(packed), str(tmp_path / "out")]))
    assert len(RecordIODataset(packed, index="none")) == 4


@pytest.mark.parametrize("length", [2**29 - 1, 4096, 1])
def test_a_length_in_a_record_goes_nowhere(tmp_path, length):
    write(tmp_path, im2rec())
    rec = bytearray((tmp_path / "train.rec").read_bytes())
    rec[4:8] = struct.pack("<I", length)
    (tmp_path / "train.rec").write_bytes(rec)
    for _ in range(2):
        with pytest.raises(UserError, match=r"train.rec: record \d at offset"):
            RecordIODataset(tmp_path, index="none")
        (tmp_path / "train.idx").unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Images that inflate


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


PNG = encode(smooth_image(), "PNG")
TEXT = png_chunk(b"zTXt", b"name\0\0" + zlib.compress(bytes(2**20)))  # 1 kB
PROFILE = png_chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(2**20 - 1)))


@pytest.mark.parametrize("chunk", [TEXT, PROFILE], ids=["text", "profile"])
def test_what_inflates_beside_the_pixels_of_a_png_is_not_read(chunk):
    image = PNG[:33] + 5000 * chunk + PNG[33:-12] + 5000 * chunk + PNG[-12:]
    assert len(image) < MAX_IMAGE_BYTES
    begun, pixels = time.process_time(), torch.empty(3, 112, 112, dtype=torch.uint8)
    check_encoded(image, "x.png")
    decode_into(image, "x.png", pixels)
    assert time.process_time() - begun < 2  # 0.05 on a quiet machine; the chunks inflate to 10 GB
    assert np.array_equal(pixels.permute(1, 2, 0), smooth_pixels())


@pytest.mark.parametrize("kept", [8, 20, 33, 40, len(PNG) // 2, len(PNG) - 13])
def test_a_truncated_png_is_still_found(kept):
    with pytest.raises(UserError, match="x.png"):
        decode_image(PNG[:kept], "x.png")


def hidden_size() -> bytes:
    """A JPEG of 112x112 for who takes the two bytes after a bare marker for a length, and for libjpeg a large one."""
    large = bytearray(encode(smooth_image(), "JPEG"))
    at = large.index(b"\xff\xc0")
    large[at + 5 : at + 9] = struct.pack(">HH", 9000, 9000)
    begin = b"\xff\xd8\xff\xd0" + large[2:]  # RST0 before APP0, whose marker 0xFFE0 then is the length
    return begin.ljust(4 + 0xFFE0, b"\0") + b"\xff\xc0\0\x11\x08" + struct.pack(">HH", 112, 112) + b"\3" + bytes(99)


def large_png(size: int) -> bytes:
    header = struct.pack(">II", size, size) + PNG[24:29]
    return PNG[:8] + png_chunk(b"IHDR", header) + PNG[33:]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # in a program decode.py does that
@pytest.mark.parametrize("image", [hidden_size(), large_png(10_000), large_png(100_000)], ids=["hidden", "10k", "100k"])
def test_an_image_of_another_size_is_not_decoded(tmp_path, monkeypatch, image):
    monkeypatch.setattr("data.decode.jpeg_operator", lambda: lambda *_: pytest.fail("it is decoded"))
    for read in (check_encoded, decode_image, lambda image, name: decode_into(image, name, torch.empty(3, 112, 112))):
        with pytest.raises(UserError, match="x: (the image is|not a)"):
            read(image, "x")
    write(tmp_path, im2rec(labels=[0], images=[image]))
    with pytest.raises(UserError, match="record 0"):
        RecordIODataset(tmp_path, index="none").check_headers(skip_bad=False, progress=False)


# ---------------------------------------------------------------------------------------------------------------------
# Indexes: their checksums can be right, because whoever writes the data can write them too


def index_file(path: Path, header: object, content: bytes = b"") -> None:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(_HEAD.pack(_MAGIC, zlib.crc32(text), len(text)) + text + content)


@pytest.mark.parametrize("header", [
    [], {}, {"made_from": [], "arrays": []}, {"made_from": [], "arrays": {"a": ["|u1", [2]]}},
    *({"made_from": [], "arrays": {"a": [dtype, shape, 0]}} for dtype, shape in (
        ("|O", [1]), ("<U1000000000", [1]), (["<i4"], [1]), ("({", [1]), ("|u1", [-1]), ("|u1", "11"), ("|u1", [True]),
        ("|u1", [2**70]), ("|u1", [2**40, 0]), ("|u1", 1), (None, [1]))),
])
def test_the_header_of_an_index_is_checked(tmp_path, header):
    path = tmp_path / "index"
    index_file(path, header, b"\0\0")
    with pytest.raises(ValueError, match="it is|its header"):
        read_cache(str(path))


def test_an_index_is_a_file_of_the_size_that_its_header_says(tmp_path):
    path = tmp_path / "index"
    sparse(path, 2**40, _HEAD.pack(_MAGIC, 0, 2**32 - 1))
    with pytest.raises(ValueError, match="its header is damaged"):
        read_cache(str(path))
    index_file(path, {"made_from": [], "arrays": {"a": ["|u1", [2**40], 0]}})
    os.truncate(path, 2**40)  # its zeros would be read for minutes
    with pytest.raises(ValueError, match="truncated"):
        read_cache(str(path))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="pipe"):
        read_cache(str(path))


def change(name: str, value: object) -> Callable[[dict], None]:
    return lambda arrays: arrays.update({name: np.asarray(value)})


FOLDER_CHANGES = [
    change("first_image", np.array([0, 9, 4])), change("first_image", np.array([0, 2, 5])),
    change("first_byte", np.array([-1, 14, 28])), change("first_image", np.array([0, 2])),
    change("name_ends", np.zeros(4)), change("header_is_good", np.zeros(3, np.uint8)),
    change("stamps", np.zeros(4, np.int64)), lambda arrays: arrays.pop("image_names"),
    lambda arrays: arrays.pop("name_ends"), lambda arrays: arrays.pop("directory_ends"),
]


@pytest.mark.parametrize("number", range(len(FOLDER_CHANGES)))
def test_an_index_of_a_folder_whose_arrays_do_not_fit_is_replaced(tmp_path, monkeypatch, number):
    monkeypatch.setattr("data.folder._SETTLED_SECONDS", 0.0)
    root = make_folder(tmp_path / "data", {"a": 2, "b": 2})
    expected = [FaceFolder(root, index=tmp_path / "index").path(i) for i in range(4)]
    whole = read_cache(str(tmp_path / "index"))
    arrays = dict(whole.arrays)
    FOLDER_CHANGES[number](arrays)
    save_cache(whole.made_from, arrays, [str(tmp_path / "index")], progress=False)
    folder = FaceFolder(root, index=tmp_path / "index")
    assert [folder.path(i) for i in range(len(folder))] == expected
    assert folder.check_headers(skip_bad=False, progress=False) == 0
    assert read_cache(str(tmp_path / "index")).has(name_ends=("<u4", (4,)), stamps=("<i8", (2, 2)))


PACKAGE_CHANGES = [
    change("labels", np.full(9, 3, np.int32)), change("labels", np.full(9, -1, np.int32)),
    change("labels", np.zeros(8, np.int32)), change("labels", np.zeros(9)), change("labels", np.zeros(0, np.int32)),
    change("num_classes", np.array([2**24 + 1])), change("num_classes", np.array([0])),
    change("num_classes", np.zeros(0, np.int64)), change("bad", np.array([9])), change("bad", np.array([-1])),
    change("bad", np.array([3, 3])), change("offsets", np.zeros((9, 1), np.int64)), change("sizes", np.zeros(9)),
    lambda arrays: arrays.pop("keys"), lambda arrays: arrays.pop("labels"), lambda arrays: arrays.pop("bad"),
]


@pytest.mark.parametrize("number", range(len(PACKAGE_CHANGES)))
def test_an_index_of_a_package_whose_arrays_do_not_fit_is_replaced(tmp_path, number):
    write(tmp_path, insightface())
    path = tmp_path / "train.rec.index"
    RecordIODataset(tmp_path)
    whole = read_cache(str(path))
    arrays = dict(whole.arrays)
    PACKAGE_CHANGES[number](arrays)
    save_cache(whole.made_from, arrays, [str(path)], progress=False)
    dataset = RecordIODataset(tmp_path)
    assert dataset.labels.tolist() == LABELS and len(dataset.identities) == 3
    assert dataset.check_headers(skip_bad=False, progress=False) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Names


def test_names_are_printed_without_effect():
    assert printable("Gökçe 山田 \u200d a/b.jpg") == "Gökçe 山田 \u200d a/b.jpg"
    assert printable("a\x1b[2J\nerror: \x07\x9b\u202e\udcff\u2028") == (
        r"a\x1b[2J\nerror: \x07\x9b\u202e\udcff\u2028")


def test_what_a_process_prints_has_no_control_characters_but_ends_of_lines(monkeypatch):
    content = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(content, "utf-8", write_through=True))
    for _ in range(2):
        escape_output()
    print("name \x1b]0;title\x07\r\n\tGökçe\x1b[A")
    print("name \x1b[31m", file=sys.stderr)
    assert content.getvalue().decode() == "name \\x1b]0;title\\x07\r\n\tGökçe\x1b[A\nname \\x1b[31m\n"
