"""This process among all of the run: its rank, the world size and its device."""

from __future__ import annotations

import hashlib
import torch
from dataclasses import dataclass


@dataclass(frozen=True)
class DistContext:
    """This process among all: rank of world_size (W), and its device."""

    rank: int
    world_size: int
    processes_per_node: int
    device: torch.device

    @property
    def nodes(self) -> int:
        return self.world_size // self.processes_per_node

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that prints and writes."""
        return self.rank == 0


def seed_random_numbers(seed: int, micro_batch: int, context: DistContext) -> None:
    """Make what torch draws next a function of the run's seed, the micro-batch (counted over all steps) and the rank.

    The backbones draw nothing; one that does (dropout, say) sees the same in a resumed run, and there is no state to save.
    """
    digest = hashlib.blake2b(f"{seed} {micro_batch} {context.rank}".encode(), digest_size=8).digest()
    value = int.from_bytes(digest, "little") >> 1  # torch takes 63 bits
    torch.default_generator.manual_seed(value)
    if context.device.type == "cuda":
        torch.cuda.manual_seed(value)
