"""A policy for all clients, learnt at the server: real workers, real rounds, one of them lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.adapters import Tensors
from fedtune.client.worker import Worker
from fedtune.config import Config
from fedtune.privacy.rldp.controller import ACTIONS, STATES
from fedtune.privacy.rldp.sac import Sac, Transition
from fedtune.privacy.rldp.travel import ACTOR, MADE, cut_off
from fedtune.server.checkpoint import State, latest
from fedtune.server.events import ClientDone, Event
from fedtune.server.learner import Learner, open_learner
from fedtune.server.rounds import run_rounds
from fedtune.server.run_folder import RunFolder, create
from fedtune.server.tuned import Tuned, load_tuned
from fedtune.wire import Task, Update
from tests.server.test_rounds import Network, Spoil
from tests.simulations.private_runs import EXAMPLE, example_run

FEDERATED: dict[str, Any] = EXAMPLE | {
    "clip": "rldp", "rldp": {"mode": "federated", "interval": 1, "warmup": 0.0},
}  # fmt: skip


def config_of(folder: Path, shared: Path, **changes: Any) -> Config:
    settings: dict[str, Any] = {
        "privacy__example": FEDERATED, "federation__rounds": 3, "tuning__steps": 3,
        "data__partition": {"clients": 2}, "federation__quorum": 0.0,
    }  # fmt: skip
    return example_run(folder, shared, **(settings | changes))


def learner_of(config: Config) -> Learner:
    found = open_learner(config)
    assert found is not None
    return found


@pytest.fixture
def learner(shared: Path, tmp_path: Path) -> Learner:
    return learner_of(config_of(tmp_path, shared))


def some(count: int, seed: int = 0, reward: float | None = None) -> list[Transition]:
    rng = np.random.default_rng(seed)
    return [
        Transition(
            rng.uniform(-1, 1, STATES).astype(np.float32),
            rng.uniform(-1, 1, ACTIONS).astype(np.float32),
            float(rng.uniform(-1, 1)) if reward is None else reward,
            rng.uniform(-1, 1, STATES).astype(np.float32), False,
        )
        for _ in range(count)
    ]  # fmt: skip


def same(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[n], right[n]) for n in left)


def weights(of: Tensors) -> Tensors:
    return {name: value for name, value in of.items() if name.startswith("actor.")}


def test_there_is_one_only_where_it_is_asked_for(shared: Path, tmp_path: Path) -> None:
    plain = config_of(tmp_path, shared, privacy__example=EXAMPLE)
    own = config_of(tmp_path, shared, privacy__example=EXAMPLE | {"clip": "rldp"})
    assert open_learner(plain) is None
    assert open_learner(own) is None
    assert learner_of(config_of(tmp_path, shared)).most == 3


def test_the_same_transitions_make_the_same_policy_whatever_was_in_memory(
    learner: Learner,
) -> None:
    first = learner.learn(learner.start(), [some(7, 1), some(5, 2)])
    again = learner.learn(learner.start(), [some(7, 1), some(5, 2)])
    assert same(first, again)
    swapped = learner.learn(learner.start(), [some(5, 2), some(7, 1)])
    assert not same(first, swapped)  # so the order of clients is part of it
    assert not same(learner.told(first), learner.told(learner.start()))
    assert int(first["buffer.seen"][0]) == 12


def test_few_transitions_are_kept_and_not_learnt_from(learner: Learner) -> None:
    before = learner.start()
    after = learner.learn(before, [some(3), some(4)])
    assert int(after["buffer.seen"][0]) == 7
    assert same(weights(before), weights(after))
    assert int(learner.learn(after, [[]])["steps"][0]) == 0
    assert int(learner.learn(after, [some(1)])["steps"][0]) == 8


def test_a_round_learns_for_a_bounded_time(learner: Learner) -> None:
    found = learner.learn(learner.start(), [some(500, seed) for seed in range(4)])
    assert int(found["steps"][0]) == 256


def test_weights_that_ran_away_are_begun_anew(learner: Learner) -> None:
    state = learner.start()
    name = min(one for one in state if one.startswith("critic.") and state[one].ndim > 1)
    state[name] = np.full_like(state[name], 3e38)
    assert same(learner.learn(state, [some(20)]), learner.start())


def test_it_learns_which_action_pays(learner: Learner) -> None:
    """Rewards are the first number of the action: the policy's mean of it must rise."""
    rng = np.random.default_rng(3)
    state = learner.start()

    def mean(of: Tensors) -> float:
        sac = Sac(STATES, ACTIONS, learner_settings(learner), 0)
        sac.restore(of)
        looks = rng.uniform(-1, 1, (64, STATES)).astype(np.float32)
        return float(np.mean([sac.act(one, mean=True)[0] for one in looks]))

    before = mean(state)
    for number in range(4):
        made = [replace(one, reward=float(one.action[0])) for one in some(60, number)]
        state = learner.learn(state, [made])
    assert mean(state) > before + 0.2


def learner_settings(learner: Learner) -> Any:
    from fedtune.privacy.rldp.controller import settings_of

    return settings_of(learner.settings)


class Bench:
    """Two real clients behind a network that may spoil what they say."""

    def __init__(self, config: Config, spoil: Spoil | None = None) -> None:
        self.config = config
        self.tuned: Tuned = load_tuned(config, ())
        self.folder: RunFolder = create(config, "x")
        self.network = Network(Worker(config, self.folder.clients))
        self.tasks: list[Task] = []
        self.events: list[Event] = []

        def told(node: int, task: Task, update: Update) -> Update | str | None:
            self.tasks.append(task)
            return spoil(node, task, update) if spoil else update

        self.network.spoil = told

    def run(self) -> State:
        return run_rounds(self.network, self.tuned, self.folder, self.events.append)

    def reasons(self) -> list[str]:
        return [one.reason for one in self.events if isinstance(one, ClientDone) and one.reason]


def test_each_round_has_the_policy_that_the_rounds_before_made(
    shared: Path, tmp_path: Path
) -> None:
    bench = Bench(config_of(tmp_path, shared))
    last = bench.run()
    actors = {task.round: cut_off(ACTOR, task.tensors)[1] for task in bench.tasks}
    learner = learner_of(bench.config)
    assert same(actors[1], cut_off(ACTOR, learner.told(learner.start()))[1])
    # Two clients' transition each are too few to learn from; eight are enough.
    assert same(weights(actors[1]), weights(actors[2]))
    assert not same(weights(actors[2]), weights(actors[3]))
    assert int(last.learner["buffer.seen"][0]) == 2 * (1 + 3 + 3)
    stored = latest(bench.folder, bench.tuned.fingerprint)
    assert stored is not None
    assert same(stored.learner, last.learner)
    assert not any("/" in name for name in stored.adapter)


def test_the_order_of_answers_changes_nothing(shared: Path, tmp_path: Path) -> None:
    found = []
    for name, backwards in (("one", False), ("two", True)):
        bench = Bench(config_of(tmp_path / name, shared, federation__rounds=2))
        bench.network.backwards = backwards
        found.append(bench.run())
    assert same(found[0].learner, found[1].learner)
    assert same(found[0].adapter, found[1].adapter)


def _without(update: Update) -> Tensors:
    return cut_off(MADE, update.tensors)[0]


def _with(update: Update, name: str, value: Any) -> Tensors:
    return update.tensors | {f"{MADE}{name}": value}


LIES: dict[str, tuple[Callable[[Update], Tensors], str]] = {
    "none at all": (_without, "transitions of"),
    "nan": (
        lambda u: _with(u, "reward", u.tensors[f"{MADE}reward"] * np.nan), "transitions' reward",
    ),
    "rewards without end": (
        lambda u: _with(u, "reward", u.tensors[f"{MADE}reward"] + np.float32(9)),
        "transitions' reward",
    ),
    "too many": (
        lambda u: u.tensors | {
            name: np.resize(value, (4, *value.shape[1:]))
            for name, value in u.tensors.items() if name.startswith(MADE)
        },
        "4 transitions in a round that makes 3 at most",
    ),
    "another name": (lambda u: _with(u, "secret", np.zeros(3, np.float32)), "transitions of"),
}  # fmt: skip


@pytest.fixture(scope="module")
def lies(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, State]:
    """One client tells another lie in every round; the other is honest."""
    order = list(LIES.values())

    def spoil(node: int, task: Task, update: Update) -> Update:
        return update if node == 10 else replace(update, tensors=order[task.round - 1][0](update))

    folder = tmp_path_factory.mktemp("lies")
    bench = Bench(config_of(folder, shared, federation__rounds=len(order)), spoil)
    return bench, bench.run()


def test_a_client_with_bad_transitions_is_dropped(lies: tuple[Bench, State]) -> None:
    bench, _ = lies
    reasons = bench.reasons()
    assert len(reasons) == len(LIES)
    for reason, (_, words) in zip(reasons, LIES.values(), strict=True):
        assert words in reason
    outcomes = [(row["client"], row["outcome"]) for row in bench.folder.client_rows()]
    assert outcomes == [("owner-2", "ok"), ("owner-3", "dropped")] * len(LIES)


def test_nothing_of_a_dropped_client_is_learnt_from(lies: tuple[Bench, State]) -> None:
    _, last = lies
    honest = 1 + 3 * (len(LIES) - 1)
    assert int(last.learner["buffer.seen"][0]) == honest
    assert float(np.abs(last.learner["buffer.reward"]).max()) <= 1.0


def test_transitions_that_nobody_asked_for_are_dropped(shared: Path, tmp_path: Path) -> None:
    example = EXAMPLE | {"clip": "quantile"}
    extra = np.zeros(1, np.float32)

    def spoil(node: int, task: Task, update: Update) -> Update:
        return replace(update, tensors=_with(update, "reward", extra)) if node == 11 else update

    bench = Bench(
        config_of(tmp_path, shared, privacy__example=example, federation__rounds=1), spoil
    )
    assert bench.run().learner == {}
    assert bench.reasons() == ["tensors do not match: ['transitions/reward']"]
    assert not any(name.startswith(ACTOR) for task in bench.tasks for name in task.tensors)
