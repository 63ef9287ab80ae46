"""One attempt to reach the body: through sockets, or in the same process."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc

from fedtune.errors import ExitCode, FedtuneError
from fedtune.keys.node import read_key
from fedtune.split import body_pb2 as pb
from fedtune.split.calls import (
    OPEN,
    PACKAGE,
    PARTS,
    Refused,
    Service,
    Status,
    loopback,
    plain,
)
from fedtune.split.codec import Codec, bytes_of
from fedtune.split.frames import (
    CODEC_NUMBERS,
    Received,
    Sealed,
    frames,
    header_of,
    payload,
    size_of,
)
from fedtune.split.node_keys import Claim, metadata_of

__all__ = ["Counter", "Due", "LocalWire", "RpcWire", "Traffic", "Wire"]

_METHODS = {part: method for method, part in PARTS.items()}
_channels: dict[tuple[Any, ...], tuple[Any, int]] = {}
_lock = threading.Lock()
_FIRST_BYTES = 1 << 16
"""Of tensors in a first message: a server waits 5 s for it, however slow the line."""


@dataclass(frozen=True)
class Due:
    """A tensor that the body owes; nothing else is taken from it.

    Attributes
    ----------
    name : pb.TensorName
    codec : str
    shape : tuple of int
        (B, T, d), or any with the codec "none".
    rank : int
        Of the codec "lowrank".
    """

    name: pb.TensorName
    codec: Codec
    shape: tuple[int, ...]
    rank: int = 8

    @property
    def nbytes(self) -> int:
        """Return the most bytes that it can take.

        Examples
        --------
        >>> Due(pb.OUTPUT, "bf16", (2, 5, 32)).nbytes
        640
        """
        if self.codec == "none":
            return 4 * math.prod(self.shape)
        return bytes_of(self.codec, self.shape, rank=self.rank)


@dataclass(frozen=True)
class Traffic:
    """Bytes of the messages that went to the body and came back; repeated calls count again."""

    calls: int = 0
    bytes_up: int = 0
    bytes_down: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.calls + other.calls,
            self.bytes_up + other.bytes_up,
            self.bytes_down + other.bytes_down,
        )


class Counter:
    """Counts messages as they are serialised; any thread may."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now = Traffic()

    @property
    def now(self) -> Traffic:
        """Return what was counted since the last ``take``."""
        return self._now

    def add(self, *, calls: int = 0, up: int = 0, down: int = 0) -> None:
        """Count."""
        with self._lock:
            self._now += Traffic(calls, up, down)

    def take(self) -> Traffic:
        """Return what was counted, and begin again."""
        with self._lock:
            found, self._now = self._now, Traffic()
            return found


class Wire(Protocol):
    """One attempt at a call; what goes wrong is a ``Refused``."""

    target: str
    counter: Counter

    def open(self, request: pb.OpenRequest, seconds: float) -> pb.OpenReply:
        """Compare versions and learn the limits."""
        ...

    def call(
        self, header: pb.Header, tensors: Sequence[Sealed], due: Sequence[Due],
        reply: pb.OpenReply, seconds: float,
    ) -> Received:  # fmt: skip
        """Send tensors and return those that are due."""
        ...

    def close(self) -> None:
        """Let go of the connection."""
        ...


class LocalWire:
    """A body in the same process, through the very messages that would be sent."""

    def __init__(self, service: Service) -> None:
        self.target = "this process"
        self.counter = Counter()
        self._service = service

    def open(self, request: pb.OpenRequest, seconds: float) -> pb.OpenReply:
        """Compare versions and learn the limits."""
        reply = self._service.open(request)
        self.counter.add(calls=1, up=request.ByteSize(), down=reply.ByteSize())
        return reply

    def call(
        self, header: pb.Header, tensors: Sequence[Sealed], due: Sequence[Due],
        reply: pb.OpenReply, seconds: float,
    ) -> Received:  # fmt: skip
        """Send tensors and return those that are due."""
        self.counter.add(calls=1)
        up = _counted(_sent(header, tensors, reply), self.counter, up=True)
        down = self._service.call(header.part, up, seconds)
        return _answer(down, due, reply, self.counter)

    def close(self) -> None:
        """Nothing is open."""


class RpcWire:
    """A body at ``HOST:PORT``; wires of one process to one body share a channel.

    Parameters
    ----------
    target : str
    root : Path or None
        PEM of the certificate authority that signed the server's: TLS.
    pair : (Path, Path) or None
        The client's own TLS certificate and key.
    key : Path or None
        The node key that calls are signed with.
    server : str
        The server's name, which is signed too.
    insecure : bool
        Allow another machine without TLS.
    """

    def __init__(
        self, target: str, *, root: Path | None = None, pair: tuple[Path, Path] | None = None,
        key: Path | None = None, server: str = "body", insecure: bool = False,
    ) -> None:  # fmt: skip
        near = loopback(target.rpartition(":")[0])
        if root is None and not near and not insecure:
            raise FedtuneError(
                f"the body at '{target}' would be reached without TLS",
                hint="give the certificate that signed the server's",
                code=ExitCode.CONFIG,
            )
        self.target = target
        self.counter = Counter()
        self._key = read_key(key) if key is not None else None
        self._server = server
        self._place: tuple[Any, ...] = (os.getpid(), target, str(root), str(pair))
        channel = _shared(self._place, target, root, pair)
        self._open = channel.unary_unary(
            f"/{PACKAGE}/{OPEN}",
            request_serializer=pb.OpenRequest.SerializeToString,
            response_deserializer=pb.OpenReply.FromString,
        )
        self._calls = {
            part: channel.stream_stream(
                f"/{PACKAGE}/{method}",
                request_serializer=pb.Chunk.SerializeToString,
                response_deserializer=pb.Chunk.FromString,
            )
            for method, part in PARTS.items()
        }

    def open(self, request: pb.OpenRequest, seconds: float) -> pb.OpenReply:
        """Compare versions and learn the limits."""
        try:
            reply: pb.OpenReply = self._open(
                request, timeout=seconds, metadata=self._signed(OPEN, request)
            )
        except grpc.RpcError as error:
            raise _refused(error) from error
        self.counter.add(calls=1, up=request.ByteSize(), down=reply.ByteSize())
        return reply

    def call(
        self, header: pb.Header, tensors: Sequence[Sealed], due: Sequence[Due],
        reply: pb.OpenReply, seconds: float,
    ) -> Received:  # fmt: skip
        """Send tensors and return those that are due."""
        sent = _sent(header, tensors, reply)
        first = next(sent)
        metadata = self._signed(_METHODS[header.part], first.header)
        self.counter.add(calls=1)
        up = _counted(itertools.chain((first,), sent), self.counter, up=True)
        call = None
        try:
            call = self._calls[header.part](up, timeout=seconds, metadata=metadata)
            return _collected(call, due, reply, self.counter)
        except grpc.RpcError as error:
            raise _refused(error) from error
        finally:
            if call is not None:
                call.cancel()

    def close(self) -> None:
        """Let go of the channel; the last one closes it."""
        with _lock:
            channel, users = _channels.get(self._place, (None, 0))
            if channel is None:
                return
            if users > 1:
                _channels[self._place] = (channel, users - 1)
            else:
                del _channels[self._place]
                channel.close()
        self._place = ()

    def _signed(
        self, method: str, said: pb.Header | pb.OpenRequest
    ) -> tuple[tuple[str, str | bytes], ...] | None:
        if self._key is None:
            return None
        digest = hashlib.sha256(said.SerializeToString(deterministic=True)).digest()
        claim = Claim(method, said.run, said.client, self._server, said.model, digest)
        return metadata_of(self._key, claim)


def _sent(header: pb.Header, tensors: Sequence[Sealed], reply: pb.OpenReply) -> Iterator[pb.Chunk]:
    """Yield a message, with its header alone at first where it has many bytes."""
    for chunk in frames(header, tensors, reply.chunk_bytes):
        if chunk.HasField("header") and len(chunk.data) > _FIRST_BYTES:
            yield pb.Chunk(header=chunk.header)
            yield pb.Chunk(data=chunk.data)
        else:
            yield chunk


def _collected(
    chunks: Iterable[pb.Chunk], due: Sequence[Due], reply: pb.OpenReply, counter: Counter
) -> Received:
    try:
        return _answer(chunks, due, reply, counter)
    except (RuntimeError, ValueError) as error:
        raise Refused(
            Status.DATA_LOSS, f"the answer cannot be read: {plain(str(error))}"
        ) from error


def _answer(
    chunks: Iterable[pb.Chunk], due: Sequence[Due], reply: pb.OpenReply, counter: Counter
) -> Received:
    down = _counted(chunks, counter, up=False)
    first = header_of(down)
    _expected(first.header, due)
    found = payload(first, down, reply.chunk_bytes)
    # The call has ended well only when its stream has.
    for _ in down:
        raise Refused(Status.DATA_LOSS, "the body sent more than one message")
    return found


def _expected(header: pb.Header, due: Sequence[Due]) -> None:
    """Refuse an answer that is not the one that is due, before memory is taken for it."""
    wanted = {one.name: one for one in due}
    if len(header.tensors) != len(due) or {info.name for info in header.tensors} != set(wanted):
        names = ", ".join(pb.TensorName.Name(one.name) for one in due) or "nothing"
        raise Refused(Status.DATA_LOSS, f"the body owed {names} and sent other tensors")
    for info in header.tensors:
        one = wanted[info.name]
        name = pb.TensorName.Name(one.name)
        if len(info.shape) != len(one.shape) or tuple(info.shape) != one.shape:
            came = tuple(info.shape[:8])
            raise Refused(Status.DATA_LOSS, f"{name}: {came} came for {one.shape}")
        if info.codec != CODEC_NUMBERS[one.codec]:
            raise Refused(Status.DATA_LOSS, f"{name}: codec {info.codec} came for '{one.codec}'")
        if size_of(info) > one.nbytes:
            raise Refused(
                Status.OUT_OF_RANGE, f"{name} of {size_of(info)} bytes, at most {one.nbytes}"
            )


def _counted(chunks: Iterable[pb.Chunk], counter: Counter, *, up: bool) -> Iterator[pb.Chunk]:
    for chunk in chunks:
        size = chunk.ByteSize()
        counter.add(up=size if up else 0, down=0 if up else size)
        yield chunk


def _refused(error: grpc.RpcError) -> Refused:
    name = error.code().name
    status = Status(name) if name in Status.__members__ else Status.UNKNOWN
    said: dict[str, Any] = {one.key: one.value for one in error.trailing_metadata() or ()}
    hint = said.get("fedtune-hint-bin", b"")
    try:
        wait = float(said.get("fedtune-wait", 0.0))
    except ValueError:
        wait = 0.0
    return Refused(
        status, plain(error.details() or name), plain(hint.decode(errors="replace")),
        max(0.0, min(wait, 60.0)),
    )  # fmt: skip


def _shared(
    place: tuple[Any, ...], target: str, root: Path | None, pair: tuple[Path, Path] | None
) -> Any:
    options = (
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.keepalive_time_ms", 30_000),
    )
    with _lock:
        if place in _channels:
            channel, users = _channels[place]
        else:
            users = 0
            if root is None:
                channel = grpc.insecure_channel(target, options)
            else:
                channel = grpc.secure_channel(target, _credentials(root, pair), options)
        _channels[place] = (channel, users + 1)
        return channel


def _credentials(root: Path, pair: tuple[Path, Path] | None) -> grpc.ChannelCredentials:
    try:
        chain, key = (None, None) if pair is None else (pair[0].read_bytes(), pair[1].read_bytes())
        return grpc.ssl_channel_credentials(root.read_bytes(), key, chain)
    except OSError as error:
        raise FedtuneError(
            f"TLS: {error}", hint="give readable PEM files", code=ExitCode.SIGNATURE
        ) from error
