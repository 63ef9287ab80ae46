"""Secrets in shares: any ``threshold`` of them give the secret, fewer say nothing about it.

A secret of 32 bytes is the value at 0 of a polynomial of degree ``threshold - 1`` over
the whole numbers modulo 2^521 - 1, all other coefficients drawn by the operating system;
the share of a holder is the value at its point (Shamir 1979). Whole numbers of Python are
used: their time can depend on the values, which only the process itself can see.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache

from fedtune.errors import ExitCode, FedtuneError

__all__ = ["SECRET_BYTES", "SHARE_BYTES", "combine", "split"]

PRIME = 2**521 - 1  # a Mersenne prime above every secret of 64 bytes
SHARE_BYTES = 66
SECRET_BYTES = 32


def split(secret: bytes, threshold: int, points: Sequence[int]) -> list[bytes]:
    """Return one share for each point, ``SHARE_BYTES`` bytes each.

    Parameters
    ----------
    secret : bytes
        32 bytes.
    threshold : int
        How many shares give it back, 1 to ``len(points)``.
    points : sequence of int
        One for each holder, from 1, all different.

    Raises
    ------
    FedtuneError
        The length, the threshold or the points are not as above.

    Examples
    --------
    >>> shares = split(bytes(31) + b"7", 3, [1, 2, 3, 4, 5])
    >>> combine({2: shares[1], 5: shares[4], 3: shares[2]})[-1:]
    b'7'
    >>> combine({1: bytes(66), 2: shares[1], 3: shares[2]})
    Traceback (most recent call last):
    ...
    fedtune.errors.FedtuneError: the shares at points [1, 2, 3] give no secret
    """
    if (
        len(secret) != SECRET_BYTES
        or not 1 <= threshold <= len(points)
        or len(set(points)) != len(points)
        or not all(0 < point < PRIME for point in points)
    ):
        raise FedtuneError(
            f"{threshold} of {len(points)} shares of {len(secret)} bytes",
            hint=f"a secret of {SECRET_BYTES} bytes, points from 1 that differ",
            code=ExitCode.PRIVACY,
        )
    higher = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    lowest = int.from_bytes(secret, "big")
    shares = []
    for point in points:
        value = 0
        for coefficient in higher:
            value = (value + coefficient) * point % PRIME
        shares.append(((value + lowest) % PRIME).to_bytes(SHARE_BYTES, "big"))
    return shares


def combine(shares: Mapping[int, bytes]) -> bytes:
    """Return the secret of 32 bytes from exactly its threshold of shares, by their points.

    Whether it is the right one, only something known about the secret can tell: almost
    always a share that was altered gives no secret at all.

    Raises
    ------
    FedtuneError
        A share is malformed, or they give no secret.
    """
    points = tuple(sorted(shares))
    values = [int.from_bytes(shares[point], "big") for point in points]
    if (
        not points
        or any(len(share) != SHARE_BYTES for share in shares.values())
        or any(value >= PRIME for value in values)
        or points[0] < 1
    ):
        raise _nothing(points)
    weights = _weights(points)
    found = sum(weight * value for weight, value in zip(weights, values, strict=True)) % PRIME
    if found >> (8 * SECRET_BYTES):
        raise _nothing(points)
    return found.to_bytes(SECRET_BYTES, "big")


@lru_cache(maxsize=64)
def _weights(points: tuple[int, ...]) -> tuple[int, ...]:
    """Return Lagrange's weights for the value at 0: the product of x_m / (x_m - x_j)."""
    top = 1
    for point in points:
        top = top * point % PRIME
    weights = []
    for point in points:
        below = point
        for other in points:
            if other != point:
                below = below * (other - point) % PRIME
        weights.append(top * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)


def _nothing(points: tuple[int, ...]) -> FedtuneError:
    return FedtuneError(
        f"the shares at points {list(points)} give no secret",
        hint="one of them was altered, or its dealer does not follow the protocol",
        code=ExitCode.ENGINE,
    )
