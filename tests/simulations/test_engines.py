"""An engine changes the speed, never the results: the same bytes from every one of them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid

from fedtune.client.app import make_client_app
from fedtune.errors import ExitCode, FedtuneError
from fedtune.server.app import Outcome, make_server_app
from fedtune.server.run_folder import RunFolder, create
from fedtune.simulations.executors import ThreadExecutor
from fedtune.simulations.grid import LocalGrid
from tests.simulations.apps import adapter_bytes, run_here, settings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reference(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run of one thread, which nothing can put out of order."""
    return run_here(settings(tmp_path_factory.mktemp("one"), shared))


def scores(folder: RunFolder) -> list[dict[str, Any]]:
    """All that a run measured, but for time and memory."""
    kept = ("loss", "train_loss", "client_worst", "update_norm", "aggregation_error")
    return [{key: row[key] for key in kept if key in row} for row in folder.metrics()]


def same(one: RunFolder, other: RunFolder) -> None:
    assert adapter_bytes(one) == adapter_bytes(other)
    assert scores(one) == scores(other)
    assert len(scores(one)) == 3


def test_the_reference_learns_and_depends_on_the_seed(
    reference: RunFolder, shared: Path, tmp_path: Path
) -> None:
    losses = [row["loss"] for row in reference.metrics()]
    assert losses[2] < losses[1] < losses[0]
    other = run_here(settings(tmp_path, shared, seed=8))
    assert adapter_bytes(other) != adapter_bytes(reference)


def test_threads(reference: RunFolder, shared: Path, tmp_path: Path) -> None:
    same(run_here(settings(tmp_path, shared, engine__workers=3)), reference)


def test_processes(reference: RunFolder, shared: Path, tmp_path: Path) -> None:
    engine = {"executor": "processes", "workers": 2}
    same(run_here(settings(tmp_path, shared, engine=engine)), reference)


def test_ray(
    reference: RunFolder, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flwr.supercore.telemetry.FLWR_TELEMETRY_ENABLED", "0")
    engine = {"kind": "ray", "workers": 2}
    same(run_here(settings(tmp_path, shared, engine=engine)), reference)


@dataclass
class Shuffled(Grid):
    """A grid that holds replies back until all are there, and gives them in any order."""

    inner: LocalGrid
    rng: random.Random
    _held: dict[str, Message] = field(default_factory=dict)
    orders: list[list[int]] = field(default_factory=list)

    def set_run(self, run: Any) -> None:
        self.inner.set_run(run)

    @property
    def run(self) -> Any:
        return self.inner.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return self.inner.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        return self.inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self.inner.push_messages(messages)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.inner.send_and_receive(messages, timeout=timeout)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = set(message_ids)
        for reply in self.inner.pull_messages(wanted):
            self._held[reply.metadata.reply_to_message_id] = reply
        if not wanted or wanted - self._held.keys():
            return []
        names = sorted(wanted)
        self.rng.shuffle(names)
        replies = [self._held.pop(name) for name in names]
        self.orders.append([reply.metadata.src_node_id for reply in replies])
        return replies


@pytest.mark.parametrize("seed", [1, 2])
def test_the_order_of_arrival_does_not_matter(
    reference: RunFolder, shared: Path, tmp_path: Path, seed: int
) -> None:
    config = settings(tmp_path, shared)
    folder, outcome = create(config), Outcome()
    inner = LocalGrid(ThreadExecutor(make_client_app(config, folder.clients), 2), 4)
    grid = Shuffled(inner, random.Random(seed))
    server = make_server_app(config, (), folder, lambda event: None, outcome)
    try:
        server(grid, Context(1, 0, {}, RecordDict(), {}))
    finally:
        inner.close()
    outcome.check()
    assert any(order != sorted(order) for order in grid.orders)
    same(folder, reference)


def test_dropout_gives_the_same_bits_on_any_number_of_processes(
    reference: RunFolder, shared: Path, tmp_path: Path
) -> None:
    engine: dict[str, Any] = {"executor": "processes"}
    one, two = (
        run_here(
            settings(tmp_path, shared, tuning__dropout=0.1, engine=engine | {"workers": workers})
        )
        for workers in (1, 2)
    )
    same(one, two)
    alone = run_here(settings(tmp_path, shared, tuning__dropout=0.1))
    same(alone, one)
    assert adapter_bytes(one) != adapter_bytes(reference)


def test_dropout_on_many_threads_is_refused(shared: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, shared, tuning__dropout=0.1, engine__workers=3)
    with pytest.raises(FedtuneError, match=r"workers=3 .*tuning\.dropout=0\.1") as caught:
        run_here(config)
    assert caught.value.code == ExitCode.ENGINE
    assert caught.value.hint == "use executor='processes' or workers=1"


def test_kept_optimisers_give_the_same_bits_on_threads_and_processes(
    reference: RunFolder, shared: Path, tmp_path: Path
) -> None:
    kept = {"tuning__keep_optimizer": True}
    one = run_here(settings(tmp_path, shared, engine__workers=2, **kept))
    engine = {"executor": "processes", "workers": 2}
    same(run_here(settings(tmp_path, shared, engine=engine, **kept)), one)
    assert adapter_bytes(one) != adapter_bytes(reference)
    states = sorted(path.name for path in (one.clients / "000000").iterdir())
    assert states[-1] == "round-000002.safetensors"
