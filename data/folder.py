"""Aligned 112x112 face images in one directory per identity: `ROOT/<identity>/<image>`."""

from __future__ import annotations

import os
import sys

import numpy as np
import torch
from torch.utils.data import Dataset

from data.decode import check_header, decode_image, read_bytes
from data.index import (
    IMAGE_EXTENSIONS,
    PackedNames,
    in_chunks,
    index_paths,
    locked,
    open_index,
    progress_bar,
    reload_index,
    save_index,
)
from utils.errors import UserError


class FaceFolder(Dataset):
    """The images below `root/train` if that directory exists, else below `root`: `<identity>/<image>`, not deeper.

    Identities are the sorted names of the sub-directories that hold images (links to directories are followed) and get
    the labels 0, 1, ...; images are sorted by name within their identity. Hidden entries and files without an image
    extension are ignored. folder[i] is (uint8 (3, 112, 112), label), decoded from folder.encoded(i); decode_image and
    read_bytes tell what they raise.

    index: "none" scans the directories; "auto" or a file keeps what a scan has found, and what check_headers has, for
    the next start (see data.index). progress: tell on stderr what takes long. One process of a run does that.

    Attributes: root (the directory really used), identities (their names, by label), skip_bad (False: a bad image is
    an error; True: the training loader replaces it by the next readable one).

    Beside its name an image costs 5 bytes, in a file that all processes of a node map, or else in each of them.
    Raises UserError where the directory is missing, has no sub-directories, or these have no images.
    """

    def __init__(
        self, root: str | os.PathLike[str], *, index: str | os.PathLike[str] = "none", progress: bool = False
    ) -> None:
        root, index = os.fspath(root), os.fspath(index)
        if not os.path.isdir(root):
            raise UserError(f"{root}: no such directory; it must hold one sub-directory of images per identity")
        train = os.path.join(root, "train")
        self.root = train if os.path.isdir(train) else root
        self.skip_bad = False
        self._index_flag = index
        self._index = open_index(self.root, index, progress)
        self._dropped = np.empty(0, dtype=np.int64)  # sorted numbers in the index

        directories = self._index.directories
        if not len(directories):
            raise UserError(f"{self.root}: has no sub-directories; images belong in {self.root}/<identity>/<image>")
        if not len(self._index):
            raise UserError(
                f"{self.root}: no images in its {len(directories)} sub-directories; "
                f"expected {self.root}/<identity>/<image> with one of {', '.join(IMAGE_EXTENSIONS)}"
            )
        self._name_identities()

    def _name_identities(self) -> None:
        has_images = np.diff(self._index.first_image) > 0
        self._label_of = np.cumsum(has_images, dtype=np.int32) - 1  # (D,): a directory's label, where it has images
        directories = self._index.directories
        self.identities: PackedNames = directories if has_images.all() else directories.where(has_images)

    def __getstate__(self) -> dict[str, object]:
        """Without what comes from the index: where that is a file, another process finds it there."""
        return {name: value for name, value in vars(self).items() if name not in ("identities", "_label_of")}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._name_identities()

    @property
    def labels(self) -> np.ndarray:
        """int64 (len,), made anew on each access."""
        labels = np.repeat(self._label_of.astype(np.int64), np.diff(self._index.first_image))
        return np.delete(labels, self._dropped) if len(self._dropped) else labels

    def __len__(self) -> int:
        return len(self._index) - len(self._dropped)

    def path(self, i: int) -> str:
        """Where image i lies."""
        return self._locate(i)[0]

    def encoded(self, i: int) -> tuple[bytes, str]:
        """The file's bytes, and the path that an error names. Raises UserError where it cannot be read."""
        path = self.path(i)
        return read_bytes(path), path

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        path, label = self._locate(i)
        return decode_image(read_bytes(path), path), label

    def _locate(self, i: int) -> tuple[str, int]:
        """(path, label) of image i."""
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        return self._locate_in_index(self._position(i))

    def _locate_in_index(self, position: int) -> tuple[str, int]:
        directory = self._index.directory_of(position)
        name = self._index.name(position, directory)
        return f"{self.root}/{self._index.directories[directory]}/{name}", int(self._label_of[directory])

    def _position(self, i: int) -> int:
        """The number in the index of what is image i without the dropped ones."""
        if not len(self._dropped):
            return i
        # dropped[k] - k images are left before the k-th dropped one.
        return i + int(np.searchsorted(self._dropped - np.arange(len(self._dropped)), i, side="right"))

    def check_headers(self, skip_bad: bool, progress: bool) -> int:
        """Open the files and look at their headers, before training does; returns how many images were dropped.

        A bad file is unreadable, empty, no image, or not 112x112 (damage beyond the header shows when it is decoded).
        skip_bad False: bad files raise one UserError, which names the first of them. True: they are dropped, and
        training will replace what turns out bad later (the attribute skip_bad). An identity that loses all its images
        keeps its label, so that labels do not depend on which files could be read.
        progress: tell on stderr, with a bar if that is a terminal and the check takes longer than a second, and with
        one line about dropped images. One process of a run does that; the others give False.

        The index remembers good headers, for as long as their directory has the same files; bad ones are looked at
        again at every start, as a repaired file need not change its directory.
        """
        self.skip_bad = skip_bad
        errors: dict[int, str] = {}
        if len(self._unchecked()):
            paths = index_paths(self.root, self._index_flag)
            with locked(paths, progress):
                self._index = reload_index(self._index)  # perhaps another process has just done it
                unchecked = self._unchecked()
                errors = self._header_errors(unchecked, progress)
                good = np.setdiff1d(unchecked, np.array(list(errors), dtype=np.int64), assume_unique=True)
                if len(good):
                    self._index = save_index(self._index.with_good_headers(good), paths, progress)
        bad = np.array(list(errors), dtype=np.int64)
        if not len(bad):
            return 0
        total, first_error = len(self), errors[int(bad[0])]
        count = f"{len(bad)} of {total} images are bad" if len(bad) > 1 else f"1 of {total} images is bad"
        if not skip_bad:
            raise UserError(f"{first_error} ({count}; --skip-bad-images trains without them)")
        if len(bad) == total:
            raise UserError(f"{self.root}: no image can be used; the first one: {first_error}")
        self._dropped = np.union1d(self._dropped, bad)
        if progress:
            empty = len(self.identities) - len(np.unique(self.labels))
            note = f"; identities that have no image left and keep their label: {empty}" if empty else ""
            print(f"warning: {count} and skipped, the first one: {first_error}{note}", file=sys.stderr)
        return len(bad)

    def _unchecked(self) -> np.ndarray:
        """The images, sorted numbers in the index, whose headers have not been seen to be good."""
        return np.setdiff1d(np.flatnonzero(self._index.header_is_good == 0), self._dropped, assume_unique=True)

    def _header_errors(self, positions: np.ndarray, progress: bool) -> dict[int, str]:
        """The bad ones of these images, given as numbers in the index: {number: what is wrong}, in order."""
        def of_chunk(chunk: range) -> tuple[int, list[tuple[int, str]]]:
            found = []
            for position in positions[chunk.start : chunk.stop].tolist():
                try:
                    check_header(self._locate_in_index(position)[0])
                except UserError as error:
                    found.append((position, str(error)))
            return len(chunk), found

        errors: dict[int, str] = {}
        with progress_bar("checking images", len(positions), progress) as bar:
            for checked, found in in_chunks(of_chunk, len(positions)):
                errors.update(found)
                bar.update(checked)
        return errors
