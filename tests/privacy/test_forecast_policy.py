"""The plan of a clipping policy says what the policy then does, and what it costs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.accounting import spent
from fedtune.privacy.events import Charge, PoissonGaussian, Unit
from fedtune.privacy.forecast import forecast, lines
from fedtune.privacy.forecast_policy import begin, moving_noise, outline, policy_lines
from fedtune.privacy.rldp.controller import raw_sensing, rldp
from fedtune.privacy.rldp.named import POLICIES
from tests.privacy import chosen

ACTION = [0.5, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
SETTINGS: dict[str, dict[str, Any]] = {
    "online": {"clip": "rldp", "rldp": {"mode": "online"}},
    "at-once": {"clip": "rldp", "rldp": {"mode": "online", "warmup": 0.0, "interval": 7}},
    "long-warmup": {"clip": "rldp", "rldp": {"mode": "online", "warmup": 0.5, "interval": 4}},
    "random": {"clip": "random", "rldp": {"mode": "online", "interval": 4}},
    "constant": {"clip": "constant", "constant": ACTION, "rldp": {"mode": "online", "interval": 7}},
}


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_it_decides_as_often_as_the_plan_says(name: str) -> None:
    promise = chosen.example_of(**SETTINGS[name])
    made = outline(promise, chosen.SIZES)
    rows = chosen.rows_of(promise)
    assert len(rows) == chosen.ROUNDS * chosen.STEPS
    assert sum("action" in row for row in rows) == made["decisions"] > 0


def test_the_interval_is_the_controllers_own() -> None:
    for changes in ({"mode": "online"}, {"mode": "online", "preset": "paper"}, {"mode": "online",
                    "interval": 9}):  # fmt: skip
        promise = chosen.example_of(clip="rldp", rldp=changes)
        policy = chosen.policy(promise)
        assert outline(promise, chosen.SIZES)["interval"] == policy.interval  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("clip", "table"),
    [
        ("rldp", {"mode": "online", "sensing": 0.04}),
        ("rldp", {"mode": "online", "reward": "held-out", "held_out": chosen.HELD}),
        ("rldp", {"mode": "online", "reward": "public", "public": "public.csv", "factors": True}),
        ("quantile-per-adapter", None),
        ("quantile", None),
        ("dp-lac", None),
        ("geoclip", None),
    ],
)
def test_noise_of_the_sensors_is_that_of_the_releases(clip: str, table: Any) -> None:
    promise = chosen.example_of(clip=clip, rldp=table)
    made, policy = outline(promise, chosen.SIZES), chosen.policy(promise)
    seen = chosen.release(promise, policy, 0, np.random.default_rng(0), 1.0)
    for name, value in (
        ("bits_noise", seen.inside_deviation),
        ("loss_noise", seen.loss_deviation),
        ("held_noise", seen.held_deviation),
    ):
        assert made[name] == (None if value is None else pytest.approx(value.value))
    assert made["blocks"] == len(seen.shape.names)
    share = made["bits"] + made["loss"]
    norm, deviation = seen.shape.norms[0], seen.deviations.value[0]
    alone = norm / math.sqrt(seen.shape.shares[0]) / promise.mechanism.denominator
    assert deviation / alone - 1.0 == pytest.approx(made["extra_noise"]) == (1 - share) ** -0.5 - 1


@pytest.mark.parametrize("clip", ["flat", "per-adapter", "automatic"])
def test_nothing_is_said_of_what_never_moves(clip: str) -> None:
    promise = chosen.example_of(clip=clip)
    made = forecast(promise, sum(chosen.SIZES.values()), sizes=chosen.SIZES)
    assert policy_lines(made["policy"], Unit.EXAMPLE) == []
    assert not any("sensing" in line for line in lines(made))


def test_the_plan_in_words() -> None:
    promise = chosen.example_of(**SETTINGS["online"])
    made = forecast(promise, sum(chosen.SIZES.values()), sizes=chosen.SIZES)
    text = "\n".join(lines(made))
    outlined = made["policy"]
    assert "rldp (online, reward loss), 3 blocks of parameters" in text
    assert f"{outlined['decisions']} decisions, one in 1 step after 6 steps" in text
    assert "1% of the privacy of each step: 0.50% more gradient noise" in text
    assert f"share {outlined['bits_noise']:.2g} and of the mean loss" in text
    assert "epsilon stays as above" in text
    assert made["epsilon"] == forecast(chosen.example_of(), 100)["epsilon"], (
        "a policy costs nothing"
    )


def test_a_reward_that_noise_drowns_is_named() -> None:
    loud = chosen.example_of(clip="rldp", rldp={"mode": "online"}, noise_multiplier=20.0)
    made = outline(loud, chosen.SIZES) | {"over_time": moving_noise(loud, loud.spent())}
    (line,) = [line for line in policy_lines(made, Unit.EXAMPLE) if "reward  " in line]
    assert "'public' has no noise" in line
    held = chosen.example_of(clip="rldp", rldp={"mode": "online", "reward": "held-out",
                                                "interval": 30})  # fmt: skip
    made = outline(held, chosen.SIZES) | {"over_time": moving_noise(held, held.spent())}
    (line,) = [line for line in policy_lines(made, Unit.EXAMPLE) if "reward  " in line]
    assert "the loss of 5% of the rows, which train nothing" in line


def test_at_client_level_rounds_are_counted_and_no_loss_is_sensed() -> None:
    promise = chosen.client_of(
        clip="rldp", rldp={"mode": "meta", "reward": "public", "public": "p"}
    )
    made = outline(promise, chosen.SIZES) | {"over_time": moving_noise(promise, promise.spent())}
    assert (made["loss"], made["bits"]) == (0.0, 0.01)
    text = "\n".join(policy_lines(made, Unit.CLIENT))
    assert "36 decisions, one in 1 round after 4 rounds" in text


@pytest.mark.parametrize("noise", ["order", "filtered"])
def test_the_price_of_variety_is_against_constant_noise_of_the_same_epsilon(noise: str) -> None:
    table = {"mode": "online", "noise": noise, "spread": 0.2}
    promise = chosen.example_of(clip="rldp", rldp=table)
    total = promise.spent()
    made = moving_noise(promise, total)
    q, releases = promise.mechanism.sampler.rate, chosen.ROUNDS * chosen.STEPS

    def epsilon(z: float) -> float:
        charge = Charge(PoissonGaussian(q, z), releases)
        return spent([charge], promise.delta, promise.relation).epsilon

    assert epsilon(made["constant"]) <= total.epsilon < epsilon(made["constant"] * 0.995)
    typical = 1.0
    if noise == "order":
        precision = sum(n / z**2 for z, n in made["levels"]) / chosen.STEPS
        typical = precision**-0.5
        assert [n for _, n in made["levels"]] == [5, 5, 5]
    assert made["price"] == pytest.approx(typical / made["constant"] - 1.0)
    assert made["price"] > 0.01, "variety and a filter both cost"
    text = "\n".join(
        policy_lines(outline(promise, chosen.SIZES) | {"over_time": made}, Unit.EXAMPLE)
    )
    assert f"{made['price']:.1%} more noise than constant noise" in text
    assert ("in any order" in text) == (noise == "order")
    assert ("refuses a step before anybody is drawn" in text) == (noise == "filtered")


def test_raw_sensing_has_no_plan_and_no_statement(monkeypatch: pytest.MonkeyPatch) -> None:
    promise = chosen.example_of(clip="rldp", rldp={"mode": "online"})
    assert begin(promise, chosen.SIZES).honest
    monkeypatch.setitem(POLICIES, "rldp", raw_sensing)
    for ask in (begin, outline):
        with pytest.raises(FedtuneError, match="NOT differentially private") as refused:
            ask(promise, chosen.SIZES)
        assert refused.value.code == ExitCode.PRIVACY
    monkeypatch.setitem(POLICIES, "rldp", rldp)
    assert outline(promise, chosen.SIZES)["blocks"] == 3
