"""Client-level privacy at the server: secret cohorts, clipped sums, one noisy release a round.

The server is trusted with updates before the noise; who gets the model is not.
A round is reserved in the ledger before anybody is asked, and stays charged
whatever becomes of it: only a round that was never asked is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedtune.adapters import Tensors
from fedtune.config import Config
from fedtune.privacy.clipping import Quantile
from fedtune.privacy.events import Unit
from fedtune.privacy.ledger import Account, Claim, Ledger, Reservation, open_ledger
from fedtune.privacy.noise import NoiseSource
from fedtune.privacy.plan import (
    BITS,
    Promise,
    client_promise,
    dataset_name,
    ledger_place,
    noise_source,
)

__all__ = ["Central", "PrivateSum", "open_central"]

_Member = TypeVar("_Member")


@dataclass
class PrivateSum:
    """The exact sum of one cohort's clipped updates, and the one way out of it.

    Sums are whole numbers: the order of arrival changes no bit, and one client
    moves them by at most the clip norm.

    Parameters
    ----------
    promise : Promise
    adapter : Tensors
        Names and shapes of the updates.
    clip_norm : float
        Of this round.
    source : NoiseSource
    """

    promise: Promise
    adapter: Tensors
    clip_norm: float
    source: NoiseSource
    count: int = 0
    _sum: dict[str, NDArray[np.int64]] = field(init=False)
    _bits: float = 0.0

    def __post_init__(self) -> None:
        self._sum = {name: np.zeros(value.shape, np.int64) for name, value in self.adapter.items()}

    def add(self, weight: float, delta: Tensors) -> None:
        """Add one client's update; every client weighs the same, whatever it says."""
        del weight
        blocks = self.promise.blocks(tuple(self.adapter), self.clip_norm)
        clipped = self.promise.mechanism.clip_update(delta, blocks[:1])
        for name, value in clipped.items():
            self._sum[name] += value
        squares = (float(np.square(v, dtype=np.float64).sum()) for v in delta.values())
        self._bits += 0.5 if sum(squares) <= self.clip_norm**2 else -0.5
        self.count += 1

    def release(self) -> tuple[Tensors, float]:
        """Return the noisy mean over the public cohort size, and the next clip norm.

        Every call draws new noise and is a release of its own.
        """
        blocks = self.promise.blocks(tuple(self.adapter), self.clip_norm)
        sums: dict[str, NDArray[np.int64] | NDArray[np.float64]] = dict(self._sum)
        if len(blocks) > 1:
            sums[BITS] = np.array([self._bits])
        found = self.promise.mechanism.release(sums, blocks, self.source)
        norm = self.clip_norm
        if BITS in found:
            settings, expected = self.promise.settings, self.promise.mechanism.denominator
            rule = Quantile(settings.quantile, settings.quantile_lr)
            norm = rule.updated(norm, float(found.pop(BITS)[0]) * expected, expected)
        return found, norm


@dataclass(frozen=True)
class Central:
    """Keeps the server's promise: who is drawn, what is charged, what leaves.

    Parameters
    ----------
    job : str
        The run; its charges add up over every restart.
    """

    promise: Promise
    ledger: Ledger
    account: Account
    job: str
    source: NoiseSource

    def draw(self, members: Sequence[_Member]) -> list[_Member]:
        """Return a round's cohort by secret coins; often another size, sometimes empty."""
        drawn = self.promise.mechanism.draw(len(members), self.source)
        return [members[i] for i in drawn]

    def reserve(self, number: int) -> Reservation:
        """Charge a round before anybody is asked; durable when it returns.

        Raises
        ------
        FedtuneError
            ``ExitCode.BUDGET_EXHAUSTED``; nothing was charged then.
        """
        charge = self.promise.charge
        claim = Claim(
            job=self.job, round=number,
            attempt=self.ledger.next_attempt(self.account, self.job, number),
            event=charge.event, count=charge.count, purpose="train",
            detail={"clip_norm": self.promise.settings.clip_norm}, limit=self.promise.limit,
        )  # fmt: skip
        return self.ledger.reserve(self.account, claim)

    def sum(self, adapter: Tensors, clip_norm: float) -> PrivateSum:
        """Return an empty sum for one round."""
        return PrivateSum(
            self.promise, adapter, clip_norm or self.promise.settings.clip_norm, self.source
        )


def open_central(config: Config, job: str) -> Central | None:
    """Return what keeps ``[privacy.client]``, or None when nothing is promised there."""
    promise = client_promise(config)
    if promise is None:
        return None
    ledger = open_ledger(ledger_place(config))
    account = ledger.account(dataset_name(config), Unit.CLIENT, promise.relation)
    return Central(promise, ledger, account, job, noise_source(config, "server"))
