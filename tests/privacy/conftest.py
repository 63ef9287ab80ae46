"""Ledgers that tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedtune.privacy.ledger import Ledger, open_ledger
from tests.privacy.ledgers import postgres_server


@pytest.fixture(scope="session")
def postgres() -> Iterator[Callable[[], str]]:
    with postgres_server() as fresh:
        yield fresh


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return where a new ledger may be made: a file, or an empty PostgreSQL schema."""
    if request.param == "sqlite":
        return str(tmp_path / "ledger.db")
    return str(request.getfixturevalue("postgres")())


@pytest.fixture
def ledger(place: str) -> Ledger:
    return open_ledger(place, actor="tester")


@pytest.fixture
def small(tmp_path: Path) -> Ledger:
    """A ledger for what does not depend on the database."""
    return open_ledger(tmp_path / "ledger.db", actor="tester")
