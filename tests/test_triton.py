"""The Triton kernels: compiled here for GPUs that are not here, and run by Triton's interpreter against float64."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter is on in this process", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from losses import triton_kernels as kernels  # noqa: E402

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Compute capability -> shared memory that a program may have, bytes (CUDA C++ Programming Guide, technical
# specifications), and the instructions of its tensor cores.
CHIPS = {80: (163 * 1024, "HMMA"), 90: (227 * 1024, "HGMMA"), 100: (227 * 1024, r"UTC\w*MMA")}
POINTERS = {
    "operand": {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"},
    "E": {"bf16": "*bf16", "fp16": "*fp32", "fp32": "*fp32"},
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FORWARD, BACKWARD = dict(SUMS=True, STORE=True, HAS_ENTRY=False), dict(SUMS=False, STORE=True, HAS_ENTRY=True)
PLAIN = dict(HAS_LEFT_OUT=False, HAS_MAP=False, HAS_FILTER=False)
# Of a Boolean variant those with everything and with nothing; the others lie between.
VARIANTS = {
    "forward": {**FORWARD, **PLAIN}, "forward, nothing saved": {**FORWARD, **PLAIN, "STORE": False},
    "backward": {**BACKWARD, **PLAIN},
    "forward, everything": {**FORWARD, **dict.fromkeys(PLAIN, True)},
    "backward, everything": {**BACKWARD, **dict.fromkeys(PLAIN, True)},
}


def compiled(kernel, capability: int, signature: dict[str, str], options: dict, directory: Path) -> tuple[str, int]:
    """The machine code of a kernel, as text, and the bytes of shared memory of a program."""
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(kernel.arg_names)
               if signature.get(name, "").startswith("*")}
    source = ASTSource(fn=kernel, signature={**signature, **dict.fromkeys(options, "constexpr")},
                       constexprs={(kernel.arg_names.index(name),): value for name, value in options.items()},
                       attrs=aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
    path = directory / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    usage, code = (subprocess.run([BIN / name, *flags, path], capture_output=True, text=True, check=True).stdout
                   for name, flags in (("cuobjdump", ["--dump-resource-usage"]), ("nvdisasm", [])))
    # REG:..., STACK:0 and LOCAL:0: nothing was spilled.
    assert re.findall(r"(?:STACK|LOCAL):(\d+)", usage) == ["0", "0"], usage
    assert not re.search(r"\b(STL|LDL)\b", code)
    return code, binary.metadata.shared


@pytest.mark.parametrize("capability", CHIPS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("operands", DTYPES)
def test_products_use_tensor_cores_and_no_local_memory(tmp_path, operands, variant, capability):
    of_operand, of_e = (POINTERS[name][operands] for name in ("operand", "E"))
    signature = dict(OPERAND=of_operand, X=of_operand, COLUMN="*i64", BAR="*fp32", SUM="*fp32", NOT_CLOSER="*i32",
                     E=of_e, LEFT_OUT="*u8", THRESHOLD="*fp32", MAP="*fp32", TARGET_ENTRY="*fp32", N="i32", K="i32",
                     scale="fp32", shift="fp32", highest="fp32")
    options = {**VARIANTS[variant], **kernels.tile_options(512, DTYPES[operands]), "INTERPRET": False,
               "PRECISION": "tf32"}
    code, shared = compiled(kernels.exponentials_kernel, capability, signature, options, tmp_path)
    limit, instruction = CHIPS[capability]
    assert re.search(rf"\b{instruction}\b", code) and shared <= limit
