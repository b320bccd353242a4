"""The hash that nodes compare: it covers every file of the program, in sub-packages at any depth too."""

from __future__ import annotations

from pathlib import Path

import pytest

from utils.launch import fingerprint
from utils.launch.fingerprint import program_fingerprint


def test_every_file_of_the_program_counts_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = ("main.py", "valid.py", "data/a.py", "losses/b.py", "models/c.py", "utils/launch/fingerprint.py",
               "utils/deep/deeper/deepest/d.py")
    for name in (*program, "tests/test_e.py", "scripts/f.py", "utils/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(fingerprint, "__file__", str(tmp_path / "utils/launch/fingerprint.py"))
    before = program_fingerprint()
    for name in ("tests/test_e.py", "scripts/f.py", "utils/notes.txt"):
        (tmp_path / name).write_text("2")
        assert program_fingerprint() == before
    for name in program:
        (tmp_path / name).write_text("2")
        assert program_fingerprint() != before, name
        before = program_fingerprint()
