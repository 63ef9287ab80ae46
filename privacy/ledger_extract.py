"""What a report takes from the ledger: enough for a third party to account again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, func, select

from fedtune.privacy.events import Event
from fedtune.privacy.ledger_book import ALL, account_of, groups_of, read_entries
from fedtune.privacy.ledger_records import Account, Entry, Kind, canonical, event_json
from fedtune.privacy.ledger_store import accounts, entries

__all__ = ["EXTRACT_SCHEMA", "extract"]

EXTRACT_SCHEMA = 1

_STATES = {None: "reserved", Kind.RELEASE.value: "released", Kind.ABORT.value: "aborted"}


def extract(db: Connection, job: str, compact: bool) -> dict[str, Any]:
    """Return the part of the ledger that concerns a job; see ``Ledger.extract``.

    Each account has the owner's ``budget``, the ``head`` and ``length`` of its chain,
    the ``entries`` of this job (or ``runs`` of like ones), ``groups``: what counts of
    this job, ``all_jobs``: the same for each job with its first and last time, and
    ``all_groups``: what counts altogether.
    """
    chosen = select(entries.c.account).where(entries.c.job == job).distinct()
    order = (accounts.c.dataset, accounts.c.unit, accounts.c.relation)
    rows = db.execute(select(accounts).where(accounts.c.id.in_(chosen)).order_by(*order)).all()
    found = []
    for row in rows:
        account = account_of(row)
        own = list(read_entries(db, entries.c.account == row.id, entries.c.job == job))
        lines = {"runs": _runs(own)} if compact else {"entries": [one.to_json() for one in own]}
        cap = None if row.epsilon is None else {"epsilon": row.epsilon, "delta": row.delta}
        found.append(
            {
                "dataset": row.dataset, "unit": row.unit, "relation": row.relation,
                "budget": cap, "head": row.head, "length": row.length,
            }
            | lines
            | {
                "groups": _listed(groups_of(db, account, job)),
                "all_jobs": _jobs(db, account),
                "all_groups": _listed(groups_of(db, account, ALL)),
            }
        )  # fmt: skip
    return {"schema": EXTRACT_SCHEMA, "job": job, "accounts": found}


def _jobs(db: Connection, account: Account) -> list[dict[str, Any]]:
    times = db.execute(
        select(entries.c.job, func.min(entries.c.time), func.max(entries.c.time))
        .where(entries.c.account == account.id, entries.c.job.is_not(None))
        .group_by(entries.c.job)
        .order_by(entries.c.job)
    )
    return [
        {
            "job": job,
            "groups": _listed(groups_of(db, account, job)),
            "first": first,
            "last": last,
        }
        for job, first, last in times.all()
    ]


def _listed(groups: Mapping[Event, int]) -> list[dict[str, Any]]:
    return [{"event": event_json(event), "count": count} for event, count in groups.items()]


def _runs(own: list[Entry]) -> list[dict[str, Any]]:
    """Join neighbouring reservations of the same event, count, purpose and state.

    A run keeps the detail of its first reservation, the first entry's and the last
    entry's place in the chain, and how many reservations it stands for.
    """
    ends = {one.reservation: one for one in own if one.reservation is not None}
    runs: list[dict[str, Any]] = []
    before = ""
    for entry in (one for one in own if one.kind == Kind.RESERVE):
        end = ends.get(entry.seq)
        state = _STATES[None if end is None else end.kind]
        last = entry if end is None else end
        like = canonical([entry.event, entry.count, entry.purpose, state])
        if like != before:
            runs.append(
                {
                    "event": entry.event, "count": entry.count, "purpose": entry.purpose,
                    "state": state, "times": 0, "rounds": [entry.round, entry.round],
                    "detail": entry.detail, "first": _place(entry),
                }
            )  # fmt: skip
            before = like
        run = runs[-1]
        run["times"] += 1
        run["rounds"] = [min(run["rounds"][0], entry.round), max(run["rounds"][1], entry.round)]
        run["last"] = _place(last)
    return runs


def _place(entry: Entry) -> dict[str, Any]:
    return {"seq": entry.seq, "hash": entry.hash, "time": entry.time}
