"""The policies to beat: through the real mechanism, what they converge to, cost and remember."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.clipping import Quantile
from fedtune.privacy.events import Unit
from fedtune.privacy.noise import InsecureSeededNoise, SecureNoise
from fedtune.privacy.plan import Promise
from fedtune.privacy.replay import Stage
from fedtune.privacy.replay_checks import audit, extremes, neighbours
from fedtune.privacy.rldp import rules
from fedtune.privacy.rldp.policy import Job, Policy, require_honest
from fedtune.privacy.rldp.shape import mechanism_blocks
from tests.privacy.rules_kit import (
    BATCH,
    MAKERS,
    MOVING,
    SHAPES,
    SIZES,
    STEPS,
    WIDTH,
    job_of,
    mechanism_of,
    people,
    run,
    seen_of,
    step,
    true_quantile,
)

# ---------------------------------------------------------------- where norms go


@pytest.mark.parametrize(
    ("name", "quantile", "scale"),
    [
        ("quantile", 0.5, 0.02),
        ("quantile", 0.8, 5.0),
        ("quantile-per-adapter", 0.5, 5.0),
        ("quantile-per-adapter", 0.3, 0.02),
        ("closed-form", 0.5, 5.0),
    ],
)
def test_norms_converge_to_the_quantile_of_each_block(
    name: str, quantile: float, scale: float
) -> None:
    rows = people(1, scale)
    job = job_of(options={"quantile": quantile, "sensing": 0.05})
    policy = MAKERS[name](job)
    seen = run(policy, job, rows)
    shape = policy.shape()
    for index, block in enumerate(shape.names):
        late = [one.shape.norms[index] for one in seen[STEPS // 2 :]]
        share = float(np.mean([_inside(rows, block, norm) for norm in late]))
        assert abs(share - quantile) < 0.08
        start = abs(math.log(seen[0].shape.norms[index] / true_quantile(rows, block, quantile)))
        end = abs(math.log(float(np.median(late)) / true_quantile(rows, block, quantile)))
        assert end < 0.1 < start


def _inside(rows: NDArray[np.float32], names: Sequence[str], norm: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if true_quantile(rows, names, middle) <= norm else (low, middle)
    return low


def test_the_flat_quantile_is_what_the_client_did_before() -> None:
    """The same noise, the same rule: bits as ``Promise`` made them, the norm as `_moved` did."""
    job = job_of(options={"quantile": 0.6, "quantile_lr": 0.3})
    policy, rows = rules.quantile_flat(job), people(2, 0.05)
    bits = mechanism_blocks(mechanism_of(job), policy.shape(), policy.sensing)[0][1]
    sigma = max(BATCH / 20, 2.0 * job.noise_multiplier)
    assert bits.sigma == pytest.approx(sigma, rel=1e-12)
    norm = job.clip_norm
    for number, seen in enumerate(run(policy, job, rows, seed=5, steps=40)):
        assert seen.shape.norms == (norm,), number
        assert seen.inside is not None
        noisy = np.float32(seen.inside.value[0] - 0.5)  # exactly what was released
        norm = Quantile(0.6, 0.3).updated(norm, float(noisy) * BATCH, BATCH)
    assert norm != job.clip_norm


def test_the_plan_has_the_same_noise_on_bits() -> None:
    @dataclass(frozen=True)
    class Settings:
        quantile_noise: float

    for z, denominator, given_noise in [(1.0, 80.0, 0.0), (9.0, 80.0, 0.0), (1.0, 80.0, 1.7)]:
        job = job_of(
            noise_multiplier=z, denominator=denominator, options={"quantile_noise": given_noise}
        )
        mechanism = mechanism_of(job)
        promise = Promise(Unit.EXAMPLE, mechanism, Settings(given_noise), 1, 1)  # type: ignore[arg-type]
        policy = rules.quantile_flat(job)
        blocks, _ = mechanism_blocks(mechanism, policy.shape(), policy.sensing)
        assert blocks[1].sigma == pytest.approx(promise.bits_noise, rel=1e-9)


def test_noise_alone_never_drives_a_norm_out_of_bounds() -> None:
    job = job_of(noise_multiplier=80.0, denominator=2.0)  # nothing but noise
    rows = np.zeros((0, WIDTH), np.float32)
    for name in MOVING:
        policy = MAKERS[name](job)
        mechanism, source = mechanism_of(job), SecureNoise()
        for number in range(60):
            seen = step(policy, mechanism, rows, source, number)
            start = job.clip_norm / math.sqrt(len(seen.shape.norms))
            assert all(start / 1000 <= c <= 1000 * start for c in seen.shape.norms)


def test_lac_finds_the_median_and_then_pays_nothing() -> None:
    for scale in (0.02, 1.0, 30.0):
        rows, job = people(4, scale), job_of()
        policy = rules.dp_lac(job)
        target = true_quantile(rows, tuple(SIZES), 0.5)
        seen = run(policy, job, rows, steps=60)
        assert [one.inside is not None for one in seen[:10]] == [True] * 8 + [False] * 2
        assert abs(math.log(seen[8].shape.norms[0] / target)) < math.log(2.5)
        assert policy.sensing.left == 1.0
        # Steady gradients: it stays where it is.
        assert abs(math.log(seen[-1].shape.norms[0] / target)) < math.log(3.0)


def test_lac_follows_gradients_that_shrink_and_not_those_that_do_not() -> None:
    job, found = job_of(noise_multiplier=0.3), []
    for shrinks in (False, True):
        rows, policy = people(5), rules.dp_lac(job)
        mechanism, source = mechanism_of(job), SecureNoise()
        for number in range(STEPS):
            factor = 0.97 ** max(0, number - 40) if shrinks else 1.0
            step(policy, mechanism, rows * np.float32(factor), source, number)
        found.append(policy.shape().norms[0])
    steady, shrunk = found
    assert shrunk < 0.4 * steady
    assert 0.5 < steady / true_quantile(people(5), tuple(SIZES), 0.5) < 2.0


def test_lac_takes_the_known_noise_out_of_what_it_follows() -> None:
    policy = rules.dp_lac(job_of())
    for number in range(8):
        policy.observe(seen_of(policy, [0.6 if number % 2 else 0.4]))
    found = policy.shape().norms[0]
    # The noise doubles and the gradients stay; then they halve.
    for signal, z, expected in ((1.0, 1.0, 1.0), (1.0, 2.0, 1.0), (0.25, 2.0, 0.5)):
        for _ in range(150):
            noise = WIDTH * (policy.shape().deviations(z)[0] / BATCH) ** 2
            square = noise + signal * (found / 2) ** 2
            policy.observe(seen_of(policy, None, square, z))
        assert policy.shape().norms[0] == pytest.approx(expected * found, rel=0.1)


# ---------------------------------------------------------------- what releases cost


@pytest.mark.parametrize("name", MAKERS)
def test_every_release_costs_what_the_event_says(name: str) -> None:
    job = job_of()
    policy, rows, mechanism = MAKERS[name](job), people(6), mechanism_of(job)
    source = SecureNoise()
    for number in range(60):
        blocks, _ = mechanism_blocks(mechanism, policy.shape(), policy.sensing)
        cost = math.fsum((block.clip / block.sigma) ** 2 for block in blocks)
        assert cost == pytest.approx(1.0, rel=1e-9)
        assert math.fsum(policy.shape().shares) == pytest.approx(1.0, abs=1e-12)
        assert policy.shape().facts() == policy.shape().facts()
        step(policy, mechanism, rows, source, number)
    require_honest(policy)


numbers = st.floats(1e-3, 1e3)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 10**7), numbers, numbers), min_size=1, max_size=20))
def test_no_shares_have_less_noise_than_the_closed_form(
    blocks: list[tuple[int, float, float]],
) -> None:
    sizes, norms, others = zip(*blocks, strict=True)
    total = math.fsum(others)
    shares = tuple(other / total for other in others)
    least = rules.total_noise(sizes, norms, rules.least_noise(sizes, norms))
    bound = math.fsum(math.sqrt(d) * c for d, c in zip(sizes, norms, strict=True)) ** 2
    assert least == pytest.approx(bound, rel=1e-9)
    for given_shares in (shares, rules.equal(sizes, norms), rules.same_noise(sizes, norms)):
        assert math.fsum(given_shares) == pytest.approx(1.0, abs=1e-9)
        assert rules.total_noise(sizes, norms, given_shares) >= least * (1 - 1e-9)


def test_the_noise_in_a_release_is_less_with_the_closed_form() -> None:
    """Measured on what the mechanism gave, not on the formula."""
    scale = np.concatenate([np.full(32, 20.0), np.full(64, 0.02)])
    spent = {}
    for name in ("quantile-per-adapter", "closed-form"):
        job = job_of(options={"sensing": 0.05})
        seen = run(MAKERS[name](job), job, people(7, scale), seed=8)
        spent[name] = np.mean(
            [
                sum(
                    sum(SIZES[n] for n in block) * s * s
                    for block, s in zip(one.shape.names, one.deviations.value, strict=True)
                )
                for one in seen[STEPS // 2 :]
            ]
        )
    assert spent["closed-form"] < 0.7 * spent["quantile-per-adapter"]


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("at", [0, 5, 13, 47])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(name: str, at: int) -> None:
    job, rows = job_of(), people(9)
    policy, mechanism, source = MAKERS[name](job), mechanism_of(job), InsecureSeededNoise(1)
    for number in range(at):
        step(policy, mechanism, rows, source, number)
    again = MAKERS[name](job)
    again.restore({name: np.ascontiguousarray(value) for name, value in policy.state().items()})
    for number in range(at, at + 25):
        one, two = policy.shape(), again.shape()
        assert (one.norms, one.shares, policy.sensing) == (two.norms, two.shares, again.sensing)
        assert policy.wanted_noise() == again.wanted_noise()
        again.observe(step(policy, mechanism, rows, source, number))
    assert _bytes(policy.state()) == _bytes(again.state())


def _bytes(state: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    return {name: (value.dtype.str, value.shape, value.tobytes()) for name, value in state.items()}


@pytest.mark.parametrize("name", MOVING)
def test_a_state_that_is_none_of_its_own_is_refused(name: str) -> None:
    job, rows = job_of(), people(10)
    policy = MAKERS[name](job)
    run(policy, job, rows, seed=2, steps=50)
    before = _bytes(policy.state())
    for key, value in policy.state().items():
        bad = [
            {k: v for k, v in policy.state().items() if k != key},
            policy.state() | {"more": value},
            policy.state() | {key: np.concatenate([value.reshape(-1), value.reshape(-1)])},
            policy.state() | {key: value.astype(np.float16)},
        ]
        if value.dtype.kind == "f":
            bad += [
                policy.state() | {key: np.full_like(value, number)}
                for number in (math.nan, math.inf)
            ]
        if key in ("norms", "shares"):
            bad += [policy.state() | {key: value * factor} for factor in (0.0, -1.0, 1e7)]
        if key == "count":
            bad += [policy.state() | {key: np.full_like(value, -7)}]
        for state in bad:
            with pytest.raises(FedtuneError) as caught:
                policy.restore(state)
            assert caught.value.code == ExitCode.RESUME_REFUSED, key
    assert _bytes(policy.state()) == before


def test_fixed_policies_remember_nothing() -> None:
    policy = rules.fixed_flat(job_of())
    assert policy.state() == {}
    policy.restore({})
    with pytest.raises(FedtuneError, match="names"):
        policy.restore({"norms": np.ones(1)})


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["quantile", "quantile-per-adapter", "dp-lac"])
def test_a_number_that_is_none_is_refused_and_changes_nothing(name: str) -> None:
    policy = MAKERS[name](job_of())
    before = _bytes(policy.state())
    blocks = len(policy.shape().names)
    with pytest.raises(FedtuneError):
        policy.observe(seen_of(policy, [math.nan] * blocks))
    assert _bytes(policy.state()) == before


@pytest.mark.parametrize("name", ["dp-lac", "geoclip"])
def test_means_that_are_not_finite_are_refused(name: str) -> None:
    policy, job = MAKERS[name](job_of()), job_of()
    run(policy, job, people(11), steps=12)
    before = _bytes(policy.state())
    with pytest.raises(FedtuneError, match="not finite"):
        policy.observe(seen_of(policy, [0.5], math.inf))
    assert _bytes(policy.state()) == before


@pytest.mark.parametrize("name", MOVING)
def test_a_private_value_does_not_get_in(name: str) -> None:
    policy = MAKERS[name](job_of())
    seen = seen_of(policy, [0.5] * len(policy.shape().names))
    raw = {name: torch.zeros(size) for name, size in SHAPES.items()}
    bad = replace(seen, means=raw) if name == "geoclip" else replace(seen, inside=(0.5, 0.5))  # type: ignore[arg-type]
    with pytest.raises(FedtuneError, match="shown a"):
        policy.observe(bad)


@pytest.mark.parametrize(
    ("maker", "options"),
    [
        (rules.quantile_flat, {"quantile_noise": 0.5}),
        (rules.quantile_flat, {"quantile_noise": -1.0}),
        (rules.quantile_flat, {"quantile": 1.0}),
        (rules.quantile_flat, {"quantile_lr": math.nan}),
        (rules.quantile_per_adapter, {"sensing": 0.7}),
        (rules.quantile_per_adapter, {"sensing": "much"}),
        (rules.constant_action, {}),
        (rules.constant_action, {"constant": (0.0,) * 8}),
        (rules.constant_action, {"constant": (2.0,) + (0.0,) * 8}),
        (rules.constant_action, {"constant": (math.nan,) + (0.0,) * 8}),
    ],
)
def test_settings_that_cannot_be_used_are_refused(
    maker: Callable[[Job], Policy], options: dict[str, Any]
) -> None:
    with pytest.raises(FedtuneError) as caught:
        maker(job_of(options=options))
    assert caught.value.hint


# ---------------------------------------------------------------- record and replay


@pytest.mark.parametrize("name", MAKERS)
def test_a_neighbour_changes_no_decision(name: str) -> None:
    job = job_of(steps=24, options=job_of().options | {"geoclip_warmup": 4})
    public = mechanism_of(job, 100)

    def program(stage: Stage, rows: list[NDArray[np.float32]]) -> None:
        mechanism, source = stage.watch(public), SecureNoise()
        policy = MAKERS[name](job)
        table = np.stack(rows) if rows else np.zeros((0, WIDTH), np.float32)
        for number in range(24):
            seen = step(policy, mechanism, table, source, number)
            stage.emit("shape", policy.shape().facts())
            stage.emit("seen", dict(seen.means.value))
            stage.emit("state", policy.state())

    rows = people(15)[:100]
    pairs = neighbours(list(rows), extremes(rows[0]))
    assert audit(program, pairs) == []


def test_replay_catches_a_policy_that_looks_at_the_batch() -> None:
    """The same audit finds it when a norm depends on rows: the check above can fail."""
    job = job_of(steps=24)
    public = mechanism_of(job, 100)

    def program(stage: Stage, rows: list[NDArray[np.float32]]) -> None:
        mechanism, source = stage.watch(public), SecureNoise()
        table = np.stack(rows) if rows else np.zeros((0, WIDTH), np.float32)
        largest = float(np.nan_to_num(np.abs(table).max(initial=0.0), posinf=1e3))
        policy = rules.fixed_flat(replace(job, clip_norm=1.0 + min(largest, 1e3)))
        for number in range(24):
            step(policy, mechanism, table, source, number)

    rows = people(15)[:100]
    found = {finding.check for finding in audit(program, neighbours(list(rows), extremes(rows[0])))}
    assert "declared" in found
