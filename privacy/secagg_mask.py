"""Masks: keys that two members share, and the stream of numbers that each key stands for.

Two members agree on a secret by X25519; HKDF-SHA256 makes of it a key of 256 bits for
this pair in this attempt only; AES-256 in counter mode makes of that as many uint32
(little-endian) as are masked. A key is used for one stream; its first block is number 2,
as in GCM, so that OpenSSL's code for GCM can make the same stream. On processors with wide
AES instructions that is faster by a fifth, on others slower: the faster one is used.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedtune.errors import ExitCode, FedtuneError

__all__ = [
    "KEY_BYTES",
    "MODES",
    "add_masks",
    "derive",
    "faster",
    "mask_key",
    "seal_key",
    "self_key",
]

KEY_BYTES = 32  # AES-256
CHUNK = 1 << 18  # bytes: stream, vector and zeros stay in the cache together
AT_ONCE = 64  # streams that are open at a time
_FIRST = bytes(15) + b"\2"
_ZEROS = bytes(CHUNK)

_Mode = Callable[[], modes.CTR | modes.GCM]
MODES: dict[str, _Mode] = {
    "ctr": lambda: modes.CTR(_FIRST),
    "gcm": lambda: modes.GCM(bytes(12)),  # without its tag; blocks are counted to 2^32
}


def derive(secret: bytes, salt: bytes, label: str, *names: str) -> bytes:
    """Return a key of 32 bytes for one purpose: HKDF-SHA256 (RFC 5869).

    Every name goes in with its length, so that no two lists of names read the same.

    Examples
    --------
    >>> derive(bytes(32), b"salt", "fedtune/mask/v1", "a", "b").hex()[:16]
    '838000e28da6eafd'
    """
    parts = [name.encode() for name in names]
    info = label.encode() + b"".join(len(part).to_bytes(2, "big") + part for part in parts)
    return HKDF(hashes.SHA256(), KEY_BYTES, salt, info).derive(secret)


def mask_key(own: X25519PrivateKey, other: bytes, salt: bytes, names: tuple[str, str]) -> bytes:
    """Return the key of the mask between two members; the order of names does not matter."""
    return derive(_agree(own, other, names), salt, "fedtune/mask/v1", min(names), max(names))


def seal_key(own: X25519PrivateKey, other: bytes, salt: bytes, sender: str, receiver: str) -> bytes:
    """Return the key under which ``sender`` seals its shares for ``receiver``."""
    return derive(_agree(own, other, (sender, receiver)), salt, "fedtune/seal/v1", sender, receiver)


def self_key(seed: bytes, salt: bytes, name: str) -> bytes:
    """Return the key of the mask that a member puts on by itself."""
    return derive(seed, salt, "fedtune/self/v1", name)


def add_masks(vector: NDArray[np.uint32], streams: Sequence[tuple[bytes, bool]]) -> None:
    """Add or subtract the streams of keys, modulo 2^32, in place.

    Parameters
    ----------
    vector : uint32 array
        Shape (length,), contiguous; it is changed.
    streams : sequence of (key, subtract)
        Keys of 32 bytes, and whether their stream is subtracted.

    Raises
    ------
    FedtuneError
        A key has another length, or the vector is not one that can be changed in place.

    Examples
    --------
    >>> vector = np.zeros(3, np.uint32)
    >>> add_masks(vector, [(bytes(32), False)])
    >>> vector
    array([1027647438, 1852530765, 3552923143], dtype=uint32)
    >>> add_masks(vector, [(bytes(32), True)])
    >>> vector
    array([0, 0, 0], dtype=uint32)
    """
    if any(len(key) != KEY_BYTES for key, _ in streams):
        raise FedtuneError(
            "a key of another length", hint=f"{KEY_BYTES} bytes", code=ExitCode.PRIVACY
        )
    usable = vector.dtype == np.uint32 and vector.ndim == 1 and vector.flags.c_contiguous
    if not usable or not vector.flags.writeable:
        raise FedtuneError(
            f"cannot mask {vector.dtype} of shape {vector.shape} in place",
            hint="give a contiguous uint32 vector that may be written",
            code=ExitCode.PRIVACY,
        )
    mode = MODES[faster()]
    buffer = bytearray(CHUNK + 15)  # what update_into asks for beyond its input
    stream = np.frombuffer(buffer, dtype="<u4", count=CHUNK // 4)
    for first in range(0, len(streams), AT_ONCE):
        some = [
            (Cipher(algorithms.AES(key), mode()).encryptor(), subtract)
            for key, subtract in streams[first : first + AT_ONCE]
        ]
        for start in range(0, len(vector), CHUNK // 4):
            part = vector[start : start + CHUNK // 4]
            here, zeros = stream[: len(part)], memoryview(_ZEROS)[: 4 * len(part)]
            for cipher, subtract in some:
                cipher.update_into(zeros, buffer)
                (np.subtract if subtract else np.add)(part, here, out=part)


@cache
def faster() -> str:
    """Return which of ``MODES`` makes the stream in less time here; both make the same."""
    buffer, taken = bytearray(CHUNK + 15), {}
    for name, mode in MODES.items():
        cipher, best = Cipher(algorithms.AES(bytes(KEY_BYTES)), mode()).encryptor(), math.inf
        for _ in range(5):
            started = time.perf_counter()
            cipher.update_into(_ZEROS, buffer)
            best = min(best, time.perf_counter() - started)
        taken[name] = best
    return min(taken, key=taken.__getitem__)


def _agree(own: X25519PrivateKey, other: bytes, names: tuple[str, str]) -> bytes:
    try:
        return own.exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError as error:  # a point that gives everybody the same secret
        raise FedtuneError(
            f"'{names[0]}' and '{names[1]}' cannot agree on a key",
            hint="the X25519 key of one of them is no proper one: it breaks the protocol",
            code=ExitCode.SIGNATURE,
        ) from error
