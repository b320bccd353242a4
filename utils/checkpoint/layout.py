"""The checkpoints of a run on disk: names, commit, links, what is kept, and whether a checkpoint is whole. No collectives.

    <--output>/
        checkpoint.pth.tar -> checkpoints/step-00000020/state.pth.tar
        model_best.pth.tar -> checkpoints/step-00000010/state.pth.tar
        checkpoints/
            step-00000010/
                state.pth.tar    one file, by rank 0
                shards/          class centers and their momentum, by torch.distributed.checkpoint, each rank its own
                manifest.json    when it was saved; bytes and CRC-32 of every other file
            step-00000020/
            step-00000030.part/  a save under way, or the rest of an interrupted one, which the next save removes

A directory is written under its .part name, flushed to the disk with all that is in it, and renamed: the rename is the
commit. From then on nobody changes it. The two links are switched by a rename as well, so that they always refer to a whole
checkpoint; where the file system has no symbolic links they are copies.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
import zlib

from utils.checkpoint.weights import read_torch_file
from utils.errors import UserError
from utils.files import flush, flush_directory, move_aside

LATEST, BEST = "checkpoint.pth.tar", "model_best.pth.tar"
STEPS_DIRECTORY = "checkpoints"
STATE_FILE, SHARDS_DIRECTORY, MANIFEST_FILE = "state.pth.tar", "shards", "manifest.json"


# A second save of the same step (after one that was damaged, or of an older run in this directory) is called step-00000010.1.
_STEP_NAME = re.compile(r"step-\d{8,}(\.\d+)?")
_UNFINISHED = ".part"
_MANIFEST_NAMES = re.compile(rf"{re.escape(STATE_FILE)}|{SHARDS_DIRECTORY}/\.?\w[\w.]*")


class DamagedCheckpoint(UserError):
    """A checkpoint is not, or no longer, what was saved. The message names the file."""


# ---------------------------------------------------------------------------------------------------------------------
# Writing: by one process of the run


def begin(output: str, step: int) -> str:
    """Remove what interrupted saves have left; make and return the directory in which `finish` will find the checkpoint's files."""
    remove_unfinished(output)
    parent = os.path.join(output, STEPS_DIRECTORY)
    name, number = f"step-{step:08d}", 0
    while os.path.exists(os.path.join(parent, name)) or os.path.exists(os.path.join(parent, name + _UNFINISHED)):
        number += 1
        name = f"step-{step:08d}.{number}"
    directory = os.path.join(parent, name + _UNFINISHED)
    os.makedirs(os.path.join(directory, SHARDS_DIRECTORY))
    return directory


def final_name(directory: str) -> str:
    """What the directory that `begin` made will be called, relative to --output: checkpoints/step-00000010."""
    return f"{STEPS_DIRECTORY}/{os.path.basename(directory).removesuffix(_UNFINISHED)}"


def finish(output: str, directory: str, files: dict[str, tuple[int, int]], *, links: tuple[str, ...], keep: int) -> None:
    """Commit: write the manifest, flush, rename, refer to the checkpoint by `links`, prune. Raises OSError.

    Args:
        directory: what `begin` made, with `files` in it, each of them flushed to the disk.
        files: {name: (bytes, CRC-32)} relative to `directory`.
        keep: so many of the newest checkpoints stay, beside those that a link refers to.
    """
    with open(os.path.join(directory, MANIFEST_FILE), "w", encoding="utf-8") as file:
        # Another host's clock may be ahead of this one's: what is saved now is the newest all the same.
        newest = max(map(_saved_at, newest_first(output)), default=0.0)
        json.dump({"saved_at": max(time.time(), newest + 1e-3), "files": files}, file, indent=1)
        flush(file)
    flush_directory(os.path.join(directory, SHARDS_DIRECTORY))
    flush_directory(directory)
    name = final_name(directory)
    os.rename(directory, os.path.join(output, name))
    flush_directory(os.path.join(output, STEPS_DIRECTORY))
    for link in links:
        _refer(output, link, f"{name}/{STATE_FILE}")
    flush_directory(output)
    _prune(output, keep)


def remove_unfinished(output: str) -> None:
    """Remove what interrupted saves, and interrupted removals, have left; what cannot be removed, another time.

    NFS keeps the files, and so the directory, that some process has open.
    """
    parent = os.path.join(output, STEPS_DIRECTORY)
    for directory in _listdir(parent):
        if directory.endswith(_UNFINISHED):
            shutil.rmtree(os.path.join(parent, directory), ignore_errors=True)
    for link in (LATEST, BEST):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(output, link + _UNFINISHED))


def put_damaged_aside(directory: str) -> str:
    """Take a step's directory out of the way of `newest_first` and of pruning, as step-X.damaged. Returns its new name."""
    target = directory + ".damaged"
    move_aside(target)
    os.rename(directory, target)
    return target


def write_flushed(path: str, write) -> None:
    """Make the file by `write(file)` and have it on the disk when this returns. Raises OSError."""
    with open(path, "wb") as file:
        write(file)
        flush(file)


def _refer(output: str, link: str, target: str) -> None:
    path = os.path.join(output, link)
    try:
        os.symlink(target, path + _UNFINISHED)
    except OSError:  # no such thing on this file system; if the disk is full the copy tells
        with open(os.path.join(output, target), "rb") as source:
            write_flushed(path + _UNFINISHED, lambda copy: shutil.copyfileobj(source, copy))
    os.replace(path + _UNFINISHED, path)


def _prune(output: str, keep: int) -> None:
    referred = {_referred_step(os.path.join(output, name)) for name in os.listdir(output) if name.startswith((LATEST, BEST))}
    for directory in newest_first(output)[keep:]:
        if os.path.basename(directory) not in referred:
            # First under a name that says so: half a directory must never look like a checkpoint.
            os.rename(directory, directory + _UNFINISHED)
            shutil.rmtree(directory + _UNFINISHED, ignore_errors=True)


def _referred_step(path: str) -> str | None:
    """The step's directory, without those above it, that a link, or the copy in its place, refers to."""
    if os.path.islink(path):
        return os.path.basename(os.path.dirname(os.readlink(path)))
    with contextlib.suppress(UserError):
        contents = read_torch_file(path)
        if isinstance(contents, dict) and isinstance(contents.get("directory"), str):
            return os.path.basename(contents["directory"])
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Reading: by any process


def newest_first(output: str) -> list[str]:
    """The step directories, in the order in which they were saved, the last one first."""
    parent = os.path.join(output, STEPS_DIRECTORY)
    found = [os.path.join(parent, name) for name in _listdir(parent) if _STEP_NAME.fullmatch(name)]
    return sorted(found, key=_saved_at, reverse=True)


def _listdir(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except FileNotFoundError:
        return []


def _saved_at(directory: str) -> float:
    try:
        return float(_load_manifest(directory)["saved_at"])
    except (DamagedCheckpoint, KeyError, TypeError, ValueError, OverflowError):
        with contextlib.suppress(OSError):
            return os.stat(directory).st_mtime
        return 0.0


def step_directory(path: str, contents: dict) -> str:
    """The directory of the checkpoint whose state file `path` holds `contents`. Raises UserError where it is not there.

    `path` is the state file itself, a link to it, or the copy that stands in --output where there are no links.
    """
    directory = os.path.dirname(os.path.realpath(path))
    if os.path.basename(os.path.realpath(path)) == STATE_FILE:
        return directory
    directory = os.path.join(directory, str(contents.get("directory")))
    if not os.path.isfile(os.path.join(directory, STATE_FILE)):
        raise UserError(f"{path}: is a copy of a state file without its class centers; give the {STATE_FILE} of a directory below "
                        f"{STEPS_DIRECTORY}/, or the link {LATEST} beside that")
    if checksum(path) != checksum(os.path.join(directory, STATE_FILE)):
        raise UserError(f"{path}: is not the state of {directory}, beside which it lies; give {directory}/{STATE_FILE}")
    return directory


def _load_manifest(directory: str) -> dict:
    path = os.path.join(directory, MANIFEST_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path}: is missing") from None
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise DamagedCheckpoint(f"{path}: is damaged: not JSON") from None
    if not isinstance(manifest, dict):
        raise DamagedCheckpoint(f"{path}: is no manifest of a checkpoint")
    return manifest


def read_manifest(directory: str) -> dict[str, tuple[int, int]]:
    """{name: (bytes, CRC-32)} of a step's files, each of which is there in that size. Raises DamagedCheckpoint."""
    path = os.path.join(directory, MANIFEST_FILE)
    files = _load_manifest(directory).get("files")
    try:
        # A manifest is no more to be trusted than the rest: no name in it leads out of the directory.
        named = {str(name): (int(size), int(crc)) for name, (size, crc) in files.items()}
        well_formed = {STATE_FILE, f"{SHARDS_DIRECTORY}/.metadata"} <= named.keys() and all(map(_MANIFEST_NAMES.fullmatch, named))
    except (AttributeError, TypeError, ValueError, OverflowError):
        well_formed = False
    if not well_formed:
        raise DamagedCheckpoint(f"{path}: is no manifest of a checkpoint")
    for name, (size, _) in named.items():
        file = os.path.join(directory, name)
        try:
            found = os.stat(file).st_size
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{file}: is missing") from None
        if found != size:
            raise DamagedCheckpoint(f"{file}: is damaged: {found:,} bytes, where {size:,} were saved")
    return named


def check_files(directory: str, files: dict[str, tuple[int, int]]) -> None:
    """Read the files whole and compare. Raises DamagedCheckpoint."""
    for name, expected in files.items():
        path = os.path.join(directory, name)
        try:
            if checksum(path) != expected:
                raise DamagedCheckpoint(f"{path}: is damaged: its checksum is not that of what was saved")
        except OSError as error:
            raise DamagedCheckpoint(f"{path}: cannot be read: {error.strerror}") from None


def checksum(path: str) -> tuple[int, int]:
    """(bytes, CRC-32). CRC-32 finds damage, not malice: nothing in a checkpoint is ever run, whatever it says."""
    size = crc = 0
    buffer = bytearray(2**20)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            size, crc = size + count, zlib.crc32(memoryview(buffer)[:count], crc)
    return size, crc
