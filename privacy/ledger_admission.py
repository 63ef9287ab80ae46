"""Whether one more release fits: in microseconds by Renyi, else by the exact curve.

Two valid upper bounds, and either may admit:

a. Renyi divergences add up over adaptively chosen inputs (Mironov, "Renyi
   Differential Privacy", 2017, proposition 1). The sum so far is kept; one more
   event is one vector addition, whatever the number of rounds.
b. When (a) says no, ``accounting.most`` asks the privacy loss distribution how
   many of this event fit beside all others. The answer holds until one of the
   others changes, so a run that repeats one event asks once.

Both bound what was charged, at a fixed cap. A job that chooses the *parameters*
of its events from earlier outputs needs a filter of its own before it claims
(``privacy.filters``). Releases without sampling are their own filter: the sum of
1 / z^2 (arXiv:2210.17520), which (b) has in no time for any number of them. Beside
many different events of other kinds only (a) is used: that is such a job, and (b)
would take minutes.

Anything that is no number, negative or unknown is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from sqlalchemy import Connection

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy import accounting
from fedtune.privacy.events import Charge, Event, Gaussian, Relation, Unbounded
from fedtune.privacy.ledger_book import ALL, groups_of, sum_of
from fedtune.privacy.ledger_records import Account, Claim
from fedtune.privacy.ledger_sums import Sum, no_bound

__all__ = ["Answers", "Cap", "Question", "Refused", "ask", "by_renyi", "exhausted", "judge"]

MOST_EVENTS = 50
"""Different events beside which the exact curve is still asked."""

_REMEMBERED = 1000


@dataclass(frozen=True)
class Cap:
    """No more than ``epsilon`` at ``delta``."""

    epsilon: float
    delta: float


@dataclass(frozen=True)
class Question:
    """How many of ``event`` fit beside ``others``. Equal questions have equal answers."""

    event: Event
    cap: Cap
    relation: Relation
    others: frozenset[tuple[Event, int]]


@dataclass(frozen=True)
class Refused:
    """What would be passed, what counts towards it, and how many would still fit."""

    who: str
    cap: Cap
    groups: Mapping[Event, int]
    room: int


Answers = dict[Question, int]


def judge(
    db: Connection, account: Account, claim: Claim, answers: Answers, more: Cap | None = None
) -> Question | Refused | None:
    """Return ``None`` to admit a claim, a refusal, or what must be asked first.

    Parameters
    ----------
    db : Connection
        Of a transaction; what is read is what is judged.
    account : Account
        Read in the same transaction.
    claim : Claim
    answers : Answers
        To questions that were asked before.
    more : Cap, optional
        Over all charges of the account, beside the owner's.
    """
    name = f"the budget of data set '{account.dataset}' (unit {account.unit.value})"
    scopes = []
    if account.epsilon is not None and account.delta is not None:
        scopes.append((ALL, name, Cap(account.epsilon, account.delta)))
    if more is not None:
        scopes.append((ALL, "the cap", more))
    if claim.limit is not None:
        scopes.append((claim.job, f"the target of job '{claim.job}'", Cap(*claim.limit)))
    for scope, who, cap in scopes:
        after = sum_of(db, account, scope).plus(claim.event, claim.count, account.relation)
        if by_renyi(after, cap):
            continue
        groups = groups_of(db, account, scope)
        others = frozenset((event, n) for event, n in groups.items() if event != claim.event)
        asked = Question(claim.event, cap, account.relation, others)
        if asked not in answers:
            return asked
        left = answers[asked] - groups.get(claim.event, 0)
        if claim.count > left:
            return Refused(who, cap, groups, max(left, 0))
    return None


def by_renyi(total: Sum, cap: Cap) -> bool:
    """Return whether the Renyi bound alone says that ``total`` stays within the cap."""
    vector = total.vector
    if not np.isfinite(vector).any():
        return False
    epsilon, _ = accounting.epsilon_of_rdp(vector, cap.delta)
    return math.isfinite(epsilon) and 0.0 <= epsilon <= cap.epsilon


def ask(asked: Question, answers: Answers) -> None:
    """Ask the accountant (seconds) and remember; 0 for what has no bound or is beyond it."""
    events = [asked.event, *(event for event, _ in asked.others)]
    found = 0
    few = len(events) <= MOST_EVENTS or all(isinstance(one, Gaussian) for one in events)
    if few and not any(isinstance(one, Unbounded) for one in events):
        cap = asked.cap
        found = accounting.most(
            asked.event, cap.epsilon, cap.delta, asked.relation, dict(asked.others)
        )
        if isinstance(found, bool) or not isinstance(found, int) or found < 0:
            raise no_bound(f"most({asked.event}) = {found!r}")
    if len(answers) >= _REMEMBERED:
        answers.clear()
    answers[asked] = found


def exhausted(account: Account, claim: Claim, refused: Refused) -> FedtuneError:
    """Return the error of a refused claim: what was spent, asked, and allowed."""
    charges = [Charge(event, count) for event, count in refused.groups.items()]
    cap = refused.cap
    spent = accounting.spent(charges, cap.delta, account.relation).epsilon
    return FedtuneError(
        f"{refused.who} is exhausted: spent epsilon {spent:.4f} of {cap.epsilon:g} at delta "
        f"{cap.delta:g}; asked {claim.count} x {claim.event}, room for {refused.room}",
        hint="nothing was released; stop here, or agree on a new budget with the owners of the "
        "data (fedtune budget set)",
        code=ExitCode.BUDGET_EXHAUSTED,
    )
