"""``kill -9`` of runs with a promise: nothing that was released is ever forgotten."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedtune.privacy.events import Relation, Unit
from fedtune.privacy.ledger import Ledger, open_ledger
from fedtune.privacy.plan import client_promise, ledger_place
from fedtune.server.run_folder import RunFolder, list_runs
from tests.simulations.apps import experiment
from tests.simulations.private_runs import CLIENT, EXAMPLE
from tests.simulations.warm import Warm

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("FEDTUNE_KILLS", "3"))
ROUNDS = 12 + 3 * KILLS
ADD = Relation.ADD_OR_REMOVE_ONE


@dataclass
class Story:
    """A run that was killed again and again, and what its ledger held after each kill."""

    folder: RunFolder
    ledger: Ledger
    charged: list[int] = field(default_factory=list)
    committed: list[int] = field(default_factory=list)

    def releases(self) -> int:
        account = self.ledger.account("stories", Unit.CLIENT, ADD)
        return sum(self.ledger.groups(account).values())


def start(*words: str, log: Path) -> Warm:
    return Warm("simulate", *words, log=log)


def kill(process: Warm) -> None:
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(family, timeout=5)


@pytest.fixture(scope="module")
def story(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    home = tmp_path_factory.mktemp("killed-private")
    changes: dict[str, Any] = {
        "data__holdout": 0.0, "data__pack": False, "data__max_length": 16, "tuning__steps": 1,
        "federation": {"rounds": ROUNDS, "weighting": "uniform", "cohort": 0.5},
        "evaluation": {"clients": 0}, "engine": {"executor": "threads", "workers": 1},
        "privacy": {
            "dataset": "stories", "ledger": str(home / "ledger.db"), "client": CLIENT,
            "example": EXAMPLE,
        },
    }  # fmt: skip
    file, log = experiment(home, shared, **changes), home / "log.txt"
    rng = random.Random(20261121)
    process = start(str(file), log=log)
    while not list_runs(home / "runs") and process.poll() is None:
        time.sleep(0.02)
    folder = list_runs(home / "runs")[0]
    told = Story(folder, open_ledger(ledger_place(folder.config())))
    try:
        for _ in range(KILLS):
            before, end = told.releases(), time.monotonic() + 90
            while told.releases() == before and time.monotonic() < end:
                assert process.poll() is None, log.read_text()
                time.sleep(0.01)
            time.sleep(rng.uniform(0.0, 0.5))
            kill(process)
            told.charged.append(told.releases())
            told.committed.append(max((r["round"] for r in folder.metrics()), default=0))
            told.ledger.verify()
            process = start("--resume", str(folder.path), log=log)
        assert process.wait(timeout=240) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    return told


def test_v29_no_kill_loses_a_charge(story: Story) -> None:
    assert len(story.charged) == KILLS
    assert story.charged == sorted(story.charged)
    assert all(c >= done for c, done in zip(story.charged, story.committed, strict=True))
    checked = story.ledger.verify()
    assert checked


def test_v29_the_end_costs_the_rounds_and_what_was_lost_in_flight(story: Story) -> None:
    entries = [
        e for e in story.ledger.entries(story.ledger.account("stories", Unit.CLIENT, ADD))
        if e.kind == "reserve"
    ]  # fmt: skip
    rounds = [entry.round for entry in entries]
    assert set(rounds) == set(range(1, ROUNDS + 1))
    lost = len(rounds) - ROUNDS
    assert 0 <= lost <= KILLS, "one reservation may be in flight at each kill"
    assert story.releases() == ROUNDS + lost
    promise = client_promise(story.folder.config())
    assert promise is not None
    account = story.ledger.account("stories", Unit.CLIENT, ADD)
    spent = story.ledger.spent(account, 1e-3).epsilon
    assert spent == promise.spent(ROUNDS + lost).epsilon >= promise.spent(ROUNDS).epsilon
    print(f"{KILLS} kills, {ROUNDS} rounds, {lost} lost in flight, epsilon {spent:.4f}")


def test_v29_clients_charge_every_attempt_once(story: Story) -> None:
    for client in range(4):
        account = story.ledger.account(f"stories/owner-{client}", Unit.EXAMPLE, ADD)
        entries = [e for e in story.ledger.entries(account) if e.kind == "reserve"]
        tries = [(entry.round, entry.attempt) for entry in entries]
        assert len(tries) == len(set(tries))
        assert len({number for number, _ in tries}) <= ROUNDS
