"""Pairs of face images: lines of `path1 path2 0|1` (1: the same person), with paths relative to a directory of images.

PairList reads such lists, and LFW's own; data.insightface_bin.PairBin reads sets that are one file. Both are a PairSet.
"""

from __future__ import annotations

import csv
import functools
import io
import itertools
import os
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from data.decode import decode_image, read_bytes
from data.folder import IMAGE_EXTENSIONS
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
    skipped: int  # pairs that are left out because an image is missing

    def __len__(self) -> int:
        """P."""

    def image_name(self, i: int) -> str:
        """What errors call image i."""

    def encoded(self, i: int) -> tuple[bytes, str]:
        """(image i before decoding, its name). Raises UserError if it cannot be read."""


class PairList:
    """The pairs of `pair_list`, whose paths are relative to `imgs_root`. `_read_pairs` says what a list looks like.

    Attributes, for P pairs of U different images, in order of first appearance:
    path: the list
    flag: the flag that named it, for errors
    paths: list of U paths, `imgs_root` included
    num_images: U
    index1, index2: int64 (P,), the positions of each pair's images in `paths`
    is_same: bool (P,)
    skipped: how many pairs were left out with `skip_missing`, because one of their images is missing

    Raises UserError, naming the file and the line if there is one: the list is missing, empty or not text; a line is
    malformed; an image is missing, or with `skip_missing` one of each pair.
    """

    def __init__(
        self, imgs_root: str | os.PathLike[str], pair_list: str | os.PathLike[str], *, flag: str = "--pair-list",
        skip_missing: bool = False,
    ) -> None:
        imgs_root, pair_list = os.fspath(imgs_root), os.fspath(pair_list)
        if not os.path.isdir(imgs_root):
            raise UserError(f"--imgs-root {imgs_root}: no such directory; it must hold the images of the pairs")
        pairs, of_lfw = _read_pairs(pair_list, flag)
        if of_lfw:
            whole = functools.cache(functools.partial(_with_extension, imgs_root))
            pairs = [(line, whole(path1), whole(path2), is_same) for line, path1, path2, is_same in pairs]
        images = dict.fromkeys(path for _, *paths, _ in pairs for path in paths)
        missing = {path: None for path in images if not os.path.isfile(os.path.join(imgs_root, path))}
        there = [pair for pair in pairs if pair[1] not in missing and pair[2] not in missing]
        if missing and not (skip_missing and there):
            first = next(iter(missing))
            line = next(line for line, *paths, _ in pairs if first in paths)
            raise UserError(f"{pair_list}:{line}: there is no image {os.path.join(imgs_root, first)} ({len(missing)} "
                            f"of {len(images)} images are missing); {_hint(imgs_root, first)}"
                            + (", or skip such pairs with --skip-missing-pairs" if there else ""))
        number: dict[str, int] = {}  # of each image, in order of first appearance
        for _, *paths, _ in there:
            for path in paths:
                number.setdefault(path, len(number))
        self.path, self.flag, self.num_images = pair_list, flag, len(number)
        self.paths = [os.path.join(imgs_root, path) for path in number]
        self.index1 = np.array([number[path1] for _, path1, _, _ in there], dtype=np.int64)
        self.index2 = np.array([number[path2] for _, _, path2, _ in there], dtype=np.int64)
        self.is_same = np.array([is_same for _, _, _, is_same in there], dtype=bool)
        self.skipped = len(pairs) - len(there)

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


# ---------------------------------------------------------------------------------------------------------------------
# Reading a list

Pair = tuple[int, str, str, bool]  # line number, path1, path2, is_same
Fields = list[str]

_FORMS = ("'path1 path2 0|1' (or -1|1, True|False, or the label first), LFW's 'name n1 n2' and 'name1 n1 name2 n2', or "
          "CALFW's two lines a pair, 'path 0|1'; blanks, tabs, commas or semicolons separate")


def _split_csv(delimiter: str, line: str) -> Fields:
    try:
        return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    except csv.Error:
        return []


def _labelled(position: int, labels: tuple[str, str], fields: Fields) -> tuple[str, str, bool] | None:
    """A line of two paths, and at `position` one of the labels (different, same)."""
    if len(fields) != 3 or (label := fields[position].lower()) not in labels:
        return None
    path1, path2 = (field for k, field in enumerate(fields) if k != position % 3)
    return path1, path2, label == labels[1]


def _lfw(fields: Fields) -> tuple[str, str, bool] | None:
    """A line of LFW's pairs.txt, with paths that lack the extension."""
    if len(fields) not in (3, 4) or not all(map(_is_number, fields[1:2] + fields[-1:])):
        return None
    name1, name2 = fields[0], fields[-2] if len(fields) == 4 else fields[0]
    path1, path2 = (f"{name}/{name}_{int(n):04d}" for name, n in ((name1, fields[1]), (name2, fields[-1])))
    return path1, path2, len(fields) == 3


def _is_number(field: str) -> bool:
    return field.isascii() and field.isdigit() and len(field) < 10


# In this order: tabs and commas separate paths with blanks, where they make sense of every line.
_SPLITS: tuple[Callable[[str], Fields], ...] = (
    lambda line: line.split("\t"), functools.partial(_split_csv, ","), functools.partial(_split_csv, ";"), str.split)
_LABELS = (("0", "1"), ("-1", "1"), ("false", "true"))
_SHAPES: dict[str, Callable[[Fields], tuple[str, str, bool] | None]] = {
    **{f"'path1 path2 {'|'.join(labels)}'": functools.partial(_labelled, -1, labels) for labels in _LABELS},
    **{f"'{'|'.join(labels)} path1 path2'": functools.partial(_labelled, 0, labels) for labels in _LABELS},
    "LFW's 'name n1 n2' or 'name1 n1 name2 n2'": _lfw,
}


def _read_pairs(pair_list: str, flag: str) -> tuple[list[Pair], bool]:
    """(the pairs, whether it is LFW's list, whose paths lack the extension).

    The first form that fits all lines is taken: two paths and a label, or LFW's pairs.txt; separated by tabs, commas
    (with quotes as in CSV), semicolons or blanks. Blank lines, lines that begin with # and a first line of column names
    or of LFW's counts are left out.
    """
    try:
        # surrogateescape: file names need not be UTF-8. utf-8-sig: editors on Windows write a byte order mark.
        with io.TextIOWrapper(open_bounded(pair_list, _MAX_BYTES), "utf-8-sig", "surrogateescape") as file:
            lines = [(number, line.strip()) for number, line in enumerate(file, start=1)
                     if line.strip() and not line.lstrip().startswith("#")]
    except OSError as error:
        raise UserError(f"{flag} {pair_list}: cannot be read ({error.strerror})") from None
    if not lines:
        raise UserError(f"{pair_list}: the pair list is empty; it needs lines of {_FORMS}")
    if lines[0][1].startswith("\udc80"):  # how a pickle begins
        raise UserError(f"{flag} {pair_list}: is no list of pairs; if it is an evaluation set such as lfw.bin, give it "
                        f"with {'--val-bin' if flag == '--val-pairs' else '--bin'}")
    if pairs := _two_lines_a_pair(lines, pair_list):
        return pairs, False
    most, problem = -1, ""
    for split, (shape, parse) in itertools.product(_SPLITS, _SHAPES.items()):
        pairs = []
        for number, line in lines:
            fields = [field.strip() for field in split(line)]
            while fields and not fields[-1]:
                fields.pop()
            pair = parse(fields) if all(fields) and "\0" not in line else None
            if pair is not None:
                pairs.append((number, *pair))
            elif number != lines[0][0] or not _is_header(fields):
                break
        else:
            if pairs:
                return pairs, parse is _lfw
        if len(pairs) > most:  # the form that fits longest is what the list was meant to be
            most = len(pairs)
            expected = f"{shape}, as in the lines before" if pairs else f"lines of {_FORMS}"
            problem = f"{pair_list}:{number}: expected {expected}, got {ascii(line[:120])}"
    raise UserError(problem)


def _two_lines_a_pair(lines: list[tuple[int, str]], pair_list: str) -> list[Pair]:
    """The pairs of CALFW's and CPLFW's list; [] if it is another one.

    Two lines of 'path number' are a pair. Different people have 0, and the same person has 1 (CPLFW) or the number of
    the fold, 1 to 10 (CALFW). Raises UserError.
    """
    fields = [line.split() for _, line in lines]
    if not all(len(row) == 2 and row[0].lower().endswith(IMAGE_EXTENSIONS) and _is_number(row[1])
               and not set(row[0]) & set(",;\0") for row in fields):
        return []
    pairs: list[Pair] = []
    for k in range(0, len(lines), 2):
        number, line = lines[k]
        if k + 1 == len(lines) or fields[k][1] != fields[k + 1][1]:
            raise UserError(f"{pair_list}:{number}: two lines with the same number are a pair; the line after "
                            f"{ascii(line[:120])} has another one, or is missing")
        pairs.append((number, fields[k][0], fields[k + 1][0], fields[k][1] != "0"))
    return pairs


def _is_header(fields: Fields) -> bool:
    """Names of three or four columns, or LFW's numbers of folds and pairs."""
    if all(map(_is_number, fields)):
        return len(fields) in (1, 2)
    return len(fields) in (3, 4) and not any(_is_number(field) or set(field) & set("/.\\") for field in fields)


def _with_extension(imgs_root: str, stem: str) -> str:
    """The image `stem` with the extension of the file that is there; .jpg if there is none."""
    return next((stem + extension for extension in IMAGE_EXTENSIONS
                 if os.path.isfile(os.path.join(imgs_root, stem + extension))), f"{stem}.jpg")


def _hint(imgs_root: str, path: str) -> str:
    """What to do about the missing image: it may lie a directory higher or deeper, or have another extension."""
    other = _with_extension(imgs_root, os.path.splitext(path)[0])
    if os.path.isfile(os.path.join(imgs_root, other)):
        return f"there is {other}: correct the list"
    with os.scandir(imgs_root) as entries:
        below = sorted(entry.path for entry in itertools.islice(entries, 1000) if entry.is_dir())
    for root in (os.path.dirname(os.path.abspath(imgs_root)), ".", *below):
        if os.path.isfile(os.path.join(root, path)):
            return f"it is in {root}: give --imgs-root {root}"
    return "check --imgs-root"
