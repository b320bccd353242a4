"""Load files of weights without executing anything in them."""

from __future__ import annotations

import io
import json
import mmap
import os
import pickle
import re
import warnings
import zipfile
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError
from utils.files import open_regular

SAFETENSORS_EXTENSION = ".safetensors"
IDENTITIES_TENSOR = "identities.json"  # in a safetensors file with class centers: the identity names as JSON, uint8
SUB_CENTERS_ENTRY = "sub_centers"  # in its metadata, and in a state file: the number of centers of each class

_ZIP_MAGIC = b"PK\x03\x04"  # first bytes of what torch.save writes since torch 1.6
# First bytes of other files that users take for weights, and what to say about them.
_OTHER_FILES = {
    rb"\x08[\x01-\x20][\x12\x3a]": "is an ONNX file, which PyTorch cannot load; give the weights that it was exported "
                                   "from",
    rb"version https://git-lfs": "is a Git LFS pointer, not the file that it stands for; fetch that with git lfs pull",
    rb"\s*<(!DOCTYPE|html|\?xml)": "is a web page, perhaps of a download that asks for a confirmation; download the "
                                   "file again",
}


def read_weights(path: str) -> Any:
    """The contents of a file of torch.save or safetensors. Raises UserError that names the cause."""
    return read_safetensors(path) if path.endswith(SAFETENSORS_EXTENSION) else read_torch_file(path)


def read_safetensors(path: str) -> dict[str, Any]:
    """{"state_dict": tensors, mapped into memory, "identities": names, "sub_centers": centers of a class, "arch",
    "channel_order"}, all but the first if the file has them. Raises UserError.
    """
    try:
        import safetensors  # Only this format needs it.
    except ImportError:
        raise UserError(
            f"{path}: the package safetensors is missing: pip install -r scripts/requirements.txt") from None
    try:
        open_regular(path).close()
        with safetensors.safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
        content: dict[str, Any] = {"state_dict": weights}
        content |= {name: metadata[name] for name in ("arch", "channel_order") if name in metadata}
        if SUB_CENTERS_ENTRY in metadata:
            content[SUB_CENTERS_ENTRY] = int(metadata[SUB_CENTERS_ENTRY])
        if IDENTITIES_TENSOR in weights:
            content["identities"] = json.loads(weights.pop(IDENTITIES_TENSOR).numpy().tobytes())
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: is not a safetensors file, or is missing or damaged ({first_words(error)}); copy or "
                        "download it again") from None
    return content


def read_torch_file(path: str) -> object:
    """The contents of a file of torch.save: tensors and plain values only. Raises UserError that names the cause."""
    try:
        with open_regular(path) as file:
            head = file.read(64)
            file.seek(0)
            cause = next((text for start, text in _OTHER_FILES.items() if re.match(start, head)), None)
            cause = cause or _reason_not_to_load(file)
    except IsADirectoryError as error:
        names = [name for name in ("checkpoint.pth.tar", "state.pth.tar") if os.path.isfile(os.path.join(path, name))]
        raise UserError(f"{path}: {error.strerror}; give the file in it"
                        + (f", {os.path.join(path, names[0])}" if names else "")) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; give a checkpoint file") from None
    if cause is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.load also warns about what it then refuses.
            try:
                # Mapped into memory: what is not used is not read. The old format does not allow it, and torch's C++
                # takes names in UTF-8 only.
                mapped = head.startswith(_ZIP_MAGIC) and os.fsencode(path) == path.encode(errors="replace")
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            except Exception as error:  # Damaged bytes can be any pickle instructions, so any exception can come out.
                code = re.search(r"GLOBAL (\S+)", str(error))
                refuse_lack_of_memory(path, error)
                cause = (f"holds code ({code[1]}) and was not loaded; give a file of tensors and plain values only. If "
                         "you trust this one, make it in Python: torch.save(torch.load(FILE, weights_only=False)"
                         "['state_dict'], 'weights.pth'), or .state_dict() of a whole module" if code else _DAMAGED)
    raise UserError(f"{path}: {cause}")


class NotEnoughMemory(UserError):
    """Reading a file takes more memory than this process gets. The file itself may be whole."""


def refuse_lack_of_memory(path: str, error: Exception) -> None:
    """Raise NotEnoughMemory if that is what `error` says: --resume auto puts damaged checkpoints aside."""
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        words = first_words(error) or "MemoryError"
        raise NotEnoughMemory(f"{path}: cannot be read: there is not enough memory ({words}); free some, or raise the "
                              "limit of this process") from None


def load_tensor(data: bytes | memoryview) -> Tensor:
    """The floating point tensor that torch.save wrote as `data`. Other bytes can raise any exception."""
    file = io.BytesIO(data)
    if cause := _reason_not_to_load(file):
        raise ValueError(cause)
    file.seek(0)
    tensor = torch.load(file, map_location="cpu", weights_only=True)
    if not is_plain(tensor):
        raise ValueError("is not a tensor of floating point numbers with all its values")
    return tensor


def is_plain(value: object) -> bool:
    """Whether `value` is a dense floating point tensor whose values all exist.

    A few bytes can claim a sparse tensor of any size, and a tensor of any size that repeats one value.
    """
    return (isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
            and value.is_floating_point() and value.numel() * value.itemsize <= value.untyped_storage().nbytes())


_DAMAGED = "is not a checkpoint of tensors and plain values, or is truncated; copy or download it again"


def _reason_not_to_load(file: BinaryIO) -> str | None:
    """Why torch.load must not see a file: memory that it does not need, or another format. Reads no tensors.

    torch.save stores without compression. So a file never needs more memory than its own size, unless it was made to.
    """
    start = file.read(len(_ZIP_MAGIC))
    file.seek(0)
    if start != _ZIP_MAGIC:  # the old format: one pickle after the other
        if not start.startswith(pickle.PROTO):
            return _DAMAGED
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                unsafe = content.find(_BYTEARRAY) >= 0
        except ValueError:  # bytes in memory, which `load_tensor` accepts in the new format only
            return _DAMAGED
    else:
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
                names = [entry.filename.lower() for entry in entries]  # torch does not distinguish case in them
                if any(name.endswith("/constants.pkl") for name in names):
                    return ("is a TorchScript file; save its weights in Python: torch.save(torch.jit.load(FILE)."
                            "state_dict(), 'weights.pth')")
                stored = sum(entry.compress_size for entry in entries)
                if (any(entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size
                        for entry in entries) or stored > file.seek(0, io.SEEK_END)):
                    return ("is compressed, which torch.save never does, and was not loaded; unzip it and zip it with "
                            "compression level 0")
                unsafe = any(_BYTEARRAY in archive.read(entry) for entry, name in zip(entries, names)
                             if name.endswith("/data.pkl"))
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError):
            return _DAMAGED
    return "holds code (bytearray) and was not loaded; give a file of tensors and plain values only" if unsafe else None


# The only name that torch.load allows with which a few bytes allocate and touch any amount of memory.
_BYTEARRAY = b"\nbytearray\n"


class _NumpyType:
    """numpy.dtype in a file: a type of plain numbers, of which only kind, size and byte order are kept."""

    def __init__(self, name: str, *_: object) -> None:
        if not re.fullmatch(r"[fiub]\d{1,2}", name):
            raise ValueError(f"a numpy value of type {ascii(name)[:40]}")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


def _numpy_scalar(kind: _NumpyType, data: bytes) -> float | int | bool:
    """A numpy scalar in a file, as a Python number."""
    (value,) = np.frombuffer(data, kind.dtype)
    return value.item()


# Published files have numbers of numpy beside their weights, such as the best accuracy. Numpy's own functions are not
# called for them: these two take their names.
torch.serialization.add_safe_globals([
    (_NumpyType, "numpy.dtype"), (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
])


def first_words(error: Exception) -> str:
    """The beginning of an error, in one line."""
    return " ".join(str(error).split())[:300]
