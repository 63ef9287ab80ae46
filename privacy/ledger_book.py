"""Reading and writing the book inside one transaction."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, insert, select, update

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.events import Event, Relation, Unit, from_json
from fedtune.privacy.ledger_records import (
    FIRST,
    Account,
    Claim,
    Entry,
    Kind,
    Reservation,
    canonical,
    entry_hash,
    event_id,
    event_json,
)
from fedtune.privacy.ledger_store import accounts, entries, sums, totals
from fedtune.privacy.ledger_sums import EMPTY, Sum, orders_id, summed

__all__ = [
    "ALL",
    "account_of",
    "append",
    "charge",
    "find_account",
    "groups_of",
    "held_claim",
    "make_account",
    "read_entries",
    "row_of",
    "state_of",
    "sum_of",
]

ALL = ""
"""The "job" under which totals and sums are those of the whole account."""


def now() -> str:
    """Return the time as entries keep it."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def account_of(row: Row[Any]) -> Account:
    """Return the account of a row."""
    try:
        unit, relation = Unit(row.unit), Relation(row.relation)
    except ValueError as error:
        raise _damaged(f"account '{row.dataset}': {error}") from None
    return Account(row.id, row.dataset, unit, relation, row.epsilon, row.delta)


def find_account(db: Connection, dataset: str, unit: Unit, relation: Relation) -> Account | None:
    """Return an account, or ``None``.

    Raises
    ------
    FedtuneError
        The data set is accounted under another relation: a second account for the
        same people would be a second budget.
    """
    same = (accounts.c.dataset == dataset, accounts.c.unit == unit.value)
    row = db.execute(select(accounts).where(*same)).first()
    if row is not None and row.relation != relation.value:
        raise FedtuneError(
            f"'{dataset}' ({unit.value}) is accounted under '{row.relation}', "
            f"not '{relation.value}': a second relation would be a second budget",
            hint=f'use relation = "{row.relation}" for this data set',
            code=ExitCode.PRIVACY,
        )
    return None if row is None else account_of(row)


def make_account(db: Connection, dataset: str, unit: Unit, relation: Relation) -> None:
    """Write the row of a new account."""
    db.execute(
        insert(accounts).values(
            dataset=dataset,
            unit=unit.value,
            relation=relation.value,
            created=now(),
            head=FIRST,
            length=0,
        )
    )


def row_of(db: Connection, account: Account, lock: bool = False) -> Row[Any]:
    """Return the row of an account as it is now.

    With ``lock`` no other transaction writes to it until this one ends.
    """
    chosen = select(accounts).where(accounts.c.id == account.id)
    row = db.execute(chosen.with_for_update() if lock else chosen).first()
    known = (account.dataset, account.unit, account.relation)
    if row is None or (row.dataset, row.unit, row.relation) != known:
        raise FedtuneError(
            f"account {account.id} of data set '{account.dataset}' is not of this ledger",
            hint="ask the ledger for the account again",
            code=ExitCode.LEDGER,
        )
    return row


def append(
    db: Connection, row: Row[Any], kind: Kind, actor: str, detail: Mapping[str, Any], **known: Any
) -> Entry:
    """Write the next entry of an account, once in a transaction: ``row`` has the end of the chain.

    ``known`` are the fields of ``Entry`` that this kind needs.
    """
    open_entry = Entry(
        dataset=row.dataset,
        unit=row.unit,
        relation=row.relation,
        seq=row.length + 1,
        previous=row.head,
        time=now(),
        actor=actor,
        kind=kind.value,
        detail=json.loads(canonical(dict(detail))),
        job=known.get("job"),
        round=known.get("round"),
        attempt=known.get("attempt"),
        purpose=known.get("purpose"),
        event=known.get("event"),
        event_id=known.get("event_id"),
        count=known.get("count"),
        reservation=known.get("reservation"),
    )
    entry = replace(open_entry, hash=entry_hash(open_entry.to_json()))
    stored = {
        name: value
        for name, value in entry.to_json().items()
        if name not in {"schema", "dataset", "unit", "relation"}
    }
    stored |= {
        "account": row.id,
        "event": None if entry.event is None else canonical(entry.event),
        "detail": canonical(entry.detail),
    }
    db.execute(insert(entries).values(stored))
    db.execute(
        update(accounts).where(accounts.c.id == row.id).values(head=entry.hash, length=entry.seq)
    )
    return entry


def charge(db: Connection, account: Account, job: str, event: Event, count: int) -> None:
    """Add to what counts, for the account and for the job; a negative count takes back."""
    stored = event_json(event)
    name = event_id(stored)
    for scope in (ALL, job):
        total = sum_of(db, account, scope).plus(event, count, account.relation)
        _write_sum(db, account, scope, total)
    here = (totals.c.account == account.id, totals.c.event_id == name)
    both = totals.c.job.in_((ALL, job))
    change = update(totals).where(*here, both).values(count=totals.c.count + count)
    if db.execute(change).rowcount < 2:
        there = set(db.scalars(select(totals.c.job).where(*here, both)))
        for scope in {ALL, job} - there:
            row = {"account": account.id, "job": scope, "event_id": name, "count": count}
            db.execute(insert(totals).values(row | {"event": canonical(stored)}))


def groups_of(db: Connection, account: Account, job: str = ALL) -> dict[Event, int]:
    """Return what counts, grouped by event."""
    rows = db.execute(
        select(totals.c.event, totals.c.count)
        .where(totals.c.account == account.id, totals.c.job == job, totals.c.count != 0)
        .order_by(totals.c.event_id)
    )
    found: dict[Event, int] = {}
    for text, count in rows:
        event = from_json(json.loads(text))
        found[event] = found.get(event, 0) + count
    return found


def sum_of(db: Connection, account: Account, job: str = ALL) -> Sum:
    """Return the Renyi sum of what counts; made anew when it was kept for other orders."""
    row = db.execute(select(sums).where(sums.c.account == account.id, sums.c.job == job)).first()
    if row is not None and row.orders == orders_id():
        return Sum.from_bytes(row.vector, row.infinite)
    groups = groups_of(db, account, job)
    return summed(groups, account.relation) if groups else EMPTY


def _write_sum(db: Connection, account: Account, job: str, total: Sum) -> None:
    vector, infinite = total.to_bytes()
    values = {"orders": orders_id(), "vector": vector, "infinite": infinite}
    here = (sums.c.account == account.id, sums.c.job == job)
    if db.execute(update(sums).where(*here).values(values)).rowcount == 0:
        db.execute(insert(sums).values(values | {"account": account.id, "job": job}))


def held_claim(db: Connection, account: Account, claim: Claim) -> Reservation | None:
    """Return the reservation that this claim has already, or ``None``.

    Raises
    ------
    FedtuneError
        When it was for something else, or has ended: its output may have left, and
        a retry draws fresh noise.
    """
    row = (
        db.execute(
            select(entries).where(
                entries.c.account == account.id,
                entries.c.kind == Kind.RESERVE.value,
                entries.c.job == claim.job,
                entries.c.round == claim.round,
                entries.c.attempt == claim.attempt,
                entries.c.purpose == claim.purpose,
            )
        )
        .mappings()
        .first()
    )
    if row is None:
        return None
    what = f"round {claim.round}, attempt {claim.attempt} of job '{claim.job}'"
    retry = "a retry draws fresh noise: claim it with the next attempt (Ledger.next_attempt)"
    if (row["event_id"], row["count"]) != (event_id(event_json(claim.event)), claim.count):
        raise FedtuneError(
            f"{what} ({claim.purpose}) was reserved for {row['count']} x {row['event']}, "
            f"not for {claim.count} x {claim.event}",
            hint=retry,
            code=ExitCode.LEDGER,
        )
    state = state_of(db, account, row["seq"])
    if state is not None:
        raise FedtuneError(
            f"{what} ({claim.purpose}) has ended already: {state.value}",
            hint=retry,
            code=ExitCode.LEDGER,
        )
    return Reservation(
        account, row["seq"], row["hash"], claim.job, claim.round, claim.attempt, claim.purpose,
        claim.event, claim.count,
    )  # fmt: skip


def state_of(db: Connection, account: Account, seq: int) -> Kind | None:
    """Return how a reservation ended; ``None`` while it has not."""
    kind = db.scalar(
        select(entries.c.kind).where(entries.c.account == account.id, entries.c.reservation == seq)
    )
    return None if kind is None else Kind(kind)


def read_entries(db: Connection, *where: ColumnElement[bool]) -> Iterator[Entry]:
    """Yield entries, by account and in the order of their chain."""
    chosen: Select[Any] = (
        select(accounts.c.dataset, accounts.c.unit, accounts.c.relation, entries)
        .join_from(entries, accounts, accounts.c.id == entries.c.account)
        .where(*where)
        .order_by(entries.c.account, entries.c.seq)
    )
    for row in db.execute(chosen.execution_options(yield_per=1000)).mappings():
        fields = {name: row[name] for name in row if name != "account"}
        try:
            fields["event"] = None if row["event"] is None else json.loads(row["event"])
            fields["detail"] = json.loads(row["detail"])
        except ValueError:
            raise _damaged(f"entry {row['seq']} of '{row['dataset']}' cannot be read") from None
        yield Entry(**fields)


def _damaged(what: str) -> FedtuneError:
    hint = "somebody changed the ledger: fedtune budget verify; restore it from a copy"
    return FedtuneError(what, hint=hint, code=ExitCode.LEDGER)
