"""The grid on which everything is summed, noised and released: whole numbers.

Noise added in floating point leaves marks: which numbers can come out depends on
what went in (Mironov 2012). Here the sum is a whole number ``s`` of grid steps, and
so is the noise: ``s + rint(t N)`` equals ``rint(s + t N)``, a function of what the
Gaussian mechanism would release, so that its guarantee holds, and what can come out
is the same for every data set. Whole numbers also add up exactly, in any order.

The step is a power of two, so small that rounding all ``d`` coordinates of a vector
moves it by at most ``STEP`` of the clip norm. Those who round before they clip
(``clip_update``) pay nothing for it; a sum that is rounded afterwards pays ``STEP``
in sensitivity, which ``mechanism.py`` adds to the noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import ExitCode, FedtuneError

__all__ = ["STEP", "clip_update", "grid_of", "require_clip", "to_grid"]

STEP = 2.0**-14
"""Upper bound of grid * sqrt(d) / clip."""

MOST_COORDINATES = 1 << 30
SLACK = 1e-9  # of the clip norm, for the rounding of a norm in float64
MOST = 1 << 62  # whole sums beyond this are refused, so that int64 never wraps


def grid_of(clip: float, dimension: int) -> float:
    """Return the grid step for vectors of ``dimension`` coordinates clipped to ``clip``.

    The largest power of two with ``grid * sqrt(dimension) <= STEP * clip``.

    Raises
    ------
    FedtuneError
        When ``clip`` is not in 2^-64 to 2^64, or there are no or over 2^30 coordinates.

    Examples
    --------
    >>> grid_of(1.0, 10_000) == 2.0**-21
    True
    """
    require_clip(clip)
    if not 1 <= dimension <= MOST_COORDINATES:
        raise FedtuneError(
            f"{dimension} coordinates under one clip norm",
            hint=f"1 to {MOST_COORDINATES}",
            code=ExitCode.PRIVACY,
        )
    return math.ldexp(1.0, math.frexp(STEP * clip / math.sqrt(dimension))[1] - 1)


def require_clip(clip: float) -> None:
    """Raise unless ``clip`` is a number in 2^-64 to 2^64."""
    number = isinstance(clip, int | float) and not isinstance(clip, bool)
    if not number or not 2.0**-64 <= clip <= 2.0**64:
        raise FedtuneError(
            f"clip norm {clip!r}",
            hint="use a finite number above 0, 1e-19 to 1e19",
            code=ExitCode.PRIVACY,
        )


def to_grid(value: NDArray[Any], grid: float, name: str) -> NDArray[np.int64]:
    """Return a sum as a whole number of grid steps, same shape; int64 already is one.

    Raises
    ------
    FedtuneError
        When a number is not finite, or so large that noise could make int64 wrap.
    """
    with np.errstate(over="ignore"):
        steps = value if value.dtype == np.int64 else np.rint(value.astype(np.float64) / grid)
    # NaN compares as False, so it is refused here too
    if not bool(((steps <= MOST) & (steps >= -MOST)).all()):
        raise FedtuneError(
            f"the sum of '{name}' is not finite or beyond what its clip norm allows",
            hint="clip every contribution, and make it zero where not finite, before adding it",
            code=ExitCode.PRIVACY,
        )
    return steps.astype(np.int64)


def clip_update(
    update: Mapping[str, NDArray[Any]], clip: float, grid: float | None = None
) -> dict[str, NDArray[np.int64]]:
    """Return an update as whole grid steps whose L2 norm is at most ``clip``, exactly.

    One norm over all tensors together. An update with a NaN or an infinity anywhere
    becomes zero, as a whole, and so does one of zeros: a data-dependent error would
    tell more. The norm of the result is checked in whole numbers.

    Parameters
    ----------
    update : mapping of name to float array
        Any shapes.
    clip : float
        In the unit of the update.
    grid : float or None
        A coarser step than ``grid_of(clip, coordinates)``, a power of two. A step so coarse
        that rounding takes all the room gives zeros.

    Returns
    -------
    dict of name to int64 array
        Same names and shapes, in steps of ``grid``.

    Raises
    ------
    FedtuneError
        When there is nothing to clip, or an array does not hold floats.

    Examples
    --------
    >>> steps = clip_update({"a": np.array([3.0]), "b": np.array([[4.0]])}, clip=1.0)
    >>> grid = grid_of(1.0, 2)
    >>> [round(float(value.sum() * grid), 3) for value in steps.values()]
    [0.6, 0.8]
    >>> clip_update({"a": np.array([3.0, np.nan])}, clip=1.0)
    {'a': array([0, 0])}
    """
    size = _size_of(update)
    finest = grid_of(clip, size)
    grid = finest if grid is None else grid
    if not (math.isfinite(grid) and grid >= finest and math.frexp(grid)[0] == 0.5):
        raise FedtuneError(
            f"grid {grid!r} for a clip norm of {clip:g} over {size} coordinates",
            hint=f"use a power of two, {finest:g} or more",
            code=ExitCode.PRIVACY,
        )
    zero = {name: np.zeros(value.shape, np.int64) for name, value in update.items()}
    # not max() of Python, which a NaN passes through unseen
    peak = float(np.max([np.max(np.abs(value)) for value in update.values()]))
    if not math.isfinite(peak) or peak == 0.0:
        return zero
    # Divided by its peak nothing overflows, and the largest term is 1.
    scaled = {name: value.astype(np.float64) / peak for name, value in update.items()}
    length = math.sqrt(sum(float(np.vdot(value, value)) for value in scaled.values()))
    room = clip * (1.0 - SLACK) - grid * math.sqrt(size) / 2.0
    if room <= 0:
        return zero
    factor = min(peak, room / length) / grid
    steps = {name: np.rint(value * factor).astype(np.int64) for name, value in scaled.items()}
    norm_squared = sum(int(np.vdot(value, value)) for value in steps.values())
    if Fraction(norm_squared) > (Fraction(clip) / Fraction(grid)) ** 2:
        return zero  # not reached: the room above leaves more than rounding can take
    return steps


def _size_of(update: Mapping[str, NDArray[Any]]) -> int:
    for name, value in update.items():
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or value.size == 0:
            kind = getattr(value, "dtype", type(value).__name__)
            raise FedtuneError(
                f"update '{name}' is {kind} of {getattr(value, 'size', 0)} numbers",
                hint="an update holds arrays of floats with at least one number",
                code=ExitCode.PRIVACY,
            )
    return sum(value.size for value in update.values())
