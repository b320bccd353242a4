"""Training on insightface's and MXNet's packages of images, without MXNet. data/record_format.py has the format; files:

    train.rec, train.idx    the records, and where they begin
    train.rec.index         what one scan over all headers found (made anew where it does not fit, see `_Index`)
    train.identities.txt    names of the identities, a line each, by label (optional: scripts/pack.py)
    train.files.txt         `<identity>/<file>` of every image, a line each, by key (optional: scripts/pack.py)
"""

from __future__ import annotations

import functools
import mmap
import os
import secrets
import struct
import sys
import weakref
import zlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from data.decode import IMAGE_SIZE, JPEG_FRAME_MARKERS, check_encoded, decode_image
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
from utils.errors import UserError

# The file is scanned in blocks of so many bytes, and the head of a block's last record is read to this length: far
# enough for the frame header of all but a few JPEGs, and these are read one by one.
_BLOCK = 1 << 24
_HEAD = 1 << 16
# The scan's gathers read a whole record header, and a label, wherever a frame begins; zeros after the block allow it.
_MARGIN = 64
_INDEX_VERSION = 2


def is_recordio(path: str) -> bool:
    """Whether `path` is a .rec file, or a directory that holds train.rec or train/train.rec."""
    return _find_rec(path) is not None


def require_no_package(path: str) -> None:
    """Raise UserError where `path`, which is to be taken for a directory of images, looks like a package that was meant."""
    if path.endswith(".rec"):
        raise UserError(f"{path}: no such file; give a .rec file, or a directory of images")
    if os.path.isdir(path):
        with os.scandir(path) as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries)
        packages = [name for name, is_directory in found if name.endswith(".rec") and not is_directory]
        if packages and not any(is_directory for _, is_directory in found):
            raise UserError(f"{path}: holds {packages[0]}, and no train.rec; give {os.path.join(path, packages[0])}")


def _find_rec(path: str) -> str | None:
    if os.path.isfile(path):
        return path if path.endswith(".rec") else None
    candidates = (os.path.join(path, "train.rec"), os.path.join(path, "train", "train.rec"))
    return next((candidate for candidate in candidates if os.path.isfile(candidate)), None)


class RecordIODataset(Dataset):
    """The images of a .rec file, or of the train.rec in a directory (or in its sub-directory train), sorted by key.

    dataset[i] is (uint8 (3, 112, 112), label). Labels are those of the records, 0 to classes - 1. With record 0 there
    are as many classes as identity records; without it one more than the largest label.

    The first time, all headers are scanned (framing, labels, image sizes); what is found is kept in train.rec.index,
    or in `index` if given, which every process maps, so that ranks and workers share 20 bytes per image. Where it
    cannot be written it is kept in memory, and check_headers says so. A missing train.idx is made from the records
    and saved. Images are read with pread: they lie in the page cache once for all processes.

    Attributes: root (the .rec file), identities (names by label: of train.identities.txt, else the numbers), skip_bad
    (False: a bad image is an error; True: the training loader replaces it by the next readable one).

    progress: a bar on stderr, if that is a terminal and the scan takes longer than a second.
    Raises UserError, naming file, record and offset: a file is missing or empty; frames are truncated, overlap, or
    leave a gap; the .idx does not fit; a label is no class number.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, index: str | os.PathLike[str] | None = None, progress: bool = True
    ) -> None:
        path = os.fspath(path)
        found = _find_rec(path)
        if found is None:
            raise UserError(f"{path}: no .rec file, and no directory that holds train.rec; give one of them")
        self.root = found
        self.skip_bad = False
        self._warning = ""
        self._open()
        self._stamp = _stamp(self._descriptor, self._idx)
        self._index_path = f"{found}.index" if index is None else os.fspath(index)
        loaded = _load_index(self._index_path, self._stamp)
        if loaded is None:
            visible = progress and sys.stderr.isatty()
            with tqdm(desc="reading records", unit="B", unit_scale=True, delay=1.0, leave=False, disable=not visible) as bar:
                loaded = self._make_index(bar)
        self._index = loaded
        self.identities = _read_identities(_beside(found, ".identities.txt"), found, loaded.num_classes)

    def _open(self) -> None:
        try:
            self._descriptor = os.open(self.root, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"{self.root}: cannot be read ({error.strerror})") from None
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._idx = _beside(self.root, ".idx")
        self._size = os.fstat(self._descriptor).st_size

    def __getstate__(self) -> dict[str, Any]:
        """Without what other processes get from the disk themselves."""
        state = {name: value for name, value in self.__dict__.items() if name not in ("_descriptor", "_close")}
        if self._index.mapped:
            state["_index"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()
        if self._index is None:
            self._index = _load_index(self._index_path, self._stamp)
        if self._index is None or not _same_rec(_stamp(self._descriptor, self._idx), self._stamp):
            raise UserError(f"{self.root}: it, or {self._index_path}, has changed since this program started; start again")

    @property
    def labels(self) -> np.ndarray:
        """int64 (len,), made anew on each access."""
        return self._index.labels.astype(np.int64)

    @property
    def keys(self) -> np.ndarray:
        """int64 (len,): the images' keys in the .idx, ascending; made anew on each access."""
        return self._index.keys.astype(np.int64)

    def __len__(self) -> int:
        return len(self._index.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return decode_image(*self.encoded(i)), int(self._index.labels[i])

    def encoded(self, i: int) -> tuple[bytes, str]:
        """Image i as it was packed, and what an error calls it. Raises UserError where its record is damaged or has none."""
        index = self._index
        offset, size = int(index.offsets[i]), int(index.sizes[i])
        name = self._name(int(index.keys[i]), offset)
        record, end = join_frames(self._read(size, offset, name), name)
        if end != size or len(record) < RECORD_HEADER.size:
            raise UserError(f"{name}: its length has changed since {self._index_path} was made; remove that file")
        image = record[image_start(record) :]
        if not image:
            raise UserError(f"{name}: the record holds no image")
        return image, name

    def check_headers(self, skip_bad: bool, progress: bool) -> int:
        """Answer for what the scan found in the images' headers; returns how many images were dropped.

        A bad image is none, or not 112x112 (damage beyond its header shows when it is decoded). skip_bad False: bad
        images raise one UserError, which names the first of them. True: they are dropped, and training will replace
        what turns out bad later (the attribute skip_bad); labels stay. progress: tell on stderr about dropped images,
        and about an index that could not be saved. One process of a run does that; the others give False.
        """
        self.skip_bad = skip_bad
        if progress and self._warning:
            print(f"warning: {self._warning}", file=sys.stderr)
            self._warning = ""
        index, bad = self._index, self._index.bad
        if not len(bad):
            return 0
        first_error = self._image_error(int(bad[0])) or f"{self.root}: {self._index_path} is of another file; remove it"
        count = f"{len(bad)} of {len(self)} images are bad" if len(bad) > 1 else f"1 of {len(self)} images is bad"
        if not skip_bad:
            raise UserError(f"{first_error} ({count}; --skip-bad-images trains without them)")
        if len(bad) == len(self):
            raise UserError(f"{self.root}: no image can be used; the first one: {first_error}")
        keep = np.ones(len(self), dtype=bool)
        keep[bad] = False
        self._index = _Index(index.offsets[keep], index.sizes[keep], index.labels[keep], index.keys[keep],
                             np.empty(0, np.int64), index.num_classes, mapped=False)
        if progress:
            empty = len(self.identities) - len(np.unique(self._index.labels))
            note = f"; identities that have no image left and keep their label: {empty}" if empty else ""
            print(f"warning: {count} and skipped, the first one: {first_error}{note}", file=sys.stderr)
        return len(bad)

    def _image_error(self, i: int) -> str | None:
        try:
            check_encoded(*self.encoded(i))
        except UserError as error:
            return str(error)
        return None

    def _name(self, key: int, offset: int) -> str:
        return f"{self.root}: record {key} at offset {offset}"

    def _read(self, size: int, offset: int, name: str) -> bytes:
        try:
            data = os.pread(self._descriptor, size, offset)
        except OSError as error:
            raise UserError(f"{name}: cannot be read ({error.strerror})") from None
        if len(data) < size:
            raise UserError(f"{name}: the file ends within it, {size - len(data)} bytes too early; fetch the file again")
        return data

    # -----------------------------------------------------------------------------------------------------------------
    # The scan. Rows of its arrays are records in the order of the file.

    def _make_index(self, bar: tqdm) -> _Index:
        if not self._size:
            raise UserError(f"{self.root}: the file is empty")
        has_idx = os.path.exists(self._idx)
        if has_idx:
            keys, offsets = read_idx(self._idx)
            order = np.argsort(offsets, kind="stable")
            keys, offsets = keys[order], offsets[order]
            self._require_offsets_in_file(keys, offsets)
            bar.reset(self._size)
        else:
            bar.reset(2 * self._size)
            offsets = self._find_records(bar)
            keys = np.arange(len(offsets))
        scan = self._scan(keys, offsets, bar)
        if not has_idx:
            # The writers put the key into the record too; but nothing that reads needs it, and some leave it 0.
            ids = scan.ids
            if int(ids.max()) < 2**32 and len(np.unique(ids)) == len(ids):
                keys = ids.astype(np.int64)
            self._save(self._idx, lambda file: write_idx(file, keys, offsets))
            self._stamp = _stamp(self._descriptor, self._idx)
        index = self._choose_images(keys, offsets, scan)
        if self._save(self._index_path, lambda file: index.write(file, self._stamp)):
            # None: another process has put its own there since, of other files. Its own next start will tell.
            index = _load_index(self._index_path, self._stamp) or index
        return index

    def _save(self, path: str, write: Callable[[BinaryIO], None]) -> bool:
        try:
            write_atomically(path, write)
        except OSError as error:
            self._warning = (f"{path} cannot be written ({error.strerror}): {self.root} will be scanned at every start, "
                             "and every process holds its own index")
            return False
        return True

    def _require_offsets_in_file(self, keys: np.ndarray, offsets: np.ndarray) -> None:
        """keys, offsets: int64 (records,), sorted by offset."""
        remedy = f"{self._idx} belongs to another file, or one of them is damaged; without {self._idx} it is made anew"
        twice = np.flatnonzero(np.diff(offsets) == 0)
        if len(twice):
            row = int(twice[0])
            raise UserError(f"{self._name(keys[row], offsets[row])}: record {keys[row + 1]} has the same offset; {remedy}")
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
                    raise UserError(f"{name}: the file ends within the head of a frame: it is truncated; fetch it again")
            magic, word = FRAME.unpack_from(block, at - base)
            part, length = word >> 29, word & MAX_PART_BYTES
            require_frame(magic, part, first=whole, name=name)
            if whole:
                offsets.append(at)
                begun = at
            whole = part in (WHOLE, LAST)
            at += FRAME.size + padded(length)
            if at > self._size:
                raise UserError(f"{self._name(len(offsets) - 1, begun)}: the file ends within it, {at - self._size} bytes "
                                "too early: it is truncated; fetch it again")
        if not whole:
            raise UserError(f"{self._name(len(offsets) - 1, begun)}: the file ends before its last part: it is "
                            "truncated; fetch it again")
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
        """`size` bytes of the file and then zeros."""
        try:
            got = os.preadv(self._descriptor, [memoryview(buffer)[:size]], offset)
        except OSError as error:
            raise UserError(f"{self.root}: cannot be read at offset {offset} ({error.strerror})") from None
        if got < size:
            raise UserError(f"{self.root}: became shorter while it was read; start again when it is complete")
        buffer[size : size + _MARGIN] = 0

    def _scan_one(self, scan: _Scan, row: int, key: int, offset: int, bound: int) -> None:
        """What `_Scan.fill` left: a record of several parts, an image that is not plainly a 112x112 JPEG, or damage."""
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
                pass  # check_headers answers for it

    def _frames_end(self, name: str, offset: int, bound: int) -> int:
        """Where the frames of the record at `offset` end: at `bound`, where the next record or nothing begins."""
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
            rest = (f"the next record begins at {bound}: the bytes between belong to none" if bound < self._size
                    else f"the {bound - at} bytes after it belong to none")
            raise UserError(f"{name}: ends at offset {at}, and {rest}{self._idx_hint()}")
        return at

    def _overrun(self, name: str, end: int, bound: int) -> UserError:
        if bound == self._size:
            what = f"the file has {bound}: it is truncated; fetch it again"
        else:
            what = f"overlaps the next record at {bound}{self._idx_hint()}"
        return UserError(f"{name}: needs the bytes up to {end}, and {what}")

    def _idx_hint(self) -> str:
        return f"; the file is damaged, or {self._idx} is (without it it is made anew)" if os.path.exists(self._idx) else ""

    def _choose_images(self, keys: np.ndarray, offsets: np.ndarray, scan: _Scan) -> _Index:
        """Images apart from record 0 and the identity records, sorted by key, their labels checked."""
        order = np.argsort(keys, kind="stable")
        twice = np.flatnonzero(np.diff(keys[order]) == 0)
        if len(twice):
            row = order[twice[0]]
            raise UserError(f"{self._idx}: the key {keys[row]} appears twice; without this file it is made anew")
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
                    raise UserError(f"{name}: announces the images 1 to {first - 1}, and {self._idx} has {len(images)} of "
                                    f"them; fetch both files again, or remove {self._idx}: it is made anew")
        if not len(images):
            raise UserError(f"{self.root}: holds no image")
        labels = scan.labels[images]
        limit = MAX_CLASSES if num_classes is None else num_classes
        with np.errstate(invalid="ignore"):  # the comparisons of NaN, which are False
            wrong = np.flatnonzero(~((labels >= 0) & (labels < limit) & (labels == np.floor(labels))))
        if len(wrong):
            row = images[wrong[0]]
            source = "float32 labels allow" if num_classes is None else "record 0 announces"
            raise UserError(f"{self._name(keys[row], offsets[row])}: its label {scan.labels[row]:.9g} is none of the class "
                            f"numbers 0 to {limit - 1} that {source}")
        if num_classes is None:
            num_classes = int(labels.max()) + 1
        return _Index(offsets[images], scan.sizes[images], labels.astype(np.int32), keys[images].astype(np.uint32),
                      np.flatnonzero(scan.bad[images]), num_classes, mapped=False)


def _first_identity(announced: np.ndarray, keys: np.ndarray, empty: np.ndarray, name: str) -> int:
    """The key of the first identity record.

    announced: float32 (2,), record 0's labels; keys, empty: (records,), of the others, sorted by key. Where float32
    rounds, the first record without an image near the announced key is taken.
    """
    first, end = (float(label) for label in announced)
    if not (1 <= first <= end <= 2**32 and first == int(first) and end == int(end)):
        raise UserError(f"{name}: announces identity records with the keys {first:.9g} to {end:.9g}, which cannot be")
    if end <= 2**24:
        present = int((keys >= first).sum())
        if present != int(end - first):
            raise UserError(f"{name}: announces {int(end - first)} identity records, and there are {present}; "
                            "fetch the .rec and .idx files again")
        return int(first)
    near = np.flatnonzero((np.abs(keys - first) <= np.spacing(announced[0])) & empty)
    return int(keys[near[0]]) if len(near) else int(first)


class _Scan:
    """What the heads of `count` records say, by offset; bad: not known to be an image of 112x112."""

    def __init__(self, count: int) -> None:
        self.sizes = np.zeros(count, np.uint32)
        self.labels = np.zeros(count, np.float32)
        self.ids = np.zeros(count, np.uint64)
        self.empty = np.zeros(count, bool)
        self.bad = np.zeros(count, bool)

    def fill(self, rows: slice, block: np.ndarray, size: int, at: np.ndarray, bounds: np.ndarray) -> np.ndarray:
        """The records that begin at `at` and must end at `bounds`, int64 (n,), within the `size` bytes of `block`.

        Returns bool (n,): those done. They are whole, sound, and without an image or with a JPEG of 112x112.
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

    decode's walk from segment to segment, for all images at once. False may also mean: not known.
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


@dataclass(frozen=True)
class _Index:
    """Images sorted by key, (n,) each. As a file: int64 version, the .rec's size and time, the .idx's size and
    checksum, num_classes, n, number of bad images, CRC-32 of the arrays; then these in the order below."""

    offsets: np.ndarray  # int64
    sizes: np.ndarray  # uint32: of the frames
    labels: np.ndarray  # int32
    keys: np.ndarray  # uint32
    bad: np.ndarray  # int64: the images that cannot be used
    num_classes: int
    mapped: bool  # the arrays lie in a file

    def write(self, file: BinaryIO, stamp: tuple[int, ...]) -> None:
        values = (self.offsets, self.bad, self.sizes, self.labels, self.keys)
        arrays = [np.ascontiguousarray(column, dtype) for column, dtype in zip(values, _INDEX_DTYPES)]
        checksum = functools.reduce(lambda crc, column: zlib.crc32(column, crc), arrays, 0)
        np.array([*stamp, self.num_classes, len(self.offsets), len(self.bad), checksum], "<i8").tofile(file)
        for column in arrays:
            column.tofile(file)


_INDEX_DTYPES = ("<i8", "<i8", "<u4", "<i4", "<u4")
_INDEX_HEADER = 9 * 8


def _load_index(path: str, stamp: tuple[int, ...]) -> _Index | None:
    """None where it is missing, of other files than those of `stamp`, or damaged."""
    try:
        with open(path, "rb") as file:
            header = np.frombuffer(file.read(_INDEX_HEADER), "<i8").tolist()
            *its_stamp, num_classes, count, bad_count, checksum = header if len(header) == 9 else [0] * 9
            counts = (count, bad_count, count, count, count)
            size = _INDEX_HEADER + sum(n * int(dtype[-1]) for n, dtype in zip(counts, _INDEX_DTYPES))
            if tuple(its_stamp) != stamp or not 0 <= bad_count <= count or count < 1:
                return None
            if os.fstat(file.fileno()).st_size != size:
                return None
            content = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except (OSError, ValueError):
        return None
    if zlib.crc32(memoryview(content)[_INDEX_HEADER:]) != checksum:
        return None
    arrays, at = [], _INDEX_HEADER
    for n, dtype in zip(counts, _INDEX_DTYPES):
        arrays.append(np.frombuffer(content, dtype, n, at))
        at += n * int(dtype[-1])
    offsets, bad, sizes, labels, keys = arrays
    if not 0 <= labels.min() <= labels.max() < num_classes <= MAX_CLASSES:
        return None
    if len(bad) and not 0 <= bad.min() <= bad.max() < count:
        return None
    return _Index(offsets, sizes, labels, keys, bad, num_classes, mapped=True)


def write_atomically(path: str, write: Callable[[BinaryIO], None]) -> None:
    """`write` fills a temporary file beside `path`, which then takes its place: complete, or not there. Raises OSError."""
    part = f"{path}.{secrets.token_hex(4)}.part"
    try:
        with open(part, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        if os.path.exists(part):
            os.unlink(part)
        raise


def _stamp(descriptor: int, idx: str) -> tuple[int, ...]:
    """(version, size and time of the .rec, size and checksum of the .idx): what an index file was made from.

    No time of the .idx: nodes that start together without one write the same .idx one after the other.
    """
    rec = os.fstat(descriptor)
    try:
        with open(idx, "rb") as file:
            idx_size = os.fstat(file.fileno()).st_size
            checksum = zlib.crc32(file.read(_HEAD))
            file.seek(max(0, idx_size - _HEAD))
            checksum = zlib.crc32(file.read(_HEAD), checksum)
    except OSError:
        idx_size, checksum = -1, 0
    return (_INDEX_VERSION, rec.st_size, rec.st_mtime_ns, idx_size, checksum)


def _same_rec(stamp: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return stamp[:3] == other[:3]


def _beside(rec: str, ending: str) -> str:
    return rec.removesuffix(".rec") + ending


def read_names(path: str) -> list[str]:
    """The lines of identities.txt or files.txt. Names are bytes to a file system: no encoding is assumed."""
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
        raise UserError(f"{path}: has {len(names)} names, and {rec} has {num_classes} identities; fetch it again, or "
                        "remove it: identities then are called by their labels")
    if len(set(names)) < len(names):
        ordered = sorted(names)
        twice = next(name for name, following in zip(ordered, ordered[1:]) if name == following)
        raise UserError(f"{path}: the name {ascii(twice)} appears twice; correct it, or remove the file")
    return names
