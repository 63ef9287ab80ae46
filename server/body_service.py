"""The body of a split model as a service: what a call may ask, and how it is answered.

Every answer follows from the call alone. What the service holds makes it faster, or
smaller, and may be lost at any time: NOT_FOUND then asks the client for all of it.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedtune.models import settings_of
from fedtune.server.body import Body
from fedtune.server.body_batch import Compute, Work
from fedtune.server.body_store import Held, Released, Seen, Session, Shelf, nbytes_of
from fedtune.split import body_pb2 as pb
from fedtune.split.blocks import blocks_of
from fedtune.split.calls import Limits, Name, Refused, Status, checked, cut_to
from fedtune.split.frames import (
    CODEC_NUMBERS,
    Received,
    frames,
    header_of,
    payload,
    rows_from,
    seal,
    size_of,
    unseal,
)
from fedtune.split.rows import Rows

__all__ = ["BodyService"]

_MAY: dict[int, frozenset[int]] = {
    pb.FORWARD: frozenset((pb.HIDDEN, pb.DEEP, pb.FRESH, pb.REST)),
    pb.BACKWARD: frozenset((pb.GRAD, pb.HIDDEN, pb.DEEP, pb.FRESH, pb.REST)),
    pb.GO_ON: frozenset((pb.HIDDEN,)),
}
_INPUTS = (pb.HIDDEN, pb.FRESH, pb.REST, pb.DEEP)
_CODECS = {number: name for name, number in CODEC_NUMBERS.items()}
_LONGEST = ("max_position_embeddings", "n_positions", "max_seq_len")
_TOLD_EACH, _TOLD_ALL, _TOLD_SECONDS = 16, 1 << 10, 3600.0
"""Runs that are told of in an hour: of one client, and of all; names cost a client nothing."""


@dataclass(frozen=True)
class _Graph:
    given: tuple[torch.Tensor, ...]
    out: torch.Tensor


class BodyService:
    """Answers the calls of many clients; see ``calls.Service``.

    Parameters
    ----------
    body : Body
        Its parameters are frozen here.
    digest : str
        Of the base model; a client with another one is refused.
    limits : Limits
    graphs : int
        Graphs held for backward calls, so that they need not be recomputed; the result
        is the same to the bit. 0: none.
    batch, workers : int
        See ``Compute``.
    met : callable, optional
        Told the run, the client and the codec, once for each, 16 an hour of one client.
    """

    def __init__(
        self, body: Body, digest: str, *, limits: Limits | None = None, graphs: int = 0,
        batch: int = 1, workers: int = 1, met: Callable[[str, str, str], Any] | None = None,
    ) -> None:  # fmt: skip
        self.body = body
        self.digest = digest
        self.limits = limits or Limits()
        self.positions = min([self.limits.positions, *_positions_of(body)])
        body.model.requires_grad_(False)
        sample = next(blocks_of(body.model).modules[body.cut.body[0]].parameters())
        self._device, self._dtype = sample.device, sample.dtype
        self._met = met
        self._known: Shelf[bool] = Shelf(1 << 12, 24 * 3600.0)
        self.compute = Compute(body, workers, batch)
        kept = self.limits.held_seconds
        self.inputs: Shelf[Held] = Shelf(self.limits.held_bytes, kept)
        self.graphs: Shelf[_Graph] = Shelf(graphs, kept)
        self.released = Released(self.limits.released_bytes, self.limits.keep_seconds)
        self.sessions: Shelf[Session] = Shelf(self.limits.session_bytes, kept)
        self.seen = Seen(kept)
        self._lock = threading.Lock()
        self._flying: dict[str, int] = {}
        self._bytes = 0
        self._told: list[tuple[float, str]] = []

    def open(self, request: pb.OpenRequest) -> pb.OpenReply:
        """Compare versions and return the limits."""
        self._same(request.run, request.client, request.model, request.cut)
        if request.codec not in _CODECS:
            raise Refused(Status.FAILED_PRECONDITION, f"codec {request.codec} is not known here")
        name = (request.run, request.client)
        if self._known.get(name) is None and self._met is not None and self._telling(name[1]):
            self._met(*name, _CODECS[request.codec])
        self._known.put(name, True, 1)
        limits = self.limits
        return pb.OpenReply(
            chunk_bytes=limits.chunk_bytes, tensor_bytes=limits.tensor_bytes,
            credits=limits.credits, keep_seconds=limits.keep_seconds,
        )  # fmt: skip

    def call(
        self, part: pb.Part, chunks: Iterable[pb.Chunk], seconds: float | None = None
    ) -> Iterator[pb.Chunk]:
        """Answer one call; after ``seconds`` nobody waits for it any more."""
        chunks = iter(chunks)
        first = header_of(chunks)
        header = first.header
        rows = self._accepted(part, header)
        coming = sum(size_of(info) for info in header.tensors)
        needed = rows.batch * rows.length * self.body.width * 4 + _attention(rows)
        with self._room(header.client, coming + needed):
            message = payload(first, chunks, self.limits.chunk_bytes)
            # What arrived goes as soon as it is a tensor of its own.
            del first
            if part == pb.FORWARD:
                found = self._forward(message, rows, seconds)
            elif part == pb.BACKWARD:
                found = self._backward(message, rows, seconds)
            else:
                found = self._go_on(message, rows, seconds)
            del message
            codec = _CODECS[header.codec]
            sealed = [
                seal(name, tensor, "none" if name == pb.DEEP else codec, header.rank or 8)
                for name, tensor in found
            ]
            answer = pb.Header(
                run=header.run, client=header.client, step=header.step, part=part,
                model=self.digest,
            )  # fmt: skip
            yield from frames(answer, sealed, self.limits.chunk_bytes)

    def sweep(self) -> None:
        """Drop what has been held for its time."""
        for shelf in (self.inputs, self.graphs, self.released.shelf, self.sessions, self._known):
            shelf.sweep()
        self.seen.sweep()

    def close(self) -> None:
        """Refuse calls from now on and end the threads."""
        self.compute.close()

    # ------------------------------------------------------------ the three calls

    def _forward(
        self, message: Received, rows: Rows, seconds: float | None
    ) -> list[tuple[pb.TensorName, torch.Tensor]]:
        header = message.header
        held = self._inputs(message, rows)
        if held is None:
            raise _gone(header)
        self.seen.check(_name(header, pb.FORWARD), _identity(message))
        place = (header.run, header.client, header.step)
        if header.keep:
            self.inputs.put(place, held, nbytes_of(held.hidden, held.deep))
        if header.keep and self.graphs.largest:
            graph: _Graph = self.compute.call(lambda: self._graph(held), seconds)
            self.graphs.put(place, graph, 1)
            out = graph.out.detach()
        else:
            out, _ = self.compute.run(Work(held.hidden, held.rows, held.deep), seconds)
        return [(pb.OUTPUT, out)]

    def _backward(
        self, message: Received, rows: Rows, seconds: float | None
    ) -> list[tuple[pb.TensorName, torch.Tensor]]:
        header = message.header
        place = (header.run, header.client, header.step)
        sent = any(name in message.data for name in _INPUTS)
        held = self._inputs(message, rows) if sent else self.inputs.get(place)
        if held is None or pb.GRAD not in message.data:
            raise _gone(header)
        if _plain(held.rows) != _plain(rows):
            raise Refused(Status.ABORTED, f"step '{header.step}' went forward with other lengths")
        if sent:
            self.seen.check(_name(header, pb.FORWARD), _identity(message))
        mark = hashlib.sha256(header.rows.SerializeToString(deterministic=True))
        mark.update(message.digest(pb.GRAD))
        grad = self._tensor(message, pb.GRAD)
        self.seen.check(_name(header, pb.BACKWARD), mark.digest())
        graph = self.graphs.pop(place)
        if graph is not None and not sent:
            at = self.compute.call(lambda: _back(graph, grad), seconds)
            at_hidden, at_deep = at[0], at[1] if len(at) > 1 else None
        else:
            work = Work(held.hidden, held.rows, held.deep, grad)
            at_hidden, at_deep = self.compute.run(work, seconds)
        self.inputs.pop(place)
        found = [(pb.HIDDEN, at_hidden)]
        if header.release == pb.ONCE:
            # What is released once is a constant: nobody asks for its gradient.
            found = [(pb.FRESH, at_hidden[:, : rows.fresh])] if rows.fresh else []
        return found + ([(pb.DEEP, at_deep)] if at_deep is not None else [])

    def _go_on(
        self, message: Received, rows: Rows, seconds: float | None
    ) -> list[tuple[pb.TensorName, torch.Tensor]]:
        header = message.header
        hidden = self._tensor(message, pb.HIDDEN)
        place = (header.run, header.client, header.step)
        mark = header.rows.SerializeToString(deterministic=True) + message.digest(pb.HIDDEN)

        def run() -> torch.Tensor:
            # One thread at a time takes a session; a copy of a call may be in another.
            session = self.sessions.pop(place)
            if session is not None and session.digest == mark:
                self.sessions.put(place, session, _cache_bytes(session.cache))
                return session.out
            if rows.past and (session is None or session.held != rows.past):
                if session is not None:
                    self.sessions.put(place, session, _cache_bytes(session.cache))
                raise _gone(header)
            cache = session.cache if session is not None and rows.past else None
            out: torch.Tensor
            out, cache = self.body.go_on(hidden, rows, cache)
            made = Session(cache, rows.past + rows.length, mark, out)
            self.sessions.put(place, made, _cache_bytes(cache) + nbytes_of(out))
            return out

        found: torch.Tensor = self.compute.call(run, seconds)
        return [(pb.OUTPUT, found)]

    def _graph(self, held: Held) -> _Graph:
        given = [held.hidden.detach().requires_grad_()]
        if held.deep is not None:
            given.append(held.deep.detach().requires_grad_())
        with torch.enable_grad():
            out = self.body.forward(given[0], held.rows, given[1] if len(given) > 1 else None)
        return _Graph(tuple(given), out)

    # ------------------------------------------------------------ what comes in

    def _inputs(self, message: Received, rows: Rows) -> Held | None:
        """Return a forward call's input; None if a part of it is held no longer."""
        header = message.header
        deep = self._tensor(message, pb.DEEP) if pb.DEEP in message.data else None
        plain = _plain(rows)
        if header.release != pb.ONCE:
            if pb.HIDDEN not in message.data:
                raise Refused(Status.INVALID_ARGUMENT, "a call without hidden states")
            return Held(self._tensor(message, pb.HIDDEN), plain, deep)
        if rows.examples is None or bool(rows.fresh) != (pb.FRESH in message.data):
            raise Refused(Status.INVALID_ARGUMENT, "a release without names, or without its part")
        hidden = torch.zeros(
            rows.batch, rows.length, self.body.width, dtype=self._dtype, device=self._device
        )
        if rows.fresh:
            hidden[:, : rows.fresh] = self._tensor(message, pb.FRESH)
        rest = self._tensor(message, pb.REST) if pb.REST in message.data else None
        for row, example in enumerate(rows.examples):
            start, end = _held_span(rows, row)
            name = (header.run, header.client, header.key, example)
            if rest is not None:
                values = rest[row, start - rows.fresh : end - rows.fresh]
                self.released.put(*name, values)
            else:
                found = self.released.get(*name)
                if found is None or tuple(found.shape) != (end - start, self.body.width):
                    return None
                values = found.to(self._device)
            hidden[row, start:end] = values
        return Held(hidden, plain, deep)

    def _tensor(self, message: Received, name: pb.TensorName) -> torch.Tensor:
        if name not in message.data:
            raise Refused(Status.INVALID_ARGUMENT, f"a call without {pb.TensorName.Name(name)}")
        tensor = unseal(*message.data[name])
        if message.data[name][0].codec != pb.NONE:
            tensor = tensor.to(self._dtype)
        return tensor.to(self._device)

    def _accepted(self, part: pb.Part, header: pb.Header) -> Rows:
        """Return the lengths of a call that may be read on; nothing large has come yet."""
        self._same(header.run, header.client, header.model, header.cut)
        checked("step", header.step)
        if header.part != part:
            raise Refused(Status.INVALID_ARGUMENT, "the header is another part's")
        if header.codec not in _CODECS or header.rank > 1 << 16:
            raise Refused(Status.FAILED_PRECONDITION, f"codec {header.codec} is not known here")
        rows = rows_from(header.rows, self.positions)
        if header.release != pb.ONCE and (rows.examples or rows.fresh or header.key):
            raise Refused(Status.INVALID_ARGUMENT, "rows with names, and no release")
        wanted = {
            pb.HIDDEN: (rows.batch, rows.length, self.body.width),
            pb.GRAD: (rows.batch, rows.length, self.body.width),
            pb.FRESH: (rows.batch, rows.fresh, self.body.width),
            pb.REST: (rows.batch, rows.length - rows.fresh, self.body.width),
        }
        if self._large(*wanted[pb.HIDDEN]) or any(
            size_of(info) > self.limits.tensor_bytes or self._large(*info.shape)
            for info in header.tensors
        ):
            raise Refused(
                Status.OUT_OF_RANGE, f"{rows.batch} rows of {rows.length} positions are too large",
                f"at most {self.limits.tensor_bytes} bytes a tensor: use smaller batches",
            )  # fmt: skip
        if _attention(rows) > self.limits.tensor_bytes:
            raise Refused(
                Status.OUT_OF_RANGE,
                f"{rows.batch} rows of {rows.length} positions after {rows.past}: the attention "
                f"between them takes {_attention(rows)} bytes",
                f"at most {self.limits.tensor_bytes}: use shorter rows, or fewer in a batch",
            )
        before = 0
        for info in header.tensors:
            if info.name not in _MAY[part]:
                raise Refused(Status.INVALID_ARGUMENT, f"tensor {info.name} in part {part}")
            shape = tuple(info.shape)
            if info.name == pb.DEEP:
                fits = len(shape) == 5 and shape[:2] == (2 * len(self.body.cut.body), rows.batch)
                before = shape[3] if fits else 0
            else:
                fits = shape == wanted[info.name]
            if not fits:
                called = pb.TensorName.Name(info.name)
                raise Refused(Status.INVALID_ARGUMENT, f"{called} of shape {shape} does not fit")
            self._typed(info)
        held = part == pb.BACKWARD and len(header.tensors) == 1
        if part != pb.GO_ON and not held and before != rows.past:
            raise Refused(
                Status.INVALID_ARGUMENT, f"past={rows.past} and {before} positions came before"
            )
        return rows

    def _typed(self, info: pb.Tensor) -> None:
        """Refuse numbers of another type than the body's."""
        wanted = {torch.float32: pb.FLOAT32, torch.bfloat16: pb.BFLOAT16}.get(
            self._dtype, pb.FLOAT16
        )
        if info.codec == pb.NONE and any(piece.dtype != wanted for piece in info.pieces):
            raise Refused(
                Status.INVALID_ARGUMENT, f"dtype {[piece.dtype for piece in info.pieces]}",
                f"this body computes in {str(self._dtype).removeprefix('torch.')}",
            )  # fmt: skip

    def _same(self, run: str, client: str, model: str, cut: pb.Cut) -> None:
        checked("run", run)
        checked("client", client)
        if cut != cut_to(self.body.cut):
            ours = self.body.cut
            raise Refused(
                Status.FAILED_PRECONDITION,
                f"client '{client}' cuts at head={cut.head}, tail={cut.tail} of {cut.count}, "
                f"this body at head={ours.head}, tail={ours.tail} of {ours.count}",
                "give both sides the same [tuning.split]",
            )
        if model != self.digest:
            raise Refused(
                Status.FAILED_PRECONDITION,
                f"client '{client}' holds another model than this body ({model[:8]}..., not "
                f"{self.digest[:8]}...)",
                "give both sides the same base model",
            )

    def _telling(self, client: str) -> bool:
        """Say whether one more run may be told of; more lines than that nobody reads."""
        now = time.monotonic()
        with self._lock:
            self._told = [one for one in self._told if one[0] > now - _TOLD_SECONDS]
            mine = sum(name == client for _, name in self._told)
            if mine >= _TOLD_EACH or len(self._told) >= _TOLD_ALL:
                return False
            self._told.append((now, client))
            return True

    def _large(self, *shape: int) -> bool:
        size = self._dtype.itemsize
        for length in shape:
            size *= length
        return size > self.limits.tensor_bytes

    @contextmanager
    def _room(self, client: str, size: int) -> Iterator[None]:
        """Hold a client's credit and the bytes of a call while it is answered."""
        with self._lock:
            flying = self._flying.get(client, 0)
            if flying >= self.limits.credits:
                raise Refused(
                    Status.RESOURCE_EXHAUSTED, f"client '{client}' has {flying} calls in flight",
                    wait=0.05,
                )  # fmt: skip
            if self._bytes and self._bytes + size > self.limits.flight_bytes:
                raise Refused(
                    Status.RESOURCE_EXHAUSTED, f"{self._bytes} bytes are in flight", wait=0.1
                )
            self._flying[client] = flying + 1
            self._bytes += size
        try:
            yield
        finally:
            with self._lock:
                self._bytes -= size
                self._flying[client] -= 1
                if not self._flying[client]:
                    del self._flying[client]


def _back(graph: _Graph, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    found = torch.autograd.grad(graph.out, graph.given, grad, allow_unused=True)
    return tuple(
        torch.zeros_like(given) if one is None else one
        for one, given in zip(found, graph.given, strict=True)
    )


def _attention(rows: Rows) -> int:
    """Return the bytes of one number for each pair of positions, float32."""
    return rows.batch * rows.length * (rows.past + rows.length) * 4


def _positions_of(body: Body) -> list[int]:
    """Return how long a model's own config lets a row be, where it says so."""
    settings = settings_of(body.model).get_text_config()
    found = [getattr(settings, name, None) for name in _LONGEST]
    return [value for value in found if isinstance(value, int) and value > 0]


def _identity(message: Received) -> bytes:
    """Return what must be the same when a step goes forward again."""
    header = message.header
    mark = hashlib.sha256(header.rows.SerializeToString(deterministic=True))
    for name in (pb.HIDDEN, pb.FRESH, pb.DEEP):
        mark.update(message.digest(name).ljust(32, b"\0"))
    mark.update(bytes([header.release]))
    return mark.digest()


def _held_span(rows: Rows, row: int) -> tuple[int, int]:
    """Return where the positions of a row lie that are released once."""
    start, end = rows.spans[row] if rows.spans is not None else (0, rows.past + rows.length)
    end = max(end - rows.past, rows.fresh)
    return min(max(start - rows.past, rows.fresh), end), end


def _plain(rows: Rows) -> Rows:
    return replace(rows, examples=None, fresh=0)


def _name(header: pb.Header, part: pb.Part) -> Name:
    return Name(header.run, header.client, header.step, part)


def _gone(header: pb.Header) -> Refused:
    return Refused(Status.NOT_FOUND, f"nothing is held for step '{header.step}'")


def _cache_bytes(cache: Any) -> int:
    return sum(
        nbytes_of(*(value for value in vars(layer).values() if isinstance(value, torch.Tensor)))
        for layer in cache.layers
    )
