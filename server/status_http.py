"""uvicorn in a thread with small limits: nobody outside can make it hold much, or for long."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedtune.errors import ExitCode, FedtuneError

__all__ = ["serve"]

_DEADLINE = 15.0
"""Seconds for one connection, from its first byte to its last."""
_MOST_CONNECTIONS = 64
_MOST_HEADERS = 16 * 1024
_START, _STOP = 10.0, 5.0


class _Brief(H11Protocol):
    """A connection that ends: uvicorn itself waits forever for a request that never comes."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._over = self.loop.call_later(_DEADLINE, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._over.cancel()
        super().connection_lost(exc)


def serve(
    app: ASGIApp, bound: socket.socket, certificate: Path | None, key: Path | None
) -> Callable[[], None]:
    """Serve an app on a bound socket; return what stops it.

    Raises
    ------
    FedtuneError
        ``ExitCode.CONFIG`` when certificate and key cannot be used, ``ExitCode.ENGINE`` when
        it does not come up.
    """
    # What a visitor does is no news for whoever looks at the server's terminal; what fails in
    # the page itself is said by its own logger.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    config = uvicorn.Config(
        app, http=_Brief, ws="none", lifespan="off", loop="asyncio", interface="asgi3",
        log_config=None, access_log=False, server_header=False, proxy_headers=False,
        limit_concurrency=_MOST_CONNECTIONS, h11_max_incomplete_event_size=_MOST_HEADERS,
        timeout_keep_alive=2, timeout_graceful_shutdown=1, backlog=64,
        ssl_certfile=certificate, ssl_keyfile=key,
    )  # fmt: skip
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise FedtuneError(
            f"the status page cannot use '{certificate}' with '{key}': {error}",
            hint="both must be PEM files that belong together: fedtune keys show",
            code=ExitCode.CONFIG,
        ) from error
    server = uvicorn.Server(config)
    arguments: dict[str, Any] = {"sockets": [bound]}
    thread = threading.Thread(
        target=server.run, kwargs=arguments, name="fedtune-status", daemon=True
    )
    thread.start()
    until = time.monotonic() + _START
    while not server.started:
        if not thread.is_alive() or time.monotonic() > until:
            raise FedtuneError(
                "the status page did not come up", hint="choose another port",
                code=ExitCode.ENGINE,
            )  # fmt: skip
        time.sleep(0.01)

    def close() -> None:
        server.should_exit = True
        thread.join(_STOP)

    return close
