"""Everything dies, one after another: the run ends as if nothing had happened.

Random moments come from a fixed seed. A body server's deaths are in
``tests/split/test_service_faults.py``.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from fedtune.errors import ExitCode
from tests.real.faults import (
    PATIENCE,
    committed,
    events,
    gone,
    same,
    undisturbed,
    until_asked,
    until_at_work,
    until_round,
)
from tests.real.kit import Federation, Process, federation
from tests.real.proxy import proxy

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

ALL = "quorum = 1.0\nretries = 50\n"
CLOCK = """
import datetime, sys, time
_ahead, _time, _real = {ahead}, time.time, datetime.datetime
def _now():
    # gRPC's core has the true clock, and its deadlines are times.
    grpc = sys._getframe(1).f_globals.get("__name__", "").startswith("grpc")
    return _time() + (0 if grpc else _ahead)
class _Shifted(_real):
    @classmethod
    def now(cls, tz=None):
        return _real.now(tz) + datetime.timedelta(seconds=_ahead)
time.time, datetime.datetime = _now, _Shifted
"""


def wrong_clock(
    made: Federation, monkeypatch: pytest.MonkeyPatch, name: str, ahead: float
) -> Process:
    """Join with a clock that is ``ahead`` seconds off."""
    folder = made.folder / f"clock{ahead:+g}"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(CLOCK.format(ahead=ahead))
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        return made.join(name, log=f"{name}{ahead:+g}")


def kill(made: Federation, server: Process, what: str) -> None:
    made.until(lambda: what in made.children(server), PATIENCE, f"a {what}")
    os.kill(made.children(server)[what], signal.SIGKILL)


@pytest.mark.timeout(1500)
def test_whatever_dies_the_run_ends_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(6)

    def moment() -> None:
        """Let a random part of a round go by."""
        time.sleep(rng.uniform(0, 0.4))

    with (
        federation(tmp_path, rounds=5, settings=ALL) as made,
        proxy(made.port, delay=0.3, loss=0.05, broken=0.005) as bad,
    ):
        server = made.serve()
        far = wrong_clock(made, monkeypatch, "ward-3", 7200.0)
        made.join("ward-1", port=bad.port)
        second = made.join("ward-2")
        assert far.wait(PATIENCE) == ExitCode.SIGNATURE
        assert "this machine's clock is about" in far.text
        assert "ahead of the server's" in far.text
        # Flower takes stamps up to 305 s old: this one is late, and no worse for it.
        third = wrong_clock(made, monkeypatch, "ward-3", -120.0)

        until_asked(made, 1)
        moment()
        kill(made, server, "superlink")
        until_round(made, 1)

        until_asked(made, 2)
        moment()
        kill(made, server, "serverapp")
        until_round(made, 2)

        until_at_work(made, "ward-2")
        second.kill()
        second = made.join("ward-2")
        until_round(made, 3)

        until_asked(made, 4)
        moment()
        children = list(made.children(server).values())
        server.kill()
        made.until(lambda: gone(children), 20, "the children's end")
        bad.silence()
        reached = committed(made)
        server = made.serve("--resume", "latest")
        time.sleep(10)
        assert committed(made) <= reached + 1
        bad.mend()
        assert server.wait(PATIENCE) == 0, made.logs()

        assert bad.stalled > 0
        assert [row["round"] for row in made.rows()] == [0, 1, 2, 3, 4, 5]
        assert all(row["clients_ok"] == 3 for row in made.rows()[1:])
        assert same(made.adapter(), undisturbed(made))

        said = (tmp_path / "serve.log").read_text()
        assert "the SuperLink ended with signal SIGKILL: starting it again" in said
        assert "the SuperLink is back after" in said
        assert "the ServerApp: died; going on from the last committed round" in said
        reasons = [row["reason"] for row in events(made, "client_done")]
        # The second where this machine is so busy that a new process takes 20 s.
        known = ("the node died while it worked on this", "Error: Node Unavailable")
        assert any(reason.startswith(known) for reason in reasons), reasons
        assert "trying again" in (tmp_path / "ward-1.log").read_text()
        assert third.alive()

        _one_never_comes_back(made, third)


def _one_never_comes_back(made: Federation, third: Process) -> None:
    """Go on with the same nodes: the last of them dies in the first round, for good."""
    before = made.run()
    made.file.write_text(made.file.read_text().replace("quorum = 1.0", "quorum = 0.6"))
    server = made.serve("federation.toml", "-s", "federation.rounds=2", log="second")
    made.until(lambda: made.run() != before, PATIENCE, "a second run")
    until_asked(made, 1)
    until_at_work(made, "ward-3")
    third.kill()
    assert server.wait(PATIENCE) == 0, made.logs()
    assert [row["clients_ok"] for row in made.rows()[1:]] == [2, 2]
    lost = [row for row in events(made, "client_done") if row["outcome"] in ("failed", "late")]
    assert {row["client"] for row in lost} == {"ward-3"}
    notes = (made.folder / "notes.jsonl").read_text().splitlines(keepends=True)
    (made.folder / "two.jsonl").write_text("".join(n for n in notes if "ward-3" not in n))
    alone = undisturbed(made, "federation.rounds=2", f'data.source="{made.folder}/two.jsonl"')
    assert same(made.adapter(), alone)
