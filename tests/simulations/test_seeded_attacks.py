"""Peers that lie, stay silent or die, where only coefficients travel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from fedtune.client.epochs import Epochs as Memory
from fedtune.client.epochs import part_of, require_epoch
from fedtune.client.seeded import Local, upload
from fedtune.errors import FedtuneError
from fedtune.pool.agree import commitment, key_of, key_of_seed
from fedtune.pool.chain import Broadcast
from fedtune.pool.codec import COEFFICIENTS, pack, unpack
from fedtune.pool.groups import Groups
from fedtune.server import asking
from fedtune.server.link import GridLink
from fedtune.server.run_folder import create
from fedtune.server.seeded import advance, begin, decode, outside
from fedtune.simulations.simulate import simulate
from fedtune.wire import Task, Update, to_record
from tests.simulations.apps import settings

SIZE = 64
POOL: dict[str, Any] = {"tuning__method": "seedpool", "tuning__adapter": "full",
                        "tuning__pool__size": SIZE, "tuning__pool__engine": "probes",
                        "tuning__lr": 1e-4, "evaluation__clients": 0}  # fmt: skip


class Grid:
    """Node 1 never answers, all others at once."""

    def __init__(self) -> None:
        self.inbox: dict[str, Message] = {}
        self.count = 0

    def push_messages(self, messages: list[Message]) -> list[str]:
        found = []
        for message in messages:
            self.count += 1
            name = str(self.count)
            message.metadata.__dict__["_message_id"] = name
            found.append(name)
            if message.metadata.dst_node_id != 1:
                update = Update(2, 0, 1, 1, 0, 1.0, {"a": np.zeros(1, np.int16)})
                self.inbox[name] = Message(to_record(update), reply_to=message)
        return found

    def pull_messages(self, names: list[str]) -> list[Message]:
        return [self.inbox.pop(name) for name in names if name in self.inbox]


def test_one_silent_client_makes_nobody_else_late(monkeypatch: pytest.MonkeyPatch) -> None:
    before = (TaskIdentity._run_id, TaskIdentity._task_id, TaskIdentity._node_id)
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    monkeypatch.setattr(asking, "tensors_for", lambda *given: {k: {} for k in given[3]})
    federation = SimpleNamespace(deadline=1.0)
    tuned: Any = SimpleNamespace(weights=object(), config=SimpleNamespace(federation=federation))
    state: Any = SimpleNamespace(chain=SimpleNamespace(epoch=1))
    members = [asking.Member(f"c{i}", i, 0, 1) for i in range(1, 11)]
    epochs = asking.Epochs.at(members, state)
    epochs.heard("c1", 1, well=False)  # lacks what the others have: a task of its own
    link: Any = GridLink(Grid())  # type: ignore[arg-type]
    _, answers = asking.ask_members(
        link, Update, tuned, state, members, Task(2, 0, 0, 0.1, {}), epochs
    )
    heard = [answer.node for answer in answers]
    TaskIdentity._run_id, TaskIdentity._task_id, TaskIdentity._node_id = before
    assert sorted(heard) == list(range(2, 11))


GOOD = {"a": np.ones(2, np.int16), "scale": np.ones(1, np.float32),
        "at": np.array([1, 5], np.uint16)}  # fmt: skip
HISTORY = {"sizes": np.ones(2, np.float16), "draws": np.ones(2, np.uint16)}


@pytest.mark.parametrize("method", ["seedpool", "fedkseed", "fedkseed-pro"])
@pytest.mark.parametrize(
    "change",
    [
        {"at": np.array(3, np.uint16)},
        {"at": np.array([1.0, 5.0])},
        {"at": np.array([1, 65535], np.uint16)},
        {"at": np.zeros((1, 2), np.uint16)},
        {"scale": np.array(1.0, np.float32)},
        {"scale": np.array([1e9], np.float32)},
        {"a": np.array(1, np.int16)},
        {"a": np.ones(2, np.complex64)},
        {"sizes": np.ones(3, np.float16)},
        {"draws": np.ones(2, np.float32)},
    ],
)
def test_no_upload_crashes_the_server(
    tmp_path: Path, shared: Path, method: str, change: dict[str, Any]
) -> None:
    given = POOL | {"tuning__method": method, "tuning__pool__engine": "auto"}
    config = settings(tmp_path, shared, **given)
    arrays = GOOD | (HISTORY if method == "fedkseed-pro" else {})
    decode(Update(1, 0, 1, 1, 0, 1.0, arrays), config)
    with pytest.raises(FedtuneError):
        decode(Update(1, 0, 1, 1, 0, 1.0, arrays | change), config)


def test_a_key_that_was_not_agreed_is_refused_by_who_took_part() -> None:
    client = Memory(None, SIZE)
    nothing = np.zeros((0, 32), np.uint8)
    committed = part_of(client, Task(0, 0, 0, 0.0, {"shown": nothing})).tobytes()
    rows = np.frombuffer(committed + commitment(bytes(32)), np.uint8).reshape(2, 32)
    nonce = part_of(client, Task(1, 0, 0, 0.0, {"shown": rows})).tobytes()
    ground = Broadcast(bytes(32), 0, pack(np.zeros(SIZE), 16), bytes(32), np.zeros(1, np.uint16))
    with pytest.raises(FedtuneError, match="before the key"):
        client.merge(ground)
    nonces = np.frombuffer(nonce + bytes(32), np.uint8).reshape(2, 32)
    key = part_of(client, Task(2, 0, 0, 0.0, {"shown": nonces})).tobytes()
    assert key == key_of([nonce, bytes(32)])
    assert part_of(client, Task(2, 0, 0, 0.0, {"shown": nonces})).tobytes() == key
    with pytest.raises(FedtuneError, match="not the one that was agreed"):
        client.merge(ground)


@pytest.mark.parametrize(("refresh", "done", "epoch"), [(0, 5, 0), (2, 5, 2), (1, 5, 5)])
def test_the_epoch_follows_from_the_round(
    tmp_path: Path, shared: Path, refresh: int, done: int, epoch: int
) -> None:
    config = settings(tmp_path, shared, **POOL, tuning__pool__refresh=refresh, federation__rounds=6)
    sent = Broadcast(bytes(32), epoch, pack(np.zeros(SIZE), 16), bytes(32), np.zeros(1, np.uint16))
    require_epoch(config, sent, done)
    for wrong in (epoch + 1, 777):
        with pytest.raises(FedtuneError, match="is due"):
            require_epoch(config, replace(sent, epoch=wrong), done)
    for never in (-1, 7):
        with pytest.raises(FedtuneError, match="is due"):
            require_epoch(config, sent, never)


def test_how_many_there_are_is_not_told_under_a_promise(tmp_path: Path, shared: Path) -> None:
    client = {"relation": "add-or-remove-one", "population": 4, "delta": 1e-3,
              "noise_multiplier": 1.0}  # fmt: skip
    with pytest.raises(FedtuneError, match="how many there are"):
        settings(
            tmp_path, shared, **POOL, tuning__pool__entropy="os", privacy__client=client,
            federation__weighting="uniform", federation__cohort=0.5,
        )  # fmt: skip


def test_a_client_stays_within_its_directions() -> None:
    state: Any = SimpleNamespace(chain=SimpleNamespace(key=bytes(32)))
    tuned: Any = SimpleNamespace(groups=Groups(2, 4, SIZE))
    for client in ("a", "b", "c", "d"):
        columns = tuned.groups.columns(tuned.groups.of(client, bytes(32)), 3)
        vector = np.zeros(SIZE, np.float32)
        vector[columns] = 1.0
        assert not outside(tuned, state, client, 3, {COEFFICIENTS: vector})
        assert outside(tuned, state, client, 3, {COEFFICIENTS: np.ones(SIZE, np.float32)})


def test_what_a_fold_rounds_away_has_no_bias(tmp_path: Path, shared: Path) -> None:
    config = settings(tmp_path, shared, **POOL, tuning__pool__refresh=1)
    state = begin(config, "f", key_of_seed(7))
    truth, kept = np.zeros(SIZE), np.zeros(SIZE)
    for number in range(1, 401):
        step = np.full(SIZE, 1e-5, np.float32)
        step[0] = 1.0 if number % 2 else -1.0
        state = advance(config, state, replace(state, round=number, adapter={COEFFICIENTS: step}))
        assert state.chain is not None
        kept += unpack(state.chain.finished[-1])
        truth += step
    # Each fold is off by less than a step of 1 / 32767: five standard errors over all.
    error = kept[1:].mean() - truth[1:].mean()
    assert abs(error) < 5 * 0.5 / 32767 * np.sqrt(400 / (SIZE - 1))
    assert truth[1] > 10 * abs(error)


def test_a_seed_whose_coefficient_rounds_to_zero_keeps_its_history() -> None:
    moved = np.zeros(SIZE, np.float32)
    moved[:10] = 1e-9
    moved[0] = 1.0
    counts = np.zeros(SIZE, np.uint16)
    counts[:10] = 3
    arrays = upload(
        Local(moved, None, np.ones(SIZE, np.float16), counts),  # type: ignore[arg-type]
        8, np.random.default_rng(0), history=True,
    )  # fmt: skip
    assert arrays["at"].tolist() == list(range(10))
    assert arrays["draws"].tolist() == [3] * 10


def test_a_damaged_memory_is_named(tmp_path: Path) -> None:
    from safetensors.numpy import save

    (tmp_path / "pool.safetensors").write_bytes(save({"key": np.zeros(3, np.uint8)}))
    with pytest.raises(FedtuneError, match="damaged"):
        Memory(tmp_path, SIZE)


def test_killed_after_the_key_was_agreed_the_run_goes_on(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.server import rounds

    config = settings(tmp_path, shared, **POOL, tuning__pool__entropy="os")
    home = create(config)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rounds, "begin", die)
        with pytest.raises(KeyboardInterrupt):
            simulate(config, home, lambda event: None)
    simulate(config, home, lambda event: None)
    assert home.status()["status"] == "finished"
