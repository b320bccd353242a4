#!/usr/bin/env python3
"""Pack faces as insightface does, and unpack them; images keep every byte.

    python3 scripts/pack.py rec FOLDER OUT        # FOLDER/<identity>/<image> -> OUT/train.rec
    python3 scripts/pack.py folder PACKAGE OUT    # PACKAGE/train.rec -> OUT/<identity>/<image>
    python3 scripts/pack.py bin --imgs-root IMGS --pair-list LIST OUT.bin    # pairs -> one file

    OUT/train.rec, OUT/train.idx    the images, then record 0 and one for each identity (see data/record_format.py)
    OUT/property                    number of identities, height and width
    OUT/train.identities.txt        names of the identities, a line each, by label
    OUT/train.files.txt             <identity>/<image>, a line for each image
    OUT.bin                         pickle: (list of two encoded images a pair, list of a bool a pair)

insightface's packages lack the two lists of names; such a package unpacks to <label>/<key>.jpg. After an interruption,
the same command continues from OUT/*.partial or OUT.partial. Final names appear only when everything is complete.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import pickle
import shutil
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, BinaryIO, TypeVar

import numpy as np
from tqdm import tqdm

# The script's own directory is on sys.path, the repository's root is not.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data.decode import IMAGE_SIZE, check_encoded, decode_image, read_bytes  # noqa: E402
from data.folder import FaceFolder  # noqa: E402
from data.pairs import PairList  # noqa: E402
from data.progress import progress_bar  # noqa: E402
from data.record_format import MAX_CLASSES, MAX_PART_BYTES, image_record, labels_record  # noqa: E402
from data.recordio import RecordIODataset  # noqa: E402
from utils.errors import Parser, UserError, exit_on_user_error  # noqa: E402
from utils.files import atomic_write, flush, flush_directory, move_aside  # noqa: E402

COMMIT_SECONDS = 5.0  # the work that a kill costs at most
# Threads hide the latency of cold files and network disks.
THREADS = 4
CHUNK = 64

PICKLE_PROTOCOL = 4
# How an image of each format begins, at byte 0 and at byte 8 (between them WebP has its length).
EXTENSIONS = (
    (b"\xff\xd8\xff", b"", ".jpg"), (b"\x89PNG", b"", ".png"), (b"BM", b"", ".bmp"), (b"RIFF", b"WEBP", ".webp"),
)

Item = TypeVar("Item")
Result = TypeVar("Result")


def main(argv: list[str] | None = None) -> None:
    options = parse_options(argv)
    started = time.perf_counter()
    try:
        summary = options.command(options)
    except OSError as error:
        raise UserError(f"{error.filename or options.out}: {error.strerror or error}") from None
    print(f"=> {options.out}: {summary}, {time.perf_counter() - started:.1f} s")


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Raises UserError."""
    parser = Parser("pack.py", "Pack faces as insightface does, and unpack them; images keep every byte.")
    def subparser(prog: str, description: str, **_: Any) -> Parser:
        return Parser(prog, description)

    commands = parser.add_subparsers(  # type: ignore[call-overload]  # a function in place of a class
        required=True, metavar="rec|folder|bin", parser_class=subparser
    )
    for name, command, description in (
        ("rec", pack_rec, "An image folder -> train.rec and train.idx in the directory OUT."),
        ("folder", unpack_folder, "A .rec file, or the train.rec in a directory -> an image folder OUT."),
        ("bin", pack_bin, "A pair list and its images -> the evaluation set OUT."),
    ):
        sub = commands.add_parser(name, help=description, description=description)
        sub.set_defaults(command=command)
        if command is pack_bin:
            sub.add_argument("--imgs-root", required=True, metavar="DIR", help="the directory of the pairs' images")
            sub.add_argument("--pair-list", required=True, metavar="FILE", help="lines of: path1 path2 0|1")
        else:
            sub.add_argument("source", metavar="FOLDER" if command is pack_rec else "PACKAGE",
                             help="what main.py would train on")
            sub.add_argument("--skip-bad-images", action="store_true",
                             help="leave out images that cannot be read, or are not 112x112, instead of stopping")
        sub.add_argument("out", metavar="OUT", help="must not exist yet")
        replaced = "rename an existing OUT to OUT.1" if command is unpack_folder else "replace an existing OUT"
        sub.add_argument("--force", action="store_true", help=replaced)
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------------
# Image folder -> .rec


def pack_rec(options: argparse.Namespace) -> str:
    folder = FaceFolder(options.source)
    if len(folder.identities) > MAX_CLASSES:
        raise UserError(f"{folder.root}: has {len(folder.identities)} identities; a package, whose labels are float32, "
                        f"holds at most {MAX_CLASSES}")
    rec = os.path.join(options.out, "train.rec")
    _refuse_existing(rec, options.force)
    source = _digest(folder)
    os.makedirs(options.out, exist_ok=True)
    with _PartialPackage(options.out) as package:
        _refuse_existing(rec, options.force)  # again: another process may have finished it before we had the lock
        if not package.resume(source, folder):
            package.restart(source)
        _add_images(package, folder, options.skip_bad_images)
        labels = np.delete(folder.labels, package.skipped)
        if not len(labels):
            raise UserError(f"{folder.root}: no image can be used")
        ends = np.searchsorted(labels, np.arange(len(folder.identities)), side="right") + 1
        first_identity = len(labels) + 1
        if int(np.float32(first_identity)) != first_identity:
            print(f"warning: float32, the format's type of labels, rounds {first_identity}, the key of the first "
                  "identity record; main.py finds it nevertheless, other programs may not", file=sys.stderr)
        package.add(0, labels_record(0, [first_identity, first_identity + len(ends)]))
        for label, (start, end) in enumerate(zip([1, *ends.tolist()], ends.tolist())):
            package.add(first_identity + label, labels_record(first_identity + label, [start, end]))
        package.publish({
            "property": f"{len(ends)},{IMAGE_SIZE},{IMAGE_SIZE}\n".encode(),
            "train.identities.txt": b"".join(os.fsencode(name) + b"\n" for name in folder.identities),
        })
    skipped = f", {len(package.skipped)} bad ones left out" if package.skipped else ""
    return f"{len(labels):,} images of {len(ends):,} identities{skipped}, {os.path.getsize(rec) / 1e6:,.1f} MB"


def _digest(folder: FaceFolder) -> str:
    """A hash of the directory and of all image names."""
    digest = hashlib.sha256(os.fsencode(os.path.realpath(folder.root)))
    for i in range(len(folder)):
        name = folder.path(i)[len(folder.root) :]
        if "\n" in name:
            raise UserError(f"{ascii(folder.path(i))}: a line break in a name cannot be kept in train.files.txt; "
                            "rename the file or directory")
        digest.update(os.fsencode(name) + b"\n")
    return digest.hexdigest()


def _add_images(package: _PartialPackage, folder: FaceFolder, skip_bad: bool) -> None:
    def read(i: int) -> tuple[int, bytes | UserError]:
        path = folder.path(i)
        try:
            image = read_bytes(path)
            check_encoded(image, path)
            if len(image) > MAX_PART_BYTES - 64:  # less than the record's header
                raise UserError(f"{path}: has {len(image)} bytes; a record holds less than 512 MiB")
        except UserError as error:
            return i, error
        return i, image

    labels = folder.labels
    with _bar(len(folder), "packing", initial=package.next) as bar:
        try:
            for i, image in _in_order(read, range(package.next, len(folder))):
                if isinstance(image, UserError):
                    if not skip_bad:
                        raise UserError(f"{image} (--skip-bad-images packs the others)")
                    package.skipped.append(i)
                else:
                    key = i + 1 - len(package.skipped)
                    package.add(key, image_record(key, int(labels[i]), image), folder.path(i)[len(folder.root) + 1 :])
                package.next = i + 1
                package.commit(COMMIT_SECONDS)
                bar.update()
        except BaseException:  # also after an interruption: the next run continues from here
            with contextlib.suppress(OSError):
                package.commit()
            raise


class _PartialPackage:
    """OUT/train.rec, .idx and .files.txt while they grow as *.partial, and the journal train.rec.partial.json.

    The journal says how far the files are valid. It is written after they have been flushed to the disk.
    Attributes: next (the number of images that are done), skipped (which of them were left out).
    Raises UserError if another process is writing them.
    """

    def __init__(self, out: str) -> None:
        self._out = out
        self._journal_path = os.path.join(out, "train.rec.partial.json")
        names = ("train.rec", "train.idx", "train.files.txt")
        self._files = {name: _Appended(os.path.join(out, f"{name}.partial")) for name in names}
        self.next = 0
        self.skipped: list[int] = []

    def __enter__(self) -> _PartialPackage:
        return self

    def __exit__(self, *_: Any) -> None:
        for file in self._files.values():
            file.close()

    def resume(self, source: str, folder: FaceFolder) -> bool:
        """Continue from the journal. False if it is of another source, the files differ from it, or images changed."""
        try:
            with open(self._journal_path, "rb") as file:
                journal = json.load(file)
            extents = [(self._files[name], size, checksum) for name, (size, checksum) in journal["files"].items()]
            done, skipped, started = journal["next"], journal["skipped"], journal["started"]
            if journal["source"] != source or len(extents) != len(self._files):
                return False
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if any(_changed_since(started, folder.path(i)) for i in range(done)):
            return False
        if not all(file.cut(size, checksum) for file, size, checksum in extents):
            return False
        self._source, self._started, self.next, self.skipped = source, started, done, skipped
        self._committed = time.monotonic()
        print(f"=> continuing after {done:,} of {len(folder):,} images", file=sys.stderr)
        return True

    def restart(self, source: str) -> None:
        self._source, self._started = source, time.time_ns()
        self._committed = time.monotonic()
        for file in self._files.values():
            file.cut(0, 0)

    def add(self, key: int, record: bytes, file_name: str | None = None) -> None:
        self._files["train.idx"].write(b"%d\t%d\n" % (key, self._files["train.rec"].size))
        self._files["train.rec"].write(record)
        if file_name is not None:
            self._files["train.files.txt"].write(os.fsencode(file_name) + b"\n")

    def commit(self, interval: float = 0.0) -> None:
        """Make what was added survive a kill, unless the last commit is less than `interval` seconds ago."""
        if time.monotonic() - self._committed < interval:
            return
        for file in self._files.values():
            file.flush()
        journal = {
            "source": self._source, "started": self._started, "next": self.next, "skipped": self.skipped,
            "files": {name: (file.size, file.checksum) for name, file in self._files.items()},
        }
        with atomic_write(self._journal_path) as journal_file:
            journal_file.write(json.dumps(journal).encode())
        self._committed = time.monotonic()

    def publish(self, others: dict[str, bytes]) -> None:
        """Rename the files to their final names, train.rec last: without it there is no package."""
        for file in self._files.values():
            file.flush()
        rec = os.path.join(self._out, "train.rec")
        for old in (rec, f"{rec}.index"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(old)
        for name, content in others.items():
            with atomic_write(os.path.join(self._out, name)) as other:
                other.write(content)
        for name in ("train.idx", "train.files.txt", "train.rec"):
            os.replace(self._files[name].path, os.path.join(self._out, name))
        with contextlib.suppress(FileNotFoundError):  # a short run needs none
            os.unlink(self._journal_path)
        flush_directory(self._out)


def _changed_since(time_ns: int, path: str) -> bool:
    try:
        return os.stat(path).st_ctime_ns > time_ns  # unlike mtime, also new for a file that replaced another one
    except OSError:
        return False  # a broken link: it was left out


class _Appended:
    """A locked file that grows, with its size and CRC-32."""

    def __init__(self, path: str) -> None:
        self.path, self.size, self.checksum = path, 0, 0
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", buffering=1 << 20)
        _lock(self._file, path)
        if not os.path.exists(path) or os.stat(path).st_ino != os.fstat(self._file.fileno()).st_ino:
            raise UserError(f"{path}: another process has just finished it; run the command again")

    def cut(self, size: int, checksum: int) -> bool:
        """Truncate to `size` bytes and append there. False if the file is shorter or has another checksum."""
        self._file.seek(0)
        self.size, self.checksum = 0, 0
        while block := self._file.read(min(1 << 24, size - self.size)):
            self.size, self.checksum = self.size + len(block), zlib.crc32(block, self.checksum)
        if (self.size, self.checksum) != (size, checksum):
            return False
        self._file.seek(size)
        self._file.truncate()
        return True

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.size, self.checksum = self.size + len(data), zlib.crc32(data, self.checksum)

    def flush(self) -> None:
        flush(self._file)

    def close(self) -> None:
        self._file.close()


# ---------------------------------------------------------------------------------------------------------------------
# .rec -> image folder


def unpack_folder(options: argparse.Namespace) -> str:
    out = options.out.rstrip("/")
    exists = os.path.lexists(out) and not (os.path.isdir(out) and not os.listdir(out))
    if exists:
        _refuse_existing(out, options.force)
    dataset = RecordIODataset(options.source)
    keys = dataset.keys
    skipped = dataset.check_headers(options.skip_bad_images, progress=True)
    names = _image_names(dataset, keys)

    unfinished = f"{out}.partial"
    with _open_unpacking(unfinished, dataset, options.force):
        def write(item: tuple[int, str]) -> None:
            i, name = item
            _write_image(f"{unfinished}/{name}", dataset.encoded(i)[0])

        with _bar(len(dataset), "unpacking") as bar:
            for _ in _in_order(write, enumerate(names)):
                bar.update()
        files = sum(len(files) for _, _, files in os.walk(unfinished))
        if files != len(dataset):
            raise UserError(f"{unfinished}: holds {files} files after {len(dataset)} images were unpacked: names in "
                            "train.files.txt appear twice, or other files were put there; remove it and start again")
        os.sync()  # before the rename; an fsync of each file would take hours
        if exists:
            move_aside(out)
        os.rename(unfinished, out)
        os.unlink(f"{unfinished}.json")
    identities = len(np.unique(dataset.labels))
    if identities < len(dataset.identities):
        print(f"warning: {len(dataset.identities) - identities} identities have no image and do not appear in the "
              "folder: later labels move up", file=sys.stderr)
    note = f", {skipped} bad ones left out" if skipped else ""
    return f"{len(dataset):,} images of {identities:,} identities{note}"


def _image_names(dataset: RecordIODataset, keys: np.ndarray) -> Iterator[str]:
    """`<identity>/<file>` of each image in `dataset`. keys: those of all images, before bad ones were dropped."""
    stem = dataset.root.removesuffix(".rec")
    identities, labels = dataset.identities, dataset.labels
    for name in identities:
        _require_plain(name, f"{stem}.identities.txt")
    if identities == [str(label) for label in range(len(identities))]:  # so that they sort as they count
        identities = [name.zfill(len(identities[-1])) for name in identities]
    if os.path.exists(f"{stem}.files.txt"):
        lines = np.searchsorted(keys, dataset.keys)
        listed = functools.partial(_listed_names, f"{stem}.files.txt", lines, len(keys), identities, labels)
        deque(listed(), maxlen=0)  # finds all mistakes before any work
        return listed()
    width = len(str(keys[-1]))
    return (
        f"{identities[label]}/{key:0{width}d}{_extension(dataset.encoded(i)[0])}"
        for i, (label, key) in enumerate(zip(labels, dataset.keys))
    )


def _listed_names(
    path: str, lines: np.ndarray, count: int, identities: Sequence[str], labels: np.ndarray
) -> Iterator[str]:
    """The `lines` (int64, from 0, ascending) of files.txt, which must have `count`, and the label of each."""
    taken, number = 0, -1
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            if taken == len(lines) or number != lines[taken]:
                continue
            name = os.fsdecode(line.removesuffix(b"\n"))
            identity, slash, file_name = name.partition("/")
            expected = identities[labels[taken]]
            if identity != expected or not slash:
                raise UserError(f"{path}:{number + 1}: expected {ascii(expected)}/<file>, the identity of the image's "
                                f"label, got {ascii(name[:120])}; fetch this file again, or remove it")
            _require_plain(file_name, f"{path}:{number + 1}")
            taken += 1
            yield name
    if number + 1 != count:
        raise UserError(f"{path}: has {number + 1} lines for the package's {count} images; fetch it again, or remove "
                        "it")


def _require_plain(name: str, source: str) -> None:
    """Packages come from the internet: names in them must not lead out of OUT."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise UserError(f"{source}: {ascii(name[:120])} is not the name of a file or directory; correct it, or remove "
                        "this file")


def _extension(image: bytes) -> str:
    for start, at_8, extension in EXTENSIONS:
        if image.startswith(start) and image.startswith(at_8, 8):
            return extension
    return ""


@contextlib.contextmanager
def _open_unpacking(unfinished: str, dataset: RecordIODataset, force: bool) -> Iterator[None]:
    """Create the directory, or continue in the one that an interrupted run of the same package left. Locks it."""
    state = os.stat(dataset.root)
    package = {"package": os.path.abspath(dataset.root), "size": state.st_size, "time": state.st_mtime_ns}
    source = json.dumps(package).encode()
    marker = f"{unfinished}.json"
    if os.path.lexists(unfinished) and not os.path.exists(marker):
        raise UserError(f"{unfinished}: exists and was not made by this program; move it")
    os.makedirs(os.path.dirname(os.path.abspath(unfinished)), exist_ok=True)
    with open(marker, "a+b") as file:
        _lock(file, marker)
        file.seek(0)
        if os.path.isdir(unfinished) and file.read() != source:
            if not force:
                raise UserError(f"{unfinished}: was unpacked from another package; --force removes it")
            shutil.rmtree(unfinished)
        elif os.path.isdir(unfinished):
            print(f"=> continuing with {unfinished}", file=sys.stderr)
        file.truncate(0)
        file.write(source)
        file.flush()
        os.makedirs(unfinished, exist_ok=True)
        yield


def _write_image(path: str, image: bytes) -> None:
    """Write the image, unless the file has these bytes already. An interrupted run may have left a part of it."""
    try:
        with open(path, "rb") as file:
            if file.read() == image:
                return
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(image)


# ---------------------------------------------------------------------------------------------------------------------
# Pairs -> .bin


def pack_bin(options: argparse.Namespace) -> str:
    """Restarts after an interruption: 6,000 pairs take seconds."""
    _refuse_existing(options.out, options.force)
    directory = os.path.dirname(os.path.abspath(options.out))
    if not os.path.isdir(directory):
        raise UserError(f"{options.out}: there is no directory {directory}; create it first")
    pairs = PairList(options.imgs_root, options.pair_list)

    def read(path: str) -> bytes:
        image = read_bytes(path)
        decode_image(image, path)  # not only the header: the images are few, and later results depend on them
        return image

    images = []
    with _bar(len(pairs.paths), "packing") as bar:
        for image in _in_order(read, pairs.paths):
            images.append(image)
            bar.update()
    # An image of several pairs is one object in all of them, which pickle writes once.
    encoded = [images[i] for pair in zip(pairs.index1.tolist(), pairs.index2.tolist()) for i in pair]
    content = (encoded, pairs.is_same.tolist())
    with atomic_write(options.out) as file:
        pickle.dump(content, file, protocol=PICKLE_PROTOCOL)
    return f"{len(pairs):,} pairs of {len(images):,} images, {os.path.getsize(options.out) / 1e6:,.1f} MB"


# ---------------------------------------------------------------------------------------------------------------------


def _refuse_existing(path: str, force: bool) -> None:
    if os.path.lexists(path) and not force:
        raise UserError(f"{path}: exists; give another OUT, or --force")


def _lock(file: BinaryIO, path: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path}: another process is writing it; wait for it, or give another OUT") from None


def _in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """map(function, items), a few chunks ahead in threads."""
    def run(chunk: list[Item]) -> list[Result]:
        return list(map(function, chunk))

    remaining = iter(items)
    ahead: deque[Future[list[Result]]] = deque()
    with ThreadPoolExecutor(THREADS) as threads:
        while True:
            while len(ahead) < 2 * THREADS and (chunk := list(islice(remaining, CHUNK))):
                ahead.append(threads.submit(run, chunk))
            if not ahead:
                return
            yield from ahead.popleft().result()


def _bar(total: int, what: str, initial: int = 0) -> tqdm:
    return progress_bar(what, total, initial=initial, unit="image")


if __name__ == "__main__":
    exit_on_user_error(main)
