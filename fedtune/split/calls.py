"""One call to the body of a split model: its name, the words it can be refused with, the methods.

Client and server speak through ``Service``, by sockets or in one process.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from fedtune.errors import ExitCode
from fedtune.split import body_pb2 as pb
from fedtune.split.blocks import Cut

__all__ = [
    "CHUNK_BYTES",
    "OPEN",
    "PACKAGE",
    "PARTS",
    "Limits",
    "Name",
    "Refused",
    "Service",
    "Status",
    "checked",
    "cut_to",
    "loopback",
    "plain",
]

PACKAGE = "fedtune.body.v1.Body"
OPEN = "Open"
PARTS: dict[str, pb.Part] = {"Forward": pb.FORWARD, "Backward": pb.BACKWARD, "GoOn": pb.GO_ON}
"""The methods that carry tensors, by the part of a step that each is."""
CHUNK_BYTES = 1 << 20
"""Bytes of tensors in one message; gRPC takes messages up to 4 MiB."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,80}")
_MOST_CHARACTERS = 500


class Status(StrEnum):
    """Why a call was refused; the names are gRPC's."""

    NOT_FOUND = "NOT_FOUND"
    """What the call builds on is not held (any more): send all of it."""
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    """Too much at once: wait, then call again."""
    UNAVAILABLE = "UNAVAILABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    DATA_LOSS = "DATA_LOSS"
    """The bytes are not those that were sent."""
    INTERNAL = "INTERNAL"
    UNKNOWN = "UNKNOWN"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    """Another model, cut or codec."""
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    OUT_OF_RANGE = "OUT_OF_RANGE"
    """Larger than this server takes."""
    ABORTED = "ABORTED"
    """This step was called before with other numbers."""
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    UNIMPLEMENTED = "UNIMPLEMENTED"

    @property
    def again(self) -> bool:
        """Say whether the same call may succeed later."""
        return self in _AGAIN

    @property
    def exit_code(self) -> ExitCode:
        """Return the exit status of a command that meets it."""
        if self in (Status.UNAUTHENTICATED, Status.PERMISSION_DENIED):
            return ExitCode.SIGNATURE
        return ExitCode.ENGINE if self.again or self in _ODD else ExitCode.MODEL


_AGAIN = (
    Status.RESOURCE_EXHAUSTED, Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED, Status.CANCELLED,
)  # fmt: skip
_ODD = (Status.DATA_LOSS, Status.INTERNAL, Status.UNKNOWN, Status.ABORTED)


class Refused(Exception):  # noqa: N818 - a call that was refused
    """A call did not get its answer.

    Parameters
    ----------
    status : Status
    message : str
        What is wrong: the name and the value.
    hint : str
        What the client can do about it.
    wait : float
        Seconds after which to call again; 0: the caller decides.
    """

    def __init__(self, status: Status, message: str, hint: str = "", wait: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.hint = hint
        self.wait = wait


@dataclass(frozen=True)
class Name:
    """Which call this is; repeated, it gets the same answer."""

    run: str
    client: str
    step: str
    part: int


@dataclass(frozen=True)
class Limits:
    """What a server allows its clients; ``Open`` tells them the first four.

    Attributes
    ----------
    chunk_bytes, tensor_bytes : int
        Largest message and largest tensor.
    credits : int
        Calls of one client in flight.
    keep_seconds : int
        How long released activations are held.
    flight_bytes, held_bytes, released_bytes, session_bytes : int
        Of all clients: tensors being worked on; inputs held for a backward call;
        released activations; caches of texts that are being generated.
    held_seconds : float
        How long inputs and caches are held without a call.
    positions : int
        Longest row, with what is before it.
    """

    chunk_bytes: int = CHUNK_BYTES
    tensor_bytes: int = 256 << 20
    credits: int = 4
    keep_seconds: int = 24 * 3600
    flight_bytes: int = 1 << 30
    held_bytes: int = 1 << 30
    released_bytes: int = 4 << 30
    session_bytes: int = 1 << 30
    held_seconds: float = 600.0
    positions: int = 16384


class Service(Protocol):
    """The body, as client code may reach it. Every method may raise ``Refused``."""

    def open(self, request: pb.OpenRequest) -> pb.OpenReply:
        """Compare versions and return the limits."""
        ...

    def call(
        self, part: pb.Part, chunks: Iterable[pb.Chunk], seconds: float | None = None
    ) -> Iterator[pb.Chunk]:
        """Answer one call; after ``seconds`` nobody waits for it any more."""
        ...


def checked(what: str, value: str) -> str:
    """Return a name that may travel, 1 to 80 of ``A-Za-z0-9._-``, or refuse it.

    Examples
    --------
    >>> checked("client", "hospital-7")
    'hospital-7'
    """
    if not _NAME.fullmatch(value):
        raise Refused(
            Status.INVALID_ARGUMENT,
            f"{what}='{value[:80]}' is not a name",
            "use 1 to 80 letters, digits, points, hyphens and underscores",
        )
    return value


def plain(text: str) -> str:
    r"""Make a peer's words safe to show: printable, on one line, at most 500 characters.

    Examples
    --------
    >>> plain("no\x1b[2J such\nstep")
    'no?[2J such?step'
    """
    shown = text[:_MOST_CHARACTERS]
    return "".join(letter if letter.isprintable() else "?" for letter in shown)


def loopback(host: str) -> bool:
    """Say whether a host, without its port, is this machine whatever a name server says.

    Examples
    --------
    >>> [loopback(host) for host in ("localhost", "127.0.0.2", "[::1]", "127.evil.example")]
    [True, True, True, False]
    """
    bare = host.removeprefix("[").removesuffix("]")
    try:
        return bare == "localhost" or ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return False


def cut_to(cut: Cut) -> pb.Cut:
    """Return a cut as it travels."""
    return pb.Cut(head=cut.head, tail=cut.tail, count=cut.count)
