"""Ledgers for tests: SQLite files, and a throw-away PostgreSQL server."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.events import Gaussian, PoissonGaussian, Relation, Unit
from fedtune.privacy.ledger import Account, Claim, Ledger, open_ledger

ADD = Relation.ADD_OR_REMOVE_ONE
STEP = Gaussian(20.0)
"""Cheap to account: the exact curve of releases without sampling has a closed form."""
SAMPLED = PoissonGaussian(0.01, 1.0)
DELTA = 1e-5


def notes(ledger: Ledger, epsilon: float | None = None) -> Account:
    """Return the account that most tests use, with a cap when there is one."""
    account = ledger.account("notes", Unit.EXAMPLE, ADD)
    if epsilon is None:
        return account
    return ledger.set_budget(account, epsilon, DELTA, "owner", "agreed")


def claim(number: int = 1, attempt: int = 0, **changes: Any) -> Claim:
    """Return a claim of one step, but for ``changes``."""
    return Claim(**({"job": "job", "round": number, "attempt": attempt, "event": STEP} | changes))


def open_again(ledger: Ledger) -> Ledger:
    """Open the same ledger as another process would."""
    url = ledger.store.engine.url
    place = ledger.store.where if url.drivername == "sqlite" else url.render_as_string(False)
    return open_ledger(place, actor="another")


def refused(code: ExitCode) -> Any:
    """Expect an error with this code."""
    return pytest.raises(FedtuneError, check=lambda error: error.code == code)


def together(*works: Callable[[], int | None]) -> list[int]:
    """Run each in a process of its own, all let go at once; return their exit codes."""
    read, write = os.pipe()
    children = []
    for work in works:
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                os.close(write)
                os.read(read, 1)  # returns when the parent closes its end
                code = work() or 0
            finally:
                os._exit(code)
        children.append(pid)
    os.close(read)
    os.close(write)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


@contextlib.contextmanager
def postgres_server() -> Iterator[Callable[[], str]]:
    """Start a PostgreSQL of its own; yield what returns the URL of an empty ledger.

    It listens on a socket in its own folder only, and runs as somebody who is not root.
    """
    if not (shutil.which("initdb") and shutil.which("postgres") and shutil.which("pg_ctl")):
        pytest.skip("no PostgreSQL on this machine")
    pytest.importorskip("psycopg")
    who: dict[str, Any] = {}
    if os.getuid() == 0:
        try:
            found = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user 'postgres'")
        who = {"user": found.pw_uid, "group": found.pw_gid, "extra_groups": []}
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # a short path: it names a socket
    try:
        if who:
            os.chown(folder, who["user"], who["group"])
        options = {"cwd": folder, "check": True, "capture_output": True, **who}
        subprocess.run(
            ["initdb", "-D", "data", "-U", "ledger", "-A", "trust", "--no-sync"], **options
        )
        settings = f"-k {folder} -c listen_addresses='' -c shared_buffers=16MB"
        start = ["pg_ctl", "-D", "data", "-w", "-l", "log", "-o", settings, "start"]
        subprocess.run(
            start, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            **who,
        )  # fmt: skip
        base = f"postgresql://ledger@/postgres?host={folder}"
        engine = create_engine(base, poolclass=NullPool)
        count = 0

        def fresh() -> str:
            nonlocal count
            count += 1
            with engine.begin() as db:
                db.execute(text(f"CREATE SCHEMA t{count}"))
            return f"{base}&options=-csearch_path%3Dt{count}"

        try:
            yield fresh
        finally:
            subprocess.run(["pg_ctl", "-D", "data", "-m", "immediate", "stop"], **options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def tampering(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the file as somebody would who wants to change history."""
    db = sqlite3.connect(path)
    db.execute("DROP TRIGGER ledger_no_update")
    db.execute("DROP TRIGGER ledger_no_delete")
    with contextlib.closing(db), db:
        yield db
