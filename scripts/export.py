"""Write a checkpoint in the formats of other programs.

    python3 scripts/export.py --resume checkpoint.pth.tar --format torchshard  --output exported.pth.tar
    python3 scripts/export.py --resume checkpoint.pth.tar --format insightface --output backbone.pth
    python3 scripts/export.py --resume checkpoint.pth.tar --format onnx        --output backbone.onnx
        [--input uint8] [--input-order bgr] [--normalize] [--int8 DIR [--pair-list FILE --imgs-root DIR]]
    python3 scripts/export.py --resume checkpoint.pth.tar --format safetensors --output backbone.safetensors [--centers]

The network's input is RGB, (n, 3, 112, 112), (value / 255 - 0.5) / 0.5 = (value - 127.5) / 127.5. Only ir* networks in
the insightface format take BGR, because other programs expect it of a bare state dict with these names. The output
(n, d) is not L2-normalized: compare embeddings by their cosine. Weights are written in float32. The flags of onnx
change each of these.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
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

from data.decode import IMAGE_SIZE, read_image  # noqa: E402
from data.pairs import PairList  # noqa: E402
from data.progress import progress_bar  # noqa: E402
from models import check_arch, first_convolution  # noqa: E402
from models.ir import IR_VARIANTS  # noqa: E402
from scripts.embed import find_images  # noqa: E402
from utils.checkpoint.safe_load import IDENTITIES_TENSOR, SAFETENSORS_EXTENSION, SUB_CENTERS_ENTRY  # noqa: E402
from utils.checkpoint.shards import StoredRows  # noqa: E402
from utils.checkpoint.weights import CHANNEL_ORDERS, Weights, open_weights  # noqa: E402
from utils.errors import UserError, exit_on_user_error  # noqa: E402
from utils.evaluation.lfw import evaluate, usable_folds  # noqa: E402
from utils.files import atomic_write, require_writable  # noqa: E402
from utils.flags import flag, parse_flags  # noqa: E402

CENTERS_NAME = "arcface_linear.weight"  # torchshard's
ONNX_OPSET = 18
ONNX_INPUT, ONNX_OUTPUT = "input", "embedding"
# How much onnxruntime may differ from PyTorch. Its kernels sum in another order, which adds up over a hundred layers.
ONNX_TOLERANCE = 1e-3
CALIBRATION_IMAGES = 256


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
        summary = WRITERS[options.format](weights, options)
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


def write_torchshard(weights: Weights, options: Options) -> str:
    """{"epoch", "arch", "state_dict"}. Names begin with "module.", class centers are "module.arcface_linear.weight".

    "identities" has the names of the identities by class, if they are known, and "sub_centers" the number of centers of
    each class, if they are several: the rows of a class follow each other. Only --init-from uses these two.
    """
    assert weights.centers is not None
    with gathered(weights.centers, options.output) as centers, replacing(options.output) as temporary:
        entries = {**weights.backbone.state_dict(), CENTERS_NAME: centers}
        named = {f"module.{name}": tensor for name, tensor in entries.items()}
        identities = {"identities": weights.identities} if weights.identities else {}
        several = {SUB_CENTERS_ENTRY: weights.sub_centers} if weights.sub_centers > 1 else {}
        torch.save({"epoch": weights.epoch, "arch": weights.arch, "channel_order": "rgb", "state_dict": named,
                    **identities, **several}, temporary)
    return f"backbone and {len(centers):,} class centers"


def write_insightface(weights: Weights, options: Options) -> str:
    """The bare state dict of the backbone, like insightface's backbone.pth. In AdaFace's naming it takes BGR."""
    entries, order = weights.backbone.state_dict(), "RGB"
    if weights.arch in IR_VARIANTS:
        name, convolution = first_convolution(weights.backbone)
        entries[name], order = convolution.flip(1), "BGR, as AdaFace's programs expect"
    with replacing(options.output) as temporary:
        torch.save(entries, temporary)
    return f"backbone, which takes {order}"


def write_safetensors(weights: Weights, options: Options) -> str:
    """The backbone's state dict; with --centers also "arcface_linear.weight" and the names of the identities.

    The metadata has "sub_centers" where each class has several centers: the rows of a class follow each other.
    """
    save_file = _require("safetensors.torch", "safetensors").save_file
    entries = {name: tensor.contiguous() for name, tensor in weights.backbone.state_dict().items()}
    metadata = {"format": "pt", "arch": weights.arch, "channel_order": "rgb",
                "embedding_size": str(weights.backbone.embedding_size)}
    with contextlib.ExitStack() as stack:
        if weights.centers is not None:
            entries[CENTERS_NAME] = stack.enter_context(gathered(weights.centers, options.output))
            if weights.sub_centers > 1:
                metadata[SUB_CENTERS_ENTRY] = str(weights.sub_centers)
            if weights.identities:
                names = json.dumps(weights.identities).encode("ascii")
                entries[IDENTITIES_TENSOR] = torch.frombuffer(bytearray(names), dtype=torch.uint8)
        save_file(entries, stack.enter_context(replacing(options.output)), metadata=metadata)
    return "backbone" + (f" and {weights.centers.shape[0]:,} class centers" if weights.centers is not None else "")


def write_onnx(weights: Weights, options: Options) -> str:
    """The backbone for any batch size. The file is only replaced if onnxruntime computes what PyTorch does."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _require(package, "onnx")
    paths = calibration_images(options.int8) if options.int8 is not None else []
    images = [read_image(path) for path in paths]  # a bad one ends the program before the export
    pairs = PairList(options.imgs_root, options.pair_list) if options.pair_list and options.imgs_root else None
    if pairs is not None:
        usable_folds(pairs.is_same)
        for path in progress_bar("checking the pairs", len(pairs.paths), iterable=pairs.paths):
            read_image(path)
    network = deployed(weights.backbone, options)
    summary = f"any batch size, opset {ONNX_OPSET}"
    with replacing(options.output) as temporary, tempfile.TemporaryDirectory() as directory:
        float_path = os.path.join(directory, "float.onnx") if paths else temporary
        example = torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
        export_onnx(network, float_path, to_input(example, options))
        worst = largest_difference(network, float_path, options)
        if not worst <= ONNX_TOLERANCE:
            raise UserError(f"--format onnx: onnxruntime's embeddings differ from PyTorch's by {worst:.2g} of their "
                            f"length, more than {ONNX_TOLERANCE:g}; {options.output} was not written; try other "
                            "versions of onnxscript and onnxruntime")
        summary += f"; onnxruntime agrees with PyTorch to {worst:.1g} of the length"
        if paths:
            quantize_onnx(float_path, temporary, images, options)
            print(compare(float_path, temporary, paths if pairs is None else pairs.paths, pairs, options))
            summary = f"int8, calibrated on {len(paths)} images; as float32: {summary}"
    return summary


def deployed(backbone: nn.Module, options: Options) -> nn.Module:
    """The network to export: the backbone alone, or with what a program would do before and after it."""
    if options.input == "float" and options.input_order == "rgb" and not options.normalize:
        return backbone
    return Deployed(backbone, options.input == "uint8", options.input_order == "bgr", options.normalize)


class Deployed(nn.Module):
    """A backbone that takes images as decoders give them, and returns embeddings that are ready to compare.

    Args:
        uint8: takes uint8 (n, 112, 112, 3), else float32 (n, 3, 112, 112), (value - 127.5) / 127.5.
        bgr: takes blue first; the backbone takes red first.
        normalize: divides each embedding by its length.
    """

    def __init__(self, backbone: nn.Module, uint8: bool, bgr: bool, normalize: bool) -> None:
        super().__init__()
        self.backbone, self.uint8, self.bgr, self.normalize = backbone, uint8, bgr, normalize
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        if self.uint8:
            images = (images.permute(0, 3, 1, 2).float() - 127.5) / 127.5
        embeddings = self.backbone(images.flip(1) if self.bgr else images)
        return nn.functional.normalize(embeddings) if self.normalize else embeddings


def to_input(images: Tensor, options: Options) -> Tensor:
    """uint8 RGB (n, 3, 112, 112) -> what the exported network takes."""
    if options.input_order == "bgr":
        images = images.flip(1)
    return images.permute(0, 2, 3, 1).contiguous() if options.input == "uint8" else (images.float() - 127.5) / 127.5


def export_onnx(network: nn.Module, path: str, example: Tensor) -> None:
    """Write `network`, in evaluation mode, as one ONNX file. example: a batch of two."""
    # torch.onnx.export prints its progress.
    with warnings.catch_warnings(), open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network, (example,), input_names=[ONNX_INPUT], output_names=[ONNX_OUTPUT], opset_version=ONNX_OPSET,
            dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()  # They contain paths of this machine's source files.
    program.save(path, external_data=False)


def largest_difference(network: nn.Module, path: str, options: Options) -> float:
    """max |onnxruntime's embedding - PyTorch's| / |PyTorch's| over batches of 1, 2 and 5 random images."""
    embed = open_onnx(path)
    generator, differences = torch.Generator().manual_seed(0), []
    for batch in (1, 2, 5):
        images = to_input(torch.randint(256, (batch, 3, IMAGE_SIZE, IMAGE_SIZE), generator=generator,
                                        dtype=torch.uint8), options)
        with torch.inference_mode():
            expected = network(images).numpy()
        difference = embed(images) - expected
        differences.append(np.linalg.norm(difference, axis=1) / np.linalg.norm(expected, axis=1))
    return float(np.concatenate(differences).max())  # NaN if one of them is


def open_onnx(path: str) -> Callable[[Tensor], np.ndarray]:
    """The network in a file, on the CPU: images as it takes them -> embeddings (n, d)."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    return lambda images: session.run([ONNX_OUTPUT], {ONNX_INPUT: images.numpy()})[0]


def calibration_images(directory: str) -> list[str]:
    """Up to CALIBRATION_IMAGES images below a directory, evenly spaced in the order of their names. Raises UserError.
    """
    if not os.path.isdir(directory):
        raise UserError(f"--int8 {directory}: no such directory; give one of aligned faces, such as the training set")
    paths = find_images([directory])
    return paths[::-(-len(paths) // CALIBRATION_IMAGES)]


def quantize_onnx(source: str, output: str, images: Sequence[Tensor], options: Options) -> None:
    """Write the network in `source` with 8-bit convolutions and matrix products, whose ranges `images` give.

    onnxruntime's static quantisation: one scale for each output channel of the weights, which get seven bits, because
    CPUs without VNNI would overflow with eight; unsigned activations, from their smallest to their largest value.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quant_pre_process,
        quantize_static,
    )

    class Batches(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(torch.split(torch.stack(list(images)), 16))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {ONNX_INPUT: to_input(batch, options).numpy()}

    with tempfile.TemporaryDirectory() as directory:
        prepared = os.path.join(directory, "prepared.onnx")
        quant_pre_process(source, prepared, skip_symbolic_shape=True)  # folds BatchNorm into convolutions
        quantize_static(
            prepared, output, Batches(), quant_format=QuantFormat.QDQ, op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            per_channel=True, reduce_range=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)


def compare(float_path: str, int8_path: str, paths: Sequence[str], pairs: PairList | None, options: Options) -> str:
    """A table of both networks: their size, and on a list of pairs their accuracy; the cosines of their embeddings of
    `paths`, which are those of `pairs` if there are any.
    """
    networks = [open_onnx(path) for path in (float_path, int8_path)]
    rows: list[list[np.ndarray]] = [[], []]
    for start in range(0, len(paths), 16):
        batch = to_input(torch.stack([read_image(path) for path in paths[start:start + 16]]), options)
        for network, found in zip(networks, rows):
            found.append(network(batch).astype(np.float64))
    unit = [embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
            for embeddings in map(np.concatenate, rows)]
    lines = [("size, MiB", [f"{os.path.getsize(path) / 2**20:.1f}" for path in (float_path, int8_path)])]
    if pairs is not None:
        results = [evaluate(embeddings[pairs.index1], embeddings[pairs.index2], pairs.is_same) for embeddings in unit]
        lines += [("accuracy", [f"{one.accuracy:.4f}" for one in results]),
                  ("AUC", [f"{one.auc:.4f}" for one in results]),
                  *((f"TAR at FAR {far}", [f"{one.tar_at_far[far]:.4f}" for one in results])
                    for far in results[0].tar_at_far)]
    cosine = np.sum(unit[0] * unit[1], axis=1)
    return "\n".join([f"{'':18}{'float32':>10}{'int8':>10}",
                      *(f"{name:18}{values[0]:>10}{values[1]:>10}" for name, values in lines),
                      f"cosine between both embeddings of {len(paths):,} images: mean {cosine.mean():.4f}, "
                      f"least {cosine.min():.4f}"])


def _require(package: str, format: str) -> Any:
    """Import a package. Raises UserError that says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"--format {format}: the package {package.partition('.')[0]} is missing or does not load "
                        f"({error}); pip install -r scripts/requirements.txt") from None


WRITERS: dict[str, Callable[[Weights, Options], str]] = {
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
    input: str = flag("--input", default="float", choices=("float", "uint8"),
                      help="with --format onnx: float32 (n, 3, 112, 112), (value - 127.5) / 127.5; or uint8 "
                           "(n, 112, 112, 3), as decoders give it")
    input_order: str = flag("--input-order", default="rgb", choices=CHANNEL_ORDERS,
                            help="with --format onnx: order of the colors that the exported network takes")
    normalize: bool = flag("--normalize", default=False, help="with --format onnx: embeddings of length 1")
    int8: str | None = flag(
        "--int8", metavar="DIR", help="with --format onnx: 8-bit convolutions and matrix products, for which "
        f"{CALIBRATION_IMAGES} of the aligned faces below DIR give the ranges; prints a comparison with float32")
    pair_list: str | None = flag("--pair-list", metavar="FILE",
                                 help="with --int8: pairs on which both are compared, as for valid.py")
    imgs_root: str | None = flag("--imgs-root", metavar="DIR", help="the images of --pair-list")
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
    for name, given in (("--input", options.input != "float"), ("--input-order", options.input_order != "rgb"),
                        ("--normalize", options.normalize), ("--int8", options.int8 is not None)):
        if given and options.format != "onnx":
            raise UserError(f"{name} with --format {options.format}: works with onnx only; drop one of them")
    for name, value, other, needed in (("--pair-list", options.pair_list, "--int8", options.int8),
                                       ("--pair-list", options.pair_list, "--imgs-root", options.imgs_root),
                                       ("--imgs-root", options.imgs_root, "--pair-list", options.pair_list)):
        if value is not None and needed is None:
            raise UserError(f"{name} {value}: has no effect without {other}; add it, or drop the flag")
    extension = {"onnx": ".onnx", "safetensors": SAFETENSORS_EXTENSION}.get(options.format, "")
    if not options.output.endswith(extension):
        raise UserError(f"--output {options.output}: give a name that ends in {extension}, which other programs expect")
    return options


if __name__ == "__main__":
    exit_on_user_error(main)
