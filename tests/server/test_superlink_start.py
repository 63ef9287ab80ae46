"""An engine that cannot start, and one that starts where another was killed."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedtune.errors import ExitCode, FedtuneError
from fedtune.server.bundle import build_bundle
from fedtune.server.superlink import start_engine
from tests.server.toy_server import (
    SUPERVISOR,
    Words,
    alive,
    beat,
    children,
    hostile_environment,
    place_of,
    server_keys,
    until,
    working,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return server_keys(tmp_path_factory.mktemp("keys") / "keys")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with hostile_environment(tmp_path_factory.mktemp("toy")):
        yield


def test_a_superlink_that_does_not_come_up_shows_its_last_lines(
    keys: Path, hostile: None, tmp_path: Path
) -> None:
    before, place = children(), place_of(keys, tmp_path)
    (tmp_path / "state.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(FedtuneError, match="not a database") as error:
        start_engine(place, print)
    assert error.value.code == ExitCode.ENGINE
    assert children() == before
    (tmp_path / "state.db").unlink()
    start_engine(place, print).close()
    assert children() == before


def test_children_die_with_a_killed_server_and_the_next_one_goes_on(
    keys: Path, hostile: None, tmp_path: Path
) -> None:
    run, place = tmp_path / "run", place_of(keys, tmp_path / "home")
    run.mkdir()
    port = place.address.rpartition(":")[2]
    supervisor = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(keys), str(place.home), port, str(run)]
    )
    try:
        until(lambda: bool(beat(run)), what="work of the ServerApp")
        offspring = psutil.Process(supervisor.pid).children(recursive=True)
        assert len(offspring) >= 2
    finally:
        supervisor.kill()
        supervisor.wait()
    said = Words()
    start = time.monotonic()
    with start_engine(place, said, bundle=build_bundle("toy_server_app:app")) as engine:
        assert not any(alive(child) for child in offspring)
        assert time.monotonic() - start < 60
        (old,) = engine._control.runs()
        assert engine.run_status(old) == ("finished:stopped", "")
        new = engine.start_run(run)
        working(run)
        assert engine.run_status(new) == ("running", "")
