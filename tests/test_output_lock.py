"""One run at a time in --output: also while the ranks of a run whose parent is gone are still ending."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from unittest import mock

import pytest

from utils import files
from utils.errors import UserError
from utils.files import lock_output


def hold_until_told(lock, pipe) -> None:
    pipe.send("started")
    pipe.recv()


def test_a_second_run_is_told_who_writes(tmp_path):
    first = lock_output(str(tmp_path))
    with pytest.raises(UserError, match=f"process {os.getpid()} on {socket.gethostname()} is writing there"):
        lock_output(str(tmp_path), patience=0.3)
    first.release()
    lock_output(str(tmp_path), patience=0).release()


def test_a_started_process_has_the_lock_too(tmp_path):
    """Of a killed parent the lock is gone, of its ranks, which may be saving, not before they have ended."""
    lock = lock_output(str(tmp_path))
    pipe, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=hold_until_told, args=(lock, theirs))
    process.start()
    assert pipe.recv() == "started"
    lock.release()
    with pytest.raises(UserError, match="is writing there"):
        lock_output(str(tmp_path), patience=0)
    pipe.send("end")
    started = time.monotonic()
    lock_output(str(tmp_path), patience=30).release()  # waits for it
    assert time.monotonic() - started < 25
    process.join()


def test_a_file_system_that_cannot_lock(tmp_path, capfd):
    with mock.patch.object(files.fcntl, "flock", side_effect=OSError(95, "Operation not supported")):
        assert lock_output(str(tmp_path)) is None
    assert "cannot be locked (Operation not supported)" in capfd.readouterr().err
