"""A bad network in between: a TCP proxy that delays, stalls, cuts, and falls silent.

The kernel's own (``tc netem`` between network namespaces) is not there in every sandbox.
What a lost packet does to TCP is a stall until it is sent again: so that is what happens here.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

_BYTES = 1 << 16
_STALL = (0.2, 1.0)
_Way = asyncio.Queue[tuple[float, bytes]]


@dataclass
class Proxy:
    """Forwards one port to another.

    Parameters
    ----------
    target : int
        Port on 127.0.0.1.
    delay : float
        Seconds each way.
    loss : float
        Share of chunks that are late by a retransmission's time.
    broken : float
        Share of chunks at which the connection is cut instead.
    """

    target: int
    delay: float = 0.0
    loss: float = 0.0
    broken: float = 0.0
    seed: int = 0
    port: int = 0
    stalled: int = 0
    cuts: int = 0
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _open: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(10)

    def silence(self) -> None:
        """Cut the network: nothing passes, and nobody is told."""
        self._loop.call_soon_threadsafe(self._open.clear)

    def mend(self) -> None:
        """Let everything pass again, what waited first."""
        self._loop.call_soon_threadsafe(self._open.set)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._open.set()

        async def begin() -> None:
            server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            ready.set()

        self._loop.run_until_complete(begin())
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        tasks: list[asyncio.Task[None]] = []
        try:
            await self._open.wait()
            back, forth = await asyncio.open_connection("127.0.0.1", self.target)
            ends.append(forth)
            for source, sink in ((reader, forth), (back, writer)):
                way: _Way = asyncio.Queue()
                tasks += [
                    asyncio.create_task(self._take(source, way)),
                    asyncio.create_task(self._give(sink, way)),
                ]
            await asyncio.gather(*tasks)
        except OSError:
            pass
        finally:
            for task in tasks:
                task.cancel()
            for end in ends:
                end.transport.abort()

    async def _take(self, source: asyncio.StreamReader, way: _Way) -> None:
        due, chunk = 0.0, b"."
        while chunk:
            chunk = await source.read(_BYTES)
            due = max(due, self._loop.time() + self.delay)
            if self._random.random() < self.loss:
                self.stalled += 1
                due += self._random.uniform(*_STALL)
            if self._random.random() < self.broken:
                self.cuts += 1
                raise ConnectionResetError
            way.put_nowait((due, chunk))

    async def _give(self, sink: asyncio.StreamWriter, way: _Way) -> None:
        chunk = b"."
        while chunk:
            due, chunk = await way.get()
            await asyncio.sleep(due - self._loop.time())
            await self._open.wait()
            sink.write(chunk)
            await sink.drain()
        sink.write_eof()


@contextlib.contextmanager
def proxy(target: int, **settings: float) -> Iterator[Proxy]:
    """Put a proxy before a port while the block runs."""
    made = Proxy(target, **settings)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.close()
