"""Tasks per second: the local engine and Flower's own Ray runtime, the same apps in both.

The server sends a payload to every client, each client decodes it and sends back
one of the same size, and the server decodes and adds up: what every federated
round does around its training. Run it with::

    python -m fedtune.simulations.benchmarks.engine [--quick]
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import psutil
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from rich.console import Console
from rich.table import Table

from fedtune.resources import cores
from fedtune.simulations.executors import Executor, ProcessExecutor, ThreadExecutor
from fedtune.simulations.grid import LocalGrid
from fedtune.wire import Task, Update, from_record, to_record

__all__ = ["Timing", "client_app", "main", "server_app"]

PAYLOADS = {"tiny": 10, "4mb": 1_000_000}
"""Floats in a payload."""


@dataclass
class Timing:
    """Seconds of each round after the first, which starts the engine."""

    seconds: list[float] = field(default_factory=list)
    tasks: int = 0

    def rate(self) -> float:
        """Return the median tasks per second over rounds."""
        return self.tasks / statistics.median(self.seconds)


def client_app() -> ClientApp:
    """Return a client that does nothing: decode, and send the same tensors back."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        task = from_record(Task, message.content)
        update = Update(task.round, 0, 1, 1, 0, 0.0, task.tensors)
        return Message(to_record(update), reply_to=message)

    return app


def server_app(clients: int, floats: int, rounds: int, timing: Timing) -> ServerApp:
    """Return a server that broadcasts, collects and adds up, and times its rounds."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        rng = np.random.default_rng(0)
        adapter = {"w": rng.random(floats, dtype=np.float32)}
        timing.tasks = clients
        while len(nodes := list(grid.get_node_ids())) < clients:
            time.sleep(0.05)
        for number in range(rounds + 1):
            started = time.perf_counter()
            total, heard = np.zeros(floats, dtype=np.float32), 0
            content = to_record(Task(number, 0, 0, 0.1, adapter))
            messages = [Message(content, node, "train", ttl=600) for node in nodes]
            waiting = set(grid.push_messages(messages))
            while waiting:
                replies = list(grid.pull_messages(waiting))
                for reply in replies:
                    waiting.discard(reply.metadata.reply_to_message_id)
                    total += from_record(Update, reply.content).tensors["w"]
                    heard += 1
                if not replies:
                    time.sleep(0.005)
            if heard != clients:
                raise RuntimeError(f"{heard} of {clients} clients answered")
            if number:
                timing.seconds.append(time.perf_counter() - started)

    return app


def time_local(clients: int, floats: int, rounds: int, executor: str = "threads") -> Timing:
    """Time our engine."""
    timing = Timing()
    made: Executor = (
        ThreadExecutor(client_app(), 1)
        if executor == "threads"
        else ProcessExecutor(client_app, cores())
    )
    grid = LocalGrid(made, clients)
    try:
        server_app(clients, floats, rounds, timing)(grid, Context(1, 0, {}, RecordDict(), {}))
    finally:
        grid.close()
    return timing


def time_ray(clients: int, floats: int, rounds: int) -> Timing:
    """Time Flower's Ray runtime, with an actor for each core."""
    from flwr.simulation import run_simulation

    timing = Timing()
    with _silence():
        run_simulation(
            server_app=server_app(clients, floats, rounds, timing),
            client_app=client_app(),
            num_supernodes=clients,
            backend_config={
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                "init_args": {"num_cpus": cores(), "log_to_driver": False, "logging_level": 40},
            },
        )
    return timing


def numpy_rate(floats: int, tasks: int) -> float:
    """Return the floor: copy a payload and add it up, with no engine at all."""
    payload = np.random.default_rng(0).random(floats, dtype=np.float32)
    total = np.zeros(floats, dtype=np.float32)
    started = time.perf_counter()
    for _ in range(tasks):
        total += payload.copy()
    return tasks / (time.perf_counter() - started)


def flatness(rounds: int) -> list[dict[str, float]]:
    """Measure time per task and memory of the local engine at 10, 100 and 1,000 clients."""
    found = []
    time_local(10, PAYLOADS["4mb"], 1)  # what the first run takes, no later one takes again
    for clients in (10, 100, 1000):
        gc.collect()
        timing = time_local(clients, PAYLOADS["4mb"], rounds)
        found.append(
            {
                "clients": clients,
                "ms_per_task": 1e3 / timing.rate(),
                "memory_mb": psutil.Process().memory_info().rss / 2**20,
            }
        )
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and print its table and its JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: within a minute")
    parser.add_argument("--clients", type=int, default=100)
    options = parser.parse_args(arguments)
    rounds = {"tiny": 5, "4mb": 3} if options.quick else {"tiny": 20, "4mb": 8}
    clients = options.clients
    table = Table(title=f"tasks per second, {clients} clients, {cores()} cores")
    for name in ("payload", "local", "local, processes", "Ray", "local / Ray", "NumPy alone"):
        table.add_column(name, justify="right")
    result: dict[str, object] = {}
    for name, floats in PAYLOADS.items():
        local = time_local(clients, floats, rounds[name]).rate()
        processes = time_local(clients, floats, rounds[name], "processes").rate()
        ray = time_ray(clients, floats, rounds[name]).rate()
        alone = numpy_rate(floats, clients * rounds[name])
        result |= {
            f"local_over_ray_{name}": local / ray, f"local_{name}": local,
            f"processes_{name}": processes, f"ray_{name}": ray, f"numpy_{name}": alone,
        }  # fmt: skip
        figures = (local, processes, ray, local / ray, alone)
        table.add_row(name, *(f"{figure:,.1f}" for figure in figures))
    flat = flatness(1 if options.quick else 3)
    result["flat"] = flat
    sizes = Table(title="local engine, 4 MB payload: flat in the number of clients")
    for column in ("clients", "ms per task", "memory MB"):
        sizes.add_column(column, justify="right")
    for row in flat:
        sizes.add_row(
            f"{row['clients']:,.0f}", f"{row['ms_per_task']:,.2f}", f"{row['memory_mb']:,.0f}"
        )
    console = Console(stderr=False)
    console.print(table)
    console.print(sizes)
    sys.stdout.write(json.dumps(result) + "\n")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the engine's own chatter off the result."""
    import logging

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


if __name__ == "__main__":
    main()
