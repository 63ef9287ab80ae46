"""The client's only contact with Flower: three handlers around a ``Worker``."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.client.failures import log_failure
from fedtune.client.parties import Parties
from fedtune.client.quiet import train_quietly
from fedtune.client.secure import Party
from fedtune.client.worker import Worker
from fedtune.config import Config
from fedtune.errors import ExitCode, FedtuneError
from fedtune.models import Base
from fedtune.split.blocks import Cut
from fedtune.split.calls import Service
from fedtune.terms import digest_of, propose
from fedtune.wire import KINDS, Advert, Dealt, Revealed, Signed, Task, from_record, to_record

__all__ = ["make_client_app", "worker_for"]

MakeService = Callable[[Base, Cut], Service]
_Step = TypeVar("_Step", Advert, Dealt, Signed, Revealed)

_TOLD = frozenset({ExitCode.BUDGET_EXHAUSTED, ExitCode.LEDGER})

_lock = threading.Lock()
_current: list[Worker] = []


def worker_for(config: Config, folder: Path | None, service: MakeService | None = None) -> Worker:
    """Return this process's worker, made at first use.

    A process serves one experiment at a time: a second base model would double
    its memory.
    """
    with _lock:
        if not _current or (_current[0].config, _current[0].folder) != (config, folder):
            _current.clear()
            _current.append(Worker(config, folder, service))
        return _current[0]


def make_client_app(
    config: Config, folder: Path | None = None, service: MakeService | None = None,
    party_of: Callable[[str], Party] | None = None, agreed: str = "",
) -> ClientApp:  # fmt: skip
    """Return the Flower ``ClientApp`` of an experiment.

    Parameters
    ----------
    config : Config
        The client's own copy; nothing of it comes from the server.
    folder : Path, optional
        Where clients keep their optimiser state between rounds.
    service : callable, optional
        Split tuning in simulations: makes the body of this process.
    party_of : callable, optional
        Secure aggregation: takes a client's name, returns who it is to the others.
    agreed : str
        SHA-256 of the terms that were agreed to; empty: those of ``config`` itself.

    Notes
    -----
    Which client a node is stands in its ``node_config["partition-id"]``.
    """
    app = ClientApp()
    parties = None
    if config.federation.secure is not None:
        if party_of is None:
            raise FedtuneError(
                "secure aggregation without an identity for each client",
                hint="join with a node's key: fedtune keys node", code=ExitCode.SIGNATURE,
            )  # fmt: skip
        parties = Parties(config, party_of, agreed or digest_of(propose(config)))
        _add_masking(app, parties, lambda: worker_for(config, folder, service))

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        with _discreet(config, folder, context):
            begun = from_record(Task, message.content).round if len(message.content) else 0
            answer = worker_for(config, folder, service).hello(_index(context), begun)
        return Message(to_record(answer), reply_to=message)

    @app.query("share")
    def share(message: Message, context: Context) -> Message:
        task = from_record(Task, message.content)
        with _discreet(config, folder, context):
            answer = worker_for(config, folder, service).share(_index(context), task)
        return Message(to_record(answer), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        task = from_record(Task, message.content)
        with _discreet(config, folder, context):
            worker = worker_for(config, folder, service)
            answer = (
                parties.train(worker, _index(context), task) if parties
                else train_quietly(worker, _index(context), task)
            )  # fmt: skip
        return Message(to_record(answer), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        task = from_record(Task, message.content)
        with _discreet(config, folder, context):
            answer = worker_for(config, folder, service).evaluate(_index(context), task)
        return Message(to_record(answer), reply_to=message)

    return app


def _add_masking(app: ClientApp, parties: Parties, worker: Callable[[], Worker]) -> None:
    """Add the steps of secure aggregation around training; none of them sees a row."""

    def add(kind: type[_Step], step: Callable[[Worker, int, _Step], _Step]) -> None:
        @app.query(KINDS[kind].removeprefix("query."))
        def answer(message: Message, context: Context) -> Message:
            asked = from_record(kind, message.content)
            return Message(to_record(step(worker(), _index(context), asked)), reply_to=message)

    add(Advert, parties.advert)
    add(Dealt, parties.deal)
    add(Signed, parties.sign)
    add(Revealed, parties.reveal)


@contextlib.contextmanager
def _discreet(config: Config, folder: Path | None, context: Context) -> Iterator[None]:
    """Under a privacy promise, keep the words of a failure at home: they may quote rows.

    What a budget or a promise refuses says nothing about rows, and is told.
    """
    try:
        yield
    except Exception as error:
        told = isinstance(error, FedtuneError) and error.code in _TOLD
        if not config.privacy.on or told:
            raise
        note = "see errors.log in the client's folder"
        if folder is not None:
            log_failure(folder / f"{_index(context):06d}" / "errors.log", error)
        raise FedtuneError(
            f"the client failed; what happened stays there ({note})", code=ExitCode.ENGINE
        ) from None


def _index(context: Context) -> int:
    return int(context.node_config["partition-id"])
