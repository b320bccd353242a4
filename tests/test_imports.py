"""Imports go one way: a file imports from its own room and from rooms below it, never from one above or beside it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the bottom up. The rooms of a line do not know one another.
FLOORS = [
    ["utils/errors", "utils/packages"],
    ["utils/files", "utils/flags", "utils/memory", "utils/operators", "utils/rates", "utils/signals"],
    ["utils/dist"],
    ["data", "losses", "utils/launch"],
    ["models", "utils/evaluation"],
    ["utils/training"],
    ["utils/checkpoint"],
    ["utils/options"],
    ["utils/build", "utils/planner"],
    ["utils/preflight", "utils/step_time"],
    ["main", "valid"],
    ["scripts"],
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = [path for path in sorted(ROOT.glob("**/*.py")) if path.relative_to(ROOT).parts[0] in
         ("data", "losses", "models", "utils", "scripts", "main.py", "valid.py")]


def room_of(path: str) -> str | None:
    """The room of a file or module, written with slashes; None for a package that is not ours, and for utils itself."""
    return next((room for room in FLOOR_OF if path == room or path.startswith(room + "/")), None)


def imported(tree: ast.AST) -> set[str]:
    """All modules that a file imports anywhere in it, written with slashes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, "relative imports hide the room"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.replace(".", "/") for name in found}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    name = str(path.relative_to(ROOT).with_suffix(""))
    own = room_of(name)
    if name == "utils/__init__":
        assert not path.read_text()
        return
    assert own is not None, f"{name}: belongs to no room; name it in FLOORS"
    for module in imported(ast.parse(path.read_text())):
        other = room_of(module)
        assert other in (None, own) or FLOOR_OF[other] < FLOOR_OF[own], f"{name} imports {module}, not from below"


def test_torchshard_has_one_door():
    importers = [path.name for path in FILES
                 if any(name.split("/")[0] == "torchshard" for name in imported(ast.parse(path.read_text())))]
    assert importers == ["sharding.py"]


def test_only_programs_start_processes():
    """utils/launch knows a plan of processes, not what they are for."""
    for path in FILES:
        if any(name.startswith("utils/launch") for name in imported(ast.parse(path.read_text()))):
            assert path.parts[-2] in ("launch", "scripts") or path.name in (
                "main.py", "valid.py", "preflight.py", "options.py"), path
