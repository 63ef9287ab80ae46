"""The client's only contact with Flower: three handlers around a ``Worker``."""

from __future__ import annotations

import threading
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.client.worker import Worker
from fedtune.config import Config
from fedtune.wire import Task, from_record, to_record

__all__ = ["make_client_app", "worker_for"]

_lock = threading.Lock()
_current: list[Worker] = []


def worker_for(config: Config, folder: Path | None) -> Worker:
    """Return this process's worker, made at first use.

    A process serves one experiment at a time: a second base model would double
    its memory.
    """
    with _lock:
        if not _current or (_current[0].config, _current[0].folder) != (config, folder):
            _current.clear()
            _current.append(Worker(config, folder))
        return _current[0]


def make_client_app(config: Config, folder: Path | None = None) -> ClientApp:
    """Return the Flower ``ClientApp`` of an experiment.

    Parameters
    ----------
    config : Config
        The client's own copy; nothing of it comes from the server.
    folder : Path, optional
        Where clients keep their optimiser state between rounds.

    Notes
    -----
    Which client a node is stands in its ``node_config["partition-id"]``.
    """
    app = ClientApp()

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        answer = worker_for(config, folder).hello(_index(context))
        return Message(to_record(answer), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        task = from_record(Task, message.content)
        answer = worker_for(config, folder).train(_index(context), task)
        return Message(to_record(answer), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        task = from_record(Task, message.content)
        answer = worker_for(config, folder).evaluate(_index(context), task)
        return Message(to_record(answer), reply_to=message)

    return app


def _index(context: Context) -> int:
    return int(context.node_config["partition-id"])
