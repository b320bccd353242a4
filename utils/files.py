"""Files that are whole or absent, and one run at a time in a directory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import io
import itertools
import os
import secrets
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import BinaryIO

from utils.errors import UserError

# A directory stays locked as long as a process lives that has its lock, also one that received it at its start: a run
# whose parent was killed keeps the directory until the last of its ranks, which may be saving, has ended. Connection is
# multiprocessing's owner of a file descriptor, of any kind, which can be sent.
OutputLock = Connection

_OLD_SECONDS = 24 * 3600  # no process still writes to a temporary file that has not changed for so long
_MOST_WAITING = 2**24  # bytes that a LogFile keeps in memory while they cannot be written


@contextlib.contextmanager
def atomic_write(path: str) -> Iterator[BinaryIO]:
    """A file that replaces `path`, flushed to the disk, when the block ends; after an error nothing changes.

    Removes what processes that were killed here have left for a day. Raises OSError.
    """
    for old in glob.glob(f"{glob.escape(path)}.{'[0-9a-f]' * 8}.part"):
        with contextlib.suppress(OSError):
            if time.time() - os.lstat(old).st_mtime > _OLD_SECONDS:
                os.unlink(old)
    temporary = f"{path}.{secrets.token_hex(4)}.part"
    try:
        with open(temporary, "xb") as file:
            yield file
            flush(file)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def open_bounded(path: str, at_most: int) -> BinaryIO:
    """Open a file of up to `at_most` bytes for reading. Raises OSError, also for a larger one, and as open_regular."""
    file = open_regular(path)
    if (size := os.fstat(file.fileno()).st_size) > at_most:
        file.close()
        raise OSError(errno.EFBIG, f"has {size:,} bytes, and should have {at_most:,} at most", path)
    return file


def flush(file: BinaryIO) -> None:
    """Have what was written on the disk when this returns. Raises OSError."""
    file.flush()
    os.fsync(file.fileno())


def flush_directory(path: str) -> None:
    """Have the names that were created or renamed in a directory on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that need no such thing refuse it
            raise
    finally:
        os.close(descriptor)


def open_regular(path: str) -> BinaryIO:
    """Open a file for reading. Raises OSError, also for a directory, a device and a pipe, which may never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe does not block
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "Is a directory", path)
    raise OSError(errno.EINVAL, "is a device or a pipe, not a file", path)


def file_states(directory: str, prefix: str) -> dict[bytes, tuple[int, int]]:
    """{name: (bytes, time of the last change in ns)} of the files in a directory: an image that is replaced, or written
    over, has another state.

    prefix: of the error. Raises UserError.
    """
    try:
        with os.scandir(os.fsencode(directory)) as entries:
            return {entry.name: (state.st_size, state.st_mtime_ns) for entry in entries
                    if (state := _state(entry)) is not None}
    except OSError as error:
        raise UserError(f"{prefix}: {directory}: cannot be read ({error.strerror})") from None


def _state(entry: os.DirEntry[bytes]) -> os.stat_result | None:
    try:
        return entry.stat()
    except FileNotFoundError:  # a link that leads nowhere
        return None


def move_aside(path: str) -> str | None:
    """Rename an older file, link or directory to path.1, path.2, ... Returns its new name, or None without one."""
    if not os.path.lexists(path):
        return None
    name = next(name for number in itertools.count(1) if not os.path.lexists(name := f"{path}.{number}"))
    os.rename(path, name)
    return name


class LogFile:
    """A file that is appended to, for what a run reports: it never raises, because a log must not end the run.

    What cannot be written waits in memory for the next `write`, up to a limit. The first error is said. A file that was
    removed is created again.
    """

    def __init__(self, path: str, say: Callable[[str], None]) -> None:
        self._path, self._say, self._failed = path, say, False
        self._file: io.FileIO | None = None
        self._waiting = bytearray()
        self.write(b"")

    def write(self, data: bytes) -> None:
        if len(self._waiting) + len(data) <= _MOST_WAITING:
            self._waiting += data
        try:
            if self._file is not None and os.fstat(self._file.fileno()).st_nlink == 0:
                self.close()
            if self._file is None:
                os.makedirs(os.path.dirname(self._path), exist_ok=True)
                # No link: others may write to the directory, and a link would let them choose the file.
                self._file = io.FileIO(self._path, "a", opener=lambda path, flags: os.open(
                    path, flags | os.O_NOFOLLOW, 0o666))
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
        except OSError as error:
            if not self._failed:
                self._failed = True
                self._say(f"warning: {self._path}: cannot be written ({error.strerror}); training continues")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def require_directory(flag: str, path: str) -> None:
    """Create the directory if need be. Raises UserError unless files can be written there: found before the work."""
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(bytes(4096))  # an empty file finds room on a full disk too
            flush(probe)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written ({error.strerror}); give another directory") from None


def require_writable(flag: str, path: str, *, force: bool, inputs: Iterable[str] = ()) -> None:
    """Raises UserError unless the file of `flag` can be written: found before the work, not after it.

    An existing file needs `force`. None of `inputs`, whatever its name or link, is ever replaced.
    """
    directory = os.path.dirname(os.path.abspath(path))
    if os.path.exists(path) and not os.path.isfile(path):  # a device as well: it would be replaced
        raise UserError(f"{flag} {path}: is not a file; give the name of one")
    for name in inputs if os.path.exists(path) else ():
        if os.path.exists(name) and os.path.samefile(name, path):
            raise UserError(f"{flag} {path}: is the same file as {name}, which is read; give another name")
    if not force and os.path.lexists(path):
        raise UserError(f"{flag} {path}: exists; give another name, or --force to replace it")
    if not os.path.isdir(directory) or not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path}: there is no directory {directory}, or it is not writable")


def lock_output(output: str, patience: float = 20) -> OutputLock | None:
    """Lock the directory. Waits `patience` seconds for a predecessor that is ending: its image loading processes take
    five. Raises UserError that names the owner. Returns None, with a warning, where the file system cannot lock.
    """
    deadline = time.monotonic() + patience
    path = os.path.join(output, ".lock")
    try:
        # O_NOFOLLOW: the file is truncated below, and a link would let whoever may write here choose another one.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is not a file")
    except OSError as error:
        reason = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise UserError(f"--output {output}: cannot open {path} ({reason}); remove it, or give another directory"
                        ) from None
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another run"
                os.close(descriptor)
                raise UserError(f"--output {output}: {owner} is writing there; wait for it or stop it, or give another "
                                "directory") from None
            time.sleep(0.2)
        except OSError as error:
            print(f"warning: --output {output}: cannot be locked ({error.strerror}); make sure that no other run "
                  "writes there", file=sys.stderr, flush=True)
            os.close(descriptor)
            return None
    with contextlib.suppress(OSError):  # a disk that has just become full: only the owner's name is missing
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return Connection(descriptor)
