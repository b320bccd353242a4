"""The lock of --output: one run at a time, also while the ranks of a killed parent are still ending."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import socket
import time
from unittest import mock

import pytest

from utils import files
from utils.errors import UserError
from utils.files import LogFile, atomic_write, lock_output, require_directory, require_writable


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


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_the_lock_touches_no_other_file(tmp_path, kind):
    """Whoever may write to the directory could otherwise have any file of the run's user truncated."""
    (tmp_path / "precious").write_text("content")
    if kind == "link":
        (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    else:
        os.mkfifo(tmp_path / ".lock")
    with pytest.raises(UserError, match="--output .*cannot open .*[.]lock"):
        lock_output(str(tmp_path), patience=0)
    assert (tmp_path / "precious").read_text() == "content"


class full_disk:
    """No file grows beyond `size` bytes."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __enter__(self) -> None:
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._size, self._before[1]))

    def __exit__(self, *error: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)


def test_a_log_on_a_full_disk_warns_once_and_loses_nothing(tmp_path):
    said: list[str] = []
    log = LogFile(str(tmp_path / "log"), said.append)
    with full_disk(10):
        for number in range(4):
            log.write(b"line %d\n" % number)
    assert (tmp_path / "log").read_bytes() == b"line 0\nlin"  # a part of a line fitted
    assert len(said) == 1 and "cannot be written (File too large)" in said[0]
    log.write(b"line 4\n")
    log.close()
    assert (tmp_path / "log").read_text() == "".join(f"line {number}\n" for number in range(5))


def test_a_log_whose_directory_is_removed_begins_again(tmp_path):
    said: list[str] = []
    log = LogFile(str(tmp_path / "logs" / "log"), said.append)
    log.write(b"1\n")
    shutil.rmtree(tmp_path / "logs")
    log.write(b"2\n")
    assert (tmp_path / "logs" / "log").read_text() == "2\n"
    shutil.rmtree(tmp_path / "logs")
    (tmp_path / "logs").write_text("in the way")
    log.write(b"3\n")
    assert len(said) == 1 and "training continues" in said[0]


def test_a_log_does_not_follow_a_link(tmp_path):
    said: list[str] = []
    (tmp_path / "precious").write_text("content")
    (tmp_path / "log").symlink_to(tmp_path / "precious")
    LogFile(str(tmp_path / "log"), said.append).write(b"1")
    assert (tmp_path / "precious").read_text() == "content" and len(said) == 1


def test_a_full_disk_is_found_at_the_start(tmp_path):
    with full_disk(0), pytest.raises(UserError, match="--output .*: cannot be written"):
        require_directory("--output", str(tmp_path))


def test_what_killed_writers_left_is_removed_after_a_day(tmp_path):
    names = {"file.0123abcd.part": 2, "file.4567abcd.part": 0, "file.part": 2, "other.0123abcd.part": 2}
    for name, days in names.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - days * 86400 - 60,) * 2)
    with atomic_write(str(tmp_path / "file")) as file:
        file.write(b"new")
    assert sorted(os.listdir(tmp_path)) == ["file", *sorted(names)[1:]]
