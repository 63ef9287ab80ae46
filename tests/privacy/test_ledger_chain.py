"""The ledger: what cannot be changed unseen, extracts, files, threads and processes."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from sqlalchemy import text

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy import accounting, ledger_store
from fedtune.privacy.events import (
    Gaussian,
    PoissonGaussian,
    Unit,
)
from fedtune.privacy.ledger import Ledger, open_ledger
from fedtune.privacy.ledger_records import entry_hash, event_json
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
    together,
)

OTHER = Gaussian(15.0)


# ---------------------------------------------------------------- the chain


@pytest.fixture
def history(tmp_path: Path) -> Path:
    """Five entries of one account, and one of another."""
    path = tmp_path / "ledger.db"
    ledger = open_ledger(path, actor="tester")
    account = notes(ledger, 5.0)
    ledger.release(ledger.reserve(account, claim(1, count=7)))
    ledger.abort(ledger.reserve(account, claim(2)), "late")
    ledger.reserve(ledger.account("letters", Unit.CLIENT, ADD), claim())
    assert [(one.account.dataset, one.entries) for one in ledger.verify()] == [
        ("notes", 5), ("letters", 1),
    ]  # fmt: skip
    return path


@pytest.mark.parametrize(
    "change",
    ["count = 6", "event = replace(event, '20.0', '200.0')", "actor = 'somebody'", "job = 'other'",
     "round = 3", "attempt = 1", "purpose = 'x'", "time = '2020-01-01'", "detail = '{\"a\":1}'",
     "hash = replace(hash, substr(hash, 1, 1), 'x')", "kind = 'budget'", "detail = '{'",
     "previous = 'x'", "event = '{'"],
)  # fmt: skip
def test_a_changed_entry_is_named(history: Path, change: str) -> None:
    with tampering(history) as db:
        db.execute(f"UPDATE ledger_entries SET {change} WHERE account = 1 AND seq = 2")
    with pytest.raises(FedtuneError, match="entry 2 of 'notes'") as caught:
        open_ledger(history).verify()
    assert caught.value.code == ExitCode.LEDGER


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("DELETE FROM ledger_entries WHERE account = 1 AND seq = 3", "entry 4 of 'notes'"),
        ("DELETE FROM ledger_entries WHERE account = 1 AND seq = 1", "entry 2 of 'notes'"),
        ("DELETE FROM ledger_entries WHERE account = 1 AND seq = 5", "ends at entry 4, not 5"),
        ("DELETE FROM ledger_entries WHERE account = 2", "ends at entry 0, not 1"),
        ("UPDATE ledger_entries SET seq = 9 WHERE account = 1 AND seq = 5", "entry 9"),
        ("UPDATE ledger_accounts SET epsilon = 50 WHERE id = 1", "the budget is (5.0, 1e-05)"),
        ("UPDATE ledger_accounts SET head = 'x' WHERE id = 2", "account 'letters'"),
        ("UPDATE ledger_accounts SET dataset = 'x' WHERE id = 1", "entry 1 of 'x'"),
        ("UPDATE ledger_accounts SET unit = 'x' WHERE id = 1", "'x' is not a valid Unit"),
        ("UPDATE ledger_totals SET count = 6 WHERE count = 7", "its entries say 7"),
        ("DELETE FROM ledger_totals", "its entries say 7"),
        ("UPDATE ledger_totals SET event = replace(event, '20.0', '200.0')", "event of another"),
        ("UPDATE ledger_sums SET vector = zeroblob(length(vector))", "the Renyi sum of all jobs"),
        ("UPDATE ledger_sums SET vector = x'00'", "sum is damaged"),
    ],
)  # fmt: skip
def test_what_was_removed_or_derived_wrongly_is_named(
    history: Path, change: str, words: str
) -> None:
    with tampering(history) as db:
        assert db.execute(change).rowcount > 0
    with pytest.raises(FedtuneError) as caught:
        open_ledger(history).verify()
    assert words in str(caught.value)
    assert caught.value.code == ExitCode.LEDGER


def test_an_entry_forged_with_a_right_hash_is_named(history: Path) -> None:
    """A second end of a reservation, hashed as it should be."""
    ledger = open_ledger(history)
    entry = ledger.entries(notes(ledger))[4].to_json()
    forged = entry | {"seq": 6, "previous": entry["hash"], "reservation": 2}
    forged["hash"] = entry_hash(forged)
    with tampering(history) as db:
        db.execute("DROP INDEX ledger_one_claim")
        db.execute("DROP INDEX ledger_one_end")
        names = [name for name in forged if name not in {"schema", "dataset", "unit", "relation"}]
        values = [
            json.dumps(forged[name]) if isinstance(forged[name], dict) else forged[name]
            for name in names
        ]
        marks = ", ".join("?" * (len(names) + 1))
        db.execute(
            f"INSERT INTO ledger_entries ({', '.join(names)}, account) VALUES ({marks})",
            [*values, 1],
        )
        db.execute("UPDATE ledger_accounts SET length = 6, head = ? WHERE id = 1", [forged["hash"]])
    with pytest.raises(FedtuneError, match=r"entry 6 .* ends reservation 2, which is not open"):
        open_ledger(history).verify()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE ledger_entries SET count = 1",
        "DELETE FROM ledger_entries",
        "TRUNCATE ledger_entries",
    ],
)
def test_the_database_refuses_to_change_entries(ledger: Ledger, statement: str) -> None:
    if "TRUNCATE" in statement and ledger.store.engine.dialect.name == "sqlite":
        pytest.skip("SQLite has no such statement")
    ledger.reserve(notes(ledger), claim())
    with pytest.raises(FedtuneError, match="never changed"), ledger.store.writing() as db:
        db.execute(text(statement))
    ledger.verify()


def test_sums_of_other_orders_are_made_again(history: Path) -> None:
    """A fedtune with other Renyi orders does not trust what another one added up."""
    with tampering(history) as db:
        db.execute("UPDATE ledger_sums SET orders = 'others', vector = zeroblob(8)")
    ledger = open_ledger(history)
    exact = 7 * accounting.rdp(STEP, ADD)
    assert np.allclose(ledger.renyi(notes(ledger)), exact, rtol=1e-12)
    ledger.reserve(notes(ledger), claim(5))
    assert np.allclose(ledger.renyi(notes(ledger)), exact + accounting.rdp(STEP, ADD), rtol=1e-12)
    ledger.verify()


# ---------------------------------------------------------------- extracts


def test_an_extract_holds_what_a_third_party_needs(ledger: Ledger) -> None:
    account = notes(ledger, 5.0)
    ledger.release(ledger.reserve(account, claim(1, count=300, detail={"clip_norm": 0.5})))
    ledger.abort(ledger.reserve(account, claim(2, event=OTHER)), "late")
    ledger.reserve(account, claim(1, job="tuning", event=OTHER, count=9))
    ledger.reserve(ledger.account("elsewhere", Unit.CLIENT, ADD), claim(job="tuning"))
    found = json.loads(json.dumps(ledger.extract("job"), allow_nan=False))
    assert (found["schema"], found["job"]) == (1, "job")
    (one,) = found["accounts"]
    assert (one["dataset"], one["unit"], one["relation"]) == ("notes", "example", ADD.value)
    assert one["budget"] == {"epsilon": 5.0, "delta": DELTA}
    assert one["head"] == ledger.entries(account)[-1].hash
    assert one["groups"] == [{"event": event_json(STEP), "count": 300}]
    kinds = [entry["kind"] for entry in one["entries"]]
    assert kinds == ["reserve", "release", "reserve", "abort"]
    assert all(entry["hash"] == entry_hash(entry) for entry in one["entries"])
    assert one["entries"][0]["detail"] == {"clip_norm": 0.5}
    # V28: the tuning run on the same people is in the report of every other job.
    assert [(job["job"], [g["count"] for g in job["groups"]]) for job in one["all_jobs"]] == [
        ("job", [300]), ("tuning", [9]),
    ]  # fmt: skip
    assert sorted(group["count"] for group in one["all_groups"]) == [9, 300]
    assert one["all_jobs"][0]["first"] < one["all_jobs"][0]["last"]
    assert [account["dataset"] for account in ledger.extract("tuning")["accounts"]] == [
        "elsewhere", "notes",
    ]  # fmt: skip
    assert ledger.extract("nobody")["accounts"] == []


def test_stock_dp_accounting_gets_the_same_epsilon_from_an_extract(small: Ledger) -> None:
    account = notes(small)
    small.reserve(account, claim(1, event=SAMPLED, count=500))
    small.reserve(account, claim(2, event=PoissonGaussian(0.02, 1.5), count=50))
    (one,) = small.extract("job", compact=True)["accounts"]
    accountant = PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for group in one["groups"]:
        gaussian = dp.GaussianDpEvent(group["event"]["noise_multiplier"])
        sampled = dp.PoissonSampledDpEvent(group["event"]["sampling_probability"], gaussian)
        accountant.compose(sampled, group["count"])
    ours = small.spent(account, DELTA).epsilon
    assert ours == pytest.approx(accountant.get_epsilon(DELTA), abs=1e-4)


def test_a_compact_extract_joins_like_rounds(small: Ledger) -> None:
    account = notes(small)
    for number in range(1, 41):
        held = small.reserve(account, claim(number, count=3, detail={"number": number}))
        if number == 20:
            small.abort(held, "late")
        elif number != 40:
            small.release(held)
    entries = small.entries(account)
    (one,) = small.extract("job", compact=True)["accounts"]
    assert "entries" not in one
    shape = [(run["state"], run["times"], run["rounds"]) for run in one["runs"]]
    assert shape == [
        ("released", 19, [1, 19]), ("aborted", 1, [20, 20]), ("released", 19, [21, 39]),
        ("reserved", 1, [40, 40]),
    ]  # fmt: skip
    counted = sum(r["times"] * r["count"] for r in one["runs"] if r["state"] != "aborted")
    assert counted == one["groups"][0]["count"] == 117
    first, last = one["runs"][0], one["runs"][-1]
    assert first["first"] == {"seq": 1, "hash": entries[0].hash, "time": entries[0].time}
    assert first["detail"] == {"number": 1}
    assert last["last"]["hash"] == one["head"]
    assert len(json.dumps(one)) < 5000


# ---------------------------------------------------------------- files, threads, processes


def test_a_new_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ledger.db"
    ledger = open_ledger(path)
    ledger.reserve(notes(ledger), claim())
    files = sorted(path.parent.iterdir())
    assert [file.name for file in files] == ["ledger.db", "ledger.db-shm", "ledger.db-wal"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_commits_wait_for_the_disk(small: Ledger) -> None:
    with small.store.reading() as db:
        found = [db.execute(text(f"PRAGMA {name}")).scalar() for name in
                 ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")]  # fmt: skip
    assert found == ["wal", 2, 1, 30_000]


@pytest.mark.parametrize("target", ["", ":memory:", "sqlite://", "mysql://u:secret@h/d", "://"])
def test_what_is_no_ledger_is_refused(target: str) -> None:
    with refused(ExitCode.LEDGER) as caught:
        open_ledger(target)
    assert "secret" not in str(caught.value)


def test_files_that_are_no_ledger_are_refused_and_left_alone(tmp_path: Path) -> None:
    words = tmp_path / "words.db"
    words.write_text("This is no database. " * 100)
    other = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(other)) as db, db:
        db.execute("CREATE TABLE people (name TEXT)")
    newer = tmp_path / "newer.db"
    open_ledger(newer)
    with contextlib.closing(sqlite3.connect(newer)) as db, db:
        db.execute("UPDATE ledger_meta SET schema = 2")
    for path, said in ((words, "not a database"), (other, "other.db"), (newer, "schema [2]")):
        before = path.read_bytes()
        with refused(ExitCode.LEDGER) as caught:
            open_ledger(path)
        assert said in str(caught.value)
        assert path.read_bytes() == before
    with refused(ExitCode.LEDGER):
        open_ledger(tmp_path / "none.db", create=False)
    assert not (tmp_path / "none.db").exists()


def test_a_server_that_is_not_there_is_refused_without_its_password(tmp_path: Path) -> None:
    with refused(ExitCode.LEDGER) as caught:
        open_ledger(f"postgresql://me:secret@/db?host={tmp_path}&password=secret2")
    assert "secret" not in str(caught.value)
    assert "me:***@/db" in str(caught.value)


def test_a_file_that_was_exchanged_is_noticed(tmp_path: Path) -> None:
    """Charges never go to a file that nobody can see any more."""
    path = tmp_path / "ledger.db"
    ledger = open_ledger(path)
    account = notes(ledger)
    ledger.reserve(account, claim(1))
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("VACUUM INTO ?", [str(tmp_path / "copy.db")])
    ledger.reserve(account, claim(2))
    for name in ("ledger.db", "ledger.db-wal", "ledger.db-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    with refused(ExitCode.LEDGER):
        ledger.reserve(account, claim(3))
    assert not path.exists()
    shutil.move(tmp_path / "copy.db", path)
    ledger.reserve(account, claim(4))
    assert [entry.round for entry in open_ledger(path).entries()] == [1, 4]
    ledger.verify()


def test_a_ledger_that_stays_busy_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_store, "BUSY_SECONDS", 0.1)
    path = tmp_path / "ledger.db"
    ledger = open_ledger(path)
    account = notes(ledger)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        with pytest.raises(FedtuneError, match="locked") as caught:
            ledger.reserve(account, claim())
        assert caught.value.code == ExitCode.LEDGER
        assert ledger.groups(account) == {}  # readers do not wait
    ledger.reserve(account, claim())


def test_a_new_ledger_waits_for_who_makes_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.db"
    path.touch()
    with contextlib.closing(
        sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    ) as db:
        db.execute("BEGIN IMMEDIATE")
        with monkeypatch.context() as short:
            short.setattr(ledger_store, "BUSY_SECONDS", 0.1)
            with pytest.raises(FedtuneError, match="locked") as caught:
                open_ledger(path)
        assert caught.value.code == ExitCode.LEDGER
        other = threading.Timer(0.3, db.execute, ["ROLLBACK"])
        other.start()
        ledger = open_ledger(path)
        assert not db.in_transaction
        other.join()
    ledger.reserve(notes(ledger), claim())
    assert path.with_name("ledger.db-wal").exists()


def test_threads_share_a_ledger(ledger: Ledger) -> None:
    account, errors = notes(ledger, 5.0), []

    def work(name: str) -> None:
        try:
            for number in range(6):
                held = ledger.reserve(account, claim(number, job=name))
                (ledger.abort(held, "x") if number == 3 else ledger.release(held))
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(f"job {i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert ledger.groups(account) == {STEP: 20}
    ledger.verify()


forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@forks
def test_a_fork_and_its_parent_share_a_ledger(ledger: Ledger) -> None:
    account = notes(ledger)
    ledger.reserve(account, claim(0))

    def child(name: str) -> Callable[[], None]:
        def work() -> None:
            for number in range(5):
                ledger.release(ledger.reserve(account, claim(number, job=name)))

        return work

    assert together(*(child(f"job {i}") for i in range(3))) == [0, 0, 0]
    ledger.reserve(account, claim(1))
    assert ledger.groups(account) == {STEP: 17}
    ledger.verify()


@forks
def test_v30_of_two_processes_that_race_for_the_last_round_one_wins(ledger: Ledger) -> None:
    account = notes(ledger)
    start = 25
    ledger.reserve(account, claim(0, count=start))

    def racer(name: str, number: int) -> Callable[[], int]:
        def work() -> int:
            own = open_again(ledger)
            try:
                own.release(own.reserve(account, claim(number, job=name)))
            except FedtuneError as error:
                return int(error.code)
            return 0

        return work

    for number in range(1, 7):
        ledger.set_budget(account, budget_for(start + number), DELTA, "owner", "one more")
        ends = together(racer("left", number), racer("right", number))
        assert sorted(ends) == [0, int(ExitCode.BUDGET_EXHAUSTED)]
        assert ledger.groups(account) == {STEP: start + number}
    ledger.verify()


def budget_for(count: int) -> float:
    """Return a cap under which so many fit, and not one more."""
    low, high = (accounting.spent({STEP: n}, DELTA, ADD).epsilon for n in (count, count + 1))
    return (low + high) / 2


@forks
def test_processes_that_make_the_same_ledger_make_one(place: str) -> None:
    def maker(name: str) -> Callable[[], None]:
        def work() -> None:
            own = open_ledger(place)
            own.reserve(notes(own), claim(job=name))

        return work

    assert together(*(maker(f"job {i}") for i in range(4))) == [0, 0, 0, 0]
    ledger = open_ledger(place)
    assert len(ledger.accounts()) == 1
    assert ledger.groups(notes(ledger)) == {STEP: 4}
    ledger.verify()


def test_the_benchmark_writes_ledgers_like_ours(tmp_path: Path) -> None:
    from fedtune.simulations.benchmarks import ledger as bench

    released = bench.STEP
    ledger, account = bench.filled(tmp_path, 5)
    assert ledger.verify()[0].entries == 11
    assert ledger.groups(account) == {released: 5}
    assert ledger.in_flight(account) == 0
    ((reserve, both),) = bench.admissions([(ledger, account)], 2, lambda number: released)
    assert 0 < reserve < both
    assert ledger.groups(account) == {released: 7}
    assert bench.flower_admission(2, whole=False) > 0
    ledger.verify()
