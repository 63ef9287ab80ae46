"""Runs with a learning clipping policy: gone on with, and on every engine, to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.client import app
from fedtune.client import worker as client_worker
from fedtune.config import Config
from fedtune.errors import ExitCode, FedtuneError
from fedtune.files import read_tensors
from fedtune.privacy.plan import noise_source
from fedtune.server import private as central
from fedtune.server.events import RoundDone
from fedtune.server.run_folder import RunFolder, create
from fedtune.simulations.simulate import simulate
from tests.simulations.apps import adapter_bytes, run_here, texts, write_rows
from tests.simulations.private_runs import CLIENT, EXAMPLE, client_run, example_run

pytestmark = pytest.mark.slow

ROUNDS = 4
RLDP: dict[str, Any] = {"interval": 1, "warmup": 0.0}


def example_of(folder: Path, shared: Path, mode: str, **changes: Any) -> Config:
    settings: dict[str, Any] = {
        "privacy__example": EXAMPLE | {"clip": "rldp", "rldp": RLDP | {"mode": mode}},
        "federation__rounds": ROUNDS, "tuning__steps": 3, "data__partition": {"clients": 2},
    }  # fmt: skip
    return example_run(folder, shared, **(settings | changes))


def client_of(folder: Path, shared: Path, **rldp: Any) -> Config:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"client": "nobody", "text": text} for text in texts(7, 4)]
    public = write_rows(folder / "public.jsonl", rows)
    told = RLDP | {"mode": "online", "reward": "public", "public": str(public)} | rldp
    settings: dict[str, Any] = {
        "privacy__client": CLIENT | {"clip": "rldp", "clip_norm": 0.05, "rldp": told},
        "federation__rounds": 12, "tuning__steps": 1,
    }  # fmt: skip
    return client_run(folder, shared, **settings)


def last(folder: RunFolder, part: str) -> dict[str, np.ndarray[Any, Any]]:
    found, _ = read_tensors(max(folder.checkpoints.glob("*.safetensors")))
    return {name: value for name, value in found.items() if name.startswith(f"{part}:")}


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[n], right[n]) for n in left)


def interrupted(config: Config, after: int) -> RunFolder:
    """Run until a round is over, forget all that was in memory, and go on."""
    folder = create(config)

    def stop(event: object) -> None:
        if isinstance(event, RoundDone) and event.round == after:
            folder.stop()

    with pytest.raises(FedtuneError) as stopped:
        simulate(config, folder, stop)
    assert stopped.value.code == ExitCode.INTERRUPTED
    app._current.clear()
    simulate(config, folder, lambda _: None)
    return folder


@pytest.fixture
def noise_of_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give another attempt of a round the same insecure noise: or no two runs could be equal."""
    monkeypatch.setattr(
        client_worker, "noise_source",
        lambda config, what, name, number, _attempt: noise_source(config, what, name, number),
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["online", "meta", "federated"])
def test_a_run_that_was_stopped_is_the_one_that_was_not(
    mode: str, shared: Path, tmp_path: Path, noise_of_a_round: None
) -> None:
    """With a checkpoint every other round, so that the third one is done again."""
    every = {"output__checkpoint_every": 2}
    whole = run_here(example_of(tmp_path / "whole", shared, mode, **every))
    parts = interrupted(example_of(tmp_path / "parts", shared, mode, **every), after=3)
    assert adapter_bytes(parts) == adapter_bytes(whole)
    told = parts.decisions()
    assert told == whole.decisions()
    assert {name: len(rows) for name, rows in told.items()} == dict.fromkeys(
        ("000000", "000001"), 3 * ROUNDS
    )
    norms = {tuple(row["norms"]) for row in told["000000"]}
    assert len(norms) > ROUNDS
    assert same(last(parts, "learner"), last(whole, "learner"))
    assert bool(last(whole, "learner")) == (mode == "federated")


@pytest.fixture(scope="module")
def threads(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_here(example_of(tmp_path_factory.mktemp("threads"), shared, "federated"))


def test_a_federated_policy_is_the_same_on_every_engine(
    threads: RunFolder, shared: Path, tmp_path: Path
) -> None:
    engine: dict[str, Any] = {"executor": "processes", "workers": 2}
    processes = run_here(example_of(tmp_path / "processes", shared, "federated", engine=engine))
    assert adapter_bytes(processes) == adapter_bytes(threads)
    assert processes.decisions() == threads.decisions()
    assert same(last(processes, "learner"), last(threads, "learner"))


def test_one_policy_learns_from_all_clients(threads: RunFolder) -> None:
    left = last(threads, "learner")
    assert int(left["learner:buffer.seen"][0]) == 2 * (1 + 3 * (ROUNDS - 1))
    assert int(left["learner:steps"][0]) > 0
    for home in sorted(threads.clients.glob("0*")):
        kept, _ = read_tensors(max(home.glob("policy-*.safetensors")))
        assert int(kept["sac.buffer.seen"][0]) == 0, "a client keeps nothing to learn from"
        assert int(kept["sac.steps"][0]) == 0


def test_a_client_level_run_that_was_stopped_is_the_one_that_was_not(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def continuing() -> Callable[..., Any]:
        kept: dict[Any, Any] = {}
        return lambda config, *what: kept.setdefault(what, noise_source(config, *what))

    found = []
    for name in ("whole", "parts"):
        # The seeded source of the second session goes on where the first one's ended.
        monkeypatch.setattr(central, "noise_source", continuing())
        config = client_of(tmp_path / name, shared)
        found.append(run_here(config) if name == "whole" else interrupted(config, after=10))
    whole, parts = found
    assert adapter_bytes(parts) == adapter_bytes(whole)
    told = parts.decisions()[""]
    assert told == whole.decisions()[""]
    assert [row["step"] for row in told] == list(range(12))
    assert len({tuple(row["norms"]) for row in told}) == 12
    assert all(isinstance(row["utility"], float) for row in told[1:])
    policy = last(whole, "policy")
    assert same(last(parts, "policy"), policy)
    assert int(policy["policy:sac.steps"][0]) > 0
