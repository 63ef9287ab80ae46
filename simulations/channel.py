"""Flower messages between two processes of one machine.

What is small goes through a pipe in Flower's own encoding. Arrays, which are
large, are put into memory that both processes see, one copy on each side, or
follow through the pipe when they do not fit.
"""

from __future__ import annotations

import contextlib
import json
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage

__all__ = ["Channel"]

ROOM = 64 * 2**20
"""Bytes of shared memory of a channel; pages that nobody writes to cost nothing."""

_SAME, _SHARED, _PIPED = "same", "shared", "piped"


class Channel:
    """One end of a two-way channel; each end speaks in turn.

    Parameters
    ----------
    pipe : Connection
    name : str
        Of the shared memory, at the end that did not make it; empty makes it.
    """

    def __init__(self, pipe: Connection, name: str = "") -> None:
        self._pipe = pipe
        self._owner = not name
        self._memory = SharedMemory(name or None, create=self._owner, size=ROOM)
        self._room = memoryview(self._memory.buf or b"")
        self._sent: RecordDict | None = None
        self._received = RecordDict()

    @property
    def name(self) -> str:
        """Name of the shared memory, for the other end."""
        return self._memory.name

    def send(self, message: Message) -> None:
        """Send a message; a broadcast that was the last one sent is not sent again."""
        if self._owner and message.has_content() and message.content is self._sent:
            self._speak(_with_content(message, RecordDict()), _SAME, [])
            return
        content, blobs = _hollow(message.content) if message.has_content() else (None, [])
        head = message if content is None else _with_content(message, content)
        where = _SHARED if sum(map(len, blobs)) <= ROOM else _PIPED
        self._speak(head, where, blobs)
        self._sent = message.content if message.has_content() else None

    def receive(self) -> Message:
        """Wait for a message; ``EOFError`` when the other end is gone."""
        message = message_from_proto(ProtoMessage.FromString(self._pipe.recv_bytes()))
        where, lengths = json.loads(self._pipe.recv_bytes())
        if where == _SAME:
            message.content = self._received
        elif message.has_content():
            _fill(message.content, self._blobs(where, lengths))
            self._received = message.content
        return message

    def poll(self, seconds: float) -> bool:
        """Wait until there is something to receive."""
        return self._pipe.poll(seconds)

    def close(self) -> None:
        """Give the shared memory back."""
        self._pipe.close()
        self._room.release()
        self._memory.close()
        if self._owner:
            with contextlib.suppress(FileNotFoundError):
                self._memory.unlink()

    def _speak(self, head: Message, where: str, blobs: list[bytes]) -> None:
        start = 0
        for blob in blobs if where == _SHARED else []:
            self._room[start : start + len(blob)] = blob
            start += len(blob)
        self._pipe.send_bytes(message_to_proto(head).SerializeToString())
        self._pipe.send_bytes(json.dumps([where, [len(blob) for blob in blobs]]).encode())
        for blob in blobs if where == _PIPED else []:
            self._pipe.send_bytes(blob)

    def _blobs(self, where: str, lengths: list[int]) -> list[bytes]:
        if where == _PIPED:
            return [self._pipe.recv_bytes() for _ in lengths]
        found, start = [], 0
        for length in lengths:
            found.append(bytes(self._room[start : start + length]))
            start += length
        return found


def _hollow(content: RecordDict) -> tuple[RecordDict, list[bytes]]:
    """Return the records with empty arrays, and what was in these, in order."""
    hollow = RecordDict({**content.config_records, **content.metric_records})
    blobs = []
    for name, arrays in content.array_records.items():
        light = {key: Array(a.dtype, a.shape, a.stype, b"") for key, a in arrays.items()}
        hollow[name] = ArrayRecord(light)
        blobs += [array.data for array in arrays.values()]
    return hollow, blobs


def _fill(content: RecordDict, blobs: list[bytes]) -> None:
    arrays = [array for record in content.array_records.values() for array in record.values()]
    for array, blob in zip(arrays, blobs, strict=True):
        array.data = blob


def _with_content(message: Message, content: RecordDict) -> Message:
    return Message(content=content, metadata=message.metadata)  # type: ignore[call-overload, no-any-return]
