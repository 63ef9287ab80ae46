"""Which client has which rows: by a column, or drawn by a partitioner of flwr-datasets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedtune.config import DataConfig, PartitionConfig
from fedtune.data.row import Row, columns_of, require_column
from fedtune.errors import ExitCode, FedtuneError
from fedtune.seeds import derive

__all__ = ["group"]


def _error(message: str, hint: str) -> FedtuneError:
    return FedtuneError(message, hint=hint, code=ExitCode.DATA)


def group(
    rows: Sequence[Row], data: DataConfig, seed: int
) -> tuple[dict[str, list[int]], list[str]]:
    """Name the clients and give each its rows.

    Parameters
    ----------
    rows : sequence of Row
        All rows of the federation.
    data : DataConfig
        ``partition``, and for ``dirichlet`` the column ``label``.
    seed : int
        The root seed of the run.

    Returns
    -------
    dict of str to list of int
        Client names and row numbers, each number at most once, in order.
    list of str
        What was left out, in plain words.

    Raises
    ------
    FedtuneError
        If a column is missing, the rows cannot be divided so, or no client has
        ``min_rows`` rows.
    """
    notes: list[str] = []
    columns = columns_of(rows)
    how = data.partition
    if how.by == "column":
        groups = _by_column(rows, columns, how, notes)
    elif how.by == "owner":
        return {how.column: list(range(len(rows)))}, notes
    else:
        groups = _by_library(rows, columns, data, seed)
    kept = {name: found for name, found in groups.items() if len(found) >= how.min_rows}
    if not kept:
        most = max(map(len, groups.values()), default=0)
        raise _error(
            f"no client is left: partition.min_rows={how.min_rows}, but the largest of "
            f"{len(groups)} clients has {most} rows",
            "lower partition.min_rows, or give more data",
        )
    if len(kept) < len(groups):
        lost = sum(map(len, groups.values())) - sum(map(len, kept.values()))
        notes.append(
            f"{len(groups) - len(kept)} of {len(groups)} clients have fewer than "
            f"partition.min_rows={how.min_rows} rows and were left out, with {lost} rows"
        )
    if how.by == "column" and 0 < how.clients < len(kept):
        largest = sorted(kept, key=lambda name: (-len(kept[name]), name))
        notes.append(f"the {how.clients} largest of {len(kept)} clients were taken")
        kept = {name: kept[name] for name in largest[: how.clients]}
    return kept, notes


def _by_column(
    rows: Sequence[Row], columns: Sequence[str], how: PartitionConfig, notes: list[str]
) -> dict[str, list[int]]:
    require_column(how.column, columns, f"partition.column='{how.column}'")
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.get(how.column, "").strip(), []).append(index)
    nameless = groups.pop("", [])
    if nameless:
        notes.append(
            f"{len(nameless)} rows name no client in column '{how.column}' and were left out"
        )
    return groups


def _by_library(
    rows: Sequence[Row], columns: Sequence[str], data: DataConfig, seed: int
) -> dict[str, list[int]]:
    """Divide shuffled row numbers with a partitioner of flwr-datasets."""
    import datasets

    how = data.partition
    if how.clients > len(rows):
        raise _error(
            f"partition.clients={how.clients}, but there are {len(rows)} rows",
            "ask for fewer clients, or give more data",
        )
    order = np.random.default_rng(derive(seed, "partition", "order")).permutation(len(rows))
    numbers: dict[str, list[Any]] = {"row": order.tolist()}
    if how.by == "dirichlet":
        require_column(data.label, columns, f"by='dirichlet' with data.label='{data.label}'")
        found = [rows[i].get(data.label, "") for i in order]
        index = {label: i for i, label in enumerate(sorted(set(found)))}
        # Numbers, since numpy takes some different strings for equal.
        numbers["label"] = [index[label] for label in found]
    partitioner = _partitioner(how, derive(seed, "partition", how.by))
    partitioner.dataset = datasets.Dataset.from_dict(numbers)
    width = max(3, len(str(how.clients - 1)))
    try:
        with np.errstate(all="ignore"):
            return {
                f"client-{i:0{width}d}": sorted(partitioner.load_partition(i)["row"])
                for i in range(how.clients)
            }
    except ValueError as error:
        raise _error(
            f"partition.by='{how.by}' cannot divide {len(rows)} rows among "
            f"partition.clients={how.clients}: {error}",
            "ask for fewer clients or less skew, or give more data",
        ) from error


def _partitioner(how: PartitionConfig, seed: int) -> Any:
    from flwr_datasets import partitioner as library

    if how.by == "iid":
        return library.IidPartitioner(how.clients)
    if how.by == "dirichlet":
        # Small clients are left out and reported by us; the library would draw again.
        return library.DirichletPartitioner(
            how.clients, "label", how.alpha, min_partition_size=0, shuffle=False, seed=seed
        )
    kinds = {
        "linear": library.LinearPartitioner,
        "square": library.SquarePartitioner,
        "exponential": library.ExponentialPartitioner,
    }
    return kinds[how.skew](how.clients)
