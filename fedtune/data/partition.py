"""Divides rows among clients, and each client's rows into training and held-out ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedtune.config import DataConfig
from fedtune.data.groups import group
from fedtune.data.read import read_table
from fedtune.data.row import Row, check_columns, check_label, columns_of, fits, usable
from fedtune.errors import ExitCode, FedtuneError
from fedtune.seeds import derive

__all__ = ["Federation", "Shard", "deal", "digest", "load", "load_eval", "partition"]


@dataclass(frozen=True)
class Shard:
    """The usable rows of one client."""

    name: str
    train: tuple[Row, ...]
    held: tuple[Row, ...]


@dataclass(frozen=True)
class Federation:
    """All clients by name, the label set, and what was left out, in plain words."""

    shards: tuple[Shard, ...]
    labels: tuple[str, ...]
    notes: tuple[str, ...]


def digest(federation: Federation) -> str:
    """Return a SHA-256 of all clients' rows: the same data, the same digest."""
    found = hashlib.sha256()
    for shard in federation.shards:
        for part in (shard.train, shard.held):
            # The lengths keep two different divisions from reading the same.
            found.update(json.dumps([shard.name, len(part), part], sort_keys=True).encode())
    return found.hexdigest()


def load(data: DataConfig, seed: int) -> Federation:
    """Read ``data.source`` and divide its rows among clients.

    Parameters
    ----------
    data : DataConfig
        Where the rows are, what they mean and how they become clients.
    seed : int
        The root seed of the run.

    Raises
    ------
    FedtuneError
        As :func:`fedtune.data.read.read_table` and :func:`partition`.
    """
    table = read_table(data, data.source)
    federation = partition(table.rows, data, seed)
    return Federation(federation.shards, federation.labels, table.notes + federation.notes)


def deal(data: DataConfig, seed: int) -> dict[str, list[Row]]:
    """Return each client's rows as they are in the source, before any is held out.

    A node that has a client's rows as its file trains on what the simulated client trains on.
    """
    rows = read_table(data, data.source).rows
    check_columns(columns_of(rows), data)
    groups, _ = group(rows, data, seed)
    return {name: [rows[i] for i in groups[name]] for name in sorted(groups)}


def load_eval(data: DataConfig, labels: Sequence[str]) -> tuple[Row, ...]:
    """Read the usable rows of ``data.eval``; none if it is empty.

    Parameters
    ----------
    data : DataConfig
        Read like the source: the same format, columns and templates.
    labels : sequence of str
        The label set of the federation; ``classification`` only.

    Raises
    ------
    FedtuneError
        If it cannot be read, a column is missing, a label is not in the set, or
        no row is usable.
    """
    if not data.eval:
        return ()
    rows = read_table(data, data.eval).rows
    check_columns(columns_of(rows), data)
    _check_labels(rows, data, labels, f"data.eval='{data.eval}'")
    kept = tuple(row for row in rows if usable(row, data, labels))
    if not kept:
        raise _error(f"data.eval='{data.eval}' has no usable row", "it needs rows with text")
    return kept


def partition(rows: Sequence[Row], data: DataConfig, seed: int) -> Federation:
    """Divide rows among clients; the same seed always gives the same federation.

    Parameters
    ----------
    rows : sequence of Row
        All rows of the federation.
    data : DataConfig
        Columns, templates, labels, ``holdout``, ``max_rows`` and ``partition``.
    seed : int
        The root seed of the run.

    Returns
    -------
    Federation
        Shards sorted by name. No row is in two places. A client with no usable
        row stays, with an empty shard.

    Raises
    ------
    FedtuneError
        If a column is missing, a label is not in ``data.labels``, the clients
        asked for are too many, or no client is left.
    """
    if not rows:
        raise _error("there are no rows to divide", "check data.source")
    owned = data.partition.by == "owner"
    if not owned:
        check_columns(columns_of(rows), data)
    groups, notes = group(rows, data, seed)
    labels = _labels(rows, data, notes)
    kept: dict[str, list[Row]] = {}
    for name in sorted(groups):
        mine = [rows[i] for i in groups[name]]
        # At an owner's node a server hears whether this fails, so that no row may decide it:
        # what does not fit is left out, and the owner is told.
        if not owned:
            _check_labels(mine, data, labels, f"client '{name}'")
        kept[name] = [row for row in mine if fits(row, data) and usable(row, data, labels)]
    if not owned and not any(kept.values()):
        raise _error(
            f"no client of the {len(kept)} has a usable row",
            "rows need text, and a completion or label where the kind of data has one",
        )
    notes += _row_notes(groups, kept, data.max_rows)
    shards = tuple(_shard(name, mine, data, seed) for name, mine in kept.items())
    if data.partition.pooled:
        notes.append(f"the rows of {len(shards)} clients are pooled into one")
        shards = (_pooled(shards),)
    return Federation(shards, labels, tuple(notes))


def _error(message: str, hint: str) -> FedtuneError:
    return FedtuneError(message, hint=hint, code=ExitCode.DATA)


def _labels(rows: Sequence[Row], data: DataConfig, notes: list[str]) -> tuple[str, ...]:
    if data.kind != "classification":
        return ()
    labels = data.labels or tuple(sorted({row.get(data.label, "") for row in rows} - {""}))
    if len(set(labels)) != len(labels) or len(labels) < 2:
        raise _error(
            f"data.labels={list(labels)}: classification needs two or more different labels",
            f"set data.labels, or check the column data.label='{data.label}'",
        )
    if not data.labels:
        shown = ", ".join(labels[:20]) + (", ..." if len(labels) > 20 else "")
        notes.append(f"{len(labels)} labels found in the data: {shown}")
    return labels


def _check_labels(rows: Sequence[Row], data: DataConfig, labels: Sequence[str], whose: str) -> None:
    """Refuse labels outside of the set; an empty one is a row without label."""
    if data.kind == "classification":
        for label in dict.fromkeys(row.get(data.label, "") for row in rows):
            if label:
                check_label(label, labels, whose)


def _shard(name: str, rows: Sequence[Row], data: DataConfig, seed: int) -> Shard:
    """Cap and split by a permutation that only this client has; both parts keep their order."""
    order = np.random.default_rng(derive(seed, "split", name)).permutation(len(rows)).tolist()
    if data.max_rows:
        order = order[: data.max_rows]
    held = 0
    if data.holdout > 0 and len(order) >= 2:
        held = min(max(1, round(data.holdout * len(order))), len(order) - 1)
    return Shard(
        name,
        train=tuple(rows[i] for i in sorted(order[held:])),
        held=tuple(rows[i] for i in sorted(order[:held])),
    )


def _pooled(shards: Sequence[Shard]) -> Shard:
    return Shard(
        "pooled",
        train=tuple(row for shard in shards for row in shard.train),
        held=tuple(row for shard in shards for row in shard.held),
    )


def _row_notes(
    groups: Mapping[str, Sequence[int]], kept: Mapping[str, Sequence[Row]], max_rows: int
) -> list[str]:
    unusable = sum(len(groups[name]) - len(rows) for name, rows in kept.items())
    empty = [name for name, rows in kept.items() if not rows]
    above = sum(max(0, len(rows) - max_rows) for rows in kept.values()) if max_rows else 0
    notes = []
    if unusable:
        notes.append(f"{unusable} rows have no text, completion or label and were left out")
    if empty:
        shown = ", ".join(empty[:10]) + (", ..." if len(empty) > 10 else "")
        notes.append(f"{len(empty)} clients have no usable row: {shown}")
    if above:
        notes.append(f"{above} rows are above data.max_rows={max_rows} and were left out")
    return notes
