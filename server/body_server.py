"""The body's service on a port: gRPC, TLS, and who may call."""

from __future__ import annotations

import hashlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import grpc

from fedtune.errors import ExitCode, FedtuneError
from fedtune.split import body_pb2 as pb
from fedtune.split.calls import OPEN, PACKAGE, PARTS, Limits, Refused, Service, Status, loopback
from fedtune.split.node_keys import Claim, Gate, admit, knock

__all__ = ["Door", "Running", "start"]

M = TypeVar("M", pb.Chunk, pb.OpenRequest)
_log = logging.getLogger(__name__)
_LONGEST = 3600.0
_FIRST_SECONDS = 5.0
"""A call whose first message has not come by then is cancelled: silence would hold a thread."""
_THREADS = 64


@dataclass(frozen=True)
class Door:
    """How a server is reached.

    Attributes
    ----------
    listen : str
        ``HOST:PORT``; port 0 is any free one.
    cert, key : Path or None
        The server's certificate chain and private key, PEM: TLS.
    client_root : Path or None
        Clients must show a TLS certificate signed by it.
    enrolled : Path or None
        Who may call (see ``node_keys``). None: anybody who can reach it.
    insecure : bool
        Allow others than this machine without TLS or without enrolment.
    name : str
        What clients must have signed their calls for.
    """

    listen: str = "127.0.0.1:0"
    cert: Path | None = None
    key: Path | None = None
    client_root: Path | None = None
    enrolled: Path | None = None
    insecure: bool = False
    name: str = "body"


@dataclass(frozen=True)
class Running:
    """A server that listens at ``address``."""

    address: str
    _server: Any
    _ended: threading.Event

    def stop(self, grace: float = 2.0) -> None:
        """Take no more calls, let those in flight end for ``grace`` seconds."""
        self._ended.set()
        self._server.stop(grace).wait()

    def wait(self) -> None:
        """Return when the server has stopped."""
        self._server.wait_for_termination()


def start(
    service: Service, door: Door, limits: Limits, *, sweep: Callable[[], None] | None = None,
    interceptors: Sequence[Any] = (),
) -> Running:  # fmt: skip
    """Listen.

    Parameters
    ----------
    service : Service
        Is not closed when the server stops.
    door : Door
    limits : Limits
        Those of the service.
    sweep : callable, optional
        Called every second.
    interceptors : sequence of grpc.ServerInterceptor
        For tests.

    Raises
    ------
    FedtuneError
        An open door that was not asked for, unreadable files, a port that is taken.
    """
    _closed_enough(door)
    gate = Gate.at(door.enrolled, door.name) if door.enrolled is not None else None
    server = grpc.server(
        ThreadPoolExecutor(_THREADS, thread_name_prefix="body-call"),
        interceptors=list(interceptors),
        maximum_concurrent_rpcs=_THREADS,
        options=(
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", limits.chunk_bytes + (1 << 20)),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ),
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(PACKAGE, _handlers(service, gate)),)
    )
    try:
        if door.cert is not None and door.key is not None:
            port = server.add_secure_port(door.listen, _credentials(door, door.cert, door.key))
        else:
            port = server.add_insecure_port(door.listen)
    except RuntimeError as error:
        raise FedtuneError(
            f"--listen '{door.listen}' cannot be listened at: {error}",
            hint="is the port taken, or the address another machine's?",
            code=ExitCode.ENGINE,
        ) from error
    server.start()
    ended = threading.Event()
    if sweep is not None:
        threading.Thread(target=_sweeping, args=(ended, sweep), daemon=True).start()
    return Running(f"{door.listen.rpartition(':')[0]}:{port}", server, ended)


def _handlers(service: Service, gate: Gate | None) -> dict[str, Any]:
    handlers: dict[str, Any] = {
        method: grpc.stream_stream_rpc_method_handler(
            _stream(service, gate, method, part),
            request_deserializer=pb.Chunk.FromString,
            response_serializer=pb.Chunk.SerializeToString,
        )
        for method, part in PARTS.items()
    }

    def opened(requests: Iterator[pb.OpenRequest], context: grpc.ServicerContext) -> pb.OpenReply:
        try:
            return service.open(_first(gate, OPEN, requests, context))
        except Refused as error:
            _abort(context, error)
        except grpc.RpcError:
            _abort(context, Refused(Status.CANCELLED, "the client is gone"))

    # One message each way, as the client's unary call sends it; but a unary handler would
    # wait for a silent client before any of this is asked.
    handlers[OPEN] = grpc.stream_unary_rpc_method_handler(
        opened,
        request_deserializer=pb.OpenRequest.FromString,
        response_serializer=pb.OpenReply.SerializeToString,
    )
    return handlers


def _stream(
    service: Service, gate: Gate | None, method: str, part: pb.Part
) -> Callable[[Iterator[pb.Chunk], grpc.ServicerContext], Iterator[pb.Chunk]]:
    def answer(chunks: Iterator[pb.Chunk], context: grpc.ServicerContext) -> Iterator[pb.Chunk]:
        try:
            seconds = context.time_remaining()
            if seconds is None or seconds > _LONGEST:
                raise Refused(
                    Status.INVALID_ARGUMENT, "a call without a deadline",
                    f"give it one of at most {_LONGEST:.0f} s",
                )  # fmt: skip
            whole = itertools.chain((_first(gate, method, chunks, context),), chunks)
            yield from service.call(part, whole, seconds)
        except Refused as error:
            _abort(context, error)
        except grpc.RpcError:
            # The client is gone, in the middle of its message.
            return
        except Exception as error:  # noqa: BLE001 - the client gets a status, the log the rest
            if not context.is_active():
                return
            _log.exception("a call of %s failed", method)
            _abort(context, Refused(Status.INTERNAL, f"the body failed: {type(error).__name__}"))

    return answer


def _first(
    gate: Gate | None, method: str, messages: Iterator[M], context: grpc.ServicerContext
) -> M:
    """Return the first message of one who may call; nothing is read of others."""
    given = [(key, value) for key, value in context.invocation_metadata()]
    if gate is not None:
        with _enrolment():
            knock(gate, given)
    timer = threading.Timer(_FIRST_SECONDS, context.cancel)
    timer.daemon = True
    timer.start()
    try:
        first = next(messages, None)
    finally:
        timer.cancel()
    if first is None:
        raise Refused(Status.INVALID_ARGUMENT, "a call without a message")
    if gate is not None:
        said = first.header if isinstance(first, pb.Chunk) else first
        digest = hashlib.sha256(said.SerializeToString(deterministic=True)).digest()
        claim = Claim(method, said.run, said.client, gate.server, said.model, digest)
        with _enrolment():
            admit(gate, given, claim)
    return first


@contextmanager
def _enrolment() -> Iterator[None]:
    try:
        yield
    except FedtuneError as error:
        _log.error("%s (%s)", error, error.hint)
        raise Refused(Status.UNAVAILABLE, "the enrolment file cannot be read now") from error


def _abort(context: grpc.ServicerContext, error: Refused) -> NoReturn:
    context.set_trailing_metadata(
        (("fedtune-hint-bin", error.hint.encode()), ("fedtune-wait", f"{error.wait:g}"))
    )
    context.abort(grpc.StatusCode[error.status.name], str(error))
    raise error


def _closed_enough(door: Door) -> None:
    if (door.cert is None) != (door.key is None):
        raise FedtuneError(
            "--cert and --key belong together", hint="give both, or none", code=ExitCode.USAGE
        )
    if loopback(door.listen.rpartition(":")[0]) or door.insecure:
        return
    missing = [
        name for name, value in (("--enrolled", door.enrolled), ("--cert", door.cert))
        if value is None
    ]  # fmt: skip
    if missing:
        raise FedtuneError(
            f"--listen '{door.listen}' is open to other machines without {' and '.join(missing)}",
            hint="give them, listen at 127.0.0.1, or say --insecure in a network that you trust",
            code=ExitCode.USAGE,
        )


def _credentials(door: Door, cert: Path, key: Path) -> grpc.ServerCredentials:
    root = door.client_root
    try:
        return grpc.ssl_server_credentials(
            [(key.read_bytes(), cert.read_bytes())],
            root_certificates=root.read_bytes() if root is not None else None,
            require_client_auth=root is not None,
        )
    except OSError as error:
        raise FedtuneError(
            f"TLS: {error}", hint="give readable PEM files", code=ExitCode.SIGNATURE
        ) from error


def _sweeping(ended: threading.Event, sweep: Callable[[], None]) -> None:
    while not ended.wait(1.0):
        sweep()
