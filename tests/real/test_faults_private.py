"""What leaves was paid for, whatever dies: deaths and full disks under a privacy promise."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from fedtune.errors import ExitCode
from fedtune.privacy.events import Relation, Unit
from fedtune.wire import unpack_tensors
from tests.real.faults import (
    PATIENCE,
    at_work,
    committed,
    events,
    fill,
    held,
    small_disk,
    spent,
    until_asked,
    until_at_work,
    until_round,
    updates,
)
from tests.real.kit import Federation, federation, rows_of
from tests.real.test_faults import kill
from tests.real.test_federation import DISTRIBUTED, PRIVATE, UNIFORM

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

_STOP = (signal.SIGSTOP, signal.SIGCONT)
_RELEASES = 2


def paid(made: Federation, name: str) -> int:
    """Return the releases that a node's own ledger holds; never fewer than what left."""
    place = made.folder / f"{name}.node" / "ledger.db"
    found = spent(place, f"{name}/{name}", Unit.EXAMPLE, Relation.ADD_OR_REMOVE_ONE)
    assert found >= updates(made, name) * _RELEASES, name
    return found


def test_a_full_disk_and_every_death_leave_no_release_unpaid(tmp_path: Path) -> None:
    """The node's disk is full, then the run's; then the ServerApp dies, then the node.

    While one of them suffers the other node is held: no round ends meanwhile.
    """
    settings = UNIFORM + "retries = 2\n"
    home, runs = tmp_path / "ward-1.node", tmp_path / "runs"
    with (
        small_disk(home, 4),
        small_disk(runs, 24),
        federation(
            tmp_path, ("ward-1", "ward-2"), rounds=6, more=PRIVATE, settings=settings
        ) as made,
    ):
        server = made.serve()
        first, second = made.join("ward-1"), made.join("ward-2")
        until_at_work(made, "ward-1")
        with held(second.running.pid, _STOP):
            made.until(lambda: not at_work(made, "ward-1"), PATIENCE, "an answer")
            filler = fill(home)
        made.until(
            lambda: any(row["outcome"] == "failed" for row in events(made, "client_done")),
            PATIENCE, "a refusal",
        )  # fmt: skip
        filler.unlink()
        refused = next(row for row in events(made, "client_done") if row["outcome"] == "failed")
        assert refused["client"] == "ward-1", refused
        assert str(home) not in refused["reason"]
        full = ("disk is full", "No space left on device")
        made.until(lambda: any(words in first.text for words in full), 10, "words")
        assert first.alive()

        with held(second.running.pid, _STOP):
            filler = fill(runs)
        assert server.wait(PATIENCE) == ExitCode.STORAGE, made.logs()
        assert "No space left on device" in server.text
        reached = committed(made)
        filler.unlink()
        assert reached < 4

        server = made.serve("--resume", "latest")
        until_round(made, reached + 1)
        until_asked(made, reached + 2)
        with held(second.running.pid, _STOP):
            kill(made, server, "serverapp")
        until_round(made, reached + 2)

        # A dead node's round is charged, and nothing of it left; nobody waits for its return.
        before = paid(made, "ward-1")
        until_at_work(made, "ward-1")
        first.kill()
        first = made.join("ward-1")
        assert server.wait(PATIENCE) == 0, made.logs()
        assert paid(made, "ward-1") >= before
        assert [row["round"] for row in made.rows()] == list(range(7))
        for name in made.names:
            mine = paid(made, name)
            books = spent(
                made.run() / "books.db", f"ward-notes/{name}", Unit.EXAMPLE,
                Relation.ADD_OR_REMOVE_ONE,
            )  # fmt: skip
            assert books >= mine > 0


def test_a_secure_sum_outlives_its_server_and_its_members(tmp_path: Path) -> None:
    """A node dies between its mask and the reveal; the ServerApp between the sum and the commit."""
    public = [json.dumps({"text": row["text"]}) for row in rows_of("public", 200)]
    (tmp_path / "public.jsonl").write_text("\n".join(public))
    more = DISTRIBUTED.replace("[privacy]", "[privacy]\ninsecure_seeded_noise = true", 1)
    settings = UNIFORM + "[federation.secure]\ncolluding = 0\n"
    with federation(tmp_path, rounds=4, more=more, settings=settings) as made:
        text = made.file.read_text()
        made.file.write_text(text.replace("[data]\n", '[data]\neval = "public.jsonl"\n', 1))
        server = made.serve()
        _, second, third = (made.join(name) for name in made.names)

        until_at_work(made, "ward-2")
        with held(second.running.pid, _STOP):
            made.until(
                lambda: updates(made, "ward-3") and not at_work(made, "ward-3"), PATIENCE,
                "a masked update",
            )  # fmt: skip
            third.kill()
        made.join("ward-3")
        until_round(made, 1)
        rows = [row for row in events(made, "client_done") if row["round"] == 1]
        assert {row["client"]: row["outcome"] for row in rows}["ward-3"] == "ok", rows

        number = _between_sum_and_commit(made)
        kill_from = made.children(server)["serverapp"]
        os.kill(kill_from, signal.SIGKILL)
        assert committed(made) < number, "too late: that round is committed already"
        before = {name: _masked(made, name, number) for name in made.names}
        until_round(made, number)
        assert {name: _masked(made, name, number) for name in made.names} == before
        assert server.wait(PATIENCE) == 0, made.logs()

        assert [row["round"] for row in made.rows()] == [0, 1, 2, 3, 4]
        for name in made.names:
            place = made.folder / f"{name}.node" / "ledger.db"
            mine = spent(place, f"{name}/{name}", Unit.CLIENT, Relation.REPLACE_SPECIAL)
            assert mine >= updates(made, name) > 0
        served = spent(
            tmp_path / "server-ledger.db", "ward-notes", Unit.CLIENT, Relation.REPLACE_SPECIAL
        )
        assert served >= 4
        assert "the ServerApp: died; going on from the last committed round" in server.text


def _between_sum_and_commit(made: Federation) -> int:
    """Wait for the instant when a sum is on disk and its round is not."""
    file, end = made.run() / "sum.safetensors", time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            number = int(np.asarray(unpack_tensors(file.read_bytes())["head"])[0])
        except OSError:
            number = -1
        if number > committed(made) > 0:
            return number
        time.sleep(0.005)
    raise AssertionError(made.logs())


def _masked(made: Federation, name: str, number: int) -> int:
    return sum(
        line["what"].startswith(f"round {number}: a masked update") for line in made.sent(name)
    )
