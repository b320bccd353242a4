"""Packages of records, written byte by byte: an independent description of the format."""

from __future__ import annotations

import struct
from pathlib import Path

from helpers.images import encode, smooth_image

MAGIC = b"\x0a\x23\xd7\xce"


JPEGS = [encode(smooth_image(k), "JPEG", quality=70) for k in range(9)]


LABELS = [0, 0, 0, 1, 1, 2, 2, 2, 2]


# The formats, written out here a second time: what the field's own programs write, from their sources.


def frame(record: bytes, part: int = 0) -> bytes:
    return MAGIC + struct.pack("<I", part << 29 | len(record)) + record + bytes(-len(record) % 4)


def record(labels: float | list[float], key: int, image: bytes = b"") -> bytes:
    """What mxnet.recordio.pack makes of IRHeader(0, labels, key, 0)."""
    if isinstance(labels, list):
        return struct.pack("<IfQQ", len(labels), 0, key, 0) + struct.pack(f"<{len(labels)}f", *labels) + image
    return struct.pack("<IfQQ", 0, labels, key, 0) + image


def write(directory: Path, frames: list[tuple[int, bytes]], idx: bool = True) -> Path:
    """train.rec and train.idx of (key, frames) in this order."""
    directory.mkdir(parents=True, exist_ok=True)
    content, lines = b"", ""
    for key, record_frames in frames:
        lines += f"{key}\t{len(content)}\n"
        content += record_frames
    (directory / "train.rec").write_bytes(content)
    if idx:
        (directory / "train.idx").write_text(lines)
    return directory


def insightface(labels=LABELS, images=JPEGS, two_labels: bool = True) -> list[tuple[int, bytes]]:
    """As its face2rec2.py writes: images with [label, aligned], record 0, identity records."""
    frames = [
        (key, frame(record([float(label), 1.0] if two_labels else label, key, image)))
        for key, (label, image) in enumerate(zip(labels, images), start=1)
    ]
    first = len(labels) + 1
    ends = [max(i for i, label in enumerate(labels) if label == identity) + 2 for identity in sorted(set(labels))]
    frames.append((0, frame(record([float(first), float(first + len(ends))], 0))))
    for k, (start, end) in enumerate(zip([1, *ends], ends)):
        frames.append((first + k, frame(record([float(start), float(end)], first + k))))
    return frames


def im2rec(labels=LABELS, images=JPEGS) -> list[tuple[int, bytes]]:
    """As MXNet's im2rec writes: keys from 0, one label."""
    return [(key, frame(record(label, key, image))) for key, (label, image) in enumerate(zip(labels, images))]
