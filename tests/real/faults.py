"""What the tests of faults share: waiting for a moment, comparing with a quiet run, disks."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from fedtune.configfile import load
from fedtune.privacy.events import Relation, Unit
from fedtune.privacy.ledger import open_ledger
from fedtune.server.run_folder import create
from fedtune.simulations.simulate import simulate
from tests.needed import lacking
from tests.real.kit import Federation

PATIENCE = 240.0


def undisturbed(made: Federation, *settings: str, file: str = "") -> dict[str, np.ndarray]:
    """Return the adapter of the same experiment with nothing in its way."""
    torch.set_num_threads(1)
    source = made.folder / "notes.jsonl"
    own = [f'data.source="{source}"', 'engine.executor="threads"', "engine.workers=1"]
    config = load(made.folder / (file or made.file.name), [*own, *settings])
    folder = config.output.model_copy(update={"folder": str(made.folder / "quiet")})
    config = config.model_copy(update={"output": folder})
    run = create(config, label=str(time.monotonic_ns()))
    simulate(config, run, lambda _event: None)
    return made.adapter(run.path)


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[n], right[n]) for n in left)


def events(made: Federation, kind: str = "") -> list[dict[str, Any]]:
    """Return what happened in the newest run, as its folder has it."""
    try:
        text = (made.run() / "events.jsonl").read_text(encoding="utf-8")
    except (ValueError, OSError):
        return []
    rows = [json.loads(line) for line in text.rpartition("\n")[0].splitlines() if line]
    return [row for row in rows if not kind or row["event"] == kind]


def committed(made: Federation) -> int:
    return max((row["round"] for row in made.rows()), default=-1)


def until_round(made: Federation, number: int) -> None:
    made.until(lambda: committed(made) >= number, PATIENCE, f"round {number}")


def until_asked(made: Federation, number: int) -> None:
    """Wait until a cohort is at work on a round."""
    made.until(
        lambda: any(row["round"] >= number for row in events(made, "round_started")),
        PATIENCE, f"a start of round {number}",
    )  # fmt: skip


def at_work(made: Federation, name: str, kind: str = "train") -> bool:
    """Say whether a node works on a message of a kind, as its own memo has it."""
    try:
        memo = json.loads((made.folder / f"{name}.node" / "seat.json").read_text())
    except (ValueError, OSError):
        return False
    return bool(memo["at_work"]) and memo["at_work"]["message_type"] == kind


def until_at_work(made: Federation, name: str, kind: str = "train") -> None:
    end = time.monotonic() + PATIENCE
    while not at_work(made, name, kind):
        assert time.monotonic() < end, made.logs()
        time.sleep(0.002)


def gone(pids: list[int]) -> bool:
    """Say whether processes have ended; one that nobody waits for any more has."""
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                return False
    return True


@contextlib.contextmanager
def held(pid: int, number: tuple[int, int]) -> Iterator[None]:
    """Stop a process with one signal while the block runs, and let it go on with another."""
    os.kill(pid, number[0])
    try:
        yield
    finally:
        os.kill(pid, number[1])


@contextlib.contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[None]:
    """Mount a small disk at a folder; skip the test where that is not allowed."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=700", "tmpfs", str(path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        lacking(f"no small disk can be mounted here: {error}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(disk: Path) -> Path:
    """Fill a disk to its last byte; removing the file that comes back frees it."""
    file = disk / "filler"
    with contextlib.suppress(OSError), file.open("ab", buffering=0) as out:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while out.write(bytes(size)):
                    pass
    return file


def spent(place: Path, name: str, unit: Unit, relation: Relation) -> int:
    """Return how many releases a ledger holds against one account."""
    ledger = open_ledger(place)
    account = ledger.find(name, unit, relation)
    return sum(ledger.groups(account).values()) if account else 0


def updates(made: Federation, name: str) -> int:
    """Return how many updates left a node, by its own log."""
    return sum("update, " in line["what"] for line in made.sent(name))
