"""The lock of --output: one run at a time, also while the ranks of a killed parent are still ending."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from unittest import mock

import pytest

from utils import files
from utils.errors import UserError
from utils.files import lock_output, require_writable


def hold_the_lock(lock, pipe) -> None:
    pipe.send("started")
    pipe.recv()


def test_a_second_run_is_refused(tmp_path):
    first = lock_output(str(tmp_path))
    with pytest.raises(UserError, match=f"process {os.getpid()} on {socket.gethostname()} is writing there"):
        lock_output(str(tmp_path), patience=0.3)
    first.close()
    lock_output(str(tmp_path), patience=0).close()


def test_a_started_process_has_the_lock_too(tmp_path):
    """After the parent was killed its ranks, which may be saving, hold the lock until they end."""
    lock = lock_output(str(tmp_path))
    pipe, far_end = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=hold_the_lock, args=(lock, far_end))
    process.start()
    assert pipe.recv() == "started"
    lock.close()
    with pytest.raises(UserError, match="is writing there"):
        lock_output(str(tmp_path), patience=0)
    pipe.send("end")
    started = time.monotonic()
    lock_output(str(tmp_path), patience=30).close()  # waits for the process
    assert time.monotonic() - started < 25
    process.join()


def test_a_file_system_that_cannot_lock(tmp_path, capfd):
    with mock.patch.object(files.fcntl, "flock", side_effect=OSError(95, "Operation not supported")):
        assert lock_output(str(tmp_path)) is None
    assert "cannot be locked (Operation not supported)" in capfd.readouterr().err


def test_a_file_that_exists_or_is_read_is_not_replaced(tmp_path):
    source, output = tmp_path / "checkpoint", tmp_path / "output"
    source.write_text("x")
    require_writable("--output", str(output), force=False, inputs=[str(source)])
    output.write_text("y")
    with pytest.raises(UserError, match="--output .*output: exists.*--force"):
        require_writable("--output", str(output), force=False, inputs=[str(source)])
    require_writable("--output", str(output), force=True, inputs=[str(source), str(tmp_path / "missing")])
    for make in (lambda path: os.link(source, path), lambda path: path.symlink_to(source)):
        output.unlink()
        make(output)
        with pytest.raises(UserError, match="is the same file as .*checkpoint"):
            require_writable("--output", str(output), force=True, inputs=[str(source)])
    output.unlink()
    output.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="exists"):
        require_writable("--output", str(output), force=False)
