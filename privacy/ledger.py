"""The book of what was spent: nothing leaves before it stands here.

A budget belongs to people, not to a job: an account is a data set, a unit and a
neighbouring relation, and all jobs on it add up, tuning runs too.

Three steps. ``reserve`` writes the charge, durably, before any noise is drawn;
``release`` notes, durably, that the output is about to leave; then it leaves.
``abort`` takes a reservation back, and is only for what never left. So a process
may die anywhere:

- before ``reserve`` returned: the charge is there whole or not at all, and nothing
  has left;
- before ``release`` returned: nothing has left, and the charge stays. What was in
  flight is lost budget, never lost privacy. The same claim may go on, for its
  output is still the first;
- after that: the output may have left. The claim has ended; a retry would draw
  fresh noise, so it is another release and takes the next attempt.

One writer at a time per account: what admission read is still true when the
charge is written, so two jobs that race for one budget cannot both win. The time
of an admission does not depend on how many came before.

What the chain of hashes cannot do: the end of the chain is kept in the same
database, so somebody who may write to it can cut entries off the end *and* set
head, length and totals back. Reports carry the head; keep one elsewhere.
"""

from __future__ import annotations

import getpass
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Row, func, select, update
from sqlalchemy.exc import IntegrityError

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy import accounting
from fedtune.privacy.events import Charge, Event, Relation, Unit
from fedtune.privacy.ledger_admission import Answers, Cap, Question, Refused, ask, exhausted, judge
from fedtune.privacy.ledger_book import (
    ALL,
    account_of,
    append,
    charge,
    find_account,
    groups_of,
    held_claim,
    make_account,
    read_entries,
    row_of,
    state_of,
    sum_of,
)
from fedtune.privacy.ledger_extract import extract as extracted
from fedtune.privacy.ledger_records import (
    Account,
    Claim,
    Entry,
    Kind,
    Reservation,
    check_claim,
    event_id,
    event_json,
    named,
    require_cap,
)
from fedtune.privacy.ledger_store import Store, accounts, entries, open_store, totals
from fedtune.privacy.ledger_verify import Checked, verify

__all__ = [
    "Account",
    "Checked",
    "Claim",
    "Entry",
    "Fit",
    "Kind",
    "Ledger",
    "Reservation",
    "open_ledger",
]

_OPTIMISTIC = 2
"""Times that the exact curve is asked outside the lock before it is asked inside."""


@dataclass(frozen=True)
class Fit:
    """Whether a planned run fits, and by how much.

    Attributes
    ----------
    fits : bool
    epsilon : float or None
        Of all charges with the plan; ``None`` without a cap, for then no delta is known.
    cap, delta : float or None
        The owner's.
    room : float or None
        ``cap - epsilon``; negative by what is missing.
    """

    fits: bool
    epsilon: float | None
    cap: float | None
    delta: float | None
    room: float | None


@dataclass(frozen=True)
class Ledger:
    """A ledger that is open. Threads and processes may share its file; see ``open_ledger``.

    Examples
    --------
    A thousand rounds fit a cap of 2 by the exact curve, though not by Renyi alone:

    >>> import tempfile
    >>> from fedtune.privacy.events import PoissonGaussian
    >>> folder = tempfile.TemporaryDirectory()
    >>> ledger = open_ledger(Path(folder.name) / "ledger.db", actor="doctest")
    >>> notes = ledger.account("notes", Unit.EXAMPLE, Relation.ADD_OR_REMOVE_ONE)
    >>> notes = ledger.set_budget(notes, 2.0, 1e-5, actor="owner", note="agreed")
    >>> held = ledger.reserve(notes, Claim("job", 0, 0, PoissonGaussian(0.01, 1.0), 1000))
    >>> ledger.release(held)
    >>> f"{ledger.spent(notes, 1e-5).epsilon:.3f}"
    '1.828'
    >>> [(entry.kind, entry.count) for entry in ledger.entries(notes)]
    [('budget', None), ('reserve', 1000), ('release', 1000)]
    >>> folder.cleanup()
    """

    store: Store
    actor: str
    _answers: Answers = field(default_factory=dict, repr=False, compare=False)

    def account(self, dataset: str, unit: Unit, relation: Relation) -> Account:
        """Return an account as it is now; make it when there is none."""
        named("dataset", dataset)
        unit, relation = Unit(unit), Relation(relation)
        found = self.find(dataset, unit, relation)
        if found is None:
            try:
                with self.store.writing() as db:
                    if find_account(db, dataset, unit, relation) is None:
                        make_account(db, dataset, unit, relation)
            except FedtuneError as error:
                # Another process made it in this moment: one row stays.
                if not isinstance(error.__cause__, IntegrityError):
                    raise
            found = self.find(dataset, unit, relation)
        if found is None:
            raise FedtuneError(f"no account for '{dataset}' could be made", code=ExitCode.LEDGER)
        return found

    def find(self, dataset: str, unit: Unit, relation: Relation) -> Account | None:
        """Return an account as it is now, or ``None``."""
        with self.store.reading() as db:
            return find_account(db, dataset, unit, relation)

    def accounts(self) -> list[Account]:
        """Return every account, by name."""
        order = (accounts.c.dataset, accounts.c.unit, accounts.c.relation)
        with self.store.reading() as db:
            return [account_of(row) for row in db.execute(select(accounts).order_by(*order))]

    def set_budget(
        self,
        account: Account,
        epsilon: float | None,
        delta: float | None,
        actor: str,
        note: str,
    ) -> Account:
        """Set the owner's cap over all jobs, as an entry of the chain.

        Parameters
        ----------
        epsilon, delta : float or None
            Both ``None`` takes the cap away. A cap below what is spent admits nothing more.
        actor, note : str
            Who decided, and why.
        """
        named("actor", actor)
        named("note", note)
        if epsilon is not None or delta is not None:
            if epsilon is None or delta is None:
                hint = "give both, or neither to take the cap away"
                raise FedtuneError(
                    f"epsilon = {epsilon}, delta = {delta}", hint=hint, code=ExitCode.PRIVACY
                )
            require_cap("the budget", epsilon, delta)
            epsilon, delta = float(epsilon), float(delta)
        with self.store.writing() as db:
            row = row_of(db, account, lock=True)
            detail = {"epsilon": epsilon, "delta": delta, "note": note}
            append(db, row, Kind.BUDGET, actor, detail)
            here = accounts.c.id == account.id
            db.execute(update(accounts).where(here).values(epsilon=epsilon, delta=delta))
        return self._again(account)

    def reserve(self, account: Account, claim: Claim) -> Reservation:
        """Charge a claim, durably, or raise. Only then may noise be drawn.

        The same claim twice is one reservation while it has not ended: its output has
        not left. A caller that lets outputs leave before it calls ``release`` must take
        ``next_attempt`` after a crash instead.

        Raises
        ------
        FedtuneError
            ``BUDGET_EXHAUSTED`` when the owner's cap or ``claim.limit`` would be
            passed; ``LEDGER`` for a claim that ended or was for something else;
            ``PRIVACY`` for an event that cannot be accounted.
        """
        check_claim(claim)
        for inside in (*[False] * _OPTIMISTIC, True):
            with self.store.writing() as db:
                row = row_of(db, account, lock=True)
                held = held_claim(db, account, claim)
                if held is not None:
                    return held
                verdict = judge(db, account_of(row), claim, self._answers)
                while inside and isinstance(verdict, Question):
                    ask(verdict, self._answers)
                    verdict = judge(db, account_of(row), claim, self._answers)
                if verdict is None:
                    return self._write(db, row, claim)
            if isinstance(verdict, Refused):
                raise exhausted(account, claim, verdict)
            ask(verdict, self._answers)  # seconds: not while others wait for the lock
        raise FedtuneError("the ledger is busy", hint="try again", code=ExitCode.LEDGER)

    def release(self, reservation: Reservation) -> None:
        """Note that the output leaves; call it just before, and keep it back on an error.

        Final, and once: of two that hold the same reservation, one may let its output go.
        """
        self._end(reservation, Kind.RELEASE, {})

    def abort(self, reservation: Reservation, reason: str) -> None:
        """Take a reservation back. Only for what certainly never left."""
        self._end(reservation, Kind.ABORT, {"reason": named("reason", reason)})

    def next_attempt(self, account: Account, job: str, round: int) -> int:  # noqa: A002
        """Return the smallest attempt of a round that no claim has used."""
        with self.store.reading() as db:
            used = set(
                db.scalars(
                    select(entries.c.attempt).where(
                        entries.c.account == account.id,
                        entries.c.kind == Kind.RESERVE.value,
                        entries.c.job == job,
                        entries.c.round == round,
                    )
                )
            )
        return next(number for number in range(len(used) + 1) if number not in used)

    def spent(self, account: Account, delta: float, job: str | None = None) -> accounting.Spent:
        """Account all that counts (of one job, when named): reserved and released."""
        charges = [Charge(event, count) for event, count in self.groups(account, job).items()]
        return accounting.spent(charges, delta, account.relation)

    def groups(self, account: Account, job: str | None = None) -> dict[Event, int]:
        """Return what counts (of one job, when named), grouped by event."""
        with self.store.reading() as db:
            return groups_of(db, account, ALL if job is None else job)

    def jobs(self, account: Account) -> list[str]:
        """Return the jobs that were ever charged, by name."""
        with self.store.reading() as db:
            here = (totals.c.account == account.id, totals.c.job != ALL)
            return sorted(set(db.scalars(select(totals.c.job).where(*here))))

    def renyi(self, account: Account) -> NDArray[np.float64]:
        """Return the Renyi vector of all that counts, shape ``(len(accounting.ORDERS),)``."""
        with self.store.reading() as db:
            return sum_of(db, account).vector

    def admits(
        self, account: Account, claim: Claim, cap: tuple[float, float] | None = None
    ) -> bool:
        """Return whether ``reserve`` would admit a new claim now; charges nothing.

        ``cap`` is one more (epsilon, delta) over all charges of the account.
        """
        check_claim(claim)
        if cap is not None:
            require_cap("the cap", *cap)
        more = None if cap is None else Cap(*cap)
        while True:
            with self.store.reading() as db:
                now = account_of(row_of(db, account))
                verdict = judge(db, now, claim, self._answers, more)
            if not isinstance(verdict, Question):
                return verdict is None
            ask(verdict, self._answers)

    def would_fit(self, account: Account, groups: Mapping[Event, int]) -> Fit:
        """Return whether a whole planned run fits the owner's cap (seconds)."""
        now = self._again(account)
        if now.epsilon is None or now.delta is None:
            return Fit(True, None, None, None, None)
        together = self.groups(now)
        for event, count in groups.items():
            together[event] = together.get(event, 0) + count
        charges = [Charge(event, count) for event, count in together.items()]
        epsilon = accounting.spent(charges, now.delta, now.relation).epsilon
        fits = math.isfinite(epsilon) and 0.0 <= epsilon <= now.epsilon
        return Fit(fits, epsilon, now.epsilon, now.delta, now.epsilon - epsilon)

    def entries(self, account: Account | None = None, job: str | None = None) -> list[Entry]:
        """Return entries (of one account, of one job), in the order of their chains."""
        where = [] if account is None else [entries.c.account == account.id]
        where += [] if job is None else [entries.c.job == job]
        with self.store.reading() as db:
            return list(read_entries(db, *where))

    def in_flight(self, account: Account) -> int:
        """Return how many reservations have neither been released nor aborted."""
        here = entries.c.account == account.id
        with self.store.reading() as db:
            claims = select(func.count()).where(here, entries.c.kind == Kind.RESERVE.value)
            ends = select(func.count()).where(here, entries.c.reservation.is_not(None))
            return (db.scalar(claims) or 0) - (db.scalar(ends) or 0)

    def verify(self) -> tuple[Checked, ...]:
        """Walk every chain, rebuild what is derived, and compare.

        Raises
        ------
        FedtuneError
            With ``ExitCode.LEDGER``, naming the first entry or total that is wrong.
        """
        with self.store.reading() as db:
            return verify(db)

    def extract(self, job: str, compact: bool = False) -> dict[str, Any]:
        """Return what a report needs of the ledger, as JSON.

        Parameters
        ----------
        job : str
        compact : bool
            Runs of like entries (same event, count, purpose and state) as one, with
            the first and the last hash.
        """
        with self.store.reading() as db:
            return extracted(db, named("job", job), compact)

    def _again(self, account: Account) -> Account:
        with self.store.reading() as db:
            return account_of(row_of(db, account))

    def _write(self, db: Connection, row: Row[Any], claim: Claim) -> Reservation:
        account, stored = account_of(row), event_json(claim.event)
        entry = append(
            db, row, Kind.RESERVE, self.actor, claim.detail, job=claim.job, round=claim.round,
            attempt=claim.attempt, purpose=claim.purpose, event=stored,
            event_id=event_id(stored), count=claim.count,
        )  # fmt: skip
        charge(db, account, claim.job, claim.event, claim.count)
        return Reservation(
            account, entry.seq, entry.hash, claim.job, claim.round, claim.attempt, claim.purpose,
            claim.event, claim.count,
        )  # fmt: skip

    def _end(self, held: Reservation, kind: Kind, detail: Mapping[str, Any]) -> None:
        with self.store.writing() as db:
            row = row_of(db, held.account, lock=True)
            here = (entries.c.account == held.account.id, entries.c.seq == held.seq)
            if db.scalar(select(entries.c.hash).where(*here)) != held.hash:
                raise FedtuneError(
                    f"reservation {held.seq} of '{held.account.dataset}' is not of this ledger",
                    hint="release with the ledger that reserved",
                    code=ExitCode.LEDGER,
                )
            state = state_of(db, held.account, held.seq)
            if state is kind is Kind.ABORT:
                return
            if state is not None:
                raise FedtuneError(
                    f"cannot {kind.value} reservation {held.seq} of '{held.account.dataset}': "
                    f"it has ended already: {state.value}",
                    hint="a reservation ends once",
                    code=ExitCode.LEDGER,
                )
            stored = event_json(held.event)
            append(
                db, row, kind, self.actor, detail, job=held.job, round=held.round,
                attempt=held.attempt, purpose=held.purpose, event=stored,
                event_id=event_id(stored), count=held.count, reservation=held.seq,
            )  # fmt: skip
            if kind is Kind.ABORT:
                charge(db, held.account, held.job, held.event, -held.count)


def open_ledger(target: str | Path, *, create: bool = True, actor: str | None = None) -> Ledger:
    """Open a ledger; make it when there is none.

    No connection stays open between calls, so a ledger may be shared by threads and
    carried over a fork; processes open the same file, each for itself.

    Parameters
    ----------
    target : str or Path
        A file (SQLite; made with mode 0600; not on a network file system), or a URL
        ``postgresql://USER@HOST/DATABASE``.
    create : bool
        Whether to make a ledger that is not there.
    actor : str, optional
        Who writes, for the entries; by default the user of this process.
    """
    return Ledger(open_store(target, create), named("actor", actor or _user()))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"user {os.getuid()}"
