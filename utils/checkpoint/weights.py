"""Read weights from files: checkpoints of this program, and published ones. Nothing in them is executed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models import BACKBONES, build_backbone, check_arch, first_convolution, is_timm
from models.ir import IR_VARIANTS
from models.iresnet import BLOCK_COUNTS
from models.mbf import MBF_VARIANTS
from models.vit import VIT_VARIANTS
from utils.checkpoint.layout import read_manifest, step_directory
from utils.checkpoint.safe_load import first_words, is_plain, read_weights
from utils.checkpoint.shards import StoredRows, open_shards, rows_of
from utils.errors import UserError
from utils.evaluation.mean_face import SHAPE

# Entries of a classifier, which published files have beside the backbone's. No other entries may be left over.
_CLASSIFIER_ENTRY = re.compile(r"(arcface_linear|arcface|classifier|logits)\.(weight|kernel|bias)")
# The name of the class centers, in torchshard's files and in ours.
_CENTERS_ENTRY = re.compile(r"(.*\.)?(arcface_linear|classifier)\.weight")
# A weight that every backbone has, and what a wrapper writes in front of all names: "module.", "model._orig_mod.", ...
_BACKBONE_ENTRY = re.compile(r"(?P<prefix>(?:.*?\.)?)(?:(?:layer1|bottlenecks|input_layer)\.0\.|conv_sep\.layers\.0\."
                             r"|patch_embed\.proj\.)")
_TIMM_ENTRY = re.compile(r"(?P<prefix>(?:.*?\.)?)body\.")
# A vector of d values in the last BatchNorm of every backbone.
_EMBEDDING_ENTRIES = "features.bias", "output_layer.4.running_mean", "features.layers.3.bias", "feature.3.bias"
# Where training programs keep the backbone's weights, the first that is there counts; insightface's class centers.
_WRAPPERS = ("state_dict", "state_dict_backbone", "backbone", "model_state_dict", "model", "module", "net", "network",
             "weights", "params", "state_dict_ema", "model_ema", "ema", "ema_state_dict")
_INSIGHTFACE_CENTERS = "state_dict_softmax_fc"
# The largest embedding that a file may claim. Published backbones have up to 2,048 values.
MAX_EMBEDDING_SIZE = 4096
CHANNEL_ORDERS = ("rgb", "bgr")


@dataclass(frozen=True)
class Weights:
    """What `open_weights` found in a file.

    backbone: in evaluation mode, on the CPU, in float32. It takes RGB and does not depend on the file anymore.
    epoch: of the file's run, 0 if unknown.
    centers: the class centers, in the file; None if it has none, or if they were not asked for.
    identities: the centers' names by class; None if the file has no names.
    mean_face: of the training images, float32 (3, 28, 28); None if the file has none.
    sub_centers: q, how many rows of `centers` each class has: class c has [c * q, c * q + q).
    averaged: the backbone has the average of the run's weights (--ema).
    channel_order: of the images that the network in the file takes.
    order_is_assumed: the names of the weights suggest channel_order, and nothing says so.
    settings: of the file's run, by option; {} in files of other programs.
    """

    backbone: nn.Module
    arch: str
    epoch: int
    centers: StoredRows | None
    identities: list[str] | None
    mean_face: Tensor | None = None
    sub_centers: int = 1
    averaged: bool = False
    channel_order: str = "rgb"
    order_is_assumed: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def describe(self, path: str) -> str:
        """Words for the log: "iresnet50 of checkpoint.pth.tar"."""
        return f"{self.arch}{self.describe_order()} of {path}" + (", EMA weights" if self.averaged else "")

    def describe_order(self) -> str:
        """What was done about the colors; "" if nothing."""
        if self.channel_order == "rgb":
            return ""
        why = ", as AdaFace's do; --channel-order rgb if these do not" if self.order_is_assumed else ""
        return f" (weights for BGR images{why})"


def open_weights(
    path: str, arch: str | None = None, *, with_centers: bool = False, channel_order: str | None = None
) -> Weights:
    """Read the backbone in a file, and open its class centers if asked for. The global random state does not change.

    The file is a checkpoint of this program; a published backbone's bare state dict; torchshard's {"epoch", "arch",
    "state_dict", ...}, whose classifier is "arcface_linear.weight"; insightface's checkpoint_gpu_0.pt, whose class
    centers are those of its GPU; a state dict below one of _WRAPPERS; or any of these weights as FILE.safetensors. All
    names of the backbone may have one prefix, such as "module."; then other entries are ignored. The file says its
    arch, or the names of the weights suggest it. Counters that old versions of torch did not write
    (num_batches_tracked) become 0. Of a checkpoint of a run with --ema, the backbone gets the average of the weights.

    arch: what the file must hold; None accepts any architecture.
    channel_order: of the images that the file's network takes, one of CHANNEL_ORDERS. None: what the file says, else
        "bgr" for weights in AdaFace's naming, and "rgb" for all others. A network that takes BGR becomes one that takes
        RGB: red and blue of its first convolution are swapped.

    Raises UserError, which names the file, if it is missing or not a checkpoint, contains code, fits none of BACKBONES,
    holds another architecture than `arch`, contradicts `channel_order`, or has damaged class centers.
    """
    if arch is not None:
        check_arch(arch)
    content: Any = read_weights(path)
    is_checkpoint = isinstance(content, Mapping) and "shards" in content and "position" in content
    averaged = is_checkpoint and isinstance(content.get("ema"), Mapping)
    entries = _unwrap(content["ema"] if averaged else content)
    if (not isinstance(entries, Mapping) or not all(isinstance(name, str) for name in entries)
            or not any(isinstance(value, Tensor) for value in entries.values())):
        entries = ", ".join(f"{str(name):.40}" for name in list(content)[:5]) if isinstance(content, Mapping) else ""
        raise UserError(f"{path}: holds no state_dict{entries and f', but {entries}'}; give a checkpoint, or the state "
                        "dict of a published backbone")
    backbone, found = _build(path, content, entries)
    if arch not in (found, None):
        raise UserError(f"{path}: holds {found}, but --arch says {arch}; give {found}, or leave --arch out")
    said = content.get("channel_order", "rgb" if is_checkpoint else None)
    if said in CHANNEL_ORDERS and channel_order not in (said, None):
        raise UserError(f"{path}: takes {said.upper()} images, but --channel-order says {channel_order}; drop the flag")
    assumed = "bgr" if found in IR_VARIANTS else "rgb"
    order = said if said in CHANNEL_ORDERS else channel_order or assumed
    if order == "bgr":
        _, convolution = first_convolution(backbone)
        convolution.copy_(convolution.flip(1))
    position = content["position"] if is_checkpoint else content
    epoch = position.get("epoch") if isinstance(position, Mapping) else None
    centers, sub_centers = None, content.get("sub_centers", 1)  # 1 in files of older versions and other programs
    if with_centers and (not isinstance(sub_centers, int) or sub_centers < 1):
        raise UserError(f"{path}: its number of sub-centers is damaged; copy the file again")
    if with_centers and is_checkpoint:
        try:
            shape = content["num_classes"] * sub_centers, content["embedding_size"]
            directory = step_directory(path, content)
            centers = open_shards(directory, ["centers"], shape, read_manifest(directory))["centers"]
        except (UserError, KeyError, TypeError) as error:
            raise UserError(f"{path}: its class centers are missing or damaged: {error}") from None
    elif with_centers:
        found_centers = {name: entries[name] for name in filter(_CENTERS_ENTRY.fullmatch, entries)}
        if isinstance(beside := content.get(_INSIGHTFACE_CENTERS), Mapping) and "weight" in beside:
            found_centers[f"{_INSIGHTFACE_CENTERS}.weight"] = beside["weight"]
        for name, weight in found_centers.items():
            if not is_plain(weight) or weight.ndim != 2 or weight.shape[1] != backbone.embedding_size:
                raise UserError(f"{path}: its {name} is not a matrix of class centers "
                                f"(classes, {backbone.embedding_size})")
            if len(weight) % sub_centers:
                raise UserError(f"{path}: its {name} has {len(weight):,} rows, which are not {sub_centers} for each "
                                "class; copy the file again")
            centers = rows_of(weight.detach())
    identities = content.get("identities") or None
    names = isinstance(identities, list) and all(isinstance(name, str) for name in identities)
    most = len(identities or []) if centers is None else centers.shape[0] // sub_centers
    if identities is not None and (not names or len(identities) > most):
        raise UserError(f"{path}: its list of identities is damaged; copy the file again")
    mean_face = content.get("mean_face")
    if not isinstance(mean_face, Tensor) or mean_face.shape != SHAPE or not mean_face.is_floating_point():
        mean_face = None  # of an older version, or another program's
    return Weights(backbone, found, epoch if isinstance(epoch, int) else 0, centers, identities, mean_face,
                   sub_centers if centers is not None else 1, averaged, order,
                   channel_order is None and said not in CHANNEL_ORDERS, settings_in(content))


def settings_in(content: Any) -> Mapping[str, Any]:
    """The settings of the run that wrote a checkpoint, from its contents; {} if it has none."""
    settings = content.get("options") if isinstance(content, Mapping) else None
    return settings if isinstance(settings, Mapping) else {}


def weights_fingerprint(backbone: nn.Module) -> str:
    """16 hexadecimal digits that depend on each weight and statistic, by name, and not on the file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        if not name.endswith(".num_batches_tracked"):  # not every file has these counters
            digest.update(name.encode() + b"\0" + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _unwrap(content: Any) -> Any:
    """The state dict in the contents of a file, below the names that training programs give it."""
    for _ in range(3):
        wrapped = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None) if (
            isinstance(content, Mapping)) else None
        if wrapped is None:
            break
        content = wrapped
    return content


def _build(path: str, content: Mapping[str, Any], entries: Mapping[str, Any]) -> tuple[nn.Module, str]:
    """The backbone with the entries' values, and its arch."""
    said = content.get("arch")
    said = said if isinstance(said, str) and (said in BACKBONES or is_timm(said)) else None
    pattern = _TIMM_ENTRY if said and is_timm(said) else _BACKBONE_ENTRY
    prefixes = {match["prefix"] for match in map(pattern.match, entries) if match}
    if len(prefixes) > 1:
        raise UserError(f"{path}: holds weights under {' and '.join(repr(p) for p in sorted(prefixes))}; keep one of "
                        "them, in a file of its own")
    prefix = prefixes.pop() if prefixes else ""
    weights = {name.removeprefix(prefix): value for name, value in entries.items() if name.startswith(prefix)}
    weights = {name: value for name, value in weights.items() if not _CLASSIFIER_ENTRY.fullmatch(name)}
    arch = said or _nearest_arch(path, weights)
    vector = next((weights[name] for name in _EMBEDDING_ENTRIES if name in weights), None)
    embedding_size = content.get("embedding_size")
    if not isinstance(embedding_size, int) or embedding_size < 1:
        embedding_size = vector.numel() if isinstance(vector, Tensor) and vector.numel() else 512
    if embedding_size > MAX_EMBEDDING_SIZE:
        raise UserError(f"{path}: claims an embedding size of {embedding_size}; {MAX_EMBEDDING_SIZE} is the most")
    with torch.random.fork_rng(devices=[]):  # Initial values, which are overwritten, must not use up random numbers.
        try:
            backbone = build_backbone(arch, embedding_size)
        except UserError as error:  # of timm
            raise UserError(f"{path}: {error}") from None
    counters = {name: value for name, value in backbone.state_dict().items() if name.endswith(".num_batches_tracked")}
    try:
        for name, value in weights.items():
            # torch would copy quantized weights as if they were values.
            if name not in counters and not (isinstance(value, Tensor) and value.is_floating_point()):
                raise TypeError(f"{name} is not a tensor of floating point numbers")
        backbone.load_state_dict(counters | weights)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{path}: does not fit {arch}: {first_words(error)}") from None
    return backbone.eval(), arch


def _nearest_arch(path: str, weights: Mapping[str, Any]) -> str:
    """The arch that the names suggest: of those with such names, the nearest by numbers of blocks and by width."""

    def blocks_in(pattern: str) -> int:
        return len({match[1] for match in map(re.compile(pattern).match, weights) if match})

    def channels(name: str, dim: int) -> int:
        value = weights[name]
        return value.shape[dim] if isinstance(value, Tensor) and value.dim() > dim else 0

    if any(name.startswith("bottlenecks.") for name in weights):
        return "mobilefacenet"
    if (name := "conv_sep.layers.0.weight") in weights:
        return min(MBF_VARIANTS, key=lambda arch: abs(128 * MBF_VARIANTS[arch][0] - channels(name, 1)))
    if (name := "patch_embed.proj.weight") in weights:
        depth, width = blocks_in(r"blocks\.(\d+)\."), channels(name, 0)
        return min(VIT_VARIANTS, key=lambda arch: (
            abs(VIT_VARIANTS[arch].depth - depth), abs(VIT_VARIANTS[arch].width - width)))
    if any(name.startswith("input_layer.") for name in weights):
        squeeze, depth = any(".se_block." in name for name in weights), blocks_in(r"body\.(\d+)\.")
        return min(IR_VARIANTS, key=lambda arch: (
            IR_VARIANTS[arch][1] != squeeze, abs(sum(IR_VARIANTS[arch][0]) - depth)))
    blocks = {tuple(name.split(".")[:2]) for name in weights if re.match(r"layer[1-4]\.\d+\.", name)}
    if not blocks:
        raise UserError(f"{path}: holds none of {', '.join(BACKBONES)}, but {', '.join(list(weights)[:3])}")
    counts = [sum(stage == f"layer{number}" for stage, _ in blocks) for number in range(1, 5)]
    return min(BLOCK_COUNTS, key=lambda arch: sum(abs(a - b) for a, b in zip(BLOCK_COUNTS[arch], counts)))
