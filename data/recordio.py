"""Training on insightface's and MXNet's packages of images, without MXNet. data/record_format.py has the format; files:

    train.rec, train.idx    the records, and where they begin
    train.rec.index         the cache of a scan over all headers (see data.cache)
    train.identities.txt    names of the identities, a line each, by label (optional: scripts/pack.py)
    train.lst               the list of images that the package was made from (optional): their directories are names
    train.files.txt         `<identity>/<file>` of every image, a line each, by key (optional: scripts/pack.py)

The cache's arrays, for n images sorted by key: offsets int64 and sizes uint32 of their frames, labels int32, keys
uint32; bad int64, the positions of images that cannot be used; num_classes int64 (1,); identity_names uint8, lines of
train.lst's names by label, empty without them.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import sys
import weakref
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from data.cache import CachedArrays, cache_paths, load_caches, save_cache
from data.decode import IMAGE_SIZE, JPEG_BARE_MARKERS, JPEG_FRAME_MARKERS, check_encoded, read_bytes
from data.progress import progress_bar
from data.record_format import (
    FRAME,
    MAGIC,
    MAGIC_BYTES,
    MAX_CLASSES,
    MAX_PART_BYTES,
    RECORD_HEADER,
    WHOLE,
    find_parts,
    image_start,
    padded,
    read_idx,
)
from data.training_set import TrainingSet
from utils.errors import UserError
from utils.files import atomic_write, open_bounded

# The scan reads blocks of this many bytes, and after each as much as holds the frame header of all but a few JPEGs,
# which are read one by one.
_BLOCK = 1 << 24
_HEAD = 1 << 16
# The scan gathers a whole record header and a label wherever a frame begins; zeros after the block make that safe.
_MARGIN = 64
_MAX_RECORD_BYTES = 1 << 26  # far more than an image of 112x112 has
# What the scan keeps of a record. bad: not known to be an image of 112x112.
_SCANNED = np.dtype([("size", "u4"), ("label", "f4"), ("id", "u8"), ("empty", "?"), ("bad", "?")])
_CACHE_VERSION = 3


def _is_sound(cache: CachedArrays) -> bool:
    """Whether the arrays fit together, and every label is a class: copies of a .rec and its index keep their times."""
    n = (len(cache["labels"]) if "labels" in cache.arrays else 0,)
    if n == (0,) or not cache.has(labels=("<i4", n), offsets=("<i8", n), sizes=("<u4", n), keys=("<u4", n),
                                  bad=("<i8", (-1,)), num_classes=("<i8", (1,))):
        return False
    labels, bad, num_classes = cache["labels"], cache["bad"], int(cache["num_classes"][0])
    ascends = not len(bad) or 0 <= bad[0] and bad[-1] < len(labels) and bool((np.diff(bad) > 0).all())
    return ascends and 0 < num_classes <= MAX_CLASSES and 0 <= labels.min() and labels.max() < num_classes


class RecordIODataset(TrainingSet):
    """The images of a .rec file, or of the train.rec in a directory (or in its sub-directory train), sorted by key.

    Labels are those of the records, 0 to classes - 1. With record 0 there are as many classes as identity records;
    without it, or if there is an identity record for each label that occurs or for none, one more than the largest
    label: labels may have gaps. identities: the names of train.identities.txt, else those of train.lst if it fits the
    records, else the labels as text.

    The first start scans all headers (framing, labels, image sizes) and keeps what it finds in train.rec.index, which
    all processes map: 20 bytes per image. A missing train.idx is rebuilt from the records and saved. Images are read
    with pread, so all processes share them in the page cache.

    Raises UserError, naming file, record and offset: a file is missing or empty; frames are truncated, overlap, or
    leave a gap; the .idx does not fit; a label is not a class number.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, index: str | os.PathLike[str] = "auto", progress: bool = True
    ) -> None:
        found = _find_rec(os.fspath(path))
        if found is None:
            raise UserError(f"{path}: no .rec file, and no directory that holds train.rec; give one of them")
        self.root = found
        self._open()
        paths = cache_paths(f"{found}.index", os.fspath(index))
        cached = next(filter(_is_sound, load_caches(paths, self._made_from(), progress)), None)
        self._cache = cached or self._scan_file(paths, progress)
        names = self._cache.arrays.get("identity_names", np.empty(0, np.uint8)).tobytes()
        self.identities = _read_identities(_beside(found, ".identities.txt"), int(self._cache["num_classes"][0]), names)
        if progress:
            self._report_unused_classes()

    def _report_unused_classes(self) -> None:
        unused = np.flatnonzero(~_occurring(self._cache["labels"], len(self.identities)))
        if len(unused):
            print(f"note: {self.root}: {len(unused)} of its {len(self.identities)} classes have no image, such as "
                  f"{unused[0]}", file=sys.stderr)

    @staticmethod
    def is_at(path: str) -> bool:
        return _find_rec(path) is not None

    def _open(self) -> None:
        try:
            self._descriptor = os.open(self.root, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"{self.root}: cannot be read ({error.strerror})") from None
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._idx = _beside(self.root, ".idx")
        self._size = os.fstat(self._descriptor).st_size

    def _made_from(self) -> list:
        """What a cache is made from: the .rec, the .idx and the .lst, by size and time."""
        made_from: list = ["package", _CACHE_VERSION, self._size, os.fstat(self._descriptor).st_mtime_ns]
        for path in (self._idx, _beside(self.root, ".lst")):
            with contextlib.suppress(OSError):  # there may be none
                state = os.stat(path)
                made_from += [state.st_size, state.st_mtime_ns]
        return made_from

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_descriptor", "_close")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()
        # Without the .idx: nodes that start together without one all write it.
        if self._made_from()[:4] != self._cache.made_from[:4]:
            raise UserError(f"{self.root}: has changed since this run started; start it again")

    @property
    def keys(self) -> np.ndarray:
        """int64 (len,): the images' keys in the .idx, ascending; computed on each access."""
        return np.delete(self._cache["keys"].astype(np.int64), self._dropped)

    def image_names(self, indices: np.ndarray) -> list[str]:
        """The lines of train.files.txt; without that file `<identity>/<key>`."""
        positions = np.array([self._position(i) for i in indices.tolist()], np.int64)
        if listed := self._listed_files():
            names = dict.fromkeys(positions.tolist(), "")
            for position, name in enumerate(self._read_files(listed)):
                if position in names:
                    names[position] = name
            return [names[position] for position in positions.tolist()]
        return [self._key_name(position) for position in positions.tolist()]

    def find_images(self, names: Sequence[str]) -> np.ndarray:
        positions = np.full(len(names), -1)
        if listed := self._listed_files():
            wanted = set(names)
            there = {name: position for position, name in enumerate(self._read_files(listed)) if name in wanted}
            return np.array([there.get(name, -1) for name in names], np.int64)
        keys = self._cache["keys"]
        for k, name in enumerate(names):
            key = name.rpartition("/")[2]
            if key.isascii() and key.isdigit() and len(key) <= 10:
                position = int(np.searchsorted(keys, int(key)))
                if position < len(keys) and self._key_name(position) == name:
                    positions[k] = position
        return positions

    def _key_name(self, position: int) -> str:
        return f"{self.identities[self._label(position)]}/{int(self._cache['keys'][position])}"

    def _listed_files(self) -> str | None:
        path = _beside(self.root, ".files.txt")
        return path if os.path.exists(path) else None

    def _read_files(self, path: str) -> Iterator[str]:
        """The lines of train.files.txt, one for each image by position. Raises UserError."""
        count = 0
        try:
            with open_bounded(path, 1024 * (self._count() + 1)) as file:
                for line in file:
                    count += 1
                    yield os.fsdecode(line.rstrip(b"\n"))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        if count != self._count():
            raise UserError(f"{path}: must have a line for each of the package's {self._count()} images; fetch it "
                            "again, or remove it")

    def _count(self) -> int:
        return len(self._cache["labels"])

    def _labels(self) -> np.ndarray:
        return self._cache["labels"].astype(np.int64)

    def _label(self, position: int) -> int:
        return int(self._cache["labels"][position])

    def _encoded(self, position: int) -> tuple[bytes, str]:
        key, offset, size = (int(self._cache[name][position]) for name in ("keys", "offsets", "sizes"))
        name = self._name(key, offset)
        record, end = self._record(offset, offset + size, name)
        image = record[image_start(record) :]
        if not image or end != offset + size:
            raise UserError(f"{name}: holds no image, or has changed since {self.root} was scanned; fetch it again")
        return image, name

    def _identify(self) -> list[int]:
        return [self._cache.checksum(name) for name in ("keys", "sizes", "labels")]

    def _find_bad(self, progress: bool) -> tuple[np.ndarray, str]:
        """The scan has checked all headers."""
        bad = np.setdiff1d(self._cache["bad"], self._dropped, assume_unique=True)
        if len(bad):
            try:
                check_encoded(*self._encoded(int(bad[0])))
            except UserError as error:
                return bad, str(error)
            raise UserError(f"{self.root}: its index {self._cache.path} is of another file; remove the index")
        return bad, ""

    def _name(self, key: int, offset: int) -> str:
        return f"{self.root}: record {key} at offset {offset}"

    def _record(self, offset: int, limit: int, name: str) -> tuple[bytes, int]:
        """(the record at `offset`, where its frames end, at most at `limit`). Raises UserError naming it by `name`."""
        data = self._read(min(limit - offset, _MAX_RECORD_BYTES), offset, name)

        def head_at(at: int) -> bytes:
            return data[at - offset : at - offset + FRAME.size]

        parts = []
        for start, end in find_parts(head_at, offset, offset + len(data), name):
            parts.append(data[start - offset : end - offset])
        return MAGIC_BYTES.join(parts), padded(end)

    def _read(self, size: int, offset: int, name: str) -> bytes:
        """That many bytes, or those up to the end of the file."""
        try:
            data = os.pread(self._descriptor, size, offset)
        except OSError as error:
            raise UserError(f"{name}: cannot be read ({error.strerror})") from None
        if len(data) < min(size, self._size - offset):
            raise UserError(f"{name}: the file has become shorter since it was opened; start again when it is complete")
        return data

    # -----------------------------------------------------------------------------------------------------------------
    # The scan. Rows of its arrays are records in the order of the file.

    def _scan_file(self, paths: list[str], progress: bool) -> CachedArrays:
        """Scan all records, check them, and save the cache. Rebuilds a missing .idx."""
        if not self._size:
            raise UserError(f"{self.root}: the file is empty")
        before = self._made_from()
        has_idx = os.path.exists(self._idx)
        with progress_bar("reading records", None, progress, unit="B", unit_scale=True) as bar:
            bar.reset(self._size if has_idx else 2 * self._size)
            if has_idx:
                keys, offsets = read_idx(self._idx, at_most=self._size + 4096)  # no record is shorter than its line
                order = np.argsort(offsets, kind="stable")
                keys, offsets = keys[order], offsets[order]
                self._check_offsets(keys, offsets)
            else:
                offsets = self._find_records(bar)
                keys = np.arange(len(offsets))
            scanned = self._scan(keys, offsets, bar)
        if not has_idx:
            # Writers put the key into the record too, but no reader needs it, and some writers leave it 0.
            ids = scanned["id"]
            if ids.max() < 2**32 and len(np.unique(ids)) == len(ids):
                keys = ids.astype(np.int64)
            with contextlib.suppress(OSError), atomic_write(self._idx) as file:  # save_cache reports such a directory
                file.writelines(b"%d\t%d\n" % line for line in zip(keys, offsets))
        arrays = self._choose_images(keys, offsets, scanned)
        lst = _beside(self.root, ".lst")
        if os.path.exists(lst):
            try:
                names = _names_of_list(lst, arrays["keys"], arrays["labels"], int(arrays["num_classes"][0]))
                arrays["identity_names"] = np.frombuffer(os.fsencode("\n".join(names)), np.uint8)
            except (OSError, ValueError) as error:
                if progress:
                    print(f"note: {lst}: does not give the identities' names ({error})", file=sys.stderr)
        # The .rec as it was before the scan, in case that it has changed meanwhile.
        return save_cache(before[:4] + self._made_from()[4:], arrays, paths, progress)

    def _check_offsets(self, keys: np.ndarray, offsets: np.ndarray) -> None:
        """Raise UserError unless records can begin there. keys, offsets: int64 (records,), sorted by offset."""
        wrong = (offsets % 4 != 0) | (offsets >= self._size) | (np.diff(offsets, prepend=-1) == 0)
        wrong[0] |= offsets[0] != 0
        if wrong.any():
            row = int(wrong.argmax())
            raise UserError(f"{self._name(keys[row], offsets[row])}: no record begins there. Offsets in {self._idx} "
                            f"should differ, begin with 0, be multiples of 4, and lie within the {self._size} bytes "
                            "of the .rec file: fetch both files again, or remove the .idx file to have it rebuilt")

    def _find_records(self, bar: tqdm) -> np.ndarray:
        """The offsets of all records, from frame to frame: int64 (records,)."""
        offsets, at = array("q"), 0
        try:
            with open(self.root, "rb", buffering=1 << 20) as file:

                def head_at(at: int) -> bytes:
                    file.seek(at)
                    return file.read(FRAME.size)

                while at < self._size:
                    start = at
                    for _, end in find_parts(head_at, start, self._size, self._name(len(offsets), start)):
                        at = padded(end)
                    offsets.append(start)
                    bar.update(at - start)
        except OSError as error:
            raise UserError(f"{self.root}: cannot be read ({error.strerror})") from None
        return np.frombuffer(offsets, dtype=np.int64)

    def _scan(self, keys: np.ndarray, offsets: np.ndarray, bar: tqdm) -> np.ndarray:
        """_SCANNED (records,), by offset: what every record's head says, a block of records at a time."""
        scanned = np.zeros(len(offsets), _SCANNED)
        bounds = np.append(offsets[1:], self._size)
        start = 0
        while start < len(offsets):
            base = int(offsets[start])
            rows = slice(start, int(np.searchsorted(offsets, base + _BLOCK)))
            data = self._read(_BLOCK + _HEAD, base, f"{self.root}: offset {base}")
            done = _scan_block(data, offsets[rows] - base, bounds[rows] - base, scanned[rows])
            for row in (start + np.flatnonzero(~done)).tolist():
                scanned[row] = self._scan_one(int(keys[row]), int(offsets[row]), int(bounds[row]))
            bar.update(int(bounds[rows][-1]) - base)
            start = rows.stop
        return scanned

    def _scan_one(self, key: int, offset: int, bound: int) -> tuple[int, float, int, bool, bool]:
        """_SCANNED of a record that `_scan_block` left: of several parts, damaged, or not plainly a JPEG of 112x112."""
        name = self._name(key, offset)
        record, end = self._record(offset, bound, name)
        if end != bound:
            raise UserError(f"{name}: ends at offset {end}, but the next record begins, or the file ends, at {bound}: "
                            f"it or {self._idx} is damaged; fetch both again, or remove the latter to have it rebuilt")
        start = image_start(record)
        if start > len(record):
            raise UserError(f"{name}: has {len(record)} bytes, fewer than its header needs; fetch the file again")
        flag, label, id, _ = RECORD_HEADER.unpack_from(record)
        if flag:
            (label,) = struct.unpack_from("<f", record, RECORD_HEADER.size)
        bad = True
        with contextlib.suppress(UserError):  # check_headers reports it
            check_encoded(record[start:], name)
            bad = False
        return end - offset, label, id, start == len(record), bad

    def _choose_images(self, keys: np.ndarray, offsets: np.ndarray, scanned: np.ndarray) -> dict[str, np.ndarray]:
        """The cache's arrays: images without record 0 and the identity records, sorted by key, their labels checked."""
        order = np.argsort(keys, kind="stable")
        keys, offsets, scanned = keys[order], offsets[order], scanned[order]
        wrong = np.diff(keys, append=2**32) <= 0  # the key that follows is the same; or the last one is too large
        if wrong.any():
            raise UserError(f"{self._idx}: the key {keys[wrong.argmax()]} appears twice or is above {2**32 - 1}; "
                            "remove this file to have it rebuilt")
        images, num_classes, limit = slice(None), None, MAX_CLASSES
        if keys[0] == 0 and scanned["empty"][0]:
            name = self._name(0, offsets[0])
            record, _ = self._record(int(offsets[0]), int(offsets[0] + scanned["size"][0]), name)
            announced = np.frombuffer(record, "<f4", offset=RECORD_HEADER.size)[:2]
            if len(announced) == 2:
                begin = _first_identity(announced, keys[1:], scanned["empty"][1:], name)
                images = slice(1, begin)
                num_classes, gaps = _count_classes(announced, len(keys) - begin, scanned["label"][images], name)
                limit = MAX_CLASSES if gaps else num_classes
        offsets, keys, scanned = offsets[images], keys[images], scanned[images]
        if not len(keys):
            raise UserError(f"{self.root}: holds no image")
        labels = scanned["label"]
        with np.errstate(invalid="ignore"):  # the comparisons of NaN, which are False
            right = (labels >= 0) & (labels < limit) & (labels == np.floor(labels))
        if not right.all():
            row = int(right.argmin())
            raise UserError(f"{self._name(keys[row], offsets[row])}: its label {labels[row]:.9g} is not one of the "
                            f"classes 0 to {limit - 1} that record 0 announces, or float32 labels allow")
        return {
            "offsets": offsets, "sizes": scanned["size"], "labels": labels.astype(np.int32),
            "keys": keys.astype(np.uint32), "bad": np.flatnonzero(scanned["bad"]),
            "num_classes": np.array([num_classes or int(labels.max()) + 1]),
        }


def _first_identity(announced: np.ndarray, keys: np.ndarray, empty: np.ndarray, name: str) -> int:
    """How many records of the package precede the first identity record, record 0 included.

    announced: float32 (2,), record 0's labels; keys, empty: (records,), of the others, sorted by key. float32 rounds
    keys above 2^24: the first record without an image near the announced key is the one.
    """
    first = float(announced[0])
    tolerance = _rounding(len(keys))
    near = np.flatnonzero(empty & (np.abs(keys - first) <= tolerance))
    images = int(near[0]) if len(near) else int((keys < first).sum())
    if not abs(images + 1 - first) <= tolerance:
        raise _not_as_announced(announced, images, len(keys) - images, name)
    return images + 1


def _rounding(records: int) -> float:
    """How far float32 may be from a key of that many records."""
    return float(np.spacing(np.float32(records))) if records >= 2**24 else 0.0


def _not_as_announced(announced: np.ndarray, images: int, identities: int, name: str) -> UserError:
    first, end = announced.astype(float)
    return UserError(f"{name}: announces identity records with keys from {first:.9g} up to {end:.9g}, but there are "
                     f"{images} images before them and {identities} such records; fetch the .rec and .idx files "
                     "again, or remove the .idx file to have it rebuilt")


def _count_classes(announced: np.ndarray, identities: int, labels: np.ndarray, name: str) -> tuple[int, bool]:
    """(classes of a package with that many identity records, whether its labels may be beyond their number).

    They may where writers made an identity record for each label that occurs, or none: labels then have gaps, and
    record 0 announces the number of records or the largest label + 1. labels: float32 (images,), any values.
    """
    first, end = announced.astype(float)
    tolerance = 2 * _rounding(len(labels) + identities)
    with np.errstate(invalid="ignore"):
        valid = len(labels) > 0 and bool(((labels >= 0) & (labels < MAX_CLASSES)).all())
    largest = int(labels.max()) if valid else -1
    gaps = valid and identities in (0, np.count_nonzero(_occurring(labels, largest + 1)))
    if not any(abs(count - (end - first)) <= tolerance for count in (identities, *[largest + 1] * gaps)):
        raise _not_as_announced(announced, len(labels), identities, name)
    return (max(identities, largest + 1) if gaps else identities), gaps


def _occurring(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """bool (num_classes,): which of the classes occur among `labels`, of any type."""
    occurring = np.zeros(num_classes, bool)
    for start in range(0, len(labels), _BLOCK):  # an index array is copied as int64
        occurring[labels[start : start + _BLOCK].astype(np.int64)] = True
    return occurring


def _scan_block(data: bytes, at: np.ndarray, bounds: np.ndarray, scanned: np.ndarray) -> np.ndarray:
    """Fill `scanned`, _SCANNED (n,), with the records of `data` that begin `at` and must end at `bounds`, int64 (n,).

    Returns bool (n,): which records are done. They are whole, sound, and have no image or a JPEG of 112x112.
    """
    block = np.frombuffer(data[: len(data) // 4 * 4] + bytes(_MARGIN), np.uint8)
    words = block.view("<u4")
    word = at >> 2
    frame, flags = words[word + 1].astype(np.int64), words[word + 2].astype(np.int64)
    length = frame & MAX_PART_BYTES
    starts, ends = at + FRAME.size + RECORD_HEADER.size + 4 * flags, at + FRAME.size + length
    sound = (
        (words[word] == MAGIC) & (frame >> 29 == WHOLE) & (at + FRAME.size + padded(length) == bounds)
        & (length >= RECORD_HEADER.size) & (starts <= ends)
    )
    scanned["size"] = np.where(sound, bounds - at, 0)
    scanned["label"] = np.where(flags > 0, words[word + 8], words[word + 3]).view("<f4")
    scanned["id"] = words[word + 4] | words[word + 5].astype(np.uint64) << np.uint64(32)
    scanned["empty"] = scanned["bad"] = starts == ends
    done = sound & (starts == ends)
    images = np.flatnonzero(sound & (starts < ends))
    done[images] = _right_jpegs(block, starts[images], np.minimum(ends[images], len(data)))
    return done


def _right_jpegs(block: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """bool (n,): whether block[starts[k]:ends[k]] begins like a JPEG whose frame header says 112x112.

    Walks from segment to segment as data.decode does, for all images at once. False may also mean unknown.
    """
    right = np.zeros(len(starts), bool)
    rows = np.flatnonzero(ends - starts > 12)
    rows = rows[(block[starts[rows]] == 0xFF) & (block[starts[rows] + 1] == 0xD8) & (block[starts[rows] + 2] == 0xFF)]
    at = starts[rows] + 2
    for _ in range(64):  # a camera's JPEG has a dozen segments before the frame header
        more = at + 9 < ends[rows]
        rows, at = rows[more], at[more]
        more = (block[at] == 0xFF) & ~_IS_BARE_MARKER[block[at + 1]]
        rows, at = rows[more], at[more]
        if not len(rows):
            break
        marker = block[at + 1]
        is_frame = _IS_FRAME_MARKER[marker]
        height, width = _big_endian(block, at[is_frame] + 5), _big_endian(block, at[is_frame] + 7)
        right[rows[is_frame]] = (height == IMAGE_SIZE) & (width == IMAGE_SIZE)
        at += np.where(marker == 0xFF, 1, 2 + _big_endian(block, at + 2))
        rows, at = rows[~is_frame], at[~is_frame]
    return right


_IS_FRAME_MARKER, _IS_BARE_MARKER = (
    np.isin(np.arange(256), list(markers)) for markers in (JPEG_FRAME_MARKERS, JPEG_BARE_MARKERS))


def _big_endian(block: np.ndarray, at: np.ndarray) -> np.ndarray:
    return block[at].astype(np.int64) << 8 | block[at + 1]


# ---------------------------------------------------------------------------------------------------------------------
# Beside the .rec file


def _find_rec(path: str) -> str | None:
    if os.path.isfile(path):
        return path if path.endswith(".rec") else None
    candidates = (os.path.join(path, "train.rec"), os.path.join(path, "train", "train.rec"))
    return next((candidate for candidate in candidates if os.path.isfile(candidate)), None)


def _beside(rec: str, ending: str) -> str:
    return rec.removesuffix(".rec") + ending


def _names_of_list(path: str, keys: np.ndarray, labels: np.ndarray, num_classes: int) -> list[str]:
    """The identities' names by label: the last directory of each image in the list that the package was made from.

    Lines are `aligned<tab>path<tab>label...` as in insightface, one for each image in the order of keys, or
    `key<tab>label...<tab>path` as in MXNet. keys, labels: (images,). A label without an image is called by its number.
    Raises OSError, or ValueError with the reason unless the list has exactly these images and labels, and a name of its
    own for each label.
    """
    listed_keys, listed_labels, names = array("q"), array("d"), dict[int, str]()
    with io.TextIOWrapper(open_bounded(path, 4096 * (len(keys) + 1)), "utf-8", "surrogateescape") as file:
        for number, line in enumerate(file, 1):
            try:
                fields = line.rstrip("\r\n").split("\t")
                try:
                    key, label, image = int(fields[0]), float(fields[1]), fields[-1]  # MXNet's
                except ValueError:
                    key, label, image = number, float(fields[2]), fields[1]
                name = os.path.basename(os.path.dirname(image))
                if name in ("", ".", "..") or "\0" in name:
                    raise ValueError
                if names.setdefault(int(label), name) != name:
                    raise ValueError(f"label {label:g} is {ascii(names[int(label)])} and {ascii(name)}")
                listed_keys.append(key)
                listed_labels.append(label)
            except (LookupError, OverflowError, ValueError) as error:
                reason = str(error) if str(error).startswith("label") else "is no line of a list of images"
                raise ValueError(f"line {number}: {reason}") from None
    order = np.argsort(listed_keys, kind="stable")
    found = np.asarray(listed_keys)[order] - (listed_keys[order[0]] - int(keys[0]) if len(order) else 0)
    if not (np.array_equal(found, keys) and np.array_equal(np.asarray(listed_labels)[order], labels)):
        raise ValueError("its images or labels are not those of the records")
    by_label = [names.get(label, str(label)) for label in range(num_classes)]
    if len(set(by_label)) < num_classes:
        raise ValueError("two labels have the same name")
    return by_label


def _read_identities(path: str, num_classes: int, listed: bytes) -> list[str]:
    """The lines of the file; without it those of `listed`; or the labels. File systems take names as bytes of any kind.
    """
    if not os.path.exists(path):
        names = os.fsdecode(listed).split("\n")
        return names if len(names) == num_classes and listed else [str(label) for label in range(num_classes)]
    names = os.fsdecode(read_bytes(path, at_most=1024 * num_classes)).removesuffix("\n").split("\n")
    if len(names) != num_classes:
        raise UserError(f"{path}: has {len(names)} names for the {num_classes} identities of the package; fetch it "
                        "again, or remove it to use labels as names")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise UserError(f"{path}: the name {name!r} appears twice; correct it, or remove the file")
    return names
