"""What tests of engines share: client apps that worker processes can import, and experiments."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

if TYPE_CHECKING:
    from fedtune.config import Config
    from fedtune.server.run_folder import RunFolder

Handler = Callable[[Message, Context], Message]


def node_of(message: Message) -> int:
    return message.metadata.dst_node_id


def make_app() -> ClientApp:
    """A client that does what the message's group says: echo, raise, sleep or die."""
    app = ClientApp()

    @app.query()
    def answer(message: Message, context: Context) -> Message:
        what, _, nodes = message.metadata.group_id.partition(":")
        if not nodes or str(node_of(message)) in nodes.split(","):
            if what == "raise":
                raise ValueError(f"client {node_of(message)} has lost its glasses")
            if what == "sleep":
                time.sleep(3600)
            if what == "late":
                time.sleep(1.5)
            if what == "die":
                os._exit(9)
        return Message(message.content, reply_to=message)

    return app


def ask(nodes: range, group: str, *, ttl: float = 60.0) -> list[Message]:
    """One message of ``make_app`` for each node, with the same content."""
    content = RecordDict()
    return [Message(content, node, "query", ttl=ttl, group_id=group) for node in nodes]


def texts(client: int, count: int) -> list[str]:
    """Short stories; no two are the same."""
    who = ("Lily", "Tom", "Anna", "Ben", "Sue", "Max", "Mia", "Tim")[client % 8]
    what = ("a red ball", "an old dog", "the big tree", "a small boat", "her blue hat")
    return [
        f"Once upon a time {who} saw {what[i % 5]} on day {i}. {who} was happy and said hello."
        for i in range(count)
    ]


def rows(clients: int = 4, count: int = 10) -> list[dict[str, str]]:
    return [
        {"client": f"owner-{c}", "text": text}
        for c in range(clients)
        for text in texts(c, count + c)
    ]


def write_rows(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in records), encoding="utf-8")
    return path


def experiment(folder: Path, shared: Path, **changes: Any) -> Path:
    """Write a small experiment; ``changes`` are ``table__key=value``. Returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "rows.jsonl"
    if not data.exists():
        write_rows(data, rows())
    table: dict[str, Any] = {
        "schema": 1,
        "name": "small",
        "seed": 7,
        "model": {"base": str(shared / "models" / "stories260K")},
        "data": {"source": "rows.jsonl", "max_length": 32, "holdout": 0.2},
        "tuning": {"rank": 4, "lr": 0.01, "batch_size": 4, "steps": 3},
        "federation": {"rounds": 2},
        "engine": {"executor": "threads", "workers": 1},
        "output": {"folder": str(folder / "runs")},
    }
    for key, value in changes.items():
        *path, leaf = key.split("__")
        place = table
        for name in path:
            place = place.setdefault(name, {})
        place[leaf] = value
    file = folder / "experiment.toml"
    file.write_text(tomli_w.dumps(table), encoding="utf-8")
    return file


def settings(folder: Path, shared: Path, **changes: Any) -> Config:
    from fedtune.configfile import load

    return load(experiment(folder, shared, **changes))


def run_here(config: Config, watch: Callable[[Any], None] = lambda event: None) -> RunFolder:
    """Run an experiment in this process and return its folder."""
    from fedtune.server.run_folder import create
    from fedtune.simulations.simulate import simulate

    folder = create(config)
    simulate(config, folder, watch)
    return folder


@contextmanager
def changed(config: Config, home: Path, meddle: Callable[[Handler, Message, Context], Message]
            ) -> Iterator[ClientApp]:  # fmt: skip
    """Yield the client app of an experiment whose training goes through ``meddle``."""
    from fedtune.client.app import make_client_app

    honest = make_client_app(config, home)
    app = ClientApp()

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        return honest(message, context)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return honest(message, context)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return meddle(honest, message, context)

    yield app


def adapter_bytes(folder: RunFolder) -> bytes:
    return (folder.adapter / "adapter_model.safetensors").read_bytes()
