"""``fedtune budget``: what people and programs see of the ledger."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedtune.cli.budget import budget
from fedtune.errors import ExitCode
from fedtune.privacy.events import Gaussian, Unbounded, Unit
from fedtune.privacy.ledger import Claim, Ledger, open_ledger
from tests.privacy.ledgers import ADD, DELTA, STEP, claim, notes


def command(*words: str, place: Path | str | None = None, **env: str) -> Result:
    given = [*words, *(() if place is None else ("--ledger", str(place)))]
    return CliRunner().invoke(budget, given, env=env)


def envelope(result: Result, name: str) -> dict[str, Any]:
    (line,) = result.stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    assert (found["schema"], found["command"]) == (1, name)
    assert found["ok"] is (result.exit_code == 0)
    return found


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def filled(place: Path) -> Ledger:
    """A budget of 2 with 40 releases of two jobs, one in flight; and clients without a cap."""
    ledger = open_ledger(place, actor="tester")
    account = notes(ledger, 2.0)
    ledger.release(ledger.reserve(account, claim(1, count=30)))
    ledger.abort(ledger.reserve(account, claim(2)), "nobody was up")
    ledger.reserve(account, claim(1, job="tuning", count=10))
    phones = ledger.account("phones", Unit.CLIENT, ADD)
    ledger.release(ledger.reserve(phones, Claim("job", 1, 0, Gaussian(4.0))))
    return ledger


def test_show(filled: Ledger, place: Path) -> None:
    first, second = envelope(command("show", "--json", place=place), "budget show")["result"][
        "accounts"
    ]
    spent = filled.spent(notes(filled), DELTA)
    assert first == {
        "dataset": "notes", "unit": "example", "relation": ADD.value, "spent": spent.epsilon,
        "unbounded": False, "delta": DELTA, "budget": 2.0, "budget_delta": DELTA,
        "left": 2.0 - spent.epsilon, "accountant": "analytic", "library": spent.library,
        "releases": 40, "in_flight": 1, "jobs": ["job", "tuning"],
    }  # fmt: skip
    assert (second["dataset"], second["budget"], second["left"]) == ("phones", None, None)
    text = command("show", place=place).stdout.splitlines()
    assert text[0].split() == [
        "dataset", "unit", "spent", "budget", "left", "delta", "releases", "in", "flight",
    ]  # fmt: skip
    assert text[1].split() == [
        "notes", "example", f"{spent.epsilon:.4f}", "2.0000", f"{2 - spent.epsilon:.4f}",
        "1e-05", "40", "1",
    ]  # fmt: skip
    assert text[2].split()[:5] == ["phones", "client", f"{second['spent']:.4f}", "-", "-"]


def test_show_at_another_delta_compares_nothing(filled: Ledger, place: Path) -> None:
    words = ("show", "notes", "--delta", "1e-7", "--json")
    (row,) = envelope(command(*words, place=place), "budget show")["result"]["accounts"]
    assert row["spent"] > filled.spent(notes(filled), DELTA).epsilon
    assert (row["delta"], row["left"], row["budget"]) == (1e-7, None, 2.0)


def test_show_says_when_nothing_bounds_it(place: Path) -> None:
    ledger = open_ledger(place)
    ledger.reserve(notes(ledger), claim(event=Unbounded("exact metrics")))
    (row,) = envelope(command("show", "--json", place=place), "budget show")["result"]["accounts"]
    assert (row["spent"], row["unbounded"]) == (None, True)


def test_history(filled: Ledger, place: Path) -> None:
    found = envelope(command("history", "--json", place=place), "budget history")["result"]
    assert [entry["kind"] for entry in found["entries"]] == [
        "budget", "reserve", "release", "reserve", "abort", "reserve", "reserve", "release",
    ]  # fmt: skip
    assert found["entries"] == sorted(
        (entry.to_json() for entry in filled.entries()), key=lambda entry: entry["time"]
    )
    text = command("history", "notes", place=place).stdout
    assert "epsilon 2 at 1e-05: agreed" in text
    assert "1 x gaussian noise_multiplier=20.0 (nobody was up)" in text
    last = command("history", "--last", "2", place=place)
    assert len(last.stdout.splitlines()) == 3
    assert "the last 2 of 8 entries" in last.stderr
    words = ("history", "--job", "tuning", "--json")
    (only,) = envelope(command(*words, place=place), "budget history")["result"]["entries"]
    assert (only["job"], only["count"]) == ("tuning", 10)


def test_verify(filled: Ledger, place: Path) -> None:
    found = envelope(command("verify", "--json", place=place), "budget verify")["result"]
    heads = [filled.entries(account)[-1].hash for account in filled.accounts()]
    assert [(row["dataset"], row["head"]) for row in found["accounts"]] == [
        ("notes", heads[0]), ("phones", heads[1]),
    ]  # fmt: skip
    assert "whole" in command("verify", place=place).stderr


def test_verify_names_what_was_changed(filled: Ledger, place: Path) -> None:
    with contextlib.closing(sqlite3.connect(place)) as db, db:
        db.execute("DROP TRIGGER ledger_no_update")
        db.execute("UPDATE ledger_entries SET count = 3 WHERE account = 1 AND seq = 2")
    result = command("verify", "--json", place=place)
    assert result.exit_code == ExitCode.LEDGER == 32
    error = envelope(result, "budget verify")["error"]
    assert error["name"] == "ledger"
    assert "entry 2 of 'notes'" in error["message"]
    assert "restore it from a copy" in result.stderr


def test_set_makes_a_ledger_and_keeps_who_and_why(place: Path) -> None:
    cap = ("--epsilon", "3", "--delta", "1e-6", "--note", "agreed in May", "--actor", "the board")
    found = envelope(command("set", "notes", *cap, "--json", place=place), "budget set")["result"]
    assert (found["budget"], found["budget_delta"], found["left"]) == (3.0, 1e-6, 3.0)
    assert found["before"] == {"epsilon": None, "delta": None}
    ledger = open_ledger(place)
    (entry,) = ledger.entries()
    assert (entry.actor, entry.detail["note"]) == ("the board", "agreed in May")
    ledger.reserve(notes(ledger), claim(count=40))
    lower = command("set", "notes", "--epsilon", "0.1", "--delta", "1e-6", "--note", "x",
                    place=place)  # fmt: skip
    assert lower.exit_code == 0
    assert "notes (example): epsilon 0.1 at delta 1e-06; spent" in lower.stdout
    assert "nothing more will be admitted" in lower.stderr
    free = command("set", "notes", "--no-cap", "--note", "public now", place=place)
    assert free.stdout.strip() == "notes (example): no cap"
    other = ("--unit", "client", "--relation", "replace-special")
    assert command("set", "notes", *cap, *other, place=place).exit_code == 0
    assert [account.unit.value for account in ledger.accounts()] == ["client", "example"]
    ledger.verify()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--epsilon", "3"), ExitCode.USAGE),
        (("--delta", "1e-5"), ExitCode.USAGE),
        ((), ExitCode.USAGE),
        (("--no-cap", "--epsilon", "3", "--delta", "1e-5"), ExitCode.USAGE),
        (("--epsilon", "3", "--delta", "1e-5", "--unit", "person"), ExitCode.USAGE),
        (("--epsilon", "3", "--delta", "1e-5", "--relation", "replace-one"), ExitCode.USAGE),
        (("--epsilon", "0", "--delta", "1e-5"), ExitCode.PRIVACY),
        (("--epsilon", "nan", "--delta", "1e-5"), ExitCode.PRIVACY),
        (("--epsilon", "3", "--delta", "1"), ExitCode.PRIVACY),
    ],
)
def test_set_refuses(place: Path, words: tuple[str, ...], code: ExitCode) -> None:
    result = command("set", "notes", "--note", "x", *words, "--json", place=place)
    assert result.exit_code == code
    assert envelope(result, "budget set")["error"]["code"] == code
    assert not place.exists() or open_ledger(place).entries() == []


@pytest.mark.parametrize("name", ["show", "history", "verify"])
def test_looking_makes_nothing(tmp_path: Path, name: str) -> None:
    missing = tmp_path / "none.db"
    result = command(name, "--json", place=missing)
    assert result.exit_code == ExitCode.LEDGER
    assert "no ledger" in envelope(result, f"budget {name}")["error"]["message"]
    assert list(tmp_path.iterdir()) == []


def test_the_place_may_come_from_the_environment(filled: Ledger, place: Path) -> None:
    result = command("verify", "--json", FEDTUNE_LEDGER=str(place))
    assert len(envelope(result, "budget verify")["result"]["accounts"]) == 2


def test_an_unknown_data_set_is_named(filled: Ledger, place: Path) -> None:
    result = command("show", "letters", place=place)
    assert result.exit_code == ExitCode.LEDGER
    assert "no data set 'letters'" in result.stderr
    assert "notes, phones" in result.stderr


def test_an_empty_ledger(place: Path) -> None:
    open_ledger(place)
    assert "nothing was spent" in command("show", place=place).stdout
    assert command("history", place=place).stdout.strip() == "no entries"
    assert command("verify", place=place).stdout.strip() == "no accounts"


def test_hundreds_of_clients_are_accounted_once(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.privacy import accounting

    ledger = open_ledger(place)
    for number in range(8):
        ledger.reserve(ledger.account(f"notes/{number}", Unit.EXAMPLE, ADD), claim(count=5))
    calls, spent = [], accounting.spent
    monkeypatch.setattr(accounting, "spent", lambda *given: calls.append(1) or spent(*given))
    rows = envelope(command("show", "--json", place=place), "budget show")["result"]["accounts"]
    assert {row["spent"] for row in rows} == {spent({STEP: 5}, DELTA, ADD).epsilon}
    assert len(calls) == 1
