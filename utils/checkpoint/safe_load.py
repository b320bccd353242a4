"""Load files of weights without executing anything in them."""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
from typing import Any

import torch

from utils.errors import UserError

SAFETENSORS_EXTENSION = ".safetensors"
IDENTITIES_TENSOR = "identities.json"  # in a safetensors file with class centers: the identity names as JSON, uint8

_ZIP_MAGIC = b"PK\x03\x04"  # first bytes of what torch.save writes since torch 1.6
_PICKLE_MAGIC = b"\x80"  # first byte of a Python pickle since protocol 2, and of what older versions of torch wrote


def read_safetensors(path: str) -> dict[str, Any]:
    """{"state_dict", "arch", "embedding_size", "identities"}, the last three if the file has them. Raises UserError."""
    try:
        import safetensors  # Only this format needs it.
    except ImportError:
        raise UserError(
            f"{path}: the package safetensors is missing: pip install -r scripts/requirements.txt") from None
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; give a file of weights")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # mapped into memory, not read
            metadata = file.metadata() or {}
        content: dict[str, Any] = {"state_dict": weights}
        if "arch" in metadata:
            content["arch"] = metadata["arch"]
        if "embedding_size" in metadata:
            content["embedding_size"] = int(metadata["embedding_size"])
        if IDENTITIES_TENSOR in weights:
            content["identities"] = json.loads(weights.pop(IDENTITIES_TENSOR).numpy().tobytes())
    except (safetensors.SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: is not a safetensors file, or is damaged ({error}); copy or download it again") from None
    return content


def read_torch_file(path: str) -> object:
    """The contents of a file of torch.save: tensors and plain values only. Raises UserError that names the cause."""
    if os.path.isdir(path):
        raise UserError(f"{path}: is a directory; give a checkpoint file")
    try:
        with open(path, "rb") as file:
            head = file.read(len(_ZIP_MAGIC))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a checkpoint file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not head:
        raise UserError(f"{path}: is empty, not a checkpoint")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.load also warns about what it then refuses.
        try:
            # Mapped into memory, which the old format does not allow: what is not used is not read.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=head == _ZIP_MAGIC)
        except Exception as error:  # Damaged bytes can be any pickle instructions, so any exception can come out.
            raise UserError(f"{path}: {_why_refused(error, head)}") from None


def _why_refused(error: Exception, head: bytes) -> str:
    """Why torch.load(weights_only=True) raised `error` on a file that begins with `head`."""
    advice = "give a file of tensors and plain values only, such as a saved state_dict"
    code = re.search(r"GLOBAL (\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and code:
        return f"holds code ({code[1]}) and was not loaded; {advice}"
    if not head.startswith((_ZIP_MAGIC, _PICKLE_MAGIC)):
        return f"is not a checkpoint; {advice}"
    if isinstance(error, pickle.UnpicklingError):
        return f"is a pickle that may hold code and was not loaded; {advice}"
    return "is not a checkpoint, or is truncated; copy or download it again"
