"""A node's connection: one process that asks for messages, answers them, and stays.

It speaks Flower's own fleet protocol and never asks for the bundle: what runs is what
is installed here. It outlives restarts of the server and cuts of the network, keeps its
heartbeats going while an answer is worked on, and a message that it cannot read, or
that is too large, ends in an error reply.
"""

from __future__ import annotations

import contextlib
import math
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

import grpc
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto
from flwr.proto.fleet_pb2 import PullMessagesResponse

from fedtune.client.fleet_checks import judge
from fedtune.client.fleet_door import Door, NodeEvent, NodeKind
from fedtune.client.fleet_memory import Answers, Memo, lost_work, open_memo
from fedtune.client.fleet_objects import Parcel, deflate, fetch, inflate, plan, send
from fedtune.client.fleet_seat import Seat
from fedtune.errors import FedtuneError

__all__ = ["Door", "NodeEvent", "serve_messages"]

_BOUND = (
    "run_id", "message_id", "src_node_id", "dst_node_id", "reply_to_message_id", "group_id",
    "created_at", "ttl", "message_type",
)  # fmt: skip
"""What the announcement of a message and the message itself must agree on."""
_TRIES = 3
_HELD = 0.5
_EAGER, _BUSY = 0.1, 4.0
"""Pauses between two questions, in terms of the time without work and of the last answer."""


def serve_messages(
    door: Door,
    answer: Callable[[Message], Message],
    watch: Callable[[NodeEvent], None],
    stop: threading.Event,
    *,
    grace: float | None = None,
) -> None:
    """Answer the server's messages until ``stop``.

    Parameters
    ----------
    door : Door
    answer : callable
        Gets one message at a time, in a thread of its own, and returns a reply to it. What
        it raises becomes an error reply: the words of a ``FedtuneError``, else the type alone.
    watch : callable
        Hears what happens, from this thread.
    stop : threading.Event
    grace : float or None
        Seconds that the message at work may still take after ``stop``; none is no limit.

    Raises
    ------
    FedtuneError
        The server refuses this node for good: ``ExitCode.SIGNATURE`` for keys,
        certificates and clocks, ``ExitCode.ENGINE`` otherwise. Being away is no refusal.
    """
    with open_memo(door) as memo:
        node = _Node(door, memo, watch, stop, grace)
        beats = threading.Thread(target=node.seat.beat, name="heartbeat", daemon=True)
        work = _Work(answer)
        try:
            node.seat.connect()
            beats.start()
            if not stop.is_set() and (lost := lost_work(memo)) is not None:
                node.reply(*lost, 0.0)
                memo.end()
            node.listen(work)
        finally:
            work.close()
            node.seat.leave(time.monotonic() - node.answered)


class _Work:
    """The thread that answers: one for all messages, so that its libraries warm up once."""

    def __init__(self, answer: Callable[[Message], Message]) -> None:
        self._answer = answer
        self._asked: SimpleQueue[tuple[Message, Future[Message]] | None] = SimpleQueue()
        threading.Thread(target=self._run, name="answers", daemon=True).start()

    def ask(self, question: Message) -> Future[Message]:
        """Start on a message."""
        future: Future[Message] = Future()
        self._asked.put((question, future))
        return future

    def close(self) -> None:
        """End the thread once it has nothing to do."""
        self._asked.put(None)

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None:
            question, future = asked
            try:
                reply = self._answer(question)
                good = isinstance(reply, Message)
                if not good or reply.metadata.reply_to_message_id != question.metadata.message_id:
                    raise FedtuneError("the node's answer is not one to this message")
                future.set_result(reply)
            except BaseException as error:  # noqa: BLE001 - whatever it is, the node stays
                future.set_result(Message(_as_error(error), reply_to=question))


class _Node:
    """One node at work at one server."""

    def __init__(
        self,
        door: Door,
        memo: Memo,
        watch: Callable[[NodeEvent], None],
        stop: threading.Event,
        grace: float | None,
    ) -> None:
        self._door, self._memo, self._watch = door, memo, watch
        self._stop, self._grace = stop, grace
        self._answers = Answers()
        self._stopped_at: float | None = None
        self.answered = -math.inf
        self.seat = Seat(door, memo, self._tell, stop, self._over)

    def listen(self, work: _Work) -> None:
        """Ask for messages and answer them until stopped."""
        worked = time.monotonic()
        while not self._stop.is_set():
            asked = time.monotonic()
            try:
                response = self.seat.here().pull(self._stop)
            except grpc.RpcError as error:
                self.seat.connect(judge(error).words)
                continue
            if response is None:
                return
            took = time.monotonic() - asked
            if response.messages_list and response.message_object_trees:
                self._take(response, work)
                worked = time.monotonic()
                continue
            if response.HasField("reconnect") and took > _HELD:
                continue  # the server held our question, and can be asked again at once
            # A tenth of what was waited already; and a server that is slow has enough to do.
            idle = time.monotonic() - worked
            pause = max(self._door.poll, idle * _EAGER, took * _BUSY)
            self._stop.wait(min(pause, self._door.most_poll) * random.uniform(0.9, 1.1))

    def reply(self, question: str, answer: Message, seconds: float) -> None:
        """Send an answer, over as many lines as it takes, while somebody waits for it."""
        meta = answer.metadata
        about = {"message": question, "about": meta.message_type, "run": meta.run_id}
        about["group"] = meta.group_id
        try:
            parcel = deflate(answer, seconds, self._door.most_bytes)
        except FedtuneError as error:
            parcel = deflate(_instead(answer, str(error)), seconds, 2**20)
            self._tell("dropped", str(error), **about)
        self._answers.keep(question, parcel)
        self._send(parcel, about, seconds)

    def _send(self, parcel: Parcel, about: dict[str, object], seconds: float) -> None:
        tries, broke = 0, False
        while True:
            if time.time() > parcel.until:
                self._tell("late", "the answer is too late: nobody waits for it", **about)
                return
            if self.seat.line is None or (tries and self._over()):
                self._tell("dropped", "the node stopped before its answer was sent", **about)
                return
            tries += 1
            try:
                sent = send(self.seat.line, parcel, again=broke)
            except FedtuneError as error:
                if tries < _TRIES:
                    broke = True
                    continue
                self._tell("dropped", str(error), **about)
                return
            except grpc.RpcError as error:
                verdict = judge(error)
                if verdict.kind in {"ended", "large", "other"}:
                    self._tell("dropped", f"the answer was not taken: {verdict.words}", **about)
                    return
                self.seat.connect(verdict.words)
                broke = True
                continue
            if sent is None:
                self._tell("dropped", "the server no longer waits for this answer", **about)
                return
            self.answered = time.monotonic()
            self._tell("answered", "answered", bytes=sent, seconds=seconds, **about)
            return

    def _take(self, response: PullMessagesResponse, work: _Work) -> None:
        """Get one message in full and see that it is answered."""
        try:
            question = message_from_proto(response.messages_list[0])
            meta = question.metadata
            root = response.message_object_trees[0].object_id
            mine = meta.dst_node_id == self.seat.here().node and meta.message_id == root
            if not mine or meta.reply_to_message_id or not meta.ttl > 0:
                raise ValueError
        except Exception:  # noqa: BLE001 - Flower's decoders raise whatever they meet
            self._tell("dropped", "a message that is not for this node, or of no known form")
            return
        about: dict[str, object] = {
            "message": root, "about": meta.message_type, "run": meta.run_id, "group": meta.group_id
        }  # fmt: skip
        if self._answers.had(root):
            before = self._answers.find(root)
            if before is not None:
                self._tell("asked", "asked again: the same answer goes again", **about)
                self._send(before, about, 0.0)
            else:
                self._tell("dropped", "asked again for what was answered long ago", **about)
            return
        began = time.monotonic()
        try:
            message, size = self._fetch(question, response)
        except FedtuneError as error:
            self._tell("dropped", str(error), **about)
            code = ErrorCode.MESSAGE_UNAVAILABLE
            self.reply(root, Message(Error(code, str(error)), reply_to=question), 0.0)
            return
        except grpc.RpcError as error:
            self._tell("dropped", judge(error).words, **about)
            return
        seconds = time.monotonic() - began
        self._tell("asked", "asked", bytes=size, seconds=seconds, **about)
        self._memo.begin(message)
        began = time.monotonic()
        future = work.ask(message)
        while not future.done() and not self._over():
            with contextlib.suppress(TimeoutError):
                future.result(timeout=0.25)
        if future.done():
            self.reply(root, future.result(), time.monotonic() - began)
        else:
            words = "the node stopped before it was done"
            self._tell("dropped", words, **about)
            gone = Error(ErrorCode.CLIENT_APP_CRASHED, words)
            self.reply(root, Message(gone, reply_to=question), 0.0)
        self._memo.end()

    def _fetch(self, question: Message, response: PullMessagesResponse) -> tuple[Message, int]:
        """Get a message's objects and put them together; return also their bytes."""
        meta, tree = question.metadata, response.message_object_trees[0]
        wanted = plan(tree)
        until = meta.created_at + meta.ttl
        while True:
            try:
                contents = fetch(
                    self.seat.here(), meta.run_id, wanted, self._door.most_bytes, until, self._stop
                )
                break
            except grpc.RpcError as error:
                verdict = judge(error)
                if verdict.kind == "large":
                    raise FedtuneError(f"the message was refused: {verdict.words}") from error
                if verdict.kind in {"ended", "other"} or time.time() > until:
                    raise
                self.seat.connect(verdict.words)
                if self.seat.line is None:
                    raise
        # Only now: what is confirmed while the server still receives it breaks its run.
        with contextlib.suppress(grpc.RpcError):
            self.seat.here().confirm(meta.run_id, tree.object_id)
        size = sum(map(len, contents.values()))
        message = inflate(tree.object_id, contents, wanted, self._door.most_bytes)
        same = all(getattr(message.metadata, name) == getattr(meta, name) for name in _BOUND)
        if not message.has_content() or not same:
            raise FedtuneError("the message was refused: it is not the one that was announced")
        return message, size

    def _over(self) -> bool:
        """Return whether even the message at work has to end."""
        if not self._stop.is_set():
            return False
        if self._stopped_at is None:
            self._stopped_at = time.monotonic()
        return self._grace is not None and time.monotonic() - self._stopped_at >= self._grace

    def _tell(self, kind: NodeKind, words: str, **about: object) -> None:
        self._watch(NodeEvent(kind, words, **about))  # type: ignore[arg-type]


def _as_error(error: BaseException) -> Error:
    """Return what may be said of a failure: our own words, or the type of anything else.

    An exception's text may quote the owner's data; its type does not.
    """
    code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    return Error(code, str(error) if isinstance(error, FedtuneError) else type(error).__name__)


def _instead(answer: Message, why: str) -> Message:
    """Return an error in place of an answer that cannot be sent."""
    from flwr.app.message import make_message

    return make_message(
        metadata=answer.metadata, error=Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, why)
    )
