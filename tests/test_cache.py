"""The file that caches a scan of images: mapped by all processes, and used while it matches the data."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import shutil
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from data import folder as module
from data.cache import _HEAD, CachedArrays, cache_paths, read_cache, save_cache
from data.folder import INDEX_NAME, FaceFolder
from data.loader import GlobalBatchSampler, build_train_loader
from data.recordio import RecordIODataset
from scripts import pack
from utils import preflight
from utils.errors import UserError
from utils.launch.plan import plan_processes
from utils.options import parse_options


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


ABOUT_C = "warning: {}: not used: 1 sub-directories without an image, which get no label: c"


def make_tree(root: Path) -> Path:
    """Three identities of 2, 1 and 3 files, and a directory without any."""
    for name in ("a/1.jpg", "a/2.png", "b/1.jpg", "d/x.jpg", "d/y.jpg", "d/z.jpg", "c/notes.txt"):
        touch(root / name)
    return root


def listing(folder: FaceFolder) -> list[tuple[str, int]]:
    return [(folder.path(i), label) for i, label in enumerate(folder.labels.tolist())]


@pytest.fixture
def settled(monkeypatch):
    """Stamps are relied on at once; `tick` lets the clock of the file system, of a few milliseconds, move on."""
    monkeypatch.setattr(module, "_SETTLED_SECONDS", 0.0)
    def tick() -> None:
        time.sleep(0.03)
    return tick


@pytest.fixture
def read_directories(monkeypatch) -> list[str]:
    """The names of the directories whose images are listed from now on."""
    read: list[str] = []
    list_images = module._list_images
    monkeypatch.setattr(module, "_list_images", lambda path: read.append(os.path.basename(path)) or list_images(path))
    return read


def test_the_second_start_reads_no_directory(tmp_path, settled, read_directories):
    make_tree(tmp_path)
    settled()
    expected = listing(FaceFolder(tmp_path))
    assert read_directories == ["a", "b", "c", "d"] and not (tmp_path / INDEX_NAME).exists()
    first = FaceFolder(tmp_path, index="auto")
    read_directories.clear()
    second = FaceFolder(tmp_path, index="auto")
    assert read_directories == []
    assert listing(first) == listing(second) == expected
    assert second.identities == first.identities == ["a", "b", "d"]
    assert not list(tmp_path.glob(".*.tmp"))


CHANGES = {
    "file added": (lambda root: touch(root / "b" / "0.jpg"), ["b"]),
    "file removed": (lambda root: (root / "d" / "y.jpg").unlink(), ["d"]),
    "file renamed": (lambda root: (root / "d" / "y.jpg").rename(root / "d" / "zz.jpg"), ["d"]),
    "first file of a directory": (lambda root: touch(root / "c" / "1.jpg"), ["c"]),
    "identity added": (lambda root: touch(root / "aa" / "1.jpg"), ["aa"]),
    "identity removed": (lambda root: shutil.rmtree(root / "a"), []),
    "identity renamed": (lambda root: (root / "a").rename(root / "e"), ["e"]),
    "time set back": (lambda root: (touch(root / "b" / "0.jpg"), os.utime(root / "b", ns=(0, 1))), ["b"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_directories_alone_are_read_again(tmp_path, settled, read_directories, change):
    make_tree(tmp_path)
    os.utime(tmp_path / "b", ns=(0, 1))
    settled()
    before = listing(FaceFolder(tmp_path, index="auto"))
    settled()
    apply, changed = CHANGES[change]
    apply(tmp_path)
    settled()
    read_directories.clear()
    now = listing(FaceFolder(tmp_path, index="auto"))
    assert read_directories == changed
    assert now == listing(FaceFolder(tmp_path)) != before
    read_directories.clear()
    assert listing(FaceFolder(tmp_path, index="auto")) == now and read_directories == []


def test_directories_that_were_swapped_are_seen(tmp_path, settled):
    """The same names and, as an archive may leave it, the same time of modification: only the time of change tells."""
    make_tree(tmp_path)
    for name in ("a", "b", "d"):
        os.utime(tmp_path / name, ns=(10**18, 10**18))
    settled()
    FaceFolder(tmp_path, index="auto")
    settled()
    for source, target in (("a", "t"), ("b", "a"), ("t", "b")):
        (tmp_path / source).rename(tmp_path / target)
    assert listing(FaceFolder(tmp_path, index="auto")) == listing(FaceFolder(tmp_path))


def test_a_directory_that_has_just_changed_is_read_again(tmp_path, read_directories):
    make_tree(tmp_path)
    FaceFolder(tmp_path, index="auto")
    read_directories.clear()
    FaceFolder(tmp_path, index="auto")
    assert read_directories == ["a", "b", "c", "d"]


def test_a_damaged_index_is_never_used(tmp_path, settled, capsys):
    make_tree(tmp_path)
    settled()
    expected = listing(FaceFolder(tmp_path, index="auto"))
    path = tmp_path / INDEX_NAME
    whole = path.read_bytes()
    rng = random.Random(0)
    cases = [whole[:keep] for keep in range(0, len(whole), 7)] + [
        whole + b"x",
        b"",
        b"some notes",
        os.urandom(len(whole)),
    ]
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        cases.append(bytes(damaged))
    for case in cases:
        path.write_bytes(case)
        assert listing(FaceFolder(tmp_path, index="auto", progress=True)) == expected
        note = capsys.readouterr().err
        assert f"index {path} is not used" in note and note.count("\n") == 2  # the other line is about c
        assert path.read_bytes() == whole


def test_an_index_of_another_version_is_replaced(tmp_path, settled, capsys):
    make_tree(tmp_path)
    settled()
    file = tmp_path / "index"
    expected = listing(FaceFolder(tmp_path, index=file))
    whole = file.read_bytes()
    for old in (b"\x89faces\r\n" + bytes(200), whole.replace(b'"image folder", 2', b'"image folder", 1')):
        checksum = zlib.crc32(old[_HEAD.size : _HEAD.size + _HEAD.unpack_from(old)[2]])
        file.write_bytes(old[:8] + checksum.to_bytes(4, "little") + old[12:])
        assert listing(FaceFolder(tmp_path, index=file, progress=True)) == expected
        assert "version" in capsys.readouterr().err and file.read_bytes() == whole


def test_the_index_of_another_folder_is_not_used(tmp_path, settled):
    one, two = make_tree(tmp_path / "one"), make_tree(tmp_path / "two")
    (two / "d" / "x.jpg").rename(two / "d" / "w.jpg")
    settled()
    file = tmp_path / "index"
    for root in (one, two, one):
        assert listing(FaceFolder(root, index=file)) == listing(FaceFolder(root))


def test_the_file_of_the_flag(tmp_path, settled, read_directories):
    root = make_tree(tmp_path / "data")
    settled()
    file = tmp_path / "new" / "faces.index"
    expected = listing(FaceFolder(root, index=file))
    assert file.exists() and not (root / INDEX_NAME).exists()
    read_directories.clear()
    assert listing(FaceFolder(root, index=file)) == expected and read_directories == []


def test_a_file_that_is_no_index_is_not_replaced(tmp_path):
    root = make_tree(tmp_path / "data")
    precious = tmp_path / "train.rec"
    precious.write_bytes(b"pixels" * 100)
    with pytest.raises(UserError, match="--index .*train.rec: is not an index of images"):
        FaceFolder(root, index=precious)
    assert precious.read_bytes() == b"pixels" * 100
    with pytest.raises(UserError, match="--index .*data: cannot be read .Is a directory"):
        FaceFolder(root, index=root)
    with pytest.raises(UserError, match="--index .*: cannot be (read|written)"):
        FaceFolder(root, index=precious / "index")


def test_where_the_data_cannot_be_written_the_cache_has_the_index(
    tmp_path, settled, monkeypatch, capsys, read_directories
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = make_tree(tmp_path / "data")
    (root / INDEX_NAME).mkdir()  # tests may run as root, for whom everything can be written
    settled()
    expected = listing(FaceFolder(root, index="auto", progress=True))
    beside, cached = cache_paths(str(root / INDEX_NAME), "auto")
    assert os.path.isfile(cached) and cached.startswith(str(tmp_path / "cache" / "arcface"))
    read_directories.clear()
    assert listing(FaceFolder(root, index="auto", progress=True)) == expected and read_directories == []
    assert set(capsys.readouterr().err.splitlines()) == {ABOUT_C.format(root)}
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").touch()
    folder = FaceFolder(root, index="auto", progress=True)
    assert listing(folder) == expected
    note = capsys.readouterr().err
    assert note.count("\n") == 2 and ABOUT_C.format(root) in note
    assert f"{beside}: cannot be written" in note and "every start" in note
    assert listing(pickle.loads(pickle.dumps(folder))) == expected


# Headers


@pytest.fixture
def checked_headers(monkeypatch) -> list[str]:
    """The names of the files whose headers are looked at from now on."""
    names: list[str] = []
    check_header = module.check_header
    monkeypatch.setattr(
        "data.folder.check_header", lambda path: names.append(os.path.basename(path)) or check_header(path)
    )
    return names


def small_copy(faces: Path, root: Path) -> Path:
    shutil.copytree(faces / "train", root)
    return root


def test_good_headers_are_looked_at_once(faces, tmp_path, settled, checked_headers):
    root = small_copy(faces, tmp_path / "faces")
    settled()
    for times in (1, 0, 0):
        folder = FaceFolder(root, index="auto")
        assert folder.check_headers(skip_bad=False, progress=False) == 0
        assert len(checked_headers) == 48 * times
        checked_headers.clear()
    identity = folder.identities[3]
    shutil.copy(folder.path(0), root / identity / "new.jpg")
    settled()
    FaceFolder(root, index="auto").check_headers(skip_bad=False, progress=False)
    assert len(checked_headers) == 7  # of the changed directory alone
    checked_headers.clear()
    FaceFolder(root, index="auto").check_headers(skip_bad=False, progress=False)
    assert checked_headers == []


def test_bad_headers_are_looked_at_again(faces, tmp_path, settled, checked_headers, capsys):
    root = small_copy(faces, tmp_path / "faces")
    bad = FaceFolder(root).path(7)
    content = Path(bad).read_bytes()
    Path(bad).write_bytes(b"")
    settled()
    with pytest.raises(UserError, match="the file is empty .1 of 48 images is bad"):
        FaceFolder(root, index="auto").check_headers(skip_bad=False, progress=False)
    for _ in range(2):
        checked_headers.clear()
        folder = FaceFolder(root, index="auto")
        assert folder.check_headers(skip_bad=True, progress=True) == 1 and len(folder) == 47
        assert checked_headers == [os.path.basename(bad)]
        assert bad not in [path for path, _ in listing(folder)]
        assert "1 of 48 images is bad and skipped" in capsys.readouterr().err
    Path(bad).write_bytes(content)  # repaired in place: its directory has not changed
    folder = FaceFolder(root, index="auto")
    assert folder.check_headers(skip_bad=False, progress=False) == 0 and len(folder) == 48


def test_dropped_images_over_the_whole_folder(faces, tmp_path, settled):
    root = small_copy(faces, tmp_path / "faces")
    whole = listing(FaceFolder(root))
    bad = [0, 1, 5, 6, 7, 30, 47]
    for i in bad:
        Path(whole[i][0]).write_bytes(b"")
    for index in ("none", "auto", "auto"):
        folder = FaceFolder(root, index=index)
        assert folder.check_headers(skip_bad=True, progress=False) == 7
        assert listing(folder) == [entry for i, entry in enumerate(whole) if i not in bad]
        assert [folder[i][1] for i in range(len(folder))] == folder.labels.tolist()
        assert listing(pickle.loads(pickle.dumps(folder))) == listing(folder)


# Several processes, and the file


def open_together(root: Path, results: Path, barrier) -> None:
    barrier.wait()
    folder = FaceFolder(root, index="auto", progress=True)
    folder.check_headers(skip_bad=False, progress=True)
    (results / str(os.getpid())).write_bytes(pickle.dumps((listing(folder), pickle.dumps(folder))))


def test_processes_may_start_together(faces, tmp_path, settled, capfd):
    """Each may scan, and replace the file while others read it. What one of them sends can be received afterwards."""
    root, results = small_copy(faces, tmp_path / "faces"), tmp_path / "results"
    results.mkdir()
    settled()
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [context.Process(target=open_together, args=(root, results, barrier)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    expected = listing(FaceFolder(root))
    found = [pickle.loads(path.read_bytes()) for path in results.iterdir()]
    assert len(found) == 4
    for seen, sent in found:
        assert seen == expected and listing(pickle.loads(sent)) == expected
    assert capfd.readouterr().err == ""
    assert [path.name for path in root.iterdir() if path.is_file()] == [INDEX_NAME]
    FaceFolder(root, index="auto").check_headers(skip_bad=False, progress=False)
    assert read_cache(str(root / INDEX_NAME))["header_is_good"].all()


def test_arrays_in_memory_are_sent_in_full():
    arrays = {"a": np.arange(5), "b": np.zeros((2, 0), np.uint8)}
    cache = save_cache(["test"], arrays, [], progress=False)
    copy = pickle.loads(pickle.dumps(cache))
    assert isinstance(copy, CachedArrays) and copy.made_from == ["test"] and copy.path is None
    assert all(np.array_equal(copy[name], array) for name, array in arrays.items())


def test_arrays_of_every_kind_are_mapped(tmp_path):
    arrays = {"u1": np.arange(7, dtype=np.uint8), "i8": np.arange(6).reshape(2, 3), "none": np.empty((0, 2)),
              "big": np.arange(3, dtype=">u4"), "part": np.arange(10, dtype=np.int32)[::2]}
    cache = save_cache(["test", 1], arrays, [str(tmp_path / "new" / "file")], progress=False)
    assert cache.path == str(tmp_path / "new" / "file") and len(pickle.dumps(cache)) < 400
    for name, array in arrays.items():
        assert np.array_equal(cache[name], array) and cache[name].shape == array.shape and cache[name].flags.aligned


def test_another_process_maps_the_file(tmp_path, settled):
    for k in range(3000):
        touch(tmp_path / f"{k % 10}" / f"{k:06d}.jpg")
    settled()
    folder = FaceFolder(tmp_path, index="auto")
    size = (tmp_path / INDEX_NAME).stat().st_size
    assert size < 3000 * (10 + 5) + 2000
    message = pickle.dumps(folder)
    assert len(message) < 1000
    copy = pickle.loads(message)
    assert listing(copy) == listing(folder) and copy.identities == folder.identities
    touch(tmp_path / "0" / "new.jpg")
    FaceFolder(tmp_path, index="auto")
    assert len(listing(folder)) == 3000  # what is mapped stays
    with pytest.raises(UserError, match="has changed since this run started"):
        pickle.loads(message)


# main.py


def open_for_training(*flags: object):
    options = parse_options([*map(str, flags), "-b", "8", "--device", "cpu"])
    return preflight.open_dataset(options, plan_processes(options))


def test_the_training_keeps_an_index(faces, tmp_path, settled, read_directories):
    root = small_copy(faces, tmp_path / "faces")
    settled()
    for flags, file in (([], root / INDEX_NAME), (["--index", tmp_path / "file"], tmp_path / "file")):
        read_directories.clear()
        assert len(open_for_training(root, *flags)) == 48
        assert file.exists() and len(read_directories) == 8
        read_directories.clear()
        assert len(open_for_training(root, *flags)) == 48 and read_directories == []
    assert len(open_for_training(root, "--index", "none")) == 48 and len(read_directories) == 8


def test_names_of_any_bytes():
    names = ["a", "", "Gökçe", os.fsdecode(b"\xff"), "b"]
    packed, ends = module._pack(names)
    assert ends.tolist() == [1, 1, 8, 9, 10]
    assert module._directories(CachedArrays([], {"directory_names": np.frombuffer(packed, np.uint8),
                                                 "directory_ends": ends})) == names


def test_a_package_is_opened_by_main_and_loads_what_the_folder_loads(faces, tmp_path):
    packed = tmp_path / "rec"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["pack.py", "rec", str(faces / "train"), str(packed)])
        pack.main()
    dataset = open_for_training(packed)
    assert isinstance(dataset, RecordIODataset)
    assert len(open_for_training(packed, "--index", "none")) == len(dataset)
    sampler = GlobalBatchSampler(48, 8, 1, 0, 1, 0)
    from_package, from_folder = (
        list(build_train_loader(source, sampler, workers=1, pin_memory=False))
        for source in (dataset, FaceFolder(faces))
    )
    for a, b in zip(from_package, from_folder, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and torch.equal(a.indices, b.indices)
