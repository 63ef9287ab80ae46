"""Secure sums: a mask of ours against one of Flower's SecAgg+, and ours from end to end.

A mask is what a client makes and adds for every peer, and the server again for every one
that dropped out. Ours is AES-256 in counter mode, added in place to uint32; Flower's is
what ``secaggplus_mod`` calls: a Mersenne twister under a seed folded to 32 bits, an int64
array of it, and a new array for the sum, for one peer after another. Ours goes over the
vector once for all peers. Turn by turn; the ratio is the median over the turns, of which
each compares what ran side by side. On a busy machine the clock favours ours, which needs
less memory: the ratio of CPU time is told too. Run it with::

    python -m fedtune.simulations.benchmarks.secagg [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.common.secure_aggregation.ndarrays_arithmetic import parameters_addition
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from rich.console import Console
from rich.table import Table

from fedtune.privacy.secagg import Collector, Context, Member, Record, threshold_of
from fedtune.privacy.secagg_graph import COMPLETE
from fedtune.privacy.secagg_mask import KEY_BYTES, add_masks
from fedtune.wire import pack_tensors

__all__ = ["Cost", "main", "mask_seconds", "whole_sum"]

MASKED = 10_000_000
PEERS, FLOWERS = 16, 2  # so that both take about as long
MODULUS = 1 << 32  # Flower's default


@dataclass(frozen=True)
class Cost:
    """What one sum costs.

    Attributes
    ----------
    client : float
        Seconds of one client that stays to the end, all its steps: the median client.
    server : float
        Seconds of the server, everything.
    unmask : float
        Of these, the last step: taking off the masks.
    up, down : int
        Bytes from and to one client, as safetensors.
    """

    client: float
    server: float
    unmask: float
    up: int
    down: int


def mask_seconds(length: int, turns: int) -> dict[str, list[tuple[float, float]]]:
    """Return seconds, and CPU seconds, to make and add the mask of one peer, for every turn.

    ``flower``, for one of ``FLOWERS`` peers; ``ours``, for one of ``PEERS``, as a client
    with so many neighbours adds them; ``ours_alone``, for a client with one.
    """
    vector = np.zeros(length, np.uint32)

    def flower() -> None:
        parameters = [np.zeros(length, np.int64)]
        for _ in range(FLOWERS):
            mask = pseudo_rand_gen(os.urandom(KEY_BYTES), MODULUS, [(length,)])
            parameters = parameters_addition(parameters, mask)

    def ours(peers: int) -> None:
        add_masks(vector, [(os.urandom(KEY_BYTES), at % 2 == 0) for at in range(peers)])

    runs: dict[str, tuple[Callable[[], None], int]] = {
        "flower": (flower, FLOWERS),
        "ours": (partial(ours, PEERS), PEERS),
        "ours_alone": (partial(ours, 1), 1),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, (run, peers) in runs.items():
            started, busy = time.perf_counter(), time.process_time()
            run()
            spent = time.perf_counter() - started, time.process_time() - busy
            if turn:  # the first one only warms up
                found[name].append((spent[0] / peers, spent[1] / peers))
    return found


def _ratio(seconds: dict[str, list[tuple[float, float]]], ours: str, clock: int) -> float:
    """Return Flower's over ours, the median over the turns; ``clock`` 0: wall, 1: CPU."""
    turns = zip(seconds["flower"], seconds[ours], strict=True)
    return statistics.median(flower[clock] / own[clock] for flower, own in turns)


def whole_sum(members: int, length: int, dropped: int) -> Cost:
    """Play one sum in which so many drop out after they dealt, and check that it is exact.

    Raises
    ------
    RuntimeError
        The sum is wrong.
    """
    signers = {f"client-{at:03d}": Ed25519PrivateKey.generate() for at in range(members)}
    roster = {name: signer.public_key() for name, signer in signers.items()}
    context = Context("benchmark", 1, 0, bytes(32), length, min_cohort=2)
    server = Collector(context, roster)
    parties = {name: Member(context, name, signer, roster) for name, signer in signers.items()}
    values = np.random.default_rng(1).integers(0, MODULUS, length, np.uint32)
    staying = list(parties)[dropped:]
    spent: defaultdict[str, float] = defaultdict(float)
    size: defaultdict[str, int] = defaultdict(int)

    @contextmanager
    def timed(whose: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        spent[whose] += time.perf_counter() - started

    def exchange(
        name: str, ask: Callable[[], Record], answer: Callable[[Record], Record],
        take: Callable[[str, Record], None],
    ) -> None:  # fmt: skip
        with timed("server"):
            question = ask()
        with timed(name):
            record = answer(question)
        with timed("server"):
            take(name, record)
        if name == staying[0]:
            size["down"] += len(pack_tensors(question)) if question else 0
            size["up"] += len(pack_tensors(record))

    for name, party in parties.items():
        exchange(name, dict, partial(_advert, party), server.take_advert)
    for name, party in parties.items():
        exchange(name, server.cohort, party.deal, server.take_deal)
    for name in staying:
        exchange(
            name, partial(server.dealt_for, name), partial(parties[name].mask, values), server.add
        )
    for name in staying:
        exchange(name, server.survivors, parties[name].sign, server.take_signature)
    for name in staying:
        exchange(name, server.signed, parties[name].reveal, server.take_reveal)
    with timed("server"), timed("unmask"):
        total = server.total()
    if not np.array_equal(total, values * np.uint32(len(staying))):
        raise RuntimeError(f"the sum of {members} members with {dropped} dropped out is wrong")
    client = statistics.median(spent[name] for name in staying)
    return Cost(client, spent["server"], spent["unmask"], size["up"], size["down"])


def _advert(party: Member, _: Record) -> Record:
    return party.advert()


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and print its tables and its JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats: within a minute")
    options = parser.parse_args(arguments)
    seconds = mask_seconds(MASKED, 9 if options.quick else 25)
    length = 100_000 if options.quick else 1_000_000
    cohorts = (3, 10, 50) if options.quick else (3, 10, 50, 100)
    console = Console(stderr=False)
    table = Table(title=f"one mask of {MASKED:,} numbers, milliseconds (median)")
    for column in ("", "Flower SecAgg+", f"ours, {PEERS} peers", "ours, one peer"):
        table.add_column(column, justify="right")
    table.add_column("Flower / ours", justify="right")
    result: dict[str, float] = {
        "flower_over_ours_mask": _ratio(seconds, "ours", 0),
        "flower_over_ours_mask_cpu": _ratio(seconds, "ours", 1),
        "flower_over_ours_mask_alone": _ratio(seconds, "ours_alone", 0),
        "flower_over_ours_mask_alone_cpu": _ratio(seconds, "ours_alone", 1),
    }
    for clock, label in enumerate(("clock", "cpu")):
        taken = {
            name: 1e3 * statistics.median(turn[clock] for turn in turns)
            for name, turns in seconds.items()
        }
        result |= {f"{name}_mask_{label}_ms": value for name, value in taken.items()}
        shown = (f"{value:.1f}" for value in (*taken.values(), _ratio(seconds, "ours", clock)))
        table.add_row(label, *shown)
    console.print(table)
    sums = Table(title=f"one sum of {length:,} numbers, from end to end")
    for column in ("clients", "dropped out", "client s", "server s", "unmask s", "up", "down"):
        sums.add_column(column, justify="right")
    for members in cohorts:
        # on the ring those who drop out must not stand side by side: one in ten
        most = members - threshold_of(members) if members <= COMPLETE else members // 10
        for dropped in (0, most):
            cost = whole_sum(members, length, dropped)
            sums.add_row(
                f"{members}", f"{dropped}", f"{cost.client:.3f}", f"{cost.server:.3f}",
                f"{cost.unmask:.3f}", f"{cost.up:,}", f"{cost.down:,}",
            )  # fmt: skip
            key = f"{members}_{'most' if dropped else 'none'}"
            result |= {f"client_s_{key}": cost.client, f"server_s_{key}": cost.server}
            result |= {f"up_{key}": cost.up, f"down_{key}": cost.down}
    console.print(sums)
    sys.stdout.write(json.dumps({"length": length, **result}) + "\n")


if __name__ == "__main__":
    main()
