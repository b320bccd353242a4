"""scripts/pack.py, mostly called within the test's process: a start of the program costs seconds."""

import importlib.util
import os
import pickle
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.commands import ROOT, read_metrics, run
from helpers.images import REAL_FACES, encode, make_folder, smooth_image
from helpers.packages import MAGIC, insightface, write
from helpers.tiny import TinyBackbone

import main
from data.decode import decode_image
from data.folder import FaceFolder
from data.record_format import read_idx
from data.recordio import RecordIODataset
from utils import build, preflight
from utils.dist.context import DistContext
from utils.errors import UserError
from utils.options import parse_options

specification = importlib.util.spec_from_file_location("pack", ROOT / "scripts" / "pack.py")
pack = importlib.util.module_from_spec(specification)
specification.loader.exec_module(pack)

PACKAGE = ["property", "train.files.txt", "train.identities.txt", "train.idx", "train.rec"]


def tree(root: Path) -> dict[bytes, bytes]:
    """The bytes of every file below `root`, by its path."""
    root = os.fsencode(root)
    return {
        os.path.relpath(os.path.join(parent, name), root): open(os.path.join(parent, name), "rb").read()
        for parent, _, files in os.walk(root) for name in files
    }


def varied_folder(root: Path) -> Path:
    """Names and contents of every kind; 18 images of 4 identities."""
    make_folder(root, {"Gökçe 1": 5, "b": 4, "0007": 4})
    odd = os.fsencode(root) + b"/\xff\xfe"
    os.mkdir(odd)
    contents = {
        b"\xfd.jpg": encode(smooth_image(1), "JPEG"), b"with space.png": encode(smooth_image(2), "PNG"),
        b"a.b.bmp": encode(smooth_image(3), "BMP"), b"x.WEBP": encode(smooth_image(4), "WEBP"),
        b"magic.jpg": encode(smooth_image(5), "JPEG", comment=MAGIC * 3 + b"." + MAGIC * 3),
    }
    for name, content in contents.items():
        with open(odd + b"/" + name, "wb") as file:
            file.write(content)
    return root


@pytest.fixture(autouse=True)
def no_sync(monkeypatch):
    """It waits for everything that anybody has written on the machine."""
    monkeypatch.setattr(os, "sync", lambda: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return varied_folder(tmp_path_factory.mktemp("varied"))


def test_round_trip_to_the_byte(tmp_path, folder, capsys):
    pack.main(["rec", str(folder), str(tmp_path / "rec")])
    assert sorted(os.listdir(tmp_path / "rec")) == PACKAGE
    pack.main(["folder", str(tmp_path / "rec"), str(tmp_path / "again")])
    assert tree(tmp_path / "again") == tree(folder) and len(tree(folder)) == 18
    out, err = capsys.readouterr()
    assert "rec: 18 images of 4 identities" in out and "again: 18 images of 4 identities" in out and err == ""
    assert sorted(os.listdir(tmp_path)) == ["again", "rec"]
    # and once more, to the same package
    pack.main(["rec", str(tmp_path / "again"), str(tmp_path / "rec 2")])
    (tmp_path / "rec" / "train.rec.index").unlink()
    assert tree(tmp_path / "rec 2") == tree(tmp_path / "rec")


def test_the_package_equals_the_folder(tmp_path, folder):
    pack.main(["rec", str(folder), str(tmp_path)])
    before, after = FaceFolder(folder), RecordIODataset(tmp_path)
    assert after.identities == list(before.identities)
    assert np.array_equal(after.labels, before.labels) and len(after) == 18
    assert all(torch.equal(after[i][0], before[i][0]) for i in range(18))


def test_the_package_has_insightfaces_layout(tmp_path):
    """Reads as insightface's own reader does: record 0, then range(1, label[0]), keys from the .idx."""
    make_folder(tmp_path / "faces", {"a": 2, "b": 1, "c": 3})
    pack.main(["rec", str(tmp_path / "faces"), str(tmp_path)])
    keys, offsets = read_idx(str(tmp_path / "train.idx"))
    assert keys.tolist() == [1, 2, 3, 4, 5, 6, 0, 7, 8, 9]
    content = (tmp_path / "train.rec").read_bytes()
    record = {}
    for key, offset, end in zip(keys.tolist(), offsets.tolist(), [*offsets.tolist()[1:], len(content)]):
        magic, length = np.frombuffer(content, "<u4", 2, offset)
        assert magic == 0xCED7230A and length >> 29 == 0 and offset + 8 + (length + 3) // 4 * 4 == end
        record[key] = content[offset + 8 : offset + 8 + length]

    def unpack(key):
        flag, label, id, id2 = np.frombuffer(
            record[key], np.dtype([("", "<u4"), ("", "<f4"), ("", "<u8"), ("", "<u8")]), 1
        )[0]
        assert id == key and id2 == 0
        if flag:
            return np.frombuffer(record[key], "<f4", flag, 24).tolist(), record[key][24 + 4 * flag :]
        return label, record[key][24:]

    assert unpack(0) == ([7, 10], b"")
    assert [unpack(key) for key in (7, 8, 9)] == [([1, 3], b""), ([3, 4], b""), ([4, 7], b"")]
    files = [
        tmp_path / "faces" / name
        for name in ("a/000.jpg", "a/001.jpg", "b/000.jpg", "c/000.jpg", "c/001.jpg", "c/002.jpg")
    ]
    assert [unpack(key) for key in range(1, 7)] == [
        (label, file.read_bytes()) for label, file in zip([0, 0, 1, 2, 2, 2], files)
    ]
    assert (tmp_path / "property").read_text() == "3,112,112\n"
    assert (tmp_path / "train.identities.txt").read_text() == "a\nb\nc\n"
    assert (
        tmp_path / "train.files.txt"
    ).read_text() == "a/000.jpg\na/001.jpg\nb/000.jpg\nc/000.jpg\nc/001.jpg\nc/002.jpg\n"


def test_a_package_without_names_unpacks_to_labels_and_keys(tmp_path):
    formats = {"JPEG": "jpg", "PNG": "png", "BMP": "bmp", "WEBP": "webp", "GIF": "gif", "TIFF": "tif", "PPM": "ppm",
               "JPEG2000": "jp2", "AVIF": "avif"}
    images = [encode(smooth_image(k), format) for k, format in enumerate([*formats, "JPEG", "PNG", "BMP"])]
    labels = list(range(12))
    write(tmp_path / "rec", insightface(labels, images))
    pack.main(["folder", str(tmp_path / "rec" / "train.rec"), str(tmp_path / "out")])
    endings = [*formats.values(), "jpg", "png", "bmp"]
    assert tree(tmp_path / "out") == {
        f"{label:02d}/{label + 1:02d}.{ending}".encode(): image for label, ending, image in zip(labels, endings, images)
    }
    again = FaceFolder(tmp_path / "out")
    assert again.labels.tolist() == labels  # "02" sorts before "10"


# Interrupted


def killed_after(calls: int, function: str, argv: list[str], module=pack) -> None:
    """`pack.main(argv)` in a child that kills itself instead of calling module.function once more."""
    child = os.fork()
    if child == 0:
        try:
            original, count = getattr(module, function), [0]

            def call(*args, **kwargs):
                count[0] += 1
                if count[0] > calls:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            setattr(module, function, call)
            pack.COMMIT_SECONDS, pack.CHUNK, pack.THREADS = 0.0, 1, 1
            pack.main(argv)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def counted(monkeypatch, name: str) -> list:
    calls, original = [], getattr(pack, name)
    monkeypatch.setattr(pack, name, lambda *args, **kwargs: calls.append(args) or original(*args, **kwargs))
    return calls


@pytest.fixture
def whole(tmp_path, folder) -> dict[bytes, bytes]:
    pack.main(["rec", str(folder), str(tmp_path / "whole")])
    return tree(tmp_path / "whole")


@pytest.mark.parametrize("calls", [0, 1, 9])
def test_a_killed_packing_goes_on(tmp_path, folder, whole, monkeypatch, capsys, calls):
    argv = ["rec", str(folder), str(tmp_path / "rec")]
    killed_after(calls, "image_record", argv)
    assert not (tmp_path / "rec" / "train.rec").exists()
    with (tmp_path / "rec" / "train.rec.partial").open("ab") as file:
        file.write(b"a torn record")
    read = counted(monkeypatch, "read_bytes")
    pack.main(argv)
    assert tree(tmp_path / "rec") == whole
    assert len(read) == 18 - calls
    assert (f"continuing after {calls} of 18 images" in capsys.readouterr().err) == (calls > 0)


@pytest.mark.parametrize("calls, module, function", [
    (3, pack, "labels_record"),
    (18 + 1, pack, "atomic_write"),
    (18 + 3, os, "replace"),
    (18 + 3 + 1, os, "replace"),
])
def test_a_packing_that_is_killed_at_its_end(tmp_path, folder, whole, calls, module, function):
    """Within the records of identities, or between the files' final names (after 18 journals)."""
    argv = ["rec", str(folder), str(tmp_path / "rec")]
    killed_after(calls, function, argv, module)
    assert not (tmp_path / "rec" / "train.rec").exists()
    pack.main(argv)
    assert tree(tmp_path / "rec") == whole


def test_a_stop_by_an_error_goes_on_too(tmp_path, folder, whole, monkeypatch, capsys):
    argv = ["rec", str(folder), str(tmp_path / "rec")]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pack, "image_record", mock.Mock(side_effect=KeyboardInterrupt))
        pack.main(argv)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="rec: No space left on device"):
        original, calls = pack.image_record, []

        def fill_up(*args):
            calls.append(args)
            if len(calls) == 8:
                raise OSError(28, "No space left on device")
            return original(*args)

        patch.setattr(pack, "image_record", fill_up)
        pack.main(argv)
    pack.main(argv)
    assert "continuing after 7" in capsys.readouterr().err
    assert tree(tmp_path / "rec") == whole


DISTURBANCES: dict[str, Callable[[Path, Path], object]] = {
    "a shorter package": lambda rec, source: os.truncate(rec / "train.rec.partial", 500),
    "no package": lambda rec, source: (rec / "train.rec.partial").unlink(),
    "a torn journal": lambda rec, source: os.truncate(rec / "train.rec.partial.json", 20),
    "another journal": lambda rec, source: (rec / "train.rec.partial.json").write_text("[1]"),
    "a new image": lambda rec, source: shutil.copy(source / "a" / "000.jpg", source / "a" / "0000.jpg"),
    "a changed image": lambda rec, source: smooth_image(77).save(source / "a" / "001.jpg"),
    "an image that took another's place": lambda rec, source: os.replace(source / "c.old", source / "a" / "001.jpg"),
}


@pytest.mark.parametrize("disturbance", DISTURBANCES)
def test_what_does_not_fit_any_more_is_begun_anew(tmp_path, monkeypatch, capsys, disturbance):
    source, rec = make_folder(tmp_path / "faces", {"a": 4, "b": 4}), tmp_path / "rec"
    smooth_image(78).save(source / "c.old", "JPEG")
    killed_after(5, "image_record", ["rec", str(source), str(rec)])
    DISTURBANCES[disturbance](rec, source)
    pack.main(["rec", str(source), str(rec)])
    assert "continuing" not in capsys.readouterr().err
    pack.main(["rec", str(source), str(tmp_path / "fresh")])
    assert tree(rec) == tree(tmp_path / "fresh")


@pytest.mark.parametrize("calls", [0, 1, 9])
def test_a_killed_unpacking_goes_on(tmp_path, folder, monkeypatch, capsys, calls):
    pack.main(["rec", str(folder), str(tmp_path / "rec")])
    argv = ["folder", str(tmp_path / "rec"), str(tmp_path / "out")]
    killed_after(calls, "_write_image", argv)
    assert not (tmp_path / "out").exists()
    done = sorted((tmp_path / "out.partial").rglob("*.*"))
    assert len(done) == calls
    for path in done[:1]:
        path.write_bytes(path.read_bytes()[:50])  # a kill within a write
    before = {path: path.stat().st_mtime_ns for path in done[1:]}
    pack.main(argv)
    assert tree(tmp_path / "out") == tree(folder)
    assert sorted(os.listdir(tmp_path)) == ["out", "rec"]
    for path, time in before.items():
        assert (tmp_path / "out" / path.relative_to(tmp_path / "out.partial")).stat().st_mtime_ns == time
    assert "continuing with" in capsys.readouterr().err


def test_unfinished_images_of_another_package(tmp_path, folder):
    make_folder(tmp_path / "faces", {"a": 2})
    for name, source in (("rec", folder), ("rec 2", tmp_path / "faces")):
        pack.main(["rec", str(source), str(tmp_path / name)])
    killed_after(9, "_write_image", ["folder", str(tmp_path / "rec"), str(tmp_path / "out")])
    argv = ["folder", str(tmp_path / "rec 2"), str(tmp_path / "out")]
    with pytest.raises(UserError, match="out.partial: .*another package; --force"):
        pack.main(argv)
    pack.main([*argv, "--force"])
    assert tree(tmp_path / "out") == tree(tmp_path / "faces")
    (tmp_path / "new.partial").mkdir()
    with pytest.raises(UserError, match="new.partial: .*not made by this program"):
        pack.main(["folder", str(tmp_path / "rec"), str(tmp_path / "new"), "--force"])


def test_two_processes_at_once(tmp_path, folder):
    (tmp_path / "rec").mkdir()
    with pack._PartialPackage(str(tmp_path / "rec"), ""):
        with pytest.raises(UserError, match="train.rec.partial: another process is writing it"):
            pack.main(["rec", str(folder), str(tmp_path / "rec")])
    pack.main(["rec", str(folder), str(tmp_path / "rec")])
    assert sorted(os.listdir(tmp_path / "rec")) == PACKAGE


# What is there already, and bad input


def test_nothing_is_overwritten_without_force(tmp_path, folder, faces):
    rec, out, bin_ = tmp_path / "rec", tmp_path / "out", tmp_path / "lfw.bin"
    pairs = ["--imgs-root", str(faces / "lfw" / "imgs"), "--pair-list", str(faces / "lfw" / "pair.list")]
    make_folder(tmp_path / "faces", {"a": 2})
    commands = {rec / "train.rec": ["rec", str(folder), str(rec)], out: ["folder", str(rec), str(out)],
                bin_: ["bin", *pairs, str(bin_)]}
    for argv in commands.values():
        pack.main(argv)
    before = tree(tmp_path)
    for path, argv in commands.items():
        with pytest.raises(UserError, match=f"{path}: exists; give another OUT, or --force"):
            pack.main(argv)
    assert tree(tmp_path) == before
    pack.main(["rec", str(tmp_path / "faces"), str(rec), "--force"])
    pack.main(["folder", str(rec), str(out), "--force"])
    pack.main(["bin", *pairs, str(bin_), "--force"])
    assert tree(out) == tree(tmp_path / "faces") and tree(tmp_path / "out.1") == tree(folder)
    assert bin_.read_bytes() == before[b"lfw.bin"]
    for argv in (["bin", *pairs, pairs[3]], ["folder", str(rec), str(rec)], ["folder", str(rec), str(tmp_path)]):
        with pytest.raises(UserError, match="which is read"):
            pack.main([*argv, "--force"])
    (tmp_path / "empty").mkdir()
    pack.main(["folder", str(rec), str(tmp_path / "empty")])
    assert tree(tmp_path / "empty") == tree(tmp_path / "faces")


def test_a_folder_that_is_renamed_is_told(tmp_path, folder, capsys):
    pack.main(["rec", str(folder), str(tmp_path / "rec")])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").touch()
    pack.main(["folder", str(tmp_path / "rec"), str(tmp_path / "out"), "--force"])
    told = capsys.readouterr().err
    assert f"{tmp_path}/out exists: it will be renamed" in told and f"was renamed to {tmp_path}/out.1" in told
    assert (tmp_path / "out.1" / "kept").exists()


def test_bad_images_are_named_or_left_out(tmp_path, capsys):
    source = make_folder(tmp_path / "faces", {"a": 3, "b": 1, "c": 2})
    (source / "a" / "001.jpg").write_bytes(b"text")
    (source / "b" / "000.jpg").unlink()
    (source / "b" / "000.jpg").symlink_to("nowhere")
    smooth_image(size=100).save(source / "c" / "000.jpg")
    rec = tmp_path / "rec"
    with pytest.raises(UserError, match="a/001.jpg: not a JPEG.*--skip-bad-images packs the others"):
        pack.main(["rec", str(source), str(rec)])
    killed_after(1, "image_record", ["rec", str(source), str(rec), "--skip-bad-images"])  # after the one of before
    pack.main(["rec", str(source), str(rec), "--skip-bad-images"])
    out, err = capsys.readouterr()
    assert "3 images of 3 identities, 3 bad ones left out" in out and "continuing after" in err
    dataset = RecordIODataset(rec)
    assert (
        dataset.labels.tolist() == [0, 0, 2]
        and dataset.identities == ["a", "b", "c"]
        and dataset.keys.tolist() == [1, 2, 3]
    )
    pack.main(["folder", str(rec), str(tmp_path / "out")])
    assert sorted(tree(tmp_path / "out")) == [b"a/000.jpg", b"a/002.jpg", b"c/001.jpg"]
    assert "1 identities have no image" in capsys.readouterr().err
    for name in ("a", "c"):
        shutil.rmtree(source / name)
    with pytest.raises(UserError, match="faces: no image can be used"):
        pack.main(["rec", str(source), str(tmp_path / "rec 2"), "--skip-bad-images"])


def test_bad_images_of_a_package(tmp_path):
    images = [encode(smooth_image(k), "JPEG") for k in range(4)]
    write(tmp_path / "rec", insightface([0, 0, 1, 1], [images[0], b"text", *images[2:]]))
    (tmp_path / "rec" / "train.files.txt").write_text("0/a.jpg\n0/b.jpg\n1/c.jpg\n1/d.jpg\n")
    with pytest.raises(UserError, match=r"record 2 at offset \d+: not a JPEG"):
        pack.main(["folder", str(tmp_path / "rec"), str(tmp_path / "out")])
    pack.main(["folder", str(tmp_path / "rec"), str(tmp_path / "out"), "--skip-bad-images"])
    assert tree(tmp_path / "out") == {b"0/a.jpg": images[0], b"1/c.jpg": images[2], b"1/d.jpg": images[3]}


HOSTILE = {
    "a way out": ("identities", "..\nb\n", "train.identities.txt: '..' is not the name"),
    "an absolute path": ("identities", "/tmp\nb\n", "train.identities.txt: '/tmp' is not the name"),
    "an empty name": ("identities", "\nb\n", "train.identities.txt: '' is not the name"),
    "a file's way out": (
        "files",
        "a/../../x.jpg\na/2.jpg\nb/3.jpg\n",
        "train.files.txt:1: '../../x.jpg' is not the name",
    ),
    "a directory": ("files", "a/1.jpg\na/..\nb/3.jpg\n", "train.files.txt:2: '..' is not the name"),
    "no file": ("files", "a/1.jpg\na/2.jpg\nb\n", "train.files.txt:3: expected 'b'/<file>"),
    "a zero byte": ("files", "a/1.jpg\na/2\0.jpg\nb/3.jpg\n", "train.files.txt:2: .* is not the name"),
    "another identity": (
        "files",
        "a/1.jpg\nb/2.jpg\nb/3.jpg\n",
        "train.files.txt:2: expected 'a'/<file>, .* got 'b/2.jpg'",
    ),
    "a line too few": ("files", "a/1.jpg\na/2.jpg\n", "train.files.txt: must have a line .* 3 images"),
    "a line too many": ("files", "a/1.jpg\na/2.jpg\nb/3.jpg\n\n", "train.files.txt: must have a line .* 3 images"),
    "a name twice": ("files", "a/1.jpg\na/1.jpg\nb/3.jpg\n", "holds 2 files after 3 images"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_names_from_the_internet_stay_in_the_directory(tmp_path, kind):
    name, content, expected = HOSTILE[kind]
    make_folder(tmp_path / "faces", {"a": 2, "b": 1})
    pack.main(["rec", str(tmp_path / "faces"), str(tmp_path / "rec")])
    (tmp_path / "rec" / f"train.{name}.txt").write_text(content)
    if name == "identities":
        (tmp_path / "rec" / "train.files.txt").unlink()
    before = set(tree(tmp_path))
    with pytest.raises(UserError, match=expected):
        pack.main(["folder", str(tmp_path / "rec"), str(tmp_path / "out")])
    assert {path for path in set(tree(tmp_path)) - before if b"out.partial" not in path} <= {b"rec/train.rec.index"}


def test_a_line_break_in_a_name(tmp_path):
    make_folder(tmp_path / "faces", {"a\nb": 1})
    with pytest.raises(UserError, match=r"a\\nb/000.jpg': a line break in a name"):
        pack.main(["rec", str(tmp_path / "faces"), str(tmp_path / "rec")])
    assert not (tmp_path / "rec").exists()


# Pairs


def test_pairs_are_packed_as_insightface_does(tmp_path, faces):
    imgs, pair_list = faces / "lfw" / "imgs", faces / "lfw" / "pair.list"
    pack.main(["bin", "--imgs-root", str(imgs), "--pair-list", str(pair_list), str(tmp_path / "lfw.bin")])
    bins, is_same = pickle.loads((tmp_path / "lfw.bin").read_bytes(), encoding="bytes")  # insightface's way to read it
    lines = [line.split() for line in pair_list.read_text().splitlines()]
    assert type(bins) is list and type(is_same) is list and {type(value) for value in is_same} == {bool}
    assert bins == [(imgs / name).read_bytes() for line in lines for name in line[:2]]
    assert is_same == [line[2] == "1" for line in lines]
    assert decode_image(bins[0], "").shape == (3, 112, 112)
    different = {name for line in lines for name in line[:2]}
    assert (tmp_path / "lfw.bin").stat().st_size < sum((imgs / name).stat().st_size for name in different) + 10_000


def test_bad_pairs(tmp_path, faces):
    argv = ["bin", "--imgs-root", str(faces / "lfw" / "imgs"), "--pair-list", str(tmp_path / "pair.list")]
    (tmp_path / "pair.list").write_text("a b 2\n")
    with pytest.raises(UserError, match="pair.list:1: .*'a b 2'"):
        pack.main([*argv, str(tmp_path / "lfw.bin")])
    with pytest.raises(UserError, match="there is no directory .*nowhere"):
        pack.main([*argv, str(tmp_path / "nowhere" / "lfw.bin")])
    assert os.listdir(tmp_path) == ["pair.list"]


@pytest.mark.slow
def test_as_a_program(tmp_path, folder):
    assert "rec: 18 images of 4 identities" in run("scripts/pack.py", "rec", folder, tmp_path / "rec")
    assert sorted(os.listdir(tmp_path / "rec")) == PACKAGE


@pytest.mark.parametrize("argv, expected", [
    ([], "the following arguments are required: rec|folder|bin (see pack.py --help)"),
    (["zip", "a", "b"], "invalid choice: 'zip'"),
    (["rec", "a"], "the following arguments are required: OUT (see pack.py rec --help)"),
    (["folder", "nowhere", "out"], "nowhere: no .rec file, and no directory that holds train.rec"),
    (["rec", "nowhere", "out"], "nowhere: no such directory"),
    (["bin", "out.bin"], "the following arguments are required: --imgs-root, --pair-list"),
])
def test_wrong_command_lines(tmp_path, monkeypatch, argv, expected):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        pack.main(argv)
    assert expected in str(caught.value) and os.listdir(tmp_path) == []


# Training


def train(rank: int, world_size: int, argv: list[str], packed: bool) -> None:
    options = parse_options(argv)
    preflight.make_output(options)
    dataset = RecordIODataset(options.data) if packed else FaceFolder(options.data)
    dataset.check_headers(skip_bad=False, progress=False)
    with mock.patch.object(build, "build_backbone", lambda arch, embedding_size: TinyBackbone(batch_norm=True)):
        main.train(DistContext(rank, world_size, world_size, torch.device("cpu")), options, dataset)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["drawn", "real"])
def test_training_from_a_package_equals_training_from_the_folder(pools, faces, tmp_path, source):
    """The same losses and weights to the bit, on two processes."""
    if source == "real" and not REAL_FACES:
        pytest.skip("ARCFACE_REAL_FACES names no folder of aligned faces")
    folder = REAL_FACES if source == "real" else str(faces)
    pack.main(["rec", folder, str(tmp_path / "rec")])
    classes = len(FaceFolder(folder).identities)
    flags = ["-b", "12", "--num-classes", str(classes), "--max-steps", "9", "--seed", "3", "-j", "0", "--epochs", "5",
             "--enable-model-parallel", "--augment", "standard"]
    results = []
    for packed, path in ((False, folder), (True, str(tmp_path / "rec"))):
        output = tmp_path / f"packed {packed}"
        pools(2).run(train, [path, *flags, "--output", str(output)], packed)
        weights = torch.load(output / "checkpoint.pth.tar", weights_only=True)["state_dict"]
        results.append(([line["loss"] for line in read_metrics(output)], weights))
    (losses, weights), (packed_losses, packed_weights) = results
    assert len(set(losses)) == 9 and packed_losses == losses
    assert weights.keys() == packed_weights.keys() and all(
        torch.equal(weights[name], packed_weights[name]) for name in weights
    )


@pytest.mark.skipif(not REAL_FACES, reason="ARCFACE_REAL_FACES names no folder of aligned faces")
def test_round_trip_of_real_faces(tmp_path):
    pack.main(["rec", REAL_FACES, str(tmp_path / "rec")])
    pack.main(["folder", str(tmp_path / "rec"), str(tmp_path / "out")])
    subprocess.run(["diff", "-r", "-x", ".*", FaceFolder(REAL_FACES).root, str(tmp_path / "out")], check=True)
