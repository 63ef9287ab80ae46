"""GeoClip: scales from releases alone, which way they go, and whether that helps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.noise import SecureNoise
from fedtune.privacy.rldp import rules
from fedtune.privacy.rldp.geoclip import geoclip, scales_of, shrunk
from fedtune.privacy.rldp.joint import Seen
from fedtune.privacy.rldp.policy import Policy
from tests.privacy.rules_kit import (
    SHAPES,
    SIZES,
    WIDTH,
    job_of,
    mechanism_of,
    people,
    run,
    seen_of,
    step,
    true_quantile,
)


def uneven() -> NDArray[np.float64]:
    """Return sizes of coordinates: one tensor is loud, and within another every fourth is."""
    scale = np.full(WIDTH, 0.02)
    scale[: SIZES["l.0.q.lora_A.weight"]] = 1.0
    scale[-SIZES["l.1.q.lora_B.weight"] :: 4] = 1.0
    return scale


def centred(seed: int, scale: NDArray[np.float64]) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return np.asarray(rng.normal(size=(400, WIDTH)) * scale, np.float32)


def flattened(arrays: Any) -> NDArray[np.float64]:
    return np.concatenate([np.asarray(arrays[n], np.float64).reshape(-1) for n in SHAPES])


def trained(
    policy: Policy, rows: NDArray[np.float32], z: float, steps: int
) -> list[Seen]:  # fmt: skip
    job = job_of(noise_multiplier=z, steps=steps)
    return run(policy, job, rows, steps=steps)


def test_loud_coordinates_are_scaled_down() -> None:
    job = job_of(noise_multiplier=0.5, steps=400)
    policy = geoclip(job)
    assert policy.shape().scales is None
    seen = trained(policy, centred(1, uneven()), 0.5, 400)
    first = next(n for n, one in enumerate(seen) if one.shape.scales is not None)
    assert first == 40  # after the warm-up
    scales = flattened(policy.shape().scales)
    assert policy.shape().scales is not None
    for name, value in (policy.shape().scales or {}).items():
        assert value.shape == SHAPES[name]
        assert value.dtype == np.float32
    loud = uneven() > 0.5
    ratio = np.median(scales[~loud]) / np.median(scales[loud])
    assert 5.0 < ratio < 9.0  # (1 / 0.02)^(1/2) = 7.1; 3 with the noise left in
    assert scales[loud].max() < scales[~loud].min() * 1.2
    # Also within one tensor, which no share of a block could do.
    tail = slice(WIDTH - SIZES["l.1.q.lora_B.weight"], WIDTH)
    assert np.median(scales[tail][1::4]) > 2.0 * np.median(scales[tail][::4])


def test_even_gradients_and_pure_noise_are_left_alone() -> None:
    for rows in (centred(2, np.ones(WIDTH)), np.zeros((0, WIDTH), np.float32)):
        policy = geoclip(job_of(steps=200))
        trained(policy, rows, 1.0, 200)
        scales = policy.shape().scales
        if scales is not None:
            assert np.sqrt(np.mean(np.log(flattened(scales)) ** 2)) < 0.25


def test_the_norm_is_that_of_the_scaled_gradients() -> None:
    job = job_of(noise_multiplier=0.5, steps=400)
    policy, rows = geoclip(job), centred(3, uneven())
    trained(policy, rows, 0.5, 400)
    scaled = rows * flattened(policy.shape().scales)
    target = true_quantile(np.asarray(scaled, np.float32), tuple(SIZES), 0.5)
    assert abs(math.log(policy.shape().norms[0] / target)) < 0.2


def test_a_change_of_scales_moves_the_norm_with_it() -> None:
    """Without the bits too: it stays near the median, which moves by a factor of 2.6."""
    rows = centred(4, uneven())
    start = true_quantile(rows, tuple(SIZES), 0.5)
    for quantile in (0.0, 1.0):
        job = job_of(
            noise_multiplier=0.5, steps=400, clip_norm=start, options={"geoclip_quantile": quantile}
        )
        policy = geoclip(job)
        assert (policy.sensing.bits > 0.0) == bool(quantile)
        mechanism, source = mechanism_of(job), SecureNoise()
        for number in range(60):
            step(policy, mechanism, rows, source, number)
        scaled = np.asarray(rows * flattened(policy.shape().scales), np.float32)
        median = true_quantile(scaled, tuple(SIZES), 0.5)
        assert abs(math.log(start / median)) > 0.7
        assert abs(math.log(policy.shape().norms[0] / median)) < 0.3


def test_it_is_nearer_to_the_true_mean_than_the_flat_quantile() -> None:
    """Mean squared error of the release around the mean gradient, both with the same privacy."""
    gains = []
    for seed in range(12):
        rng = np.random.default_rng(100 + seed)
        scale = uneven()
        rows = np.asarray(
            (rng.normal(size=(400, WIDTH)) + 0.3 * rng.normal(size=WIDTH)) * scale, np.float32
        )
        mean = rows.astype(np.float64).mean(0)
        errors = []
        for maker in (rules.quantile_flat, geoclip):
            job = job_of(noise_multiplier=1.0, steps=240)
            seen = run(maker(job), job, rows, steps=240)[120:]
            found = [np.square(flattened(one.means.value) - mean).sum() for one in seen]
            errors.append(float(np.mean(found)))
        gains.append(1.0 - errors[1] / errors[0])
    half = float(stats.t.ppf(0.975, len(gains) - 1)) * float(stats.sem(gains))
    assert np.mean(gains) - half > 0.15, (np.mean(gains), half)


def test_it_is_no_worse_than_the_flat_quantile_on_even_gradients() -> None:
    gains = []
    for seed in range(8):
        rows = people(seed)
        mean = rows.astype(np.float64).mean(0)
        errors = []
        for maker in (rules.quantile_flat, geoclip):
            job = job_of(noise_multiplier=1.0, steps=160)
            seen = run(maker(job), job, rows, steps=160)[80:]
            found = [np.square(flattened(one.means.value) - mean).sum() for one in seen]
            errors.append(float(np.mean(found)))
        gains.append(1.0 - errors[1] / errors[0])
    assert np.mean(gains) > -0.05


# ---------------------------------------------------------------- estimates


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.floats(1e-12, 1e12), st.floats(0.0, 100.0), st.floats(1.0, 50.0)
)
def test_scales_are_bounded_and_level_whatever_the_estimates(
    seed: int, size: float, signal: float, limit: float
) -> None:
    rng = np.random.default_rng(seed)
    shapes = [(3, 4), (1,), (50,)]
    errors = {str(i): size * rng.uniform(0.5, 2.0, shape) for i, shape in enumerate(shapes)}
    squares = {
        name: error * (rng.normal(size=error.shape) + signal * rng.exponential(size=error.shape))
        for name, error in errors.items()
    }
    found = shrunk(squares, errors)
    if found is None:
        return
    scales = scales_of(found, limit)
    for name, value in scales.items():
        assert bool(np.isfinite(found[name]).all())
        assert bool((found[name] > 0).all())
        assert value.shape == squares[name].shape
        assert float(value.max()) <= limit * (1 + 1e-6)
        assert float(value.min()) >= 1 / limit * (1 - 1e-6)
    free = scales_of(found, 1e30)
    assert (
        abs(float(np.mean(np.concatenate([np.log(v).reshape(-1) for v in free.values()])))) < 1e-4
    )


def test_estimates_are_nearer_to_the_truth_when_drawn_together() -> None:
    rng = np.random.default_rng(5)
    gains = []
    for _ in range(50):
        truth = {"a": rng.uniform(0.5, 1.5, 200), "b": rng.uniform(4.0, 6.0, 300)}
        errors = {name: np.full(value.shape, 1.0) for name, value in truth.items()}
        raw = {name: value + rng.normal(size=value.shape) for name, value in truth.items()}
        found = shrunk(raw, errors)
        assert found is not None
        worse, better = (
            sum(float(np.square(one[name] - truth[name]).sum()) for name in truth)
            for one in (raw, found)
        )
        gains.append(1.0 - better / worse)
    assert min(gains) > 0.5


def test_noise_alone_is_no_evidence() -> None:
    rng = np.random.default_rng(6)
    errors = {"a": np.ones(1000), "b": np.full((20, 50), 3.0)}
    results = [
        shrunk({name: e * rng.normal(size=e.shape) for name, e in errors.items()}, errors)
        for _ in range(200)
    ]
    share = np.mean([found is not None for found in results])
    assert share < 0.08  # one side beyond two standard errors: 2.3 %


def test_the_variance_of_a_poisson_sampled_sum_is_the_mean_square() -> None:
    """What the docstring says of centring: gradients that are all alike vary as well."""
    job = job_of(noise_multiplier=1e-3, steps=400, clip_norm=100.0)
    job = replace(job, options={"geoclip_quantile": 0.0, "geoclip_window": 400})
    rows = np.ones((400, WIDTH), np.float32)
    rows[:, ::2] = 3.0
    policy = geoclip(job)
    seen = run(policy, job, rows, steps=400)
    values = np.stack([flattened(one.means.value) for one in seen])
    found = values.var(0) / (0.8 / 80.0)
    assert found[1::2] == pytest.approx(1.0, rel=0.4)
    assert found[::2] == pytest.approx(9.0, rel=0.4)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "options",
    [
        {"geoclip_limit": 0.5},
        {"geoclip_limit": math.nan},
        {"geoclip_every": -1},
        {"geoclip_every": 1.5},
        {"geoclip_warmup": True},
    ],
)
def test_settings_that_cannot_be_used_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(FedtuneError):
        geoclip(job_of(options=options))


def test_means_of_another_model_are_refused() -> None:
    policy = geoclip(job_of())
    other = geoclip(job_of(sizes=SIZES | {"more": 3}))
    with pytest.raises(FedtuneError, match="parameters"):
        other.observe(seen_of(policy, [0.5]))


def test_a_state_with_shapes_of_another_model_is_refused() -> None:
    job = job_of(noise_multiplier=0.5, steps=400)
    policy = geoclip(job)
    trained(policy, centred(7, uneven()), 0.5, 60)
    state = policy.state()
    name = "l.0.q.lora_A.weight"
    assert f"scale/{name}" in state
    other = geoclip(job)
    turned = {
        key: value.T.copy() if key == f"square/{name}" else value for key, value in state.items()
    }
    without = {key: value for key, value in state.items() if not key.startswith("noise/")}
    unsound = [
        state | {f"scale/{name}": -state[f"scale/{name}"]},
        state | {f"noise/{name}": -state[f"noise/{name}"]},
        state | {"weights": np.zeros(2)},
        state | {"count": np.array([0])},
    ]
    for bad in (turned, without, *unsound):
        with pytest.raises(FedtuneError) as caught:
            other.restore(bad)
        assert caught.value.code == ExitCode.RESUME_REFUSED
    other.restore(state)
    assert other.shape().norms == policy.shape().norms
    assert np.array_equal(flattened(other.shape().scales), flattened(policy.shape().scales))


def test_shapes_that_were_given_out_do_not_change_later() -> None:
    job = job_of(noise_multiplier=0.5, steps=400)
    policy, rows = geoclip(job), centred(8, uneven())
    trained(policy, rows, 0.5, 60)
    shape, state = policy.shape(), policy.state()
    kept = flattened(shape.scales).copy()
    copies = {name: value.copy() for name, value in state.items()}
    trained(policy, rows, 0.5, 60)
    assert np.array_equal(flattened(shape.scales), kept)
    assert all(np.array_equal(state[name], copies[name]) for name in state)
    assert not np.array_equal(flattened(policy.shape().scales), kept)
