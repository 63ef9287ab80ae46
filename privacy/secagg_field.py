"""Whole numbers as they are summed in secret: modulo 2^32, and back with their signs.

A sum modulo 2^32 is right only where the true sum fits: with ``n`` members it must lie
within 2^31 either way, noise included (Kairouz et al. 2021, arXiv 2102.06387, on the
wrap of a noisy sum).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import ExitCode, FedtuneError

__all__ = ["from_field", "tail_of", "to_field"]

HALF = 1 << 31


def to_field(steps: NDArray[np.int64], cohort: int, most_abs: int) -> NDArray[np.uint32]:
    """Return whole numbers modulo 2^32, ready to be masked.

    Parameters
    ----------
    steps : int64 array
        Any shape: one member's contribution, its noise included.
    cohort : int
        Most members whose contributions are added up.
    most_abs : int
        Bound on every number of every member, noise included: what a clip norm allows,
        plus ``tail_of`` the noise.

    Returns
    -------
    uint32 array
        Same shape.

    Raises
    ------
    FedtuneError
        ``cohort * most_abs`` does not stay below 2^31, or a number is beyond ``most_abs``.
        The number is not shown: it is somebody's data.

    Examples
    --------
    >>> field = to_field(np.array([-3, 5]), cohort=10, most_abs=100)
    >>> field, from_field(field + field)
    (array([4294967293,          5], dtype=uint32), array([-6, 10]))
    >>> to_field(np.array([1]), cohort=8, most_abs=2**28)
    Traceback (most recent call last):
    ...
    fedtune.errors.FedtuneError: 8 members of at most 268435456 steps may wrap at 2^31
    """
    if cohort < 1 or most_abs < 0 or cohort * most_abs >= HALF:
        raise FedtuneError(
            f"{cohort} members of at most {most_abs} steps may wrap at 2^31",
            hint="use a coarser grid, less noise or a smaller cohort",
            code=ExitCode.PRIVACY,
        )
    if steps.dtype != np.int64:
        raise FedtuneError(f"steps are {steps.dtype}", hint="use int64", code=ExitCode.PRIVACY)
    # not abs(), of which the lowest int64 comes out negative
    if steps.size and not (steps.max() <= most_abs and steps.min() >= -most_abs):
        raise FedtuneError(
            f"a number is beyond the agreed {most_abs} steps",
            hint="clip before masking; is the noise as agreed?",
            code=ExitCode.PRIVACY,
        )
    return steps.astype(np.uint32)


def from_field(total: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Return a sum modulo 2^32 with its signs: numbers in [-2^31, 2^31), same shape.

    Raises
    ------
    FedtuneError
        It is not uint32.
    """
    if total.dtype != np.uint32:
        raise FedtuneError(f"the sum is {total.dtype}", hint="use uint32", code=ExitCode.PRIVACY)
    return np.ascontiguousarray(total).view(np.int32).astype(np.int64)


def tail_of(scale: float, length: int, bits: int = 40) -> int:
    """Return what rounded Gaussian noise stays within, but with chance ``2^-bits``.

    For all of ``length`` numbers together, by the union bound over
    ``P(|N| > x) <= exp(-x^2 / 2)`` for a standard normal N.

    Parameters
    ----------
    scale : float
        Standard deviation in grid steps.
    length : int
        Numbers drawn.
    bits : int
        Minus the binary logarithm of the chance that one is beyond.

    Raises
    ------
    FedtuneError
        ``scale`` is negative or not finite, or ``length`` or ``bits`` is below 1.

    Examples
    --------
    >>> tail_of(1000.0, 1_000_000)
    9116
    """
    if not (math.isfinite(scale) and scale >= 0.0 and length >= 1 and bits >= 1):
        raise FedtuneError(
            f"scale={scale}, length={length}, bits={bits}",
            hint="a finite scale from 0, a length and bits from 1",
            code=ExitCode.PRIVACY,
        )
    return math.ceil(scale * math.sqrt(2.0 * (math.log(length) + bits * math.log(2.0)))) + 1
