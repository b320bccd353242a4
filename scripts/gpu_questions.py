#!/usr/bin/env python3
"""A question about a machine with a GPU, answered as rows of JSON. scripts/gpu_check.sh asks all of them.

    python3 scripts/gpu_questions.py classifier --out DIR

Each question is one process, so that one that fails, or hangs, leaves the others. Its rows are appended to
DIR/rows.jsonl, an object a line. A row has the machine, the versions and the date; the question and the case; and what
was found. "ok": false says that the machine or the code failed in this case, and then the exit status is 1.

--dry-run asks on the CPU, with sizes that only show that the code runs. Its figures mean nothing.
"""

from __future__ import annotations

import datetime
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# The script's own directory is on sys.path, the repository's root is not.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

if __name__ == "__main__":
    from utils.packages import require_packages

    require_packages(["torch", "numpy"])

import numpy as np
import torch
from torch import nn

from scripts.gpu_report import ROWS_FILE, read_rows
from utils.dist.context import check_gpus, choose_device, set_matmul
from utils.errors import UserError, exit_on_user_error
from utils.flags import flag, parse_flags
from utils.launch.fingerprint import program_fingerprint

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MIB = 2**20

# What all questions need but for `machine`, beside torch and numpy.
PACKAGES = ("torchshard", "torchvision", "PIL", "tqdm")
# question -> the module that has a function of this name, and packages without which it is left out.
QUESTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "machine": ("gpu_questions", ()),
    "predict": ("gpu_predict", PACKAGES),
    "kernels": ("gpu_classifier", (*PACKAGES, "triton")),
    "modes": ("gpu_training", PACKAGES),
    "classifier": ("gpu_classifier", PACKAGES),
    "step": ("gpu_training", PACKAGES),
    "largest": ("gpu_training", PACKAGES),
    "profile": ("gpu_training", PACKAGES),
    "memory": ("gpu_training", PACKAGES),
    "backbone": ("gpu_training", PACKAGES),
    "tiles": ("gpu_classifier", (*PACKAGES, "triton")),
    "resume": ("gpu_training", (*PACKAGES, "tensorboard")),
    "save": ("gpu_training", PACKAGES),
    "tests": ("gpu_questions", (*PACKAGES, "pytest")),
    "compile": ("gpu_training", PACKAGES),
    "two": ("gpu_training", PACKAGES),
}


@dataclass(frozen=True)
class Sizes:
    """How large the questions are. The defaults are for an H100 or H200; rows say where memory was too small."""

    classes: tuple[int, ...] = (1_000_000, 125_000, 4_000_000)  # the first one is that of the acceptance figure
    rows: int = 1024  # N of the classifier
    size: int = 512  # d of the classifier
    precisions: tuple[str, ...] = ("bf16", "tf32", "float32")
    chunks: tuple[int, ...] = (8_192, 16_384, 65_536, 131_072)
    repeats: int = 5
    checked_classes: int = 50_000  # against float64
    checked_rows: int = 256
    product: int = 8192  # side of the matrices whose products give the rates
    copied: int = 2**30  # bytes
    arch: str = "iresnet50"
    images: tuple[int, ...] = (256, 64, 16)
    step_classes: int = 85_744
    step_images: int = 256
    steps: int = 12
    saved_classes: int = 1_000_000
    wanted_classes: int = 30_000_000  # the acceptance figure of one H200
    wanted_gib: float = 130.0  # of the memory of a GPU that it is asked of
    largest_images: int = 64
    face_identities: int = 64
    faces: int = 32  # of each
    resume_arch: str = "iresnet50"
    resume_images: int = 64
    resume_steps: int = 12


DRY_SIZES = Sizes(
    classes=(90, 100), precisions=("bf16", "float32"), rows=16, size=32, chunks=(60,), repeats=1,
    checked_classes=100, checked_rows=16, product=64, copied=2**20, arch="mobilefacenet", images=(8, 4),
    step_classes=50, step_images=4, steps=1, saved_classes=200, wanted_classes=1000, largest_images=4,
    face_identities=4, faces=4, resume_arch="mobilefacenet", resume_images=4, resume_steps=4)


@dataclass(frozen=True)
class Options:
    """The command line."""

    question: str = flag("question", default="", metavar="QUESTION", choices=QUESTIONS, help="what to find out")
    out: str = flag("--out", default=".", metavar="DIR", help=f"directory of {ROWS_FILE}, which is appended to")
    dry_run: bool = flag("--dry-run", default=False, help="on the CPU, with tiny sizes")


@dataclass
class Check:
    """What a question needs: where to compute, how large, and where the rows go."""

    question: str
    out: str
    dry_run: bool
    device: torch.device
    common: dict[str, Any] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)  # of `machine`: who used the GPU

    @property
    def sizes(self) -> Sizes:
        return DRY_SIZES if self.dry_run else Sizes()

    def add(self, case: str, **values: Any) -> None:
        """Append a row, in one write, and print it without what all rows share."""
        row = {"question": self.question, "case": case, **values, **self.common}
        row = json.loads(json.dumps(row), parse_constant=str)  # JSON has no NaN
        with open(os.path.join(self.out, ROWS_FILE), "ab", buffering=0) as file:
            file.write((json.dumps(row) + "\n").encode())
        print(f"{self.question}: {case}: " + ", ".join(f"{name} {_text(value)}" for name, value in values.items()),
              flush=True)

    def failed(self) -> list[str]:
        """The cases that failed in this run, also those whose rows another of its processes added."""
        rows, _ = read_rows(self.out)
        return [case for (question, case), row in rows.items() if question == self.question
                and row.get("ok") is False and row.get("date") == self.common["date"]]

    def seconds(self, work: Callable[[], object], repeats: int | None = None) -> float:
        """The median time of `work`, after a first call that compiles and chooses. In a dry run that of one call."""
        if not self.dry_run:
            work()
        times = []
        for _ in range(repeats or self.sizes.repeats):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - start)
        return float(np.median(times))

    def bandwidth(self) -> float:
        """Bytes a second of the device's memory, in a large copy: those read and those written."""
        source = torch.ones(self.sizes.copied, dtype=torch.uint8, device=self.device)
        return 2 * source.nbytes / self.seconds(functools.partial(torch.empty_like(source).copy_, source))

    def wait(self) -> None:
        """For the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    options = parse_flags(Options, "gpu_questions.py", "A question about a machine with a GPU.")
    if not options.question:
        raise UserError(f"no question: give one of {', '.join(QUESTIONS)}")
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # the kernels run on the CPU
    module, needed = QUESTIONS[options.question]
    on_cpu = options.dry_run or options.question == "predict"
    check = Check(options.question, options.out, options.dry_run, choose_device("cpu" if on_cpu else "cuda"))
    if options.question == "machine" and not on_cpu:
        # Before this process has a context. A container may not show the processes of others, only their memory.
        check.before = {"used_before": nvidia_smi("--query-gpu=memory.used"),
                        "other_processes": nvidia_smi("--query-compute-apps=pid,used_memory").splitlines()}
    check.common = describe(check)
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        check.add("all", left_out=f"{', '.join(missing)} is missing")
        return
    set_matmul(None if on_cpu else "tf32")
    getattr(importlib.import_module(f"scripts.{module}"), options.question)(check)
    if failed := check.failed():
        print(f"failed: {', '.join(failed)}", file=sys.stderr, flush=True)
        sys.exit(1)


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def describe(check: Check) -> dict[str, Any]:
    """What all rows say of the machine and the software."""
    on_gpu = check.device.type == "cuda"
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU ({platform.machine()})",
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()) if on_gpu else None,
        "driver": driver_version() if on_gpu else None,
        "torch": torch.__version__, "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None, "cudnn": cudnn,
        "triton": version_of("triton"), "commit": commit(), "program": program_fingerprint(), "dry_run": check.dry_run,
    }


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver_version() -> str | None:
    """Of NVIDIA's kernel module, or as nvidia-smi says it."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", file.read())
    except OSError:
        found = None
    return found[0] if found else nvidia_smi("--query-gpu=driver_version") or None


def nvidia_smi(query: str) -> str:
    """What it prints, without units, or "" where it is missing or fails."""
    try:
        return subprocess.run(["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True, text=True,
                              timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def commit() -> str | None:
    """The repository's commit, with a + if files have changed since."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, timeout=10,
                              check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def machine(check: Check) -> None:
    """Versions, architectures, other processes on the GPU, and the rates that the time model assumes."""
    device, on_gpu = check.device, check.device.type == "cuda"
    packages = {name: version_of(name) for name in (
        "numpy", "torchvision", "torchshard", "pillow", "tqdm", "tensorboard", "pytest", "timm")}
    architectures = torch.cuda.get_arch_list() if on_gpu else []
    supported = True
    try:
        check_gpus(range(torch.cuda.device_count()) if on_gpu else ())
    except UserError as error:
        supported = False
        print(error)
    check.add("software", ok=supported, architectures=architectures, gpus=torch.cuda.device_count(),
              python=platform.python_version(), cores=len(os.sched_getaffinity(0)), packages=packages)
    if on_gpu:
        torch.zeros(1, device=device)
        free, total = torch.cuda.mem_get_info()
        check.add("memory", total_mib=total / MIB, used_with_this_process_mib=(total - free) / MIB, **check.before)
    side = check.sizes.product
    for name, matmul, dtype in (("float32", "ieee", torch.float32), ("tf32", "tf32", torch.float32),
                                ("bf16", "tf32", torch.bfloat16), ("fp16", "tf32", torch.float16)):
        set_matmul(matmul if on_gpu else None)
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds = check.seconds(functools.partial(torch.mm, a, b, out=out))
        check.add(f"product {name}", tflops=2 * side**3 / seconds / 1e12)
    set_matmul("tf32" if on_gpu else None)
    channels, images = (256, 128) if not check.dry_run else (8, 2)  # of IResNet-50's stage with most blocks
    for name, dtype in (("tf32", torch.float32), ("bf16", torch.bfloat16)):
        layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False, device=device).to(dtype)
        layer = layer.to(memory_format=torch.channels_last)
        x = torch.randn(images, channels, 14, 14, device=device).to(dtype, memory_format=torch.channels_last)
        with torch.no_grad():
            torch.backends.cudnn.benchmark = True
            seconds = check.seconds(functools.partial(layer, x))
        check.add(f"convolution {name}", tflops=2 * 9 * channels**2 * images * 14**2 / seconds / 1e12)
    check.add("copy", gbs=check.bandwidth() / 1e9)
    small = torch.zeros(16, device=device)

    def launches() -> None:
        for _ in range(1000):
            small.add_(1.0)

    check.add("launch", us=check.seconds(launches) * 1e3)


def tests(check: Check) -> None:
    """tests/test_cuda.py in this process, but for the tests that start programs: `modes` and `resume` ask that."""
    import pytest

    outcomes: dict[str, int] = {}

    class Count:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.skipped or report.failed:
                outcomes[report.outcome] = outcomes.get(report.outcome, 0) + 1

    os.environ["ARCFACE_TEST_CUDA"] = "" if check.dry_run else "1"
    status = pytest.main(["-q", "-p", "no:cacheprovider", os.path.join(ROOT, "tests", "test_cuda.py"), "-k",
                          "not training", "--maxfail=5"], plugins=[Count()])
    check.add("tests/test_cuda.py", ok=status == 0, **outcomes)


if __name__ == "__main__":
    from scripts import gpu_questions  # so that the questions' modules and this program share one copy of it

    exit_on_user_error(gpu_questions.main)
