"""An interpreter that cannot run the program: one line that says what to do, from every program."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from helpers.commands import ROOT

from utils import packages

PROGRAMS = [path for path in [*ROOT.glob("*.py"), *sorted(ROOT.glob("scripts/*.py"))]
            if '__name__ == "__main__"' in path.read_text()]


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A virtual environment without packages."""
    directory = tmp_path_factory.mktemp("bare")
    venv.create(directory, symlinks=True)
    return directory / "bin" / "python3"


def answer(python: Path, program: Path = ROOT / "main.py", **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    ended = subprocess.run([python, program, "--help"], capture_output=True, text=True,
                           env={**clean, "ARCFACE_VENV": "/nowhere", **environment})
    assert ended.returncode == 2 and ended.stderr.startswith(f"error: {python} ") or "torch of" in ended.stderr, ended
    assert ended.stderr.count("\n") == 1 and not ended.stdout
    return ended.stderr


@pytest.mark.parametrize("program", [path for path in PROGRAMS if path.name != "gpu_report.py"],  # it needs none
                         ids=lambda path: path.name)
def test_every_program_says_how_to_install_what_it_needs(bare, program):
    assert "no " in (line := answer(bare, program)) and "numpy" in line
    assert f"{bare} -m pip install -r {ROOT}/requirements.txt" in line


def test_another_interpreter_that_has_the_packages_is_named(bare, tmp_path):
    (tmp_path / "lib" / "python3.12" / "site-packages" / "torch").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(sys.executable)
    line = answer(bare, ARCFACE_VENV=str(tmp_path))
    assert f"use {tmp_path}/bin/python3, which has the packages" in line and "pip" not in line


def test_a_torch_that_is_old_or_broken(bare, tmp_path):
    for name in [*packages.PACKAGES, "tensorboard"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise OSError('libcudart.so: no such file')")
    line = answer(bare, PYTHONPATH=str(tmp_path))
    assert "torch of" in line and "libcudart.so: no such file" in line and "pip install" in line
    (tmp_path / "torch" / "__init__.py").write_text("__version__ = '2.4.1+cpu'")
    assert "has torch 2.4.1" in answer(bare, PYTHONPATH=str(tmp_path))


def test_an_old_python(monkeypatch, capsys):
    for path in [*PROGRAMS, Path(packages.__file__)]:
        ast.parse(path.read_text(), feature_version=(3, 8))  # it must be able to read what says that it is too old
    monkeypatch.setattr(packages.sys, "version_info", (3, 8, 10))
    with pytest.raises(SystemExit) as ended:
        packages.require_packages()
    assert ended.value.code == 2 and "is Python 3.8; use" in capsys.readouterr().err
