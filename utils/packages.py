"""Whether this interpreter can run the program. It needs no package, and older versions of Python can read it."""

from __future__ import annotations

import glob
import importlib
import importlib.util
import os
import sys
from collections.abc import Collection
from typing import NoReturn

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PYTHON = (3, 10)
PACKAGES = ("torch", "torchvision", "torchshard", "numpy", "PIL", "tqdm")  # what requirements.txt calls PIL is pillow
TORCH = (2, 11)  # as in requirements.txt


def require_packages(packages: Collection[str] = PACKAGES) -> None:
    """End the program with one line and status 2 if a package is missing, torch is broken, or it or Python is too old.

    Programs call this before they import a package.
    """
    install = f"{sys.executable} -m pip install -r {os.path.join(ROOT, 'requirements.txt')}"
    if sys.version_info < PYTHON:
        _end(f"{sys.executable} is Python {sys.version_info[0]}.{sys.version_info[1]}; "
             f"{_other_interpreter() or 'use Python 3.10 or newer'}")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        _end(f"{sys.executable} has no {', '.join(missing)}; {_other_interpreter() or 'install them: ' + install}")
    if "torch" in packages:  # Every program that lists it imports it. The others may not be needed.
        try:
            version = importlib.import_module("torch").__version__
            old = tuple(map(int, version.split(".")[:2])) < TORCH
        except Exception as error:  # ImportError, OSError for a missing library, or what a damaged file raises
            _end(f"torch of {sys.executable} cannot be imported ({' '.join(str(error).split())[:200]}); "
                 f"{_other_interpreter() or 'install it again: ' + install}")
        if old:
            _end(f"{sys.executable} has torch {version}; {_other_interpreter() or 'install a newer one: ' + install}")


def _other_interpreter() -> str | None:
    """Advice to use the environment that scripts/setup.sh has made, if it is there and has torch."""
    venv = os.path.abspath(os.path.join(ROOT, os.environ.get("ARCFACE_VENV") or ".venv"))
    python = os.path.join(venv, "bin", "python3")
    is_other = venv != os.path.abspath(sys.prefix) and os.access(python, os.X_OK)
    installed = glob.glob(os.path.join(glob.escape(venv), "lib", "python3*", "site-packages", "torch"))
    return f"use {python}, which has the packages" if is_other and installed else None


def _end(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
