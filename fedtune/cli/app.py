"""Commands of ``fedtune``: thin wrappers that read, call, and report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fedtune.cli.audit import audit
from fedtune.cli.body import body
from fedtune.cli.budget import budget
from fedtune.cli.join import join
from fedtune.cli.keys import keys
from fedtune.cli.out import Out, reporting
from fedtune.cli.report import report
from fedtune.cli.serve import serve
from fedtune.errors import ExitCode, FedtuneError

__all__ = ["run"]

app = typer.Typer(
    help="Federated fine-tuning of language models: the text stays with its owners.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
runs = typer.Typer(help="Look at what was run.", no_args_is_help=True)
app.add_typer(runs, name="runs")
app.add_typer(budget, name="budget")
app.add_typer(keys, name="keys")
app.command()(report)
app.command()(audit)
app.command()(body)
app.command()(serve)
app.command()(join)

_KEYED = ("key", "certificate", "TLS", "clock", "identity")

Json = Annotated[bool, typer.Option("--json", help="One JSON envelope on stdout.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a setting.")
]
File = Annotated[Path, typer.Argument(metavar="FILE", help="The experiment (TOML).")]
Root = Annotated[Path, typer.Option("--folder", help="Where runs are.")]


def run() -> None:
    """Run the command line; an unforeseen error keeps its traceback."""
    app()


@app.callback(invoke_without_command=True)
def top(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Federated fine-tuning of language models: the text stays with its owners."""
    if show_version:
        sys.stdout.write(version("fedtune") + "\n")
        raise typer.Exit


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="FILE")] = Path("fedtune.toml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite.")] = False,
    as_json: Json = False,
) -> None:
    """Write a commented experiment file."""
    with reporting(Out("init", as_json)) as out:
        if path.exists() and not force:
            raise FedtuneError(
                f"'{path}' is there already",
                hint="choose another name, or overwrite it with --force",
                code=ExitCode.USAGE,
            )
        from fedtune.files import write_atomic

        template = files("fedtune") / "assets" / "templates" / "experiment.toml"
        write_atomic(path, template.read_bytes())
        out.result({"file": str(path)}, str(path))
        out.say(f"next: fedtune check {path}; fedtune simulate {path}")


@app.command()
def check(file: File, override: Set = None, as_json: Json = False) -> None:
    """Validate an experiment and print its plan."""
    with reporting(Out("check", as_json)) as out:
        _show_plan(out, file, override or [], None)


@app.command()
def plan(file: File, override: Set = None, as_json: Json = False) -> None:
    """Predict a run: bytes, memory, and noise, epsilon curve and rounds of its privacy."""
    with reporting(Out("plan", as_json)) as out:
        _show_plan(out, file, override or [], None)


@app.command()
def simulate(
    file: Annotated[Path | None, typer.Argument(metavar="FILE")] = None,
    override: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan.")] = False,
    resume: Annotated[
        str | None,
        typer.Option("--resume", metavar="RUN", help="Go on with a run: folder, name, 'latest'."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Root seed.")] = None,
    as_json: Json = False,
) -> None:
    """Run a whole federation on this machine."""
    with reporting(Out("simulate", as_json)) as out:
        if file is None and resume is None:
            raise FedtuneError(
                "nothing to run",
                hint="name an experiment file, or --resume RUN; write a file with: fedtune init",
                code=ExitCode.USAGE,
            )
        if dry_run:
            if file is None:
                raise FedtuneError("--dry-run needs an experiment file", code=ExitCode.USAGE)
            _show_plan(out, file, override or [], seed)
            return
        _simulate(out, file, override or [], resume, seed)


@app.command("deal")
def deal_rows(
    file: File,
    to: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the files go.")],
    override: Set = None,
    as_json: Json = False,
) -> None:
    """Write each simulated client's rows as a file, to try an experiment with real nodes."""
    with reporting(Out("deal", as_json)) as out:
        from fedtune.configfile import load
        from fedtune.data import deal
        from fedtune.files import write_atomic
        from fedtune.keys.node import check_name

        config = load(file, override or [])
        parts = deal(config.data, config.seed)
        files = {}
        for name, rows in parts.items():
            path = to / f"{check_name(name)}.jsonl"
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_atomic(path, text.encode())
            files[name] = {"file": str(path), "rows": len(rows)}
        out.result(
            {"clients": files},
            "\n".join(f"{one['file']}  {one['rows']} rows" for one in files.values()),
        )


@app.command("export")
def export_run(
    name: Annotated[str, typer.Argument(metavar="RUN", help="Folder, name, or 'latest'.")],
    to: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")],
    what: Annotated[
        Literal["weights", "delta"],
        typer.Option("--as", help="Full weights, or what was added to the base."),
    ] = "weights",
    folder: Root = Path("runs"),
    as_json: Json = False,
) -> None:
    """Turn a run's result into full weights, or into their difference from the base."""
    with reporting(Out("export", as_json)) as out:
        from fedtune.server.run_folder import find
        from fedtune.server.seeds_file import export

        made = export(find(name, folder), what, to)
        out.result(
            {"path": str(made.path), "tensors": made.tensors, "parameters": made.parameters,
             "bytes": made.bytes},
            f"{made.path}: {made.tensors} tensors, {made.parameters:,} parameters, "
            f"{made.bytes / 1e6:.1f} MB",
        )  # fmt: skip


@app.command()
def doctor(
    server: Annotated[
        str, typer.Option("--server", metavar="HOST:PORT", help="A federation to join.")
    ] = "",
    key: Annotated[Path | None, typer.Option("--key", help="This node's key.")] = None,
    ca: Annotated[Path, typer.Option("--ca", help="The federation's ca.pem.")] = Path("ca.pem"),
    policy: Annotated[
        Path | None, typer.Option("--policy", help="The owner's policy, to be judged by it.")
    ] = None,
    home: Annotated[Path | None, typer.Option("--home", help="The node's folder.")] = None,
    as_json: Json = False,
) -> None:
    """Say what this machine has, or what keeps it from joining a federation."""
    with reporting(Out("doctor", as_json)) as out:
        from fedtune.cli.doctor import examine, examine_server

        if not server:
            found = examine()
            out.result(found, _as_lines(found))
            return
        if key is None:
            raise FedtuneError(
                "--server needs --key", hint="fedtune keys node NAME makes one",
                code=ExitCode.USAGE,
            )  # fmt: skip
        checks = examine_server(server, key, ca, policy, home)
        out.result(
            {"ok": all(one["ok"] for one in checks), "checks": checks},
            "\n".join(
                f"{'ok   ' if one['ok'] else 'WRONG'}  {one['name']}: {one['words']}"
                + (f"\n       {one['fix']}" if one["fix"] and not one["ok"] else "")
                for one in checks
            ),
        )
        if not all(one["ok"] for one in checks):
            raise typer.Exit(ExitCode.SIGNATURE if checks[-1]["name"] in _KEYED else
                             ExitCode.ENGINE)  # fmt: skip


@runs.command("list")
def list_all(folder: Root = Path("runs"), as_json: Json = False) -> None:
    """List the runs of a folder, oldest first."""
    with reporting(Out("runs list", as_json)) as out:
        from fedtune.server.run_folder import list_runs

        found = [
            {"run": one.path.name, "path": str(one.path)} | _summary(one.status(), one.is_alive())
            for one in list_runs(folder)
        ]
        names = ("run", "status", "round", "loss", "started")
        lines = [f"{'run':40} {'status':9} {'round':>5} {'loss':>8} started"]
        lines += [
            f"{row[names[0]]:40} {row[names[1]]:9} {row[names[2]]!s:>5} "
            f"{row[names[3]]!s:>8.6} {row[names[4]]}"
            for row in found
        ]
        out.result({"runs": found}, "\n".join(lines) if found else f"no runs in '{folder}'")


@runs.command("show")
def show(
    name: Annotated[str, typer.Argument(metavar="RUN", help="Folder, name, or 'latest'.")],
    folder: Root = Path("runs"),
    as_json: Json = False,
) -> None:
    """Show one run: status, settings that differ from the defaults, rounds."""
    with reporting(Out("runs show", as_json)) as out:
        from fedtune.config import Config
        from fedtune.configfile import difference
        from fedtune.server.run_folder import find

        one = find(name, folder)
        rows = one.metrics()
        settings = difference(Config(), one.config())
        keys = ("round", "train_loss", "loss", "accuracy", "client_worst", "bytes_up", "seconds")
        used = [key for key in keys if any(key in row for row in rows)]
        table = ["  ".join(f"{key:>12}" for key in used)]
        table += ["  ".join(f"{_cell(row.get(key)):>12}" for key in used) for row in rows]
        text = "\n".join(
            [str(one.path), "", _as_lines(one.status()), "", "settings:", *settings, "", *table]
        )
        value = {"path": str(one.path), "status": one.status(), "metrics": rows}
        out.result(value | {"settings": list(settings)}, text)


@runs.command("stop")
def stop(
    name: Annotated[str, typer.Argument(metavar="RUN", help="Folder, name, or 'latest'.")],
    folder: Root = Path("runs"),
    as_json: Json = False,
) -> None:
    """Stop a run before its next round; its rounds are kept, and it can be resumed."""
    with reporting(Out("runs stop", as_json)) as out:
        from fedtune.server.run_folder import find

        one = find(name, folder)
        if not one.is_alive():
            raise FedtuneError(
                f"nobody works on run '{one.path}'", hint="see: fedtune runs list",
                code=ExitCode.RUN_FOLDER,
            )  # fmt: skip
        one.stop()
        out.result({"run": str(one.path)}, f"run '{one.path.name}' stops before its next round")


def _simulate(
    out: Out, file: Path | None, override: list[str], resume: str | None, seed: int | None
) -> None:
    overrides = [*override, *([f"seed={seed}"] if seed is not None else [])]
    config, folder = _open(out, file, overrides, resume)
    from fedtune.cli.progress import following
    from fedtune.server.loggers import open_loggers
    from fedtune.simulations.simulate import simulate as run_simulation

    out.say("loading model and data, then measuring the base model ...")
    with following(config, out.people) as watch, open_loggers(config, folder) as log:
        federation = run_simulation(config, folder, _both(watch, log))
    for note in federation.notes:
        out.say(f"note: {note}")
    _report_truncated(out, folder)
    status = folder.status()
    result = {"run": str(folder.path), "adapter": str(folder.adapter), "status": status}
    out.result(result, _ending(folder.path, status["result"]))


def _open(out: Out, file: Path | None, overrides: list[str], resume: str | None) -> Any:
    """Return the settings and the folder of a new run, or of one to go on with."""
    from fedtune.server.loggers import require_loggers
    from fedtune.server.run_folder import RunFolder, create, find, reopen
    from fedtune.simulations.workshop import open_early

    config = _settings(file, overrides) if file is not None else None
    if resume is None:
        if config is None:
            raise FedtuneError("nothing to run", code=ExitCode.USAGE)
        require_loggers(config)
        folder = create(config)
        out.say(f"run folder: {folder.path}")
        return config, folder
    path = find(resume, Path(config.output.folder if config else "runs")).path
    if config is None:
        own = RunFolder(path).config()
        config = _settings(path / "config.toml", overrides) if overrides else own
        open_early(config)
    out.say(f"going on with {path}")
    return config, reopen(path, config)


def _settings(file: Path, overrides: list[str]) -> Any:
    """Read settings; imports of worker processes begin at once."""
    from fedtune.configfile import load
    from fedtune.simulations.workshop import open_early

    config = load(file, overrides)
    open_early(config)
    from fedtune.privacy.plan import resolve

    return resolve(config)


def _both(first: Callable[[Any], None], second: Callable[[Any], None]) -> Callable[[Any], None]:
    def hear(event: Any) -> None:
        first(event)
        second(event)

    return hear


def _show_plan(out: Out, file: Path, override: list[str], seed: int | None) -> None:
    from fedtune.configfile import load
    from fedtune.simulations.plan import describe, plan

    overrides = [*override, *([f"seed={seed}"] if seed is not None else [])]
    made = plan(load(file, overrides))
    out.result(made, describe(made))


def _report_truncated(out: Out, folder: Any) -> None:
    """Say how many examples were cut, once for each client that had any."""
    cut = {row["client"]: row["truncated"] for row in folder.client_rows() if row.get("truncated")}
    if cut:
        worst = max(cut, key=lambda name: cut[name])
        out.say(
            f"note: {sum(cut.values())} examples of {len(cut)} clients were longer than "
            f"data.max_length and were cut (most at '{worst}': {cut[worst]})"
        )


def _ending(path: Path, result: dict[str, Any]) -> str:
    lines = [
        f"{key:>10}: {_figure(result[f'base_{key}'])} -> {_figure(result[key])}"
        for key in ("loss", "perplexity", "accuracy", "macro_f1")
        if result.get(key) is not None and result.get(f"base_{key}") is not None
    ]
    before, after = result.get("base_loss"), result.get("loss")
    if before is not None and after is not None and after > before:
        lines.append("      note: the held-out loss rose: lower tuning.lr, or tune for longer")
    lines += [f"   picture: {path / 'loss.png'}", f"   adapter: {path / 'adapter'}"]
    promised = json.loads((path / "adapter" / "privacy.json").read_text(encoding="utf-8"))
    if promised["differential_privacy"]:
        lines += [f"   privacy: {promised['statement']}", f"    report: fedtune report {path}"]
    return "\n".join(lines)


def _figure(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.3g}"


def _summary(status: dict[str, Any], alive: bool) -> dict[str, Any]:
    result = status.get("result", {})
    state = status.get("status", "?")
    return {
        # A killed process could not write how it ended.
        "status": "killed" if state == "running" and not alive else state,
        "started": status.get("started", "?"),
        "round": result.get("round", "-"), "loss": result.get("loss", "-"),
    }  # fmt: skip


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _as_lines(table: dict[str, Any], indent: str = "") -> str:
    lines = []
    for key, value in table.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", _as_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {_cell(value)}")
    return "\n".join(lines)
