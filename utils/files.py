"""One run at a time writes to --output."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
import time
from multiprocessing import reduction

from utils.errors import UserError

LOCK_FILE = ".lock"


# A predecessor that was killed is gone at once, one that only lost its parent after a second or two, the processes that load
# its images after five.
PATIENCE = 20.0


class OutputLock:
    """Held as long as any process lives that has it: sent to a process that is being started, it is the same lock there.

    So a run whose parent was killed keeps the directory until the last of its ranks, which may be saving, has ended too.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __reduce__(self) -> tuple:
        return _inherit, (reduction.DupFd(self._descriptor),)

    def release(self) -> None:
        os.close(self._descriptor)


def _inherit(sent) -> OutputLock:
    return OutputLock(sent.detach())


def lock_output(output: str, patience: float = PATIENCE) -> OutputLock | None:
    """Take the lock of the directory, waiting a little for a predecessor that is ending. Raises UserError naming its owner.

    None, and a warning, where the file system cannot lock.
    """
    path = os.path.join(output, LOCK_FILE)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"--output {output}: {path} cannot be opened ({error.strerror}); give another directory") from None
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EINTR):
                print(f"warning: --output {output}: cannot be locked ({error.strerror}); make sure that no other run writes there",
                      file=sys.stderr, flush=True)
                os.close(descriptor)
                return None
        if time.monotonic() > deadline:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another run"
            os.close(descriptor)
            raise UserError(f"--output {output}: {owner} is writing there; wait for it or stop it, or give another directory")
        time.sleep(0.2)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return OutputLock(descriptor)


def move_aside(path: str) -> None:
    """Rename an older file, link or directory to path.1, path.2, ..."""
    if os.path.lexists(path):
        number = 1
        while os.path.lexists(f"{path}.{number}"):
            number += 1
        os.rename(path, f"{path}.{number}")
