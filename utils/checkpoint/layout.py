"""The files of a run's checkpoints: names, commit, links, pruning, checksums. Nothing here is collective.

    <--output>/
        checkpoint.pth.tar -> checkpoints/step-00000020/state.pth.tar
        model_best.pth.tar -> checkpoints/step-00000010/state.pth.tar
        checkpoints/
            step-00000010/
                state.pth.tar    everything that is replicated; rank 0 writes it
                shards/          class centers and their optimizer state; each rank writes its own classes
                manifest.json    when the checkpoint was saved; size and CRC-32 of every other file
            step-00000020/
            step-00000030.part/  a save in progress, or an interrupted one, which the next save removes

A save writes and flushes a .part directory, then renames it. The rename is the commit; a committed checkpoint never
changes. Renames also switch the two links, so they always point to a complete checkpoint. File systems without
symbolic links get copies instead.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
import time
import zlib
from typing import Any

from utils.checkpoint.safe_load import read_torch_file
from utils.errors import UserError
from utils.files import atomic_write, flush, flush_directory, move_aside

LATEST, BEST = "checkpoint.pth.tar", "model_best.pth.tar"
STEPS_DIRECTORY = "checkpoints"
STATE_FILE, SHARDS_DIRECTORY, MANIFEST_FILE = "state.pth.tar", "shards", "manifest.json"
METADATA_FILE = f"{SHARDS_DIRECTORY}/.metadata"

# step-00000010.1 is a second save of step 10, after the first was damaged or belonged to an older run.
_STEP_NAME = re.compile(r"step-\d{8,}(\.\d+)?")
_UNFINISHED = ".part"
_MANIFEST_NAMES = re.compile(rf"{re.escape(STATE_FILE)}|{SHARDS_DIRECTORY}/\.?\w[\w.]*")

Files = dict[str, tuple[int, int]]  # {path relative to the step's directory: (bytes, CRC-32)}


class DamagedCheckpoint(UserError):
    """A checkpoint differs from what was saved. The message names the file."""


# ---------------------------------------------------------------------------------------------------------------------
# Writing: one process of the run


def begin(output: str, step: int) -> str:
    """Remove the remains of interrupted saves, then create and return the directory of a new one. Raises OSError."""
    remove_unfinished(output)
    parent = os.path.join(output, STEPS_DIRECTORY)
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


def remove_unfinished(output: str) -> None:
    """Remove the remains of interrupted saves and removals.

    Errors are ignored, since the next save tries again: NFS keeps a directory while a process has one of its files
    open.
    """
    for directory in glob.glob(os.path.join(glob.escape(output), STEPS_DIRECTORY, "*" + _UNFINISHED)):
        shutil.rmtree(directory, ignore_errors=True)
    for link in (LATEST, BEST):
        for path in glob.glob(os.path.join(glob.escape(output), f"{link}*{_UNFINISHED}")):
            os.unlink(path)


def move_damaged_aside(directory: str) -> str:
    """Rename a step's directory to step-X.damaged, which `newest_first` and pruning ignore. Returns the new name."""
    target = directory + ".damaged"
    move_aside(target)
    os.rename(directory, target)
    return target


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
        if isinstance(contents, dict) and isinstance(contents.get("directory"), str):
            return os.path.basename(contents["directory"])
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Reading: any process


def newest_first(output: str) -> list[str]:
    """The directories of all committed checkpoints, the last one saved first."""
    parent = os.path.join(output, STEPS_DIRECTORY)
    names = os.listdir(parent) if os.path.isdir(parent) else []
    found = [os.path.join(parent, name) for name in names if _STEP_NAME.fullmatch(name)]
    return sorted(found, key=_saved_at, reverse=True)


def _saved_at(directory: str) -> float:
    try:
        return float(_load_manifest(directory)["saved_at"])
    except (DamagedCheckpoint, KeyError, TypeError, ValueError, OverflowError):
        with contextlib.suppress(OSError):
            return os.stat(directory).st_mtime
        return 0.0


def step_directory(path: str, contents: dict) -> str:
    """The checkpoint's directory, given a state file and its contents. Raises UserError if it cannot be found.

    Args:
        path: the state file itself, a link to it, or a copy of it in --output.
    """
    directory = os.path.dirname(os.path.realpath(path))
    if os.path.basename(os.path.realpath(path)) == STATE_FILE:
        return directory
    directory = os.path.join(directory, str(contents.get("directory")))
    if not os.path.isfile(os.path.join(directory, STATE_FILE)):
        raise UserError(f"{path}: is a copy of a state file without its class centers; give the {STATE_FILE} in a "
                        "directory "
                        f"below {STEPS_DIRECTORY}/, or the link {LATEST} beside {STEPS_DIRECTORY}/")
    if checksum(path) != checksum(os.path.join(directory, STATE_FILE)):
        raise UserError(f"{path}: differs from the state file in {directory}, which it names; give "
                        f"{directory}/{STATE_FILE}")
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
        raise DamagedCheckpoint(f"{path}: is not the manifest of a checkpoint")
    return manifest


def read_manifest(directory: str) -> Files:
    """The files of a checkpoint, after checking that each exists with the right size. Raises DamagedCheckpoint."""
    entries: Any = _load_manifest(directory).get("files")
    try:
        # The manifest is not trusted either: no name in it may lead out of the directory.
        files = {str(name): (int(size), int(crc)) for name, (size, crc) in entries.items()}
        well_formed = {STATE_FILE, METADATA_FILE} <= files.keys() and all(map(_MANIFEST_NAMES.fullmatch, files))
    except (AttributeError, TypeError, ValueError, OverflowError):
        well_formed = False
    if not well_formed:
        raise DamagedCheckpoint(f"{os.path.join(directory, MANIFEST_FILE)}: is not the manifest of a checkpoint")
    for name, (size, _) in files.items():
        path = os.path.join(directory, name)
        try:
            found = os.stat(path).st_size
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{path}: is missing") from None
        if found != size:
            raise DamagedCheckpoint(f"{path}: is damaged: it has {found:,} bytes instead of {size:,}")
    return files


def check_files(directory: str, files: Files) -> None:
    """Read the files and compare their checksums. Raises DamagedCheckpoint."""
    for name, expected in files.items():
        path = os.path.join(directory, name)
        try:
            if checksum(path) != expected:
                raise DamagedCheckpoint(f"{path}: is damaged: its checksum differs from the manifest's")
        except OSError as error:
            raise DamagedCheckpoint(f"{path}: cannot be read: {error.strerror}") from None


def checksum(path: str) -> tuple[int, int]:
    """(bytes, CRC-32) of a file. CRC-32 detects damage, not malice: no reader executes anything in a checkpoint."""
    size = crc = 0
    buffer = bytearray(2**20)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            size, crc = size + count, zlib.crc32(memoryview(buffer)[:count], crc)
    return size, crc
