"""From facts and a ledger's extract to the statement: who is protected, and by which bound.

One statement per unit. Its epsilon is computed here from the events of the ledger,
worst account first; facts only say in words what the events cannot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy import accounting
from fedtune.privacy.accounting import Spent
from fedtune.privacy.costs import Groups, bare, cost, events_of, guess, within
from fedtune.privacy.events import (
    Bounded,
    Gaussian,
    Laplace,
    Levels,
    PoissonGaussian,
    PoissonLaplace,
    Relation,
    RenyiFiltered,
    TruncatedPoissonGaussian,
    Unbounded,
    Unit,
    least_noise,
)
from fedtune.privacy.facts import Facts, Ran, read_facts
from fedtune.privacy.recompute import lines
from fedtune.privacy.report_ledger import Account, Extract, read_extract
from fedtune.privacy.trust import condition, formal, trust_of
from fedtune.privacy.words import above, shown

__all__ = [
    "Facts",
    "Number",
    "Row",
    "Statement",
    "read_extract",
    "read_facts",
    "states",
]

ROWS = 20
"""Accounts that a report lists one by one, worst first."""


def _to_json(value: float) -> float | str:
    return value if math.isfinite(value) else "inf"


def _from_json(value: Any) -> Any:
    return math.inf if value == "inf" else value


Number = Annotated[
    float, BeforeValidator(_from_json), PlainSerializer(_to_json, return_type=float | str)
]
"""A bound. No bound is the text "inf" in JSON, which no program takes for a small number."""

_FROZEN = ConfigDict(extra="forbid", frozen=True)


class Row(BaseModel):
    """What one account spent in this run."""

    model_config = _FROZEN

    index: int
    """Place in the ledger's extract."""
    name: str
    epsilon: Number
    accountant: str
    releases: int


class Statement(BaseModel):
    """The guarantee for one unit.

    Attributes
    ----------
    holds : bool
        There is a finite bound, and noise and coins were not predictable.
    epsilon, delta : float
        Of the worst account.
    pure : float or None
        Its epsilon at delta 0, where there is one.
    mu : float or None
        Of Gaussian differential privacy, where it is known.
    unsampled : float
        Epsilon against somebody who learns who was drawn.
    guess : float
        Largest share of right answers to "did it take part?" when half did.
    rows : tuple of Row
        At most ``ROWS`` accounts, worst first.
    """

    model_config = _FROZEN

    unit: Unit
    relation: Relation
    holds: bool
    title: str
    formal: str
    epsilon: Number
    delta: float
    pure: Number | None = None
    mu: float | None
    guess: float
    unsampled: Number
    condition: str
    accountant: str
    epsilon_rdp: Number
    epsilon_pld: Number | None
    order: float
    library: str
    releases: int
    worst: str
    accounts: int
    rows: tuple[Row, ...]
    recompute: str


def states(facts: Facts, extract: Extract) -> tuple[Statement, ...]:
    """Return one statement per mechanism of the run.

    Raises
    ------
    FedtuneError
        ``ExitCode.PRIVACY`` when facts and ledger contradict each other, or delta is
        not below 1 / units; ``ExitCode.LEDGER`` when the ledger has no account.
    """
    if facts.job != extract.job:
        raise FedtuneError(
            f"the facts are of job '{facts.job}', the ledger's extract of '{extract.job}'",
            hint="both files come from one run; do not mix run folders",
            code=ExitCode.PRIVACY,
        )
    spoken = {(ran.unit, ran.relation) for ran in facts.mechanisms}
    for account in extract.accounts:
        if (account.unit, account.relation) not in spoken and account.groups:
            raise FedtuneError(
                f"the ledger charged '{account.dataset}' for unit '{account.unit.value}' under "
                f"'{account.relation.value}', which the facts do not speak of",
                hint="every charged account needs a mechanism in privacy_facts.json",
                code=ExitCode.PRIVACY,
            )
    return tuple(_state(facts, ran, extract) for ran in facts.mechanisms)


def _state(facts: Facts, ran: Ran, extract: Extract) -> Statement:
    accounting.require_delta(ran.delta, ran.units)
    mine = [
        (index, account)
        for index, account in enumerate(extract.accounts)
        if (account.unit, account.relation) == (ran.unit, ran.relation)
    ]
    if not mine:
        raise FedtuneError(
            f"the ledger has no account for unit '{ran.unit.value}' under '{ran.relation.value}'",
            hint="the run's ledger.json is not complete; write it again from the ledger",
            code=ExitCode.LEDGER,
        )
    _agree(ran, [account for _, account in mine])
    ranked, worst = _ranked(mine, ran)
    first = ranked[0]
    groups = events_of(extract.accounts[first.index].groups)
    secure = ran.noise.secure and ran.sampling.secure
    epsilon = worst.epsilon
    split = facts.crossing is not None
    trust = trust_of(ran, split=split)
    unsampled = max(epsilon, cost(bare(groups), ran.delta, ran.relation).epsilon)
    return Statement(
        unit=ran.unit,
        relation=ran.relation,
        holds=secure and math.isfinite(epsilon),
        title=trust.title,
        formal=formal(
            ran,
            above(epsilon, 3) if math.isfinite(epsilon) else "",
            ran.rounds,
            "" if worst.pure is None else above(worst.pure, 3),
            split=split,
        ),
        epsilon=epsilon,
        delta=ran.delta,
        pure=worst.pure,
        mu=worst.mu,
        guess=guess(epsilon, ran.delta),
        unsampled=unsampled,
        condition=condition(ran, bounded=math.isfinite(unsampled)),
        accountant=worst.accountant,
        epsilon_rdp=worst.epsilon_rdp,
        epsilon_pld=worst.epsilon_pld,
        order=worst.order,
        library=worst.library,
        releases=worst.releases,
        worst=first.name,
        accounts=len(mine),
        rows=tuple(ranked[:ROWS]),
        recompute=lines(first.index, groups, worst, ran.relation),
    )


def _ranked(mine: Sequence[tuple[int, Account]], ran: Ran) -> tuple[list[Row], Spent]:
    """Return rows, worst first, and what the worst account spent.

    Every account gets a Renyi bound; the tight and slow bound only those that are
    shown or could still be the worst.
    """
    cheap = {}
    for index, account in mine:
        vector = sum(
            (n * accounting.rdp(e, ran.relation) for e, n in events_of(account.groups).items()),
            start=0.0 * accounting.rdp(Gaussian(1.0), ran.relation),
        )
        cheap[index] = accounting.epsilon_of_rdp(vector, ran.delta)[0] if account.groups else 0.0
    order = sorted(mine, key=lambda one: (-cheap[one[0]], one[1].dataset))
    rows: list[Row] = []
    worst: Spent | None = None
    tight: list[Groups] = []
    for index, account in order:
        groups = events_of(account.groups)
        known = worst is not None and (
            cheap[index] <= worst.epsilon or any(within(groups, big) for big in tight)
        )
        if len(rows) >= ROWS and known:
            continue
        spent = cost(groups, ran.delta, ran.relation)
        tight.append(groups)
        if worst is None or spent.epsilon > worst.epsilon:
            worst = spent
        rows.append(
            Row(
                index=index,
                name=shown(ran.labels.get(account.dataset, account.dataset), 80),
                epsilon=spent.epsilon,
                accountant=spent.accountant,
                releases=spent.releases,
            )
        )
    if worst is None:
        raise FedtuneError("there is no account to speak of", code=ExitCode.LEDGER)
    return sorted(rows, key=lambda row: -row.epsilon), worst


def _agree(ran: Ran, accounts: Sequence[Account]) -> None:
    """Raise when the facts name a sampler that no event of the ledger has."""
    kinds: dict[tuple[str, str], tuple[type[Bounded], ...]] = {
        ("everyone", "gaussian"): (Gaussian, Levels),
        ("poisson", "gaussian"): (PoissonGaussian, Levels, RenyiFiltered),
        ("truncated-poisson", "gaussian"): (TruncatedPoissonGaussian,),
        ("everyone", "laplace"): (Laplace,),
        ("poisson", "laplace"): (PoissonLaplace,),
    }
    found = [e for account in accounts for e in events_of(account.groups)]
    if any(isinstance(event, Unbounded) for event in found) or not found:
        return
    wanted = kinds.get((ran.sampling.scheme, ran.noise.law))
    # A filter says nothing of the noise behind it.
    least = min((z for z in map(least_noise, found) if z is not None), default=math.inf)
    if wanted is not None and any(isinstance(event, wanted) for event in found):
        if ran.noise.multiplier <= least * (1 + 1e-9):
            return
        problem = f"noise multiplier {ran.noise.multiplier:g}, the ledger {least:g}"
    else:
        problem = f"sampler '{ran.sampling.scheme}' and {ran.noise.law} noise, the ledger no such"
    raise FedtuneError(
        f"unit '{ran.unit.value}': the facts have {problem}",
        hint="the report prints what the ledger was charged for; the facts must be of that run",
        code=ExitCode.PRIVACY,
    )
