"""What the body's server holds for a while: inputs, released activations, caches, digests.

Nothing of it is needed: whatever was dropped, or lost with the process, is sent again.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedtune.split.calls import Name, Refused, Status
from fedtune.split.rows import Rows

__all__ = ["Held", "Released", "Seen", "Session", "Shelf", "nbytes_of"]

V = TypeVar("V")
_NONCE = 12
_KEY = 32


@dataclass(frozen=True)
class Held:
    """The input of a forward call, kept for the backward call of the same step."""

    hidden: torch.Tensor
    rows: Rows
    deep: torch.Tensor | None


@dataclass(frozen=True)
class Session:
    """A text that is being generated: the cache, its positions, and the last call's answer."""

    cache: Any
    held: int
    digest: bytes
    out: torch.Tensor


class Shelf(Generic[V]):
    """Things held by name; the least used goes first, and each after its time.

    Parameters
    ----------
    largest : int
        Bytes of all together; or their number, if each is put with size 1.
    seconds : float
        How long one is held after it was last used.
    touch : bool
        False: its time runs from when it was put, whoever uses it.
    clock : callable
        Seconds that only grow.
    """

    def __init__(
        self, largest: int, seconds: float, *, touch: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.largest = largest
        self.seconds = seconds
        self._touch = touch
        self._clock = clock
        self._size = 0
        self._lock = threading.Lock()
        self._found: OrderedDict[Hashable, tuple[V, int, float]] = OrderedDict()

    def put(self, key: Hashable, value: V, size: int) -> None:
        """Hold something; one that is larger than the shelf is not held."""
        with self._lock:
            self._drop(key)
            if size > self.largest:
                return
            self._found[key] = (value, size, self._clock() + self.seconds)
            self._size += size
            while self._size > self.largest:
                self._drop(next(iter(self._found)))

    def get(self, key: Hashable) -> V | None:
        """Return what is held under this name, if anything is."""
        with self._lock:
            found = self._found.get(key)
            if found is None:
                return None
            value, size, until = found
            now = self._clock()
            if until <= now:
                self._drop(key)
                return None
            self._found[key] = (value, size, now + self.seconds if self._touch else until)
            self._found.move_to_end(key)
            return value

    def pop(self, key: Hashable) -> V | None:
        """Return what is held, and hold it no longer."""
        value = self.get(key)
        with self._lock:
            self._drop(key)
        return value

    def sweep(self) -> None:
        """Drop everything whose time is over."""
        now = self._clock()
        with self._lock:
            for key in [key for key, one in self._found.items() if one[2] <= now]:
                self._drop(key)

    def __len__(self) -> int:
        return len(self._found)

    @property
    def size(self) -> int:
        """Return the bytes of all that is held."""
        return self._size

    def _drop(self, key: Hashable) -> None:
        gone = self._found.pop(key, None)
        if gone is not None:
            self._size -= gone[1]


class Seen:
    """The digests of calls that were answered: a repeated call must be the same one.

    Parameters
    ----------
    seconds : float
        How long a client's calls are remembered after its last one.
    each : int
        Calls remembered of one client: those before are not repeated any more.
    clients : int
        Clients remembered.
    """

    def __init__(self, seconds: float, *, each: int = 64, clients: int = 1 << 12) -> None:
        self._each = each
        self._lock = threading.Lock()
        self._shelf: Shelf[OrderedDict[tuple[str, int], bytes]] = Shelf(clients, seconds)

    def check(self, name: Name, digest: bytes) -> None:
        """Remember a call, or refuse one whose name stands for another.

        Raises
        ------
        Refused
            ABORTED.
        """
        place, call = (name.run, name.client), (name.step, name.part)
        with self._lock:
            calls = self._shelf.get(place)
            if calls is None:
                calls = OrderedDict()
                self._shelf.put(place, calls, 1)
            if calls.setdefault(call, digest) != digest:
                raise Refused(
                    Status.ABORTED,
                    f"step '{name.step}' of client '{name.client}' was called with other numbers",
                    "every step needs a name of its own",
                )
            while len(calls) > self._each:
                calls.popitem(last=False)

    def sweep(self) -> None:
        """Forget clients that have not called for long."""
        self._shelf.sweep()


@dataclass(frozen=True)
class _Sealed:
    dtype: torch.dtype
    shape: tuple[int, ...]
    data: bytes


class Released:
    """Activations that are sent once in a run: AES-256-GCM, with a key that is not kept.

    Parameters
    ----------
    largest : int
        Bytes held, of all clients together.
    seconds : float
        An activation's lifetime, from when it was sent.
    clock : callable
    """

    def __init__(
        self, largest: int, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.shelf: Shelf[_Sealed] = Shelf(largest, seconds, touch=False, clock=clock)

    def put(self, run: str, client: str, key: bytes, example: int, values: torch.Tensor) -> None:
        """Hold an example's activations, shape (positions, d), encrypted."""
        name = _named(run, client, key, example)
        raw = values.contiguous().cpu()
        plain = raw.reshape(-1).view(torch.uint8).numpy().tobytes() if raw.numel() else b""
        nonce = os.urandom(_NONCE)
        data = nonce + AESGCM(key).encrypt(nonce, plain, repr(name[:3]).encode())
        self.shelf.put(name, _Sealed(raw.dtype, tuple(raw.shape), data), len(data))

    def get(self, run: str, client: str, key: bytes, example: int) -> torch.Tensor | None:
        """Return an example's activations; None with another key or after their time."""
        name = _named(run, client, key, example)
        found = self.shelf.get(name)
        if found is None:
            return None
        nonce, data = found.data[:_NONCE], found.data[_NONCE:]
        try:
            plain = AESGCM(key).decrypt(nonce, data, repr(name[:3]).encode())
        except InvalidTag:
            return None
        if not plain:
            return torch.empty(found.shape, dtype=found.dtype)
        flat = torch.from_numpy(np.frombuffer(bytearray(plain), np.uint8)).view(found.dtype)
        return flat.reshape(found.shape)


def nbytes_of(*tensors: torch.Tensor | None) -> int:
    """Return the bytes that tensors take."""
    return sum(one.numel() * one.element_size() for one in tensors if one is not None)


def _named(run: str, client: str, key: bytes, example: int) -> tuple[str, str, int, bytes]:
    if len(key) != _KEY:
        raise Refused(Status.INVALID_ARGUMENT, f"a key of {len(key)} bytes", f"send {_KEY}")
    return run, client, example, hashlib.sha256(b"fedtune release" + key).digest()[:16]
