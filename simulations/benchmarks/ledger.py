"""Time to admit one more round: our ledger at 10, 500 and 10,000 rounds, Flower's at 100.

An admission asks whether the round fits and charges it. Ours (``reserve``) is on the
disk when it returns; ``release``, which notes that the output leaves, is shown beside
it. Flower's ``RdpAccountant`` (``would_exceed``, then ``compose``) keeps its history in
memory and computes every round before again each time it is asked. Run it with::

    python -m fedtune.simulations.benchmarks.ledger [--quick]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

from flwr.serverapp import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyConfig,
    RdpAccountant,
    SamplingMethod,
)
from rich.console import Console
from rich.table import Table

from fedtune.privacy.events import Event, PoissonGaussian, Relation, Unit
from fedtune.privacy.ledger import Account, Claim, Ledger, open_ledger
from fedtune.privacy.ledger_book import append, charge, row_of
from fedtune.privacy.ledger_records import Kind, event_id, event_json

__all__ = ["admissions", "filled", "flower_admission", "main", "report"]

POPULATION, SAMPLED, Z, DELTA = 1000, 50, 1.0, 1e-5
DEPTHS = (10, 500, 10_000)
STEP = PoissonGaussian(SAMPLED / POPULATION, Z)


def filled(folder: Path, rounds: int, event: Event = STEP) -> tuple[Ledger, Account]:
    """Return a ledger with so many released rounds, written in one transaction.

    What is in it is what ``reserve`` and ``release`` write; only the waiting for
    the disk after each is left out.
    """
    ledger = open_ledger(folder / f"{rounds}-{event_id(event_json(event))[:6]}.db", actor="bench")
    account = ledger.account("people", Unit.CLIENT, Relation.ADD_OR_REMOVE_ONE)
    account = ledger.set_budget(account, 100.0, DELTA, "bench", "enough")
    stored = event_json(event)
    known = {"event": stored, "event_id": event_id(stored), "count": 1}
    with ledger.store.writing() as db:
        for number in range(rounds):
            key = {"job": "before", "round": number, "attempt": 0, "purpose": "update"} | known
            held = append(db, row_of(db, account), Kind.RESERVE, "bench", {}, **key)
            end = key | {"reservation": held.seq}
            append(db, row_of(db, account), Kind.RELEASE, "bench", {}, **end)
        charge(db, account, "before", event, rounds)
    return ledger, account


def admissions(
    ledgers: list[tuple[Ledger, Account]], times: int, event: Callable[[int], Event]
) -> list[tuple[float, float]]:
    """Return, for each ledger, median seconds to reserve, and to reserve and release.

    Turn by turn: a disk that is slow for a moment is slow for all of them.
    """
    found: list[list[tuple[float, float]]] = [[] for _ in ledgers]
    numbers: Iterator[int] = count(10**6 * times)
    for _ in range(times):
        for place, (ledger, account) in enumerate(ledgers):
            number = next(numbers)
            claim = Claim("measured", number, 0, event(number))
            started = time.perf_counter()
            held = ledger.reserve(account, claim)
            reserved = time.perf_counter()
            ledger.release(held)
            found[place].append((reserved - started, time.perf_counter() - started))
    return [
        (statistics.median(a for a, _ in each), statistics.median(b for _, b in each))
        for each in found
    ]


def flower_admission(rounds: int, *, whole: bool) -> float:
    """Return the seconds that Flower's accountant needs for one more round after ``rounds``.

    Without ``whole`` its history is put in place at once, for composing it round by
    round takes as long as what is measured.
    """
    config = PrivacyConfig(
        DELTA, POPULATION, NeighboringRelation.ADD_OR_REMOVE_ONE, SamplingMethod.POISSON, 100.0
    )
    event = GaussianPrivacyEvent(Z, SAMPLED, POPULATION)
    accountant = RdpAccountant(config)
    if whole:
        for _ in range(rounds):
            accountant.compose(event)
    else:
        accountant.compose(event, rounds)
        accountant._compositions = [(event, 1)] * rounds
    started = time.perf_counter()
    if accountant.would_exceed(event):
        raise RuntimeError("the budget of the benchmark is too small")
    accountant.compose(event)
    return time.perf_counter() - started


def report(folder: Path, rounds: int) -> dict[str, float]:
    """Return the seconds of each step of reporting a run, with nothing cached."""
    # An event of its own: no table of the steps before can be used again.
    ledger, account = filled(folder, rounds, PoissonGaussian(0.052, 1.1))
    steps: dict[str, Callable[[], object]] = {
        "verify": ledger.verify,
        "extract": lambda: ledger.extract("before", compact=True),
        "spent": lambda: ledger.spent(account, DELTA),
    }
    found = {}
    for name, step in steps.items():
        started = time.perf_counter()
        step()
        found[name] = time.perf_counter() - started
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and print its tables and its JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats: within a minute")
    options = parser.parse_args(arguments)
    times = 25 if options.quick else 200
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ledgers = [filled(folder, depth) for depth in DEPTHS]
        admissions(ledgers, 3, lambda number: STEP)  # what only the first one takes
        same = admissions(ledgers, times, lambda number: STEP)
        hundred = [filled(folder, 100)]
        at_100 = admissions(hundred, times, lambda number: STEP)[0]
        new = admissions(hundred, 5, lambda n: PoissonGaussian(0.05 + (n % 997) * 1e-6, Z))[0]
        flower = flower_admission(100, whole=not options.quick)
        parts = report(folder, 2000)
    table = Table(title="one more round, milliseconds (median)")
    for column in ("rounds before", "reserve", "reserve and release", "Flower", "Flower / ours"):
        table.add_column(column, justify="right")
    for depth, (reserve, both) in zip(DEPTHS, same, strict=True):
        table.add_row(f"{depth:,}", f"{1e3 * reserve:.2f}", f"{1e3 * both:.2f}", "", "")
    for label, (reserve, both) in (("100", at_100), ("100, sampling changes", new)):
        table.add_row(
            label, f"{1e3 * reserve:.2f}", f"{1e3 * both:.2f}", f"{1e3 * flower:,.0f}",
            f"{flower / reserve:,.0f}",
        )  # fmt: skip
    steps = Table(title="reporting 2,000 rounds, seconds")
    for column in (*parts, "together"):
        steps.add_column(column, justify="right")
    steps.add_row(*(f"{seconds:.2f}" for seconds in (*parts.values(), sum(parts.values()))))
    console = Console(stderr=False)
    console.print(table)
    console.print(steps)
    result = {
        "admit_10000_over_10": same[2][0] / same[0][0],
        "admit_500_over_10": same[1][0] / same[0][0],
        "flower_over_ours_at_100": flower / at_100[0],
        "flower_over_ours_at_100_with_release": flower / at_100[1],
        "flower_over_ours_at_100_new_sampling": flower / new[0],
        "report_2000_rounds_seconds": sum(parts.values()),
        "admit_10_ms": 1e3 * same[0][0],
        "admit_500_ms": 1e3 * same[1][0],
        "admit_10000_ms": 1e3 * same[2][0],
        "admit_100_ms": 1e3 * at_100[0],
        "flower_100_seconds": flower,
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
