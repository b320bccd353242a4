"""The files of a run's checkpoints: names, commit, links, pruning, checksums. Nothing here is collective.

README.md in this directory shows the tree. A save writes and flushes a .part directory, then renames it. The rename is
the commit; a committed checkpoint never changes. Renames also switch the two links, so they always point to a complete
checkpoint. File systems without symbolic links get copies instead.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import os
import re
import shutil
import time
import zlib
from typing import Any

from utils.checkpoint.safe_load import read_torch_file
from utils.errors import UserError
from utils.files import atomic_write, flush, flush_directory, open_regular
from utils.training.metrics import METRICS_FILE, TENSORBOARD_DIRECTORY

LATEST, BEST = "checkpoint.pth.tar", "model_best.pth.tar"
STEPS_DIRECTORY = "checkpoints"
STATE_FILE, SHARDS_DIRECTORY, MANIFEST_FILE = "state.pth.tar", "shards", "manifest.json"
METADATA_FILE = f"{SHARDS_DIRECTORY}/.metadata"
EVALUATION_FILE = "evaluation.json"  # comes after the commit, so the manifest does not list it
OLDER_RUN = "previous-run."  # with a number: what a new run found in its --output, a run's directory as before

# step-00000010.1 is a second save of step 10, after the first was damaged or belonged to an older run.
_STEP_NAME = re.compile(r"step-\d{8,}(\.\d+)?")
_UNFINISHED = ".part"
_FILE_NAME = re.compile(rf"{re.escape(STATE_FILE)}|{SHARDS_DIRECTORY}/\.?\w[\w.]*")

# Most bytes that are read into memory. The manifest has a line per rank, .metadata 300 bytes per block.
_MANIFEST_LIMIT, _METADATA_LIMIT = 2**26, 2**28

Files = dict[str, tuple[int, int]]  # {path relative to the step's directory: (bytes, CRC-32)}


class DamagedCheckpoint(UserError):
    """A checkpoint differs from what was saved. The message names the file."""


# Writing: one process of the run


def move_older_run_aside(output: str, *, checkpoints: bool = True) -> str | None:
    """Rename what an older run left in `output` into a new directory previous-run.<number> there, which is returned.

    Links and copies stay valid, because all of a run moves. After a kill in between the next call moves the rest.
    Returns None if there is nothing: a run that ended before its first step leaves nothing.

    Args:
        checkpoints: False for a run that will save none: only what is logged moves.

    Raises UserError.
    """
    names = [STEPS_DIRECTORY] * bool(newest_first(output)) + [LATEST, BEST] if checkpoints else []
    names = [name for name in names if os.path.lexists(os.path.join(output, name))]
    metrics = os.path.join(output, METRICS_FILE)
    if not names and not (os.path.lexists(metrics) and os.lstat(metrics).st_size):
        return None
    names += [METRICS_FILE] * os.path.lexists(metrics)
    events = os.path.join(glob.escape(output), TENSORBOARD_DIRECTORY, "events.out.tfevents.*")
    names += [TENSORBOARD_DIRECTORY] * bool(glob.glob(events))
    numbered = (os.path.join(output, f"{OLDER_RUN}{number}") for number in itertools.count(1))
    aside = next(path for path in numbered if not os.path.lexists(path))
    try:
        if STEPS_DIRECTORY in names and os.path.islink(os.path.join(output, STEPS_DIRECTORY)):
            raise OSError(None, f"{STEPS_DIRECTORY} is a symbolic link, with checkpoints at its other end")
        os.mkdir(aside)
        for name in names:
            os.rename(os.path.join(output, name), os.path.join(aside, name))
        flush_directory(aside)
        flush_directory(output)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.rmdir(aside)  # if it is empty
        raise UserError(f"--output {output}: an older run is there and cannot be moved to {aside} ({error.strerror}); "
                        "move it away, or give another directory") from None
    return aside


def begin(output: str, step: int) -> str:
    """Remove the remains of interrupted saves, then create and return the directory of a new one. Raises OSError."""
    parent = os.path.join(output, STEPS_DIRECTORY)
    for directory in glob.glob(os.path.join(glob.escape(parent), "*" + _UNFINISHED)):
        # NFS keeps a directory while a process has one of its files open. The next save tries again.
        shutil.rmtree(directory, ignore_errors=True)
    for link in (LATEST, BEST):
        for path in glob.glob(os.path.join(glob.escape(output), f"{link}*{_UNFINISHED}")):
            os.unlink(path)
    name, number = f"step-{step:08d}", 0
    while any(os.path.exists(os.path.join(parent, name + suffix)) for suffix in ("", _UNFINISHED)):
        number += 1
        name = f"step-{step:08d}.{number}"
    directory = os.path.join(parent, name + _UNFINISHED)
    os.makedirs(os.path.join(directory, SHARDS_DIRECTORY))
    return directory


def final_name(directory: str) -> str:
    """The name after the commit, relative to --output, of a .part directory: checkpoints/step-00000010."""
    return f"{STEPS_DIRECTORY}/{os.path.basename(directory).removesuffix(_UNFINISHED)}"


def commit(output: str, directory: str, files: Files, *, links: tuple[str, ...], keep: int) -> None:
    """Write the manifest, rename the directory, switch the links, prune. Raises OSError.

    Args:
        directory: the directory that `begin` returned.
        files: all files in it. They must already be flushed.
        links: names of the links that shall point to this checkpoint.
        keep: number of newest checkpoints to keep. Checkpoints that a link points to are always kept.
    """
    with open(os.path.join(directory, MANIFEST_FILE), "wb") as file:
        # Another host may have saved the previous checkpoint, and its clock may be ahead. The order must still hold.
        newest = max(map(_saved_at, newest_first(output)), default=0.0)
        file.write(json.dumps({"saved_at": max(time.time(), newest + 1e-3), "files": files}, indent=1).encode())
        flush(file)
    flush_directory(os.path.join(directory, SHARDS_DIRECTORY))
    flush_directory(directory)
    name = final_name(directory)
    os.rename(directory, os.path.join(output, name))
    flush_directory(os.path.join(output, STEPS_DIRECTORY))
    for link in links:
        _switch_link(os.path.join(output, link), f"{name}/{STATE_FILE}")
    flush_directory(output)
    _prune(output, keep)


def note_evaluation(output: str, name: str, *, score: float, best_score: float, is_best: bool, keep: int) -> None:
    """Write the score of the committed checkpoint `name` (as of `final_name`) beside its files. Raises OSError.

    is_best: link it as the best first. If the process is killed in between, the evaluation is made again.
    """
    if is_best:
        _switch_link(os.path.join(output, BEST), f"{name}/{STATE_FILE}")
        flush_directory(output)
        _prune(output, keep)
    with atomic_write(os.path.join(output, name, EVALUATION_FILE)) as file:
        file.write(json.dumps({"score": score, "best_score": best_score}).encode())


def read_best_score(directory: str) -> float | None:
    """The best score of a run at this checkpoint, its own evaluation included; None if that was not made."""
    try:
        with open(os.path.join(directory, EVALUATION_FILE), "rb") as file:
            return float(json.loads(file.read(4096))["best_score"])
    except (OSError, KeyError, TypeError, ValueError, RecursionError):
        return None


def _switch_link(path: str, target: str) -> None:
    try:
        os.symlink(target, path + _UNFINISHED)
    except OSError:  # The file system has no symbolic links. On a full disk the copy fails as well.
        with open(os.path.join(os.path.dirname(path), target), "rb") as source, atomic_write(path) as copy:
            shutil.copyfileobj(source, copy)
    else:
        os.replace(path + _UNFINISHED, path)


def _prune(output: str, keep: int) -> None:
    links = [os.path.join(output, name) for name in os.listdir(output) if name.startswith((LATEST, BEST))]
    linked = set(map(_linked_step, links))
    for directory in newest_first(output)[keep:]:
        if os.path.basename(directory) not in linked:
            # Rename first: a half-removed directory must never look like a checkpoint.
            os.rename(directory, directory + _UNFINISHED)
            shutil.rmtree(directory + _UNFINISHED, ignore_errors=True)


def _linked_step(path: str) -> str | None:
    """The name of the step's directory that a link, or the copy in its place, belongs to."""
    if os.path.islink(path):
        return os.path.basename(os.path.dirname(os.readlink(path)))
    with contextlib.suppress(UserError):
        contents = read_torch_file(path)
        if isinstance(contents, dict):
            return os.path.basename(str(contents.get("directory")))
    return None


# Reading: any process


def newest_first(output: str) -> list[str]:
    """The directories of all committed checkpoints, the last one saved first."""
    parent = os.path.join(output, STEPS_DIRECTORY)
    names = os.listdir(parent) if os.path.isdir(parent) else []
    found = [os.path.join(parent, name) for name in names if _STEP_NAME.fullmatch(name)]
    return sorted(found, key=_saved_at, reverse=True)


def newest_older_run(output: str) -> str | None:
    """The directory of the last run with checkpoints that `move_older_run_aside` has moved. None without any."""
    names = os.listdir(output) if os.path.isdir(output) else []
    numbers = [int(name.removeprefix(OLDER_RUN)) for name in names if re.fullmatch(rf"{OLDER_RUN}\d{{1,9}}", name)]
    paths = (os.path.join(output, f"{OLDER_RUN}{number}") for number in sorted(numbers, reverse=True))
    return next(filter(newest_first, paths), None)


def _saved_at(directory: str) -> float:
    try:
        return float(_load_manifest(directory)["saved_at"])
    except (OSError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
        # The manifest is damaged, which its reader reports.
        return os.path.getmtime(directory) if os.path.isdir(directory) else 0.0


def _load_manifest(directory: str) -> Any:
    """The JSON in a manifest. Raises OSError, ValueError or RecursionError."""
    with open_regular(os.path.join(directory, MANIFEST_FILE)) as file:
        # Never more than there is: `read` allocates what it is asked for.
        return json.loads(file.read(min(os.fstat(file.fileno()).st_size, _MANIFEST_LIMIT)))


def step_directory(path: str, contents: dict) -> str:
    """The checkpoint's directory, given a state file and its contents. Raises UserError if it cannot be found.

    Args:
        path: the state file itself, a link to it, or a copy of it in --output.
    """
    directory = os.path.dirname(os.path.realpath(path))
    if os.path.basename(os.path.realpath(path)) == STATE_FILE:
        return directory
    directory = os.path.join(directory, str(contents.get("directory")))
    state = os.path.join(directory, STATE_FILE)
    if not os.path.isfile(state) or checksum(path) != checksum(state):
        raise UserError(f"{path}: is a copy of a state file without its class centers; give the {STATE_FILE} in a "
                        f"directory below {STEPS_DIRECTORY}/, or the link {LATEST} beside {STEPS_DIRECTORY}/")
    return directory


def read_manifest(directory: str) -> Files:
    """The files of a checkpoint, after checking that each exists with the right size. Raises DamagedCheckpoint."""
    manifest = os.path.join(directory, MANIFEST_FILE)
    try:
        files = {name: (int(size), int(crc)) for name, (size, crc) in _load_manifest(directory)["files"].items()}
        if not all(map(_FILE_NAME.fullmatch, files)):  # a device or a pipe elsewhere could be read for ever
            raise ValueError("names that no checkpoint has")
        sizes = {}
        for name in files:
            with open_regular(os.path.join(directory, name)) as file:
                sizes[name] = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DamagedCheckpoint(f"{error.filename}: cannot be read: {error.strerror}") from None
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
        files = {}
    if not {STATE_FILE, METADATA_FILE} <= files.keys() or files[METADATA_FILE][0] > _METADATA_LIMIT:
        raise DamagedCheckpoint(f"{manifest}: is damaged: not the manifest of a checkpoint")
    for name, (size, _) in files.items():
        if sizes[name] != size:
            raise DamagedCheckpoint(f"{os.path.join(directory, name)}: is damaged: it has {sizes[name]:,} bytes "
                                    f"instead of {size:,}")
    return files


def check_files(directory: str, files: Files) -> None:
    """Read the files and compare their checksums. Raises DamagedCheckpoint."""
    for name, expected in files.items():
        path = os.path.join(directory, name)
        try:
            found = checksum(path)
        except OSError as error:
            raise DamagedCheckpoint(f"{path}: cannot be read: {error.strerror}") from None
        if found != expected:
            raise DamagedCheckpoint(f"{path}: is damaged: its checksum differs from the manifest's")


def checksum(path: str) -> tuple[int, int]:
    """(bytes, CRC-32) of a file. CRC-32 detects damage, not malice: no reader executes anything in a checkpoint."""
    size = crc = 0
    with open_regular(path) as file:
        while block := file.read(2**20):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc
