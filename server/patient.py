"""Flower's Grid without its patience: an answer that is still on its way holds nobody up.

Flower 1.39 announces an answer before its objects are there, and ``HttpGrid`` then waits
for them, one answer after the other, for up to 180 s after the last object: a node that
is cut off in the middle, or means to, would stop every round for everybody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from flwr.app import Error, Message, Metadata
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

__all__ = ["Mail", "Patient"]

_BOUND = ("run_id", "message_id", "src_node_id", "dst_node_id", "reply_to_message_id")
"""What the SuperLink has seen of an answer, and the answer must say of itself."""


class Mail(Protocol):
    """What is needed of a Flower ``Grid``."""

    def get_node_ids(self) -> Iterable[int]:
        """Return who is there."""
        ...

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; return their ids."""
        ...

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the answers to these messages that are there."""
        ...


@dataclass
class _Coming:
    """An answer of which some objects may be missing still."""

    announced: Message
    missing: list[str]
    contents: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Patient:
    """``Mail`` of a SuperLink: an answer comes when all of it is there, and not before.

    Parameters
    ----------
    grid : HttpGrid
    """

    grid: Any
    _coming: dict[str, _Coming] = field(default_factory=dict)

    def get_node_ids(self) -> Iterable[int]:
        """Return who is there."""
        return cast(Iterable[int], self.grid.get_node_ids())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; return their ids."""
        return cast(Iterable[str], self.grid.push_messages(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Yield the answers to these messages that are there in full; never waits.

        What is begun of answers to other messages is given up.
        """
        wanted = set(message_ids)
        self._coming = {name: one for name, one in self._coming.items() if name in wanted}
        client, run = self.grid._runtime_client, self.grid.run.run_id
        asked = sorted(wanted - self._coming.keys())
        if asked:
            found = client.PullMessages(PullAppMessagesRequest(message_ids=asked))
            for proto, tree in zip(found.messages_list, found.message_object_trees, strict=True):
                announced = message_from_proto(proto)
                names = list(dict.fromkeys(one.object_id for one in iterate_object_tree(tree)))
                self._coming[announced.metadata.reply_to_message_id] = _Coming(announced, names)
        for question in list(self._coming):
            message = self._collect(self._coming[question], client, run)
            if message is not None:
                del self._coming[question]
                yield message

    def _collect(self, one: _Coming, client: Any, run: int) -> Message | None:
        """Fetch what is there of an answer; return it once it is whole."""
        meta = one.announced.metadata
        pull: Callable[[PullObjectRequest], Any] = client.PullObject
        while one.missing:
            name = one.missing[0]
            request = PullObjectRequest(node=self.grid.node, run_id=run, object_id=name)
            response = pull(request)
            if not response.object_found:
                return _lost(meta)
            if not response.object_available:
                return None
            one.contents[name] = response.object_content
            del one.missing[0]
        client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=self.grid.node, run_id=run, message_object_id=meta.message_id
            )
        )
        try:
            message = cast(Message, inflate_object_from_contents(meta.message_id, one.contents))
            message.metadata.__dict__["_message_id"] = meta.message_id
        except Exception:  # noqa: BLE001 - Flower's decoders raise whatever they meet
            return _lost(meta, "the answer cannot be decoded")
        if any(getattr(message.metadata, name) != getattr(meta, name) for name in _BOUND):
            return _lost(meta, "the answer is not the one that was announced")
        return message


def _lost(meta: Metadata, why: str = "the answer was announced and never came in full") -> Message:
    """Return an error in an answer's place."""
    return make_message(metadata=meta, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, why))
