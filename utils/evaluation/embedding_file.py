"""Embeddings of one evaluation set in a file, so that large sets need little memory and an interrupted run continues.

The file has a header of 4 KiB, in JSON, with what the embeddings depend on, and then a record per image: a CRC-32, and
the float32 values as the backbone gave them. A record counts only if its CRC-32 is right. So a process or a machine may
stop at any instant, and no damaged value is used.

Shapes: N images, d embedding size.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import stat
import zlib
from collections.abc import Mapping

import numpy as np
from torch import nn

from utils.errors import UserError

_MAGIC, _HEADER_BYTES = b'{"arcface embeddings": 1, ', 4096
_BLOCK = 2**13  # records that are checked at a time


def default_directory() -> str:
    """Where the files are, unless --embeddings names another directory: among the user's caches."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(caches, "arcface", "embeddings")


def backbone_fingerprint(backbone: nn.Module) -> str:
    """A hash of the backbone's modules, and of its weights and statistics bit by bit."""
    digest = hashlib.blake2b(str(backbone).encode(), digest_size=16)
    for name, tensor in backbone.state_dict().items():
        array = tensor.detach().cpu().contiguous().reshape(-1).numpy()
        digest.update(f"{name} {array.dtype} {tuple(tensor.shape)}".encode())
        digest.update(array.view(np.uint8).data)
    return digest.hexdigest()


class EmbeddingFile:
    """float32 (N, d) in a file. `file[a:b]` reads rows.

    made_from: what the embeddings depend on, as strict JSON. A file that was made from anything else is emptied.
    Raises UserError if the file cannot be written, is another kind of file, or is in use; and, when an image is written
    or read, for an error of the disk.
    """

    def __init__(self, path: str, count: int, size: int, made_from: Mapping[str, object], flag: str = "--embeddings",
                 *, shared: bool = False) -> None:
        """shared: another process has created the file, from the same, and holds its lock."""
        self.path, self.shape, self._flag = path, (count, size), flag
        self._record = np.dtype([("crc", "<u4"), ("row", "<f4", (size,))])
        self._descriptor = -1
        header = _MAGIC + json.dumps({"images": count, "size": size, **made_from}, sort_keys=True)[1:].encode()
        header = header.ljust(_HEADER_BYTES - 1) + b"\n"
        assert len(header) == _HEADER_BYTES
        total = _HEADER_BYTES + count * self._record.itemsize
        try:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            # O_NOFOLLOW: what a link names would be overwritten.
            flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | (0 if shared else os.O_CREAT)
            self._descriptor = os.open(path, flags, 0o666)
            if not shared:
                self._lock()
            if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                raise OSError(errno.EINVAL, "it is a device or a pipe, not a file")
            found = os.pread(self._descriptor, _HEADER_BYTES, 0)
            if found and not found.startswith(_MAGIC):
                raise UserError(f"{flag}: {path}: is no file of embeddings; remove it, or give another directory")
            if (found, os.fstat(self._descriptor).st_size) != (header, total):
                if shared:
                    raise FileNotFoundError(errno.ENOENT, "there is another file")
                os.ftruncate(self._descriptor, 0)
                self._write(header, 0)
                self._reserve(total)
        except (OSError, UserError) as error:
            self.close()
            if shared and isinstance(error, FileNotFoundError):
                raise UserError(f"{flag}: {path}: is not the file that the first process created; give a directory on "
                                "a disk that all nodes share") from None
            raise (self._error(error) if isinstance(error, OSError) else error) from None

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self._flag}: {self.path}: another process is writing there; wait for it, or give "
                            "another directory") from None
        except OSError:
            pass  # a file system without locks

    def _reserve(self, total: int) -> None:
        try:
            os.posix_fallocate(self._descriptor, 0, total)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                os.ftruncate(self._descriptor, 0)
                raise OSError(error.errno, f"it needs {total:,} bytes: {error.strerror}") from None
            os.ftruncate(self._descriptor, total)  # a file system that cannot reserve room

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows a:b, float32 (b - a, d), as they were written."""
        return self._records(*rows.indices(len(self))[:2])["row"]

    def missing(self) -> np.ndarray:
        """The numbers of the images without an intact record: int64, rising."""
        missing = []
        for start in range(0, len(self), _BLOCK):
            records = self._records(start, min(start + _BLOCK, len(self)))
            missing += [i for i, (crc, row) in enumerate(zip(records["crc"].tolist(), records["row"]), start)
                        if crc == 0 or zlib.crc32(row.tobytes(), i) != crc]
        return np.array(missing, dtype=np.int64)

    def write(self, images: np.ndarray, rows: np.ndarray) -> None:
        """Store float32 (n, d), the embeddings of the images with these rising numbers."""
        records = np.empty(len(images), self._record)
        records["row"] = rows
        records["crc"] = [zlib.crc32(row.tobytes(), i) for i, row in zip(images.tolist(), records["row"])]
        ends = np.flatnonzero(np.diff(images, append=-1) != 1) + 1  # of runs of consecutive images
        try:
            for first, end in zip([0, *ends[:-1].tolist()], ends.tolist()):
                self._write(records[first:end].tobytes(), self._offset(int(images[first])))
        except OSError as error:
            raise self._error(error) from None

    def close(self) -> None:
        """Give the file free for other processes."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _offset(self, image: int) -> int:
        return _HEADER_BYTES + image * self._record.itemsize

    def _write(self, data: bytes, offset: int) -> None:
        while data:
            written = os.pwrite(self._descriptor, data, offset)
            data, offset = data[written:], offset + written

    def _records(self, start: int, end: int) -> np.ndarray:
        try:
            data = bytearray()
            while need := (end - start) * self._record.itemsize - len(data):
                part = os.pread(self._descriptor, need, self._offset(start) + len(data))
                if not part:
                    raise OSError(errno.EIO, "it has become shorter")
                data += part
        except OSError as error:
            raise self._error(error) from None
        return np.frombuffer(data, self._record)

    def _error(self, error: OSError) -> UserError:
        if error.errno == errno.ELOOP:
            return UserError(f"{self._flag}: {self.path}: is a link; remove it, or give another directory")
        return UserError(f"{self._flag}: {self.path}: cannot be used ({error.strerror or error}); give another "
                         "directory")
