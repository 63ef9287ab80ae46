"""Who runs the clients of a local simulation: threads of this process, or worker processes.

Both take Flower messages and give Flower messages back. Worker processes load
the base model once each and are fed through a ``Channel``; a broadcast crosses to
each of them once, however many clients it is for.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Protocol

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.simulations.channel import Channel
from fedtune.simulations.workshop import workshop

__all__ = ["Executor", "ProcessExecutor", "ThreadExecutor", "context_of"]

_RAISED, _DIED = 2, 8
_PATIENCE = 2.0
Deliver = Callable[[Message, Message], None]
"""Takes the question and the answer."""


class Executor(Protocol):
    """Runs messages on clients in the background."""

    def start(self, deliver: Deliver) -> None:
        """Begin; ``deliver`` hears every answer, from any thread."""
        ...

    def submit(self, message: Message) -> None:
        """Queue a message for the client it is addressed to."""
        ...

    def close(self) -> None:
        """Stop, without waiting for clients that never answer."""
        ...


def context_of(node: int) -> Context:
    """Return a client's Flower context; node ``i`` holds partition ``i - 1``."""
    return Context(1, node, {"partition-id": node - 1}, RecordDict(), {})


def expired(message: Message) -> bool:
    """Say whether nobody waits for the answer any more."""
    return time.time() > message.metadata.created_at + message.metadata.ttl


def answer_of(app: ClientApp, message: Message, context: Context) -> Message:
    """Run the client; what it raises becomes an error reply with its own words."""
    try:
        return app(message, context)
    except Exception as error:  # noqa: BLE001 - a client may raise anything
        reason = str(error) or type(error).__name__
        return Message(Error(code=_RAISED, reason=reason), reply_to=message)


@dataclass
class ThreadExecutor:
    """Clients in threads of this process; they share everything.

    A client that never answers keeps its thread; a new one takes its place when
    the message expires.
    """

    app: ClientApp
    workers: int
    _inbox: queue.SimpleQueue[Message | None] = field(default_factory=queue.SimpleQueue)
    _contexts: dict[int, Context] = field(default_factory=dict)
    _busy: dict[int, Message] = field(default_factory=dict)
    _threads: list[threading.Thread] = field(default_factory=list)
    _closed: threading.Event = field(default_factory=threading.Event)
    _deliver: Deliver | None = None

    def start(self, deliver: Deliver) -> None:
        """Start the threads."""
        self._deliver = deliver
        for _ in range(self.workers):
            self._hire()
        threading.Thread(target=self._replace_stuck, daemon=True).start()

    def submit(self, message: Message) -> None:
        """Queue a message."""
        self._inbox.put(message)

    def close(self) -> None:
        """Let threads end, and wait a little; stuck ones are daemons.

        One that still freed tensors while the interpreter went would abort the process.
        """
        self._closed.set()
        for _ in self._threads:
            self._inbox.put(None)
        end = time.monotonic() + _PATIENCE
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _hire(self) -> None:
        thread = threading.Thread(target=self._work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        me = threading.get_ident()
        while (message := self._inbox.get()) is not None:
            if expired(message):
                continue
            node = message.metadata.dst_node_id
            context = self._contexts.setdefault(node, context_of(node))
            self._busy[me] = message
            answer = answer_of(self.app, message, context)
            if self._busy.pop(me, None) is None:
                return
            self._deliver(message, answer)  # type: ignore[misc]

    def _replace_stuck(self) -> None:
        while not self._closed.wait(0.2):
            for thread, message in list(self._busy.items()):
                if expired(message) and self._busy.pop(thread, None) is not None:
                    self._hire()


@dataclass
class ProcessExecutor:
    """Clients in worker processes, each fed by one thread here.

    A worker that dies answers with an error and is replaced; one that does not
    answer before its message expires is killed and replaced.

    Parameters
    ----------
    make_app : callable
        Called in each worker; must be importable there (a module-level function
        or a ``functools.partial`` of one).
    """

    make_app: Callable[[], ClientApp]
    workers: int
    _inbox: queue.SimpleQueue[Message | None] = field(default_factory=queue.SimpleQueue)
    _processes: dict[int, Any] = field(default_factory=dict)
    _closed: threading.Event = field(default_factory=threading.Event)
    _deliver: Deliver | None = None

    def start(self, deliver: Deliver) -> None:
        """Start the workers."""
        self._deliver = deliver
        for slot in range(self.workers):
            threading.Thread(target=self._feed, args=(slot,), daemon=True).start()

    def submit(self, message: Message) -> None:
        """Queue a message."""
        self._inbox.put(message)

    def close(self) -> None:
        """Stop every worker now."""
        self._closed.set()
        for _ in range(self.workers):
            self._inbox.put(None)
        for process in list(self._processes.values()):
            process.terminate()
        for process in list(self._processes.values()):
            process.join(timeout=2.0)
            if process.is_alive():
                process.kill()

    def _spawn(self, slot: int) -> Channel:
        context = workshop()
        here, there = context.Pipe()
        channel = Channel(here)
        given = (there, channel.name, self.make_app)
        process = context.Process(target=_serve, args=given, daemon=True)
        process.start()
        there.close()
        self._processes[slot] = process
        return channel

    def _feed(self, slot: int) -> None:
        channel = self._spawn(slot)
        try:
            while (message := self._inbox.get()) is not None and not self._closed.is_set():
                if expired(message):
                    continue
                answer = self._ask(slot, channel, message)
                if answer is not None:
                    self._deliver(message, answer)  # type: ignore[misc]
                if answer is None or (answer.has_error() and answer.error.code == _DIED):
                    self._processes[slot].kill()
                    channel.close()
                    if self._closed.is_set():
                        return
                    channel = self._spawn(slot)
        finally:
            channel.close()

    def _ask(self, slot: int, channel: Channel, message: Message) -> Message | None:
        """Return the worker's answer, an error if it died, or None when it came too late."""
        try:
            channel.send(message)
            while not channel.poll(0.2):
                if expired(message) or self._closed.is_set():
                    return None
            return channel.receive()
        except (EOFError, OSError):
            # The pipe closes a moment before there is an exit code.
            self._processes[slot].join(timeout=1.0)
            code = self._processes[slot].exitcode
            reason = f"the worker process died (exit code {code})"
            return Message(Error(code=_DIED, reason=reason), reply_to=message)


def _serve(pipe: Connection, name: str, make_app: Callable[[], ClientApp]) -> None:
    """Run in a worker: answer messages until the pipe closes or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    app, channel = make_app(), Channel(pipe, name)
    contexts: dict[int, Context] = {}
    give_back = _freed_memory()
    with contextlib.suppress(EOFError, OSError):
        while True:
            message = channel.receive()
            node = message.metadata.dst_node_id
            context = contexts.setdefault(node, context_of(node))
            channel.send(answer_of(app, message, context))
            give_back()


def _freed_memory() -> Callable[[], object]:
    """Return what gives freed memory back to the system; glibc else keeps it for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return (lambda: trim(0)) if trim is not None else (lambda: None)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
