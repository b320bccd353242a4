"""IJB-C's and TinyFace's files in the official layout, from arrays."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data.align import TEMPLATE


@dataclass
class Layout:
    """What the files of IJB say. N images, P pairs."""

    template: np.ndarray  # (N,), numbers of templates
    media: np.ndarray  # (N,)
    score: np.ndarray  # (N,), of the detector
    pairs: np.ndarray  # (P, 3): template, template, label
    galleries: dict[str, np.ndarray]  # "G1": (n, 2): template, subject
    probes: np.ndarray  # (n, 2)
    landmarks: np.ndarray | None = None  # (N, 5, 2); None: the template's, moved by 8 pixels


def write_ijb(root: Path, layout: Layout, photos: Sequence[np.ndarray] | None = None) -> Path:
    """photos: uint8 (H, W, 3) for each image; None: one gray pixel each, for tests that read none."""
    (root / "meta").mkdir(parents=True)
    (root / "loose_crop").mkdir()
    count = len(layout.template)
    landmarks = layout.landmarks if layout.landmarks is not None else np.broadcast_to(TEMPLATE + 8, (count, 5, 2))
    names = [f"{i + 1}.jpg" for i in range(count)]
    for i, name in enumerate(names):
        if photos is None:
            (root / "loose_crop" / name).write_bytes(b"")
        else:
            Image.fromarray(photos[i]).save(root / "loose_crop" / name, format="png")  # lossless; content decides
    meta = str(root / "meta" / "ijbc_")
    lines = [f"{name} {' '.join(f'{x:.3f}' for x in points.ravel())} {score:.6f}\n"
             for name, points, score in zip(names, landmarks, layout.score)]
    Path(meta + "name_5pts_score.txt").write_text("".join(lines))
    Path(meta + "face_tid_mid.txt").write_text(
        "".join(f"{name} {t} {m}\n" for name, t, m in zip(names, layout.template, layout.media)))
    Path(meta + "template_pair_label.txt").write_text("".join(f"{a} {b} {c}\n" for a, b, c in layout.pairs))
    header = "TEMPLATE_ID,SUBJECT_ID,FILENAME\n"
    for name, rows in layout.galleries.items():
        lines = [f'{t},{s},"img/{t}, 1.jpg"\n' for t, s in rows]
        Path(f"{meta}1N_gallery_{name}.csv").write_text(header + "".join(lines))
    if len(layout.probes):
        Path(meta + "1N_probe_mixed.csv").write_text(header + "".join(f"{t},{s},x.jpg\n" for t, s in layout.probes))
    return root


def random_layout(rng: np.random.Generator, subjects: int = 12, pairs: int = 400) -> Layout:
    """Two galleries with a template for each half of the subjects, and three probe templates each, of 1 to 5 images."""
    subject = np.repeat(np.arange(subjects), 4) + 100
    ids = rng.permutation(len(subject)) * 3 + 7  # templates' numbers have gaps
    template = np.repeat(ids, rng.integers(1, 6, len(ids)))
    first, second = rng.integers(0, len(ids), (2, pairs))
    labels = subject[first] == subject[second]
    enrolled = np.flatnonzero(np.arange(len(ids)) % 4 == 0)
    rows = np.stack([ids, subject], axis=1)
    return Layout(
        template=rng.permutation(template), media=rng.integers(0, 3, len(template)),
        score=np.round(rng.uniform(0.1, 1, len(template)), 6),
        pairs=np.stack([ids[first], ids[second], labels], axis=1).astype(int),
        galleries={"G1": rows[enrolled[: subjects // 2]], "G2": rows[enrolled[subjects // 2 :]]},
        probes=rows[np.arange(len(ids)) % 4 != 0])


def write_mat(path: Path, compressed: bool = True, order: str = "<", **variables: list[str] | np.ndarray) -> None:
    """A .mat file of version 5: lists of strings as cell arrays (n, 1), arrays as (n, 1) of their type."""
    def element(kind: int, content: bytes) -> bytes:
        if 0 < len(content) <= 4:  # the small form
            return struct.pack(order + "I", len(content) << 16 | kind) + content.ljust(4, b"\0")
        return struct.pack(order + "II", kind, len(content)) + content + b"\0" * (-len(content) % 8)

    def matrix(array_class: int, rows: int, columns: int, name: str, content: bytes) -> bytes:
        return element(14, element(6, struct.pack(order + "II", array_class, 0)).ljust(16, b"\0")
                       + element(5, struct.pack(order + "ii", rows, columns)) + element(1, name.encode()) + content)

    kinds = {"u1": (9, 2), "u2": (11, 4), "i4": (12, 5), "f8": (6, 9)}
    data = b"MATLAB 5.0 MAT-file, made by a test".ljust(124) + struct.pack(order + "H", 0x0100)
    data += b"IM" if order == "<" else b"MI"
    for name, value in variables.items():
        if isinstance(value, list):
            cells = [matrix(4, 1, len(one), "", element(4, one.encode("utf-16-le" if order == "<" else "utf-16-be")))
                     for one in value]
            part = matrix(1, len(value), 1, name, b"".join(cells))
        else:
            array_class, kind = kinds[value.dtype.str[1:]]
            part = matrix(array_class, len(value), 1, name,
                          element(kind, value.astype(value.dtype.newbyteorder(order)).tobytes()))
        if compressed:
            part = zlib.compress(part)
            part = struct.pack(order + "II", 15, len(part)) + part
        data += part
    path.write_bytes(data)
