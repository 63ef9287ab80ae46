"""Client-level privacy at the server: secret cohorts, clipped sums, one noisy release a round.

The server is trusted with updates before the noise; who gets the model is not.
A round is reserved in the ledger before anybody is asked, and stays charged
whatever becomes of it: only a round that was never asked is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from fedtune.adapters import Tensors
from fedtune.config import Config
from fedtune.privacy.events import Unit
from fedtune.privacy.ledger import Account, Claim, Ledger, Reservation, open_ledger
from fedtune.privacy.mechanism import Block, Mechanism
from fedtune.privacy.noise import NoiseSource
from fedtune.privacy.plan import (
    Promise,
    client_promise,
    dataset_name,
    ledger_place,
    noise_source,
)
from fedtune.privacy.rldp.joint import Collected, Seen
from fedtune.privacy.rldp.named import policy_of
from fedtune.privacy.rldp.policy import Policy, State, Utility
from fedtune.privacy.rldp.shape import mechanism_blocks
from fedtune.seeds import derive

__all__ = ["Central", "PrivateSum", "open_central"]

_Member = TypeVar("_Member")


@dataclass
class PrivateSum:
    """The exact sum of one cohort's clipped updates, and the one way out of it.

    Sums are whole numbers: the order of arrival changes no bit, and one client
    moves each block of them by at most its clip norm.

    Parameters
    ----------
    mechanism : Mechanism
    adapter : Tensors
        Names and shapes of the updates.
    policy : Policy
        Says the shape of this round; it has seen the rounds before.
    source : NoiseSource
    number : int
        Of the release, from 0.
    """

    mechanism: Mechanism
    adapter: Tensors
    policy: Policy
    source: NoiseSource
    number: int
    count: int = 0
    _collected: Collected = field(init=False)
    _seen: Seen | None = field(init=False, default=None)
    _blocks: tuple[Block, ...] = field(init=False)

    def __post_init__(self) -> None:
        zeros = {name: np.zeros(value.shape, np.int64) for name, value in self.adapter.items()}
        shape, sensing = self.policy.shape(), self.policy.sensing
        self._collected = Collected(shape, sensing, zeros)
        blocks, _ = mechanism_blocks(self.mechanism, shape, sensing)
        self._blocks = blocks[: len(shape.names)]

    def add(self, weight: float, delta: Tensors) -> None:
        """Add one client's update; every client weighs the same, whatever it says."""
        del weight
        shape = self._collected.shape
        scaled = delta
        if shape.scales is not None:
            scaled = {name: value * shape.scales[name] for name, value in delta.items()}
        self._collected.add(self.mechanism.clip_update(scaled, self._blocks))
        squares = [
            sum(float(np.square(scaled[name], dtype=np.float64).sum()) for name in names)
            for names in shape.names
        ]
        norms = np.sqrt(np.array([squares]))
        # Of a client that contributes nothing no bit may depend on the other blocks.
        if not np.isfinite(norms).all():
            norms[:] = np.nan
        self._collected.sense(torch.from_numpy(norms))
        self.count += 1

    def release(self) -> Tensors:
        """Return the noisy mean over the public cohort size, and show it to the policy.

        Every call draws new noise and is a release of its own.
        """
        seen = self._collected.release(self.mechanism, self.source, self.number)
        self.policy.observe(seen)
        self._seen = seen
        return dict(seen.means.value)

    def decisions(self) -> list[dict[str, Any]]:
        """Return the shape of what was released, and what the policy says of it."""
        if self._seen is None:
            return []
        said = self.policy.decisions()
        row = {
            "step": self.number, "noise_multiplier": self.mechanism.noise_multiplier,
            **self._seen.shape.facts(),
        }  # fmt: skip
        return [(said[-1] if said else {}) | row]


@dataclass(frozen=True)
class Central:
    """Keeps the server's promise: who is drawn, what is charged, what leaves.

    Parameters
    ----------
    job : str
        The run; its charges add up over every restart.
    seed : int
        Of the clipping policy's own random numbers.
    """

    promise: Promise
    ledger: Ledger
    account: Account
    job: str
    source: NoiseSource
    seed: int = 0

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
            detail={"clip_norm": self.promise.settings.clip_norm,
                    "noise_multiplier": self.promise.mechanism.noise_multiplier},
            limit=self.promise.limit,
        )  # fmt: skip
        return self.ledger.reserve(self.account, claim)

    def policy(self, adapter: Tensors, state: State, utility: Utility | None) -> Policy:
        """Return the clipping policy as the round before left it."""
        sizes = {name: value.size for name, value in adapter.items()}
        policy = policy_of(self.promise, sizes, self.seed, utility)
        if state:
            policy.restore(state)
        return policy

    def sum(self, adapter: Tensors, policy: Policy, number: int) -> PrivateSum:
        """Return an empty sum for round ``number``, shaped by the policy."""
        return PrivateSum(self.promise.mechanism, adapter, policy, self.source, number - 1)


def open_central(config: Config, job: str) -> Central | None:
    """Return what keeps ``[privacy.client]``, or None when nothing is promised there."""
    promise = client_promise(config)
    if promise is None:
        return None
    ledger = open_ledger(ledger_place(config))
    account = ledger.account(dataset_name(config), Unit.CLIENT, promise.relation)
    seed = derive(config.seed, "policy", "server")
    return Central(promise, ledger, account, job, noise_source(config, "server"), seed)
