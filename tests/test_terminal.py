"""Output that cannot be written: no traceback, and the run continues."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import ROOT

PROGRAM = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from utils.errors import exit_on_user_error

def main():
    for number in range(5000):
        print("caf\\udce9 \\xd7", number)
        print("problem", number, file=sys.stderr)
    with open(sys.argv[1], "a") as file:
        print("went on", file.fileno() > 2, file=file)
    if sys.argv[2:]:
        sys.exit(75)

exit_on_user_error(main)
"""


def run(tmp_path: Path, redirect: str, *arguments: str, **environment: str) -> tuple[int, str, str]:
    """Run PROGRAM in bash with these redirections or pipes: (its status, what came out, what it wrote to its file)."""
    command = f'"$@" {redirect}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", command, "bash", sys.executable, "-c", PROGRAM, str(tmp_path / "file"), *arguments],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        env={**os.environ, **environment}, timeout=60, preexec_fn=lambda: signal.signal(signal.SIGPIPE, signal.SIG_DFL))
    return done.returncode, done.stdout, (tmp_path / "file").read_text()


@pytest.mark.parametrize("redirect", ["| head -1", "2>&1 | head -1", ">&-", "2>&- >/dev/null", "<&- >&- 2>&-",
                                      ">/dev/full 2>/dev/full"])
def test_a_run_goes_on_without_its_output(tmp_path, redirect):
    status, output, file = run(tmp_path, redirect, "a run has a status of its own")
    assert status == 75 and file == "went on True\n"
    assert "Traceback" not in output and "Exception" not in output
    assert output.count("warning: stdout: cannot be written (Broken pipe)") == (redirect == "| head -1")


def test_a_result_that_was_not_written_is_an_error(tmp_path):
    assert run(tmp_path, "| head -1 >/dev/null")[0] == 0  # the reader had what it wanted
    status, output, _ = run(tmp_path, ">/dev/full")
    assert status == 2 and output.endswith(
        "error: stdout: cannot be written (No space left on device); what was printed is incomplete\n")


@pytest.mark.parametrize(("encoding", "shown"), [
    ("ascii", "caf\\udce9 \\xd7 0"), ("latin-1", "caf\\udce9 \ufffd 0"), ("utf-8", "caf\\udce9 \xd7 0")])
def test_characters_that_the_terminal_lacks(tmp_path, encoding, shown):
    status, output, _ = run(tmp_path, "| head -1", PYTHONIOENCODING=encoding)
    assert status == 0 and shown in output.splitlines()
