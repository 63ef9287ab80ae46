"""A clipping policy at the client: whose actor it uses, what it is rewarded by, what leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.adapters import Tensors
from fedtune.client.worker import Worker
from fedtune.config import Config
from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.events import Relation, Unit
from fedtune.privacy.ledger import open_ledger
from fedtune.privacy.plan import ledger_place
from fedtune.privacy.rldp.travel import ACTOR, MADE, cut_off, require_transitions
from fedtune.server.learner import open_learner
from fedtune.server.tuned import load_tuned
from fedtune.wire import Task
from tests.simulations.apps import texts, write_rows
from tests.simulations.private_runs import EXAMPLE, example_run

STEPS = 4
RLDP: dict[str, Any] = {"interval": 1, "warmup": 0.0}


def config_of(folder: Path, shared: Path, rldp: dict[str, Any], **changes: Any) -> Config:
    example = EXAMPLE | {"clip": "rldp", "rldp": RLDP | rldp}
    settings = {"privacy__example": example, "tuning__steps": STEPS, "federation__rounds": 3}
    return example_run(folder, shared, **(settings | changes))


def start(config: Config) -> Tensors:
    return load_tuned(config, ()).start().tensors()


def actor(config: Config) -> Tensors:
    learner = open_learner(config)
    assert learner is not None
    return learner.told(learner.start())


def charged(config: Config) -> int:
    ledger = open_ledger(ledger_place(config))
    account = ledger.account("stories/owner-0", Unit.EXAMPLE, Relation.ADD_OR_REMOVE_ONE)
    return sum(ledger.groups(account).values())


def decisions(home: Path) -> list[dict[str, Any]]:
    lines = (home / "000000" / "decisions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def federated(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Worker]:
    folder = tmp_path_factory.mktemp("federated")
    config = config_of(folder, shared, {"mode": "federated"})
    return config, Worker(config, folder / "clients")


def spoilt(config: Config) -> dict[str, Tensors]:
    good, weights = actor(config), start(config)
    name = min(one for one in good if "actor" in one)
    nan = good[name].copy()
    nan.flat[0] = np.nan
    both = weights | good
    return {
        "no actor": weights,
        "half of it": weights | {name: good[name]},
        "one tensor more": both | {f"{ACTOR}critic.0.weight": np.zeros(2, np.float32)},
        "nan": both | {name: nan},
        "too large": both | {name: good[name] + np.float32(1e8)},
        "another shape": both | {name: good[name].ravel()},
        "float64": both | {name: good[name].astype(np.float64)},
        "transitions": both | {f"{MADE}reward": np.zeros(1, np.float32)},
    }


@pytest.mark.parametrize(
    "case",
    ["no actor", "half of it", "one tensor more", "nan", "too large", "another shape", "float64",
     "transitions"],
)  # fmt: skip
def test_a_bad_actor_is_refused_before_anything_is_charged(
    case: str, federated: tuple[Config, Worker]
) -> None:
    config, worker = federated
    before = charged(config)
    with pytest.raises(FedtuneError) as refused:
        worker.train(0, Task(1, 0, 0, 0.01, spoilt(config)[case], "job"))
    assert refused.value.code == ExitCode.PRIVACY
    assert charged(config) == before


def test_an_actor_that_nobody_agreed_to_is_refused(shared: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, shared, {"mode": "online"})
    other = config_of(tmp_path, shared, {"mode": "federated"})
    with pytest.raises(FedtuneError, match="other tensors"):
        Worker(config, tmp_path / "c").train(
            0, Task(1, 0, 0, 0.01, start(config) | actor(other), "job")
        )
    assert charged(config) == 0


def test_the_servers_actor_of_this_round_is_the_one_that_acts(shared: Path, tmp_path: Path) -> None:
    """With a last layer that saturates the actions are those that it says, in each round."""
    config = config_of(tmp_path, shared, {"mode": "federated"})
    worker, weights, told = Worker(config, tmp_path / "c"), start(config), actor(config)
    last = max(name for name in told if name.startswith(f"{ACTOR}actor") and "bias" in name)
    size = told[last].shape[-1] // 2
    for number, way in ((1, 1.0), (2, -1.0)):
        bias = told[last].copy()
        bias[..., :size], bias[..., size:] = 40.0 * way, -15.0
        task = Task(number, 0, 0, 0.01, weights | told | {last: bias}, "job")
        update = worker.train(0, task)
        rest, made = cut_off(MADE, update.tensors)
        assert rest.keys() == weights.keys()
        actions = np.stack([one.action for one in require_transitions(made, STEPS)])
        if number == 2:  # what the last decision of round 1 led to is seen in round 2
            assert actions[0].min() > 0.99
            actions = actions[1:]
        assert len(actions) == STEPS - (2 if number == 1 else 1)
        assert (actions * way).min() > 0.99


def test_a_round_tried_again_goes_on_from_the_round_before(shared: Path, tmp_path: Path) -> None:
    """Not from what the lost attempt left: the policy would have seen a round too much."""
    config = config_of(tmp_path, shared, {"mode": "federated"})
    weights = start(config) | actor(config)
    home = tmp_path / "c"
    worker = Worker(config, home)
    worker.train(0, Task(1, 0, 0, 0.01, weights, "job"))
    for attempt in (0, 1):
        worker.train(0, Task(2, attempt, 0, 0.01, weights, "job"))
    steps = [(row["round"], row["step"]) for row in decisions(home)]
    second = [(2, STEPS + step) for step in range(STEPS)]
    assert steps == [(1, step) for step in range(STEPS)] + second * 2
    numbers = [row["decision"] for row in decisions(home) if "decision" in row and row["step"] >= 4]
    assert numbers[:4] == numbers[4:]


@pytest.fixture
def public(tmp_path: Path) -> Path:
    rows = [{"client": "nobody", "text": text} for text in texts(7, 6)]
    return write_rows(tmp_path / "public.jsonl", rows)


def test_the_reward_is_measured_on_public_text_and_on_nothing_else(
    shared: Path, tmp_path: Path, public: Path
) -> None:
    from fedtune.adapters import write
    from fedtune.data import encode, load_eval
    from fedtune.measure import measure

    told = {"mode": "online", "reward": "public", "public": str(public)}
    config = config_of(tmp_path, shared, told)
    worker = Worker(config, tmp_path / "c")
    worker.train(0, Task(1, 0, 0, 0.01, start(config), "job"))
    utilities = [row["utility"] for row in decisions(tmp_path / "c") if "utility" in row]
    assert len(utilities) == STEPS - 1
    assert len(set(utilities)) == len(utilities)
    assert all(-20.0 < value < 0.0 for value in utilities)
    # The first is that of the weights after one release; without tuning it is the fresh model's.
    still = config_of(tmp_path / "still", shared, told, tuning__lr=1e-12)
    quiet = Worker(still, tmp_path / "still" / "c")
    quiet.train(0, Task(1, 0, 0, 1e-12, start(still), "job"))
    first = next(r["utility"] for r in decisions(tmp_path / "still" / "c") if "utility" in r)
    data = still.data.model_copy(update={"eval": str(public)})
    encoded = encode(load_eval(data, ()), quiet.base.tokenizer, data, ())
    model = load_tuned(still, ()).model
    write(model, start(still))
    counts = measure(model, encoded, "causal-lm", batch_size=32, pad_id=quiet.base.pad_id, labels=0)
    assert first == pytest.approx(-counts.loss / counts.units, abs=1e-4)


def test_public_text_without_a_usable_row_is_refused_at_once(
    shared: Path, tmp_path: Path, public: Path
) -> None:
    public.write_text('{"client": "nobody", "text": ""}\n')
    told = {"mode": "online", "reward": "public", "public": str(public)}
    with pytest.raises(FedtuneError, match="no usable row"):
        Worker(config_of(tmp_path, shared, told), tmp_path / "c")
