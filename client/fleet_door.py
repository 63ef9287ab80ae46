"""What a node needs to reach its server, and what it tells of the connection: values only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePrivateKey

from fedtune.errors import ExitCode, FedtuneError

__all__ = ["Door", "NodeEvent", "NodeKind", "host_and_port"]

_LEAST_HEARTBEAT, _MOST_HEARTBEAT = 10.0, 1800.0
_MOST_PORT = 65_535

NodeKind = Literal["connected", "lost", "refused", "asked", "answered", "late", "dropped"]


@dataclass(frozen=True)
class Door:
    """Where the server is, who may call itself that, and who we are.

    Attributes
    ----------
    address : str
        ``HOST:PORT``; an IPv6 address stands in brackets.
    root : bytes
        PEM of the federation's CA. No other authority is believed.
    login : EllipticCurvePrivateKey
        The node's P-384 key.
    heartbeat : float
        Seconds; the server counts a node as gone after two of them. Flower allows 10 to 1800.
    most_bytes : int
        Bytes of one message, in either direction.
    poll, most_poll : float
        Seconds between questions for work: right after some, and after a while without.
    most_wait : float
        Seconds between attempts while the server is away, at most.
    memo : Path or None
        A small file where the node keeps its place at this server, so that a killed
        process comes back at once, and says of the message it had at work that it is lost.

    Raises
    ------
    FedtuneError
        A value that cannot be used.
    """

    address: str
    root: bytes = field(repr=False)
    login: EllipticCurvePrivateKey = field(repr=False)
    heartbeat: float = _LEAST_HEARTBEAT
    most_bytes: int = 256 * 2**20
    poll: float = 0.05
    most_poll: float = 2.0
    most_wait: float = 10.0
    memo: Path | None = None

    def __post_init__(self) -> None:
        host_and_port(self.address)
        if not isinstance(self.login.curve, SECP384R1):
            raise FedtuneError(
                f"the node's key is on {self.login.curve.name}, not on secp384r1",
                hint="make one with: fedtune keys node NAME",
                code=ExitCode.SIGNATURE,
            )
        if not _LEAST_HEARTBEAT <= self.heartbeat <= _MOST_HEARTBEAT:
            raise FedtuneError(
                f"heartbeat={self.heartbeat} s", hint="10 to 1800", code=ExitCode.CONFIG
            )
        if self.most_bytes < 1 or not 0 < self.poll <= self.most_poll or self.most_wait <= 0:
            raise FedtuneError(
                f"most_bytes={self.most_bytes}, poll={self.poll}, most_poll={self.most_poll}, "
                f"most_wait={self.most_wait}",
                hint="all above 0, and poll <= most_poll",
                code=ExitCode.CONFIG,
            )


@dataclass(frozen=True)
class NodeEvent:
    """Something that happened between a node and its server.

    Attributes
    ----------
    kind : str
        ``connected``, ``lost`` (trying again), ``refused`` (for good), ``asked`` (a message
        is here), ``answered``, ``late`` (too late to send), ``dropped`` (not answered).
    words : str
        What happened, for people.
    bytes : int
        Of the message: received with ``asked``, sent with ``answered``.
    message, about, group : str
        The message's id, its type, and its group (the round).
    run : int
        Flower's id of the run.
    seconds : float
        How long it took.
    """

    kind: NodeKind
    words: str
    bytes: int = 0
    message: str = ""
    about: str = ""
    run: int = 0
    group: str = ""
    seconds: float = 0.0


def host_and_port(address: str) -> tuple[str, int]:
    """Split ``HOST:PORT``.

    Raises
    ------
    FedtuneError
        It is something else.

    Examples
    --------
    >>> host_and_port("[::1]:9092"), host_and_port("fed.example.org:9092")
    (('::1', 9092), ('fed.example.org', 9092))
    """
    host, _, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    wrong = not bare or (":" in bare and bare == host) or any(c in bare for c in "/@ []")
    if wrong or not port.isascii() or not port.isdigit() or not 0 < int(port) <= _MOST_PORT:
        raise FedtuneError(
            f"'{address}' is not a server's address",
            hint="HOST:PORT, for example fed.example.org:9092 or [::1]:9092",
            code=ExitCode.USAGE,
        )
    return bare, int(port)
