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

import re
import struct
from collections.abc import Sequence
from typing import BinaryIO, TypeVar

import numpy as np

from utils.errors import UserError

MAX_CLASSES = 2**24  # labels are float32
MAX_PART_BYTES = 2**29 - 1  # of a part: its length has 29 bits

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
FRAME = struct.Struct("<II")
RECORD_HEADER = struct.Struct("<IfQQ")
WHOLE, FIRST, BETWEEN, LAST = range(4)
_IDX_BLOCK = 1 << 24  # bytes of an .idx that are parsed at a time

Integer = TypeVar("Integer", int, np.ndarray)


def image_record(key: int, label: int, image: bytes) -> bytes:
    """The frames of an image's record."""
    return _frames(RECORD_HEADER.pack(0, label, key, 0) + image)


def labels_record(key: int, labels: Sequence[float]) -> bytes:
    """The frames of a record without an image: record 0, and the identity records."""
    return _frames(RECORD_HEADER.pack(len(labels), 0, key, 0) + np.asarray(labels, "<f4").tobytes())


def _frames(record: bytes) -> bytes:
    cuts = []
    at = record.find(MAGIC_BYTES)
    while at >= 0:
        aligned = at % 4 == 0
        if aligned:
            cuts.append(at)
        at = record.find(MAGIC_BYTES, at + (4 if aligned else 1))
    starts, ends = [0, *(cut + 4 for cut in cuts)], [*cuts, len(record)]
    frames = bytearray()
    for k, (start, end) in enumerate(zip(starts, ends)):
        part = WHOLE if not cuts else FIRST if k == 0 else LAST if k == len(cuts) else BETWEEN
        frames += FRAME.pack(MAGIC, part << 29 | end - start) + record[start:end]
    return bytes(frames.ljust(padded(len(frames)), b"\0"))


def padded(length: Integer) -> Integer:
    """The next multiple of 4."""
    return length + 3 & ~3


def image_start(record: bytes) -> int:
    """Where the image begins, after the header's labels. In a damaged record that may be beyond its end."""
    return RECORD_HEADER.size + 4 * int.from_bytes(record[:4], "little")


def join_frames(data: bytes, name: str) -> tuple[bytes, int]:
    """(the record whose frames `data` begins with, where they end). Raises UserError naming the record by `name`."""
    parts, at, part = [], 0, None
    while part not in (WHOLE, LAST):
        if at + FRAME.size > len(data):
            raise UserError(f"{name}: its last part is missing")
        magic, word = FRAME.unpack_from(data, at)
        part, length = word >> 29, word & MAX_PART_BYTES
        require_frame(magic, part, first=at == 0, name=name)
        parts.append(data[at + FRAME.size : at + FRAME.size + length])
        at += FRAME.size + padded(length)
    return MAGIC_BYTES.join(parts), at


def require_frame(magic: int, part: int, *, first: bool, name: str, hint: str = "") -> None:
    """Raise UserError unless a frame has this magic and part number, the `first` of a record or a later one."""
    if magic != MAGIC:
        raise UserError(f"{name}: no frame begins where one should (found 0x{magic:08x}, not 0x{MAGIC:08x})"
                        f"{hint or '; the file is damaged: fetch it again'}")
    if part not in ((WHOLE, FIRST) if first else (BETWEEN, LAST)):
        what = "begins with" if first else "continues with"
        raise UserError(f"{name}: the record {what} part {part} of 0 (whole), 1 (first), 2 (between), 3 (last)"
                        f"{hint or '; the file is damaged: fetch it again'}")


def write_idx(file: BinaryIO, keys: np.ndarray, offsets: np.ndarray) -> None:
    """A line for each record, in the order given."""
    for start in range(0, len(keys), 1 << 16):
        part = slice(start, start + (1 << 16))
        file.write("".join(map("%d\t%d\n".__mod__, zip(keys[part].tolist(), offsets[part].tolist()))).encode())


def read_idx(path: str) -> tuple[np.ndarray, np.ndarray]:
    """(keys, offsets) of an .idx file: int64 (records,) each, in its order. Raises UserError naming file and line."""
    parts, lines = [], 0
    try:
        with open(path, "rb") as file:
            while text := file.read(_IDX_BLOCK):
                text += file.readline()
                if b"\r" in text:
                    text = text.replace(b"\r\n", b"\n")
                parts.append(_parse_idx(text if text.endswith(b"\n") else text + b"\n", path, lines))
                lines += len(parts[-1][0])
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not parts:
        raise UserError(f"{path}: the file is empty; remove it to have it rebuilt from the records")
    keys, offsets = (np.concatenate(arrays) for arrays in zip(*parts))
    return keys, offsets


def _parse_idx(text: bytes, path: str, lines_before: int) -> tuple[np.ndarray, np.ndarray]:
    characters = np.frombuffer(text, np.uint8)
    ends, tabs = np.flatnonzero(characters == ord("\n")), np.flatnonzero(characters == ord("\t"))
    starts = np.concatenate([[0], ends[:-1] + 1])
    digits = characters - np.uint8(ord("0"))  # wraps around: every other character is above 9
    # As many tabs as lines, the k-th within the k-th line, and nothing else but digits: one tab in each.
    if (
        len(tabs) != len(ends) or int((digits > 9).sum()) != 2 * len(ends)
        or not np.all((starts < tabs) & (tabs + 1 < ends) & (tabs - starts <= 18) & (ends - tabs <= 19))
    ):
        for number, line in enumerate(text.split(b"\n"), start=lines_before + 1):
            if not re.fullmatch(rb"[0-9]{1,18}\t[0-9]{1,18}", line):
                shown = ascii(line[:60].decode("latin-1"))
                raise UserError(f"{path}:{number}: expected 'key<tab>offset', got {shown}; remove this file to have it "
                                "rebuilt from the records")
    return _decimal(digits, starts, tabs), _decimal(digits, tabs + 1, ends)


def _decimal(digits: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """int64 (n,): the numbers that digits[starts[k]:ends[k]] spell."""
    values = np.zeros(len(starts), np.int64)
    for place in range(int((ends - starts).max())):
        at = ends - 1 - place
        values += np.where(at >= starts, digits[np.maximum(at, 0)], 0) * np.int64(10**place)
    return values
