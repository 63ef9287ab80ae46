"""The lattice: whole updates clipped exactly, and sums that are exact."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from fedtune.errors import FedtuneError
from fedtune.privacy.lattice import MOST, STEP, clip_update, grid_of, to_grid
from fedtune.privacy.noise import InsecureSeededNoise

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


def _norm_squared(steps: dict[str, NDArray[np.int64]]) -> int:
    return sum(int(value) ** 2 for array in steps.values() for value in array.flat)


@given(
    arrays(np.float32, st.integers(1, 40), elements=FLOATS),
    arrays(np.float64, st.tuples(st.integers(1, 3), st.integers(1, 9)), elements=FLOATS),
    st.floats(1e-6, 1e6),
)
@settings(max_examples=100, deadline=None)
def test_v18_the_joint_norm_never_exceeds_the_clip_in_exact_arithmetic(
    first: NDArray[np.float32], second: NDArray[np.float64], clip: float
) -> None:
    steps = clip_update({"a": first, "b": second}, clip)
    grid = grid_of(clip, first.size + second.size)
    assert _norm_squared(steps) * Fraction(grid) ** 2 <= Fraction(clip) ** 2
    values = np.concatenate([first.astype(np.float64).ravel(), second.ravel()])
    norm = math.sqrt(math.fsum(values**2))
    expected = values * min(1.0, clip / norm if norm else 1.0)
    found = np.concatenate([steps["a"].ravel(), steps["b"].ravel()]) * grid
    assert np.linalg.norm(found - expected) <= 1.01 * STEP * clip


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_v01_numbers_that_overflow_when_squared_are_clipped(dtype: type) -> None:
    update = {"a": np.array([np.finfo(dtype).max, 0.0], dtype), "b": np.array([1.0], dtype)}
    steps = clip_update(update, 2.0)
    assert steps["a"][0] * grid_of(2.0, 3) == pytest.approx(2.0, rel=1e-3)
    assert steps["b"][0] == 0


def test_v02_zero_and_tiny_updates_are_contributions() -> None:
    for value in (0.0, 5e-324, 1e-300):
        steps = clip_update({"a": np.full(4, value)}, 1.0)
        assert _norm_squared(steps) == 0
    small = clip_update({"a": np.full(4, 0.01)}, 1.0)["a"] * grid_of(1.0, 4)
    assert np.allclose(small, 0.01, atol=grid_of(1.0, 4))


def test_v18_clipping_each_tensor_alone_would_exceed_the_joint_norm() -> None:
    update = {str(i): np.full(5, 9.0) for i in range(4)}
    joint = _norm_squared(clip_update(update, 1.0)) * grid_of(1.0, 20) ** 2
    alone = sum(
        _norm_squared(clip_update({k: v}, 1.0)) * grid_of(1.0, 5) ** 2 for k, v in update.items()
    )
    assert joint <= 1.0
    assert alone > 3.9


@pytest.mark.parametrize("value", [[1.0], np.array([1]), np.array([]), np.array([True]), None])
def test_updates_that_are_not_floats_are_refused(value: object) -> None:
    with pytest.raises(FedtuneError, match="update 'a'"):
        clip_update({"a": value}, 1.0)  # type: ignore[dict-item]
    with pytest.raises(FedtuneError, match="coordinates"):
        clip_update({}, 1.0)


@given(st.floats(1e-18, 1e18), st.integers(1, 1 << 30))
def test_the_grid_is_a_power_of_two_and_just_fine_enough(clip: float, dimension: int) -> None:
    grid = grid_of(clip, dimension)
    assert math.frexp(grid)[0] == 0.5
    assert grid * math.sqrt(dimension) <= STEP * clip < 2.0000001 * grid * math.sqrt(dimension)


def test_v34_sums_do_not_depend_on_the_order() -> None:
    source = InsecureSeededNoise(1)
    updates = [clip_update({"a": source.normal(500) * 10**i}, 1.0)["a"] for i in range(-3, 4)]
    forward = sum(updates[1:], updates[0])
    backward = sum(updates[-2::-1], updates[-1])
    assert np.array_equal(forward, backward)


def test_v34_adding_one_unit_moves_the_sum_by_at_most_the_clip() -> None:
    source = InsecureSeededNoise(2)
    clip, grid = 0.7, grid_of(0.7, 300)
    total = np.zeros(300, np.int64)
    for i in range(50):
        before = total.copy()
        total += clip_update({"a": source.normal(300) * 10.0 ** (i % 9 - 4)}, clip)["a"]
        moved = _norm_squared({"a": total - before}) * Fraction(grid) ** 2
        assert moved <= Fraction(clip) ** 2


def test_v09_rounding_after_the_noise_is_the_same_as_noise_of_whole_numbers() -> None:
    source = InsecureSeededNoise(9)
    noise = source.normal(10_000) * 1e4
    whole = source.integers(10_000, 1 << 30)
    assert np.array_equal(np.rint(whole + noise), whole + np.rint(noise))


@pytest.mark.parametrize("clip", [0.0, -1.0, np.nan, np.inf, 1e300, True, "1"])
def test_clip_norms_that_are_none_are_refused(clip: float) -> None:
    with pytest.raises(FedtuneError, match="clip norm"):
        clip_update({"a": np.ones(2)}, clip)
    with pytest.raises(FedtuneError, match="clip norm"):
        grid_of(clip, 2)


@pytest.mark.parametrize("value", [MOST + 1, -(2**63)])
def test_v37_whole_sums_that_could_wrap_are_refused(value: int) -> None:
    with pytest.raises(FedtuneError, match="beyond what its clip norm allows"):
        to_grid(np.array([0, value]), 1.0, "a")
    with pytest.raises(FedtuneError, match="beyond what its clip norm allows"):
        to_grid(np.array([0.0, float(value) * 2]), 1.0, "a")
    assert to_grid(np.array([MOST, -MOST]), 1.0, "a").tolist() == [MOST, -MOST]
