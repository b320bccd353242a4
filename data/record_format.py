"""insightface's and MXNet's packages of images: frames, records and the .idx file, between bytes and values.

All numbers are little-endian.

    train.rec    frames without gaps: uint32 magic, uint32 (part << 29 | length), `length` bytes, zeros up to a multiple
                 of 4. Part 0 is a whole record. A record that holds the magic at a multiple of 4 bytes is cut there and
                 the magic left out: parts 1 (first), 2 (between), 3 (last).
                 A record: uint32 flag, float32 label, uint64 id, uint64 id2, `flag` float32 labels, image.
                 flag 0: the label is the one in front; else it is the first of those that follow.
    train.idx    a line `key<tab>offset` for each record

insightface's layout: images have the keys 1, 2, ...; record 0, without an image, has two labels: the key of the first
identity record, and the end of their keys. An identity record, without an image, has two labels too: the key of the
identity's first image, and the end of its images' keys. MXNet's im2rec writes images only, with keys from 0.

Labels are float32: class numbers and keys above 2^24 are not exact.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from utils.errors import UserError
from utils.files import open_bounded

MAX_CLASSES = 2**24  # labels are float32
MAX_PART_BYTES = 2**29 - 1  # of a part: its length has 29 bits

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
FRAME = struct.Struct("<II")
RECORD_HEADER = struct.Struct("<IfQQ")
WHOLE, FIRST, BETWEEN, LAST = range(4)

Integer = TypeVar("Integer", int, np.ndarray)


def image_record(key: int, label: int, image: bytes) -> bytes:
    """The frames of an image's record."""
    return _frames(RECORD_HEADER.pack(0, label, key, 0) + image)


def labels_record(key: int, labels: Sequence[float]) -> bytes:
    """The frames of a record without an image: record 0, and the identity records."""
    return _frames(RECORD_HEADER.pack(len(labels), 0, key, 0) + np.asarray(labels, "<f4").tobytes())


def _frames(record: bytes) -> bytes:
    cuts = (4 * np.flatnonzero(np.frombuffer(record, "<u4", len(record) // 4) == MAGIC)).tolist()
    frames = bytearray()
    for k, (start, end) in enumerate(zip([0, *(cut + 4 for cut in cuts)], [*cuts, len(record)])):
        part = WHOLE if not cuts else FIRST if k == 0 else LAST if k == len(cuts) else BETWEEN
        frames += FRAME.pack(MAGIC, part << 29 | end - start) + record[start:end]
    return bytes(frames.ljust(padded(len(frames)), b"\0"))


def padded(length: Integer) -> Integer:
    """The next multiple of 4."""
    return length + 3 & ~3


def image_start(record: bytes) -> int:
    """Where the image begins, after the header's labels. In a damaged record that may be beyond its end."""
    return RECORD_HEADER.size + 4 * int.from_bytes(record[:4], "little")


def find_parts(head_at: Callable[[int], bytes], offset: int, limit: int, name: str) -> Iterator[tuple[int, int]]:
    """Where the bytes of each part of the record at `offset` begin and end, counted as `offset` is.

    head_at: the 8 bytes from an offset on, fewer at the end of the file.
    limit: where the next record begins, or the file ends.
    Raises UserError, naming the record by `name`: no frame begins where one should, or one goes beyond the limit.
    """
    at, expected = offset, (WHOLE, FIRST)
    while True:
        magic, word = FRAME.unpack(head_at(at).ljust(FRAME.size, b"\0"))
        part, start, end = word >> 29, at + FRAME.size, at + FRAME.size + (word & MAX_PART_BYTES)
        if magic != MAGIC or part not in expected:
            raise UserError(f"{name}: no frame begins at offset {at}, where a part of {expected} should (0x{magic:08x} "
                            f"and {part}): the file is truncated or damaged; fetch it again")
        at = padded(end)
        if at > limit:
            raise UserError(f"{name}: needs the bytes up to {at}, but has those up to {limit}: the file is truncated "
                            "or damaged; fetch it again")
        yield start, end
        if part in (WHOLE, LAST):
            return
        expected = (BETWEEN, LAST)


def read_idx(path: str, at_most: int = 2**32) -> tuple[np.ndarray, np.ndarray]:
    """(keys, offsets) of an .idx file of up to `at_most` bytes: int64 (records,) each, in its order.

    Raises UserError naming file and row.
    """
    try:
        with io.TextIOWrapper(open_bounded(path, at_most), encoding="latin-1") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the file is empty
            lines = np.loadtxt(file, np.int64, comments=None, delimiter="\t", ndmin=2)
        if lines.shape[1] != 2 or lines.min() < 0:
            raise ValueError("these are not two numbers from 0")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        reason = ascii(str(error))[1:-1][:100]
        raise UserError(f"{path}: needs lines of 'key<tab>offset' ({reason}); remove it to have it rebuilt") from None
    keys, offsets = lines.T
    return keys, offsets
