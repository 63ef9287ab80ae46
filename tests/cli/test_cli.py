"""The command: envelopes, exit codes, plans, and what people see."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from fedtune.cli.app import app
from fedtune.cli.progress import following
from fedtune.config import Config, FederationConfig
from fedtune.errors import ExitCode
from fedtune.server.events import ClientDone, Event, RoundDone, RoundStarted
from tests.simulations.apps import experiment

COMMANDS = (
    (), ("init",), ("check",), ("simulate",), ("doctor",), ("runs",), ("runs", "list"),
    ("runs", "show"),
)  # fmt: skip


def command(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def envelope(result: Result, name: str) -> dict[str, Any]:
    """Return the one JSON line on stdout, checked."""
    (line,) = result.stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    assert (found["schema"], found["command"]) == (1, name)
    assert found["ok"] is (result.exit_code == 0)
    assert found.keys() == {"schema", "command", "ok", "result" if found["ok"] else "error"}
    if not found["ok"]:
        assert found["error"].keys() == {"code", "name", "message", "hint"}
        assert found["error"]["code"] == result.exit_code
        assert found["error"]["name"] == ExitCode(result.exit_code).name.lower()
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def finished(home: Path, shared: Path) -> tuple[Path, Result]:
    """One run through the command, with overrides and a seed."""
    file = experiment(home, shared)
    changes = ("-s", "federation.rounds=3", "--set", "name=over", "--seed", "11")
    return file, command("simulate", str(file), *changes, "--json")


# ---------------------------------------------------------------- help and files


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words) or "fedtune")
def test_every_command_has_help(words: tuple[str, ...]) -> None:
    result = command(*words, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout
    assert "--help" in result.stdout
    if words not in {(), ("runs",)}:
        assert "--json" in result.stdout


def test_version() -> None:
    result = command("--version")
    assert (result.exit_code, result.stdout) == (0, version("fedtune") + "\n")


@pytest.mark.parametrize("words", [("simulat",), ("check",), ("check", "x", "--nonsense")])
def test_wrong_usage_is_2(words: tuple[str, ...]) -> None:
    result = command(*words)
    assert result.exit_code == ExitCode.USAGE
    assert result.stdout == ""
    assert "Usage:" in result.stderr


def test_nothing_to_simulate_is_2() -> None:
    result = command("simulate")
    assert result.exit_code == ExitCode.USAGE
    assert "nothing to run" in result.stderr
    assert "fedtune init" in result.stderr


def test_init_writes_a_file_that_check_accepts(tmp_path: Path, shared: Path) -> None:
    file = tmp_path / "new.toml"
    result = command("init", str(file), "--json")
    assert envelope(result, "init")["result"] == {"file": str(file)}
    assert f"fedtune simulate {file}" in result.stderr
    model = ("-s", f"model.base={shared / 'models' / 'stories260K'}")
    checked = command("check", str(file), *model, "--json")
    made = envelope(checked, "check")["result"]
    assert made["clients"] > 5
    assert made["rounds"] == 10


def test_every_value_of_the_file_of_init_is_the_default(tmp_path: Path) -> None:
    from fedtune.configfile import difference, load

    command("init", str(tmp_path / "new.toml"))
    found = difference(Config(), load(tmp_path / "new.toml"))
    # Folders start at the file's own.
    places = ("federation.server.keys: ", "federation.server.state: ")
    assert [one for one in found if not one.startswith(places)] == []


def test_init_overwrites_only_when_told(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("mine")
    result = command("init", str(file), "--json")
    error = envelope(result, "init")["error"]
    assert (error["code"], error["name"]) == (2, "usage")
    assert error["message"] == f"'{file}' is there already"
    assert "--force" in error["hint"]
    assert file.read_text() == "mine"
    assert command("init", str(file), "--force").exit_code == 0
    assert "schema = 1" in file.read_text()


# ---------------------------------------------------------------- envelopes


def test_failure_as_json_and_as_words(tmp_path: Path) -> None:
    result = command("check", str(tmp_path / "no.toml"), "--json")
    error = envelope(result, "check")["error"]
    assert result.exit_code == ExitCode.CONFIG == 10
    assert result.stderr == f"error: {error['message']}\nhint:  {error['hint']}\n"
    plain = command("check", str(tmp_path / "no.toml"))
    assert (plain.stdout, plain.stderr, plain.exit_code) == ("", result.stderr, 10)


def test_a_run_as_json(finished: tuple[Path, Result], home: Path) -> None:
    _, result = finished
    assert result.exit_code == 0, result.output
    found = envelope(result, "simulate")["result"]
    run = Path(found["run"])
    assert run.parent == home / "runs"
    assert run.name.startswith("over-")
    assert Path(found["adapter"], "adapter_model.safetensors").is_file()
    assert found["status"]["status"] == "finished"
    assert found["status"]["result"]["round"] == 3
    assert "seed = 11" in (run / "config.toml").read_text()


def test_progress_is_plain_lines_where_there_is_no_terminal(
    finished: tuple[Path, Result],
) -> None:
    _, result = finished
    lines = result.stderr.splitlines()
    assert lines[0].startswith("run folder: ")
    assert lines[1].startswith("loading model and data")
    assert re.fullmatch(r"base model: held-out \d+\.\d{4}, worst client \d+\.\d{4}", lines[2])
    line = (
        r"round {}/3: 4 ok, 0 late, 0 failed; train loss \d+\.\d{{4}}, held-out loss "
        r"\d+\.\d{{4}}, worst client \d+\.\d{{4}}; 0\.82 MB in \d+\.\d s"
    )
    for number in (1, 2, 3):
        assert re.fullmatch(line.format(number), lines[2 + number]), lines[2 + number]
    assert "\x1b" not in result.stderr


# ---------------------------------------------------------------- plans


def test_a_dry_run_predicts_the_bytes_and_leaves_nothing(
    finished: tuple[Path, Result], home: Path, shared: Path, tmp_path: Path
) -> None:
    _, done = finished
    run = Path(json.loads(done.stdout)["result"]["run"])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    counted = [row["bytes_down"] + row["bytes_up"] for row in rows[1:]]
    file = experiment(tmp_path, shared)
    words = ("--dry-run", "-s", "federation.rounds=3", "--seed", "11", "--json")
    made = envelope(command("simulate", str(file), *words), "simulate")["result"]
    assert made.keys() == {
        "name", "base", "clients", "clients_without_examples", "examples", "examples_per_client",
        "truncated", "adapter", "method", "averaging", "parameters", "parameters_trained",
        "context", "rounds", "cohort", "steps", "bytes_down_per_client", "bytes_up_per_client",
        "bytes_per_round", "bytes", "client_memory_mb", "notes", "privacy",
    }  # fmt: skip
    for sent in counted:
        assert abs(made["bytes_per_round"] / sent - 1) < 0.02
    assert abs(made["bytes"] / sum(counted) - 1) < 0.02
    print(f"dry run: {made['bytes_per_round']} predicted, counted {counted}")
    assert made["steps"] == 4 * 3 * 3
    assert made["clients"] == made["cohort"] == 4
    assert made["context"] == 512
    assert not (tmp_path / "runs").exists()


def test_a_plan_for_people(finished: tuple[Path, Result]) -> None:
    file, _ = finished
    checked, dry = command("check", str(file)), command("simulate", str(file), "--dry-run")
    assert checked.stdout == dry.stdout
    assert "clients      4, 4 each round, 2 rounds" in checked.stdout
    assert "steps        24 of the optimiser" in checked.stdout


def test_a_dry_run_without_a_file() -> None:
    result = command("simulate", "--dry-run", "--resume", "latest")
    assert result.exit_code == ExitCode.USAGE
    assert "--dry-run needs an experiment file" in result.stderr


# ---------------------------------------------------------------- runs


def test_runs_list(finished: tuple[Path, Result], home: Path, tmp_path: Path) -> None:
    (entry,) = envelope(command("runs", "list", "--folder", str(home / "runs"), "--json"),
                        "runs list")["result"]["runs"]  # fmt: skip
    assert entry["status"] == "finished"
    assert entry["round"] == 3
    text = command("runs", "list", "--folder", str(home / "runs")).stdout
    assert entry["run"] in text
    assert "finished" in text
    empty = command("runs", "list", "--folder", str(tmp_path))
    assert (empty.exit_code, empty.stdout) == (0, f"no runs in '{tmp_path}'\n")


@pytest.mark.parametrize("how", ["latest", "name", "path"])
def test_runs_show(finished: tuple[Path, Result], home: Path, how: str) -> None:
    run = Path(json.loads(finished[1].stdout)["result"]["run"])
    name = {"latest": "latest", "name": run.name, "path": str(run)}[how]
    words = ("runs", "show", name, "--folder", str(home / "runs"))
    found = envelope(command(*words, "--json"), "runs show")["result"]
    assert found["path"] == str(run)
    assert [row["round"] for row in found["metrics"]] == [0, 1, 2, 3]
    assert "seed: 0 -> 11" in found["settings"]
    text = command(*words).stdout
    assert "seed: 0 -> 11" in text
    assert "train_loss" in text


def test_runs_show_what_is_not_there(tmp_path: Path) -> None:
    result = command("runs", "show", "latest", "--folder", str(tmp_path), "--json")
    error = envelope(result, "runs show")["error"]
    assert result.exit_code == ExitCode.RUN_FOLDER
    assert error["message"] == f"no run 'latest' in '{tmp_path}'"


def test_doctor() -> None:
    found = envelope(command("doctor", "--json"), "doctor")["result"]
    assert found["engines"]["local"] == "ok"
    assert found["engines"]["ray"].startswith("ok (ray ")
    assert found["cores"] >= 1
    assert found["packages"]["fedtune"] == version("fedtune")
    assert "engines:" in command("doctor").stdout


# ---------------------------------------------------------------- the live view


def _row(number: int) -> dict[str, Any]:
    return {
        "round": number, "clients_ok": 7, "clients_late": 1, "clients_failed": 1,
        "clients_dropped": 1, "bytes_down": 3_000_000, "bytes_up": 1_560_000,
        "train_loss": 2.25, "loss": 1.125 + number, "client_worst": 3.5, "seconds": 1.0,
    }  # fmt: skip


EVENTS: tuple[Event, ...] = (
    RoundDone(0, {"round": 0, "loss": 4.0625, "client_worst": 5.0}),
    RoundStarted(1, 0, 10),
    RoundStarted(1, 1, 10),
    *(ClientDone(1, f"c{i}", "ok", "", 10) for i in range(7)),
    ClientDone(1, "slow", "late", "no answer within 2 s", 0),
    ClientDone(1, "broken", "failed", "[/red] has lost its glasses", 0),
    ClientDone(1, "evil", "dropped", "holds NaN or infinity", 10),
    RoundDone(1, _row(1)),
)


def shown(console: Console) -> None:
    config = Config(name="watched", federation=FederationConfig(rounds=5))
    with following(config, console) as hear:
        for event in EVENTS:
            hear(event)


def test_the_live_view_on_a_terminal() -> None:
    screen = StringIO()
    shown(Console(force_terminal=True, file=screen, width=140, height=50))
    assert "\x1b[" in screen.getvalue()
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).rpartition("watched")[2]
    flat = " ".join(last.split())
    assert "round ok late failed train loss held-out worst client MB" in flat
    assert "1 7 1 2 2.2500 2.1250 3.5000 4.56" in flat
    assert "0 0 - 4.0625 5.0000 0.00" in flat
    assert "1/5" in flat
    assert "10/10" in flat
    assert "round 1: 1 dropped, 1 failed, 1 late, 7 ok" in flat
    assert "broken failed: [/red] has lost its glasses" in flat
    assert "slow late: no answer within 2 s" in flat


def test_the_same_as_plain_lines() -> None:
    text = StringIO()
    shown(Console(file=text, width=60))
    assert text.getvalue().splitlines() == [
        "base model: held-out 4.0625, worst client 5.0000",
        "  round 1: too few answers, attempt 1",
        "  round 1: client 'slow' late: no answer within 2 s",
        "  round 1: client 'broken' failed: [/red] has lost its glasses",
        "  round 1: client 'evil' dropped: holds NaN or infinity",
        "round 1/5: 7 ok, 1 late, 2 failed; train loss 2.2500, held-out loss 2.1250, "
        "worst client 3.5000; 4.56 MB in 1.0 s",
    ]
