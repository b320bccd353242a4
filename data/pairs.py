"""Pairs of face images: lines of `path1 path2 0|1` (1: the same person), with paths relative to a directory of images.

PairList reads such lists, and data.insightface_bin.PairBin reads sets that are one file. Both are a PairSet.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from data.decode import decode_image, read_bytes
from data.insightface_bin import PairBin
from data.progress import progress_bar
from utils.errors import UserError

_DECODING_THREADS = 8  # Pillow releases the interpreter's lock while it decodes


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
        first_line: dict[str, int] = {}  # in order of first appearance
        for line, path1, path2, _ in pairs:
            first_line.setdefault(path1, line)
            first_line.setdefault(path2, line)
        _require_images(imgs_root, pair_list, first_line)

        position = {path: i for i, path in enumerate(first_line)}
        self.paths = [os.path.join(imgs_root, path) for path in first_line]
        self.path, self.flag, self.num_images = pair_list, flag, len(self.paths)
        self.index1 = np.array([position[path1] for _, path1, _, _ in pairs], dtype=np.int64)
        self.index2 = np.array([position[path2] for _, _, path2, _ in pairs], dtype=np.int64)
        self.is_same = np.array([is_same for _, _, _, is_same in pairs], dtype=bool)

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


def open_pair_sets(
    lists: list[tuple[str | None, str]], bins: list[str], *, list_flag: str, bin_flag: str
) -> dict[str, PairSet]:
    """The sets by name: of each (directory of images, pair list), then of each file in `bins`.

    Without a directory the images are in imgs/ beside the list. A set has the name of its file (lfw for lfw.bin), or of
    its directory if the file is called pair.list; if such a name is not unique, the file's path. Raises UserError.
    """
    sets: list[tuple[str, str, PairSet]] = []
    for imgs_root, path in lists:
        if imgs_root is None:
            if not os.path.isfile(path):
                raise UserError(f"{list_flag} {path}: no such file")
            imgs_root = os.path.join(os.path.dirname(path), "imgs")
            if not os.path.isdir(imgs_root):
                raise UserError(f"{list_flag} {path}: there is no directory {imgs_root} with its images; "
                                "give the directory with --imgs-root")
        directory, name = os.path.split(os.path.abspath(path))
        name = os.path.basename(directory) if name == "pair.list" else os.path.splitext(name)[0]
        sets.append((name, path, PairList(imgs_root, path, flag=list_flag)))
    for path in bins:
        sets.append((os.path.splitext(os.path.basename(path))[0], path, PairBin(path, flag=bin_flag)))
    names = [name for name, _, _ in sets]
    named = {name if names.count(name) == 1 else path: pairs for name, path, pairs in sets}
    if len(named) < len(sets):
        paths = [path for _, path, _ in sets]
        twice = next(path for path in paths if paths.count(path) > 1)
        flag = bin_flag if twice in bins else list_flag
        raise UserError(f"{flag} {twice}: is given twice; drop one of them")
    return named


def check_images(pairs: PairSet, progress: bool) -> None:
    """Decode all images once, before hours of work depend on them. Raises the UserError of the first bad one.

    progress: show a bar on stderr.
    """
    images = PairImages(pairs)
    chunks = [range(start, min(start + 64, len(images))) for start in range(0, len(images), 64)]
    with (
        ThreadPoolExecutor(_DECODING_THREADS) as threads,
        progress_bar("checking pairs", len(images), progress) as bar,
    ):
        for chunk, error in zip(chunks, threads.map(lambda chunk: _first_error(images, chunk), chunks)):
            if error:
                threads.shutdown(wait=False, cancel_futures=True)
                source = "" if error.startswith((pairs.path, pairs.flag)) else f"{pairs.path}: "
                raise UserError(error if error.startswith(pairs.flag) else f"{pairs.flag} {source}{error}")
            bar.update(len(chunk))


def _first_error(images: PairImages, chunk: range) -> str:
    """What is wrong with the first bad image of the chunk; "" if none is bad."""
    for i in chunk:
        try:
            images[i]
        except UserError as error:
            return str(error)
    return ""


def _read_lines(pair_list: str, flag: str) -> list[tuple[int, str, str, bool]]:
    """(line number, path1, path2, is_same) of every line that is not blank."""
    try:
        # surrogateescape: file names need not be UTF-8. utf-8-sig: editors on Windows write a byte order mark.
        with open(pair_list, encoding="utf-8-sig", errors="surrogateescape") as file:
            pairs = [_parse(pair_list, number, line) for number, line in enumerate(file, start=1) if line.strip()]
    except OSError as error:
        raise UserError(f"{flag} {pair_list}: cannot be read ({error.strerror})") from None
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
    if "\0" in line:  # os.stat would raise a bare ValueError
        raise UserError(f"{pair_list}:{number}: not text: {_shown(line)}")
    return number, path1, path2, label == "1"


def _shown(line: str) -> str:
    """The line, quoted and escaped, so that it stays one line on the terminal."""
    line = line.strip()
    return ascii(line if len(line) <= 120 else line[:120] + "...")


def _require_images(imgs_root: str, pair_list: str, first_line: dict[str, int]) -> None:
    missing = [path for path in first_line if not os.path.isfile(os.path.join(imgs_root, path))]
    if missing:
        first = missing[0]
        others = f" ({len(missing)} of {len(first_line)} images are missing)" if len(missing) > 1 else ""
        path = os.path.join(imgs_root, first)
        raise UserError(f"{pair_list}:{first_line[first]}: there is no image {path}{others}; check --imgs-root")
