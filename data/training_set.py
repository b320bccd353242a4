"""What every format of training data has in common: labelled images, of which bad ones are reported or dropped."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from data.decode import decode_image
from utils.errors import UserError, printable


class TrainingSet(Dataset, ABC):
    """Labelled images. Item i is (uint8 (3, 112, 112), label); its label is one of 0, 1, ..., classes - 1.

    A format is a subclass, with one entry in data.formats.FORMATS. It implements the abstract methods, whose `position`
    counts all images of the data, those that check_headers dropped included.

    Attributes:
    root: the directory or file really used, for messages
    identities: the name of each class, by label
    skip_bad: False: a bad image is an error; True: the training loader replaces it by the next readable one
    """

    root: str
    identities: Sequence[str]

    skip_bad = False
    _dropped = np.empty(0, dtype=np.int64)  # positions, sorted
    _left_before = np.empty(0, dtype=np.int64)  # for each of them: how many images before it are left

    @abstractmethod
    def __init__(self, path: str | os.PathLike[str], *, index: str | os.PathLike[str], progress: bool) -> None:
        """index: what --index gives: auto, none or a file. progress: report on stderr. Raises UserError."""

    @staticmethod
    @abstractmethod
    def is_at(path: str) -> bool:
        """Whether `path` holds data of this format."""

    @abstractmethod
    def _count(self) -> int:
        """The images of the data."""

    @abstractmethod
    def _labels(self) -> np.ndarray:
        """int64 (count,)."""

    @abstractmethod
    def _label(self, position: int) -> int: ...

    @abstractmethod
    def _encoded(self, position: int) -> tuple[bytes, str]:
        """(the encoded image, what errors call it). Raises UserError if it cannot be read."""

    @abstractmethod
    def _find_bad(self, progress: bool) -> tuple[np.ndarray, str]:
        """(sorted positions of images whose headers are bad, what is wrong with the first of them)."""

    @abstractmethod
    def image_names(self, indices: np.ndarray) -> list[str]:
        """`<identity>/<file>`, or what the format has in place of files, of the images with these indices."""

    @abstractmethod
    def find_images(self, names: Sequence[str]) -> np.ndarray:
        """int64 (len(names),): the position of each image that image_names calls so; -1: there is none."""

    def drop(self, positions: np.ndarray) -> None:
        """Leave out the images at these positions, int64, for good."""
        self._dropped = np.union1d(self._dropped, positions)
        self._left_before = self._dropped - np.arange(len(self._dropped))

    def __len__(self) -> int:
        return self._count() - len(self._dropped)

    def describe(self) -> str:
        """Images, identities and place, for the table of a run."""
        return f"{len(self):,} of {len(self.identities):,} identities in {self.root}"

    def fingerprint(self) -> str:
        """`<format>:<hash>`: which images there are, and in which order, by name and label, not by content.

        A run that stops within an epoch continues its order only over the same images.
        """
        digest = hashlib.blake2b(json.dumps(self._identify()).encode(), digest_size=8)
        digest.update(np.ascontiguousarray(self._dropped).data)
        return f"{type(self).__name__}:{digest.hexdigest()}"

    def _identify(self) -> list[int]:
        """Numbers, such as checksums, that change when images are added, removed, renamed or get another label."""
        return [zlib.crc32(np.ascontiguousarray(self._labels()).data)]

    @property
    def labels(self) -> np.ndarray:
        """int64 (len,), computed on each access."""
        return np.delete(self._labels(), self._dropped)

    def encoded(self, i: int) -> tuple[bytes, str]:
        """(image i before decoding, what errors call it). Raises UserError if it cannot be read."""
        return self._encoded(self._position(i))

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        position = self._position(i)
        return decode_image(*self._encoded(position)), self._label(position)

    def _position(self, i: int) -> int:
        """The position of image i, which counts without the dropped ones."""
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        if not len(self._dropped):
            return i
        return i + int(np.searchsorted(self._left_before, i, side="right"))

    def check_headers(self, skip_bad: bool, progress: bool) -> int:
        """Check the header of every image before training starts. Returns how many images were dropped.

        A bad image is unreadable, empty, not an image, or not 112x112. Damage beyond the header shows only when the
        image is decoded.

        skip_bad: False: raise one UserError that names the first bad image. True: drop bad images; training replaces
        those that turn out bad later. An identity that loses all images keeps its label, so that labels do not depend
        on which images could be read.
        progress: report on stderr; one process of a run does that.
        """
        self.skip_bad = skip_bad
        bad, first_error = self._find_bad(progress)
        if not len(bad):
            return 0
        total = len(self)
        count = f"{len(bad)} of {total} images are bad" if len(bad) > 1 else f"1 of {total} images is bad"
        if not skip_bad:
            raise UserError(f"{first_error} ({count}; --skip-bad-images trains without them)")
        if len(bad) == total:
            raise UserError(f"{self.root}: no image can be used; the first error: {first_error}")
        self.drop(bad)
        if progress:
            empty = len(self.identities) - len(np.unique(self.labels))
            note = f"; identities without images, which keep their labels: {empty}" if empty else ""
            print(f"warning: {count} and skipped; the first error: {printable(first_error)}{note}", file=sys.stderr)
        return len(bad)
