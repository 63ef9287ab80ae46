"""The folder of one run: everything it was, did and left, safe against a crash.

RUN/config.toml      effective settings
RUN/run.json         status, versions, result
RUN/metrics.jsonl    one line per round      RUN/metrics.csv   the same
RUN/clients.jsonl    one line per client and round
RUN/checkpoints/     round-000007.safetensors, ...
RUN/adapter/         the result, in PEFT format
RUN/loss.png         the picture
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import platform
import secrets
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedtune.config import Config
from fedtune.configfile import difference, dumps, parse
from fedtune.errors import ExitCode, FedtuneError
from fedtune.files import storage, try_lock, write_atomic, write_json
from fedtune.jsonlines import add_rows, read_rows, write_rows
from fedtune.privacy.rldp import DECISIONS

__all__ = ["METRICS", "RunFolder", "create", "find", "list_runs", "reopen"]

METRICS = (
    "round", "attempt", "lr", "clients_ok", "clients_late", "clients_failed", "clients_dropped",
    "bytes_down", "bytes_up", "bytes_cut", "bytes_evaluation", "train_loss", "update_norm",
    "epsilon_example", "epsilon_client",
    "aggregation_error", "residual_lost", "loss", "perplexity", "accuracy", "macro_f1",
    "client_mean", "client_worst", "client_p10", "clients_evaluated", "seconds", "memory_mb",
)  # fmt: skip
"""Columns of ``metrics.csv``; explained in docs/run-folder.md."""

_STOP = "stop"
_PACKAGES = ("fedtune", "flwr", "torch", "transformers", "peft", "numpy", "safetensors")


@dataclass(frozen=True)
class RunFolder:
    """Paths and records of one run."""

    path: Path

    @property
    def adapter(self) -> Path:
        """The result."""
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        """State after each round."""
        return self.path / "checkpoints"

    @property
    def clients(self) -> Path:
        """What simulated clients keep for themselves between rounds."""
        return self.path / "clients"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep this run to one process; the lock ends with the process, however it ends."""
        with storage(self.path):
            file = (self.path / ".lock").open("w")
        with file:
            # Whoever only looks whether the run is alive holds the lock for an instant.
            patience = 10
            while not try_lock(file) and (patience := patience - 1):
                time.sleep(0.1)
            if not patience:
                raise FedtuneError(
                    f"run '{self.path}' is being worked on by another process",
                    hint="wait for it, or stop it",
                    code=ExitCode.RUN_FOLDER,
                )
            yield

    def is_alive(self) -> bool:
        """Say whether a process is working on this run now."""
        try:
            with (self.path / ".lock").open("r") as file:
                return not try_lock(file)
        except OSError:
            return False

    def config(self) -> Config:
        """Read the settings the run was started with."""
        file = self.path / "config.toml"
        if not file.is_file():
            raise FedtuneError(
                f"'{self.path}' is no run folder: it has no config.toml",
                hint="see: fedtune runs list",
                code=ExitCode.RUN_FOLDER,
            )
        return parse(tomllib.loads(file.read_text(encoding="utf-8")))

    def status(self) -> dict[str, Any]:
        """Read ``run.json``."""
        file = self.path / "run.json"
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}

    def update_status(self, **changes: Any) -> None:
        """Change some keys of ``run.json``."""
        write_json(self.path / "run.json", self.status() | changes)

    def job(self) -> str:
        """Return the name that ledgers know this run by; it is no other run's."""
        if not (found := self.status().get("job")):
            found = f"{self.path.name}-{secrets.token_hex(4)}"
            self.update_status(job=found)
        return str(found)

    @property
    def books(self) -> Path:
        """The server's copy of what clients' own ledgers, elsewhere, hold of this run."""
        return self.path / "books.db"

    def stop(self) -> None:
        """Ask whoever works on this run to stop before its next round: ``fedtune runs stop``."""
        write_atomic(self.path / _STOP, b"")

    def require_wanted(self) -> None:
        """Raise where somebody asked for this run to stop; the wish is fulfilled by that."""
        if (self.path / _STOP).exists():
            (self.path / _STOP).unlink(missing_ok=True)
            raise FedtuneError(
                f"run '{self.path.name}' was stopped: fedtune runs stop",
                hint="its rounds are kept; go on with --resume", code=ExitCode.INTERRUPTED,
            )  # fmt: skip

    def begin_session(self) -> int:
        """Return how often this run was begun before; durable, so that no number comes twice."""
        before = int(self.status().get("sessions", 0))
        self.update_status(sessions=before + 1)
        return before

    def metrics(self) -> list[dict[str, Any]]:
        """Read one mapping per recorded round, oldest first."""
        return read_rows(self.path / "metrics.jsonl")

    def client_rows(self) -> list[dict[str, Any]]:
        """Read one mapping per client and round."""
        return read_rows(self.path / "clients.jsonl")

    def append(self, row: Mapping[str, Any], clients: Iterable[Mapping[str, Any]]) -> None:
        """Record one round, before its checkpoint makes it count."""
        add_rows(self.path / "clients.jsonl", clients)
        add_rows(self.path / "metrics.jsonl", [row])
        with storage(self.path / "metrics.csv"), (self.path / "metrics.csv").open("a") as file:
            file.write(_csv_row(row))

    def decided(self, number: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Record what the server's clipping policy chose for a round, if there is any."""
        add_rows(self.path / DECISIONS, ({"round": number, **row} for row in rows))

    def decisions(self) -> dict[str, list[dict[str, Any]]]:
        """Read what clipping policies chose, by client; under ``""`` the server's own.

        A round that was tried again is there once, as it was last.
        """
        found = {"": read_rows(self.path / DECISIONS)}
        for path in sorted((self.path / "clients").glob(f"*/{DECISIONS}")):
            found[path.parent.name] = read_rows(path)
        once = {
            name: {row["step"]: row for row in rows if isinstance(row.get("step"), int)}
            for name, rows in found.items()
        }
        return {name: [rows[step] for step in sorted(rows)] for name, rows in once.items() if rows}

    def forget_after(self, last: int) -> None:
        """Drop records of rounds after ``last``: their checkpoint never came to be."""
        kept = [row for row in self.metrics() if row["round"] <= last]
        clients = [r for r in self.client_rows() if r["round"] <= last]
        write_rows(self.path / "metrics.jsonl", kept)
        write_rows(self.path / "clients.jsonl", clients)
        if (self.path / DECISIONS).exists():
            decided = [r for r in read_rows(self.path / DECISIONS) if r["round"] <= last]
            write_rows(self.path / DECISIONS, decided)
        table = _csv_row(dict(zip(METRICS, METRICS, strict=True))) + "".join(map(_csv_row, kept))
        write_atomic(self.path / "metrics.csv", table.encode())


def create(config: Config, label: str = "") -> RunFolder:
    """Make the folder of a new run, named by experiment and time."""
    stamp = label or datetime.now().strftime("%Y%m%d-%H%M%S")
    root = Path(config.output.folder).expanduser()
    path, again = root / f"{config.name}-{stamp}", 1
    with storage(root):
        root.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                path.mkdir()
                break
            except FileExistsError:
                again += 1
                path = root / f"{config.name}-{stamp}-{again}"
    folder = RunFolder(path)
    write_atomic(path / "config.toml", dumps(config).encode())
    write_json(
        path / "run.json",
        {
            "status": "running",
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in _PACKAGES},
        },
    )
    folder.forget_after(-1)
    return folder


def reopen(path: Path, config: Config | None = None) -> RunFolder:
    """Open a run to go on with it.

    Raises
    ------
    FedtuneError
        ``ExitCode.RESUME_REFUSED`` when ``config`` differs from the run's own in
        anything but engine and logging, with every difference in the message.
    """
    folder = RunFolder(path)
    own = folder.config()
    if config is not None:
        federation = config.federation.model_copy(update={"server": own.federation.server})
        free = {"engine": own.engine, "output": own.output, "federation": federation}
        if changes := difference(own, config.model_copy(update=free)):
            raise FedtuneError(
                f"'{path}' was started with other settings: {'; '.join(changes)}",
                hint="resume with the same file, or start a new run without --resume",
                code=ExitCode.RESUME_REFUSED,
            )
    return folder


def list_runs(root: Path) -> list[RunFolder]:
    """Return the runs under a folder, oldest first."""
    found = [RunFolder(p.parent) for p in root.glob("*/run.json")]
    return sorted(found, key=lambda run: (str(run.status().get("started", "")), run.path.name))


def find(name: str, root: Path) -> RunFolder:
    """Return a run by path, by name, or ``latest``."""
    runs = list_runs(root)
    if name == "latest" and runs:
        return runs[-1]
    for path in (Path(name), root / name):
        if (path / "run.json").is_file():
            return RunFolder(path)
    raise FedtuneError(
        f"no run '{name}' in '{root}'", hint="see: fedtune runs list", code=ExitCode.RUN_FOLDER
    )


def _csv_row(row: Mapping[str, Any]) -> str:
    buffer = io.StringIO()
    csv.DictWriter(buffer, METRICS, restval="", extrasaction="ignore").writerow(row)
    return buffer.getvalue()
