"""What a ledger keeps, as values: accounts, claims, entries and their hashes.

An entry is one line of the book. Its hash covers every other field and the hash
of the entry before it, in the canonical JSON of ``canonical``; so whoever holds
an entry can recompute its hash, and whoever holds a chain can tell that nothing
inside it was changed, removed or put in.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.events import Event, Relation, Unit, to_json

__all__ = [
    "FIRST",
    "Account",
    "Claim",
    "Entry",
    "Kind",
    "Reservation",
    "canonical",
    "check_claim",
    "entry_hash",
    "event_id",
    "event_json",
    "named",
    "require_cap",
]

FIRST = "0" * 64
"""What the first entry of a chain has for the hash before it."""

ENTRY_SCHEMA = 1
_LONGEST = 300
_LARGEST = 2**53


class Kind(StrEnum):
    """What an entry does."""

    BUDGET = "budget"
    RESERVE = "reserve"
    RELEASE = "release"
    ABORT = "abort"


@dataclass(frozen=True)
class Account:
    """Whose privacy is spent: a data set, a unit and a neighbouring relation.

    Attributes
    ----------
    id : int
        In this ledger.
    dataset : str
    unit : Unit
    relation : Relation
    epsilon, delta : float or None
        The owner's cap over all jobs, as it was when the account was read; ``None`` is no cap.
    """

    id: int
    dataset: str
    unit: Unit
    relation: Relation
    epsilon: float | None = None
    delta: float | None = None


@dataclass(frozen=True)
class Claim:
    """What a job asks for before it lets anything out.

    Attributes
    ----------
    job : str
    round, attempt : int
        A retry draws fresh noise, so it is another release: it takes the next attempt.
    event : Event
    count : int
        How many such releases.
    purpose : str
        Which release of the round: "update", "metrics", ...
    detail : Mapping
        Anything public worth keeping (clip norm, sampler, code version); JSON.
    limit : tuple of float or None
        (epsilon, delta) over the charges of this job alone, beside the owner's cap.
    """

    job: str
    round: int
    attempt: int
    event: Event
    count: int = 1
    purpose: str = "update"
    detail: Mapping[str, Any] = field(default_factory=dict)
    limit: tuple[float, float] | None = None


@dataclass(frozen=True)
class Reservation:
    """A claim that was admitted, and is durable."""

    account: Account
    seq: int
    hash: str
    job: str
    round: int
    attempt: int
    purpose: str
    event: Event
    count: int


@dataclass(frozen=True)
class Entry:
    """One line of the ledger; the fields that a kind does not need are ``None``.

    Attributes
    ----------
    seq : int
        1, 2, 3, ... in its account.
    previous, hash : str
        SHA-256, hexadecimal; ``hash`` covers every other field.
    time : str
        UTC, ISO 8601.
    reservation : int or None
        ``seq`` of the reservation that a release or an abort ends.
    """

    dataset: str
    unit: str
    relation: str
    seq: int
    previous: str
    time: str
    actor: str
    kind: str
    job: str | None
    round: int | None
    attempt: int | None
    purpose: str | None
    event: Mapping[str, Any] | None
    event_id: str | None
    count: int | None
    reservation: int | None
    detail: Mapping[str, Any]
    hash: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return every field, ready for JSON."""
        return {"schema": ENTRY_SCHEMA} | asdict(self)


def entry_hash(entry: Mapping[str, Any]) -> str:
    """Return the hash that an entry (the form of ``Entry.to_json``) must have.

    Examples
    --------
    >>> entry_hash({"schema": 1, "seq": 1, "previous": FIRST, "hash": "whatever"})[:16]
    '2e53db21ccd5706e'
    """
    content = {key: value for key, value in entry.items() if key != "hash"}
    return hashlib.sha256(canonical(content).encode()).hexdigest()


def canonical(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no blanks, ASCII, no NaN.

    Raises
    ------
    FedtuneError
        With ``ExitCode.LEDGER`` when the value has no JSON.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise FedtuneError(
            f"the ledger cannot keep {value!r:.120}: {error}",
            hint="plain JSON only: text, finite numbers, lists and tables",
            code=ExitCode.LEDGER,
        ) from None


def event_json(event: Event) -> dict[str, Any]:
    """Return the stored form of an event, the same for 1 and 1.0."""
    real = ("noise_multiplier", "sampling_probability", "order", "divergence")
    stored = to_json(event)
    for key, value in stored.items():
        if key in real:
            stored[key] = float(value)
        elif key == "noise_multipliers":
            stored[key] = [float(one) for one in value]
    return stored


def event_id(stored: Mapping[str, Any]) -> str:
    """Return the name of an event: the hash of its canonical JSON."""
    return hashlib.sha256(canonical(stored).encode()).hexdigest()


def check_claim(claim: Claim) -> None:
    """Raise unless a claim can be kept and accounted."""
    named("job", claim.job)
    named("purpose", claim.purpose)
    _whole("round", claim.round, 0)
    _whole("attempt", claim.attempt, 0)
    _whole("count", claim.count, 1)
    if claim.limit is not None:
        require_cap("the limit of the job", *claim.limit)
    event_json(claim.event)
    canonical(dict(claim.detail))


def require_cap(what: str, epsilon: float, delta: float) -> None:
    """Raise unless epsilon is finite and above 0, and delta inside (0, 1)."""
    for name, value, top in (("epsilon", epsilon, math.inf), ("delta", delta, 1.0)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not 0 < value < top:
            raise FedtuneError(
                f"{what}: {name} = {value!r}",
                hint="epsilon is finite and above 0; delta lies between 0 and 1",
                code=ExitCode.PRIVACY,
            )


def named(what: str, value: object) -> str:
    """Return a name that can be kept, compared and printed; raise for any other."""
    if (
        not isinstance(value, str)
        or not value.strip()
        or len(value) > _LONGEST
        or not value.isprintable()
    ):
        raise FedtuneError(
            f"{what} = {value!r:.80} is no name",
            hint=f"1 to {_LONGEST} printable characters",
            code=ExitCode.LEDGER,
        )
    return value


def _whole(what: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _LARGEST:
        raise FedtuneError(
            f"{what} = {value!r}", hint=f"a whole number from {least} up", code=ExitCode.LEDGER
        )
