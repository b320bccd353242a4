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
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice, zip_longest
from typing import BinaryIO, TypeVar

# The script's own directory is on sys.path, the repository's root is not.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

if __name__ == "__main__":
    from utils.packages import require_packages

    require_packages()

import numpy as np

from data.decode import IMAGE_SIZE, check_encoded, decode_image, read_bytes  # noqa: E402
from data.exclude import ExcludingSet, read_exclusions  # noqa: E402
from data.folder import FaceFolder  # noqa: E402
from data.pairs import PairList  # noqa: E402
from data.progress import progress_bar  # noqa: E402
from data.record_format import MAX_CLASSES, image_record, labels_record  # noqa: E402
from data.recordio import RecordIODataset  # noqa: E402
from data.training_set import TrainingSet  # noqa: E402
from utils.errors import Parser, UserError, exit_on_user_error  # noqa: E402
from utils.files import atomic_write, flush, flush_directory, move_aside, open_bounded, require_writable  # noqa: E402

COMMIT_SECONDS = 5.0  # the work that a kill costs at most
THREADS = 4  # they hide the latency of cold files and network disks
CHUNK = 64

# By how images begin. data.folder must take each for an image.
EXTENSIONS = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"BM": ".bmp", b"RIFF": ".webp", b"GIF8": ".gif",
              b"II": ".tif", b"MM": ".tif", b"P": ".ppm", b"\0\0\0\x0cjP": ".jp2", b"\xff\x4f\xff\x51": ".jp2"}

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
    commands = parser.add_subparsers(  # type: ignore[call-overload]  # a function in place of a class
        required=True, metavar="rec|folder|bin", parser_class=lambda prog, description, **_: Parser(prog, description)
    )
    for name, command, source, description in (
        ("rec", pack_rec, "FOLDER", "An image folder -> train.rec and train.idx in the directory OUT."),
        ("folder", unpack_folder, "PACKAGE", "A .rec file, or the train.rec in a directory -> an image folder OUT."),
        ("bin", pack_bin, None, "A pair list and its images -> the evaluation set OUT."),
    ):
        sub = commands.add_parser(name, help=description, description=description)
        sub.set_defaults(command=command)
        if source:
            sub.add_argument("source", metavar=source, help="what main.py would train on")
            sub.add_argument("--skip-bad-images", action="store_true",
                             help="leave out images that cannot be read, or are not 112x112, instead of stopping")
            sub.add_argument("--exclude", metavar="FILE",
                             help="leave out and merge what its lines name, as main.py does (see data/exclude.py); the "
                                  "images of a merged identity become IDENTITY.IMAGE")
        else:
            sub.add_argument("--imgs-root", required=True, metavar="DIR", help="the directory of the pairs' images")
            sub.add_argument("--pair-list", required=True, metavar="FILE",
                             help="lines of: path1 path2 0|1; or LFW's pairs.txt")
            sub.add_argument("--skip-missing-pairs", action="store_true",
                             help="leave out, and count, pairs with a missing image, instead of stopping")
        sub.add_argument("out", metavar="OUT", help="must not exist yet")
        sub.add_argument("--force", action="store_true", help="replace an existing OUT; a folder is renamed to OUT.1")
    return parser.parse_args(argv)


def pack_rec(options: argparse.Namespace) -> str:
    """An image folder -> train.rec and what belongs to it."""
    folder = _exclude(FaceFolder(options.source, progress=True), options.exclude)
    if len(folder.identities) > MAX_CLASSES:
        raise UserError(f"{folder.root}: has {len(folder.identities)} identities; a package, whose labels are float32, "
                        f"holds at most {MAX_CLASSES}")
    rec = os.path.join(options.out, "train.rec")
    _refuse_existing(rec, options.force)
    source = _digest(folder)
    os.makedirs(options.out, exist_ok=True)
    with _PartialPackage(options.out, source) as package:
        _refuse_existing(rec, options.force)  # again: another process may have finished it before we had the lock
        package.resume(folder)
        _add_images(package, folder, options.skip_bad_images)
        used = np.delete(_by_identity(folder), package.skipped)
        if not len(used):
            raise UserError(f"{folder.root}: no image can be used")
        ends = np.searchsorted(folder.labels[used], np.arange(len(folder.identities)), side="right") + 1
        first_identity = len(used) + 1
        package.add(0, labels_record(0, [first_identity, first_identity + len(ends)]))
        for label, (start, end) in enumerate(zip([1, *ends.tolist()], ends.tolist())):
            package.add(first_identity + label, labels_record(first_identity + label, [start, end]))
        package.publish({
            "property": [b"%d,%d,%d\n" % (len(ends), IMAGE_SIZE, IMAGE_SIZE)],
            "train.identities.txt": (os.fsencode(name) + b"\n" for name in folder.identities),
            "train.files.txt": (os.fsencode(_name(folder, i)) + b"\n" for i in used.tolist()),
        })
    skipped = f", {len(package.skipped)} bad ones left out" if package.skipped else ""
    return f"{len(used):,} images of {len(ends):,} identities{skipped}, {os.path.getsize(rec) / 1e6:,.1f} MB"


def _exclude(dataset: TrainingSet, path: str | None) -> TrainingSet:
    return dataset if path is None else ExcludingSet(dataset, read_exclusions(path))


def _path(folder: TrainingSet, i: int) -> str:
    return f"{folder.root}/{folder.image_names(np.array([i]))[0]}"


def _name(folder: TrainingSet, i: int) -> str:
    """<identity>/<file> in the package."""
    return _merged_name(folder, folder.image_names(np.array([i]))[0])


def _merged_name(dataset: TrainingSet, name: str, width: int = 0) -> str:
    """`name` below the identity that its own is merged into. width: of identities that are numbers in the name."""
    identity, _, file = name.partition("/")
    merged = dataset.merged if isinstance(dataset, ExcludingSet) else {}
    target = next((merged[own] for own in (identity, str(int(identity)) if width else identity) if own in merged), None)
    return name if target is None else f"{target.zfill(width)}/{identity}.{file}"


def _by_identity(folder: TrainingSet) -> np.ndarray:
    """int64 (images,): the images in the order of the package, that of their labels."""
    return np.argsort(folder.labels, kind="stable")


def _digest(folder: TrainingSet) -> str:
    """A hash of the directory and of all image names. Raises UserError for names that a package cannot keep."""
    digest = hashlib.sha256(os.fsencode(os.path.realpath(folder.root)))
    identity, of_identity = "", set[str]()
    for i in _by_identity(folder).tolist():
        name = _name(folder, i)
        if "\n" in name:
            raise UserError(f"{_path(folder, i)!r}: a line break in a name cannot be kept in train.files.txt; "
                            "rename the file or directory")
        if name.partition("/")[0] != identity:
            identity, of_identity = name.partition("/")[0], set()
        if name in of_identity:
            raise UserError(f"{_path(folder, i)}: merged, it would be {name}, which there is; rename the image")
        of_identity.add(name)
        digest.update(os.fsencode(name) + b"\n")
    return digest.hexdigest()


def _add_images(package: _PartialPackage, folder: TrainingSet, skip_bad: bool) -> None:
    order = _by_identity(folder).tolist()

    def read(i: int) -> tuple[int, bytes | UserError]:
        path = _path(folder, order[i])
        try:
            image = read_bytes(path)
            check_encoded(image, path)
        except UserError as error:
            return i, error
        return i, image

    labels, begin = folder.labels, package.done
    images = _in_order(read, range(begin, len(folder)))
    try:
        for i, image in progress_bar("packing", len(folder), iterable=images, initial=begin, unit="image"):
            if isinstance(image, bytes):
                key = i + 1 - len(package.skipped)
                package.add(key, image_record(key, int(labels[order[i]]), image))
            elif skip_bad:
                package.skipped.append(i)
            else:
                raise UserError(f"{image} (--skip-bad-images packs the others)")
            package.done = i + 1
            package.commit(COMMIT_SECONDS)
    except BaseException:  # also after an interruption: the next run continues from here
        with contextlib.suppress(OSError):
            package.commit()
        raise


class _PartialPackage(contextlib.ExitStack):
    """OUT/train.rec.partial and train.idx.partial while they grow, and the journal train.rec.partial.json.

    The journal says how far both files are valid. It is written after they have been flushed to the disk.
    done: the number of images that are done; skipped: which of them were left out.
    Raises UserError if another process is writing them.
    """

    def __init__(self, out: str, source: str) -> None:
        super().__init__()
        self._out, self._journal_path = out, os.path.join(out, "train.rec.partial.json")
        self._source, self._started, self._committed = source, time.time_ns(), time.monotonic()
        self.done, self.skipped = 0, list[int]()
        paths = [os.path.join(out, f"train.{kind}.partial") for kind in ("rec", "idx")]
        self._rec, self._idx = self._files = [self.enter_context(open(path, "ab", buffering=1 << 20)) for path in paths]
        _lock(self._rec)

    def resume(self, folder: TrainingSet) -> None:
        """Continue from the journal, unless the folder has changed since or the files do not fit; then start again."""
        sizes = [0, 0]
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError), open(self._journal_path) as journal_file:
            journal = json.load(journal_file)
            done, started = journal["done"], journal["started"]
            fit = all(os.path.getsize(file.name) >= size for file, size in zip(self._files, journal["sizes"]))
            if (journal["source"] == self._source and fit
                    and not any(_changed_since(started, _path(folder, i)) for i in _by_identity(folder)[:done])):
                self._started, self.done, self.skipped, sizes = started, done, journal["skipped"], journal["sizes"]
                print(f"=> continuing after {done:,} of {len(folder):,} images", file=sys.stderr)
        for file, size in zip(self._files, sizes):
            file.truncate(size)
            file.seek(size)

    def add(self, key: int, record: bytes) -> None:
        self._idx.write(b"%d\t%d\n" % (key, self._rec.tell()))
        self._rec.write(record)

    def commit(self, interval: float = 0.0) -> None:
        """Make what was added survive a kill, unless the last commit is less than `interval` seconds ago."""
        if time.monotonic() - self._committed < interval:
            return
        for file in self._files:
            flush(file)
        journal = {"source": self._source, "started": self._started, "done": self.done, "skipped": self.skipped,
                   "sizes": [file.tell() for file in self._files]}
        with atomic_write(self._journal_path) as journal_file:
            journal_file.write(json.dumps(journal).encode())
        self._committed = time.monotonic()

    def publish(self, others: dict[str, Iterable[bytes]]) -> None:
        """Write the other files and give these their final names, train.rec last: without it there is no package."""
        for file in self._files:
            flush(file)
        rec = os.path.join(self._out, "train.rec")
        for old in (rec, f"{rec}.index"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(old)
        for name, lines in others.items():
            with atomic_write(os.path.join(self._out, name)) as other:
                other.writelines(lines)
        for partial in (self._idx, self._rec):
            os.replace(partial.name, partial.name.removesuffix(".partial"))
        with contextlib.suppress(FileNotFoundError):  # a short run needs none
            os.unlink(self._journal_path)
        flush_directory(self._out)


def _changed_since(time_ns: int, path: str) -> bool:
    try:
        return os.stat(path).st_ctime_ns > time_ns  # unlike mtime, also new for a file that replaced another one
    except OSError:
        return False  # a broken link: it was left out


def unpack_folder(options: argparse.Namespace) -> str:
    """A package -> an image folder."""
    out = options.out.rstrip("/")
    exists = os.path.lexists(out) and not (os.path.isdir(out) and not os.listdir(out))
    if exists:
        _refuse_existing(out, options.force)
        print(f"=> {out} exists: it will be renamed, to {out}.1 or the next free number, when the images are unpacked",
              file=sys.stderr)
    dataset = RecordIODataset(options.source)
    if os.path.commonpath([os.path.realpath(out), os.path.realpath(dataset.root)]) == os.path.realpath(out):
        raise UserError(f"OUT {options.out}: holds the package {dataset.root}, which is read; give another directory")
    keys = dataset.keys
    nameless = list(dataset.identities) == [str(label) for label in range(len(dataset.identities))]
    used = _exclude(dataset, options.exclude)
    skipped = used.check_headers(options.skip_bad_images, progress=True)
    width = len(dataset.identities[-1]) if nameless else 0
    names = (_merged_name(used, name, width) for name in _image_names(dataset, keys))

    unfinished = f"{out}.partial"
    with _open_unpacking(unfinished, dataset, options.force, options.exclude):
        def write(item: tuple[int, str]) -> None:
            _write_image(f"{unfinished}/{item[1]}", dataset.encoded(item[0])[0])

        written = _in_order(write, enumerate(names))
        deque(progress_bar("unpacking", len(dataset), iterable=written, unit="image"), maxlen=0)
        files = sum(len(files) for _, _, files in os.walk(unfinished))
        if files != len(dataset):
            raise UserError(f"{unfinished}: holds {files} files after {len(dataset)} images were unpacked: names in "
                            "train.files.txt appear twice, or other files were put there; remove it and start again")
        os.sync()  # before the rename; an fsync of each file would take hours
        if exists:
            print(f"=> {out} was renamed to {move_aside(out)}", file=sys.stderr)
        os.rename(unfinished, out)
        os.unlink(f"{unfinished}.json")
    identities = len(np.unique(used.labels))
    if identities < len(used.identities):
        print(f"warning: {len(used.identities) - identities} identities have no image and do not appear in the "
              "folder: later labels move up", file=sys.stderr)
    note = f", {skipped} bad ones left out" if skipped else ""
    return f"{len(dataset):,} images of {identities:,} identities{note}"


def _image_names(dataset: RecordIODataset, keys: np.ndarray) -> Iterator[str]:
    """`<identity>/<file>` of each image in `dataset`. keys: those of all images, before bad ones were dropped."""
    stem = dataset.root.removesuffix(".rec")
    identities = list(dataset.identities)
    for name in identities:
        _require_plain(name, f"{stem}.identities.txt")
    if identities == [str(label) for label in range(len(identities))]:  # so that they sort as they count
        identities = [name.zfill(len(identities[-1])) for name in identities]
    names = [identities[label] for label in dataset.labels]
    if os.path.exists(f"{stem}.files.txt"):
        listed = functools.partial(_listed_names, f"{stem}.files.txt", np.isin(keys, dataset.keys), names)
        deque(listed(), maxlen=0)  # finds all mistakes before any work
        return listed()
    width = len(str(keys[-1]))
    return (f"{name}/{key:0{width}d}{_extension(dataset.encoded(i)[0])}"
            for i, (name, key) in enumerate(zip(names, dataset.keys)))


def _listed_names(path: str, used: np.ndarray, identities: list[str]) -> Iterator[str]:
    """The lines of files.txt for the images that are `used` (bool, all images), whose `identities` are given."""
    expected = iter(identities)
    with open_bounded(path, 1024 * len(used)) as file:
        for number, (line, is_used) in enumerate(zip_longest(file, used), 1):
            if line is None or is_used is None:
                raise UserError(f"{path}: must have a line for each of the package's {len(used)} images; fetch it "
                                "again, or remove it")
            if is_used:
                name, identity = os.fsdecode(line.removesuffix(b"\n")), next(expected)
                if not name.startswith(f"{identity}/"):
                    raise UserError(f"{path}:{number}: expected {identity!r}/<file>, the identity of the image's "
                                    f"label, got {name[:120]!r}; fetch this file again, or remove it")
                _require_plain(name[len(identity) + 1 :], f"{path}:{number}")
                yield name


def _require_plain(name: str, source: str) -> None:
    """Packages come from the internet: names in them must not lead out of OUT."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise UserError(f"{source}: {name[:120]!r} is not the name of a file or directory; correct it, or remove "
                        "this file")


def _extension(image: bytes) -> str:
    if image[4:8] == b"ftyp":  # after the length of this box
        return ".avif"
    return next((extension for start, extension in EXTENSIONS.items() if image.startswith(start)), "")


@contextlib.contextmanager
def _open_unpacking(unfinished: str, dataset: RecordIODataset, force: bool, exclude: str | None) -> Iterator[None]:
    """Create the directory, or continue in the one that an interrupted run of the same package left. Locks it."""
    state = os.stat(dataset.root)
    source = json.dumps([os.path.abspath(dataset.root), state.st_size, state.st_mtime_ns,
                         *([read_exclusions(exclude).digest()] if exclude else [])]).encode()
    os.makedirs(os.path.dirname(os.path.abspath(unfinished)), exist_ok=True)
    with open(f"{unfinished}.json", "a+b") as file:
        _lock(file)
        file.seek(0)
        found = file.read()
        if os.path.lexists(unfinished):
            if not found:
                raise UserError(f"{unfinished}: exists and was not made by this program; move it")
            if found == source:
                print(f"=> continuing with {unfinished}", file=sys.stderr)
            elif force:
                shutil.rmtree(unfinished)
            else:
                raise UserError(f"{unfinished}: was unpacked from another package; --force removes it")
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


def pack_bin(options: argparse.Namespace) -> str:
    """Pairs -> one file. Restarts after an interruption: 6,000 pairs take seconds."""
    _refuse_existing(options.out, options.force)
    require_writable("OUT", options.out, force=options.force, inputs=[options.pair_list])
    pairs = PairList(options.imgs_root, options.pair_list, skip_missing=options.skip_missing_pairs)
    require_writable("OUT", options.out, force=options.force, inputs=pairs.paths)

    def read(path: str) -> bytes:
        image = read_bytes(path)
        decode_image(image, path)  # not only the header: the images are few, and later results depend on them
        return image

    images = list(_in_order(read, pairs.paths))
    # An image of several pairs is one object in all of them, which pickle writes once.
    encoded = [images[i] for pair in zip(pairs.index1.tolist(), pairs.index2.tolist()) for i in pair]
    with atomic_write(options.out) as file:
        pickle.dump((encoded, pairs.is_same.tolist()), file, protocol=4)
    skipped = f", {pairs.skipped:,} skipped for missing images" if pairs.skipped else ""
    return f"{len(pairs):,} pairs of {len(images):,} images{skipped}, {os.path.getsize(options.out) / 1e6:,.1f} MB"


def _refuse_existing(path: str, force: bool) -> None:
    if os.path.lexists(path) and not force:
        raise UserError(f"{path}: exists; give another OUT, or --force")


def _lock(file: BinaryIO) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{file.name}: another process is writing it; wait for it, or give another OUT") from None


def _in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """map(function, items) in threads, which are a few chunks ahead."""
    def run(chunk: list[Item]) -> list[Result]:
        return list(map(function, chunk))

    remaining = iter(items)
    ahead: deque[Future[list[Result]]] = deque()
    with ThreadPoolExecutor(THREADS) as threads:
        while chunk := list(islice(remaining, CHUNK)):
            ahead.append(threads.submit(run, chunk))
            if len(ahead) == 2 * THREADS:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()


if __name__ == "__main__":
    exit_on_user_error(main)
