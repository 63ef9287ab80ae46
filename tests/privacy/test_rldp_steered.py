"""Actions without learning: random ones, and the same one again and again."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.config_privacy import RldpConfig
from fedtune.privacy.rldp import rules
from fedtune.privacy.rldp.joint import Seen
from fedtune.privacy.rldp.quantiles import Quantiles, least_noise
from tests.privacy.rules_kit import (
    job_of,
    people,
    run,
)

# ---------------------------------------------------------------- random and constant


def _walked(seed: int, options: dict[str, Any] | None = None) -> list[Seen]:
    job = job_of(seed=seed, options=options or {})
    return run(rules.random_walk(job), job, people(12), seed=3, steps=80)


def test_random_actions_come_from_the_seed_alone() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 a policy must not use it
    one = [seen.shape.norms for seen in _walked(1)]
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert [seen.shape.norms for seen in _walked(1)] == one
    assert [seen.shape.norms for seen in _walked(2)] != one


def test_random_acts_at_the_controllers_times_after_a_warm_up_at_the_quantile() -> None:
    job = job_of(options={"rldp": RldpConfig(interval=10, warmup=0.1)})
    policy = rules.random_walk(job)
    rule = Quantiles(job, policy.shape().names, policy.sensing.bits)
    begun, ruled = (run(one, job, people(12), seed=3, steps=20) for one in (policy, rule))
    assert [one.shape for one in begun] == [one.shape for one in ruled]
    assert [one.inside is not None for one in begun] == [True] * 20
    before = rule.norms
    (said,) = policy.decisions()
    assert said["step"] == 20
    moves = [math.log(new / old) for old, new in zip(before, policy.shape().norms, strict=True)]
    assert all(0.0 < abs(move) <= 0.3 + 1e-9 for move in moves)
    run(policy, job, people(12), seed=4, steps=60)
    assert [row["step"] for row in policy.decisions()] == [30, 40, 50, 60, 70, 80]


def test_constant_action_is_held_and_logged() -> None:
    options = {
        "constant": (1.0, 0.0, 0.0, -1.0, -1.0, 0.0, 0.0, 0.0, 0.0),
        "rldp": RldpConfig(mode="online", preset="paper", interval=20, warmup=0.0),
    }
    job = job_of(options=options)
    policy = rules.constant_action(job)
    first = policy.shape()
    run(policy, job, people(13), steps=60)
    rows = policy.decisions()
    assert [row["step"] for row in rows] == [0, 20, 40, 60]
    assert rows[1]["action"] == list(options["constant"])  # type: ignore[call-overload]
    assert policy.decisions() == []
    ratio = [new / old for old, new in zip(first.norms, policy.shape().norms, strict=True)]
    assert ratio == pytest.approx([math.exp(0.9)] * 2)
    assert policy.shape().shares == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize("warmup", [0.0, 0.5])
def test_actions_of_zeros_go_on_with_the_quantile_rule(warmup: float) -> None:
    """As the controller's do, with the same sensors: what is compared is the choice alone."""
    config = RldpConfig(interval=20, warmup=warmup)
    job = job_of(options={"constant": (0.0,) * 9, "rldp": config})
    steered = rules.constant_action(job)
    rule = Quantiles(job, steered.shape().names, steered.sensing.bits, least_noise)
    for policy in (steered, rule):
        run(policy, job, people(13), seed=3, steps=61)
    assert steered.sensing.bits == config.sensing / 2.0 > 0.0
    assert steered.shape().norms == pytest.approx(rule.norms)
    assert max(rule.norms) != pytest.approx(job.clip_norm / math.sqrt(2), rel=0.05)


@pytest.mark.parametrize("noise", ["constant", "filtered"])
def test_the_noise_token_is_used_only_where_noise_is_free(noise: str) -> None:
    options = {
        "constant": (0.0,) * 8 + (1.0,),
        "rldp": RldpConfig(interval=5, warmup=0.05, noise=noise, spread=0.1),  # type: ignore[arg-type]
    }
    job = job_of(options=options)
    policy = rules.constant_action(job)
    assert policy.wanted_noise() is None
    run(policy, job, people(14), steps=12)
    wanted = policy.wanted_noise()
    assert wanted is None if noise == "constant" else wanted == pytest.approx(1.1)
