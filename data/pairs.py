"""Pairs of face images: lines of `path1 path2 0|1` (1: the same person), paths relative to the directory of images."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch.utils.data import Dataset

from data.decode import read_image
from utils.errors import UserError
from utils.verification import usable_folds


class PairList:
    """The pairs of `pair_list`, whose paths are relative to `imgs_root`; blanks separate, blank lines are ignored.

    Attributes, for P pairs of U different images:
    paths: list of U paths, `imgs_root` included, in order of first appearance;
    index1, index2: int64 (P,), where the images of pair p are in `paths`;
    is_same: bool (P,).

    Everything is checked here, before any other work. Raises UserError, naming the file, and the line where there is
    one: the list is missing, empty or no text; a line is malformed; a label is not 0 or 1; an image is missing; fewer
    than two pairs of a label, so that the protocol of utils.verification has no numbers for them.
    """

    def __init__(self, imgs_root: str | os.PathLike[str], pair_list: str | os.PathLike[str]) -> None:
        imgs_root, pair_list = os.fspath(imgs_root), os.fspath(pair_list)
        if not os.path.isdir(imgs_root):
            raise UserError(f"--imgs-root {imgs_root}: no such directory; it must hold the images of the pairs")
        pairs = _read_lines(pair_list)
        first_line: dict[str, int] = {}  # in order of first appearance
        for line, path1, path2, _ in pairs:
            first_line.setdefault(path1, line)
            first_line.setdefault(path2, line)
        _require_images(imgs_root, pair_list, first_line)

        position = {path: i for i, path in enumerate(first_line)}
        self.paths = [os.path.join(imgs_root, path) for path in first_line]
        self.index1 = np.array([position[path1] for _, path1, _, _ in pairs], dtype=np.int64)
        self.index2 = np.array([position[path2] for _, _, path2, _ in pairs], dtype=np.int64)
        self.is_same = np.array([is_same for _, _, _, is_same in pairs], dtype=bool)
        try:
            usable_folds(self.is_same)
        except UserError as error:
            raise UserError(f"{pair_list}: {error}") from None

    def __len__(self) -> int:
        return len(self.is_same)


class PairImages(Dataset):
    """The images of `pairs`, each of them once: item i is (uint8 (3, 112, 112) of pairs.paths[i], 0)."""

    def __init__(self, pairs: PairList) -> None:
        self.paths = pairs.paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return read_image(self.paths[i]), 0


def _read_lines(pair_list: str) -> list[tuple[int, str, str, bool]]:
    """(line number, path1, path2, is_same) of every line that is not blank."""
    try:
        # surrogateescape: file names need not be UTF-8. utf-8-sig: editors on Windows begin a file with a mark.
        with open(pair_list, encoding="utf-8-sig", errors="surrogateescape") as file:
            pairs = [_parse(pair_list, number, line) for number, line in enumerate(file, start=1) if line.strip()]
    except OSError as error:
        raise UserError(f"--pair-list {pair_list}: cannot be read ({error.strerror})") from None
    if not pairs:
        raise UserError(f"{pair_list}: the pair list is empty; it needs lines of: path1 path2 0|1")
    return pairs


def _parse(pair_list: str, number: int, line: str) -> tuple[int, str, str, bool]:
    fields = line.split()
    if len(fields) != 3:
        raise UserError(f"{pair_list}:{number}: expected 'path1 path2 0|1', got {_shown(line)}")
    path1, path2, label = fields
    if label not in ("0", "1"):
        raise UserError(f"{pair_list}:{number}: the label must be 0 or 1, got {label[:20]!r} in {_shown(line)}")
    if "\0" in line:  # no file name, and os.stat would raise a bare ValueError for it
        raise UserError(f"{pair_list}:{number}: not text: {_shown(line)}")
    return number, path1, path2, label == "1"


def _shown(line: str) -> str:
    """The line, quoted and escaped: one line on the terminal, whatever the file holds."""
    line = line.strip()
    return ascii(line if len(line) <= 120 else line[:120] + "...")


def _require_images(imgs_root: str, pair_list: str, first_line: dict[str, int]) -> None:
    missing = [path for path in first_line if not os.path.isfile(os.path.join(imgs_root, path))]
    if missing:
        first = missing[0]
        others = f" ({len(missing)} of {len(first_line)} images are missing)" if len(missing) > 1 else ""
        path = os.path.join(imgs_root, first)
        raise UserError(f"{pair_list}:{first_line[first]}: there is no image {path}{others}; check --imgs-root")
