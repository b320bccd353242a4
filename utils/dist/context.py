"""This process among the ranks of the run: its rank, the world size, its device."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from utils.errors import UserError
from utils.flags import flag

DIST_TIMEOUT = 1800.0  # seconds; the default of --dist-timeout
MATMUL = ("tf32", "ieee")  # --matmul; the first is the default on GPUs

# The GPUs that this process may open. A container that was given none still sees /proc/driver/nvidia of its host.
_NVIDIA_DEVICES = "/dev/nvidia[0-9]*"
# The second and the third are older names of the first.
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


@dataclass(frozen=True, kw_only=True)
class MatmulFlag:
    """The flag of all programs that can run on a GPU: how it multiplies float32."""

    matmul: str | None = flag(
        "--matmul", choices=MATMUL, default_text="tf32", section="parallelism and precision",
        help="float32 matrix products and convolutions on GPUs; tf32: round the operands to 10 bits, which is several "
             "times faster; ieee: do not round them")


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

    For a GPU it also sets the allocator, if the environment does not. Raises UserError if the GPU that was asked for
    does not exist, and under "auto" if this machine has an NVIDIA GPU that PyTorch cannot use.
    """
    if name == "cpu":
        return torch.device("cpu")
    with warnings.catch_warnings():  # torch would print a warning of what the error below says
        warnings.simplefilter("ignore")
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        asked = f"--gpu {gpu}" if gpu is not None else f"--device {name}"
        found = _nvidia_gpu()
        if asked == "--device auto" and found is None:
            return torch.device("cpu")
        raise UserError(f"{asked}: " + (f"this machine has an NVIDIA GPU ({found}), but " if found else "")
                        + f"PyTorch sees no GPU ({_why_no_gpu()}); check nvidia-smi and CUDA_VISIBLE_DEVICES, see "
                        "which drivers PyTorch needs (README.md, Install), or use --device cpu")
    if gpu is not None and gpu >= gpus:
        raise UserError(f"--gpu {gpu}: the visible GPUs are 0 to {gpus - 1}")
    if not any(variable in os.environ for variable in _ALLOCATOR_VARIABLES):
        # The allocator can then join freed blocks of any sizes. It reads this when CUDA starts, here or in the ranks.
        os.environ[_ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"
    return torch.device("cuda" if gpu is None else f"cuda:{gpu}")


def _nvidia_gpu() -> str | None:
    """A file of the driver of an NVIDIA GPU that CUDA_VISIBLE_DEVICES does not hide. None without one."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() in ("", "-1"):
        return None
    return min(glob.glob(_NVIDIA_DEVICES), default=None)


def _why_no_gpu() -> str:
    """What torch says if it is asked for a GPU and finds none."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        text = " ".join(str(error).split())
        code = re.search(r"Error \d+: .*", text)  # of cudaGetDeviceCount, after a sentence that says less
        return code[0] if code else text.split(". ")[0]
    return "no reason given"


def check_gpus(indices: Iterable[int]) -> None:
    """Raise UserError if the installed PyTorch has no kernels for one of these GPUs, which the run will use.

    A GPU runs machine code (sm_XY) of its own major version X up to its minor version, and compiles PTX (compute_XY) of
    any version up to its own: "CUDA C++ Programming Guide", section Application Compatibility. sm_90a runs on 9.0 only.
    """
    built_for = [re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch) for arch in torch.cuda.get_arch_list()]
    codes = [(found[1], (int(found[2]), int(found[3])), found[4]) for found in built_for if found]
    for index in indices if codes else ():  # AMD's GPUs have other names
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own = torch.cuda.get_device_capability(index)
        if not any(own == version if letter == "a" else own >= version and (kind == "compute" or own[0] == version[0])
                   for kind, version, letter in codes):
            raise UserError(
                f"--device cuda: GPU {index} ({torch.cuda.get_device_name(index)}, compute capability {own[0]}.{own[1]}"
                f"): PyTorch {torch.__version__} has no kernels for it, only for "
                f"{', '.join(torch.cuda.get_arch_list())}; install another PyTorch (README.md, Install), choose other "
                "GPUs with CUDA_VISIBLE_DEVICES, or use --device cpu")


def choose_matmul(choice: str | None, device_type: str) -> str | None:
    """--matmul, or its default on GPUs; None on the CPU, where it has no effect. Raises UserError if it is given there.
    """
    if device_type != "cpu":
        return choice or MATMUL[0]
    if choice is not None:
        raise UserError(f"--matmul {choice}: is for GPUs, and this run is on the CPU; drop it")
    return None


def set_matmul(choice: str | None) -> None:
    """Set how this process multiplies float32 on GPUs, in cuBLAS and in cuDNN: "tf32" or "ieee". None: no change."""
    if choice is not None:
        # These names work in torch 2.11 to 2.14. torch raises an error where code reads them after `fp32_precision`
        # was set, and parts of torch.compile do.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = choice == "tf32"


def describe_gpu(device: torch.device) -> str:
    """The GPU's name, and how this process multiplies float32 there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rounded = torch.backends.cuda.matmul.allow_tf32
    return f"{torch.cuda.get_device_name(device)}, {MATMUL[not rounded]} products"


def seed_random_numbers(seed: int, micro_batch: int, context: DistContext) -> None:
    """Seed torch with the run's seed, the micro-batch (counted over all steps) and the rank.

    So a resumed run draws the same numbers (for dropout, say), and checkpoints need no generator state.
    """
    digest = hashlib.blake2b(f"{seed} {micro_batch} {context.rank}".encode(), digest_size=8).digest()
    value = int.from_bytes(digest, "little") >> 1  # torch takes 63 bits
    torch.default_generator.manual_seed(value)
    if context.device.type == "cuda":
        torch.cuda.manual_seed(value)
