"""``fedtune serve``: a federation over real nodes."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtune.cli.out import Out, reporting
from fedtune.errors import ExitCode, FedtuneError

if TYPE_CHECKING:
    from fedtune.config import Config
    from fedtune.server.run_folder import RunFolder
    from fedtune.server.supervisor import Supervisor

__all__ = ["serve"]

_SHORTEST_TOKEN = 16


def serve(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="FILE...", help="Experiments, one after another.")
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a setting."),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option("--resume", metavar="RUN", help="Go on with a run: folder, name, 'latest'."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON envelope on stdout.")] = False,
) -> None:
    """Serve a federation: nodes join over TLS with enrolled keys, and tune one model."""
    with reporting(Out("serve", as_json)) as out:
        if not files and resume is None:
            raise FedtuneError(
                "nothing to serve", hint="name an experiment file, or --resume RUN",
                code=ExitCode.USAGE,
            )  # fmt: skip
        opened = _opened(files or [], override or [], resume)
        _serve(out, opened)
        result = {"runs": [_outcome(folder) for _, folder in opened]}
        out.result(result, "\n".join(f"adapter: {one['adapter']}" for one in result["runs"]))


def _opened(
    files: list[Path], override: list[str], resume: str | None
) -> list[tuple[Config, RunFolder]]:
    """Return every run's settings and folder; a file that is wrong ends it before anything runs."""
    from fedtune.configfile import load
    from fedtune.privacy.plan import resolve
    from fedtune.server.run_folder import RunFolder, create, find, reopen
    from fedtune.server.serving import for_owners

    configs = [for_owners(resolve(load(file, override))) for file in files]
    if resume is not None:
        root = Path(configs[0].output.folder if configs else "runs")
        path = find(resume, root).path
        own = RunFolder(path).config()
        if override and not files:
            own = for_owners(resolve(load(path / "config.toml", override)))
        return [(own, reopen(path, configs[0] if configs else own))]
    _require_one_server(configs)
    return [(config, create(config)) for config in configs]


def _require_one_server(configs: list[Config]) -> None:
    first = configs[0].federation.server
    for config in configs[1:]:
        other = config.federation.server
        for name in ("address", "keys", "state"):
            if getattr(other, name) != getattr(first, name):
                raise FedtuneError(
                    f"'{config.name}' has another federation.server.{name} than the first",
                    hint="runs of one server share [federation.server]", code=ExitCode.CONFIG,
                )  # fmt: skip


def _serve(out: Out, opened: list[tuple[Config, RunFolder]]) -> None:
    from fedtune.cli.serving import watching
    from fedtune.keys.authority import check_server
    from fedtune.keys.roster import read_roster
    from fedtune.server.superlink import Place, start_engine
    from fedtune.server.supervisor import Supervisor

    server = opened[0][0].federation.server
    keys = Path(server.keys)
    facts, roster = check_server(keys), read_roster(keys)
    for words in facts.warnings:
        out.say(f"note: {words}")
    if not roster.members:
        raise FedtuneError(
            f"nobody is enrolled in '{keys}'", hint="fedtune keys node NAME; fedtune keys enrol",
            code=ExitCode.SIGNATURE,
        )  # fmt: skip
    place = Place(
        Path(server.state), server.address, keys / "ca.pem", keys / "server.pem",
        keys / "server.key", server.message_mb << 20,
    )  # fmt: skip
    heard: list[Supervisor] = []
    out.say("starting the server ...")
    with start_engine(place, lambda words: _hear(heard, words, out)) as engine:
        known = {
            "federation": facts.authority.name, "address": server.address,
            "certificate_days_left": facts.days_left,
        }  # fmt: skip
        supervisor = Supervisor(engine, keys, known, out.say)
        heard.append(supervisor)
        _stop_on_signals(supervisor)
        port = server.address.rpartition(":")[2]
        out.say(f"join with: fedtune join --server {facts.hosts[0]}:{port} "
                "--ca ca.pem --key NAME.key --data FILE")  # fmt: skip
        with _status(out, supervisor, server, keys), watching(supervisor.snapshot, out.people):
            supervisor.run([folder for _, folder in opened])
        if supervisor.stop.is_set():
            raise FedtuneError(
                "stopped", hint="go on with: fedtune serve --resume latest",
                code=ExitCode.INTERRUPTED,
            )  # fmt: skip


def _hear(heard: list[Supervisor], words: str, out: Out) -> None:
    """Pass on what the engine says; before there is a supervisor, to people."""
    if heard:
        heard[0].heard(words)
    else:
        out.say(words)


@contextlib.contextmanager
def _status(out: Out, supervisor: Supervisor, server: Any, keys: Path) -> Iterator[None]:
    """Serve the status page, if the settings want one."""
    if not server.status:
        yield
        return
    from fedtune.server.status_page import start_status

    host, _, port = server.status.rpartition(":")
    token, tls = "", {}
    if server.status_token:
        token = _token(Path(server.status_token))
    if host.strip("[]") not in ("127.0.0.1", "::1", "localhost"):
        tls = {"certificate": keys / "server.pem", "key": keys / "server.key"}
    page = start_status(supervisor.snapshot, host.strip("[]"), int(port), token, **tls)
    out.say(f"status: {page.url}")
    try:
        yield
    finally:
        page.close()


def _token(path: Path) -> str:
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise FedtuneError(
            f"federation.server.status_token='{path}' cannot be read: {error}",
            hint=f"a file with at least {_SHORTEST_TOKEN} characters", code=ExitCode.CONFIG,
        ) from error  # fmt: skip
    return token


def _stop_on_signals(supervisor: Supervisor) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: supervisor.stop.set())


def _outcome(folder: RunFolder) -> dict[str, Any]:
    return {
        "run": str(folder.path), "adapter": str(folder.adapter), "status": folder.status(),
    }  # fmt: skip
