"""What of a shared policy travels: names, sizes and numbers, at both ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.config import Config
from fedtune.config_privacy import RldpConfig
from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.rldp.actions import interval_of
from fedtune.privacy.rldp.controller import ACTIONS, STATES, Controller, rldp, settings_of
from fedtune.privacy.rldp.features import Reading
from fedtune.privacy.rldp.policy import Job
from fedtune.privacy.rldp.sac import Sac
from fedtune.privacy.rldp.travel import (
    ACTOR,
    MADE,
    actor_of,
    cut_off,
    most_transitions,
    require_actor,
    require_transitions,
    shared_policy,
    whole_actor,
    with_mark,
)
from fedtune.wire import pack_tensors, unpack_tensors

SHARED = RldpConfig(mode="federated")
EXAMPLE: dict[str, Any] = {
    "relation": "add-or-remove-one", "population": 64, "delta": 1e-3, "noise_multiplier": 1.0,
    "clip": "rldp",
}  # fmt: skip


def config_of(rldp_: dict[str, Any] | None, **changes: Any) -> Config:
    example = EXAMPLE | ({} if rldp_ is None else {"rldp": rldp_}) | changes
    return Config.model_validate(
        {
            "data": {"pack": False, "holdout": 0.0}, "evaluation": {"clients": 0},
            "federation": {"weighting": "uniform", "rounds": 5}, "tuning": {"steps": 30},
            "privacy": {"example": example},
        }
    )  # fmt: skip


def controller(settings_: RldpConfig, steps: int) -> Controller:
    job = Job(
        {"base_model.layers.0.lora_A": 8, "base_model.layers.0.lora_B": 6}, steps, 1.0, 16.0, 1.0,
        options={"rldp": settings_},
    )  # fmt: skip
    made = rldp(job)
    assert isinstance(made, Controller)
    return made


def reading(step: int, blocks: int) -> Reading:
    rng = np.random.default_rng(step)
    return Reading(
        step, 1.0, rng.normal(size=blocks), rng.normal(size=14).astype(np.float32),
        rng.uniform(size=blocks), float(rng.normal(3.0, 0.1)), 0.1, None, None,
    )  # fmt: skip


def test_only_the_federated_mode_of_the_learning_policy_is_shared() -> None:
    assert shared_policy(config_of({"mode": "federated"})) == SHARED
    for other in ({"mode": "online"}, {"mode": "meta"}, None):
        assert shared_policy(config_of(other)) is None
        assert most_transitions(config_of(other)) == 0
    assert shared_policy(config_of({"mode": "federated"}, clip="random")) is None
    assert shared_policy(Config()) is None


@pytest.mark.parametrize(
    "asked",
    [RldpConfig(), RldpConfig(interval=7), RldpConfig(mode="online", preset="paper"),
     RldpConfig(mode="online", preset="paper", interval=3), SHARED],
)  # fmt: skip
@pytest.mark.parametrize("steps", [1, 39, 40, 41, 400, 1000])
def test_the_interval_is_the_controllers_own(asked: RldpConfig, steps: int) -> None:
    assert interval_of(asked, steps) == controller(asked, steps).interval


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(releases=st.integers(1, 12), interval=st.integers(1, 14))
def test_no_round_has_more_transitions_than_the_server_takes(releases: int, interval: int) -> None:
    """And some round has as many, so that no honest client is cut short or a liar given more."""
    asked = RldpConfig(mode="federated", interval=interval, warmup=0.0)
    config = config_of(asked.model_dump()).model_copy(
        update={"tuning": Config().tuning.model_copy(update={"steps": releases})}
    )
    rounds = 4 + 2 * interval
    policy = controller(asked, releases * rounds)
    most, found = most_transitions(config), []
    for number in range(rounds):
        for step in range(releases):
            blocks = len(policy.shape().norms)
            policy.take(reading(number * releases + step, blocks))
        made = policy.transitions()
        require_transitions(made, most)
        found.append(len(made["reward"]))
    assert max(found) == most >= 1


def actor() -> dict[str, Any]:
    return actor_of(Sac(STATES, ACTIONS, settings_of(SHARED), seed=3).actor_state())


def test_what_acting_needs_comes_through_the_wire_and_acts_alike() -> None:
    sac = Sac(STATES, ACTIONS, settings_of(SHARED), seed=3)
    sent = with_mark(ACTOR, actor_of(sac.actor_state()))
    weights = {"w": np.ones(3, np.float32)}
    rest, found = cut_off(ACTOR, unpack_tensors(pack_tensors(weights | sent)))
    assert set(rest) == {"w"}
    require_actor(found, SHARED)
    other = Sac(STATES, ACTIONS, settings_of(SHARED), seed=4)
    state = np.random.default_rng(0).uniform(-1, 1, STATES).astype(np.float32)
    assert not np.array_equal(other.act(state, mean=True), sac.act(state, mean=True))
    other.load_actor(whole_actor(found, SHARED))
    assert np.array_equal(other.act(state, mean=True), sac.act(state, mean=True))
    assert not any(name.startswith(("critic", "target", "temperature")) for name in found)


def spoilt_actors() -> dict[str, dict[str, Any]]:
    good = actor()
    name = min(one for one in good if one.startswith("actor.") and good[one].ndim > 1)
    value = good[name]

    def put(**changed: Any) -> dict[str, Any]:
        return good | {name: changed["value"]}

    nan, infinite, huge = value.copy(), value.copy(), value.copy()
    nan.flat[0], infinite.flat[-1], huge.flat[1] = np.nan, -np.inf, 1e7
    return {
        "nothing": {},
        "one missing": {key: one for key, one in good.items() if key != name},
        "one more": good | {"critic.0.weight": np.zeros(3, np.float32)},
        "nan": put(value=nan), "infinite": put(value=infinite), "huge": put(value=huge),
        "shape": put(value=value[:-1]), "transposed": put(value=value.T.copy()),
        "float64": put(value=value.astype(np.float64)),
        "no count": good | {"seen.count": np.array([0], np.int64)},
        "negative squares": good | {"seen.squares": -good["seen.squares"]},
        "nan squares": good | {"seen.squares": good["seen.squares"] * np.nan},
    }  # fmt: skip


@pytest.mark.parametrize("case", spoilt_actors())
def test_what_is_no_actor_is_refused(case: str) -> None:
    with pytest.raises(FedtuneError, match="the policy") as caught:
        require_actor(spoilt_actors()[case], SHARED)
    assert caught.value.code == ExitCode.PRIVACY


def made(count: int) -> dict[str, Any]:
    rng = np.random.default_rng(count)

    def some(*shape: int) -> Any:
        return rng.uniform(-1, 1, (count, *shape)).astype(np.float32)

    return {"state": some(STATES), "action": some(ACTIONS), "reward": some(),
            "next_state": some(STATES), "done": np.zeros(count, np.float32)}  # fmt: skip


@pytest.mark.parametrize("count", [0, 1, 5])
def test_transitions_come_through_the_wire(count: int) -> None:
    sent = pack_tensors(with_mark(MADE, made(count)))
    rest, found = cut_off(MADE, unpack_tensors(sent))
    assert rest == {}
    back = require_transitions(found, 5)
    assert len(back) == count
    for one, reward, state in zip(back, made(count)["reward"], made(count)["state"], strict=True):
        assert one.reward == reward
        assert np.array_equal(one.state, state)
        assert one.done is False


def spoilt_transitions() -> dict[str, dict[str, Any]]:
    good = made(4)

    def one(name: str, value: float) -> dict[str, Any]:
        changed = good[name].copy()
        changed.flat[-1] = value
        return good | {name: changed}

    return {
        "nothing": {}, "too many": made(6), "very many": made(100_000),
        "a name missing": {name: value for name, value in good.items() if name != "done"},
        "a name more": good | {"weight": np.zeros(4, np.float32)},
        "nan": one("state", np.nan), "infinite": one("next_state", np.inf),
        "an action too large": one("action", 1.0001), "a reward too large": one("reward", -2.0),
        "an end": one("done", 1.0), "half an end": one("done", 0.5),
        "another length": good | {"reward": good["reward"][:-1]},
        "a number for rows": good | {"reward": np.float32(0.5).reshape(())},
        "float64": good | {"reward": good["reward"].astype(np.float64)},
        "another size": good | {"state": good["state"][:, 1:]},
        "flat": good | {"state": good["state"].ravel()},
        "nothing but names": {name: np.zeros((), np.float32) for name in good},
    }  # fmt: skip


@pytest.mark.parametrize("case", spoilt_transitions())
def test_what_no_controller_makes_is_refused(case: str) -> None:
    require_transitions(made(5), 5)
    with pytest.raises(FedtuneError) as caught:
        require_transitions(spoilt_transitions()[case], 5)
    assert caught.value.code == ExitCode.PRIVACY
