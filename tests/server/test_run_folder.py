from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import Config
from fedtune.errors import ExitCode, FedtuneError
from fedtune.server.run_folder import METRICS, RunFolder, create, find, list_runs, reopen

_LOCK = """
import sys
from pathlib import Path
from fedtune.server.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def config(root: Path, **tables: Any) -> Config:
    output = {"folder": str(root)} | tables.pop("output", {})
    return Config.model_validate({"name": "demo", "output": output} | tables)


def fill(folder: RunFolder, rounds: int) -> None:
    for number in range(rounds):
        clients = [{"round": number, "client": c, "outcome": "ok"} for c in ("a", "b\u2028,\n")]
        row = {"round": number, "loss": 2.5 / (number + 1), "lr": 0.1, "more": "x"}
        folder.append(row, clients)


def test_a_new_run_has_its_settings_and_a_name_of_its_own(tmp_path: Path) -> None:
    chosen = config(tmp_path, seed=5)
    first, second = create(chosen, "x"), create(chosen, "x")
    assert (first.path.name, second.path.name) == ("demo-x", "demo-x-2")
    assert first.config() == chosen
    assert first.status()["status"] == "running"
    assert set(first.status()["versions"]) >= {"fedtune", "flwr", "torch", "peft"}
    assert first.metrics() == []
    first.update_status(status="finished", result={"loss": 1.0})
    assert first.status()["result"] == {"loss": 1.0}
    assert "versions" in first.status()
    assert {run.path for run in list_runs(tmp_path)} == {first.path, second.path}
    assert find("demo-x", tmp_path) == first
    assert find(str(second.path), Path("nowhere")) == second
    assert find("latest", tmp_path).path in (first.path, second.path)
    with pytest.raises(FedtuneError, match="no run 'none'") as caught:
        find("none", tmp_path)
    assert caught.value.code == ExitCode.RUN_FOLDER


def table(folder: RunFolder) -> list[dict[str, str]]:
    with (folder.path / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_says_what_the_lines_say(tmp_path: Path) -> None:
    folder = create(config(tmp_path), "x")
    fill(folder, 3)
    rows, lines = table(folder), folder.metrics()
    assert tuple(rows[0]) == METRICS
    assert len(rows) == len(lines) == 3
    for row, line in zip(rows, lines, strict=True):
        for name in METRICS:
            assert row[name] == (str(line[name]) if name in line else "")
    assert [r["client"] for r in folder.client_rows()] == ["a", "b\u2028,\n"] * 3


def test_rounds_that_do_not_count_are_forgotten(tmp_path: Path) -> None:
    folder = create(config(tmp_path), "x")
    fill(folder, 4)
    for name in ("metrics.jsonl", "clients.jsonl"):
        with (folder.path / name).open("a") as file:
            file.write('{"round": 4, "lo')
    assert [row["round"] for row in folder.metrics()] == [0, 1, 2, 3]
    folder.forget_after(1)
    assert [row["round"] for row in folder.metrics()] == [0, 1]
    assert [row["round"] for row in folder.client_rows()] == [0, 0, 1, 1]
    assert [row["round"] for row in table(folder)] == ["0", "1"]
    folder.append({"round": 2, "loss": 0.5}, [{"round": 2, "client": "a"}])
    assert [row["round"] for row in folder.metrics()] == [0, 1, 2]
    assert [row["loss"] for row in table(folder)] == ["2.5", "1.25", "0.5"]
    folder.forget_after(-1)
    assert folder.metrics() == folder.client_rows() == table(folder) == []


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    folder = create(config(tmp_path, seed=1), "x")
    changed = config(tmp_path, seed=2, tuning={"lr": 0.5})
    with pytest.raises(FedtuneError) as caught:
        reopen(folder.path, changed)
    assert caught.value.code == ExitCode.RESUME_REFUSED
    assert "seed: 1 -> 2; tuning.lr: 0.001 -> 0.5" in str(caught.value)


def test_engine_and_output_may_change(tmp_path: Path) -> None:
    folder = create(config(tmp_path), "x")
    other = config(
        tmp_path / "y", output={"loggers": ["mlflow"]}, engine={"kind": "ray", "workers": 3}
    )
    assert reopen(folder.path, other) == folder
    assert reopen(folder.path) == folder
    with pytest.raises(FedtuneError, match="is no run folder") as caught:
        reopen(tmp_path)
    assert caught.value.code == ExitCode.RUN_FOLDER


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    folder = create(config(tmp_path), "x")
    with subprocess.Popen(
        [sys.executable, "-c", _LOCK, str(folder.path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(FedtuneError, match="by another process") as caught, folder.lock():
            pass
        assert caught.value.code == ExitCode.RUN_FOLDER
        other.kill()
        other.wait()
        with folder.lock():
            assert (folder.path / ".lock").is_file()
