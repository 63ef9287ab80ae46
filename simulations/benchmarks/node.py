"""Seconds per round over real connections: Flower's own SuperNode, and our node.

Two nodes, TLS, node keys and a database file on both sides. An empty round sends one
number and gets it back; a large one sends 100 MB to each node and gets 100 MB, all of
them changed, from each. The stock side is ``flower-supernode`` with
``grid.send_and_receive``, as its documentation shows; ours is the server that
``fedtune serve`` starts and the connection of ``fedtune join``. Then many of our nodes
at one server. Run it with::

    python -m fedtune.simulations.benchmarks.node [--quick]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from fedtune.resources import cores
from fedtune.simulations.benchmarks.node_arms import Figures, ours, scratch, stock

__all__ = ["main"]

_LARGE = 100_000_000
_SETTLED, _FEW = 50, 10


@dataclass(frozen=True)
class _Scale:
    """How much is done."""

    empty_stock: int
    empty_ours: int
    large: int
    warm: bool
    nodes: int
    rounds_of_many: int
    rounds_of_flat: int
    idle: float


_FULL = _Scale(10, 50, 3, True, 200, 5, 200, 20.0)
_QUICK = _Scale(2, 10, 1, False, 10, 2, 0, 0.0)


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and print its tables and its JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: within a minute")
    parser.add_argument("--nodes", type=int, help="how many of our nodes at one server")
    options = parser.parse_args(arguments)
    scale = _QUICK if options.quick else _FULL
    count = options.nodes or scale.nodes
    with scratch() as folder:
        large = (_LARGE, scale.large, scale.warm)
        theirs = stock([(0, scale.empty_stock, True), large], folder / "stock")
        mine = ours([(0, scale.empty_ours, True), large], folder / "ours")
        many = ours([(0, scale.rounds_of_many, True)], folder / "many", count, scale.idle)
        flat = many
        if scale.rounds_of_flat:
            flat = ours([(0, scale.rounds_of_flat, True)], folder / "flat", _FEW)
    result = _compared(theirs, mine) | _many(count, many, flat)
    _show(result)
    sys.stdout.write(json.dumps(result) + "\n")


def _compared(theirs: Figures, mine: Figures) -> dict[str, float]:
    empty = statistics.median(theirs.seconds[0]), statistics.median(mine.seconds[0])
    large = statistics.median(theirs.seconds[_LARGE]), statistics.median(mine.seconds[_LARGE])
    return {
        "stock_over_ours_latency": empty[0] / empty[1],
        "stock_over_ours_100mb": large[0] / large[1],
        "stock_empty_seconds": empty[0],
        "ours_empty_seconds": empty[1],
        "ours_empty_slowest_seconds": max(mine.seconds[0]),
        "stock_100mb_seconds": large[0],
        "ours_100mb_seconds": large[1],
        "empty_rounds": len(mine.seconds[0]),
        "large_rounds": len(mine.seconds[_LARGE]),
    }


def _many(count: int, many: Figures, flat: Figures) -> dict[str, float]:
    rounds = len(flat.end_mb) - 1
    found = {
        "nodes": count,
        f"round_seconds_{count}_nodes": statistics.median(many.seconds[0]),
        "server_mb": many.end_mb[-1],
        "server_mb_per_node": (many.end_mb[-1] - many.start_mb) / count,
    }
    if rounds >= 2 * _SETTLED:
        # Buffers and caches fill in the first rounds: what grows after that would go on.
        growth = (flat.end_mb[-1] - flat.end_mb[_SETTLED]) / (rounds - _SETTLED)
        found |= {"server_mb_growth_200_rounds": 200 * growth, "flat_rounds": rounds}
    if many.idle_node:
        found |= {
            "idle_server_cpu_per_node": many.idle_server,
            "idle_node_cpu": many.idle_node,
        }
    return found


def _show(result: dict[str, float]) -> None:
    console = Console()
    table = Table(title=f"two nodes, TLS, node keys, database, {cores()} cores")
    for name in ("median round", "flower-supernode", "ours", "stock / ours"):
        table.add_column(name, justify="right")
    for words, key in (("empty", "empty"), ("100 MB each way", "100mb")):
        theirs, mine = result[f"stock_{key}_seconds"], result[f"ours_{key}_seconds"]
        table.add_row(words, f"{theirs:,.2f} s", f"{mine:,.2f} s", f"{theirs / mine:,.1f}")
    console.print(table)
    count = int(result["nodes"])
    more = Table(title=f"{count} of our nodes at one server", show_header=False)
    more.add_column("what")
    more.add_column("figure", justify="right")
    for words, key, form in (
        ("median empty round, s", f"round_seconds_{count}_nodes", ",.2f"),
        ("memory of the SuperLink, MB", "server_mb", ",.0f"),
        ("of it per node, MB", "server_mb_per_node", ",.2f"),
        ("growth over 200 rounds, MB", "server_mb_growth_200_rounds", ",.1f"),
        ("CPU of an idle node at the server, %", "idle_server_cpu_per_node", ".2%"),
        ("CPU of an idle node at home, %", "idle_node_cpu", ".2%"),
    ):
        if key in result:
            more.add_row(words, format(result[key], form))
    console.print(more)


if __name__ == "__main__":
    main()
