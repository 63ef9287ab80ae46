"""Runs one after another, kept alive; the engine's processes are replaced, folders are real."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from fedtune.errors import ExitCode, FedtuneError
from fedtune.keys.authority import make_authority
from fedtune.keys.node import new_identity, public_of
from fedtune.keys.roster import enrol, revoke
from fedtune.server import supervisor as module
from fedtune.server.run_folder import RunFolder, create
from fedtune.server.superlink import Node
from fedtune.server.supervisor import Supervisor
from tests.client.node_kit import experiment

App = Callable[[RunFolder, int], bool]
"""What a ServerApp does in one look: folder and how often it was started; False: it is dead."""


@dataclass
class Engine:
    """In place of Flower's processes."""

    app: App
    starts: list[Path] = field(default_factory=list)
    stops: list[int] = field(default_factory=list)
    synced: list[frozenset[str]] = field(default_factory=list)
    here: tuple[Node, ...] = ()

    def sync(
        self, members: Mapping[str, EllipticCurvePublicKey]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        before = self.synced[-1] if self.synced else frozenset[str]()
        self.synced.append(frozenset(members))
        return tuple(sorted(members.keys() - before)), tuple(sorted(before - members.keys()))

    def nodes(self) -> tuple[Node, ...]:
        return self.here

    def start_run(self, folder: Path) -> int:
        self.starts.append(folder)
        return len(self.starts)

    def app_alive(self, folder: Path) -> bool:
        return self.app(RunFolder(folder), len(self.starts))

    def stop_run(self, run: int) -> None:
        self.stops.append(run)

    def tend(self) -> None:
        pass


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    make_authority(tmp_path / "keys", "test")
    enrol(tmp_path / "keys", *(public_of(new_identity(name)) for name in ("ann", "bob")))
    return tmp_path / "keys"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK", 0.001)


def folders(tmp_path: Path, count: int = 1) -> list[RunFolder]:
    config = experiment(privacy__example=None, output={"folder": str(tmp_path / "runs")})
    return [create(config, f"x{number}") for number in range(count)]


def made(keys: Path, app: App, **changes: Any) -> tuple[Supervisor, Engine, list[str]]:
    told: list[str] = []
    engine = Engine(app, **changes)
    return Supervisor(engine, keys, {}, told.append), engine, told


def finish(folder: RunFolder, _starts: int) -> bool:
    folder.update_status(status="finished")
    return False


def test_runs_come_one_after_another(keys: Path, tmp_path: Path) -> None:
    runs = folders(tmp_path, 3)
    supervisor, engine, told = made(keys, finish)
    supervisor.run(runs)
    assert engine.starts == [one.path for one in runs]
    assert engine.stops == [1, 2, 3]
    assert sum("finished" in words for words in told) == 3


def test_only_the_roster_is_let_in_and_who_is_revoked_is_cut_off(
    keys: Path, tmp_path: Path
) -> None:
    def app(folder: RunFolder, _starts: int) -> bool:
        if len(engine.synced) == 1:
            revoke(keys, "bob")
            return True
        if len(engine.synced) == 2:
            enrol(keys, public_of(new_identity("cy")))
            return True
        return finish(folder, 0)

    supervisor, engine, told = made(keys, app)
    supervisor.run(folders(tmp_path))
    assert engine.synced == [{"ann", "bob"}, {"ann"}, {"ann", "cy"}]
    assert "'bob' is cut off" in told
    assert "'cy' may join now" in told
    views = {view.name: view.status for view in supervisor.snapshot().nodes}
    assert views == {"ann": "never", "cy": "never", "bob": "revoked"}


def test_a_run_that_waits_for_nodes_says_so(keys: Path, tmp_path: Path) -> None:
    found: list[tuple[str, str]] = []
    there = [Node("ann", 1, "offline", 1.0), Node("ann", 1, "online", 1.0)]

    def app(folder: RunFolder, _starts: int) -> bool:
        now = supervisor.snapshot()
        found.append((now.status, now.phase))
        engine.here = (there.pop(0),) if there else ()
        return True if len(found) < 3 else finish(folder, 0)

    supervisor, engine, _ = made(keys, app)
    supervisor.facts = {"address": "x:9092"}
    supervisor.run(folders(tmp_path))
    two, one = "waiting for 2 more nodes", "waiting for 1 more node"
    assert found == [("waiting", two), ("waiting", two), ("waiting", one)]


def test_a_roster_that_is_damaged_lets_nobody_else_in_and_ends_no_run(
    keys: Path, tmp_path: Path
) -> None:
    looks: list[int] = []

    def app(folder: RunFolder, _starts: int) -> bool:
        looks.append(1)
        if len(looks) == 2:
            (keys / "roster").write_text("{}")
        return True if len(looks) < 6 else finish(folder, 0)

    supervisor, engine, told = made(keys, app)
    supervisor.run(folders(tmp_path))
    assert engine.synced == [{"ann", "bob"}]
    assert sum("roster" in words for words in told) == 1


def test_a_server_does_not_begin_with_a_roster_of_others(keys: Path, tmp_path: Path) -> None:
    make_authority(tmp_path / "other", "other")
    (keys / "roster").write_bytes((tmp_path / "other" / "roster").read_bytes())
    supervisor, engine, _ = made(keys, finish)
    with pytest.raises(FedtuneError) as caught:
        supervisor.run(folders(tmp_path))
    assert caught.value.code == ExitCode.SIGNATURE
    assert engine.starts == []


def test_a_serverapp_that_dies_is_started_again_on_its_folder(keys: Path, tmp_path: Path) -> None:
    """Four times without a round, then a round, then four times more."""
    (folder,) = folders(tmp_path)

    def app(run: RunFolder, starts: int) -> bool:
        if starts == 5:
            run.append({"round": 0, "loss": 1.0}, [])
        return finish(run, starts) if starts == 9 else False

    supervisor, engine, told = made(keys, app)
    supervisor.run([folder])
    assert engine.starts == [folder.path] * 9
    assert engine.stops == list(range(1, 10))
    assert any("going on from the last committed round" in words for words in told)


def test_one_that_dies_again_and_again_is_given_up(keys: Path, tmp_path: Path) -> None:
    (folder, never) = folders(tmp_path, 2)
    supervisor, engine, _ = made(keys, lambda _folder, _starts: False)
    with pytest.raises(FedtuneError, match="died 6 times without a round") as caught:
        supervisor.run([folder, never])
    assert caught.value.code == ExitCode.ENGINE
    assert engine.starts == [folder.path] * 6
    assert folder.status()["status"] == "stopped"


def test_why_a_run_failed_is_the_servers_exit(keys: Path, tmp_path: Path) -> None:
    def app(folder: RunFolder, _starts: int) -> bool:
        folder.update_status(
            status="failed", reason="too few", hint="more nodes", code=int(ExitCode.QUORUM)
        )
        return False

    supervisor, _, _ = made(keys, app)
    with pytest.raises(FedtuneError, match="too few") as caught:
        supervisor.run(folders(tmp_path))
    assert (caught.value.code, caught.value.hint) == (ExitCode.QUORUM, "more nodes")


def test_stopping_ends_the_run_that_is_at_work_and_begins_no_other(
    keys: Path, tmp_path: Path
) -> None:
    runs = folders(tmp_path, 2)
    supervisor, engine, _ = made(keys, lambda _folder, _starts: True)
    threading.Timer(0.1, supervisor.stop.set).start()
    supervisor.run(runs)
    assert engine.starts == [runs[0].path]
    assert engine.stops == [1]
    assert runs[0].status()["status"] == "stopped"
