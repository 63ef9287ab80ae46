"""``kill -9`` at any moment, then ``--resume``: the adapter of a run that was never stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedtune.cli.app import app
from fedtune.errors import ExitCode
from fedtune.server.run_folder import RunFolder, list_runs
from tests.simulations.apps import adapter_bytes, experiment, run_here, settings

pytestmark = pytest.mark.slow

ROUNDS, KILLS = 12, 4
SEED = 20261121
CHANGES: dict[str, Any] = {
    "tuning__keep_optimizer": True,
    "tuning__steps": 20,  # a round must take longer than a kill
    "federation": {
        "rounds": ROUNDS, "cohort": 0.5, "server_optimizer": {"name": "momentum", "lr": 0.7},
    },
    "engine": {"executor": "processes", "workers": 2},
}  # fmt: skip


@dataclass
class Story:
    """A run that was killed again and again, and what was seen meanwhile."""

    file: Path
    folder: RunFolder
    killed_after: list[int] = field(default_factory=list)
    survivors: list[psutil.Process] = field(default_factory=list)
    second: Result | None = None


def command(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def envelope(result: Result) -> dict[str, Any]:
    (line,) = result.stdout.splitlines()
    return dict(json.loads(line))


def wait_until(true: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.01)
    return found


def gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def lines(folder: RunFolder) -> int:
    file = folder.path / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def start(*words: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "fedtune", "simulate", *words], stdout=output, stderr=output
        )


@pytest.fixture(scope="module")
def unbroken(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The same experiment without a stop, on threads: an engine changes no bit."""
    changes = CHANGES | {"engine": {"executor": "threads", "workers": 1}}
    return run_here(settings(tmp_path_factory.mktemp("unbroken"), shared, **changes))


@pytest.fixture(scope="module")
def story(unbroken: RunFolder, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Start a run, kill it after each of its rounds at a random moment, and let it finish."""
    home = tmp_path_factory.mktemp("killed")
    file = experiment(home, shared, **CHANGES)
    rng = random.Random(SEED)
    log = home / "log.txt"
    process = start(str(file), log=log)
    assert wait_until(lambda: bool(list_runs(home / "runs")), 60), log.read_text()
    told = Story(file, list_runs(home / "runs")[0])
    try:
        for kill in range(KILLS):
            wanted = max(1, lines(told.folder) + 1)  # the first line is the base model's
            seen = wait_until(
                lambda n=wanted, p=process: lines(told.folder) >= n or p.poll() is not None, 200
            )
            assert seen, f"no line {wanted}\n{log.read_text()}"
            assert process.poll() is None, f"ended by itself\n{log.read_text()}"
            if kill == 0:
                told.second = command("simulate", "--resume", str(told.folder.path), "--json")
            delay = rng.uniform(0.0, 0.3)
            time.sleep(delay)
            parent = psutil.Process(process.pid)
            direct, family = parent.children(), parent.children(recursive=True)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            told.killed_after.append(lines(told.folder))
            _, alive = psutil.wait_procs([p for p in family if p not in direct], timeout=5)
            # What imports for workers ends at the end of its imports.
            alive += psutil.wait_procs(direct, timeout=60)[1]
            told.survivors += [p for p in alive if not gone(p)]
            print(f"seed {SEED}: kill {kill} after line {wanted} and {delay:.3f} s")
            process = start(str(file), "--resume", str(told.folder.path), log=log)
        assert process.wait(timeout=120) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    return told


def test_killed_runs_end_with_the_adapter_of_an_unbroken_one(
    story: Story, unbroken: RunFolder
) -> None:
    assert len(set(story.killed_after)) == KILLS, "each kill came after a round of its own"
    assert story.killed_after[-1] <= ROUNDS
    assert adapter_bytes(story.folder) == adapter_bytes(unbroken)


def test_every_round_is_recorded_once_with_the_unbroken_figures(
    story: Story, unbroken: RunFolder
) -> None:
    # Message ids start anew with the process, and are a byte shorter or longer on the wire.
    other = ("seconds", "memory_mb", "bytes_down", "bytes_up", "bytes_evaluation")
    ours, theirs = (
        [{k: v for k, v in row.items() if k not in other} for row in folder.metrics()]
        for folder in (story.folder, unbroken)
    )
    assert [row["round"] for row in ours] == list(range(ROUNDS + 1))
    assert ours == theirs
    rows = [(row["round"], row["client"]) for row in story.folder.client_rows()]
    assert len(rows) == len(set(rows)) == 2 * ROUNDS
    assert rows == [(row["round"], row["client"]) for row in unbroken.client_rows()]
    table = (story.folder.path / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table] == ["round", *map(str, range(ROUNDS + 1))]


def test_workers_of_a_killed_run_are_gone(story: Story) -> None:
    assert story.survivors == []


def test_a_second_process_on_the_same_run_is_refused(story: Story) -> None:
    assert story.second is not None
    assert story.second.exit_code == ExitCode.RUN_FOLDER
    error = envelope(story.second)["error"]
    assert error["message"] == (f"run '{story.folder.path}' is being worked on by another process")
    assert error["hint"] == "wait for it, or stop it"


def test_resuming_a_finished_run_changes_nothing(story: Story) -> None:
    before = adapter_bytes(story.folder)
    records = (story.folder.path / "metrics.jsonl").read_bytes()
    started = time.monotonic()
    result = command(
        "simulate", str(story.file), "--resume", "latest", "-s", "engine.executor=threads",
        "-s", "engine.workers=1", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert time.monotonic() - started < 15
    assert envelope(result)["result"]["status"]["status"] == "finished"
    assert adapter_bytes(story.folder) == before
    assert (story.folder.path / "metrics.jsonl").read_bytes() == records


def test_resuming_with_other_settings_is_refused_with_the_difference(story: Story) -> None:
    before = {p: p.read_bytes() for p in story.folder.path.rglob("*") if p.is_file()}
    changes = ("-s", "tuning.lr=0.5", "-s", "federation.rounds=9")
    result = command("simulate", str(story.file), "--resume", "latest", *changes, "--json")
    assert result.exit_code == ExitCode.RESUME_REFUSED == 14
    error = envelope(result)["error"]
    assert error["name"] == "resume_refused"
    assert f"federation.rounds: {ROUNDS} -> 9; tuning.lr: 0.01 -> 0.5" in error["message"]
    assert "new run without --resume" in error["hint"]
    result = command("simulate", str(story.file), "--resume", "latest", "--seed", "8")
    assert result.exit_code == 14
    assert "seed: 7 -> 8" in result.stderr
    assert {p: p.read_bytes() for p in story.folder.path.rglob("*") if p.is_file()} == before


def test_overrides_count_without_the_file_too(story: Story) -> None:
    changes = ("-s", "tuning.lr=0.5")
    result = command("simulate", "--resume", str(story.folder.path), *changes)
    assert result.exit_code == ExitCode.RESUME_REFUSED
    assert "tuning.lr: 0.01 -> 0.5" in result.stderr


def test_resuming_what_is_not_there(story: Story, tmp_path: Path) -> None:
    result = command("simulate", str(story.file), "--resume", "nobody")
    assert result.exit_code == ExitCode.RUN_FOLDER
    assert "no run 'nobody' in" in result.stderr
    assert "fedtune runs list" in result.stderr
    result = command("simulate", str(story.file), "--resume", str(tmp_path))
    assert result.exit_code == ExitCode.RUN_FOLDER


def test_ctrl_c_while_all_is_loaded_is_answered_in_one_voice(shared: Path, tmp_path: Path) -> None:
    file, log = experiment(tmp_path, shared, **CHANGES), tmp_path / "log.txt"
    # A shell has background processes ignore Ctrl-C; this one is in front.
    front = "import signal as s, runpy; s.signal(s.SIGINT, s.default_int_handler); "
    words = [sys.executable, "-c", front + "runpy.run_module('fedtune', run_name='__main__')"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*words, "simulate", str(file)], stdout=out, stderr=out, start_new_session=True
        )
    family: list[psutil.Process] = []
    try:
        parent = psutil.Process(process.pid)
        assert wait_until(lambda: len(parent.children()) == 2, 60), log.read_text()
        family = parent.children(recursive=True)
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == ExitCode.INTERRUPTED
    finally:
        process.kill()
    # What imports notices at the end of its imports that it is alone.
    _, alive = psutil.wait_procs(family, timeout=60)
    assert [p for p in alive if not gone(p)] == []
    said = log.read_text()
    assert "Traceback" not in said
    assert said.count("error: stopped") == 1


def test_a_half_written_last_line_never_counted(shared: Path, tmp_path: Path) -> None:
    """A crash between the records and the checkpoint, or inside of a record."""
    config = settings(tmp_path, shared)
    whole = run_here(config)
    expected, figures = adapter_bytes(whole), whole.metrics()
    (whole.checkpoints / "round-000002.safetensors").unlink()
    with (whole.path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "lo')
    words = ("simulate", str(tmp_path / "experiment.toml"), "--resume", str(whole.path))
    result = command(*words)
    assert result.exit_code == 0, result.output
    assert adapter_bytes(whole) == expected
    assert [row["loss"] for row in whole.metrics()] == [row["loss"] for row in figures]
    assert len(whole.client_rows()) == 8


def test_a_damaged_checkpoint_is_named(shared: Path, tmp_path: Path) -> None:
    """The hint leads on: without the damaged file the run goes back one round."""
    whole = run_here(settings(tmp_path, shared))
    expected = adapter_bytes(whole)
    last = whole.checkpoints / "round-000002.safetensors"
    last.write_bytes(last.read_bytes()[:1000])
    words = ("simulate", str(tmp_path / "experiment.toml"), "--resume", str(whole.path))
    result = command(*words)
    assert result.exit_code == ExitCode.STORAGE
    assert "round-000002.safetensors' cannot be read" in result.stderr
    assert "remove it to fall back to the one before" in result.stderr
    assert len(whole.metrics()) == 3
    last.unlink()
    assert command(*words).exit_code == 0
    assert adapter_bytes(whole) == expected


def test_resuming_on_other_rows_is_refused(shared: Path, tmp_path: Path) -> None:
    file = experiment(tmp_path, shared)
    first = command("simulate", str(file), "--json", "-s", "federation.rounds=1")
    run = envelope(first)["result"]["run"]
    data = tmp_path / "rows.jsonl"
    data.write_text(data.read_text().replace("the", "that"))
    again = command("simulate", "--resume", run, "--json")
    assert again.exit_code == ExitCode.RESUME_REFUSED
    assert "have changed since it began" in envelope(again)["error"]["message"]
