"""Pairs of face images: lines of `path1 path2 0|1` (1: the same person), with paths relative to a directory of images.

PairList reads such lists, and data.insightface_bin.PairBin reads sets that are one file. Both are a PairSet.
"""

from __future__ import annotations

import io
import os
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from data.decode import decode_image, read_bytes
from utils.errors import UserError
from utils.files import open_bounded

_MAX_BYTES = 2**30  # of a list: ten million pairs


class PairSet(Protocol):
    """P pairs of U different images, each of which is embedded once."""

    path: str  # the file
    flag: str  # the flag that named it, for errors
    num_images: int  # U
    index1: np.ndarray  # int64 (P,): the image numbers of each pair
    index2: np.ndarray
    is_same: np.ndarray  # bool (P,)

    def __len__(self) -> int:
        """P."""

    def image_name(self, i: int) -> str:
        """What errors call image i."""

    def encoded(self, i: int) -> tuple[bytes, str]:
        """(image i before decoding, its name). Raises UserError if it cannot be read."""


class PairList:
    """The pairs of `pair_list`, whose paths are relative to `imgs_root`. Blanks separate; blank lines are ignored.

    Attributes, for P pairs of U different images, in order of first appearance:
    path: the list
    flag: the flag that named it, for errors
    paths: list of U paths, `imgs_root` included
    num_images: U
    index1, index2: int64 (P,), the positions of each pair's images in `paths`
    is_same: bool (P,)

    Raises UserError, naming the file and the line if there is one: the list is missing, empty or not text; a line is
    malformed; a label is not 0 or 1; an image is missing.
    """

    def __init__(
        self, imgs_root: str | os.PathLike[str], pair_list: str | os.PathLike[str], *, flag: str = "--pair-list"
    ) -> None:
        imgs_root, pair_list = os.fspath(imgs_root), os.fspath(pair_list)
        if not os.path.isdir(imgs_root):
            raise UserError(f"--imgs-root {imgs_root}: no such directory; it must hold the images of the pairs")
        pairs = _read_lines(pair_list, flag)
        number: dict[str, int] = {}  # of each image, in order of first appearance
        first_line: list[int] = []
        for line, *paths, _ in pairs:
            for path in paths:
                if number.setdefault(path, len(number)) == len(first_line):
                    first_line.append(line)
        self.path, self.flag, self.num_images = pair_list, flag, len(number)
        self.paths = [os.path.join(imgs_root, path) for path in number]
        self.index1 = np.array([number[path1] for _, path1, _, _ in pairs], dtype=np.int64)
        self.index2 = np.array([number[path2] for _, _, path2, _ in pairs], dtype=np.int64)
        self.is_same = np.array([is_same for _, _, _, is_same in pairs], dtype=bool)
        missing = [i for i, path in enumerate(self.paths) if not os.path.isfile(path)]
        if missing:
            raise UserError(f"{pair_list}:{first_line[missing[0]]}: there is no image {self.paths[missing[0]]} "
                            f"({len(missing)} of {len(number)} images are missing); check --imgs-root")

    def __len__(self) -> int:
        return len(self.is_same)

    def image_name(self, i: int) -> str:
        return self.paths[i]

    def encoded(self, i: int) -> tuple[bytes, str]:
        return read_bytes(self.paths[i]), self.paths[i]


class PairImages(Dataset):
    """The images of `pairs`: item i is (uint8 (3, 112, 112) of image i, 0)."""

    def __init__(self, pairs: PairSet) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return self.pairs.num_images

    def encoded(self, i: int) -> tuple[bytes, str]:
        return self.pairs.encoded(i)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return decode_image(*self.encoded(i)), 0


def _read_lines(pair_list: str, flag: str) -> list[tuple[int, str, str, bool]]:
    """(line number, path1, path2, is_same) of every line that is not blank."""
    pairs = []
    try:
        # surrogateescape: file names need not be UTF-8. utf-8-sig: editors on Windows write a byte order mark.
        with io.TextIOWrapper(open_bounded(pair_list, _MAX_BYTES), "utf-8-sig", "surrogateescape") as file:
            for number, line in enumerate(file, start=1):
                fields = line.split()
                if not fields:
                    continue
                if len(fields) != 3 or fields[2] not in ("0", "1") or "\0" in line:
                    shown = ascii(line.strip()[:120])
                    raise UserError(f"{pair_list}:{number}: expected 'path1 path2 0|1', got {shown}")
                pairs.append((number, fields[0], fields[1], fields[2] == "1"))
    except OSError as error:
        raise UserError(f"{flag} {pair_list}: cannot be read ({error.strerror})") from None
    if not pairs:
        raise UserError(f"{pair_list}: the pair list is empty; it needs lines of: path1 path2 0|1")
    return pairs
