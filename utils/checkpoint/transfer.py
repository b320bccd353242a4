"""Checkpoints of nodes with disks of their own: bytes between node 0 and ranks that do not see its directory.

The rank that needs bytes asks for them, a few MiB at a time, and another rank answers. A rank that cannot go on, with a
full disk for example, says that it is done. So an error leaves no rank waiting, and no message that the next exchange
could take for its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from utils.checkpoint.layout import Files

# Bytes per answer when a file is copied, so what both sides hold of it.
PIECE_BYTES = 4 * 2**20

_DONE, _FAILED = -1, -1  # in place of the first number of a request, and of the length of an answer

ReadBytes = Callable[[str, int, int], "bytes | memoryview"]  # (file of a checkpoint, offset, length) -> its bytes


class PeerFailed(Exception):
    """The rank that was asked has failed. It reports the cause itself."""


@dataclass(frozen=True)
class Exchange:
    """Who sends to whom: a rank that does not see a directory of rank 0 has a partner on node 0 that does.

    seen: by rank, whether it sees the directory. Rank 0 does.
    group: of gloo, with all ranks.
    """

    rank: int
    processes_per_node: int
    seen: Sequence[bool]
    group: Any

    @property
    def partner(self) -> int | None:
        """The rank through which this one reaches the directory; None if it sees it."""
        return self._partner_of(self.rank)

    @property
    def clients(self) -> list[int]:
        """The ranks that reach the directory through this one."""
        return [rank for rank in range(len(self.seen)) if self._partner_of(rank) == self.rank]

    def _partner_of(self, rank: int) -> int | None:
        local_rank = rank % self.processes_per_node
        return None if self.seen[rank] else local_rank if self.seen[local_rank] else 0

    def send_files(self, directory: str, files: Files, use: Callable[[ReadBytes], None]) -> None:
        """Collective over the group. use(read) on each rank that does not see the directory, while its partner answers.

        files: the checkpoint's, the same on every rank. Raises OSError, and what use() raises.
        """
        names = sorted(files)
        if self.partner is not None:
            with Asking(self.partner, self.group) as asking:
                use(lambda name, offset, length: asking.ask(length, names.index(name), offset))
        failures = []
        for client in self.clients:  # all of them, because each one waits
            try:
                answer(client, self.group, lambda number, offset, length: bytearray(
                    read_bytes(directory, names[number], offset, length)))
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]


class Asking:
    """Ask rank `rank` for bytes while it is in `answer`. Leaving the block tells it that this rank is done."""

    def __init__(self, rank: int, group: Any) -> None:
        self._rank, self._group = rank, group

    def __enter__(self) -> Asking:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self._send(_DONE, 0, 0)

    def ask(self, length: int, number: int = 0, offset: int = 0) -> memoryview:
        """What the other rank's function returns for (number, offset, length): at most `length` bytes.

        Raises PeerFailed if the function failed.
        """
        # Allocated before the other rank sends: without memory for the answer this rank must not ask.
        size, buffer = torch.empty(1, dtype=torch.int64), torch.empty(length, dtype=torch.uint8)
        self._send(number, offset, length)
        dist.recv(size, self._rank, group=self._group)
        if int(size) == _FAILED:
            raise PeerFailed(f"rank {self._rank} failed")
        if int(size):
            dist.recv(buffer[:int(size)], self._rank, group=self._group)
        return buffer[:int(size)].numpy().data

    def pieces(self) -> Iterator[memoryview]:
        """What the other rank's function returns, one call after another, until it returns nothing."""
        while piece := self.ask(PIECE_BYTES):
            yield piece

    def _send(self, *numbers: int) -> None:
        dist.send(torch.tensor(numbers, dtype=torch.int64), self._rank, group=self._group)


def answer(client: int, group: Any, function: Callable[[int, int, int], bytearray | memoryview]) -> None:
    """Send rank `client` what function(number, offset, length) returns for its requests, until it is done.

    Raises what the function raised, after the client is done.
    """
    request, failure = torch.empty(3, dtype=torch.int64), None
    while True:
        dist.recv(request, client, group=group)
        number, offset, length = request.tolist()
        if number == _DONE:
            break
        data: bytearray | memoryview = bytearray()
        try:
            data = function(number, offset, length)
        except Exception as error:
            failure = error
        dist.send(torch.tensor([_FAILED if failure else len(data)]), client, group=group)
        if data and not failure:
            dist.send(torch.frombuffer(data, dtype=torch.uint8), client, group=group)
    if failure:
        raise failure


def read_bytes(directory: str, name: str, offset: int, length: int) -> bytes:
    """Bytes of a file in the directory, fewer at its end. Raises OSError."""
    with open(os.path.join(directory, name), "rb") as file:
        file.seek(offset)
        return file.read(length)
