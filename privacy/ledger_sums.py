"""Renyi divergences added up, as a ledger keeps them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy import accounting
from fedtune.privacy.events import Event, Relation

__all__ = ["EMPTY", "Sum", "no_bound", "orders_id", "summed"]


@dataclass(frozen=True)
class Sum:
    """One number for each order of ``accounting.ORDERS``.

    Infinite terms are counted beside the sum, so that taking one back (an abort)
    leaves what was there before. Every step rounds up.

    Attributes
    ----------
    finite, infinite : NDArray
        Shape ``(len(ORDERS),)``: the sum of the finite terms, how many were infinite.
    """

    finite: NDArray[np.float64]
    infinite: NDArray[np.int64]

    @property
    def vector(self) -> NDArray[np.float64]:
        """The sum, shape ``(len(ORDERS),)``."""
        return np.where(self.infinite > 0, np.inf, self.finite)

    def plus(self, event: Event, count: int, relation: Relation) -> Sum:
        """Return the sum with ``count`` more of an event; fewer when negative."""
        each = _each(event, relation)
        bounded = np.isfinite(each)
        moved = np.nextafter(self.finite + count * np.where(bounded, each, 0.0), np.inf)
        finite = np.where(bounded, np.maximum(moved, 0.0), self.finite)
        return Sum(finite, self.infinite + count * (~bounded).astype(np.int64))

    def close_to(self, other: Sum) -> bool:
        """Return whether both are the same but for rounding."""
        near = np.allclose(self.finite, other.finite, rtol=1e-9, atol=1e-9)
        return bool(near) and bool((self.infinite == other.infinite).all())

    def to_bytes(self) -> tuple[bytes, bytes]:
        """Return both halves, little-endian."""
        return self.finite.astype("<f8").tobytes(), self.infinite.astype("<i8").tobytes()

    @staticmethod
    def from_bytes(finite: bytes, infinite: bytes) -> Sum:
        """Read what ``to_bytes`` wrote; raise for anything else."""
        size = 8 * len(accounting.ORDERS)
        if len(finite) == size and len(infinite) == size:
            numbers = np.frombuffer(finite, "<f8").astype(np.float64)
            counts = np.frombuffer(infinite, "<i8").astype(np.int64)
            if bool(np.isfinite(numbers).all() and (numbers >= 0).all() and (counts >= 0).all()):
                return Sum(numbers, counts)
        raise FedtuneError(
            "the ledger's sum is damaged", hint="fedtune budget verify", code=ExitCode.LEDGER
        )


EMPTY = Sum(
    np.zeros(len(accounting.ORDERS), np.float64), np.zeros(len(accounting.ORDERS), np.int64)
)
"""Nothing was charged."""


def summed(groups: Mapping[Event, int], relation: Relation) -> Sum:
    """Return the sum of grouped events."""
    total = EMPTY
    for event, count in groups.items():
        total = total.plus(event, count, relation)
    return total


def orders_id() -> str:
    """Return which orders a stored sum must have been made with."""
    return _digest(tuple(accounting.ORDERS))


@lru_cache(maxsize=4)
def _digest(orders: tuple[float, ...]) -> str:
    return hashlib.sha256(repr(tuple(map(float, orders))).encode()).hexdigest()


def no_bound(what: str) -> FedtuneError:
    """Return the error for an accountant's answer that bounds nothing."""
    return FedtuneError(
        f"{what}: the accountant's answer is no bound",
        hint="such an event is refused; change its noise or its sampling",
        code=ExitCode.PRIVACY,
    )


def _each(event: Event, relation: Relation) -> NDArray[np.float64]:
    found = np.asarray(accounting.rdp(event, relation), np.float64)
    # NaN compares as False, so it is refused with the negative.
    if found.shape != (len(accounting.ORDERS),) or not bool((found >= 0.0).all()):
        raise no_bound(f"rdp({event})")
    return found
