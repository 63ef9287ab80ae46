"""What makes Flower's SuperLink quick and quiet towards nodes that wait for work.

Flower 1.39 answers a node's question for messages at once, mostly with nothing, and
each costs the server some 4 ms: 200 nodes that ask twice a second take more than it has.
Here such a question is held until there is a message or some seconds are over. And a
message whose receipt the node never confirmed, because the network broke or its process
died in between, is given to it once more, where Flower gives each one once.

The protocol stays Flower's: a node of Flower sees a server that answers slowly. Ours
sees by the field ``reconnect`` that its question was held and asks again at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

__all__ = ["hold_questions", "sweep_seldom"]

_TRIES = 2


@dataclass
class _Bells:
    """Who waits for which node's messages, and what was given and not yet confirmed."""

    most: int
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _bells: dict[int, threading.Event] = field(default_factory=dict)
    _given: dict[int, tuple[str, float, int, Any]] = field(default_factory=dict)

    @contextmanager
    def waiting(self, node: int) -> Iterator[threading.Event | None]:
        """Hang up a bell for a node; none if too many hang. An older one of it is rung."""
        bell: threading.Event | None = None
        with self._lock:
            older = self._bells.get(node)
            if older is not None or len(self._bells) < self.most:
                bell = self._bells[node] = threading.Event()
        if older is not None:
            older.set()
        try:
            yield bell
        finally:
            with self._lock:
                if bell is not None and self._bells.get(node) is bell:
                    del self._bells[node]

    def holds(self, node: int, bell: threading.Event) -> bool:
        """Return whether this is still the node's bell: it has not asked again since."""
        with self._lock:
            return self._bells.get(node) is bell

    def ring(self, node: int) -> None:
        """Say that there is a message for a node."""
        with self._lock:
            bell = self._bells.get(node)
        if bell is not None:
            bell.set()

    def give(self, node: int, response: Any) -> None:
        """Remember what a node is given now."""
        meta = response.messages_list[0].metadata
        with self._lock:
            self._given[node] = (meta.message_id, meta.created_at + meta.ttl, _TRIES, response)

    def again(self, node: int) -> Any:
        """Return what a node was given and never confirmed, or None."""
        with self._lock:
            name, until, tries, response = self._given.pop(node, ("", 0.0, 0, None))
            if not tries or time.time() > until:
                return None
            self._given[node] = (name, until, tries - 1, response)
            return response

    def confirmed(self, node: int, message: str) -> None:
        """Forget a message that is with its node."""
        with self._lock:
            if self._given.get(node, ("",))[0] == message:
                del self._given[node]


def hold_questions(seconds: float = 8.0, most: int = 500) -> None:
    """Have the SuperLink of this process hold nodes' questions; call it before it starts.

    Parameters
    ----------
    seconds : float
        How long, at most. Below the deadlines of nodes: ours is 30 s.
    most : int
        How many at a time: each holds one of the server's 1,000 threads. Others are
        answered at once, as by Flower.
    """
    from flwr.server.superlink.fleet.grpc_rere.fleet_servicer import FleetServicer
    from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState

    bells = _Bells(most)
    ask, push = FleetServicer.PullMessages, FleetServicer.PushMessages
    confirm, store = (
        FleetServicer.ConfirmMessageReceived,
        SqlLinkState.store_message_and_object_tree,
    )

    def pull_messages(self: Any, request: Any, context: Any) -> Any:
        node, until = request.node.node_id, time.monotonic() + seconds
        if (unconfirmed := bells.again(node)) is not None:
            return unconfirmed
        with bells.waiting(node) as bell:
            response = ask(self, request, context)
            if bell is not None and not response.messages_list:
                # Whoever hung up must not be given a message: ring, and look.
                if not context.add_callback(bell.set):
                    return response
                while bell.wait(max(0.0, until - time.monotonic())):
                    bell.clear()
                    if not context.is_active() or not bells.holds(node, bell):
                        return response
                    response = ask(self, request, context)
                    if response.messages_list:
                        break
                else:
                    response.reconnect.SetInParent()
        if response.messages_list:
            bells.give(node, response)
        return response

    def push_messages(self: Any, request: Any, context: Any) -> Any:
        for message in request.messages_list:
            bells.confirmed(request.node.node_id, message.metadata.reply_to_message_id)
        return push(self, request, context)

    def confirm_message(self: Any, request: Any, context: Any) -> Any:
        bells.confirmed(request.node.node_id, request.message_object_id)
        return confirm(self, request, context)

    def store_message(self: Any, message: Any, *rest: Any, **more: Any) -> Any:
        stored = store(self, message, *rest, **more)
        bells.ring(message.metadata.dst_node_id)
        return stored

    for kind, name, changed in (
        (FleetServicer, "PullMessages", pull_messages),
        (FleetServicer, "PushMessages", push_messages),
        (FleetServicer, "ConfirmMessageReceived", confirm_message),
        (SqlLinkState, "store_message_and_object_tree", store_message),
    ):
        setattr(kind, name, changed)


def sweep_seldom(seconds: float = 0.5) -> None:
    """Have the SuperLink of this process look for dead tasks twice a second, not at each call.

    Flower 1.39 does it before it looks up a run, so for every object that a node fetches
    or sends; it writes, so calls that could run side by side wait for one another. A
    third of the server's time went there. A task that stopped its heartbeats is found
    ``seconds`` later, after the minute that Flower waits in any case.
    """
    from flwr.supercore.corestate.sql_corestate import SqlCoreState

    sweep = SqlCoreState._cleanup_expired_task_tokens
    swept = [-seconds]

    def seldom(self: Any) -> None:
        passed = time.monotonic()
        if passed - swept[0] >= seconds:
            swept[0] = passed
            sweep(self)

    setattr(SqlCoreState, sweep.__name__, seldom)
