"""Write a checkpoint in the formats of other programs.

    python3 scripts/export.py --resume checkpoint.pth.tar --format torchshard  --output exported.pth.tar
    python3 scripts/export.py --resume checkpoint.pth.tar --format insightface --output backbone.pth
    python3 scripts/export.py --resume checkpoint.pth.tar --format onnx        --output backbone.onnx
    python3 scripts/export.py --resume checkpoint.pth.tar --format safetensors --output backbone.safetensors [--centers]

The network's input is RGB, (n, 3, 112, 112), (value / 255 - 0.5) / 0.5 = (value - 127.5) / 127.5. Only ir* networks in
the insightface format take BGR, because other programs expect it of a bare state dict with these names. The output
(n, d) is not L2-normalized: compare embeddings by their cosine. Weights are written in float32.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

# Python puts the script's own directory on sys.path, not the repository's root.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

if __name__ == "__main__":
    from utils.packages import require_packages

    require_packages()

import numpy as np
import torch
from torch import Tensor, nn

from data.decode import IMAGE_SIZE  # noqa: E402
from models import check_arch, first_convolution  # noqa: E402
from models.ir import IR_VARIANTS  # noqa: E402
from utils.checkpoint.safe_load import IDENTITIES_TENSOR, SAFETENSORS_EXTENSION, SUB_CENTERS_ENTRY  # noqa: E402
from utils.checkpoint.shards import StoredRows  # noqa: E402
from utils.checkpoint.weights import CHANNEL_ORDERS, Weights, open_weights  # noqa: E402
from utils.errors import UserError, exit_on_user_error  # noqa: E402
from utils.files import atomic_write, require_writable  # noqa: E402
from utils.flags import flag, parse_flags  # noqa: E402

CENTERS_NAME = "arcface_linear.weight"  # torchshard's
ONNX_OPSET = 18
ONNX_INPUT, ONNX_OUTPUT = "input", "embedding"
# How much onnxruntime may differ from PyTorch. Its kernels sum in another order, which adds up over a hundred layers.
ONNX_TOLERANCE = 1e-3


def main() -> None:
    options = parse_options()
    require_writable("--output", options.output, force=options.force, inputs=[options.resume])
    with_centers = options.centers or options.format == "torchshard"
    weights = open_weights(options.resume, options.arch, with_centers=with_centers,
                           channel_order=options.channel_order)
    if with_centers and weights.centers is None:
        needed_by = "--centers" if options.centers else "--format torchshard"
        raise UserError(f"--resume {options.resume}: has no class centers, which {needed_by} needs; "
                        "give a checkpoint of main.py")
    try:
        summary = WRITERS[options.format](weights, options.output)
    except (OSError, RuntimeError) as error:  # torch.save and safetensors raise RuntimeError when the disk is full
        cause, _, _ = str(error).partition("\n")
        raise UserError(f"--output {options.output}: cannot be written ({cause})") from None
    print(f"{weights.describe(options.resume)} as {options.format}: {options.output}, "
          f"{os.path.getsize(options.output) / 2**20:,.1f} MiB; {summary}")


@contextlib.contextmanager
def replacing(output: str) -> Iterator[str]:
    """utils.files.atomic_write for what writes to a path: a temporary one, which takes the place of `output`."""
    with atomic_write(output) as file:
        yield file.name
        os.chmod(file.name, os.fstat(file.fileno()).st_mode & 0o777)  # safetensors creates one for the owner alone
        with open(file.name, "rb") as written:
            os.fsync(written.fileno())


@contextlib.contextmanager
def gathered(centers: StoredRows, output: str) -> Iterator[Tensor]:
    """All class centers (C, d) in float32, in a temporary file beside `output`, mapped into memory.

    They are copied block by block, so memory holds one block and what the system caches of the file.
    """
    with tempfile.NamedTemporaryFile(dir=os.path.dirname(os.path.abspath(output)), prefix=".centers-") as file:
        count = centers.shape[0] * centers.shape[1]
        # Allocated before it is mapped: a full disk then raises an error. Later it would send a signal.
        os.posix_fallocate(file.fileno(), 0, max(4 * count, 1))
        gathered = torch.from_file(file.name, shared=True, size=count, dtype=torch.float32).view(centers.shape)
        for first, rows in centers.blocks():
            gathered[first:first + len(rows)] = rows
        yield gathered


def write_torchshard(weights: Weights, output: str) -> str:
    """{"epoch", "arch", "state_dict"}. Names begin with "module.", class centers are "module.arcface_linear.weight".

    "identities" has the names of the identities by class, if they are known, and "sub_centers" the number of centers of
    each class, if they are several: the rows of a class follow each other. Only --init-from uses these two.
    """
    assert weights.centers is not None
    with gathered(weights.centers, output) as centers, replacing(output) as temporary:
        entries = {**weights.backbone.state_dict(), CENTERS_NAME: centers}
        named = {f"module.{name}": tensor for name, tensor in entries.items()}
        identities = {"identities": weights.identities} if weights.identities else {}
        several = {SUB_CENTERS_ENTRY: weights.sub_centers} if weights.sub_centers > 1 else {}
        torch.save({"epoch": weights.epoch, "arch": weights.arch, "channel_order": "rgb", "state_dict": named,
                    **identities, **several}, temporary)
    return f"backbone and {len(centers):,} class centers"


def write_insightface(weights: Weights, output: str) -> str:
    """The bare state dict of the backbone, like insightface's backbone.pth. In AdaFace's naming it takes BGR."""
    entries, order = weights.backbone.state_dict(), "RGB"
    if weights.arch in IR_VARIANTS:
        name, convolution = first_convolution(weights.backbone)
        entries[name], order = convolution.flip(1), "BGR, as AdaFace's programs expect"
    with replacing(output) as temporary:
        torch.save(entries, temporary)
    return f"backbone, which takes {order}"


def write_safetensors(weights: Weights, output: str) -> str:
    """The backbone's state dict; with --centers also "arcface_linear.weight" and the names of the identities.

    The metadata has "sub_centers" where each class has several centers: the rows of a class follow each other.
    """
    save_file = _require("safetensors.torch", "safetensors").save_file
    entries = {name: tensor.contiguous() for name, tensor in weights.backbone.state_dict().items()}
    metadata = {"format": "pt", "arch": weights.arch, "channel_order": "rgb",
                "embedding_size": str(weights.backbone.embedding_size)}
    with contextlib.ExitStack() as stack:
        if weights.centers is not None:
            entries[CENTERS_NAME] = stack.enter_context(gathered(weights.centers, output))
            if weights.sub_centers > 1:
                metadata[SUB_CENTERS_ENTRY] = str(weights.sub_centers)
            if weights.identities:
                names = json.dumps(weights.identities).encode("ascii")
                entries[IDENTITIES_TENSOR] = torch.frombuffer(bytearray(names), dtype=torch.uint8)
        save_file(entries, stack.enter_context(replacing(output)), metadata=metadata)
    return "backbone" + (f" and {weights.centers.shape[0]:,} class centers" if weights.centers is not None else "")


def write_onnx(weights: Weights, output: str) -> str:
    """The backbone for any batch size. `output` is only replaced if onnxruntime computes what PyTorch does."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _require(package, "onnx")
    with replacing(output) as temporary:
        export_onnx(weights.backbone, temporary)
        worst = largest_difference(weights.backbone, temporary)
        if not worst <= ONNX_TOLERANCE:
            raise UserError(f"--format onnx: onnxruntime's embeddings differ from PyTorch's by {worst:.2g} of their "
                            f"length, more than {ONNX_TOLERANCE:g}; {output} was not written; try other versions of "
                            "onnxscript and onnxruntime")
    return f"any batch size, opset {ONNX_OPSET}; onnxruntime agrees with PyTorch to {worst:.1g} of the length"


def export_onnx(backbone: nn.Module, path: str) -> None:
    """Write `backbone`, in evaluation mode, as one ONNX file."""
    example = torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    # torch.onnx.export prints its progress.
    with warnings.catch_warnings(), open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            backbone, (example,), input_names=[ONNX_INPUT], output_names=[ONNX_OUTPUT], opset_version=ONNX_OPSET,
            dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()  # They contain paths of this machine's source files.
    program.save(path, external_data=False)


def largest_difference(backbone: nn.Module, path: str) -> float:
    """max |onnxruntime's embedding - PyTorch's| / |PyTorch's| over batches of 1, 2 and 5 random images."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    generator, differences = torch.Generator().manual_seed(0), []
    for batch in (1, 2, 5):
        images = torch.rand(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) * 2 - 1
        with torch.inference_mode():
            expected = backbone(images).numpy()
        (found,) = session.run([ONNX_OUTPUT], {ONNX_INPUT: images.numpy()})
        differences.append(np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1))
    return float(np.concatenate(differences).max())  # NaN if one of them is


def _require(package: str, format: str) -> Any:
    """Import a package. Raises UserError that says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"--format {format}: the package {package.partition('.')[0]} is missing or does not load "
                        f"({error}); pip install -r scripts/requirements.txt") from None


WRITERS: dict[str, Callable[[Weights, str], str]] = {
    "torchshard": write_torchshard, "insightface": write_insightface,
    "onnx": write_onnx, "safetensors": write_safetensors,
}


@dataclass(frozen=True)
class Options:
    """The arguments of export.py."""

    resume: str = flag("--resume", required=True, metavar="PATH",
                       help="checkpoint.pth.tar, or a published backbone's weights")
    format: str = flag(
        "--format", required=True, choices=WRITERS, metavar="FORMAT",
        help="torchshard has backbone and classifier, insightface the backbone's state dict, onnx the backbone for any "
             "batch size, checked with onnxruntime, safetensors the backbone")
    output: str = flag("--output", required=True, metavar="FILE", help="file to write")
    force: bool = flag("--force", default=False, help="replace an existing file once the new one is complete")
    arch: str | None = flag("-a", "--arch", metavar="ARCH", default_text="any", help="fail unless the file holds this")
    channel_order: str | None = flag("--channel-order", choices=CHANNEL_ORDERS, default_text="that of the file",
                                     help="order of the colors that the network in --resume was trained with")
    centers: bool = flag("--centers", default=False, help="with --format safetensors: also the class centers")


def parse_options(argv: list[str] | None = None) -> Options:
    """Parse the command line, and check what does not need a file. Raises UserError."""
    options = parse_flags(
        Options, "export.py", "Write a checkpoint in another format. Network input: RGB, (value - 127.5) / 127.5.", argv
    )
    if options.arch:
        check_arch(options.arch)
    if options.centers and options.format != "safetensors":
        raise UserError(f"--centers with --format {options.format}: works with safetensors only; torchshard always "
                        "has them, insightface and onnx never")
    extension = {"onnx": ".onnx", "safetensors": SAFETENSORS_EXTENSION}.get(options.format, "")
    if not options.output.endswith(extension):
        raise UserError(f"--output {options.output}: give a name that ends in {extension}, which other programs expect")
    return options


if __name__ == "__main__":
    exit_on_user_error(main)
