"""Training on insightface's and MXNet's packages of images, without MXNet. data/record_format.py has the format; files:

    train.rec, train.idx    the records, and where they begin
    train.rec.index         the cache of a scan over all headers (see `_Scan` and data.cache)
    train.identities.txt    names of the identities, a line each, by label (optional: scripts/pack.py)
    train.files.txt         `<identity>/<file>` of every image, a line each, by key (optional: scripts/pack.py)

The cache's arrays, for n images sorted by key: offsets int64 and sizes uint32 of their frames, labels int32, keys
uint32; bad int64, the positions of images that cannot be used; num_classes int64 (1,).
"""

from __future__ import annotations

import os
import struct
import weakref
import zlib
from array import array
from typing import Any

import numpy as np
from tqdm import tqdm

from data.cache import CachedArrays, cache_paths, load_caches, save_cache
from data.decode import IMAGE_SIZE, JPEG_FRAME_MARKERS, check_encoded
from data.progress import progress_bar
from data.record_format import (
    FRAME,
    LAST,
    MAGIC,
    MAX_CLASSES,
    MAX_PART_BYTES,
    RECORD_HEADER,
    WHOLE,
    image_start,
    join_frames,
    padded,
    read_idx,
    require_frame,
    write_idx,
)
from data.training_set import TrainingSet
from utils.errors import UserError
from utils.files import atomic_write

# The file is scanned in blocks of this many bytes. The head of a block's last record is read to the length _HEAD, which
# holds the frame header of all but a few JPEGs; those are read one by one.
_BLOCK = 1 << 24
_HEAD = 1 << 16
# The scan gathers a whole record header and a label wherever a frame begins; zeros after the block make that safe.
_MARGIN = 64
_CACHE_VERSION = 3


class RecordIODataset(TrainingSet):
    """The images of a .rec file, or of the train.rec in a directory (or in its sub-directory train), sorted by key.

    Labels are those of the records, 0 to classes - 1. With record 0 there are as many classes as identity records;
    without it one more than the largest label. identities: the names of train.identities.txt, else the labels as text.

    The first start scans all headers (framing, labels, image sizes) and keeps what it finds in train.rec.index, which
    all processes map: 20 bytes per image. A missing train.idx is rebuilt from the records and saved. Images are read
    with pread, so all processes share them in the page cache.

    Raises UserError, naming file, record and offset: a file is missing or empty; frames are truncated, overlap, or
    leave a gap; the .idx does not fit; a label is not a class number.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, index: str | os.PathLike[str] = "auto", progress: bool = True
    ) -> None:
        path = os.fspath(path)
        found = _find_rec(path)
        if found is None:
            raise UserError(f"{path}: no .rec file, and no directory that holds train.rec; give one of them")
        self.root = found
        self._open()
        paths = cache_paths(f"{found}.index", os.fspath(index))
        made_from = self._made_from()
        caches = (cache for cache in load_caches(paths, _require_sound, progress) if cache.made_from == made_from)
        self._cache = next(caches, None) or self._scan_file(made_from, paths, progress)
        self.identities = _read_identities(_beside(found, ".identities.txt"), found, int(self._cache["num_classes"][0]))

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
        """What a cache is made from: the .rec by size and time, the .idx by size and checksum of its two ends.

        The .idx has no time here: nodes that start together without one all write the same .idx.
        """
        rec = os.fstat(self._descriptor)
        try:
            with open(self._idx, "rb") as file:
                idx_size = os.fstat(file.fileno()).st_size
                checksum = zlib.crc32(file.read(_HEAD))
                file.seek(max(0, idx_size - _HEAD))
                checksum = zlib.crc32(file.read(_HEAD), checksum)
        except OSError:
            idx_size, checksum = -1, 0
        return ["package", _CACHE_VERSION, rec.st_size, rec.st_mtime_ns, idx_size, checksum]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_descriptor", "_close")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()
        if self._made_from()[:4] != self._cache.made_from[:4]:
            raise UserError(f"{self.root}: has changed since this run started; start it again")

    @property
    def keys(self) -> np.ndarray:
        """int64 (len,): the images' keys in the .idx, ascending; computed on each access."""
        return np.delete(self._cache["keys"].astype(np.int64), self._dropped)

    def _count(self) -> int:
        return len(self._cache["labels"])

    def _labels(self) -> np.ndarray:
        return self._cache["labels"].astype(np.int64)

    def _label(self, position: int) -> int:
        return int(self._cache["labels"][position])

    def _encoded(self, position: int) -> tuple[bytes, str]:
        offset, size = int(self._cache["offsets"][position]), int(self._cache["sizes"][position])
        name = self._name(int(self._cache["keys"][position]), offset)
        record, end = join_frames(self._read(size, offset, name), name)
        if end != size or len(record) < RECORD_HEADER.size:
            raise UserError(f"{name}: its length has changed since {self.root} was scanned; start again")
        image = record[image_start(record) :]
        if not image:
            raise UserError(f"{name}: the record holds no image")
        return image, name

    def _find_bad(self, progress: bool) -> tuple[np.ndarray, str]:
        """The scan has checked all headers."""
        bad = np.setdiff1d(self._cache["bad"], self._dropped, assume_unique=True)
        if not len(bad):
            return bad, ""
        try:
            check_encoded(*self._encoded(int(bad[0])))
        except UserError as error:
            return bad, str(error)
        raise UserError(f"{self.root}: its index {self._cache.path} is of another file; remove the index")

    def _name(self, key: int, offset: int) -> str:
        return f"{self.root}: record {key} at offset {offset}"

    def _read(self, size: int, offset: int, name: str) -> bytes:
        try:
            data = os.pread(self._descriptor, size, offset)
        except OSError as error:
            raise UserError(f"{name}: cannot be read ({error.strerror})") from None
        if len(data) < size:
            raise UserError(f"{name}: the file is truncated, {size - len(data)} bytes are missing; fetch it again")
        return data

    # -----------------------------------------------------------------------------------------------------------------
    # The scan. Rows of its arrays are records in the order of the file.

    def _scan_file(self, made_from: list, paths: list[str], progress: bool) -> CachedArrays:
        """Scan all records, check them, and save the cache. Rebuilds a missing .idx."""
        if not self._size:
            raise UserError(f"{self.root}: the file is empty")
        has_idx = os.path.exists(self._idx)
        with progress_bar("reading records", None, progress, unit="B", unit_scale=True) as bar:
            bar.reset(self._size if has_idx else 2 * self._size)
            if has_idx:
                keys, offsets = read_idx(self._idx)
                order = np.argsort(offsets, kind="stable")
                keys, offsets = keys[order], offsets[order]
                self._require_offsets_in_file(keys, offsets)
            else:
                offsets = self._find_records(bar)
                keys = np.arange(len(offsets))
            scan = self._scan(keys, offsets, bar)
        if not has_idx:
            # Writers put the key into the record too, but no reader needs it, and some writers leave it 0.
            ids = scan.ids
            if int(ids.max()) < 2**32 and len(np.unique(ids)) == len(ids):
                keys = ids.astype(np.int64)
            try:
                with atomic_write(self._idx) as file:
                    write_idx(file, keys, offsets)
            except OSError:
                pass  # save_cache reports a directory that cannot be written
            # The .rec as it was before the scan, in case that it has changed meanwhile.
            made_from = [*made_from[:4], *self._made_from()[4:]]
        return save_cache(made_from, self._choose_images(keys, offsets, scan), paths, progress)

    def _require_offsets_in_file(self, keys: np.ndarray, offsets: np.ndarray) -> None:
        """keys, offsets: int64 (records,), sorted by offset."""
        remedy = (f"{self._idx} belongs to another file, or one of them is damaged; remove {self._idx} to have it "
                  "rebuilt")
        twice = np.flatnonzero(np.diff(offsets) == 0)
        if len(twice):
            row = int(twice[0])
            name = self._name(keys[row], offsets[row])
            raise UserError(f"{name}: record {keys[row + 1]} has the same offset; {remedy}")
        for wrong, what in (
            (offsets >= self._size, f"beyond the end of the file, which has {self._size} bytes: it is truncated, or"),
            (offsets % 4 != 0, "not a multiple of 4;"),
        ):
            rows = np.flatnonzero(wrong)
            if len(rows):
                raise UserError(f"{self._name(keys[rows[0]], offsets[rows[0]])}: the offset is {what} {remedy}")
        if offsets[0] != 0:
            raise UserError(f"{self.root}: {self._idx} lists no record at offset 0; {remedy}")

    def _find_records(self, bar: tqdm) -> np.ndarray:
        """The offsets of all records, from frame to frame: int64 (records,)."""
        offsets = array("q")
        block, base, at, begun = b"", 0, 0, 0
        whole = True
        while at < self._size:
            name = f"{self.root}: offset {at}"
            if at + FRAME.size > base + len(block):
                bar.update(len(block))
                block, base = self._read(min(_BLOCK, self._size - at), at, name), at
                if len(block) < FRAME.size:
                    raise UserError(f"{name}: the file is truncated within the head of a frame; fetch it again")
            magic, word = FRAME.unpack_from(block, at - base)
            part, length = word >> 29, word & MAX_PART_BYTES
            require_frame(magic, part, first=whole, name=name)
            if whole:
                offsets.append(at)
                begun = at
            whole = part in (WHOLE, LAST)
            at += FRAME.size + padded(length)
            if at > self._size:
                raise UserError(f"{self._name(len(offsets) - 1, begun)}: the file is truncated within it, "
                                f"{at - self._size} bytes are missing; fetch it again")
        if not whole:
            raise UserError(f"{self._name(len(offsets) - 1, begun)}: the file is truncated before its last part; "
                            "fetch it again")
        return np.frombuffer(offsets, dtype=np.int64)

    def _scan(self, keys: np.ndarray, offsets: np.ndarray, bar: tqdm) -> _Scan:
        """Every record's head, a block of records at a time; keys are for errors. All int64 (records,), by offset."""
        scan = _Scan(len(offsets))
        bounds = np.append(offsets[1:], self._size)
        buffer = np.empty(_BLOCK + _HEAD + _MARGIN, dtype=np.uint8)
        start = 0
        while start < len(offsets):
            base = int(offsets[start])
            stop = max(int(np.searchsorted(offsets, base + _BLOCK)), start + 1)
            size = min(int(offsets[stop - 1]) + _HEAD, self._size) - base
            rows = slice(start, stop)
            self._read_into(buffer, size, base)
            quick = scan.fill(rows, buffer, size, offsets[rows] - base, bounds[rows] - base)
            for row in (start + np.flatnonzero(~quick)).tolist():
                self._scan_one(scan, row, int(keys[row]), int(offsets[row]), int(bounds[row]))
            bar.update(int(bounds[stop - 1]) - base)
            start = stop
        return scan

    def _read_into(self, buffer: np.ndarray, size: int, offset: int) -> None:
        """Fill the buffer with `size` bytes of the file, then zeros."""
        try:
            got = os.preadv(self._descriptor, [buffer.data[:size]], offset)
        except OSError as error:
            raise UserError(f"{self.root}: cannot be read at offset {offset} ({error.strerror})") from None
        if got < size:
            raise UserError(f"{self.root}: became shorter while it was read; start again when it is complete")
        buffer[size : size + _MARGIN] = 0

    def _scan_one(self, scan: _Scan, row: int, key: int, offset: int, bound: int) -> None:
        """A record that `_Scan.fill` left: of several parts, damaged, or with an image that is not plainly a JPEG of
        112x112."""
        name = self._name(key, offset)
        size = self._frames_end(name, offset, bound) - offset
        if size >= 2**31:  # what one pread can give
            raise UserError(f"{name}: has {size} bytes, which is no image")
        record, _ = join_frames(self._read(size, offset, name), name)
        if len(record) < RECORD_HEADER.size:
            raise UserError(f"{name}: has {len(record)} bytes, less than a record's header")
        flag, label, id, _ = RECORD_HEADER.unpack_from(record)
        start = image_start(record)
        if start > len(record):
            raise UserError(f"{name}: its header announces {flag} labels, more than its {len(record)} bytes hold")
        if flag:
            label = struct.unpack_from("<f", record, RECORD_HEADER.size)[0]
        scan.sizes[row], scan.labels[row], scan.ids[row] = size, label, id
        scan.empty[row] = start == len(record)
        scan.bad[row] = True
        if not scan.empty[row]:
            try:
                check_encoded(record[start:], name)
                scan.bad[row] = False
            except UserError:
                pass  # check_headers reports it

    def _frames_end(self, name: str, offset: int, bound: int) -> int:
        """Where the frames of the record at `offset` end. That must be at `bound`, where the next record begins."""
        at, part = offset, None
        while part not in (WHOLE, LAST):
            head = self._read(min(FRAME.size, bound - at), at, name)
            if len(head) < FRAME.size:
                raise self._overrun(name, at + FRAME.size, bound)
            magic, word = FRAME.unpack(head)
            part, length = word >> 29, word & MAX_PART_BYTES
            require_frame(magic, part, first=at == offset, name=name, hint=self._idx_hint())
            at += FRAME.size + padded(length)
            if at > bound:
                raise self._overrun(name, at, bound)
        if at < bound:
            rest = (f"the next record begins at {bound}: the bytes between belong to no record" if bound < self._size
                    else f"the {bound - at} bytes after it belong to no record")
            raise UserError(f"{name}: ends at offset {at}, and {rest}{self._idx_hint()}")
        return at

    def _overrun(self, name: str, end: int, bound: int) -> UserError:
        if bound == self._size:
            what = f"the file has {bound}: it is truncated; fetch it again"
        else:
            what = f"overlaps the next record at {bound}{self._idx_hint()}"
        return UserError(f"{name}: needs the bytes up to {end}, and {what}")

    def _idx_hint(self) -> str:
        if not os.path.exists(self._idx):
            return ""
        return f"; the file or {self._idx} is damaged (remove the latter to have it rebuilt)"

    def _choose_images(self, keys: np.ndarray, offsets: np.ndarray, scan: _Scan) -> dict[str, np.ndarray]:
        """The cache's arrays: images without record 0 and the identity records, sorted by key, their labels checked."""
        order = np.argsort(keys, kind="stable")
        twice = np.flatnonzero(np.diff(keys[order]) == 0)
        if len(twice):
            row = order[twice[0]]
            raise UserError(f"{self._idx}: the key {keys[row]} appears twice; remove this file to have it rebuilt")
        if keys[order[-1]] >= 2**32:
            raise UserError(f"{self._idx}: the key {keys[order[-1]]} is above {2**32 - 1}")
        images, num_classes = order, None
        if keys[order[0]] == 0 and scan.empty[order[0]]:
            name = self._name(0, offsets[order[0]])
            record, _ = join_frames(self._read(int(scan.sizes[order[0]]), int(offsets[order[0]]), name), name)
            labels = np.frombuffer(record, "<f4", offset=RECORD_HEADER.size)
            if len(labels) >= 2:
                others = order[1:]
                first = _first_identity(labels[:2], keys[others], scan.empty[others], name)
                images, num_classes = others[keys[others] < first], int((keys[others] >= first).sum())
                if len(images) != first - 1:
                    raise UserError(f"{name}: announces the images 1 to {first - 1}, but {self._idx} has {len(images)} "
                                    f"of them; fetch both files again, or remove {self._idx} to have it rebuilt")
        if not len(images):
            raise UserError(f"{self.root}: holds no image")
        labels = scan.labels[images]
        limit = MAX_CLASSES if num_classes is None else num_classes
        with np.errstate(invalid="ignore"):  # the comparisons of NaN, which are False
            wrong = np.flatnonzero(~((labels >= 0) & (labels < limit) & (labels == np.floor(labels))))
        if len(wrong):
            row = images[wrong[0]]
            source = "float32 labels allow" if num_classes is None else "record 0 announces"
            name = self._name(keys[row], offsets[row])
            raise UserError(f"{name}: its label {scan.labels[row]:.9g} is not one of the classes 0 to {limit - 1} that "
                            f"{source}")
        if num_classes is None:
            num_classes = int(labels.max()) + 1
        return {
            "offsets": offsets[images], "sizes": scan.sizes[images], "labels": labels.astype(np.int32),
            "keys": keys[images].astype(np.uint32), "bad": np.flatnonzero(scan.bad[images]),
            "num_classes": np.array([num_classes]),
        }


def _first_identity(announced: np.ndarray, keys: np.ndarray, empty: np.ndarray, name: str) -> int:
    """The key of the first identity record.

    announced: float32 (2,), record 0's labels; keys, empty: (records,), of the others, sorted by key. Where float32
    rounds, the first record without an image near the announced key is taken.
    """
    first, end = (float(label) for label in announced)
    if not (1 <= first <= end <= 2**32 and first == int(first) and end == int(end)):
        raise UserError(f"{name}: announces identity records with the impossible keys {first:.9g} to {end:.9g}")
    if end <= 2**24:
        present = int((keys >= first).sum())
        if present != int(end - first):
            raise UserError(f"{name}: announces {int(end - first)} identity records, and there are {present}; "
                            "fetch the .rec and .idx files again")
        return int(first)
    near = np.flatnonzero((np.abs(keys - first) <= np.spacing(announced[0])) & empty)
    return int(keys[near[0]]) if len(near) else int(first)


class _Scan:
    """The heads of `count` records, by offset. bad: not known to be an image of 112x112."""

    def __init__(self, count: int) -> None:
        self.sizes = np.zeros(count, np.uint32)
        self.labels = np.zeros(count, np.float32)
        self.ids = np.zeros(count, np.uint64)
        self.empty = np.zeros(count, bool)
        self.bad = np.zeros(count, bool)

    def fill(self, rows: slice, block: np.ndarray, size: int, at: np.ndarray, bounds: np.ndarray) -> np.ndarray:
        """Read the records that begin at `at` and must end at `bounds`, int64 (n,), in the `size` bytes of `block`.

        Returns bool (n,): which records are done. They are whole, sound, and have no image or a JPEG of 112x112.
        """
        words = block[: size // 4 * 4 + _MARGIN].view("<u4")
        word = at >> 2
        frame, flags = words[word + 1].astype(np.int64), words[word + 2].astype(np.int64)
        length = frame & MAX_PART_BYTES
        starts, ends = at + FRAME.size + RECORD_HEADER.size + 4 * flags, at + FRAME.size + length
        sound = (
            (words[word] == MAGIC) & (frame >> 29 == WHOLE) & (at + FRAME.size + padded(length) == bounds)
            & (length >= RECORD_HEADER.size) & (starts <= ends)
        )
        self.sizes[rows] = np.where(sound, bounds - at, 0)
        self.labels[rows] = np.where(flags > 0, words[word + 8], words[word + 3]).view("<f4")
        self.ids[rows] = words[word + 4] | words[word + 5].astype(np.uint64) << np.uint64(32)
        self.empty[rows] = self.bad[rows] = starts == ends
        done = sound & (starts == ends)
        images = np.flatnonzero(sound & (starts < ends))
        done[images] = _right_jpegs(block, starts[images], np.minimum(ends[images], size))
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
        more = block[at] == 0xFF
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


_IS_FRAME_MARKER = np.isin(np.arange(256), list(JPEG_FRAME_MARKERS))


def _big_endian(block: np.ndarray, at: np.ndarray) -> np.ndarray:
    return block[at].astype(np.int64) << 8 | block[at + 1]


# ---------------------------------------------------------------------------------------------------------------------
# Beside the .rec file


def _require_sound(cache: CachedArrays) -> None:
    """Raise ValueError for what checksums cannot exclude."""
    labels, bad, num_classes = cache["labels"], cache["bad"], int(cache["num_classes"][0])
    if not 0 <= labels.min() <= labels.max() < num_classes <= MAX_CLASSES:
        raise ValueError("its labels are not class numbers")
    same_length = len({len(cache[name]) for name in ("labels", "offsets", "sizes", "keys")}) == 1
    if not same_length or len(bad) and not 0 <= bad.min() <= bad.max() < len(labels):
        raise ValueError("its arrays contradict one another")


def _find_rec(path: str) -> str | None:
    if os.path.isfile(path):
        return path if path.endswith(".rec") else None
    candidates = (os.path.join(path, "train.rec"), os.path.join(path, "train", "train.rec"))
    return next((candidate for candidate in candidates if os.path.isfile(candidate)), None)


def _beside(rec: str, ending: str) -> str:
    return rec.removesuffix(".rec") + ending


def read_names(path: str) -> list[str]:
    """The lines of identities.txt or files.txt. File systems take names as bytes, so no encoding is assumed."""
    try:
        with open(path, "rb") as file:
            lines = file.read().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if lines[-1] == b"":
        lines.pop()
    return [os.fsdecode(line) for line in lines]


def _read_identities(path: str, rec: str, num_classes: int) -> list[str]:
    if not os.path.exists(path):
        return [str(label) for label in range(num_classes)]
    names = read_names(path)
    if len(names) != num_classes:
        raise UserError(f"{path}: has {len(names)} names for the {num_classes} identities of {rec}; fetch it again, or "
                        "remove it to use labels as names")
    if len(set(names)) < len(names):
        ordered = sorted(names)
        twice = next(name for name, following in zip(ordered, ordered[1:]) if name == following)
        raise UserError(f"{path}: the name {ascii(twice)} appears twice; correct it, or remove the file")
    return names
