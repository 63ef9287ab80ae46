"""The read-only status page: one small HTTP server in a thread, on loopback unless told so.

Whoever may ask sees everything here and can change nothing: only GET and HEAD, no
form, nothing from elsewhere. On loopback the ``Host`` header must name this machine,
so that a page of another site cannot read this one under a name it controls (DNS
rebinding). Anywhere else a token is asked for.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import logging
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedtune.errors import ExitCode, FedtuneError
from fedtune.server.snapshot import Snapshot, as_json
from fedtune.server.status_http import serve
from fedtune.server.status_metrics import CONTENT_TYPE, metrics_of
from fedtune.server.status_view import page_of

__all__ = ["Source", "Status", "start_status"]

Source = Callable[[], Snapshot]

_LOG = logging.getLogger(__name__)

_LEAST_TOKEN = 16
_TOKEN = re.compile(r"[A-Za-z0-9._~-]*")
_COOKIE = "fedtune-status"
_FRESH = 0.5
"""Seconds that one look serves everybody: many readers cost no more than one."""
_HEADERS = (
    (b"x-frame-options", b"DENY"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    # One request for each connection: a connection has one deadline, and no idle ones pile up.
    (b"connection", b"close"),
)


@dataclass(frozen=True)
class Status:
    """A page that is being served.

    Attributes
    ----------
    url : str
        Has no token in it.
    close : callable
        Stops it; a second call does nothing.
    """

    url: str
    close: Callable[[], None]


def start_status(
    source: Source,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str = "",
    certificate: Path | None = None,
    key: Path | None = None,
) -> Status:
    """Serve ``/``, ``/state.json``, ``/metrics`` and ``/healthz`` until closed.

    Parameters
    ----------
    source : callable
        Gives how things stand; called from other threads, at most twice a second.
    host, port : str, int
        Port 0 is any free one.
    token : str
        At least 16 letters, digits or ``-._~``; asked for when it is given, and a must where
        others can connect. Sent as ``Authorization: Bearer``, or once as ``?token=``, which
        becomes a cookie. ``/healthz`` asks for none: it says that the server lives, no more.
    certificate, key : Path or None
        PEM files: https. Without them a token crosses the network in the clear.

    Raises
    ------
    FedtuneError
        ``ExitCode.CONFIG`` for a host, token or key that will not do; ``ExitCode.ENGINE``
        for an address that cannot be had.
    """
    local = _is_local(host)
    _require_token(host, token, local)
    if (certificate is None) != (key is None):
        raise FedtuneError(
            f"the status page has certificate={certificate} and key={key}",
            hint="give both, or neither",
            code=ExitCode.CONFIG,
        )
    bound = _bound(host, port)
    app = _Guard(_app(_shared(source)), token, local=local, tls=key is not None)
    try:
        close = serve(app, bound, certificate, key)
    except BaseException:
        bound.close()
        raise
    name = f"[{host}]" if ":" in host else host
    scheme = "https" if key is not None else "http"
    return Status(f"{scheme}://{name}:{bound.getsockname()[1]}/", close)


def _app(look: Source) -> ASGIApp:
    def page(request: Request) -> Response:
        nonce = secrets.token_urlsafe(18)
        policy = (
            f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        )
        headers = {"content-security-policy": policy}
        return Response(page_of(look(), nonce), media_type="text/html", headers=headers)

    def state(request: Request) -> Response:
        text = json.dumps(as_json(look()), allow_nan=False, default=str)
        return Response(text, media_type="application/json")

    def metrics(request: Request) -> Response:
        return Response(metrics_of(look()), headers={"content-type": CONTENT_TYPE})

    def health(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    def unreadable(request: Request, error: Exception) -> Response:
        return PlainTextResponse(f"how the run stands cannot be read: {error}\n", 503)

    return Starlette(
        routes=[
            Route("/", page), Route("/state.json", state), Route("/metrics", metrics),
            Route("/healthz", health),
        ],
        exception_handlers={FedtuneError: unreadable, OSError: unreadable},
    )  # fmt: skip


class _Guard:
    """Asks who may come in before anything else is done."""

    def __init__(self, inner: ASGIApp, token: str, *, local: bool, tls: bool) -> None:
        self._inner, self._token, self._local, self._tls = inner, token.encode(), local, tls
        # The token itself does not lie about in a browser.
        self._cookie = hmac.new(self._token, b"fedtune status cookie", hashlib.sha256).hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = list(message.get("headers", []))
                if not any(name == b"content-security-policy" for name, _ in given):
                    given.append((b"content-security-policy", b"default-src 'none'"))
                message = {**message, "headers": [*given, *_HEADERS]}
            await send(message)

        answer = self._refusal(Request(scope)) or self._inner
        try:
            await answer(scope, receive, guarded)
        except Exception:  # noqa: BLE001 - a page that fails must not end the run
            # Starlette has said 500 by now; the server's log says why.
            _LOG.exception("the status page failed")

    def _refusal(self, request: Request) -> Response | None:
        if request.method not in ("GET", "HEAD"):
            return PlainTextResponse("this page is read-only\n", 405, {"allow": "GET, HEAD"})
        if self._local and not _names_us(request.headers.get("host", "")):
            return PlainTextResponse("ask for 127.0.0.1 or localhost\n", 421)
        if not self._token or request.url.path == "/healthz":
            return None
        given = request.query_params.get("token")
        if given is not None and self._is_token(given):
            found = RedirectResponse(request.url.path, 303)
            found.set_cookie(
                _COOKIE, self._cookie, httponly=True, samesite="strict", secure=self._tls
            )
            return found
        kind, _, bearer = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self._is_token(bearer.strip()):
            return None
        cookie = request.cookies.get(_COOKIE, "")
        if hmac.compare_digest(cookie.encode(), self._cookie.encode()):
            return None
        words = "a token is needed: add ?token=... once, or send Authorization: Bearer ...\n"
        return PlainTextResponse(words, 401, {"www-authenticate": "Bearer"})

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), self._token)


def _shared(source: Source) -> Source:
    """Let one look serve everybody who asks within an instant."""
    lock = threading.Lock()
    kept: list[tuple[float, Snapshot]] = []

    def look() -> Snapshot:
        with lock:
            if not kept or time.monotonic() - kept[0][0] > _FRESH:
                kept[:] = [(time.monotonic(), source())]
            return kept[0][1]

    return look


def _names_us(host: str) -> bool:
    """Say whether a ``Host`` header names this machine by itself; ports may be forwarded."""
    name = re.sub(r":\d{1,5}$", "", host.strip().lower())
    return name in ("localhost", "[::1]") or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        return ipaddress.IPv4Address(name).is_loopback
    except ValueError:
        return False


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _require_token(host: str, token: str, local: bool) -> None:
    if not _TOKEN.fullmatch(token):
        raise FedtuneError(
            "the status page's token has characters that do not fit into an address",
            hint="letters, digits and -._~ only",
            code=ExitCode.CONFIG,
        )
    if len(token) < _LEAST_TOKEN and (token or not local):
        raise FedtuneError(
            f"the status page on '{host}' has a token of {len(token)} characters, "
            f"{_LEAST_TOKEN} are needed",
            hint="python3 -c 'import secrets; print(secrets.token_urlsafe())' makes one; or "
            "listen on 127.0.0.1 without a token",
            code=ExitCode.CONFIG,
        )


def _bound(host: str, port: int) -> socket.socket:
    try:
        if not 0 <= port < 65536:
            raise OverflowError("ports are 0 to 65535")
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except (OSError, OverflowError) as error:
        raise FedtuneError(
            f"the status page cannot listen on '{host}' port {port}: {error}",
            hint="choose another port, or 0 for any free one",
            code=ExitCode.ENGINE,
        ) from error
    return bound
