"""The parts of a report that take time to compute: curves, groups, budgets, other jobs."""

from __future__ import annotations

import math

from fedtune.privacy import accounting
from fedtune.privacy.costs import Groups, bare, cost, events_of
from fedtune.privacy.events import Relation, Unbounded, Unit, releases_in
from fedtune.privacy.facts import Ran
from fedtune.privacy.report_ledger import Account, Extract
from fedtune.privacy.report_model import Left, OtherJob, Person, Point
from fedtune.privacy.statement import Statement
from fedtune.privacy.words import shown

__all__ = ["Latest", "budgets", "curve", "key", "other_jobs", "people"]

POINTS = 10
GROUPS = (1, 2, 4)
Latest = dict[tuple[str, Unit, Relation], Account]


def key(account: Account) -> tuple[str, Unit, Relation]:
    """Return what an account is known by in every extract."""
    return account.dataset, account.unit, account.relation


def curve(groups: Groups, ran: Ran) -> tuple[Point, ...]:
    """Return epsilon over the rounds of the worst account, with and without sampling."""
    total = sum(groups.values())
    if not total or any(isinstance(event, Unbounded) for event in groups):
        return ()
    plain = dict(accounting.curve(bare(groups), ran.delta, ran.relation, POINTS))
    found = accounting.curve(groups, ran.delta, ran.relation, POINTS)
    return tuple(
        Point(
            round=count * max(ran.rounds, 1) / total,
            epsilon=epsilon,
            unsampled=plain.get(count, math.inf),
        )
        for count, epsilon in found
    )


def people(groups: Groups, ran: Ran, most: int) -> tuple[Person, ...]:
    """Return epsilon for one person behind 1, 2, 4 and ``most`` units, of the worst account."""
    sizes = sorted({*GROUPS, most})
    found = []
    for size in sizes:
        at_one = accounting.group_epsilon(groups, ran.delta, ran.relation, size)
        spread = None
        if ran.unit is Unit.EXAMPLE:
            copies = {event: size * count for event, count in groups.items()}
            spread = cost(copies, ran.delta, ran.relation).epsilon
        found.append(Person(units=size, one_place=at_one, several_places=spread))
    return tuple(found)


def budgets(
    statement: Statement,
    ran: Ran,
    extract: Extract,
    latest: Latest,
) -> list[Left]:
    """Return what each listed account spent over all jobs, and what its owner allows."""
    found = []
    for place, row in enumerate(statement.rows):
        then = extract.accounts[row.index]
        now = latest.get(key(then), then)
        every = events_of(now.all_groups or then.groups)
        delta = now.budget.delta if now.budget else ran.delta
        spent = cost(every, delta, ran.relation).epsilon
        left = max(0.0, now.budget.epsilon - spent) if now.budget else None
        more = None
        if now.budget and place == 0 and left:
            event = max(events_of(then.groups).items(), key=lambda one: one[1])[0]
            more = accounting.most(event, now.budget.epsilon, delta, ran.relation, every)
            more *= releases_in(event)
        found.append(
            Left(
                name=row.name,
                run=row.epsilon,
                spent=spent,
                delta=delta,
                budget=now.budget.epsilon if now.budget else None,
                left=left,
                more=more,
            )
        )
    return found


def other_jobs(
    own: str,
    ran: Ran,
    extract: Extract,
    latest: Latest,
) -> list[OtherJob]:
    """Return the other jobs that used data of this run."""
    found: dict[str, OtherJob] = {}
    for account in extract.accounts:
        if (account.unit, account.relation) != (ran.unit, ran.relation):
            continue
        for use in latest.get(key(account), account).all_jobs:
            if use.job == own:
                continue
            groups = events_of(use.groups)
            before = found.get(use.job)
            first, last = str(use.first or "not known"), str(use.last or "not known")
            found[use.job] = OtherJob(
                job=shown(use.job, 80),
                first=min(first, before.first) if before else first,
                last=max(last, before.last) if before else last,
                datasets=1 + (before.datasets if before else 0),
                releases=sum(n * releases_in(event) for event, n in groups.items())
                + (before.releases if before else 0),
                epsilon=max(
                    cost(groups, ran.delta, ran.relation).epsilon, before.epsilon if before else 0.0
                ),
            )
    return sorted(found.values(), key=lambda job: (job.first, job.job))
