"""The secret of a run, which keeps strangers out of the store in which its processes meet.

The environment variable ARCFACE_SECRET holds it, the same on all nodes. Keys of the store begin with a prefix that
follows from it, and the values that the nodes exchange are signed with it: what others write is ignored. Without the
variable the secret is empty, and protects nothing. A run of one node draws its own. The connections that gloo and NCCL
make themselves are not protected.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
from typing import Any

import torch.distributed as dist

VARIABLE = "ARCFACE_SECRET"
_SIGNATURE = 64  # characters


def read_secret() -> bytes:
    return os.fsencode(os.environ.get(VARIABLE, ""))


def _sign(secret: bytes, *words: str) -> str:
    return hmac.new(secret, "\0".join(words).encode(), "sha256").hexdigest()


def draw_secret() -> None:
    """Give this process, and those that it starts, a secret, unless it has one."""
    if not os.environ.get(VARIABLE):
        os.environ[VARIABLE] = secrets.token_hex(32)


def private_keys(name: str, store: dist.Store, secret: bytes) -> dist.Store:
    """The part `name` of the store, whose keys only those who know the secret can guess."""
    return dist.PrefixStore(_sign(secret, "keys", name), store)


class SignedStore:
    """Values that JSON can hold, signed. What is missing, junk or forged reads as None. No call waits for a key."""

    def __init__(self, store: dist.Store, secret: bytes) -> None:
        self._store, self._secret = private_keys("nodes", store, secret), secret

    def set(self, key: str, value: Any) -> None:
        self._store.set(key, self._signed(key, value))

    def get(self, key: str) -> Any:
        return self._verified(key, self._store.compare_set(key, "", ""))  # unlike get, for a missing key too

    def claim(self, key: str, value: Any) -> Any:
        """Set the key if there is none yet. Returns what it holds."""
        return self._verified(key, self._store.compare_set(key, "", self._signed(key, value)))

    def _signed(self, key: str, value: Any) -> str:
        text = json.dumps(value)
        return _sign(self._secret, key, text) + text

    def _verified(self, key: str, content: bytes) -> Any:
        signature, text = content[:_SIGNATURE], content[_SIGNATURE:].decode(errors="replace")
        if not hmac.compare_digest(signature, _sign(self._secret, key, text).encode()):
            return None
        with contextlib.suppress(ValueError, RecursionError):  # Without a secret anyone can sign.
            return json.loads(text)
        return None
