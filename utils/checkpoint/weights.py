"""Read weights from files: checkpoints of this program, and published ones. Nothing in them is executed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models import BACKBONES, build_backbone, check_arch
from models.iresnet import BLOCK_COUNTS
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
_BACKBONE_ENTRY = re.compile(r"(?P<prefix>(?:.*?\.)?)(?:layer1|bottlenecks)\.0\.")
# Where training programs keep the backbone's weights, the first that is there counts; insightface's class centers.
_WRAPPERS = ("state_dict", "state_dict_backbone", "backbone", "model_state_dict", "model", "module", "net", "network",
             "weights", "params", "state_dict_ema", "model_ema", "ema", "ema_state_dict")
_INSIGHTFACE_CENTERS = "state_dict_softmax_fc"
# The largest embedding that a file may claim. Published backbones have up to 2,048 values.
_MAX_EMBEDDING_SIZE = 4096


@dataclass(frozen=True)
class Weights:
    """What `open_weights` found in a file.

    backbone: in evaluation mode, on the CPU, in float32. It does not depend on the file anymore.
    epoch: of the file's run, 0 if unknown.
    centers: the class centers, in the file; None if it has none, or if they were not asked for.
    identities: the centers' names by class; None if the file has no names.
    mean_face: of the training images, float32 (3, 28, 28); None if the file has none.
    sub_centers: q, how many rows of `centers` each class has: class c has [c * q, c * q + q).
    averaged: the backbone has the average of the run's weights (--ema).
    """

    backbone: nn.Module
    arch: str
    epoch: int
    centers: StoredRows | None
    identities: list[str] | None
    mean_face: Tensor | None = None
    sub_centers: int = 1
    averaged: bool = False

    def describe(self, path: str) -> str:
        """Words for the log: "iresnet50 of checkpoint.pth.tar"."""
        return f"{self.arch} of {path}" + (", EMA weights" if self.averaged else "")


def open_weights(path: str, arch: str | None = None, *, with_centers: bool = False) -> Weights:
    """Read the backbone in a file, and open its class centers if asked for. The global random state does not change.

    The file is a checkpoint of this program; a published backbone's bare state dict; torchshard's {"epoch", "arch",
    "state_dict", ...}, whose classifier is "arcface_linear.weight"; insightface's checkpoint_gpu_0.pt, whose class
    centers are those of its GPU; a state dict below one of _WRAPPERS; or any of these weights as FILE.safetensors. All
    names of the backbone may have one prefix, such as "module."; then other entries are ignored. The file says its
    arch, or the names of the weights suggest it. Counters that old versions of torch did not write
    (num_batches_tracked) become 0. Of a checkpoint of a run with --ema, the backbone gets the average of the weights.

    arch: what the file must hold; None accepts any architecture.

    Raises UserError, which names the file, if it is missing or not a checkpoint, contains code, fits none of BACKBONES,
    holds another architecture than `arch`, or has damaged class centers.
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
                   sub_centers if centers is not None else 1, averaged)


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
    prefixes = {match["prefix"] for match in map(_BACKBONE_ENTRY.match, entries) if match}
    if len(prefixes) > 1:
        raise UserError(f"{path}: holds weights under {' and '.join(repr(p) for p in sorted(prefixes))}; keep one of "
                        "them, in a file of its own")
    prefix = prefixes.pop() if prefixes else ""
    weights = {name.removeprefix(prefix): value for name, value in entries.items() if name.startswith(prefix)}
    weights = {name: value for name, value in weights.items() if not _CLASSIFIER_ENTRY.fullmatch(name)}
    said = content.get("arch")
    arch = said if isinstance(said, str) and said in BACKBONES else _nearest_arch(path, weights)
    bias = weights.get("features.bias")  # of the last BatchNorm: d values
    embedding_size = content.get("embedding_size")
    if not isinstance(embedding_size, int) or embedding_size < 1:
        embedding_size = bias.numel() if isinstance(bias, Tensor) and bias.numel() else 512
    if embedding_size > _MAX_EMBEDDING_SIZE:
        raise UserError(f"{path}: claims an embedding size of {embedding_size}; {_MAX_EMBEDDING_SIZE} is the most")
    with torch.random.fork_rng(devices=[]):  # Initial values, which are overwritten, must not use up random numbers.
        backbone = build_backbone(arch, embedding_size)
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
    """The arch that the names suggest; an IResNet has a typical number of residual blocks in each stage."""
    if any(name.startswith("bottlenecks.") for name in weights):
        return "mobilefacenet"
    blocks = {tuple(name.split(".")[:2]) for name in weights if re.match(r"layer[1-4]\.\d+\.", name)}
    if not blocks:
        raise UserError(f"{path}: holds none of {', '.join(BACKBONES)}, but {', '.join(list(weights)[:3])}")
    counts = [sum(stage == f"layer{number}" for stage, _ in blocks) for number in range(1, 5)]
    return min(BLOCK_COUNTS, key=lambda arch: sum(abs(a - b) for a, b in zip(BLOCK_COUNTS[arch], counts)))
