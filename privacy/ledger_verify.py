"""Is the book what was written: every hash, every rule, every derived number."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Row, select

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.ledger_book import ALL, account_of, groups_of, read_entries, sum_of
from fedtune.privacy.ledger_records import (
    FIRST,
    Account,
    Entry,
    Kind,
    canonical,
    entry_hash,
    event_id,
)
from fedtune.privacy.ledger_store import accounts, entries, sums, totals
from fedtune.privacy.ledger_sums import orders_id, summed

__all__ = ["Checked", "verify"]


@dataclass(frozen=True)
class Checked:
    """An account whose chain is whole."""

    account: Account
    entries: int
    head: str
    """Keep it elsewhere: a chain that was cut and mended has another."""


@dataclass
class _Walk:
    """What the entries so far say."""

    seq: int = 0
    head: str = FIRST
    budget: tuple[Any, Any] = (None, None)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    claims: set[tuple[Any, ...]] = field(default_factory=set)
    open: dict[int, Entry] = field(default_factory=dict)


def verify(db: Connection) -> tuple[Checked, ...]:
    """Check every account; raise ``FedtuneError`` (``LEDGER``) at the first that is wrong."""
    rows = db.execute(select(accounts).order_by(accounts.c.id)).all()
    return tuple(_verify_account(db, row) for row in rows)


def _verify_account(db: Connection, row: Row[Any]) -> Checked:
    account, walk = account_of(row), _Walk()
    for entry in read_entries(db, entries.c.account == account.id):
        _follow(walk, entry)
    if (row.length, row.head) != (walk.seq, walk.head):
        raise _wrong(account, f"the chain ends at entry {walk.seq}, not {row.length}: it was cut")
    if (row.epsilon, row.delta) != walk.budget:
        raise _wrong(account, f"the budget is {walk.budget}, not ({row.epsilon}, {row.delta})")
    _verify_totals(db, account, walk)
    return Checked(account, walk.seq, walk.head)


def _follow(walk: _Walk, entry: Entry) -> None:
    """Take one entry; raise unless it is the next of the chain and keeps the rules."""
    if entry.seq != walk.seq + 1 or entry.previous != walk.head:
        raise _broken(entry, f"does not follow entry {walk.seq}")
    if entry.hash != entry_hash(entry.to_json()):
        raise _broken(entry, "was changed: its hash is of something else")
    if entry.kind == Kind.BUDGET:
        walk.budget = (entry.detail.get("epsilon"), entry.detail.get("delta"))
    elif entry.kind == Kind.RESERVE:
        claim = (entry.job, entry.round, entry.attempt, entry.purpose)
        if claim in walk.claims:
            raise _broken(entry, "claims again what was claimed before")
        walk.claims.add(claim)
        walk.open[entry.seq] = entry
        _count(walk, entry, 1)
    else:
        held = walk.open.pop(entry.reservation or 0, None)
        same = ("job", "round", "attempt", "purpose", "event", "count")
        if held is None or any(getattr(held, name) != getattr(entry, name) for name in same):
            raise _broken(entry, f"ends reservation {entry.reservation}, which is not open")
        if entry.kind == Kind.ABORT:
            _count(walk, entry, -1)
    walk.seq, walk.head = entry.seq, entry.hash


def _count(walk: _Walk, entry: Entry, sign: int) -> None:
    if entry.event is None or entry.event_id != event_id(entry.event) or not entry.count:
        raise _broken(entry, "has no event, or one under another's name")
    for scope in (ALL, str(entry.job)):
        walk.counts[scope, entry.event_id] += sign * entry.count


def _verify_totals(db: Connection, account: Account, walk: _Walk) -> None:
    columns = (totals.c.job, totals.c.event_id, totals.c.event, totals.c.count)
    rows = db.execute(select(*columns).where(totals.c.account == account.id)).all()
    kept = {(job, name): count for job, name, _, count in rows if count}
    found = {key: count for key, count in walk.counts.items() if count}
    for key in sorted(kept.keys() | found.keys()):
        if kept.get(key) != found.get(key):
            raise _wrong(
                account,
                f"the total of event {key[1][:12]} of {_scope(key[0])} is {kept.get(key, 0)}, "
                f"its entries say {found.get(key, 0)}",
            )
    for _, name, text, _ in rows:
        if event_id(_parsed(account, text)) != name:
            raise _wrong(account, f"a total has the event of another: {name[:12]}")
    here = (sums.c.account == account.id, sums.c.orders == orders_id())
    for job in sorted(db.scalars(select(sums.c.job).where(*here))):
        expected = summed(groups_of(db, account, job), account.relation)
        if not sum_of(db, account, job).close_to(expected):
            raise _wrong(account, f"the Renyi sum of {_scope(job)} is not that of its events")


def _parsed(account: Account, text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if value is None or canonical(value) != text:
        raise _wrong(account, f"a total has an event that cannot be read: {text!r:.80}")
    return value


def _scope(job: str) -> str:
    return f"job '{job}'" if job else "all jobs"


def _broken(entry: Entry, what: str) -> FedtuneError:
    return _error(f"entry {entry.seq} of '{entry.dataset}' ({entry.unit}) {what}")


def _wrong(account: Account, what: str) -> FedtuneError:
    return _error(f"account '{account.dataset}' ({account.unit.value}): {what}")


def _error(text: str) -> FedtuneError:
    hint = "somebody changed the ledger: restore it from a copy, and compare heads with reports"
    return FedtuneError(text, hint=hint, code=ExitCode.LEDGER)
