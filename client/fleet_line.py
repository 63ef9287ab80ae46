"""One line to the server: Flower's gRPC fleet protocol, each call signed and with a deadline.

Flower's own connection (``grpc_request_response``) ends the process when it is refused;
here a refusal is a ``grpc.RpcError`` for the caller to judge. ``GetFab`` and ``GetRun``
are not spoken at all: no code is ever asked for.
"""

from __future__ import annotations

import datetime as dt
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.common.constant import PUBLIC_KEY_HEADER, SIGNATURE_HEADER, TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata

from fedtune.client.fleet_door import Door

__all__ = ["MOST_OBJECT", "Line", "Signer", "open_line"]

MOST_OBJECT = 6 * 2**20
"""Bytes of one object on the wire: Flower cuts arrays into chunks of 5 MiB."""

SHORT, HELD, LONG = 15.0, 30.0, 180.0
"""Seconds for a call that carries little, one that the server may hold, one with an object."""

_SIGNED_SECONDS = 20.0


class Signer:
    """Signs calls as Flower's servers ask: a time stamp under the node's key.

    Flower's signature covers the time alone and holds for 300 s, so one is used for
    20 s: a P-384 signature costs more than the rest of a poll.

    Parameters
    ----------
    login : EllipticCurvePrivateKey
    ahead : float
        Seconds added to this machine's clock: ``diagnose`` measures the server's with it.
    """

    def __init__(self, login: EllipticCurvePrivateKey, ahead: float = 0.0) -> None:
        self._login = login
        self.public = public_key_to_bytes(login.public_key())
        self._ahead = ahead
        self._version = RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata()
        self._made: tuple[float, float, tuple[tuple[str, str | bytes], ...]] | None = None
        self._lock = threading.Lock()

    def metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """Return the headers of a call."""
        with self._lock:
            passed, wall = time.monotonic(), time.time()
            if self._made is not None:
                then, stamp, made = self._made
                # A clock that was set, or a machine that slept, needs a new one too.
                if passed - then < _SIGNED_SECONDS and abs(wall - stamp) < _SIGNED_SECONDS:
                    return made
            made = self._sign()
            self._made = (passed, wall, made)
            return made

    def _sign(self) -> tuple[tuple[str, str | bytes], ...]:
        when = (now() + dt.timedelta(seconds=self._ahead)).isoformat()
        return (
            *self._version,
            (PUBLIC_KEY_HEADER, self.public),
            (TIMESTAMP_HEADER, when),
            (SIGNATURE_HEADER, sign_message(self._login, when.encode("ascii"))),
        )


@dataclass
class Line:
    """One channel to the server. ``node`` is our id there once ``activate`` has run."""

    channel: grpc.Channel
    signer: Signer
    heartbeat: float
    node: int = 0
    calls: Any = field(init=False)

    def __post_init__(self) -> None:
        self.calls = FleetStub(self.channel)

    def _call(self, method: Any, request: Any, seconds: float) -> Any:
        return method(request, timeout=seconds, metadata=self.signer.metadata())

    def activate(self, interval: float | None = None) -> int:
        """Say that we are here; return our id. ``interval`` other than ours asks in vain."""
        request = ActivateNodeRequest(
            public_key=self.signer.public,
            heartbeat_interval=self.heartbeat if interval is None else interval,
        )
        self.node = int(self._call(self.calls.ActivateNode, request, SHORT).node_id)
        return self.node

    def deactivate(self) -> None:
        """Say that we leave."""
        request = DeactivateNodeRequest(node_id=self.node)
        self._call(self.calls.DeactivateNode, request, 5.0)

    def beat(self, node: int | None = None) -> bool:
        """Send one heartbeat; return whether the server knows us."""
        request = SendNodeHeartbeatRequest(
            node=Node(node_id=self.node if node is None else node),
            heartbeat_interval=self.heartbeat,
        )
        return bool(self._call(self.calls.SendNodeHeartbeat, request, 5.0).success)

    def pull(self, stop: threading.Event) -> PullMessagesResponse | None:
        """Ask for one message; there may be none. The server may take its time to answer.

        Returns
        -------
        PullMessagesResponse or None
            None when ``stop`` was set meanwhile.
        """
        request = PullMessagesRequest(node=Node(node_id=self.node))
        waiting = self.calls.PullMessages.future(
            request, timeout=HELD, metadata=self.signer.metadata()
        )
        done = threading.Event()
        waiting.add_done_callback(lambda _: done.set())
        while not done.wait(0.25):
            if stop.is_set() and not done.is_set():
                waiting.cancel()
                return None
        response: PullMessagesResponse = waiting.result()
        return response

    def confirm(self, run: int, message: str) -> None:
        """Say that the message is here in full: the server forgets its objects."""
        request = ConfirmMessageReceivedRequest(
            node=Node(node_id=self.node), run_id=run, message_object_id=message
        )
        self._call(self.calls.ConfirmMessageReceived, request, SHORT)

    def push(self, request: PushMessagesRequest) -> PushMessagesResponse:
        """Announce an answer; its objects follow."""
        response: PushMessagesResponse = self._call(self.calls.PushMessages, request, SHORT)
        return response

    def object_soon(self, run: int, name: str) -> Callable[[], Any]:
        """Ask for one object; the function that comes back waits for it."""
        request = PullObjectRequest(node=Node(node_id=self.node), run_id=run, object_id=name)
        return self._soon(self.calls.PullObject, request)

    def push_object_soon(
        self, run: int, session: str, name: str, content: bytes
    ) -> Callable[[], Any]:
        """Send one object; the function that comes back waits for the receipt."""
        request = PushObjectRequest(
            node=Node(node_id=self.node),
            run_id=run,
            object_id=name,
            object_content=content,
            session_id=session,
        )
        return self._soon(self.calls.PushObject, request)

    def _soon(self, method: Any, request: Any) -> Callable[[], Any]:
        waiting = method.future(request, timeout=LONG, metadata=self.signer.metadata())
        result: Callable[[], Any] = waiting.result
        return result

    def close(self) -> None:
        """Close the channel: calls that wait end with an error."""
        self.channel.close()


def open_line(door: Door, signer: Signer) -> Line:
    """Return a line; nothing is called yet, and no name looked up."""
    options = [
        ("grpc.max_receive_message_length", MOST_OBJECT),
        ("grpc.max_send_message_length", MOST_OBJECT),
        # A cut network is noticed by a ping while a call waits, and by TCP's own clock.
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 0),
        # Whoever lost the line opens a new one: how long to wait is decided in one place.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 5_000),
        ("grpc.max_reconnect_backoff_ms", 5_000),
        ("grpc.enable_http_proxy", 0),
        ("grpc.enable_retries", 0),
    ]
    credentials = grpc.ssl_channel_credentials(root_certificates=door.root)
    return Line(grpc.secure_channel(door.address, credentials, options), signer, door.heartbeat)
