"""A server's rounds with real owners' nodes; only the network is replaced, by one that may lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, RecordDict

from fedtune.client.worker import Worker
from fedtune.config import Config
from fedtune.keys.node import public_line
from fedtune.keys.roster import read_roster, signers
from fedtune.server.books import Books, open_books
from fedtune.server.checkpoint import State
from fedtune.server.events import ClientDone, Event
from fedtune.server.link import Answer, _read
from fedtune.server.private import open_central
from fedtune.server.rounds import run_rounds
from fedtune.server.run_folder import RunFolder, create
from fedtune.server.serving import Served
from fedtune.wire import KINDS, Record, Terms, from_record, to_record
from tests.client.node_kit import Ward, tuned

Lie = Callable[[str, str, Any], Any]
"""Kind of message, node and record (or reply) to what is delivered in its place."""


def separate_processes(patch: pytest.MonkeyPatch) -> None:
    """Let nodes of one test keep their workers, as processes of their own would."""
    known: dict[Path, Worker] = {}

    def worker_for(config: Config, folder: Path, service: Any = None) -> Worker:
        if folder not in known or known[folder].config != config:
            known[folder] = Worker(config, folder, service)
        return known[folder]

    patch.setattr("fedtune.client.app.worker_for", worker_for)
    patch.setattr("fedtune.client.node.worker_for", worker_for)


@dataclass
class Wire:
    """Carries encoded records between a server and nodes; ``asking`` and ``answering`` may lie."""

    here: Ward
    names: tuple[str, ...] = ("ann", "bob", "cy")
    asking: Lie = lambda _kind, _name, record: record
    answering: Lie = lambda _kind, _name, reply: reply
    log: list[tuple[str, str, Any]] = field(default_factory=list)

    def node_of(self, name: str) -> int:
        return 10 + self.names.index(name)

    def nodes(self) -> list[int]:
        return [self.node_of(name) for name in self.names]

    def online(self) -> dict[int, str]:
        return {
            self.node_of(name): public_line(self.here.identities[name].login.public_key())
            for name in self.names
        }

    def ask(
        self, reply: type[Any], nodes: Iterable[int], task: Record | None, seconds: float
    ) -> tuple[int, Iterator[Answer[Any]]]:
        _, answers = self.ask_each(reply, dict.fromkeys(nodes, task), seconds)
        return 100, answers

    def ask_each(
        self, reply: type[Any], tasks: Mapping[int, Record | None], seconds: float
    ) -> tuple[dict[int, int], Iterator[Answer[Any]]]:
        kind, found = KINDS[reply], []
        for node, task in tasks.items():
            name = self.names[node - 10]
            asked = self.asking(kind, name, task)
            if asked is None and task is not None:
                continue
            content = to_record(asked) if asked is not None else RecordDict()
            answer: Message | None = self.here.send(kind, content, name)
            self.log.append((kind, name, answer))
            answer = self.answering(kind, name, answer)
            if answer is not None:
                found.append(_read(reply, answer, node))
        return dict.fromkeys(tasks, 100), iter(found)


@dataclass
class Federation:
    """A run, and what was heard of it."""

    config: Config
    here: Ward
    wire: Wire
    folder: RunFolder
    events: list[Event] = field(default_factory=list)
    clock: float = 0.0

    def served(self) -> Served:
        terms = self.here.terms(self.config, self.folder.job())
        bare = Terms(terms.job, terms.terms, terms.fingerprint, {})
        return Served(
            self.wire, self.wire.online, bare, self.config, self.here.keys,  # type: ignore[arg-type]
            self.events.append, self.pass_time, lambda: self.clock,
        )  # fmt: skip

    def pass_time(self, seconds: float) -> None:
        self.clock += seconds

    def books(self) -> Books | None:
        return open_books(self.config, self.folder.books, self.folder.job())

    def run(self, served: Served | None = None) -> State:
        return run_rounds(
            served or self.served(), replace(tuned(self.config), config=self.config),
            self.folder, self.events.append,
            open_central(self.config, self.folder.job()), self.books(),
            lambda: signers(read_roster(self.here.keys)),
        )  # fmt: skip

    def reasons(self, name: str) -> list[str]:
        return [
            event.reason for event in self.events
            if isinstance(event, ClientDone) and event.client == name and event.reason
        ]  # fmt: skip


def federation(here: Ward, config: Config, **changes: Any) -> Federation:
    output = config.output.model_copy(update={"folder": str(here.folder / "runs")})
    ledger = config.privacy.model_copy(update={"ledger": str(here.folder / "server.db")})
    config = config.model_copy(update={"output": output, "privacy": ledger})
    return Federation(config, here, Wire(here, **changes), create(config, "x"))


def replaced(reply: Message, **fields: Any) -> Message:
    """Return a reply in which fields of its record are others; None removes one."""
    return Message(_with(reply.content, fields), reply_to=_question(reply))


def remade(reply: Message, kind: type[Any], change: Callable[[Any], Any]) -> Message:
    """Return a reply whose record is decoded, changed and encoded again."""
    return Message(to_record(change(from_record(kind, reply.content))), reply_to=_question(reply))


def _question(reply: Message) -> Message:
    asked = Message(RecordDict(), 7, reply.metadata.message_type, ttl=100.0)
    asked.metadata.__dict__["_message_id"] = "ab" * 32
    return asked


def _with(content: RecordDict, fields: Mapping[str, Any]) -> RecordDict:
    from flwr.app import ConfigRecord

    known = dict(content.config_records["fields"]) | dict(fields)
    scalars = ConfigRecord({key: value for key, value in known.items() if value is not None})
    return RecordDict({**content, "fields": scalars})
