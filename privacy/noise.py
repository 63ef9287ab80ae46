"""Where privacy noise comes from: the operating system's entropy, through AES-256-CTR.

Every call takes a fresh 256-bit key from the operating system. There is then no
state that a copy, a fork, a retry, a restored checkpoint or a second thread could
play again, and nothing that a seed of numpy or torch could change. Noise that
repeats is no noise: the difference of two releases would be exact (Holohan 2023,
arXiv 2307.03543).

Known limits. A normal number has 52 random bits in its radius and 52 in its angle,
so that it never exceeds 8.6 standard deviations (a probability of 1e-17 is missing
beyond), and a rounded one is not an exact sampler of the rounded Gaussian. The
floating-point pattern that remains is hidden by the lattice of ``lattice.py``.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedtune.errors import ExitCode, FedtuneError

__all__ = ["InsecureSeededNoise", "NoiseSource", "SecureNoise"]

BLOCK = 1 << 14  # 64-bit words at a time: input, output and uniforms stay in the cache
KEY = 32  # bytes, AES-256
ZERO_IV = bytes(16)  # a key is used for one stream only


class NoiseSource(Protocol):
    """What sampling and mechanisms draw from."""

    @property
    def name(self) -> str:
        """Say in the report what this is."""

    @property
    def secure(self) -> bool:
        """Say whether nobody can predict or repeat it."""

    def normal(self, n: int) -> NDArray[np.float64]:
        """Return independent standard normal numbers, shape (n,)."""

    def uniform(self, n: int) -> NDArray[np.float64]:
        """Return independent uniform numbers above 0 and below 1, shape (n,)."""

    def integers(self, n: int, below: int) -> NDArray[np.int64]:
        """Return independent uniform integers in [0, below), shape (n,)."""


@dataclass(frozen=True)
class SecureNoise:
    """Noise from the operating system's entropy. It has no seed and keeps no state.

    Over 20 million normal numbers per second on one core with AES instructions.

    Examples
    --------
    >>> source = SecureNoise()
    >>> source.secure, source.normal(1000).shape
    (True, (1000,))
    >>> bool((source.normal(8) == source.normal(8)).any())
    False
    """

    name: str = field(default="os-entropy-aes256-ctr", init=False)
    secure: bool = field(default=True, init=False)

    def normal(self, n: int) -> NDArray[np.float64]:
        """Return independent standard normal numbers, shape (n,)."""
        return _normal(os.urandom(KEY), n)

    def uniform(self, n: int) -> NDArray[np.float64]:
        """Return independent uniform numbers above 0 and below 1, shape (n,)."""
        return _uniform(os.urandom(KEY), n)

    def integers(self, n: int, below: int) -> NDArray[np.int64]:
        """Return independent uniform integers in [0, below), shape (n,)."""
        return _integers(os.urandom(KEY), n, below)


@dataclass(frozen=True)
class InsecureSeededNoise:
    """The same numbers for the same seed: **no privacy** against who knows or guesses it.

    For tests and for repeating an experiment. Calls with one object continue its
    stream; a second object with the same seed starts it again.

    Examples
    --------
    >>> one, two = InsecureSeededNoise(7), InsecureSeededNoise(7)
    >>> bool((one.normal(5) == two.normal(5)).all()), one.secure
    (True, False)
    """

    seed: int
    name: str = field(default="insecure-seeded", init=False)
    secure: bool = field(default=False, init=False)
    _calls: Iterator[int] = field(
        default_factory=itertools.count, init=False, repr=False, compare=False
    )

    def normal(self, n: int) -> NDArray[np.float64]:
        """Return independent standard normal numbers, shape (n,)."""
        return _normal(self._key(), n)

    def uniform(self, n: int) -> NDArray[np.float64]:
        """Return independent uniform numbers above 0 and below 1, shape (n,)."""
        return _uniform(self._key(), n)

    def integers(self, n: int, below: int) -> NDArray[np.int64]:
        """Return independent uniform integers in [0, below), shape (n,)."""
        return _integers(self._key(), n, below)

    def _key(self) -> bytes:
        text = f"fedtune insecure noise {self.seed} {next(self._calls)}"
        return hashlib.blake2b(text.encode(), digest_size=KEY).digest()


def _words(key: bytes, n: int) -> Iterator[NDArray[np.uint64]]:
    """Yield random words without end, in pieces; each overwrites the one before.

    A piece has BLOCK words, or fewer where ``n`` are enough; always an even number.
    """
    length = max(2, min(BLOCK, n + n % 2))
    cipher = Cipher(algorithms.AES(key), modes.CTR(ZERO_IV)).encryptor()
    zeros = bytes(8 * length)
    out = bytearray(8 * length + 15)  # update_into asks for room for one more block
    words = np.frombuffer(out, dtype="<u8", count=length)
    while True:
        cipher.update_into(zeros, out)
        yield words


def _to_uniform(words: NDArray[np.uint64], out: NDArray[np.float64]) -> None:
    """Write odd multiples of 2^-53: exact, symmetric around 1/2, never 0 and never 1."""
    np.right_shift(words, np.uint64(11), out=words)
    np.bitwise_or(words, np.uint64(1), out=words)
    np.multiply(words.view(np.int64), 2.0**-53, out=out)


def _uniform(key: bytes, n: int) -> NDArray[np.float64]:
    _require_count(n)
    found = np.empty(n)
    room = np.empty(BLOCK)
    for start, words in zip(range(0, n, BLOCK), _words(key, n), strict=False):
        u = room[: len(words)]
        _to_uniform(words, u)
        found[start : start + BLOCK] = u[: n - start]
    return found


def _normal(key: bytes, n: int) -> NDArray[np.float64]:
    """Box and Muller 1958: sqrt(-2 log u) (cos 2 pi v, sin 2 pi v) from two uniforms."""
    _require_count(n)
    found = np.empty(n)
    room = np.empty(BLOCK)
    for start, words in zip(range(0, n, BLOCK), _words(key, n), strict=False):
        u = room[: len(words)]
        _to_uniform(words, u)
        radius, angle = np.split(u, 2)
        np.log(radius, out=radius)
        radius *= -2.0
        np.sqrt(radius, out=radius)
        angle *= 2.0 * np.pi
        sine = np.sin(angle)
        np.cos(angle, out=angle)
        sine *= radius
        angle *= radius
        piece = found[start : start + BLOCK]
        half = min(len(angle), len(piece))
        piece[:half] = angle[:half]
        piece[half:] = sine[: len(piece) - half]
    return found


def _integers(key: bytes, n: int, below: int) -> NDArray[np.int64]:
    """Uniform without bias: words past the last whole multiple of ``below`` are drawn again."""
    _require_count(n)
    if isinstance(below, bool) or not isinstance(below, int) or not 0 < below <= 1 << 62:
        raise FedtuneError(f"integers below {below!r}", hint="use 1 to 2^62", code=ExitCode.PRIVACY)
    last = np.uint64((1 << 64) // below * below - 1)
    found = np.empty(n, dtype=np.int64)
    have = 0
    for word in _words(key, n):
        if have == n:
            break
        kept = (word[word <= last] % np.uint64(below)).view(np.int64)[: n - have]
        found[have : have + len(kept)] = kept
        have += len(kept)
    return found


def _require_count(n: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 0:
        raise FedtuneError(f"{n!r} random numbers", hint="0 or more", code=ExitCode.PRIVACY)
