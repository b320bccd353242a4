"""Load files of weights without executing anything in them."""

from __future__ import annotations

import json
import os
import re
import warnings
from typing import Any

import torch

from utils.errors import UserError

SAFETENSORS_EXTENSION = ".safetensors"
IDENTITIES_TENSOR = "identities.json"  # in a safetensors file with class centers: the identity names as JSON, uint8

_ZIP_MAGIC = b"PK\x03\x04"  # first bytes of what torch.save writes since torch 1.6


def read_safetensors(path: str) -> dict[str, Any]:
    """{"state_dict": tensors, mapped into memory, "identities": names, if the file has them}. Raises UserError."""
    try:
        import safetensors  # Only this format needs it.
    except ImportError:
        raise UserError(
            f"{path}: the package safetensors is missing: pip install -r scripts/requirements.txt") from None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}
        content: dict[str, Any] = {"state_dict": weights}
        if IDENTITIES_TENSOR in weights:
            content["identities"] = json.loads(weights.pop(IDENTITIES_TENSOR).numpy().tobytes())
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: is not a safetensors file, or is missing or damaged ({error}); copy or download it "
                        "again") from None
    return content


def read_torch_file(path: str) -> object:
    """The contents of a file of torch.save: tensors and plain values only. Raises UserError that names the cause."""
    try:
        with open(path, "rb") as file:
            is_zip = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; give a checkpoint file") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.load also warns about what it then refuses.
        try:
            # Mapped into memory: what is not used is not read. The old format does not allow it, and torch's C++ takes
            # names in UTF-8 only.
            mmap = is_zip and os.fsencode(path) == path.encode(errors="replace")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:  # Damaged bytes can be any pickle instructions, so any exception can come out.
            code = re.search(r"GLOBAL (\S+)", str(error))
            cause = (f"holds code ({code[1]}) and was not loaded; give a file of tensors and plain values only, such "
                     "as a saved state_dict" if code else
                     "is not a checkpoint of tensors and plain values, or is truncated; copy or download it again")
            raise UserError(f"{path}: {cause}") from None


def first_words(error: Exception) -> str:
    """The beginning of an error, in one line."""
    return " ".join(str(error).split())[:300]
