"""Nodes with disks of their own: node 0's --output is the home of the checkpoints, and the others send and receive."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import format2
from helpers.commands import read_metrics
from helpers.saved import assert_same_training
from helpers.training import losses, train

from utils.checkpoint import reader, shards, transfer
from utils.checkpoint.layout import METADATA_FILE, DamagedCheckpoint, checksum
from utils.checkpoint.writer import CheckpointWriter
from utils.errors import UserError

FLAGS = ["-b", "8", "-j", "0", "--num-classes", "11", "--enable-model-parallel", "--seed", "1", "--epochs", "9",
         "--save-freq", "1", "--keep", "9", "--sync-bn", "--precision", "float64", "--enable-zero-optim"]


@contextlib.contextmanager
def small_pieces() -> Iterator[None]:
    """Even a few classes take several blocks, and a block several pieces."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(shards, "BLOCK_CLASSES", 2))
        for module, piece in ((transfer, 5000), (shards, 5000), (reader, 200_000)):
            stack.enter_context(mock.patch.object(module, "PIECE_BYTES", piece))
        yield


def attempt(rank: int, world_size: int, *argv: list[str]) -> str:
    """`train`, with the flags of each node. Returns the user's error, if any."""
    with small_pieces():
        try:
            train(rank, world_size, *argv)
        except UserError as error:
            return str(error)
    return ""


@pytest.fixture
def run_nodes(pools, faces):
    """`run_nodes(outputs, *flags)`: two processes per node, each node with its own {output}. Returns the error."""
    def run(outputs: list[Path], *flags: object, work=attempt) -> str:
        common = [str(faces), *FLAGS, "--output", "{output}", *map(str, flags)]
        errors = pools(2 * len(outputs)).run(
            work, *[[flag.format(output=output) for flag in common] for output in outputs])
        assert len(set(errors)) == 1, errors
        return errors[0]
    return run


def steps(output: Path) -> list[str]:
    return sorted(path.name for path in output.glob("checkpoints/*"))


@pytest.mark.slow
def test_nodes_with_disks_of_their_own(run_nodes, tmp_path):
    """They save the files, and continue with the bits, of nodes that share a disk. 11 classes: 3, 3, 3, 2; 6, 5."""
    shared, home, other = (tmp_path / name for name in ("shared", "home", "other"))
    other.write_text("not a directory, and none is needed")
    assert run_nodes([shared, shared], "--max-steps", 6) == run_nodes([home, other], "--max-steps", 2) == ""
    assert other.is_file()
    files = [sorted((output / "checkpoints/step-00000002/shards").iterdir()) for output in (shared, home)]
    assert [file.name for file in files[0]] == [".metadata", *(f"__{rank}_0.distcp" for rank in range(4))]
    for one, two in zip(*files, strict=True):
        assert one.read_bytes() == two.read_bytes(), one

    path = "{output}/checkpoint.pth.tar"
    assert run_nodes([home, other], "--resume", path, "--max-steps", 3) == ""  # there is nothing on node 1
    # What is at the path on node 1 is read only if it is node 0's: this is a copy, and damaged.
    other.unlink()
    shutil.copytree(home, other, symlinks=True)
    for shard in other.glob("checkpoints/*/shards/*.distcp"):
        shard.write_bytes(bytes(shard.stat().st_size))
    before = sorted(other.rglob("*"))
    assert run_nodes([home, other], "--resume", "auto", "--max-steps", 4) == ""
    assert losses(home) == losses(shared)[:4]
    assert run_nodes([home], "--resume", path, "--max-steps", 5, "-b", 16) == ""
    assert run_nodes([home, other], "--resume", path, "--max-steps", 6) == ""
    assert_same_training(home, shared, tolerance=1e-9)
    assert sorted(other.rglob("*")) == before
    # A run whose home is elsewhere does not start anew in silence.
    error = run_nodes([tmp_path / "new", home], "--resume", "auto")
    assert re.search("--resume auto: node 0 has no checkpoint .*node 1 has checkpoints/step-00000006/.*--rank 0", error)


def test_damage_and_a_directory_that_cannot_be_renamed(run_nodes, tmp_path):
    home, other = tmp_path / "home", tmp_path / "other"
    assert run_nodes([home, other], "--max-steps", 2) == ""
    shard = home / "checkpoints/step-00000002/shards/__3_0.distcp"
    shard.write_bytes(bytes(shard.stat().st_size))
    error = run_nodes([home, other], "--resume", "auto", work=attempt_without_renames)
    assert str(shard) in error and "cannot be renamed" in error and "Read-only" in error
    assert run_nodes([home, other], "--resume", "auto", "--max-steps", 2) == ""
    assert steps(home) == ["step-00000001", "step-00000002", "step-00000002.damaged"]
    assert len(read_metrics(home)) == 2 and not other.exists()


def attempt_without_renames(rank: int, world_size: int, *argv: list[str]) -> str:
    with mock.patch.object(os, "rename", side_effect=OSError(errno.EROFS, "Read-only file system")):
        return attempt(rank, world_size, *argv)


def attempt_with_an_error(rank: int, world_size: int, where: str, *argv: list[str]) -> list[str | None]:
    """At step 2 rank 0's disk is full after a piece from another node, or rank 1 cannot send all pieces.

    Returns why each save but the last failed.
    """
    write, pieces, original, failures = shards.write_pieces, shards.pieces, CheckpointWriter.save, []

    def save(self, *args, **kwargs) -> float:
        self.wait()
        failures.append(self._failure)
        return original(self, *args, **kwargs)

    def full_after(data: Iterator[memoryview]) -> Iterator[memoryview]:
        yield next(data)
        raise OSError(errno.ENOSPC, "No space left on device")

    def write_limited(directory: str, of_rank: int, data: Iterator[memoryview]) -> bool:
        full = where == "receiver" and len(failures) == 2 and of_rank != rank
        return write(directory, of_rank, full_after(data) if full else data)

    def limited_pieces(*args) -> Iterator[memoryview]:
        data = pieces(*args)
        return full_after(data) if where == "sender" and len(failures) == 2 and rank == 1 else data

    with (small_pieces(), mock.patch.object(CheckpointWriter, "save", save),
          mock.patch.multiple(shards, write_pieces=write_limited, pieces=limited_pieces)):
        train(rank, world_size, *argv)
    return failures[1:]


@pytest.mark.parametrize(("where", "failed"), [("receiver", 0), ("sender", 1)])
def test_an_error_in_a_transfer_gives_up_this_save_on_all_ranks(pools, faces, tmp_path, where, failed):
    """Three nodes of one process: rank 0 receives from two. Training continues, and the next save works."""
    flags = [[str(faces), *FLAGS, "--max-steps", "3", "-b", "4", "--output", str(tmp_path / name)]
             for name in "abc"]
    message = f"No space left on device, on rank {failed}"
    assert pools(3).run(attempt_with_an_error, where, *flags) == [[None, message]] * 3
    assert steps(tmp_path / "a") == ["step-00000001", "step-00000003"] and os.listdir(tmp_path) == ["a"]
    assert len(read_metrics(tmp_path / "a")) == 3


def resume_format_2(rank: int, world_size: int, output: str) -> None:
    path = "/nowhere/state.pth.tar" if rank else str(format2.STATE)
    format2.train(rank, world_size, ["--resume", path, "--output", output, "-b", "4"], nodes=2)


def test_a_checkpoint_of_format_2_that_only_node_0_has(pools, tmp_path):
    pools(2).run(resume_format_2, str(tmp_path))
    assert [line["loss"] for line in read_metrics(tmp_path)] == pytest.approx(format2.LOSSES[3:], rel=1e-9)


def test_rows_are_floating_point_numbers(tmp_path):
    """Integers in a forged shard would be copied as if they were values."""
    (tmp_path / "shards").mkdir()
    for dtype in (torch.float64, torch.int64):
        tensors, blocks = {"centers": torch.ones(3, 2, dtype=dtype)}, []
        assert shards.write_pieces(str(tmp_path), 0, shards.pieces(0, tensors, 0, blocks))
        shards.write_metadata(str(tmp_path), {"centers": torch.ones(3, 2)}, blocks)
        files = {name: checksum(str(tmp_path / name)) for name in (METADATA_FILE, shards.shard_name(0))}
        rows = shards.open_shards(str(tmp_path), ["centers"], (3, 2), files)["centers"]
        if dtype.is_floating_point:
            assert [block.tolist() for _, block in rows.blocks()] == [torch.ones(3, 2).tolist()]
        else:
            with pytest.raises(DamagedCheckpoint, match="floating point"):
                list(rows.blocks())


def attempt_with_a_bad_disk(rank: int, world_size: int, *argv: list[str]) -> str:
    with mock.patch.object(transfer, "read_bytes", side_effect=OSError(errno.EIO, "Input/output error")):
        return attempt(rank, world_size, *argv)


def test_a_file_that_cannot_be_sent_is_one_line(run_nodes, tmp_path):
    home, other = tmp_path / "a", tmp_path / "b"
    home.mkdir()
    assert run_nodes([home, other], "--max-steps", 1) == ""
    error = run_nodes([home, other], "--max-steps", 2, "--resume", "auto", work=attempt_with_a_bad_disk)
    assert error.startswith("--resume auto: cannot be read: Input/output error, on rank")
