"""Noise that is split among members adds up to what is accounted; sums never wrap."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedtune.config import Config
from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.noise import SecureNoise
from fedtune.privacy.plan import client_promise, honest_survivors, least_survivors
from fedtune.privacy.secagg import from_field, to_field
from fedtune.privacy.summing import LEAST, Summing, model_digest, summing

FALSE_ALARM = 1e-6
"""Chance that a right program fails one of the tests of variance here; draws are not seeded."""


def config(population: int, threshold: float, colluding: int, **client: Any) -> Config:
    return Config.model_validate({
        "data": {"pack": False, "holdout": 0.0}, "evaluation": {"clients": 0},
        "federation": {
            "weighting": "uniform",
            "secure": {"threshold": threshold, "colluding": colluding, "min_cohort": 6},
        },
        "privacy": {"client": {
            "relation": "replace-special", "population": population, "delta": 1e-6,
            "noise_multiplier": 2.0, "noise_at": "clients", "sampler": "everyone",
            "clip_norm": 0.5, **client,
        }},
    })  # fmt: skip


def how_of(asked: Config, members: int, length: int) -> Summing:
    """Return the rule that every party of such a run finds."""
    promise = client_promise(asked)
    assert promise is not None
    return summing(
        {"a": (length,)}, members, promise.settings.clip_norm,
        multiplier=promise.mechanism.noise_multiplier, honest=honest_survivors(asked),
    )  # fmt: skip


def too_small(sums: np.ndarray[Any, Any], wanted: float) -> bool:
    """Say whether a sample's variance is below what was promised, by a chi-square test."""
    statistic = float(np.square(sums).sum()) / wanted**2
    return bool(stats.chi2.cdf(statistic, sums.size) < FALSE_ALARM)


def too_large(sums: np.ndarray[Any, Any], wanted: float) -> bool:
    statistic = float(np.square(sums).sum()) / wanted**2
    return bool(stats.chi2.sf(statistic, sums.size) < FALSE_ALARM)


def released(how: Summing, members: int, honest: int) -> np.ndarray[Any, Any]:
    """Return a sum of ``honest`` zero updates, through the field and back, in units of updates."""
    total = np.zeros(how.length, np.uint32)
    nothing = {"a": np.zeros(how.length, np.float32)}
    for _ in range(honest):
        total += to_field(how.flatten(nothing, SecureNoise()), members, how.most)
    return how.unflatten(from_field(total))["a"]


@pytest.mark.parametrize(
    ("population", "threshold", "colluding"), [(6, 2 / 3, 1), (10, 2 / 3, 1), (12, 0.9, 4)]
)
def test_noise_of_the_fewest_honest_is_what_is_accounted(
    population: int, threshold: float, colluding: int
) -> None:
    """At the worst admissible number of survivors the sum has the variance (z C)^2, or more."""
    asked = config(population, threshold, colluding)
    worst = least_survivors(asked) - colluding
    assert worst == honest_survivors(asked)
    how = how_of(asked, population, 20_000)
    wanted = 2.0 * 0.5
    sums = released(how, population, worst)
    assert not too_small(sums, wanted)
    # Nor more than the rounding explains: noise that is wasted is a bug of its own.
    assert not too_large(sums, math.sqrt(wanted**2 + worst * how.grid**2 / 12))
    everybody = released(how, population, population)
    assert not too_small(everybody, wanted * math.sqrt(population / worst))


PLANTED: dict[str, Callable[[int, int, int], float]] = {
    "all members": lambda members, _least, _honest: members,
    "all survivors": lambda _members, least, _honest: least,
    "h instead of its root": lambda _members, _least, honest: honest**2,
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_in_the_share_is_found(bug: str) -> None:
    """The right rule with another divisor: each fails the test above."""
    asked = config(12, 0.9, 4)
    right = how_of(asked, 12, 20_000)
    least, honest = least_survivors(asked), honest_survivors(asked)
    divisor = PLANTED[bug](12, least, honest)
    wrong = Summing(right.clip, 2.0 * 0.5 / math.sqrt(divisor), right.grid, right.most, right.names)
    assert too_small(released(wrong, 12, honest), 2.0 * 0.5)
    assert not too_small(released(right, 12, honest), 2.0 * 0.5)


def test_a_member_too_few_would_be_seen() -> None:
    """Below the threshold the noise is too small: this is why nothing may come out there."""
    asked = config(10, 2 / 3, 1)
    how = how_of(asked, 10, 20_000)
    assert too_small(released(how, 10, honest_survivors(asked) - 1), 1.0)


class _Extreme:
    """The largest numbers that the noise can have, all of one sign."""

    name, secure = "extreme", True

    def normal(self, count: int) -> np.ndarray[Any, Any]:
        return np.full(count, 9.0)

    def uniform(self, count: int) -> np.ndarray[Any, Any]:
        return np.zeros(count)

    def laplace(self, count: int) -> np.ndarray[Any, Any]:
        return np.zeros(count)


@pytest.mark.parametrize("members", [2, 3, 50, 1000])
@pytest.mark.parametrize("multiplier", [0.0, 0.3, 5.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_v37_no_sum_wraps(members: int, multiplier: float, sign: float) -> None:
    """Everybody at the clip norm in one coordinate, with the largest noise there is."""
    how = summing({"a": (3,)}, members, 0.5, multiplier=multiplier, honest=1)
    update = {"a": np.array([sign * 1e30, 0.0, 0.0])}
    source = _Extreme() if multiplier else None
    steps = how.flatten(update, source)  # type: ignore[arg-type]
    if sign < 0 and source:
        steps = -how.flatten({"a": -update["a"]}, source)  # type: ignore[arg-type]
    assert int(np.abs(steps).max()) <= how.most
    total = np.zeros(3, np.uint32)
    for _ in range(members):
        total += to_field(steps, members, how.most)
    assert from_field(total).tolist() == (steps * members).tolist()
    assert members * how.most < 2**31


@settings(deadline=None, derandomize=True, database=None)
@given(
    st.integers(2, 1000), st.integers(1, 10**6), st.floats(1e-6, 1e6), st.floats(0.0, 50.0),
    st.data(),
)  # fmt: skip
def test_v37_the_range_holds_or_there_is_no_rule(
    members: int, length: int, clip: float, multiplier: float, data: st.DataObject
) -> None:
    honest = data.draw(st.integers(1, members))
    try:
        how = summing({"a": (length,)}, members, clip, multiplier=multiplier, honest=honest)
    except FedtuneError:
        return
    assert members * how.most < 2**31
    assert how.most * how.grid >= clip
    assert math.frexp(how.grid)[0] == 0.5
    if multiplier:
        assert how.sigma >= LEAST * how.grid
        assert how.sigma**2 * honest == pytest.approx((multiplier * clip) ** 2)
        assert how.most * how.grid >= clip + 8.6 * how.sigma
        aliasing = 2 * honest * math.exp(-((math.pi * how.sigma / how.grid) ** 2))
        assert aliasing < 1e-60


def test_v34_neither_order_nor_grouping_changes_a_sum() -> None:
    rng = np.random.default_rng(5)
    shapes = {"b": (7, 3), "a": (11,)}
    how = summing(shapes, 9, 1.0, multiplier=1.0, honest=5)
    updates = [
        {name: rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 6) for name, shape in
         shapes.items()}
        for _ in range(9)
    ]  # fmt: skip
    parts = [how.flatten(update, SecureNoise()) for update in updates]
    totals = set()
    for _ in range(20):
        order = rng.permutation(9)
        total = np.zeros(how.length, np.uint32)
        for at in order:
            total += to_field(parts[at], 9, how.most)
        totals.add(total.tobytes())
    assert len(totals) == 1
    # Nor does the order of tensors: names are sorted.
    assert how == summing(dict(reversed(shapes.items())), 9, 1.0, multiplier=1.0, honest=5)


def test_v01_an_update_that_is_not_finite_is_zero_and_noised() -> None:
    how = summing({"a": (5000,)}, 3, 1.0, multiplier=2.0, honest=2)
    for value in (np.nan, np.inf, -np.inf):
        update = {"a": np.full(5000, 0.5)}
        update["a"][7] = value
        steps = how.flatten(update, SecureNoise()) * how.grid
        assert abs(float(steps.mean())) < 0.2
        assert 0.9 * how.sigma < float(steps.std()) < 1.1 * how.sigma


@pytest.mark.parametrize(
    ("update", "source"),
    [
        ({"a": np.zeros(4)}, SecureNoise()),
        ({"b": np.zeros(3)}, SecureNoise()),
        ({"a": np.zeros(3), "b": np.zeros(1)}, SecureNoise()),
        ({}, SecureNoise()),
        ({"a": np.zeros((3, 1))}, SecureNoise()),
        ({"a": np.zeros(3)}, None),
    ],
)
def test_what_was_not_agreed_is_refused(update: Any, source: Any) -> None:
    how = summing({"a": (3,)}, 3, 1.0, multiplier=2.0, honest=2)
    with pytest.raises(FedtuneError) as caught:
        how.flatten(update, source)
    assert caught.value.code == ExitCode.PRIVACY


@pytest.mark.parametrize(
    ("members", "honest", "multiplier"),
    [(3, 0, 1.0), (3, 4, 1.0), (0, 1, 1.0), (3, 1, -1.0), (3, 1, math.nan), (3, 1, math.inf),
     (3, 3, 1e-12), (2**20, 1, 1e6)],
)  # fmt: skip
def test_what_does_not_fit_is_refused(members: int, honest: int, multiplier: float) -> None:
    with pytest.raises(FedtuneError) as caught:
        summing({"a": (10**6,)}, members, 1.0, multiplier=multiplier, honest=honest)
    assert caught.value.code == ExitCode.PRIVACY


def test_the_digest_of_a_model_is_of_every_bit_name_and_shape() -> None:
    base = {"a": np.arange(6, dtype=np.float32), "b": np.zeros(2, np.float32)}
    others: list[dict[str, Any]] = [
        base | {"a": base["a"].reshape(2, 3)}, base | {"a": base["a"].astype(np.float64)},
        base | {"a": base["a"] + np.float32(1e-6)}, {"a": base["a"], "c": base["b"]},
        {"a": base["a"]}, base | {"c": np.zeros(0, np.float32)},
        base | {"b": np.array([0.0, -0.0], np.float32)},
    ]  # fmt: skip
    found = {
        model_digest(base, "terms", 0.1), model_digest(base, "others", 0.1),
        model_digest(base, "terms", 0.2), *(model_digest(one, "terms", 0.1) for one in others),
    }  # fmt: skip
    assert len(found) == 3 + len(others)
    same = (dict(reversed(base.items())), base | {"past": np.zeros(3)})
    assert {model_digest(one, "terms", 0.1) for one in (base, *same)} <= found
    assert len({model_digest(one, "terms", 0.1) for one in same}) == 1
