"""A Flower ``Grid`` on one machine: no sockets, no server process, no polling."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedtune.simulations.executors import Executor, expired

__all__ = ["LocalGrid"]

_WAIT_SECONDS = 0.05


class LocalGrid(Grid):
    """Delivers messages to an ``Executor`` and keeps the replies until they are pulled.

    Finished replies that nobody pulls hold their clients back, so that memory
    does not grow with the number of clients.

    Parameters
    ----------
    executor : Executor
    nodes : int
        Nodes ``1 .. nodes``; node ``i`` holds partition ``i - 1``.
    backlog : int
        Replies that may wait.
    """

    def __init__(self, executor: Executor, nodes: int, backlog: int = 8) -> None:
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
        self._executor = executor
        self._nodes = range(1, nodes + 1)
        self._run = Run.create_empty(run_id=1)
        self._ids = itertools.count(1)
        self._asked: dict[str, Message] = {}
        self._replies: dict[str, Message] = {}
        self._ready = threading.Condition()
        self._room = threading.Semaphore(backlog)
        executor.start(self._deliver)

    def set_run(self, run: Run) -> None:
        """Set the run this grid works for."""
        self._run = run

    @property
    def run(self) -> Run:
        """Run information."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message; the same as ``Message(...)``."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand messages to the executor, in order."""
        self._forget_expired()
        ids = []
        for message in messages:
            name = f"{next(self._ids):x}"
            message.metadata.__dict__["_message_id"] = name
            self._asked[name] = message
            ids.append(name)
            self._executor.submit(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there; waits a moment when there is none."""
        wanted = set(message_ids)
        with self._ready:
            if not wanted & self._replies.keys():
                self._ready.wait(_WAIT_SECONDS)
            found = [name for name in self._replies if name in wanted]
            replies = [self._replies.pop(name) for name in found]
        for name in found:
            self._asked.pop(name, None)
            self._room.release()
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, and pull until all have answered or ``timeout`` seconds are over."""
        waiting = set(self.push_messages(messages))
        deadline = time.monotonic() + (timeout if timeout is not None else float("inf"))
        replies: list[Message] = []
        while waiting and time.monotonic() < deadline:
            for reply in self.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
        return replies

    def close(self) -> None:
        """Stop the executor."""
        # Clients held back by unpulled replies must be able to end.
        for _ in range(len(self._asked) + 1):
            self._room.release()
        self._executor.close()

    def _deliver(self, question: Message, answer: Message) -> None:
        self._room.acquire()
        name = question.metadata.message_id
        with self._ready:
            if name in self._asked:
                self._replies[name] = answer
                self._ready.notify_all()
                return
        self._room.release()

    def _forget_expired(self) -> None:
        """Drop questions whose time is over, and answers that came too late."""
        with self._ready:
            late = [name for name, message in self._asked.items() if expired(message)]
            for name in late:
                del self._asked[name]
                if self._replies.pop(name, None) is not None:
                    self._room.release()
