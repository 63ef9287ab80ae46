"""What runs in the engine's child processes: Flower's SuperLink, and Flower's ServerApp.

``python -m fedtune.server.superlink_child`` reads one JSON object from standard input and
becomes what that says. Secrets come this way: not by arguments, which every account can
see, and not by files.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from pathlib import Path
from queue import Queue
from typing import Any

__all__ = ["guard", "main"]

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]

_OPEN = "/health"
_RUNTIME = "/v1/runtime/"
_LONGEST = "GRPC_MAX_MESSAGE_LENGTH"
_WATCH_SECONDS = 0.25
_FIRST_WAIT = 0.1


def guard(app: _App, secret: str) -> _App:
    """Ask for ``secret`` before anything but Flower's Runtime, which has tokens of its own.

    The SuperLink knows no users: without this, every account of the server's machine could
    start runs, and with them code, and enrol nodes.

    Parameters
    ----------
    app : ASGI application
        That of the SuperLink.
    secret : str
        Callers show it as ``Authorization: Bearer SECRET``; without it the answer is 403.
    """
    wanted = f"Bearer {secret}".encode()

    async def guarded(scope: _Scope, receive: _Receive, send: _Send) -> None:
        if scope["type"] == "lifespan":
            await app(scope, receive, send)
            return
        shown = dict(scope["headers"]).get(b"authorization", b"")
        path = str(scope["path"])
        allowed = path == _OPEN or path.startswith(_RUNTIME) or hmac.compare_digest(shown, wanted)
        if allowed and scope["type"] == "http":
            await app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"forbidden\n"})
        else:
            await send({"type": "websocket.close", "code": 1008})

    return guarded


def _superlink(order: Mapping[str, Any]) -> None:
    import uvicorn
    from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.config_loader import SuperLinkLifespanConfig
    from flwr.superlink.main import create_app

    from fedtune.server.fast_link import hold_questions, sweep_seldom

    hold_questions()
    sweep_seldom()
    # Flower allows 2 GiB for one call: enough to fill the memory with few of them.
    setattr(sys.modules[SuperLinkLifespan.__module__], _LONGEST, int(order["most_bytes"]))
    config = SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host="127.0.0.1",
        port=order["port"],
        insecure=False,
        certificates=(
            Path(order["ca"]).read_bytes(),
            Path(order["certificate"]).read_bytes(),
            Path(order["key"]).read_bytes(),
        ),
        superexec_auth_secret=bytes.fromhex(order["task_secret"]),
        authn_plugin=NoOpControlAuthnPlugin(),
        event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type="grpc-rere",
        fleet_api_address=order["address"],
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=order["loopback_certificate"],
        ssl_keyfile=order["loopback_key"],
        database=order["database"],
        isolation="process",
        runtime_dependency_install=False,
    )
    uvicorn.run(
        guard(create_app(config, SuperLinkLifespan), order["secret"]),
        host=config.host,
        port=config.port,
        access_log=False,
        log_level="warning",
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
        timeout_graceful_shutdown=2,
        workers=1,
    )


def _serverapp(order: Mapping[str, Any]) -> None:
    from flwr.superlink.runtime import run_serverapp

    _persevere()
    run_serverapp(
        runtime_api_address=order["address"],
        log_queue=Queue(),
        token=order["token"],
        insecure=False,
        certificates=Path(order["root"]).read_bytes(),
        runtime_dependency_install=False,
    )


def _persevere() -> None:
    """Let the ServerApp find a SuperLink that came back within a second, and never give up.

    Flower 1.39 waits up to 20 s between tries, and ends the ServerApp at an error that
    speaks of TLS, as one does when the SuperLink is killed during a handshake.
    """
    import httpx
    from flwr.supercore.retry import RetryInvoker, exponential, make_simple_http_retry_invoker
    from flwr.superlink.grid import http_grid

    def make() -> RetryInvoker:
        invoker = make_simple_http_retry_invoker()
        theirs = invoker.should_giveup

        def refused(error: Exception) -> bool:
            answered = isinstance(error, httpx.HTTPStatusError)
            return answered and theirs is not None and theirs(error)

        invoker.should_giveup = refused
        invoker.wait_gen_factory = lambda: exponential(_FIRST_WAIT, max_delay=1)
        return invoker

    setattr(http_grid, make_simple_http_retry_invoker.__name__, make)


def _die_with(parent: int) -> None:
    """End this process and all it started when ``parent`` is gone, however it went."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        own = os.getpgrp() == os.getpid()
        (os.killpg if own else os.kill)(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def main() -> None:
    """Become what standard input says."""
    order = json.loads(sys.stdin.readline())
    os.umask(0o077)
    _die_with(int(order["parent"]))

    from flwr.supercore.logger import update_console_handler

    update_console_handler(level=logging.INFO, timestamps=True, colored=False)
    {"superlink": _superlink, "serverapp": _serverapp}[order["what"]](order)


if __name__ == "__main__":
    main()
