"""The server's copy of the books: never less than a node's own ledger holds of the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.events import Relation, Unit
from fedtune.privacy.ledger import open_ledger
from fedtune.server.books import open_books
from tests.client.node_kit import BY_SERVER, experiment

PLAIN = experiment()


def test_everybody_who_is_asked_is_charged_before_and_it_stays(tmp_path: Path) -> None:
    books = open_books(PLAIN, tmp_path / "books.db", "job")
    assert books is not None
    books.charge(1, 0, ["ann", "bob"])
    books.charge(1, 1, ["ann"])
    books.charge(2, 0, ["bob", "cy"])
    again = open_ledger(tmp_path / "books.db")
    held = {one.dataset: sum(again.groups(one, "job").values()) for one in again.accounts()}
    assert held == {"wards/ann": 2, "wards/bob": 2, "wards/cy": 1}
    assert {one.unit for one in again.accounts()} == {Unit.EXAMPLE}
    assert {one.relation for one in again.accounts()} == {Relation.ADD_OR_REMOVE_ONE}
    assert all(again.in_flight(one) == 0 for one in again.accounts())
    assert all(check.ok for check in again.verify() if hasattr(check, "ok"))


def test_an_attempt_is_charged_once(tmp_path: Path) -> None:
    """A server that comes back takes attempts of its new session."""
    books = open_books(PLAIN, tmp_path / "books.db", "job")
    assert books is not None
    books.charge(1, 0, ["ann"])
    again = open_books(PLAIN, tmp_path / "books.db", "job")
    assert again is not None
    with pytest.raises(FedtuneError) as caught:
        again.charge(1, 0, ["ann"])
    assert caught.value.code == ExitCode.LEDGER
    again.charge(1, 3, ["ann"])
    (account,) = again.ledger.accounts()
    assert sum(again.ledger.groups(account).values()) == 2


def test_the_copy_refuses_nobody(tmp_path: Path) -> None:
    """A budget is kept at the node: a copy that refused would leave out what a node charged."""
    books = open_books(PLAIN, tmp_path / "books.db", "job")
    assert books is not None
    for number in range(40):
        books.charge(number + 1, 0, ["ann"])
    (account,) = books.ledger.accounts()
    assert sum(books.ledger.groups(account).values()) == 40
    assert account.epsilon is None


def test_without_a_promise_about_examples_there_is_no_copy(tmp_path: Path) -> None:
    for config in (
        experiment(privacy__example=None),
        experiment(privacy__example=None, privacy__client=BY_SERVER),
    ):
        assert open_books(config, tmp_path / "books.db", "job") is None
    assert not (tmp_path / "books.db").exists()
