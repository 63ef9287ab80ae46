"""Run folders that stand somewhere, written by the parts that write real ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedtune.config import Config
from fedtune.server.event_log import EVENTS, EventLog
from fedtune.server.events import ClientDone, RoundDone, RoundStarted
from fedtune.server.run_folder import create
from fedtune.server.snapshot import NodeView, Snapshot, snapshot_of

EXAMPLE: dict[str, Any] = {
    "relation": "add-or-remove-one", "population": 1000, "delta": 1e-5, "noise_multiplier": 1.0,
    "epsilon": 8.0,
}  # fmt: skip
CLIENT: dict[str, Any] = EXAMPLE | {"population": 10, "delta": 1e-3}
HOSTILE = "<script>alert(1)</script>"


def config_of(place: Path, rounds: int = 4, **privacy: Any) -> Config:
    """An experiment of so many rounds; ``privacy`` is its ``[privacy]`` table."""
    table: dict[str, Any] = {
        "name": "ward-notes", "federation": {"rounds": rounds, "weighting": "uniform"},
        "output": {"folder": str(place / "runs")},
    }  # fmt: skip
    if privacy:
        table |= {
            "privacy": {"ledger": str(place / "ledger.db"), **privacy},
            "evaluation": {"clients": 0}, "tuning": {"steps": 3},
            "data": {"holdout": 0.0, "pack": False},
        }  # fmt: skip
    if "client" in privacy:
        table["federation"]["cohort"] = 0.5
    return Config.model_validate(table)


class Run:
    """Writes a run folder as the round loop does: events, then a row for each round."""

    def __init__(self, place: Path, rounds: int = 4, **privacy: Any) -> None:
        self.config = config_of(place, rounds, **privacy)
        self.folder = create(self.config)
        self.log = EventLog(self.folder.path / EVENTS)

    def base(self, **row: Any) -> None:
        self._commit({"round": 0, "loss": 4.5} | row, [])

    def begin(self, number: int, cohort: int = 3, attempt: int = 0) -> None:
        self.log.hear(RoundStarted(number, attempt, cohort))

    def done(self, number: int, client: str, outcome: Any = "ok", reason: str = "") -> None:
        self.log.hear(ClientDone(number, client, outcome, reason, 1000))

    def commit(self, number: int, outcomes: dict[str, str], **row: Any) -> None:
        clients = [
            {"round": number, "client": name, "outcome": what.partition(":")[0],
             "reason": what.partition(":")[2]}
            for name, what in outcomes.items()
        ]  # fmt: skip
        kinds = [entry["outcome"] for entry in clients]
        counts = {f"clients_{k}": kinds.count(k) for k in ("ok", "late", "failed", "dropped")}
        known = {"loss": 4.5 - number / 4, "train_loss": 4.4 - number / 4, "seconds": 2.0,
                 "bytes_down": 3_000_000, "bytes_up": 2_000_000}  # fmt: skip
        self._commit({"round": number} | counts | known | row, clients)

    def round(self, number: int, *names: str) -> None:
        """One whole round in which everybody answers."""
        self.begin(number, len(names))
        for name in names:
            self.done(number, name)
        self.commit(number, dict.fromkeys(names, "ok"))

    def look(self, *names: str, **known: Any) -> Snapshot:
        nodes = [NodeView(name, "online", 1_700_000_000.0) for name in names]
        return snapshot_of(self.folder, nodes, **known)

    def _commit(self, row: dict[str, Any], clients: list[dict[str, Any]]) -> None:
        self.folder.append(row, clients)
        self.log.hear(RoundDone(row["round"], row))


@contextmanager
def working(run: Run) -> Iterator[Run]:
    """A process is at work on the run."""
    with run.folder.lock():
        yield run
