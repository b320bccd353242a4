"""Run the project's programs as a user does."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent.parent


def start(*command: object, cwd: Path | None = None, **environment: str) -> subprocess.Popen:
    """Start `python3 <command>`, where "main.py" means ROOT/main.py. stdout and stderr come in one stream."""
    program, *arguments = map(str, command)
    variables = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "CI")}
    return subprocess.Popen(
        [sys.executable, str(ROOT / program), *arguments], cwd=cwd or ROOT, env={**variables, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL,
    )


def finish(process: subprocess.Popen, status: int = 0, timeout: float = 900) -> str:
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(f"no end within {timeout} s:\n{output}") from None
    assert process.returncode == status, f"exit status {process.returncode}, not {status}:\n{output}"
    return output


def run(*command: object, status: int = 0, cwd: Path | None = None, **environment: str) -> str:
    return finish(start(*command, cwd=cwd, **environment), status)


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still waiting after {seconds} s"
        time.sleep(0.02)


def load_script(name: str) -> ModuleType:
    """scripts/<name>.py as a module, to test its functions without starting it."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def read_metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
