"""Coefficients on the wire: whole numbers and one scale, or only the changed ones.

``a_k = q_k * scale`` in float32, so that every party reads the same bits. Upwards the
rounding is random and without bias; what the server broadcasts is rounded to the
nearest, and everybody, the server included, uses the rounded numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import ExitCode, FedtuneError

__all__ = ["COEFFICIENTS", "MOST_SLOPE", "Packed", "from_wire", "pack", "to_wire", "unpack"]

COEFFICIENTS = "coefficients"
"""Name of a vector of coefficients where tensors have names: float32, shape (K,)."""

MOST_SLOPE = 1000.0
"""FedKSeed-Pro: main.py of the published code clips a slope here before its history."""

_TYPES: dict[int, Any] = {8: np.int8, 16: np.int16}
_SPARSE_BELOW = 0.5
_LARGEST, _SMALLEST = 1e9, 1e-35


@dataclass(frozen=True)
class Packed:
    """A coefficient vector as it travels.

    Attributes
    ----------
    values : ndarray, shape (K,)
        int8, int16, or float32 with scale 1.
    scale : float
        Exactly a float32.
    """

    values: NDArray[Any]
    scale: float


def pack(
    coefficients: NDArray[np.floating], bits: int, rng: np.random.Generator | None = None
) -> Packed:
    """Round a vector to ``bits``: at random without bias, or to the nearest without ``rng``.

    Raises
    ------
    FedtuneError
        A coefficient is not finite, or so large that its scale would not be.

    Examples
    --------
    >>> packed = pack(np.array([1.0, -0.5, 0.0]), 8)
    >>> packed.values.tolist(), round(packed.scale, 6)
    ([127, -64, 0], 0.007874)
    >>> [f"{value:.3f}" for value in unpack(packed)]
    ['1.000', '-0.504', '0.000']
    """
    a = np.asarray(coefficients, dtype=np.float64)
    if a.ndim != 1 or not bool(np.isfinite(a).all()) or float(np.abs(a).max(initial=0)) > _LARGEST:
        raise _refused(
            f"coefficients of shape {a.shape} hold NaN, infinity, or more than {_LARGEST:g}"
        )
    if bits == 32:
        return Packed(a.astype(np.float32), 1.0)
    kind = _TYPES[bits]
    most = int(np.iinfo(kind).max)
    scale = np.float32(np.abs(a).max(initial=0.0) / most)
    if scale < _SMALLEST:  # too close to where float32 loses its digits
        return Packed(np.zeros(a.shape, kind), 0.0)
    steps = a / np.float64(scale)
    whole = np.rint(steps) if rng is None else np.floor(steps + rng.random(a.shape))
    return Packed(np.clip(whole, -most, most).astype(kind), float(scale))


def unpack(packed: Packed) -> NDArray[np.float32]:
    """Return the coefficients; the same bits everywhere."""
    found: NDArray[np.float32] = packed.values.astype(np.float32) * np.float32(packed.scale)
    return found


def to_wire(packed: Packed) -> dict[str, NDArray[Any]]:
    """Return named arrays: ``a`` and ``scale``, and ``at`` when only the changed ones go.

    Examples
    --------
    >>> values = np.zeros(8, np.int16); values[5] = 3
    >>> {name: part.tolist() for name, part in to_wire(Packed(values, 0.5)).items()}
    {'a': [3], 'scale': [0.5], 'at': [5]}
    """
    values, scale = packed.values, np.array([packed.scale], np.float32)
    changed = np.flatnonzero(values)
    index = np.uint16  # pools have at most 65,536 directions
    sparse = len(changed) * (values.itemsize + 2) < _SPARSE_BELOW * values.nbytes
    if sparse:
        return {"a": values[changed], "scale": scale, "at": changed.astype(index)}
    return {"a": values, "scale": scale}


def from_wire(arrays: Mapping[str, NDArray[Any]], size: int) -> Packed:
    """Undo ``to_wire`` for a vector of ``size``; trusts nothing.

    Raises
    ------
    FedtuneError
        Wrong names, types or shapes, indices that are not ascending and in range, or a
        scale that is no scale.
    """
    values, scale, at = arrays.get("a"), arrays.get("scale"), arrays.get("at")
    if values is None or scale is None or set(arrays) - {"a", "scale", "at"}:
        raise _refused(f"coefficients have the parts {sorted(arrays)[:5]}")
    if values.dtype not in (np.int8, np.int16, np.float32) or values.ndim != 1:
        raise _refused(f"coefficients are {values.dtype} of shape {values.shape}")
    if scale.dtype != np.float32 or scale.shape != (1,) or not 0 <= scale[0] <= _LARGEST:
        raise _refused(f"the scale of coefficients is {scale}")
    if values.dtype == np.float32 and not bool((np.abs(values) <= _LARGEST).all()):
        raise _refused(f"a coefficient is not finite or above {_LARGEST:g}")
    if at is not None:
        good = at.dtype == np.uint16 and at.shape == values.shape
        good = good and bool((np.diff(at.astype(np.int64), prepend=-1) > 0).all())
        if not good or (at.size and int(at[-1]) >= size):
            raise _refused("the places of coefficients are not ascending and in the pool")
        dense = np.zeros(size, values.dtype)
        dense[at] = values
        values = dense
    if values.shape != (size,):
        raise _refused(f"{values.shape[0]} coefficients for a pool of {size}")
    return Packed(values, float(scale[0]))


def _refused(what: str) -> FedtuneError:
    return FedtuneError(what, hint="the peer is broken or lies", code=ExitCode.ENGINE)
