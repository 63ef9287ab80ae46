"""The server's only contact with Flower: asking nodes and hearing their answers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from flwr.app import Message, RecordDict

from fedtune.errors import FedtuneError
from fedtune.server.patient import Mail
from fedtune.server.pauses import pauses
from fedtune.wire import (
    KINDS,
    Accepted,
    Advert,
    Dealt,
    Evaluation,
    Hello,
    Record,
    Revealed,
    Share,
    Signed,
    Task,
    Update,
    from_record,
    size_of,
    to_record,
)

__all__ = ["Answer", "GridLink", "Link", "Reply", "plain"]

Reply = TypeVar(
    "Reply", Hello, Update, Evaluation, Share, Accepted, Advert, Dealt, Signed, Revealed
)
_MOST_CHARACTERS = 500


@dataclass(frozen=True)
class Answer(Generic[Reply]):
    """What came back from one node: a checked record, or the reason why there is none."""

    node: int
    value: Reply | None
    problem: str
    bytes_up: int


class Link(Protocol):
    """How the round loop reaches clients."""

    def nodes(self) -> list[int]:
        """Return the ids of the nodes that are there."""
        ...

    def ask(
        self, reply: type[Reply], nodes: Iterable[int], task: Record | None, seconds: float
    ) -> tuple[int, Iterator[Answer[Reply]]]:
        """Send one task to many nodes; return its bytes per node, and the answers as they come.

        The iterator ends when all have answered or ``seconds`` are over.
        """
        ...

    def ask_each(
        self, reply: type[Reply], tasks: Mapping[int, Record | None], seconds: float
    ) -> tuple[dict[int, int], Iterator[Answer[Reply]]]:
        """Send each node its own task; return the bytes of each, and the answers as they come."""
        ...


def _grouped(tasks: Mapping[int, Record | None]) -> Iterator[tuple[Record | None, list[int]]]:
    """Yield each task once, with its nodes; equal tasks are one object."""
    nodes: dict[int, list[int]] = {}
    for node, task in tasks.items():
        nodes.setdefault(id(task), []).append(node)
    for some in nodes.values():
        yield tasks[some[0]], some


class GridLink:
    """``Link`` over a Flower ``Grid``, whatever engine is behind it."""

    def __init__(self, grid: Mail) -> None:
        self._grid = grid

    def nodes(self) -> list[int]:
        """Return the ids of the nodes that are there."""
        return sorted(self._grid.get_node_ids())

    def ask(
        self, reply: type[Reply], nodes: Iterable[int], task: Record | None, seconds: float
    ) -> tuple[int, Iterator[Answer[Reply]]]:
        """Send one task to many nodes; see ``Link``."""
        sizes, answers = self.ask_each(reply, dict.fromkeys(nodes, task), seconds)
        return max(sizes.values(), default=0), answers

    def ask_each(
        self, reply: type[Reply], tasks: Mapping[int, Record | None], seconds: float
    ) -> tuple[dict[int, int], Iterator[Answer[Reply]]]:
        """Send each node its own task; see ``Link``."""
        deadline = time.monotonic() + seconds
        sizes: dict[int, int] = {}
        waiting: dict[str, int] = {}
        for task, nodes in _grouped(tasks):
            content = to_record(task) if task is not None else RecordDict()
            group = _group(task)
            messages = [
                Message(content, node, KINDS[reply], ttl=seconds, group_id=group) for node in nodes
            ]
            sizes |= dict.fromkeys(nodes, size_of(messages[0]))
            # One that Flower did not take has no id: nobody will answer it.
            sent = zip(self._grid.push_messages(messages), nodes, strict=False)
            waiting |= {name: node for name, node in sent if name}
        return sizes, self._answers(reply, waiting, deadline)

    def _answers(
        self, reply: type[Reply], waiting: dict[str, int], deadline: float
    ) -> Iterator[Answer[Reply]]:
        pause = pauses()
        while waiting and time.monotonic() < deadline:
            heard = False
            for message in self._grid.pull_messages(sorted(waiting)):
                # Whom it is from is known by what it answers: an error that Flower makes in
                # a node's place has the server's own number.
                node = waiting.pop(message.metadata.reply_to_message_id, None)
                if node is None:
                    continue
                heard = True
                yield _read(reply, message, node)
            if heard:
                pause = pauses()
            else:
                time.sleep(next(pause))


def _group(task: Record | None) -> str:
    """Return the round and attempt of what is asked, for whoever reads Flower's logs."""
    if isinstance(task, Task | Advert | Dealt | Signed | Revealed):
        return f"{task.round}.{task.attempt}"
    return ""


def _read(reply: type[Reply], message: Message, node: int) -> Answer[Reply]:
    size = size_of(message)
    if message.has_error():
        reason = message.error.reason or f"error {message.error.code}"
        return Answer(node, None, plain(reason), size)
    try:
        return Answer(node, from_record(reply, message.content), "", size)
    except FedtuneError as error:
        return Answer(node, None, plain(str(error)), size)


def plain(text: str) -> str:
    r"""Make a client's words safe to show: printable, on one line, not too many.

    Examples
    --------
    >>> plain("no\x1b[2J such\nfile")
    'no?[2J such?file'
    """
    shown = text[:_MOST_CHARACTERS]
    return "".join(letter if letter.isprintable() else "?" for letter in shown)
