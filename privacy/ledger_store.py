"""Where a ledger lives: the tables, and transactions that are durable when they end.

SQLite in WAL mode with ``synchronous=FULL``: a commit returns after the log is on
the disk, and a process that dies before it leaves nothing of the transaction.
A writer takes the write lock with its first statement (``BEGIN IMMEDIATE``), so
what it read is still true when it writes. PostgreSQL does the same with a lock on
the account's row and ``synchronous_commit=on``.

One idle connection stays open: closing the last one would move the log into the
file, six waits for the disk in place of one. It is closed before a fork (SQLite
forbids to carry it over), and left when the file is no longer the one at the path.

``ledger_entries`` is the book; triggers refuse to change or delete its rows. All
other tables are derived from it and can be rebuilt.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    insert,
    inspect,
    select,
    text,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DisconnectionError, SQLAlchemyError
from sqlalchemy.pool import QueuePool

from fedtune.errors import ExitCode, FedtuneError

__all__ = ["Store", "accounts", "entries", "open_store", "sums", "totals"]

SCHEMA = 1
BUSY_SECONDS = 30

_metadata = MetaData()

_meta = Table("ledger_meta", _metadata, Column("schema", Integer, primary_key=True))

accounts = Table(
    "ledger_accounts",
    _metadata,
    Column("id", Integer, primary_key=True),
    Column("dataset", Text, nullable=False),
    Column("unit", String(32), nullable=False),
    Column("relation", String(32), nullable=False),
    Column("created", String(40), nullable=False),
    # From here on derived: the last budget entry, and the end of the chain.
    Column("epsilon", Float),
    Column("delta", Float),
    Column("head", String(64), nullable=False),
    Column("length", BigInteger, nullable=False),
    UniqueConstraint("dataset", "unit"),
)
"""One row for each data set, unit and relation."""


def _account() -> Column[int]:
    return Column("account", Integer, ForeignKey("ledger_accounts.id"), primary_key=True)


entries = Table(
    "ledger_entries",
    _metadata,
    _account(),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("previous", String(64), nullable=False),
    Column("hash", String(64), nullable=False),
    Column("time", String(40), nullable=False),
    Column("actor", Text, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("job", Text),
    Column("round", BigInteger),
    Column("attempt", BigInteger),
    Column("purpose", Text),
    Column("event", Text),
    Column("event_id", String(64)),
    Column("count", BigInteger),
    Column("reservation", BigInteger),
    Column("detail", Text, nullable=False),
)
"""The book, append-only."""

# Both are keys, and rows without a job or a reservation are never alike. Plain ones:
# a partial index is not used where its condition comes as a parameter.
Index(
    "ledger_one_claim",
    *(entries.c[name] for name in ("account", "job", "round", "attempt", "purpose", "kind")),
    unique=True,
)
Index("ledger_one_end", entries.c.account, entries.c.reservation, unique=True)
Index("ledger_of_job", entries.c.job, entries.c.account)

totals = Table(
    "ledger_totals",
    _metadata,
    _account(),
    Column("job", Text, primary_key=True),
    Column("event_id", String(64), primary_key=True),
    Column("event", Text, nullable=False),
    Column("count", BigInteger, nullable=False),
)
"""Derived: how often each event counts, for each job and (job "") for the account."""

sums = Table(
    "ledger_sums",
    _metadata,
    _account(),
    Column("job", Text, primary_key=True),
    Column("orders", String(64), nullable=False),
    Column("vector", LargeBinary, nullable=False),
    Column("infinite", LargeBinary, nullable=False),
)
"""Derived: the Renyi vector of the same totals, so that admission need not add them up."""

_REFUSED = "the entries of a ledger are never changed"

_SQLITE_TRIGGERS = [
    f"""CREATE TRIGGER IF NOT EXISTS ledger_no_{verb.lower()}
    BEFORE {verb} ON ledger_entries BEGIN SELECT RAISE(ABORT, '{_REFUSED}'); END"""
    for verb in ("UPDATE", "DELETE")
]

_POSTGRES_TRIGGERS = [
    f"""CREATE OR REPLACE FUNCTION ledger_refuse() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION '{_REFUSED}'; END $$""",
    """CREATE OR REPLACE TRIGGER ledger_no_change BEFORE UPDATE OR DELETE
    ON ledger_entries FOR EACH ROW EXECUTE FUNCTION ledger_refuse()""",
    """CREATE OR REPLACE TRIGGER ledger_no_truncate BEFORE TRUNCATE
    ON ledger_entries FOR EACH STATEMENT EXECUTE FUNCTION ledger_refuse()""",
]


@dataclass(frozen=True)
class Store:
    """A database, and transactions on it."""

    engine: Engine
    where: str
    """For people; without the password."""

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """Open a transaction that only reads: one state of the ledger, whole."""
        with _told(self.where), self.engine.connect() as plain:
            db = plain
            if plain.dialect.name == "postgresql":
                db = plain.execution_options(isolation_level="REPEATABLE READ")
            with db.begin():
                yield db

    @contextlib.contextmanager
    def writing(self) -> Iterator[Connection]:
        """Open a transaction that writes: all of it is on the disk when this ends, or nothing."""
        with _told(self.where), self.engine.connect() as plain:
            db = plain.execution_options(ledger_writes=True)
            with db.begin():
                if db.dialect.name == "postgresql":
                    db.execute(text("SET LOCAL synchronous_commit = on"))
                    db.execute(text(f"SET LOCAL lock_timeout = '{BUSY_SECONDS}s'"))
                yield db


def open_store(target: str | Path, create: bool = True) -> Store:
    """Open a ledger's database and make its tables when they are missing.

    Parameters
    ----------
    target : str or Path
        A file (SQLite, made with mode 0600), or a URL ``postgresql://...``.
    create : bool
        Whether a ledger that is not there is made.
    """
    url = _url(target)
    where = url.database or "" if url.drivername == "sqlite" else _public(url)
    with _told(where):
        fresh = url.drivername == "sqlite" and _prepare_file(Path(where), create)
        store = Store(_engine(url), where)
        weakref.finalize(store, store.engine.dispose)
        if fresh:
            _log_ahead(store)
        _require_tables(store, create)
    return store


def _url(target: str | Path) -> URL:
    if isinstance(target, Path) or "://" not in target:
        if str(target) in {"", ":memory:"}:
            raise _no_ledger(repr(str(target)), "a ledger outlives its process: name a file")
        return URL.create("sqlite", database=str(Path(target).expanduser().absolute()))
    try:
        url = make_url(target)
    except (SQLAlchemyError, ValueError):
        raise _no_ledger("a URL that cannot be read", "postgresql://USER@HOST/DATABASE") from None
    if url.get_backend_name() == "sqlite":
        return _url(url.database or "")
    if url.get_backend_name() not in {"postgresql", "postgres"}:
        hint = "a file for SQLite, or postgresql://USER@HOST/DATABASE"
        raise _no_ledger(f"'{url.drivername}'", hint)
    return url.set(drivername="postgresql+psycopg")


def _public(url: URL) -> str:
    """Return a URL for people: a password may stand in its query too."""
    return url.set(drivername="postgresql", query={}).render_as_string(hide_password=True)


def _engine(url: URL) -> Engine:
    if url.drivername == "sqlite":
        return _sqlite(Path(url.database or ""))
    try:
        engine = create_engine(url, pool_size=1, max_overflow=-1, pool_pre_ping=True)
    except ModuleNotFoundError as error:
        hint = f"{error}: pip install 'fedtune[postgres]'"
        raise _no_ledger(_public(url), hint) from None
    _engines.add(engine)
    return engine


def _sqlite(path: Path) -> Engine:
    def connect() -> sqlite3.Connection:
        # mode=rw: a file that went away is an error, never a new and empty ledger.
        # Transactions begin below, not in the driver.
        connection = sqlite3.connect(
            f"{path.as_uri()}?mode=rw",
            uri=True,
            timeout=BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        return connection

    engine = create_engine(
        "sqlite:///", creator=connect, poolclass=QueuePool, pool_size=1, max_overflow=-1
    )

    @event.listens_for(engine, "connect")
    def remember(connection: Any, record: Any) -> None:
        record.info["file"] = _file(path)

    @event.listens_for(engine, "checkout")
    def compare(connection: Any, record: Any, proxy: Any) -> None:
        if record.info.get("file") != _file(path):
            raise DisconnectionError(f"'{path}' was exchanged")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("ledger_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    _engines.add(engine)
    return engine


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _close_idle() -> None:
    for engine in list(_engines):
        engine.dispose()


def _forget_idle() -> None:
    for engine in list(_engines):
        engine.dispose(close=False)


os.register_at_fork(before=_close_idle, after_in_child=_forget_idle)


def _file(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _prepare_file(path: Path, create: bool) -> bool:
    """Make the file for its owner alone; return whether it has yet to become a database."""
    if path.exists():
        return path.stat().st_size == 0
    if not create:
        raise _no_ledger(f"'{path}'", "name the ledger with --ledger, or FEDTUNE_LEDGER")
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return True


def _log_ahead(store: Store) -> None:
    """Set the WAL mode, which the file remembers.

    SQLite answers "locked" at once here, whatever its timeout, when another process is making
    the same ledger: this waits in its place.
    """
    until = time.monotonic() + BUSY_SECONDS
    plain = store.engine.raw_connection()
    try:  # not inside a transaction
        while True:
            try:
                plain.cursor().execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                    raise
            time.sleep(0.01)
    finally:
        plain.close()


def _require_tables(store: Store, create: bool) -> None:
    with store.reading() as db:
        found = set(inspect(db).get_table_names())
        if _meta.name in found:
            schemas = set(db.scalars(select(_meta.c.schema)))
            if schemas != {SCHEMA}:
                hint = f"this fedtune reads schema {SCHEMA}"
                raise _no_ledger(f"'{store.where}', schema {sorted(schemas)}", hint)
            return
    sqlite = store.engine.dialect.name == "sqlite"
    if not create or (sqlite and found):
        raise _no_ledger(f"'{store.where}'", "it is a database of something else")
    with store.writing() as db:
        if not sqlite:
            db.execute(text("SELECT pg_advisory_xact_lock(7231415)"))
        _metadata.create_all(db)
        for statement in _SQLITE_TRIGGERS if sqlite else _POSTGRES_TRIGGERS:
            db.exec_driver_sql(statement)
        if db.scalar(select(_meta.c.schema)) is None:
            db.execute(insert(_meta).values(schema=SCHEMA))


@contextlib.contextmanager
def _told(where: str) -> Iterator[None]:
    """Turn what the database says into an error that a person can act on."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error) as error:
        words = str(getattr(error, "orig", None) or error).strip().splitlines()
        raise FedtuneError(
            f"ledger '{where}': {words[0] if words else type(error).__name__}",
            hint="busy: try again; broken: fedtune budget verify; never delete a ledger",
            code=ExitCode.LEDGER,
        ) from error
    except OSError as error:
        raise FedtuneError(
            f"ledger '{where}': {error.strerror or error}",
            hint="it needs a folder that can be written to",
            code=ExitCode.LEDGER,
        ) from error


def _no_ledger(what: str, hint: str) -> FedtuneError:
    return FedtuneError(f"no ledger: {what}", hint=hint, code=ExitCode.LEDGER)
