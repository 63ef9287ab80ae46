"""The client's link to the body: sends, waits, tries again, sends all where less was not enough."""

from __future__ import annotations

import logging
import random
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

import torch

from fedtune.client.body_wire import Due, LocalWire, RpcWire, Traffic, Wire
from fedtune.errors import ExitCode, FedtuneError
from fedtune.split import body_pb2 as pb
from fedtune.split.blocks import Cut
from fedtune.split.calls import Limits, Refused, Service, Status, checked, cut_to, plain
from fedtune.split.codec import Codec
from fedtune.split.frames import CODEC_NUMBERS, Received, Sealed, rows_to, seal, unseal
from fedtune.split.rows import Rows

__all__ = ["Caller", "Link", "LinkSettings", "open_link"]

T = TypeVar("T")
_log = logging.getLogger(__name__)
_FIRST_WAIT = 0.05
_LONGEST_WAIT = 5.0
_ODD_TRIES = 5
"""Tries at a call that fails in a way that waiting rarely mends."""
_LEAST_BYTES = 512
"""A body that takes smaller messages or tensors than this takes none."""
_ODD = (Status.DATA_LOSS, Status.INTERNAL, Status.UNKNOWN)


@dataclass(frozen=True)
class Caller:
    """Who calls.

    Attributes
    ----------
    run, client : str
        1 to 80 of ``A-Za-z0-9._-``.
    digest : str
        Of the base model; the body must have the same.
    cut : Cut
    key : Path or None
        Node key, for a body that asks for one.
    """

    run: str
    client: str
    digest: str
    cut: Cut
    key: Path | None = None


@dataclass(frozen=True)
class LinkSettings:
    """How a link calls.

    Attributes
    ----------
    codec, rank
        How hidden states and gradients are packed, both ways. Prefixes travel as they are.
    release : str
        ``once``: a row that has a name is sent once, then only its fresh positions.
    patience : float
        Seconds of trying again before a call is given up.
    deadline : float
        Seconds that one try may take; doubled after each that took longer.
    root : Path or None
        The certificate that signed the server's, PEM. None: no TLS.
    pair : (Path, Path) or None
        The client's own certificate and key, where the server asks for one.
    server : str
        The name of the server that calls are signed for.
    insecure : bool
        Allow another machine without TLS.
    secret : bytes
        32 bytes that released activations are held under; empty: drawn for this link.
    limits : Limits
        The client's own: a body's larger ``chunk_bytes`` and ``tensor_bytes`` become these.
    """

    codec: Codec = "none"
    rank: int = 8
    release: Literal["each", "once"] = "each"
    patience: float = 300.0
    deadline: float = 60.0
    root: Path | None = None
    pair: tuple[Path, Path] | None = None
    server: str = "body"
    insecure: bool = False
    secret: bytes = b""
    limits: Limits = field(default_factory=Limits)


def open_link(target: str | Service, who: Caller, settings: LinkSettings | None = None) -> Link:
    """Reach a body, compare versions, and return the link.

    Parameters
    ----------
    target : str or Service
        ``HOST:PORT``, or the service itself in this process: the same messages are made,
        packed and counted, and no socket is used.
    who : Caller
    settings : LinkSettings, optional

    Raises
    ------
    FedtuneError
        Nobody answers within the patience, or the body refuses this client.
    """
    settings = settings or LinkSettings()
    if not isinstance(target, str):
        return Link(LocalWire(target), who, settings)
    wire = RpcWire(
        target, root=settings.root, pair=settings.pair, key=who.key, server=settings.server,
        insecure=settings.insecure,
    )  # fmt: skip
    try:
        return Link(wire, who, settings)
    except FedtuneError:
        wire.close()
        raise


class Link:
    """Implements ``remote.BodyLink``. One thread at a time; many links may share a channel."""

    def __init__(self, wire: Wire, who: Caller, settings: LinkSettings) -> None:
        self._wire = wire
        self._who = who
        self._settings = settings
        self._secret = settings.secret or secrets.token_bytes(32)
        self._released: set[int] = set()
        request = pb.OpenRequest(
            run=_named("run", who.run), client=_named("client", who.client), model=who.digest,
            cut=cut_to(who.cut), codec=CODEC_NUMBERS[settings.codec],
            release=pb.ONCE if settings.release == "once" else pb.EACH,
        )  # fmt: skip
        try:
            reply = self._patiently(lambda seconds: wire.open(request, seconds))
        except Refused as error:
            raise self._told(error) from error
        self.limits = self._within(reply)

    @property
    def traffic(self) -> Traffic:
        """Return what was sent and came back since the last ``take``."""
        return self._wire.counter.now

    def take(self) -> Traffic:
        """Return what was sent and came back, and count from zero."""
        return self._wire.counter.take()

    def close(self) -> None:
        """Let go of the connection."""
        self._wire.close()

    def forward(
        self, hidden: torch.Tensor, rows: Rows, deep: torch.Tensor | None, step: str, *, grad: bool
    ) -> torch.Tensor:
        """Run the body; see ``BodyLink``."""
        header = self._header(pb.FORWARD, step, rows)
        header.keep = grad
        once = header.release == pb.ONCE
        due = [self._due(pb.OUTPUT, hidden)]
        known = once and self._released.issuperset(rows.examples or ())
        try:
            found = self._call(header, self._inputs(hidden, rows, deep, once, whole=not known), due)
        except LookupError:
            found = self._whole(header, self._inputs(hidden, rows, deep, once, whole=True), due)
        if once:
            self._released.update(rows.examples or ())
        return self._tensor(found, pb.OUTPUT, hidden)

    def backward(
        self, hidden: torch.Tensor, rows: Rows, deep: torch.Tensor | None, grad: torch.Tensor,
        step: str,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """Return the gradients at ``hidden`` and ``deep``; zeros at what is released once."""
        header = self._header(pb.BACKWARD, step, rows)
        once = header.release == pb.ONCE
        sent = [self._seal(pb.GRAD, grad)]
        due = [] if deep is None else [self._due(pb.DEEP, deep)]
        if not once:
            due.append(self._due(pb.HIDDEN, hidden))
        elif rows.fresh:
            due.append(self._due(pb.FRESH, hidden[:, : rows.fresh]))
        try:
            found = self._call(header, sent, due)
        except LookupError:
            sent += self._inputs(hidden, rows, deep, once, whole=True)
            found = self._whole(header, sent, due)
        if once:
            at_hidden = torch.zeros_like(hidden)
            if rows.fresh:
                fresh = at_hidden[:, : rows.fresh]
                fresh.copy_(self._tensor(found, pb.FRESH, fresh))
        else:
            at_hidden = self._tensor(found, pb.HIDDEN, hidden)
        return at_hidden, self._tensor(found, pb.DEEP, deep) if deep is not None else None

    def go_on(self, session: str, hidden: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Run the body on new positions of a session; see ``BodyLink``."""
        header = self._header(pb.GO_ON, session, rows)
        header.release = pb.EACH
        header.key = b""
        header.rows.CopyFrom(rows_to(_bare(rows)))
        due = [self._due(pb.OUTPUT, hidden)]
        found = self._call(header, [self._seal(pb.HIDDEN, hidden)], due)
        return self._tensor(found, pb.OUTPUT, hidden)

    # ------------------------------------------------------------ one call

    def _header(self, part: pb.Part, step: str, rows: Rows) -> pb.Header:
        once = self._settings.release == "once" and rows.examples is not None
        return pb.Header(
            run=self._who.run, client=self._who.client, step=step, part=part,
            model=self._who.digest, cut=cut_to(self._who.cut),
            rows=rows_to(rows if once else _bare(rows)),
            codec=CODEC_NUMBERS[self._settings.codec], rank=self._settings.rank,
            release=pb.ONCE if once else pb.EACH, key=self._secret if once else b"",
        )  # fmt: skip

    def _inputs(
        self, hidden: torch.Tensor, rows: Rows, deep: torch.Tensor | None, once: bool, *,
        whole: bool,
    ) -> list[Sealed]:  # fmt: skip
        sealed = [] if deep is None else [self._seal(pb.DEEP, deep)]
        if not once:
            return [*sealed, self._seal(pb.HIDDEN, hidden)]
        if rows.fresh:
            sealed.append(self._seal(pb.FRESH, hidden[:, : rows.fresh]))
        if whole and rows.fresh < rows.length:
            sealed.append(self._seal(pb.REST, hidden[:, rows.fresh :]))
        return sealed

    def _seal(self, name: pb.TensorName, tensor: torch.Tensor) -> Sealed:
        codec = "none" if name == pb.DEEP else self._settings.codec
        try:
            return seal(name, tensor, codec, self._settings.rank)
        except Refused as error:
            raise self._told(error) from error

    def _due(self, name: pb.TensorName, like: torch.Tensor) -> Due:
        codec = "none" if name == pb.DEEP else self._settings.codec
        return Due(name, codec, tuple(like.shape), self._settings.rank)

    def _within(self, reply: pb.OpenReply) -> pb.OpenReply:
        """Return a body's limits, no larger than the client's own; refuse what is none."""
        for name in ("chunk_bytes", "tensor_bytes"):
            if getattr(reply, name) < _LEAST_BYTES:
                raise FedtuneError(
                    f"the body at '{self._wire.target}' says {name}={getattr(reply, name)}",
                    hint=f"at least {_LEAST_BYTES}: is it a `fedtune body`?",
                    code=ExitCode.ENGINE,
                )
        own = self._settings.limits
        return pb.OpenReply(
            chunk_bytes=min(reply.chunk_bytes, own.chunk_bytes),
            tensor_bytes=min(reply.tensor_bytes, own.tensor_bytes),
            credits=reply.credits, keep_seconds=reply.keep_seconds,
        )  # fmt: skip

    def _whole(self, header: pb.Header, tensors: Sequence[Sealed], due: Sequence[Due]) -> Received:
        """Call with all that there is: a body that still misses something is broken."""
        try:
            return self._call(header, tensors, due)
        except LookupError as error:
            raise self._told(Refused(Status.NOT_FOUND, str(error))) from error

    def _call(self, header: pb.Header, tensors: Sequence[Sealed], due: Sequence[Due]) -> Received:
        try:
            return self._patiently(
                lambda seconds: self._wire.call(header, tensors, due, self.limits, seconds)
            )
        except Refused as error:
            if error.status == Status.NOT_FOUND:
                raise LookupError(str(error)) from error
            raise self._told(error) from error

    def _tensor(self, found: Received, name: pb.TensorName, like: torch.Tensor) -> torch.Tensor:
        try:
            if name not in found.data:
                raise Refused(Status.DATA_LOSS, f"{pb.TensorName.Name(name)} did not come back")
            tensor = unseal(*found.data[name])
            if tensor.shape != like.shape:
                raise Refused(
                    Status.DATA_LOSS, f"{tuple(tensor.shape)} came for {tuple(like.shape)}"
                )
        except Refused as error:
            raise self._told(error) from error
        except (RuntimeError, ValueError) as error:
            raise self._told(Refused(Status.DATA_LOSS, str(error))) from error
        return tensor.to(like.device, like.dtype)

    def _patiently(self, attempt: Callable[[float], T]) -> T:
        """Try until there is an answer or the patience ends; waits grow, with some chance."""
        end = time.monotonic() + self._settings.patience
        wait, deadline, odd = _FIRST_WAIT, self._settings.deadline, 0
        while True:
            try:
                return attempt(max(0.1, min(deadline, end - time.monotonic())))
            except Refused as error:
                odd += error.status in _ODD
                if not (error.status.again or (error.status in _ODD and odd < _ODD_TRIES)):
                    raise
                if error.status == Status.DEADLINE_EXCEEDED:
                    deadline *= 2
                if error.status == Status.UNAVAILABLE and wait == _FIRST_WAIT:
                    _log.warning(
                        "the body at %s does not answer (%s); trying for up to %g s",
                        self._wire.target, error, self._settings.patience,
                    )  # fmt: skip
                pause = max(error.wait, wait * random.uniform(0.5, 1.5))
                if time.monotonic() + pause > end:
                    raise FedtuneError(
                        f"the body at '{self._wire.target}' gave no answer in "
                        f"{self._settings.patience:g} s: {plain(str(error))}",
                        hint="is `fedtune body` running there, and can it be reached?",
                        code=ExitCode.ENGINE,
                    ) from error
                time.sleep(pause)
                wait = min(2 * wait, _LONGEST_WAIT)

    def _told(self, error: Refused) -> FedtuneError:
        return FedtuneError(
            f"the body at '{self._wire.target}' refused: {plain(str(error))} ({error.status})",
            hint=plain(error.hint),
            code=error.status.exit_code,
        )


def _bare(rows: Rows) -> Rows:
    return replace(rows, examples=None, fresh=0)


def _named(what: str, value: str) -> str:
    try:
        return checked(what, value)
    except Refused as error:
        raise FedtuneError(str(error), hint=error.hint, code=ExitCode.CONFIG) from error
