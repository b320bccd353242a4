"""The shell scripts: which interpreter they choose, and that a clone of any configuration can run them."""

from __future__ import annotations

import os
import subprocess

import pytest
from helpers.commands import ROOT

SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in [*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"])


def fake_python(directory, words: str) -> str:
    (directory / "bin").mkdir(parents=True)
    (directory / "bin" / "python3").write_text(f"#!/bin/sh\necho {words} \"$@\"\n")
    (directory / "bin" / "python3").chmod(0o755)
    return str(directory / "bin")


@pytest.mark.parametrize(("script", "arguments"), [("train_single_node.sh", []), ("train_multi_node.sh", ["0"])])
def test_launch_scripts_choose_the_interpreter(tmp_path, script, arguments):
    path = f"{fake_python(tmp_path / 'system', 'system')}:{os.environ['PATH']}"
    fake_python(tmp_path / "own", "own")
    clean = {name: value for name, value in os.environ.items()
             if name not in ("VIRTUAL_ENV", "CONDA_DEFAULT_ENV", "PYTHON", "ARCFACE_VENV")}

    def chosen(**environment: str) -> str:
        output = subprocess.run(["bash", f"scripts/{script}", *arguments, "--more"], cwd=ROOT, check=True, text=True,
                                capture_output=True, env={**clean, "PATH": path, "DATA": "faces", **environment}).stdout
        assert " main.py " in output and output.endswith(" --more\n")
        return output.split()[0]

    assert chosen(ARCFACE_VENV=str(tmp_path / "nothing")) == "system"
    assert chosen(ARCFACE_VENV=str(tmp_path / "own")) == "own"
    assert chosen(ARCFACE_VENV=str(tmp_path / "own"), CONDA_DEFAULT_ENV="base") == "own"
    # An active environment comes first: its python3 is the one on PATH.
    assert chosen(ARCFACE_VENV=str(tmp_path / "own"), VIRTUAL_ENV="/anywhere") == "system"
    assert chosen(ARCFACE_VENV=str(tmp_path / "own"), PYTHON=str(tmp_path / "system" / "bin" / "python3")) == "system"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_scripts_survive_a_clone_that_converts_line_ends(tmp_path):
    clone = ["git", "-c", "core.autocrlf=true", "clone", "--quiet", "--depth", "1", f"file://{ROOT}",
             str(tmp_path / "clone")]
    if subprocess.run(clone, capture_output=True).returncode:
        pytest.skip("git cannot clone this checkout")
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", str(tmp_path / "clone" / script)], check=True)
    fixture = "tests/data/format-2/step-00000003/manifest.json"
    assert (tmp_path / "clone" / fixture).read_bytes() == (ROOT / fixture).read_bytes()
