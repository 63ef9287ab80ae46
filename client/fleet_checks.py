"""Why a server cannot be reached: one thing after the other, until the first that is wrong."""

from __future__ import annotations

import json
import socket
import ssl
from dataclasses import dataclass
from typing import Any

import grpc
from flwr.supercore.version import package_version

from fedtune.client.fleet_door import Door, host_and_port
from fedtune.client.fleet_line import Line, Signer, open_line
from fedtune.errors import ExitCode, FedtuneError

__all__ = ["Check", "Verdict", "diagnose", "judge", "probe", "to_error"]

_SECONDS = 5.0
_KEYS = frozenset({"TLS", "clock", "key"})
_INTERVAL_REFUSED, _ACTIVATION_REFUSED, _VERSION_REFUSED, _RUN_OVER = 2003, 2004, 1001, 2007
_STEP = 240.0
"""Seconds between two guesses of the server's clock: Flower takes stamps 5 s ahead to 305 s old."""
_FURTHEST = 86_400.0


@dataclass(frozen=True)
class Check:
    """One thing that must be right: whether it is, in words, and what to do if not.

    ``passing``: it may be over by itself, as when a gateway is there and its server is not.
    """

    name: str
    ok: bool
    words: str
    fix: str = ""
    passing: bool = False


@dataclass(frozen=True)
class Verdict:
    """What a failed call means.

    ``kind`` is ``away`` (try again), ``stranger`` (the server does not know this key),
    ``taken`` (activation refused: it does not know the key, or counts it as connected),
    ``known``, ``moved`` (it knows another id for us, or none), ``clock``, ``ended`` (the
    run is over), ``large`` (more than we receive), ``other`` (no Flower server of ours).
    """

    kind: str
    words: str


def judge(error: grpc.RpcError) -> Verdict:
    """Say what the server's refusal means; anything about the network is ``away``."""
    call: Any = error  # what grpc raises is a call too, which its types cannot say
    code = call.code() if hasattr(call, "code") else grpc.StatusCode.UNKNOWN
    details = str((call.details() if hasattr(call, "details") else "") or "")
    number, public = _flower_error(details)
    if number == _ACTIVATION_REFUSED:
        return Verdict("taken", "the server counts a node with this key as connected already")
    if number == _INTERVAL_REFUSED:
        return Verdict("known", "the server knows this key")
    if number == _RUN_OVER:
        return Verdict("ended", "the run is over")
    if number == _VERSION_REFUSED:
        return Verdict("other", f"the server refuses Flower {package_version}: {public}")
    if code is grpc.StatusCode.UNAUTHENTICATED:
        if "timestamp" in details:
            return Verdict("clock", "the clocks of this machine and the server differ")
        if "node ID" in details:
            return Verdict("moved", "the server has another number for this key, or none")
        return Verdict("stranger", f"the server refused this key: {_short(details)}")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        return Verdict("large", "an object is larger than is received")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return Verdict("other", "it answers, but not as a Flower server of gRPC nodes")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Verdict("away", "the server does not answer in time")
    name = code.name.lower() if code is not None else "unknown"
    return Verdict("away", f"the server cannot be reached ({name}: {_short(details)})")


def probe(line: Line) -> Verdict:
    """Ask the server whether it knows us, without becoming its node.

    Activation with an impossible heartbeat is refused either way: a key that is known
    for its heartbeat, one that is not for the key.
    """
    try:
        line.activate(interval=0.0)
    except grpc.RpcError as error:
        verdict = judge(error)
        if verdict.kind == "taken":
            return Verdict("stranger", "the server does not know this key, or it was revoked")
        return verdict
    return Verdict("known", "the server knows this key")


def diagnose(door: Door) -> list[Check]:
    """Check name, port, TLS, protocol, clock and key, in this order, up to the first failure.

    Nothing of the owner's is sent, and the node is not counted as connected.
    """
    host, port = host_and_port(door.address)
    checks = [_name(host, port)]
    if checks[-1].ok:
        checks.append(_port(host, port))
    if checks[-1].ok:
        checks.append(_tls(door, host, port))
    if not checks[-1].ok:
        return checks
    line = open_line(door, Signer(door.login))
    try:
        return checks + _protocol(door, line)
    finally:
        line.close()


def _protocol(door: Door, line: Line) -> list[Check]:
    verdict = probe(line)
    if verdict.kind in {"away", "other"}:
        fix = (
            "look at the server's log; is a proxy or a firewall between?"
            if verdict.kind == "away"
            else "is it fedtune's port, and the same release of fedtune on both sides?"
        )
        return [Check("version", False, verdict.words, fix)]
    version = Check("version", True, f"speaks the protocol of Flower {package_version}")
    if verdict.kind == "clock":
        return [version, _clock(door, line)]
    clock = Check("clock", True, "less than five minutes from the server's")
    if verdict.kind == "known":
        return [version, clock, Check("key", True, "enrolled at the server")]
    fix = "give NAME.pub to whoever runs the server: fedtune keys enrol NAME.pub"
    return [version, clock, Check("key", False, verdict.words, fix)]


def to_error(checks: list[Check], address: str) -> FedtuneError:
    """Return the error that says what is wrong; all checks passed means a passing trouble."""
    for check in checks:
        if not check.ok:
            code = ExitCode.SIGNATURE if check.name in _KEYS else ExitCode.ENGINE
            return FedtuneError(
                f"server {address}: {check.name}: {check.words}", hint=check.fix, code=code
            )
    return FedtuneError(
        f"server {address}: the connection broke", hint="try again", code=ExitCode.ENGINE
    )


def _name(host: str, port: int) -> Check:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return Check(
            "name", False, f"'{host}' is not known here ({error.strerror or error})",
            "check the spelling, and this machine's DNS",
        )  # fmt: skip
    return Check("name", True, f"'{host}' is {found[0][4][0]}")


def _port(host: str, port: int) -> Check:
    try:
        socket.create_connection((host, port), timeout=_SECONDS).close()
    except ConnectionRefusedError:
        return Check(
            "port", False, f"nobody listens on port {port} of '{host}'",
            "is the server running, and is this its port?",
        )  # fmt: skip
    except OSError as error:
        why = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        return Check(
            "port", False, f"port {port} of '{host}' cannot be reached ({why})",
            "is a firewall between, or this machine off the network?",
        )  # fmt: skip
    return Check("port", True, f"{port} is open")


def _tls(door: Door, host: str, port: int) -> Check:
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=door.root.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        return Check(
            "TLS", False, f"the CA's certificate cannot be read ({error})",
            "give the ca.pem of the federation",
        )  # fmt: skip
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), timeout=_SECONDS) as raw,
            context.wrap_socket(raw, server_hostname=host) as wrapped,
        ):
            version = wrapped.version()
            if wrapped.selected_alpn_protocol() != "h2":
                return Check(
                    "TLS", False, "it speaks TLS, but not HTTP/2", "is this fedtune's port?"
                )
    except ssl.SSLCertVerificationError as error:
        return _unverified(error, host)
    except (ssl.SSLEOFError, ConnectionError, TimeoutError):
        return Check(
            "TLS", False, "the connection was closed, or fell silent, before TLS was agreed on",
            "is the server up? is a gateway between, and is this fedtune's port?", passing=True,
        )  # fmt: skip
    except (ssl.SSLError, OSError) as error:
        what = getattr(error, "reason", None) or error.strerror or type(error).__name__
        return Check(
            "TLS", False, f"the server does not speak TLS here ({what})",
            "is this fedtune's port? nodes never talk in plain text",
        )  # fmt: skip
    return Check("TLS", True, f"{version}, the certificate is the federation's")


def _unverified(error: ssl.SSLCertVerificationError, host: str) -> Check:
    words = {
        10: (
            "the server's certificate is no longer valid",
            "the server needs a new one (fedtune keys server --renew), or this clock is wrong",
        ),
        9: (
            "the server's certificate is not valid yet",
            "set this machine's clock, or wait",
        ),
        62: (
            f"the server's certificate is not for '{host}'",
            "use a name that it is for, or have this one added: fedtune keys server",
        ),
        64: (
            f"the server's certificate is not for '{host}'",
            "use a name that it is for, or have this one added: fedtune keys server",
        ),
    }
    default = (
        "the server's certificate is not from this federation's CA",
        "give the ca.pem of the federation that you mean to join; if it is the right one, "
        "somebody else is answering: do not connect",
    )
    said, fix = words.get(error.verify_code, default)
    return Check("TLS", False, f"{said} ({error.verify_message})", fix)


def _clock(door: Door, line: Line) -> Check:
    """Find how far the server's clock is off, by signing times around it."""
    fix = "set the clock of this machine, or the server's: timedatectl set-ntp true"
    steps = int(_FURTHEST / _STEP)
    for step in range(1, steps + 1):
        for sign in (1, -1):
            line.signer = Signer(door.login, sign * step * _STEP)
            if probe(line).kind in {"known", "stranger"}:
                minutes = step * _STEP / 60
                size = f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"
                where = "behind" if sign > 0 else "ahead of"
                words = f"this machine's clock is about {size} {where} the server's"
                return Check("clock", False, words, fix)
    return Check("clock", False, "more than a day from the server's clock", fix)


def _flower_error(details: str) -> tuple[int, str]:
    try:
        found = json.loads(details)
        return int(found["code"]), _short(str(found.get("public_message", "")))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return 0, ""


def _short(text: str) -> str:
    """Return a server's words, safe to show."""
    return "".join(c if c.isprintable() else "?" for c in text[:200])
