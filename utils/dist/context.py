"""This process among the ranks of the run: its rank, the world size, its device."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from utils.errors import UserError

DIST_TIMEOUT = 1800.0  # seconds; the default of --dist-timeout


@dataclass(frozen=True)
class DistContext:
    """This process: rank `rank` of `world_size` (W), and its device."""

    rank: int
    world_size: int
    processes_per_node: int
    device: torch.device

    @property
    def nodes(self) -> int:
        return self.world_size // self.processes_per_node

    @property
    def is_main(self) -> bool:
        """Rank 0, which prints and writes."""
        return self.rank == 0


def choose_device(name: str, gpu: int | None = None) -> torch.device:
    """The device for --device auto|cuda|cpu and, if given, --gpu: "auto" is a GPU if there is one.

    Raises UserError if the GPU that was asked for does not exist.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or name == "auto" and gpu is None and not gpus:
        return torch.device("cpu")
    if not gpus:
        flag = "--device cuda" if name == "cuda" else f"--gpu {gpu}"
        raise UserError(f"{flag}: PyTorch sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu")
    if gpu is not None and gpu >= gpus:
        raise UserError(f"--gpu {gpu}: the visible GPUs are 0 to {gpus - 1}")
    return torch.device("cuda" if gpu is None else f"cuda:{gpu}")


def seed_random_numbers(seed: int, micro_batch: int, context: DistContext) -> None:
    """Seed torch with the run's seed, the micro-batch (counted over all steps) and the rank.

    So a resumed run draws the same numbers (for dropout, say), and checkpoints need no generator state.
    """
    digest = hashlib.blake2b(f"{seed} {micro_batch} {context.rank}".encode(), digest_size=8).digest()
    value = int.from_bytes(digest, "little") >> 1  # torch takes 63 bits
    torch.default_generator.manual_seed(value)
    if context.device.type == "cuda":
        torch.cuda.manual_seed(value)
