"""``fedtune body``: serve the middle of a split model to the clients that hold its ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from fedtune.cli.out import Out, reporting

__all__ = ["body"]


def body(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The experiment (TOML).")],
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Port 0 is any free one.")
    ] = "127.0.0.1:0",
    override: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a setting."),
    ] = None,
    cert: Annotated[Path | None, typer.Option("--cert", help="TLS: certificate chain.")] = None,
    key: Annotated[Path | None, typer.Option("--key", help="TLS: its private key.")] = None,
    client_root: Annotated[
        Path | None, typer.Option("--client-root", help="TLS: who signs clients' certificates.")
    ] = None,
    enrolled: Annotated[
        Path | None, typer.Option("--enrolled", help="Who may call: lines NAME PUBLIC-KEY.")
    ] = None,
    name: Annotated[str, typer.Option("--name", help="What clients sign their calls for.")] = (
        "body"
    ),
    graphs: Annotated[
        int, typer.Option("--graphs", min=0, help="Graphs held, so that nothing is recomputed.")
    ] = 0,
    batch: Annotated[
        int,
        typer.Option(
            "--batch", min=1,
            help="Calls joined to one, where shapes allow. Above 1, last bits may depend on "
            "who else calls.",
        ),
    ] = 1,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Calls computed at once.")] = 1,
    largest: Annotated[
        int, typer.Option("--tensor-mb", min=1, help="Largest tensor taken, in MiB.")
    ] = 256,
    keep: Annotated[
        int, typer.Option("--keep", min=1, help="Seconds that released activations are held.")
    ] = 24 * 3600,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Open to others without TLS or enrolment.")
    ] = False,
    ready: Annotated[
        Path | None, typer.Option("--ready", help="Write HOST:PORT here when listening.")
    ] = None,
    until_eof: Annotated[
        bool, typer.Option("--until-eof", hidden=True, help="Stop when the input ends.")
    ] = False,
) -> None:  # fmt: skip
    """Serve the body of a split model: the blocks between its head and its tail."""
    with reporting(Out("body", as_json=False)) as out:
        stop = _stopper(until_eof)
        from fedtune.configfile import load
        from fedtune.simulations.body_process import load_body
        from fedtune.split.calls import Limits

        limits = Limits(tensor_bytes=largest << 20, keep_seconds=keep)
        config = load(file, override or [])
        middle, digest = load_body(config)

        from fedtune.server.body_server import Door, start
        from fedtune.server.body_service import BodyService

        cut = middle.cut
        service = BodyService(
            middle, digest, limits=limits, graphs=graphs, batch=batch, workers=workers,
            met=lambda run, client, codec: out.say(f"client {client}: run {run}, codec {codec}"),
        )  # fmt: skip
        door = Door(listen, cert, key, client_root, enrolled, insecure, name)
        running = start(service, door, limits, sweep=service.sweep)
        out.say(
            f"blocks {cut.body.start} to {cut.body.stop - 1} of {config.model.base} "
            f"at {running.address}; the text can be read from what clients send here"
        )
        if ready is not None:
            from fedtune.files import write_atomic

            write_atomic(ready, running.address.encode())
        out.result({}, running.address)
        sys.stdout.flush()
        stop.wait()
        running.stop()
        service.close()
        out.say("stopped")


def _stopper(until_eof: bool) -> threading.Event:
    """Return what is set when the server is to end."""
    stop = threading.Event()

    def ask(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, ask)
    if until_eof:
        threading.Thread(target=_until_eof, args=(stop,), daemon=True).start()
    return stop


def _until_eof(stop: threading.Event) -> None:
    while os.read(0, 1024):
        pass
    stop.set()


if __name__ == "__main__":
    typer.run(body)
