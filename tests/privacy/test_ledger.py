"""The ledger: what counts, and who is admitted."""

from __future__ import annotations

import contextlib
import math
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy import accounting, ledger_admission
from fedtune.privacy.events import (
    Charge,
    Gaussian,
    PoissonGaussian,
    Relation,
    TruncatedPoissonGaussian,
    Unbounded,
    Unit,
)
from fedtune.privacy.ledger import Ledger, open_ledger
from tests.privacy.ledgers import (
    ADD,
    DELTA,
    SAMPLED,
    STEP,
    claim,
    notes,
    open_again,
    refused,
    tampering,
)

OTHER = Gaussian(15.0)


# ---------------------------------------------------------------- what counts


def test_another_relation_is_no_second_budget(ledger: Ledger) -> None:
    ledger.account("notes", Unit.EXAMPLE, ADD)
    with pytest.raises(FedtuneError, match="second budget"):
        ledger.account("notes", Unit.EXAMPLE, Relation.REPLACE_SPECIAL)
    assert len(ledger.accounts()) == 1


def test_an_account_is_a_data_set_and_a_unit(ledger: Ledger) -> None:
    first = ledger.account("notes", Unit.EXAMPLE, ADD)
    assert ledger.account("notes", Unit.EXAMPLE, ADD) == first
    others = [
        ledger.account("letters", Unit.EXAMPLE, ADD),
        ledger.account("notes", Unit.CLIENT, ADD),
    ]
    assert len({account.id for account in (first, *others)}) == 3
    ledger.reserve(first, claim())
    assert [ledger.groups(account) for account in others] == [{}, {}]
    assert sorted(ledger.accounts(), key=lambda account: account.id) == [first, *others]
    assert ledger.find("nobody", Unit.EXAMPLE, ADD) is None


def test_all_but_aborted_counts(ledger: Ledger) -> None:
    account = notes(ledger)
    held = [ledger.reserve(account, claim(number, count=10**number)) for number in range(3)]
    assert ledger.groups(account) == {STEP: 111}
    ledger.release(held[0])
    ledger.abort(held[1], "no answer")
    assert ledger.groups(account) == ledger.groups(account, "job") == {STEP: 101}
    assert ledger.groups(account, "another") == {}
    assert ledger.in_flight(account) == 1
    assert ledger.spent(account, DELTA).releases == 101
    kinds = [entry.kind for entry in ledger.entries(account)]
    assert kinds == ["reserve", "reserve", "reserve", "release", "abort"]
    assert ledger.entries()[-1].detail == {"reason": "no answer"}
    ledger.verify()


def test_the_golden_epsilon_over_two_jobs(small: Ledger) -> None:
    account = notes(small)
    small.release(small.reserve(account, claim(event=SAMPLED, count=400)))
    small.reserve(account, claim(job="tuning", event=SAMPLED, count=600))
    assert small.spent(account, DELTA).epsilon == pytest.approx(1.8282, abs=5e-5)
    assert small.spent(account, DELTA, "tuning").epsilon < 1.5
    assert small.jobs(account) == ["job", "tuning"]


def test_a_reservation_ends_once(ledger: Ledger) -> None:
    account = notes(ledger)
    left, kept = ledger.reserve(account, claim(1)), ledger.reserve(account, claim(2))
    ledger.release(left)
    with refused(ExitCode.LEDGER):
        ledger.release(left)
    with refused(ExitCode.LEDGER):
        ledger.abort(left, "changed my mind")
    ledger.abort(kept, "never left")
    ledger.abort(kept, "never left")
    with refused(ExitCode.LEDGER):
        ledger.release(kept)
    assert ledger.groups(account) == {STEP: 1}
    assert len(ledger.entries()) == 4


def test_the_same_claim_is_one_reservation_while_it_is_open(ledger: Ledger) -> None:
    account = notes(ledger, 3.0)
    first = ledger.reserve(account, claim())
    again = open_again(ledger).reserve(account, claim(detail={"restarted": True}))
    assert again == first
    assert ledger.groups(account) == {STEP: 1}
    # 1 and 1.0 are the same noise.
    assert ledger.reserve(account, claim(event=Gaussian(20))) == first
    for other in (claim(event=OTHER), claim(count=2)):
        with pytest.raises(FedtuneError, match="was reserved for 1 x"):
            ledger.reserve(account, other)
    assert ledger.reserve(account, claim(purpose="metrics")).seq != first.seq
    ledger.release(first)
    with pytest.raises(FedtuneError, match="has ended already: release") as caught:
        ledger.reserve(account, claim())
    assert "next_attempt" in caught.value.hint
    number = ledger.next_attempt(account, "job", 1)
    assert number == 1
    ledger.abort(ledger.reserve(account, claim(attempt=number)), "late")
    with pytest.raises(FedtuneError, match="has ended already: abort"):
        ledger.reserve(account, claim(attempt=number))
    assert ledger.next_attempt(account, "job", 1) == 2
    assert ledger.next_attempt(account, "job", 9) == 0


def test_an_account_of_another_ledger_is_refused(tmp_path: Path) -> None:
    one, two = open_ledger(tmp_path / "one.db"), open_ledger(tmp_path / "two.db")
    two.account("other", Unit.EXAMPLE, ADD)
    account = notes(one)
    held = one.reserve(account, claim())
    with refused(ExitCode.LEDGER):
        two.reserve(account, claim())
    notes(two)
    with refused(ExitCode.LEDGER):
        two.release(held)


# ---------------------------------------------------------------- admission


def test_v30_exhausted_before_the_round_and_nothing_is_written(ledger: Ledger) -> None:
    account = notes(ledger, 1.0)
    fits = accounting.most(STEP, 1.0, DELTA, ADD, {})
    ledger.reserve(account, claim(1, count=fits - 1))
    ledger.reserve(account, claim(2))
    before = ledger.entries()
    with pytest.raises(FedtuneError) as caught:
        ledger.reserve(account, claim(3))
    assert caught.value.code == ExitCode.BUDGET_EXHAUSTED
    for part in ("data set 'notes' (unit example)", "of 1 at delta 1e-05", "1 x Gaussian",
                 "room for 0", f"{ledger.spent(account, DELTA).epsilon:.4f}"):  # fmt: skip
        assert part in str(caught.value)
    assert "budget set" in caught.value.hint
    assert ledger.entries() == before
    # The exact curve admits what Renyi alone would not, and not one more.
    renyi, _ = accounting.epsilon_of_rdp(fits * accounting.rdp(STEP, ADD), DELTA)
    assert renyi > 1.0 >= ledger.spent(account, DELTA).epsilon
    assert accounting.spent({STEP: fits + 1}, DELTA, ADD).epsilon > 1.0


def test_room_beside_other_events(small: Ledger) -> None:
    account = notes(small, 2.0)
    small.reserve(account, claim(1, event=OTHER, count=20))
    room = accounting.most(STEP, 2.0, DELTA, ADD, {OTHER: 20})
    assert 0 < room < accounting.most(STEP, 2.0, DELTA, ADD, {})
    with pytest.raises(FedtuneError, match=f"room for {room}"):
        small.reserve(account, claim(2, count=room + 1))
    small.reserve(account, claim(2, count=room))
    with refused(ExitCode.BUDGET_EXHAUSTED):
        small.reserve(account, claim(3))


def test_aborting_makes_room_again(small: Ledger) -> None:
    account = notes(small, 1.0)
    held = small.reserve(account, claim(1, count=accounting.most(STEP, 1.0, DELTA, ADD, {})))
    with refused(ExitCode.BUDGET_EXHAUSTED):
        small.reserve(account, claim(2))
    small.abort(held, "too few clients were up, nothing was drawn")
    small.reserve(account, claim(2))


def test_the_answer_of_the_curve_is_asked_for_once(
    small: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    account, calls, most = notes(small, 1.0), [], accounting.most

    def counted(*given: Any) -> int:
        calls.append(given)
        return most(*given)

    monkeypatch.setattr(accounting, "most", counted)
    small.reserve(account, claim(0, count=most(STEP, 1.0, DELTA, ADD, {}) - 5))
    for number in range(1, 6):
        small.reserve(account, claim(number))
    with refused(ExitCode.BUDGET_EXHAUSTED):
        small.reserve(account, claim(6))
    assert len(calls) == 1


def test_a_job_has_a_target_of_its_own(small: Ledger) -> None:
    account = notes(small, 3.0)
    limit = (0.8, DELTA)
    fits = accounting.most(STEP, *limit, ADD, {})
    small.reserve(account, claim(1, job="first", count=fits, limit=limit))
    with pytest.raises(FedtuneError, match="the target of job 'first' is exhausted"):
        small.reserve(account, claim(2, job="first", limit=limit))
    small.reserve(account, claim(1, job="second", count=fits, limit=limit))
    with pytest.raises(FedtuneError, match="the budget of data set 'notes'"):
        small.reserve(account, claim(1, job="third", count=10**4, limit=(100.0, DELTA)))


def test_a_budget_is_set_lowered_raised_and_taken_away_in_the_chain(ledger: Ledger) -> None:
    account = notes(ledger, 2.0)
    assert (account.epsilon, account.delta) == (2.0, DELTA)
    ledger.reserve(account, claim(1, count=50))
    lower = ledger.set_budget(account, 0.1, 1e-6, "owner", "withdrew")
    assert (lower.epsilon, lower.delta) == (0.1, 1e-6)
    with refused(ExitCode.BUDGET_EXHAUSTED):
        ledger.reserve(account, claim(2))  # what the caller thinks the cap is does not matter
    ledger.set_budget(account, 4.0, DELTA, "board", "extended")
    ledger.reserve(account, claim(2))
    ledger.set_budget(account, None, None, "board", "public since today")
    ledger.reserve(account, claim(3, count=10**6))
    found = [(e.actor, e.detail) for e in ledger.entries(account) if e.kind == "budget"]
    assert found == [
        ("owner", {"epsilon": 2.0, "delta": DELTA, "note": "agreed"}),
        ("owner", {"epsilon": 0.1, "delta": 1e-6, "note": "withdrew"}),
        ("board", {"epsilon": 4.0, "delta": DELTA, "note": "extended"}),
        ("board", {"epsilon": None, "delta": None, "note": "public since today"}),
    ]
    ledger.verify()


@pytest.mark.parametrize(
    ("epsilon", "delta"),
    [(0.0, DELTA), (-1.0, DELTA), (math.nan, DELTA), (math.inf, DELTA), (1.0, 0.0), (1.0, 1.0),
     (1.0, math.nan), (True, DELTA), ("1", DELTA), (1.0, None), (None, DELTA)],
)  # fmt: skip
def test_a_budget_that_is_none_is_refused(small: Ledger, epsilon: Any, delta: Any) -> None:
    account = notes(small)
    with refused(ExitCode.PRIVACY):
        small.set_budget(account, epsilon, delta, "owner", "agreed")
    assert small.entries() == []


BAD_CLAIMS: list[dict[str, Any]] = [
    {"count": 0}, {"count": -1}, {"count": True}, {"count": 1.5}, {"count": 2**60},
    {"number": -1}, {"attempt": -1}, {"number": 1.0}, {"job": ""}, {"job": "a\nb"},
    {"purpose": " "}, {"job": "x" * 301}, {"detail": {"loss": math.nan}}, {"detail": {"x": {1}}},
    {"limit": (math.nan, DELTA)}, {"limit": (1.0, 0.0)}, {"event": Gaussian(0.0)},
    {"event": Gaussian(math.nan)}, {"event": Gaussian(math.inf)}, {"event": Gaussian(-1.0)},
    {"event": PoissonGaussian(0.0, 1.0)}, {"event": PoissonGaussian(1.5, 1.0)},
    {"event": TruncatedPoissonGaussian(0.1, 1.0, 100, 20)},
]  # fmt: skip


@pytest.mark.parametrize("changes", BAD_CLAIMS, ids=str)
def test_a_claim_that_cannot_be_kept_or_accounted_is_refused(
    small: Ledger, changes: dict[str, Any]
) -> None:
    account = notes(small)
    with pytest.raises(FedtuneError) as caught:
        small.reserve(account, claim(**changes))
    assert caught.value.code in {ExitCode.LEDGER, ExitCode.PRIVACY}
    assert small.entries() == []


@pytest.mark.parametrize(
    ("name", "answer", "cap"),
    [
        ("rdp", math.nan, None), ("rdp", -1.0, None), ("rdp", math.nan, 1.0), ("rdp", -1.0, 1.0),
        ("epsilon_of_rdp", math.nan, 1.0), ("epsilon_of_rdp", -0.5, 1.0),
        ("most", -1, 1e-3), ("most", math.nan, 1e-3), ("most", 1e9, 1e-3), ("most", True, 1e-3),
    ],
)  # fmt: skip
def test_v31_an_accountant_that_fails_admits_nothing(
    small: Ledger, monkeypatch: pytest.MonkeyPatch, name: str, answer: Any, cap: float | None
) -> None:
    account = notes(small, cap)
    real = accounting.rdp(STEP, ADD)
    wrong: dict[str, Callable[..., Any]] = {
        "rdp": lambda *_: np.where(np.arange(len(real)) == 3, answer, real),
        "epsilon_of_rdp": lambda *_: (answer, 2.0),
        "most": lambda *_: answer,
    }
    monkeypatch.setattr(accounting, name, wrong[name])
    if name == "epsilon_of_rdp":
        monkeypatch.setattr(accounting, "most", lambda *_: 0)
    with pytest.raises(FedtuneError) as caught:
        small.reserve(account, claim(1, count=100))
    assert caught.value.code in {ExitCode.PRIVACY, ExitCode.BUDGET_EXHAUSTED}
    assert small.groups(account) == {}


def test_a_release_without_a_bound(small: Ledger) -> None:
    """It is refused under a cap; without one it is written down, and is never forgotten."""
    account, unknown = notes(small, 8.0), Unbounded("exact metrics")
    with refused(ExitCode.BUDGET_EXHAUSTED):
        small.reserve(account, claim(1, event=unknown))
    account = small.set_budget(account, None, None, "owner", "test data only")
    small.release(small.reserve(account, claim(1, event=unknown)))
    assert small.spent(account, DELTA).epsilon == math.inf
    account = small.set_budget(account, 8.0, DELTA, "owner", "from now on")
    with refused(ExitCode.BUDGET_EXHAUSTED):
        small.reserve(account, claim(2))
    assert not small.would_fit(account, {STEP: 1}).fits
    small.verify()


def test_v31_an_event_of_another_version_has_no_bound(tmp_path: Path) -> None:
    """What an older program cannot read is unbounded to it, not free."""
    path = tmp_path / "ledger.db"
    ledger = open_ledger(path)
    account = notes(ledger, 2.0)
    ledger.reserve(account, claim())
    with tampering(path) as db:
        db.execute("UPDATE ledger_totals SET event = replace(event, 'gaussian', 'staircase')")
    assert [type(event) for event in ledger.groups(account)] == [Unbounded]
    assert ledger.spent(account, DELTA).epsilon == math.inf


def test_without_a_renyi_bound_the_curve_decides(
    small: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounting, "most", lambda *_: 10)  # takes seconds for this sampler
    account = small.account("people", Unit.CLIENT, Relation.REPLACE_SPECIAL)
    account = small.set_budget(account, 2.0, DELTA, "owner", "agreed")
    drawn = TruncatedPoissonGaussian(0.1, 2.0, 300, 60)
    with pytest.raises(FedtuneError, match="room for 10"):
        small.reserve(account, claim(1, event=drawn, count=11))
    held = small.reserve(account, claim(1, event=drawn, count=10))
    assert np.isinf(small.renyi(account)).all()
    plain = Gaussian(30.0)
    small.reserve(account, claim(2, event=plain))
    small.abort(held, "nobody was up")
    exact = accounting.rdp(plain, account.relation)
    assert np.allclose(small.renyi(account), exact, rtol=1e-12)
    small.verify()


def test_many_different_events_are_admitted_by_renyi_alone(
    small: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_admission, "MOST_EVENTS", 3)
    monkeypatch.setattr(accounting, "most", lambda *_: pytest.fail("the curve was asked"))
    account = notes(small, 1.5)
    with refused(ExitCode.BUDGET_EXHAUSTED):
        for number in range(200):
            small.reserve(account, claim(number, event=PoissonGaussian(0.9, 6 + number / 100)))
    groups = small.groups(account)
    assert len(groups) > 3
    assert accounting.spent(groups, DELTA, ADD).epsilon <= 1.5


def test_many_different_events_without_sampling_are_a_filter_of_their_own(
    small: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum of 1 / z^2 admits more than Renyi does, and takes no time."""
    monkeypatch.setattr(ledger_admission, "MOST_EVENTS", 3)
    account = notes(small, 1.5)
    with refused(ExitCode.BUDGET_EXHAUSTED):
        for number in range(200):
            small.reserve(account, claim(number, event=Gaussian(10.0 + number / 100)))
    groups = small.groups(account)
    found = accounting.spent(groups, DELTA, ADD)
    assert found.epsilon <= 1.5 < found.epsilon_rdp
    one_more = groups | {Gaussian(10.0 + len(groups) / 100): 1}
    assert accounting.spent(one_more, DELTA, ADD).epsilon > 1.5


def test_the_same_statements_at_every_round(small: Ledger) -> None:
    """Admission does not grow: the same statements, each by a key, whatever came before."""
    account, seen = notes(small, 2.0), []

    @event.listens_for(small.store.engine, "before_cursor_execute")
    def hear(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        seen.append(statement)

    def statements(number: int) -> list[str]:
        seen.clear()
        attempt = small.next_attempt(account, "job", number)
        small.release(small.reserve(account, claim(number, attempt, event=Gaussian(500 + number))))
        return list(seen)

    statements(0)
    early = statements(1)
    for number in range(2, 40):
        statements(number)
    assert statements(40) == early
    assert len(early) < 25
    with contextlib.closing(sqlite3.connect(small.store.where)) as db:
        plans = [
            row[3]
            for statement in early
            if statement.startswith(("SELECT", "UPDATE"))
            for row in db.execute(f"EXPLAIN QUERY PLAN {statement}", "x" * statement.count("?"))
        ]
    keys = (
        "(rowid=?)", "(account=? AND seq=?)", "(account=? AND job=?)", "purpose=? AND kind=?)",
        "(account=? AND job=? AND event_id=?)", "(account=? AND reservation=?)",
        "ledger_one_claim (account=? AND job=? AND round=?)",
    )  # fmt: skip
    assert len(plans) > 10
    for plan in plans:
        assert plan.startswith("SEARCH"), plan
        assert plan.endswith(keys), plan
        # All entries of a job would be one search too, and grow.
        assert not ("entries" in plan and plan.endswith("(account=? AND job=?)")), plan


def test_would_fit_says_by_how_much(small: Ledger) -> None:
    account = notes(small)
    assert small.would_fit(account, {STEP: 10**9}).fits
    account = notes(small, 2.0)
    assert small.would_fit(account, {SAMPLED: 1000}).room == pytest.approx(2 - 1.8282, abs=1e-4)
    small.reserve(account, claim(count=40))
    fit = small.would_fit(account, {STEP: 100})
    assert not fit.fits
    assert fit.epsilon == accounting.spent({STEP: 140}, DELTA, ADD).epsilon
    assert fit.room == 2.0 - fit.epsilon
    assert small.would_fit(account, {STEP: 50}).fits
    assert small.groups(account) == {STEP: 40}


def test_admits_charges_nothing_and_agrees_with_reserve(small: Ledger) -> None:
    account = notes(small, 1.0)
    fits = accounting.most(STEP, 1.0, DELTA, ADD, {})
    assert small.admits(account, claim(count=fits))
    assert not small.admits(account, claim(count=fits + 1))
    assert not small.admits(account, claim(count=fits), cap=(0.5, DELTA))
    assert len(small.entries()) == 1


def test_a_calibrated_run_fits_to_the_last_round(small: Ledger) -> None:
    rounds = 40
    z = accounting.noise_multiplier(2.0, DELTA, ADD, rounds, lambda z: PoissonGaussian(0.05, z))
    account = notes(small, 2.0)
    for number in range(rounds):
        small.reserve(account, claim(number, event=PoissonGaussian(0.05, z)))
    assert 1.99 < small.spent(account, DELTA).epsilon <= 2.0


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "release", "abort"]),
        st.sampled_from([STEP, OTHER, Gaussian(3.0), Unbounded("exact")]),
        st.integers(1, 1000),
    ),
    max_size=25,
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(operations=OPERATIONS)
def test_totals_are_those_of_the_entries(
    tmp_path_factory: pytest.TempPathFactory, operations: list[tuple[str, Any, int]]
) -> None:
    """Whatever happens, groups and sum are what a list of charges gives; the sum rounds up."""
    ledger = open_ledger(tmp_path_factory.mktemp("any") / "ledger.db")
    account, open_ones, counted = notes(ledger), [], []
    for number, (what, release, count) in enumerate(operations):
        if what == "reserve":
            open_ones.append(ledger.reserve(account, claim(number, event=release, count=count)))
            counted.append(Charge(release, count))
        elif open_ones:
            held = open_ones.pop(count % len(open_ones))
            if what == "release":
                ledger.release(held)
            else:
                ledger.abort(held, "test")
                counted.remove(Charge(held.event, held.count))
    expected: dict[Any, int] = {}
    for charge in counted:
        expected[charge.event] = expected.get(charge.event, 0) + charge.count
    assert ledger.groups(account) == expected
    exact = sum(
        (count * accounting.rdp(each, ADD) for each, count in expected.items()),
        np.zeros(len(accounting.ORDERS)),
    )
    kept = ledger.renyi(account)
    assert np.allclose(kept, exact, rtol=1e-9, atol=1e-9)
    assert (kept >= exact * (1 - 1e-12)).all()
    assert ledger.in_flight(account) == len(open_ones)
    ledger.verify()
