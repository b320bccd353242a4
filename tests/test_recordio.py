import contextlib
import os
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.images import JPEG_KINDS, REAL_FACES, encode, smooth_image
from helpers.packages import JPEGS, LABELS, MAGIC, frame, im2rec, insightface, record, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
from data import cache, recordio
from data.decode import decode_image
from data.folder import FaceFolder
from data.loader import GlobalBatchSampler, build_train_loader
from data.record_format import image_record, labels_record, read_idx
from data.recordio import RecordIODataset
from utils.errors import UserError

LAYOUTS = {
    "insightface": insightface(),
    "insightface, one label": insightface(two_labels=False),
    "im2rec": im2rec(),
    "im2rec, shuffled": [im2rec()[k] for k in (3, 0, 8, 1, 7, 2, 6, 4, 5)],
    "record 0 in front": [insightface()[9], *insightface()[:9], *insightface()[10:]],
}


@pytest.mark.parametrize("idx", [True, False], ids=["idx", "no idx"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout, idx):
    dataset = RecordIODataset(write(tmp_path, LAYOUTS[layout], idx))
    assert len(dataset) == 9 and dataset.identities == ["0", "1", "2"] and dataset.skip_bad is False
    assert dataset.root == f"{tmp_path}/train.rec"
    assert dataset.labels.dtype == np.int64 and dataset.labels.tolist() == LABELS
    assert dataset.check_headers(skip_bad=False, progress=False) == 0
    assert [dataset.encoded(i)[0] for i in range(9)] == JPEGS
    for i, (image, label) in enumerate(dataset[i] for i in range(9)):
        assert torch.equal(image, decode_image(JPEGS[i], "")) and label == LABELS[i] and type(label) is int
    with pytest.raises(IndexError):
        dataset[9]
    key = 4 + ("im2rec" not in layout)
    name = dataset.encoded(4)[1]
    assert re.fullmatch(re.escape(f"{tmp_path}/train.rec: record {key} at offset ") + "[0-9]+", name)
    offset = int(name.split()[-1])
    assert (tmp_path / "train.rec").read_bytes()[offset:].startswith(frame(dict(LAYOUTS[layout])[key][8:])[:4])
    if not idx:  # it has been made, as it was
        made, lines = (
            tmp_path / "train.idx",
            [line.split() for line in (tmp_path / "train.idx").read_text().splitlines()],
        )
        write(tmp_path / "with", LAYOUTS[layout])
        assert made.read_text() == (tmp_path / "with" / "train.idx").read_text()
        assert [int(key) for key, _ in lines] == [key for key, _ in LAYOUTS[layout]]


def test_what_is_a_package(tmp_path):
    write(tmp_path / "a", im2rec())
    write(tmp_path / "b" / "train", im2rec())
    (tmp_path / "c").mkdir()
    (tmp_path / "a" / "lfw.bin").touch()
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert RecordIODataset.is_at(a) and RecordIODataset.is_at(f"{a}/train.rec") and RecordIODataset.is_at(b)
    for other in ("c", "nowhere", "a/lfw.bin", "a/train.idx", "nowhere.rec"):
        assert not RecordIODataset.is_at(str(tmp_path / other))
        with pytest.raises(UserError, match=f"{other}: no .rec file, and no directory that holds train.rec"):
            RecordIODataset(tmp_path / other)
    assert RecordIODataset(b).root == f"{b}/train/train.rec"
    assert data.RecordIODataset is RecordIODataset


def test_importing_the_generator_of_images_stays_cheap():
    """scripts/synthesize.py starts worker processes that have no use for torch."""
    code = "import sys, scripts.synthesize; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(data.__file__).parent.parent).returncode == 0


# Writing


def test_what_is_written_to_the_byte():
    assert image_record(7, 3, b"\xff\xd8\xff!!") == bytes.fromhex(
        "0a23d7ce 1d000000 00000000 00004040 0700000000000000 0000000000000000 ffd8ff2121 000000"
    )
    assert labels_record(0, [10, 13]) == bytes.fromhex(
        "0a23d7ce 20000000 02000000 00000000 0000000000000000 0000000000000000 00002041 00005041"
    )
    # The magic at a multiple of 4 bytes is left out, and the record cut there; elsewhere it stays.
    assert image_record(7, 3, b"abcd" + MAGIC + b"x" + MAGIC + b"yz") == bytes.fromhex(
        "0a23d7ce 1c000020 00000000 00004040 0700000000000000 0000000000000000 61626364"
        "0a23d7ce 07000060 78 0a23d7ce 797a 00"
    )


def magics(*pieces: bytes) -> bytes:
    return MAGIC.join(pieces)


SPLIT = {
    "once": magics(b"12345678", b"abc"),
    "unaligned": magics(b"123", b"abc"),
    "at both ends": magics(b"", b"12345678", b""),
    "twice in a row": magics(b"1234", b"", b"5678"),
    "overlapping itself": magics(b"12", b"34", b"5", b"678"),
    "only": MAGIC,
    "many": magics(*[bytes([k]) * (k % 9) for k in range(50)]),
}


@pytest.mark.parametrize("idx", [True, False], ids=["idx", "no idx"])
def test_records_of_several_parts(tmp_path, idx):
    images = [JPEGS[0] + bytes(-len(JPEGS[0]) % 4) + rest for rest in SPLIT.values()]
    images += [rest for rest in SPLIT.values()]
    write(tmp_path, [(key, image_record(key, 0, image)) for key, image in enumerate(images)], idx)
    dataset = RecordIODataset(tmp_path)
    assert [dataset.encoded(i)[0] for i in range(len(images))] == images
    # Frames begin at a multiple of 4, and there alone the magic is found.
    words = np.frombuffer((tmp_path / "train.rec").read_bytes(), "<u4")
    at, frames = 0, []
    while at < len(words):
        frames.append(at)
        at += 2 + ((int(words[at + 1]) & (1 << 29) - 1) + 3) // 4
    assert np.flatnonzero(words == 0xCED7230A).tolist() == frames and len(frames) > len(images) + 40
    assert dataset.check_headers(skip_bad=True, progress=False) == len(SPLIT)
    assert torch.equal(dataset[0][0], decode_image(JPEGS[0], "")) and len(dataset) == len(SPLIT)


def test_the_magic_in_the_header_of_a_record(tmp_path):
    """A label, or an id, may be these very bytes."""
    parts = [frame(struct.pack("<I", 0), 1), frame(struct.pack("<QQ", 5, 0) + b"image", 3)]
    write(tmp_path, [(5, b"".join(parts))])
    with pytest.raises(UserError, match=r"record 5 at offset 0: its label -1\.80\d*e\+09 is not one of the classes"):
        RecordIODataset(tmp_path)
    key = 0xCED7230A
    write(tmp_path, [(key, image_record(key, 0, JPEGS[0]))])
    assert RecordIODataset(tmp_path).keys.tolist() == [key]


# What the scan keeps


def test_the_scan_is_made_once(tmp_path, monkeypatch):
    first = RecordIODataset(write(tmp_path, insightface()))
    assert (tmp_path / "train.rec.index").stat().st_size < 600 + 20 * 9
    with monkeypatch.context() as patch:
        patch.setattr(RecordIODataset, "_scan", None)
        second = RecordIODataset(tmp_path)
        assert second.labels.tolist() == LABELS and second.encoded(8) == first.encoded(8)
        copy = pickle.loads(pickle.dumps(second))
        assert copy.encoded(8) == first.encoded(8) and copy.identities == second.identities
        assert len(pickle.dumps(second)) < 1000


CHANGES = {
    "other records": lambda d: write(d, im2rec(LABELS[::-1])),
    "same size, later": lambda d: os.utime(write(d, insightface([*LABELS[:-1], 1])) / "train.rec", ns=(1, 1)),
    "same size and time, other idx": lambda d: (d / "train.idx").write_text(
        "".join({"3": "4", "4": "3"}.get(line[0], line[0]) + line[1:] for line in (d / "train.idx").open())),
    "no idx": lambda d: (d / "train.idx").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_scan_is_made_again_where_files_have_changed(tmp_path, monkeypatch, change):
    before = RecordIODataset(write(tmp_path, insightface()))
    sent = pickle.dumps(before)
    CHANGES[change](tmp_path)
    scans = []
    scan = RecordIODataset._scan
    monkeypatch.setattr(RecordIODataset, "_scan", lambda *args: scans.append(1) or scan(*args))
    if change != "no idx":
        if "idx" not in change:
            with pytest.raises(UserError, match="train.rec.*has changed since this run started"):
                pickle.loads(sent)
        assert RecordIODataset(tmp_path).labels.tolist() != LABELS and scans
    else:  # it is made again just as it was
        RecordIODataset(tmp_path)
        assert scans and pickle.loads(sent).labels.tolist() == LABELS


@pytest.mark.parametrize("keep", [0, 10, 72, 100, -1, "flip", "before"])
def test_a_damaged_index_file_is_made_again(tmp_path, keep):
    RecordIODataset(write(tmp_path, insightface()))
    path = tmp_path / "train.rec.index"
    content = path.read_bytes()
    if keep == "flip":  # another label, which is one of the classes too
        changed = bytearray(content)
        changed[content.index(np.array(LABELS, "<i4").tobytes())] ^= 1
        path.write_bytes(changed)
    elif keep == "before":  # as earlier versions of this program wrote it
        path.write_bytes(np.array([2, *range(8)], "<i8").tobytes() + bytes(180))
    else:
        path.write_bytes(content[:keep])
    assert RecordIODataset(tmp_path).labels.tolist() == LABELS
    assert path.read_bytes() == content


@contextlib.contextmanager
def refused(path):
    raise PermissionError(13, "Permission denied")
    yield


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    write(tmp_path / "data", insightface(), idx=False)
    with monkeypatch.context() as patch:
        patch.setattr(recordio, "atomic_write", refused)
        patch.setattr(cache, "atomic_write", refused)
        dataset = RecordIODataset(tmp_path / "data")
        assert RecordIODataset(tmp_path / "data", progress=False).labels.tolist() == LABELS
    assert sorted(os.listdir(tmp_path / "data")) == ["train.rec"]
    copy = pickle.loads(pickle.dumps(dataset))
    assert [copy.encoded(i)[0] for i in range(9)] == JPEGS
    assert dataset.check_headers(skip_bad=False, progress=True) == 0
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "train.rec.index: cannot be written (Permission denied)" in err and "every start" in err


def test_the_cache_of_the_user_is_the_second_choice(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write(tmp_path / "data", insightface())
    (tmp_path / "data" / "train.rec.index").mkdir()  # tests may run as root, for whom everything can be written
    assert RecordIODataset(tmp_path / "data").labels.tolist() == LABELS
    monkeypatch.setattr(RecordIODataset, "_scan", None)
    assert RecordIODataset(tmp_path / "data").labels.tolist() == LABELS
    assert len(os.listdir(tmp_path / "cache" / "arcface")) == 1


def test_an_index_elsewhere(tmp_path):
    elsewhere = tmp_path / "elsewhere.index"
    RecordIODataset(write(tmp_path / "data", insightface()), index=elsewhere)
    assert elsewhere.exists() and sorted(os.listdir(tmp_path / "data")) == ["train.idx", "train.rec"]


def test_several_processes_may_make_the_index_at_once(tmp_path):
    """Each under a name of its own; a reader meanwhile has the old one or the new one."""
    write(tmp_path, insightface(), idx=False)
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            good = False
            try:
                good = all(RecordIODataset(tmp_path).labels.tolist() == LABELS for _ in range(5))
            finally:
                os._exit(0 if good else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert sorted(os.listdir(tmp_path)) == ["train.idx", "train.rec", "train.rec.index"]


@pytest.mark.parametrize("block", [8, 300, 5000, 1 << 24])
def test_blocks_of_any_size_and_jpegs_of_any_kind(tmp_path, monkeypatch, block):
    monkeypatch.setattr(recordio, "_BLOCK", block)
    monkeypatch.setattr(recordio, "_HEAD", max(block, 64))
    images = [JPEG_KINDS[kind]() for kind in JPEG_KINDS] * 3 + [
        encode(smooth_image(), format) for format in ("PNG", "BMP", "WEBP")
    ]
    images += [
        encode(smooth_image(size=100), "JPEG"),
        encode(smooth_image(size=100), "PNG"),
        b"\xff\xd8\xff" * 9,
        b"text",
        b"",
    ]
    for idx in (True, False):
        write(tmp_path, im2rec([k % 7 for k in range(len(images))], images), idx)
        dataset = RecordIODataset(tmp_path, index=tmp_path / f"{idx}.index")
        assert [dataset.encoded(i)[0] for i in range(len(images) - 1)] == images[:-1]
        with pytest.raises(UserError, match=f"record 30 at offset .* is 100x100.*5 of {len(images)} images are bad"):
            dataset.check_headers(skip_bad=False, progress=False)
        assert dataset.check_headers(skip_bad=True, progress=False) == 5
        for i in range(len(dataset)):
            assert torch.equal(dataset[i][0], decode_image(images[i], ""))


def test_ordinary_jpegs_are_not_looked_at_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(RecordIODataset, "_scan_one", None)
    images = [JPEG_KINDS[kind]() for kind in JPEG_KINDS if kind != "big comment first"]
    assert len(RecordIODataset(write(tmp_path, im2rec(LABELS[: len(images)], images)))) == len(images) > 6


@pytest.mark.parametrize("box", [(0, 0, 112, 96), (0, 0, 96, 112)])
def test_both_sides_of_a_jpeg_count(tmp_path, box):
    image = encode(smooth_image().crop(box), "JPEG")
    dataset = RecordIODataset(write(tmp_path, im2rec([0, 1], [JPEGS[0], image])))
    with pytest.raises(UserError, match=f"record 1 at .*: the image is {box[2]}x{box[3]}, not 112x112"):
        dataset.check_headers(skip_bad=False, progress=False)


def test_a_hundred_thousand_records(tmp_path):
    """Made and compared as arrays; nothing in it may take a Python loop's time, or more than 20 bytes a record."""
    image = JPEGS[0][:600]
    one = np.frombuffer(frame(record(0, 0, image)), np.uint8)
    count = 100_000
    content = np.tile(one, (count, 1))
    content[:, 12:16] = (np.arange(count) // 10).astype("<f4").view(np.uint8).reshape(-1, 4)
    content[:, 16:24] = np.arange(count).astype("<u8").view(np.uint8).reshape(-1, 8)
    content.tofile(tmp_path / "train.rec")
    dataset = RecordIODataset(tmp_path)
    assert np.array_equal(dataset.labels, np.arange(count) // 10) and len(dataset.identities) == 10_000
    keys, offsets = read_idx(str(tmp_path / "train.idx"))
    assert np.array_equal(keys, np.arange(count)) and np.array_equal(offsets, np.arange(count) * len(one))
    assert (tmp_path / "train.rec.index").stat().st_size < 600 + 20 * count


# Names of identities


def test_names_of_identities(tmp_path):
    write(tmp_path, insightface())
    names = ["Gökçe", os.fsdecode(b"\xff\xfe"), "with space\r"]
    (tmp_path / "train.identities.txt").write_bytes(b"\n".join(map(os.fsencode, names)))
    assert RecordIODataset(tmp_path).identities == names
    (tmp_path / "train.identities.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match="train.identities.txt: has 2 names .* 3 identities"):
        RecordIODataset(tmp_path)
    (tmp_path / "train.identities.txt").write_text("a\nb\na\n")
    with pytest.raises(UserError, match="train.identities.txt: the name 'a' appears twice"):
        RecordIODataset(tmp_path)


# Damage


def package(frames=None, **changes: bytes) -> dict[str, bytes]:
    frames = insightface() if frames is None else frames
    content, lines = b"", b""
    for key, record_frames in frames:
        lines += b"%d\t%d\n" % (key, len(content))
        content += record_frames
    return {"train.rec": content, "train.idx": lines, **changes}


def patch(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


GOOD = package()
REC, IDX = GOOD["train.rec"], GOOD["train.idx"]
OFFSETS = [int(line.split()[1]) for line in IDX.splitlines()]
SECOND, THIRD, LAST = OFFSETS[1], OFFSETS[2], OFFSETS[-1]


def with_length(change: int) -> bytes:
    length = struct.unpack_from("<I", REC, SECOND + 4)[0]
    return patch(REC, SECOND + 4, struct.pack("<I", length + change))


DAMAGED = {
    "empty": ({"train.rec": b""}, "train.rec: the file is empty"),
    "truncated": (
        {"train.rec": REC[:-4]},
        f"train.rec: record 12 at offset {LAST}: needs the bytes up to {len(REC)}, but has those up to {len(REC) - 4}",
    ),
    "truncated in a head": (
        {"train.rec": REC[: LAST + 4]},
        f"train.rec: record 12 at offset {LAST}: needs the bytes up to",
    ),
    "truncated before a record": (
        {"train.rec": REC[:LAST]},
        f"record 12 at offset {LAST}: no record begins there",
    ),
    "bytes at the end": (
        {"train.rec": REC + bytes(8)},
        f"record 12 at offset {LAST}: ends at offset {len(REC)}, but .* {len(REC) + 8}",
    ),
    "longer": (
        {"train.rec": with_length(4)},
        f"record 2 at offset {SECOND}: needs the bytes up to {THIRD + 4}, but has those up to {THIRD}",
    ),
    "shorter": (
        {"train.rec": with_length(-4)},
        f"record 2 at offset {SECOND}: ends at offset {THIRD - 4}, but .* {THIRD}",
    ),
    "no magic": (
        {"train.rec": patch(REC, SECOND, b"abcd")},
        f"record 2 at offset {SECOND}: no frame begins at offset {SECOND}, .*0x64636261",
    ),
    "a last part first": (
        {"train.rec": patch(REC, SECOND + 7, b"\x60")},
        f"record 2 at offset {SECOND}: no frame begins .* and 3",
    ),
    "a first part, no other": (
        {"train.rec": patch(REC, SECOND + 7, b"\x20")},
        f"record 2 at offset {SECOND}: no frame begins at offset {THIRD}",
    ),
    "too many labels": (
        {"train.rec": patch(REC, SECOND + 8, b"\0\0\0\x7f")},
        f"record 2 at offset {SECOND}: has .* fewer than its header needs",
    ),
    "no room for a header": (
        package([(0, frame(b"abc")), *im2rec()[1:]]),
        "record 0 at offset 0: has 3 bytes, fewer than",
    ),
    "labels only": (package([(5, frame(record([], 5)))]), "train.rec: .*1 of 1 images? (are|is) bad"),
    "no image": (package(insightface()[9:10]), "record 0 at offset 0: announces identity records .* 0 such"),
    "record 0 alone": (package([(0, frame(record([1.0, 1.0], 0)))]), "train.rec: holds no image"),
    "record 0 with nonsense": (
        {"train.rec": patch(REC, OFFSETS[9] + 32, struct.pack("<2f", 3.5, float("nan")))},
        f"record 0 at offset {OFFSETS[9]}: announces .* 3.5 up to nan",
    ),
    "an identity record too few": (
        package(insightface()[:-1]),
        "record 0 at .*: announces .* 9 images before them and 2 such",
    ),
    "idx of another file": (
        {"train.idx": IDX.replace(b"2\t%d" % SECOND, b"2\t%d" % (SECOND + 4))},
        f"record 2 at offset {SECOND + 4}: no frame begins|record 1 at offset 0: ends at",
    ),
    "idx without a line": (
        {"train.idx": IDX.replace(b"3\t%d\n" % THIRD, b"")},
        f"record 2 at offset {SECOND}: ends at offset {THIRD}, but",
    ),
    "idx without the first line": (
        {"train.idx": IDX[4:]}, f"record 2 at offset {SECOND}: no record begins there.*begin with 0"),
    "an offset twice": (
        {"train.idx": IDX.replace(b"3\t%d" % THIRD, b"3\t%d" % SECOND)},
        f"record 3 at offset {SECOND}: no record begins there",
    ),
    "a key twice": ({"train.idx": IDX.replace(b"3\t", b"2\t", 1)}, "train.idx: the key 2 appears twice"),
    "an odd offset": (
        {"train.idx": IDX.replace(b"3\t%d" % THIRD, b"3\t%d" % (THIRD + 1))},
        f"record 3 at offset {THIRD + 1}: no record begins there.*multiples of 4",
    ),
    "a huge key": (
        {"train.idx": IDX.replace(b"3\t", b"4294967296\t", 1)}, "the key 4294967296 appears twice or is above"),
    "empty idx": ({"train.idx": b""}, "train.idx: needs lines .*remove it"),
    "words in the idx": (
        {"train.idx": IDX.replace(b"3\t", b"three\t", 1)},
        "train.idx: needs lines of 'key<tab>offset' .*'three' .* row 2",
    ),
    "blanks in the idx": ({"train.idx": IDX.replace(b"3\t", b"3 ", 1)}, "train.idx: needs lines"),
    "three columns": ({"train.idx": IDX.replace(b"3\t", b"3\t3\t", 1)}, "train.idx: needs lines"),
    "a tab that moved": ({"train.idx": b"1\t\t0\n3\n"}, "train.idx: needs lines"),
    "a negative offset": ({"train.idx": IDX.replace(b"1\t0", b"1\t-4", 1)}, "train.idx: needs lines"),
    "a number of 20 digits": ({"train.idx": IDX.replace(b"1\t0", b"1\t" + b"9" * 20, 1)}, "train.idx: needs lines"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_named(tmp_path, damage):
    changes, expected = DAMAGED[damage]
    for name, content in {**GOOD, **changes}.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=expected) as caught:
        RecordIODataset(tmp_path).check_headers(skip_bad=False, progress=False)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "train.rec.index").exists() or damage == "labels only"


WITHOUT_IDX = {
    "truncated": (REC[:-4], f"record 12 at offset {LAST}: needs the bytes up to {len(REC)}, but"),
    "truncated in a head": (
        REC[: LAST + 4],
        f"record 12 at offset {LAST}: needs the bytes up to",
    ),
    "truncated before the last part": (
        REC + frame(b"12345678", 1),
        f"record 13 at offset {len(REC)}: no frame begins at offset {len(REC) + 16}, .* truncated",
    ),
    "bytes at the end": (REC + bytes(8), f"record 13 at offset {len(REC)}: no frame begins"),
    "shorter": (with_length(-4), f"record 2 at offset {THIRD - 4}: no frame begins"),
    "longer": (with_length(4), f"record 2 at offset {THIRD + 4}: no frame begins"),
    "a last part first": (patch(REC, SECOND + 7, b"\x60"), f"record 1 at offset {SECOND}: no frame begins .* and 3"),
    "a whole record within parts": (
        REC + frame(b"12345678", 1) + frame(b"1234"),
        f"record 13 at .*: no frame begins at offset {len(REC) + 16}, .* and 0"),
    "something else": (
        b"these are not the records you are looking for" * 9, "train.rec: record 0 at offset 0: no frame begins"),
    "parts without end": (frame(b"", 1) + frame(b"", 2) * 50_000, "record 0 at offset 0: no frame begins"),
}


@pytest.mark.parametrize("damage", WITHOUT_IDX)
def test_damage_is_named_without_an_idx(tmp_path, damage):
    content, expected = WITHOUT_IDX[damage]
    (tmp_path / "train.rec").write_bytes(content)
    with pytest.raises(UserError, match=expected) as caught:
        RecordIODataset(tmp_path)
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == ["train.rec"]


@pytest.mark.parametrize("label", [-1.0, 0.5, 3.0, float("nan"), float("inf"), float("-inf"), 1e-40, 1e30])
@pytest.mark.parametrize("layout", ["one label", "two labels", "no record 0"])
def test_labels_that_are_no_class(tmp_path, label, layout):
    labels = [*LABELS[:4], label, *LABELS[5:]]
    if layout == "no record 0":
        frames = im2rec(labels)
    else:
        frames = insightface(two_labels=layout == "two labels")
        frames[4] = (5, frame(record([label, 1.0] if layout == "two labels" else label, 5, JPEGS[4])))
    write(tmp_path, frames)
    if layout == "no record 0" and label == 3.0:
        dataset = RecordIODataset(tmp_path)
        assert dataset.labels[4] == 3 and len(dataset.identities) == 4
        return
    with pytest.raises(
        UserError, match=r"train.rec: record \d at offset \d+: its label .* is not one of the classes 0 to "
    ):
        RecordIODataset(tmp_path)


def with_gaps(records: int, announced: int) -> list[tuple[int, bytes]]:
    """Labels 0, 3 and 4; so many identity records, and what record 0 says of their number."""
    labels = [0, 0, 0, 3, 3, 4, 4, 4, 4]
    frames = insightface(labels)[: 10 + records]
    frames[9] = (0, frame(record([10.0, 10.0 + announced], 0)))
    return frames


@pytest.mark.parametrize("frames", [with_gaps(3, 3), with_gaps(3, 5), with_gaps(0, 5), im2rec([0, 0, 3, 4])])
def test_labels_with_gaps(tmp_path, capsys, frames):
    """As insightface trains them: its writers count the labels that occur, or announce the largest label + 1."""
    write(tmp_path, frames)
    for _ in range(2):
        dataset = RecordIODataset(tmp_path)
        assert dataset.identities == list("01234") and set(dataset.labels) == {0, 3, 4}
        assert capsys.readouterr().err == f"note: {tmp_path}/train.rec: 2 of its 5 classes have no image, such as 1\n"


@pytest.mark.parametrize("records, announced", [(2, 3), (2, 5), (1, 1), (3, 4), (0, 3)])
def test_headers_that_fit_no_labels(tmp_path, records, announced):
    write(tmp_path, with_gaps(records, announced))
    with pytest.raises(UserError, match="announces identity records|is not one of the classes"):
        RecordIODataset(tmp_path)


LISTS = {
    "insightface": [f"1\t/data/{'abc'[label]}/{k}.jpg\t{label}\t1\t2" for k, label in enumerate(LABELS)],
    "MXNet": [f"{k + 1}\t{label}.0\t{'abc'[label]}/{k}.jpg" for k, label in enumerate(LABELS)][::-1],
}


@pytest.mark.parametrize("kind", LISTS)
def test_the_list_of_images_has_the_names(tmp_path, kind, capsys, monkeypatch):
    write(tmp_path, insightface())
    assert RecordIODataset(tmp_path).identities == list("012")
    (tmp_path / "train.lst").write_text("\n".join(LISTS[kind]))
    assert RecordIODataset(tmp_path).identities == list("abc")
    monkeypatch.setattr(recordio, "_names_of_list", None)  # the cache has them
    assert RecordIODataset(tmp_path).identities == list("abc")
    (tmp_path / "train.identities.txt").write_text("x\ny\nz\n")
    assert RecordIODataset(tmp_path).identities == list("xyz")
    assert "does not give" not in capsys.readouterr().err


@pytest.mark.parametrize("lines, reason", [
    (LISTS["MXNet"][1:], "its images or labels are not those of the records"),
    ([LISTS["insightface"][0].replace("\t0", "\t1"), *LISTS["insightface"][1:]], "label 1 is 'a' and 'b'"),
    ([line.replace("/b/", "/a/") for line in LISTS["insightface"]], "two labels have the same name"),
    (["1\t1.jpg\t0"], "line 1: is no line of a list"), (["a list"], "line 1: is no line"), ([], "its images"),
])
def test_a_list_that_does_not_fit_is_told_and_ignored(tmp_path, capsys, lines, reason):
    write(tmp_path, insightface())
    (tmp_path / "train.lst").write_text("\n".join(lines))
    assert RecordIODataset(tmp_path).identities == list("012")
    told = capsys.readouterr().err.replace("line 4: ", "")
    assert f"train.lst: does not give the identities' names ({reason}" in told and told.count("\n") == 1


def test_damage_after_the_scan_is_named_when_read(tmp_path):
    """On the disk of a run: same size, same time."""
    dataset = RecordIODataset(write(tmp_path, insightface()))
    path = tmp_path / "train.rec"
    times = path.stat()
    for damaged, expected in (
        (patch(REC, SECOND, b"abcd"), f"train.rec: record 2 at offset {SECOND}: no frame begins"),
        (with_length(-4), f"train.rec: record 2 at offset {SECOND}: .*has changed"),
        (with_length(4), f"train.rec: record 2 at offset {SECOND}: needs the bytes up to {THIRD + 4}"),
        (patch(REC, SECOND + 7, b"\x20"), f"train.rec: record 2 at offset {SECOND}: no frame begins"),
        (patch(REC, SECOND + 8, b"\0\0\1\0"), f"train.rec: record 2 at offset {SECOND}: holds no image"),
        (patch(REC, SECOND + 40, bytes(400)), f"train.rec: record 2 at offset {SECOND}: not a JPEG"),
        (REC[: SECOND + 100], f"train.rec: record 2 at offset {SECOND}: the file has become shorter"),
    ):
        with path.open("r+b") as file:
            file.write(damaged)
            file.truncate()
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(UserError, match=expected):
            dataset[1]
        assert torch.equal(dataset[0][0], decode_image(JPEGS[0], ""))


def test_bad_images(tmp_path, capsys):
    images = [JPEGS[0], b"hello", JPEGS[2], JPEGS[3], b"", encode(smooth_image(size=100), "PNG"), *JPEGS[6:]]
    write(tmp_path, insightface(images=images))
    for _ in range(2):  # from the scan, and from what it kept
        dataset = RecordIODataset(tmp_path)
        with pytest.raises(UserError) as caught:
            dataset.check_headers(skip_bad=False, progress=False)
        message = str(caught.value)
        assert (
            message.startswith(f"{tmp_path}/train.rec: record 2 at offset {SECOND}: not a JPEG") and "\n" not in message
        )
        assert "3 of 9 images are bad" in message and "--skip-bad-images" in message
        assert len(dataset) == 9 and not dataset.skip_bad
        assert dataset.check_headers(skip_bad=True, progress=True) == 3
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and "3 of 9 images are bad and skipped" in err
        assert (
            dataset.skip_bad and dataset.identities == ["0", "1", "2"] and dataset.labels.tolist() == [0, 0, 1, 2, 2, 2]
        )
        assert dataset.keys.tolist() == [1, 3, 4, 7, 8, 9]
        copy = pickle.loads(pickle.dumps(dataset))
        assert copy.skip_bad and all(torch.equal(copy[i][0], dataset[i][0]) for i in range(6))
        assert dataset.check_headers(skip_bad=True, progress=True) == 0
    write(tmp_path, im2rec(images=[b"x"] * 9))
    with pytest.raises(UserError, match="no image can be used; the first error: .*record 0 at offset 0: not a JPEG"):
        RecordIODataset(tmp_path).check_headers(skip_bad=True, progress=False)


def test_where_float32_rounds_the_first_identity():
    """16,777,218 images: record 0 says 16,777,220, as the odd number is no float32."""
    first = 2**24 + 3
    keys = np.arange(1, first + 5)
    empty = keys >= first
    announced = np.array([first, first + 5], np.float32)
    assert int(announced[0]) != first
    assert recordio._first_identity(announced, keys, empty, "") == first
    assert recordio._first_identity(np.array([17, 20], np.float32), np.arange(1, 20), np.zeros(19, bool), "") == 17


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_idx_files(tmp_path, ending):
    rng = np.random.default_rng(0)
    keys, offsets = 10 ** rng.integers(0, 17, (2, 500)) * rng.integers(1, 10, (2, 500)) + rng.integers(0, 9, (2, 500))
    lines = [f"{key}\t{offset}" for key, offset in zip(keys, offsets)]
    path = tmp_path / "train.idx"
    path.write_text(ending.join(lines), newline="")  # without an end of the last line
    read = read_idx(str(path))
    assert np.array_equal(read[0], keys) and np.array_equal(read[1], offsets)
    lines[321] = "9"
    path.write_text(ending.join(lines), newline="")
    with pytest.raises(UserError, match="train.idx: needs lines .* row 322"):
        read_idx(str(path))


# Fuzzing. The formats have no checksums: a flipped byte of an image is an image that looks wrong, or an error.


def check_any_package(directory: Path, rec: bytes, idx: bytes | None) -> str | None:
    """Nothing but one line that names a file, or images with labels in range. Returns the error at construction."""
    (directory / "train.rec").write_bytes(rec)
    (directory / "train.idx").unlink(missing_ok=True)
    if idx is not None:
        (directory / "train.idx").write_bytes(idx)
    try:
        dataset = RecordIODataset(directory, index="none")
    except UserError as error:
        assert "\n" not in str(error) and str(directory / "train.") in str(error)
        return str(error)
    classes = len(dataset.identities)
    assert 1 <= classes <= 2**24 and len(dataset.labels) == len(dataset) >= 1
    assert 0 <= dataset.labels.min() <= dataset.labels.max() < classes
    try:
        dropped = dataset.check_headers(skip_bad=True, progress=False)
    except UserError as error:
        assert "no image can be used" in str(error)
        return None
    assert dropped >= 0 and len(dataset) >= 1
    for i in range(len(dataset)):
        try:
            image, label = dataset[i]
        except UserError as error:
            assert re.search(r"train\.rec: record \d+ at offset \d+: ", str(error)) and "\n" not in str(error)
        else:
            assert image.shape == (3, 112, 112) and image.dtype == torch.uint8 and 0 <= label < classes
    return None


FUZZED = {
    layout: package(frames)
    for layout, frames in (
        ("insightface", insightface(LABELS[:5], JPEGS[:5])),
        ("im2rec", im2rec(LABELS[:4], JPEGS[:4])),
        (
            "parts",
            [
                (
                    key,
                    image_record(
                        key, key % 2, JPEGS[key] + bytes(-len(JPEGS[key]) % 4) + magics(b"1234", b"56789", b"abc")
                    ),
                )
                for key in range(3)
            ],
        ),
    )
}
FUZZING = settings(deadline=None, database=None, derandomize=True,
                   suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def heads(content: dict[str, bytes]) -> list[int]:
    """Where frames begin."""
    return [match.start() for match in re.finditer(re.escape(MAGIC), content["train.rec"]) if match.start() % 4 == 0]


layouts = st.sampled_from(list(FUZZED))
edits = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6)


@settings(FUZZING, max_examples=300)
@given(layout=layouts, bytes_=edits, in_heads=st.booleans(), idx=st.booleans())
@pytest.mark.filterwarnings("ignore")
def test_fuzz_flipped_bytes(tmp_path_factory, layout, bytes_, in_heads, idx):
    rec = bytearray(FUZZED[layout]["train.rec"])
    starts = heads(FUZZED[layout])
    for at, value in bytes_:
        # Half of the cases in the 48 bytes where framing, labels and the image's beginning are.
        at = starts[at % len(starts)] + at // len(starts) % 48 if in_heads else at
        rec[at % len(rec)] = value
    check_any_package(tmp_path_factory.getbasetemp(), bytes(rec), FUZZED[layout]["train.idx"] if idx else None)


@settings(FUZZING, max_examples=300)
@given(layout=layouts, cuts=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 300)), min_size=1, max_size=3),
       at_heads=st.booleans(), tail=st.one_of(st.just(b""), st.binary(max_size=40)), idx=st.booleans())
@pytest.mark.filterwarnings("ignore")
def test_fuzz_truncated_and_cut_out(tmp_path_factory, layout, cuts, at_heads, tail, idx):
    rec = whole = FUZZED[layout]["train.rec"]
    if at_heads:  # whole frames are missing at the end
        starts = heads(FUZZED[layout])
        rec = rec[: starts[cuts[0][0] % len(starts)]]
    else:
        for k, (at, length) in enumerate(cuts):
            at %= len(rec) + 1
            rec = rec[:at] if k == 0 and length == 0 else rec[:at] + rec[at + length :]
    rec += tail
    error = check_any_package(tmp_path_factory.getbasetemp(), rec, FUZZED[layout]["train.idx"] if idx else None)
    if len(rec) % 4 or (idx and len(rec) != len(whole)):  # the framing cannot be sound
        assert error


@settings(FUZZING, max_examples=250)
@given(
    layout=layouts,
    which=st.integers(0, 10**6),
    word=st.integers(0, 2**32 - 1),
    small=st.integers(-40, 40),
    how=st.integers(0, 2),
)
@pytest.mark.filterwarnings("ignore")
def test_fuzz_wrong_lengths(tmp_path_factory, layout, which, word, small, how):
    content = FUZZED[layout]["train.rec"]
    starts = heads(FUZZED[layout])
    at = starts[which % len(starts)] + 4
    right = struct.unpack_from("<I", content, at)[0]
    new = (word, (right + small) % 2**32, right ^ 1 << word % 32)[how]
    rec = patch(content, at, struct.pack("<I", new))
    same_frame = new >> 29 == right >> 29 and ((new & 0x1FFFFFFF) + 3) // 4 == ((right & 0x1FFFFFFF) + 3) // 4
    for idx in (FUZZED[layout]["train.idx"], None):
        error = check_any_package(tmp_path_factory.getbasetemp(), rec, idx)
        assert same_frame or error


@settings(FUZZING, max_examples=350)
@given(layout=layouts, bytes_=edits, cut=st.one_of(st.none(), st.integers(0, 200)), lines=st.permutations(range(9)),
       how=st.integers(0, 3))
@pytest.mark.filterwarnings("ignore")
def test_fuzz_idx(tmp_path_factory, layout, bytes_, cut, lines, how):
    idx = bytearray(FUZZED[layout]["train.idx"])
    if how == 0:  # any bytes
        for at, value in bytes_:
            idx[at % len(idx)] = value
    elif how == 1:  # characters that belong there
        for at, value in bytes_:
            idx[at % len(idx)] = b"0123456789\t\n"[value % 12]
    elif how == 2:  # lines in another order: no damage
        all_lines = bytes(idx).splitlines(keepends=True)
        idx = b"".join(all_lines[k] for k in lines if k < len(all_lines)) + b"".join(all_lines[9:])
        cut = None
    error = check_any_package(tmp_path_factory.getbasetemp(), FUZZED[layout]["train.rec"], bytes(idx)[:cut])
    if how == 2:
        assert error is None
    if how == 3 and cut is not None and cut < len(idx) - 1:
        assert error


@settings(FUZZING, max_examples=100)
@given(
    rec=st.binary(max_size=300),
    magics_at=st.lists(st.integers(0, 70), max_size=5),
    idx=st.one_of(
        st.none(), st.binary(max_size=100), st.from_regex(rb"([0-9]{1,3}\t[0-9]{1,3}\n){1,4}", fullmatch=True)
    ),
)
@pytest.mark.filterwarnings("ignore")
def test_fuzz_anything(tmp_path_factory, rec, magics_at, idx):
    for at in magics_at:
        rec = patch(rec, 4 * at, MAGIC) if 4 * at <= len(rec) else rec
    check_any_package(tmp_path_factory.getbasetemp(), rec, idx)


# In the loader


def test_loader_with_workers_gives_the_same_batches(tmp_path):
    write(tmp_path, insightface(LABELS * 3, JPEGS * 3))
    dataset = RecordIODataset(tmp_path)
    batches = []
    for workers in (0, 2):
        sampler = GlobalBatchSampler(len(dataset), 8, 1, 0, 1, seed=3)
        batches.append(list(build_train_loader(dataset, sampler, workers=workers, pin_memory=False)))
    assert len(batches[0]) == 3
    for one, two in zip(*batches):
        assert all(torch.equal(a, b) for a, b in zip(one[:3], two[:3])) and one.skipped == two.skipped == 0
        assert one.labels.tolist() == [(LABELS * 3)[i] for i in one.indices]


def test_a_record_damaged_on_disk_is_named_by_the_loader(tmp_path):
    images = [*JPEGS[:3], JPEGS[3][:-300], *JPEGS[4:]]
    dataset = RecordIODataset(write(tmp_path, insightface(images=images)))
    assert dataset.check_headers(skip_bad=False, progress=False) == 0
    sampler = GlobalBatchSampler(9, 9, 1, 0, 1, seed=3)
    with pytest.raises(UserError, match=r"train.rec: record 4 at offset \d+: the image is damaged or truncated"):
        list(build_train_loader(dataset, sampler, workers=0, pin_memory=False))


@pytest.mark.skipif(not REAL_FACES, reason="ARCFACE_REAL_FACES names no folder of aligned faces")
def test_real_faces_are_scanned_without_a_look_at_each(tmp_path, monkeypatch):
    folder = FaceFolder(REAL_FACES)
    with (tmp_path / "train.rec").open("wb") as file:
        for i in range(len(folder)):
            file.write(image_record(i, int(folder.labels[i]), Path(folder.path(i)).read_bytes()))
    monkeypatch.setattr(RecordIODataset, "_scan_one", None)
    dataset = RecordIODataset(tmp_path)
    assert dataset.check_headers(skip_bad=False, progress=False) == 0
    assert np.array_equal(dataset.labels, folder.labels)
    for i in range(0, len(folder), len(folder) // 50):
        assert torch.equal(dataset[i][0], folder[i][0])
