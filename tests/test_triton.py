"""The Triton kernels: compiled here for GPUs that are not here, and run by Triton's interpreter against float64."""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from losses.class_major import _ClassMajor, margin_softmax_class_major
from losses.margins import ArcFace
from utils.operators import OperatorCounter
from utils.training.optim import RowSGD

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter is on in this process", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from losses import triton_kernels as kernels  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Compute capability -> shared memory that a program may have, bytes (CUDA C++ Programming Guide, technical
# specifications), and the instruction of its tensor cores in PTX.
CHIPS = {80: (163 * 1024, "mma.sync"), 90: (227 * 1024, "wgmma.mma_async"), 100: (227 * 1024, "tcgen05.mma")}
POINTERS = {
    "operand": {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"},
    "E": {"bf16": "*bf16", "fp16": "*fp32", "fp32": "*fp32"},
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PLAIN = dict(HAS_LEFT_OUT=False, HAS_MAP=False, HAS_FILTER=False, HAS_SHIFT=False)
# Each with all that a run may ask for, and without: the others lie between.
VARIANTS = {
    "forward": dict(LARGEST=False, SUMS=True, STORE=True, HAS_ENTRY=False),
    "nothing saved": dict(LARGEST=False, SUMS=True, STORE=False, HAS_ENTRY=False),
    "backward": dict(LARGEST=False, SUMS=False, STORE=True, HAS_ENTRY=True),
    "largest": dict(LARGEST=True, SUMS=False, STORE=False, HAS_ENTRY=False),
}
CASES = [*itertools.product(DTYPES, VARIANTS, [True]), *itertools.product(["bf16"], VARIANTS, [False])]
IEEE_CASES = [("fp32", variant, True, "ieee") for variant in VARIANTS]


def compiled(kernel, capability: int, signature: dict[str, str], options: dict, directory: Path,
             stack: int = 0) -> str:
    """The PTX of a kernel that needs no local memory but `stack` bytes, and no more shared memory than there is."""
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(kernel.arg_names)
               if signature.get(name, "").startswith("*") or name == "STRIDE"}
    source = ASTSource(fn=kernel, signature={**signature, **dict.fromkeys(options, "constexpr")},
                       constexprs={(kernel.arg_names.index(name),): value for name, value in options.items()},
                       attrs=aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
    path = directory / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", path], capture_output=True, text=True,
                           check=True).stdout
    # REG:..., STACK:0 and LOCAL:0: nothing was spilled.
    found = [int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)]
    assert found[0] <= stack and found[1:] == [0], (usage, options)
    assert binary.metadata.shared <= CHIPS[capability][0], options
    return binary.asm["ptx"]


@pytest.mark.slow
@pytest.mark.parametrize("capability", CHIPS)
def test_products_use_tensor_cores_and_no_local_memory(tmp_path, capability):
    for operands, variant, everything, precision in [*((*case, "tf32") for case in CASES), *IEEE_CASES]:
        of_operand, of_e = (POINTERS[name][operands] for name in ("operand", "E"))
        signature = dict(OPERAND=of_operand, X=of_operand, COLUMN="*i64", BAR="*fp32", SUM="*fp32", NOT_CLOSER="*i32",
                         E=of_e, LEFT_OUT="*u8", THRESHOLD="*fp32", MAP="*fp32", TARGET_ENTRY="*fp32", SHIFT="*fp32",
                         N="i32", STRIDE="i32", K="i32", scale="fp32", highest="fp32")
        options = {**VARIANTS[variant], **dict.fromkeys(PLAIN, everything), "INTERPRET": False,
                   **kernels.tile_options(512, DTYPES[operands], capability), "PRECISION": precision}
        # Without tensor cores up to 32 bytes of a thread are spilled. These kernels are for accuracy.
        code = compiled(kernels.exponentials_kernel, capability, signature, options, tmp_path,
                        stack=0 if precision == "tf32" else 32)
        # --matmul ieee: no tensor core multiplies float32.
        assert (CHIPS[capability][1] in code) == (precision == "tf32"), (operands, variant, everything)


@pytest.mark.parametrize("capability", CHIPS)
def test_the_other_kernels_use_no_local_memory(tmp_path, capability):
    for out, known in itertools.product(POINTERS["operand"].values(), (False, True)):
        compiled(kernels.scale_kernel, capability, dict(W="*fp32", FACTOR="*fp32", OUT=out, K="i32", scale="fp32"),
                 {"KNOWN": known, "INTERPRET": False, **kernels.row_options(512)}, tmp_path)
    for step, momentum, finite in ((False, False, False), *itertools.product([True], (False, True), (False, True))):
        compiled(kernels.gradient_kernel, capability,
                 dict(G="*fp32", W="*fp32", FACTOR="*fp32", UNIT="*fp32", M="*fp32", FINITE="*u8", K="i32",
                      **dict.fromkeys(("scale", "lr", "momentum", "weight_decay"), "fp32")),
                 {"STEP": step, "HAS_MOMENTUM": momentum, "HAS_FINITE": finite, **kernels.row_options(512)}, tmp_path)


@pytest.mark.slow
def test_interpreted_kernels_equal_float64():
    """In a process of its own: Triton reads the variable when it is imported."""
    script = Path(__file__).parent / "helpers" / "interpreted.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "",
                   "PYTHONPATH": os.pathsep.join(sys.path)}
    finished = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr


class Launches(TorchDispatchMode):
    """Counts operators that launch work on a GPU: all but those that only make views or memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._schema.name.partition("::")[2]
        if not operator.is_view and name not in ("device", "empty", "empty_like", "new_empty", "detach", "lift_fresh"):
            self.names[name] += 1
        if name == "_fused_sgd_":  # fake tensors do not know it
            return None
        return operator(*args, **(kwargs or {}))


# A million classes, 1,024 rows, bf16 operands.
@pytest.mark.parametrize(("with_kernels", "saved_probs_mib", "update", "limit"), [
    (True, 1e6, False, 300), (True, 1e6, True, 300), (True, 0, True, 330), (False, 1e6, True, 1070),
    (False, 0, True, 1410),
])
def test_launches_of_a_step(with_kernels, saved_probs_mib, update, limit):
    with FakeTensorMode():
        embedding = torch.empty(1024, 512, device="cuda", requires_grad=True)
        weight = nn.Parameter(torch.empty(1_000_000, 512, device="cuda"))
        target = torch.zeros(1024, dtype=torch.int64, device="cuda")
        rows = RowSGD(weight, skip_nonfinite=True, lr=0.1, momentum=0.9).update_rows if update else None
        with Launches() as launches:
            loss, _ = margin_softmax_class_major(
                embedding, target, weight, ArcFace(), scale=64.0, group=None, matmul_dtype=torch.bfloat16,
                saved_probs_mib=saved_probs_mib, update=rows, triton=with_kernels)
            # torch's engine would look for the GPU.
            _ClassMajor.backward(loss.grad_fn, torch.ones_like(loss), None)
    assert 100 < sum(launches.names.values()) <= limit, launches.names
    assert launches.names["exponentials"] == (31 if saved_probs_mib else 62) * with_kernels
    assert launches.names["sgd"] == 31 * (with_kernels and update)


def test_bytes_that_are_counted():
    """What the kernels read and write, each once: utils/step_time.py rests on it."""
    rows, classes, d = 1024, 4096, 512
    with FakeTensorMode(), OperatorCounter() as counter:
        empty = functools.partial(torch.empty, device="cuda")
        grad, centers, momentum = (empty(classes, d) for _ in range(3))
        operand, embedding, probs = (empty(*shape, dtype=torch.bfloat16) for shape in (
            (classes, d), (rows, d), (classes, rows)))
        factor, column, bar, one = empty(classes), empty(rows, dtype=torch.int64), empty(rows), empty(())
        counter.take()
        torch.ops.arcface.scale(centers, factor, operand, 64.0, False)
        torch.ops.arcface.exponentials(operand, embedding, column, bar, None, None, probs, *[None] * 5, 64.0, None)
        projection = kernels.Projection(factor, one, 64.0)
        projection.project(grad, centers)
        projection.sgd(grad, centers, momentum, one > 0, lr=0.1, momentum=0.9, weight_decay=0.0)
        counted = counter.take()
    matrix, of_rows = 4 * classes * d, rows * (8 + 4)
    for name, size in {"scale": 1.5 * matrix, "exponentials": matrix / 2 + 2 * classes * rows + 2 * rows * d + of_rows,
                       "project": 3 * matrix, "sgd": 5 * matrix}.items():
        assert 0 <= counted.bytes[name] - size <= 8 * classes + 16, name
    assert counted.flops == {"scale": 0, "exponentials": 2 * rows * classes * d, "project": 0, "gt": 0, "sgd": 0}


def test_a_new_learning_rate_compiles_nothing():
    """Nor do other settings of the optimizer, or a last chunk of another size."""
    kernel = kernels.gradient_kernel
    backend = make_backend(GPUTarget("cuda", 90, 32))
    specialize = create_function_from_signature(kernel.signature, kernel.params, backend)

    def key(classes: int, *settings: float) -> str:
        _, specialization, _ = specialize(*[torch.empty(16)] * 6, classes, 64.0, *settings, STEP=True,
                                          HAS_MOMENTUM=True, HAS_FINITE=True, **kernels.row_options(512))
        return str(specialization)

    assert len({key(32_768, 0.1, 0.9, 5e-4), key(577, 1.0, 0.5, 0.0), key(1, 0.0, 0.9, 1e-4)}) == 1
