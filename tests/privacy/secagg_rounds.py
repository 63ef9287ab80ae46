"""Secure sums from end to end, with members that drop out where a test says."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from numpy.typing import NDArray

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.secagg import Collector, Context, Member, Record

MODEL = bytes(range(32))
STAGES = ("advert", "deal", "mask", "sign", "reveal")
"""The last thing that a member does; ``reveal`` is all of them."""


@cache
def signer_of(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def names_of(members: int) -> list[str]:
    # neither sorted nor of one length: places are by name, not by when they came
    return [f"owner-{(7 * at) % members}" for at in range(members)] if members % 7 else [
        f"m{at}" for at in range(members)
    ]  # fmt: skip


def roster_of(names: Iterable[str]) -> dict[str, Ed25519PublicKey]:
    return {name: signer_of(name).public_key() for name in names}


def context_of(**changes: Any) -> Context:
    settings = {"job": "job", "round": 4, "attempt": 0, "model": MODEL, "length": 5}
    return Context(**(settings | {"min_cohort": 2} | changes))


@dataclass
class Sum:
    """A collector, its members, and what each of them put in."""

    context: Context
    server: Collector
    members: dict[str, Member]
    values: dict[str, NDArray[np.uint32]]

    def expected(self, names: Iterable[str]) -> NDArray[np.uint32]:
        total = np.zeros(self.context.length, np.uint32)
        for name in names:
            total += self.values[name]
        return total

    def join(self) -> Record:
        for name, member in self.members.items():
            self.server.take_advert(name, member.advert())
        return self.server.cohort()

    def deal(self, names: Iterable[str] | None = None) -> None:
        cohort = self.join() if self.server.step == "adverts" else self.server.cohort()
        for name in self.members if names is None else names:
            self.server.take_deal(name, self.members[name].deal(cohort))

    def mask(self, names: Iterable[str] | None = None) -> None:
        for name in self.server.dealers() if names is None else names:
            dealt = self.server.dealt_for(name)
            self.server.add(name, self.members[name].mask(self.values[name], dealt))

    def sign(self, names: Iterable[str] | None = None) -> None:
        survivors = self.server.survivors()
        for name in self.server.summed() if names is None else names:
            self.server.take_signature(name, self.members[name].sign(survivors))

    def reveal(self, names: Iterable[str] | None = None) -> None:
        signed = self.server.signed()
        for name in self.server.summed() if names is None else names:
            self.server.take_reveal(name, self.members[name].reveal(signed))

    def until(self, step: str) -> Sum:
        """Do all that comes before ``step`` with everybody."""
        for one in ("join", "deal", "mask", "sign", "reveal"):
            if one == step:
                return self
            getattr(self, one)()
        return self


def begin(members: int | Sequence[str], **changes: Any) -> Sum:
    """Return a sum that has not begun; values are random over all of uint32."""
    names = names_of(members) if isinstance(members, int) else list(members)
    context, roster = context_of(**changes), roster_of(names)
    rng = np.random.default_rng(len(names))
    values = {
        name: rng.integers(0, 2**32, context.length, np.uint32, endpoint=False) for name in names
    }
    parties = {name: Member(context, name, signer_of(name), roster) for name in names}
    return Sum(context, Collector(context, roster), parties, values)


def play(one: Sum, last: dict[str, str]) -> NDArray[np.uint32]:
    """Play a sum in which each member's ``last`` act is as given, and return the total."""
    reach = {name: STAGES.index(last.get(name, "reveal")) for name in one.members}
    one.deal(name for name in one.members if reach[name] >= 1)
    one.mask(name for name in one.server.dealers() if reach[name] >= 2)
    one.sign(name for name in one.server.summed() if reach[name] >= 3)
    one.reveal(name for name in one.server.summed() if reach[name] >= 4)
    return one.server.total()


def twin(party: Member | Collector) -> Any:
    """Return a copy whose steps leave the original as it was."""
    other = copy.copy(party)
    for name, value in vars(party).items():
        if isinstance(value, dict | set | np.ndarray):
            setattr(other, name, copy.copy(value))
    return other


def altered(record: Record, field: str, at: int = 0) -> Record:
    """Return a record of which one number of one field is another one."""
    changed = {name: np.array(value) for name, value in record.items()}
    changed[field].reshape(-1)[at] ^= 1
    return changed


def placed(cohort: Record, at: int, advert: Record) -> Record:
    """Return a cohort in which a member's advert is another one."""
    changed = {name: value.copy() for name, value in cohort.items()}
    for name, value in advert.items():
        changed[name][at] = value[0] if name == "least" else value
    return changed


def refused(
    what: Callable[[], object], words: str, code: ExitCode, member: Member | None = None
) -> None:
    """Check that it is refused, in these words, and that a member is closed by it."""
    with pytest.raises(FedtuneError, match=words) as caught:
        what()
    assert caught.value.code == code
    assert caught.value.hint
    if member is not None:
        assert member.step == "closed"
        knows_nothing(member)


def knows_nothing(member: Member) -> None:
    assert member._secrets is None
    assert not member._held
    assert not member._openers
