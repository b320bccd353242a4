"""The formats of training data. To add one: a subclass of data.training_set.TrainingSet, and an entry here."""

from __future__ import annotations

import os

from data.exclude import ExcludingSet, read_exclusions
from data.folder import FaceFolder
from data.recordio import RecordIODataset
from data.training_set import TrainingSet
from data.union import UnionSet
from utils.errors import UserError

# The first format that recognises a path opens it. A folder is any directory, so it comes last.
FORMATS: dict[str, type[TrainingSet]] = {"recordio": RecordIODataset, "folder": FaceFolder}


def open_training_set(
    path: str, *, index: str, skip_bad: bool, progress: bool, identities: str | None = None, exclude: str | None = None
) -> TrainingSet:
    """Open the training data at `path`, whatever its format, and check the headers of all images.

    path: of one set; or of several, with commas between them, unless there is something of just this name.
    index: where to keep what a scan finds (--index: auto, none or a file; for several sets, as many files).
    identities: of several sets, "separate" (as None) or "shared", as in data.union.
    exclude: a file of what to leave out (--exclude), as in data.exclude.
    skip_bad: drop bad images instead of raising an error (--skip-bad-images).
    progress: report on stderr; one process of a run does that.

    Raises UserError if there is no training data, or bad images.
    """
    paths = [path] if os.path.exists(path) else path.split(",")
    if len(paths) == 1 and identities is not None:
        raise UserError(f"--identities {identities}: {path} is one training set; give several, as DIR1,DIR2, or drop "
                        "the flag")
    indices = [index] * len(paths) if index in ("auto", "none") else index.split(",") if len(paths) > 1 else [index]
    if len(indices) != len(paths):
        raise UserError(f"--index {index}: for {len(paths)} training sets, give auto, none, or {len(paths)} files with "
                        "commas between them")
    if not all(paths):
        raise UserError(f"{path}: names no training set before or after a comma; write DIR1,DIR2 without blanks")
    sets = [_open_one(path, index, progress) for path, index in zip(paths, indices)]
    dataset = sets[0] if len(sets) == 1 else UnionSet(sets, identities or "separate")
    if exclude is not None:
        dataset = ExcludingSet(dataset, read_exclusions(exclude))
    dataset.check_headers(skip_bad, progress)
    return dataset


def _open_one(path: str, index: str, progress: bool) -> TrainingSet:
    kind = next((kind for kind in FORMATS.values() if kind.is_at(path)), None)
    if kind is None:
        missing = "file" if path.endswith(".rec") else "directory"
        problem = "is a file that is no .rec file" if os.path.exists(path) else f"no such {missing}"
        raise UserError(f"{path}: {problem}; give a .rec file, or a directory of images")
    if kind is FaceFolder:
        _require_no_package(path)
    return kind(path, index=index, progress=progress)


def _require_no_package(path: str) -> None:
    """Raise UserError if a directory has no sub-directories but a .rec file, which was probably meant."""
    with os.scandir(path) as entries:
        found = sorted((entry.name, entry.is_dir()) for entry in entries)
    packages = [name for name, is_directory in found if name.endswith(".rec") and not is_directory]
    if packages and not any(is_directory for _, is_directory in found):
        raise UserError(f"{path}: holds {packages[0]}, but no train.rec; give {os.path.join(path, packages[0])}")
