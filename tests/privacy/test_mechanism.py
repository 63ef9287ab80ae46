"""The mechanism: what it refuses, how much it noises, and on which numbers it lands."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.events import PoissonGaussian, Relation, TruncatedPoissonGaussian, Unit
from fedtune.privacy.lattice import clip_update, grid_of, to_grid
from fedtune.privacy.mechanism import Block, Mechanism
from fedtune.privacy.noise import InsecureSeededNoise, SecureNoise
from fedtune.privacy.sampling import Everyone, Poisson, Sampler, TruncatedPoisson

CHANCE = 1e-6
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


def _example(
    z: float = 1.0, denominator: float = 32.0, sampler: Sampler | None = None
) -> Mechanism:
    return Mechanism(
        Unit.EXAMPLE, Relation.ADD_OR_REMOVE_ONE, sampler or Poisson(0.1), z, denominator
    )


def _client(z: float = 1.0, denominator: float = 10.0) -> Mechanism:
    return Mechanism(Unit.CLIENT, Relation.REPLACE_SPECIAL, Everyone(), z, denominator)


class Counting:
    """A source that counts its draws and gives no noise."""

    name = "zeros"
    secure = False

    def __init__(self, value: float = 0.0) -> None:
        self.value = value
        self.draws = 0

    def normal(self, n: int) -> NDArray[np.float64]:
        self.draws += 1
        return np.full(n, self.value)

    def uniform(self, n: int) -> NDArray[np.float64]:
        return np.full(n, 0.5)

    def integers(self, n: int, below: int) -> NDArray[np.int64]:
        return np.zeros(n, np.int64)


def _norm_squared(steps: dict[str, NDArray[np.int64]]) -> int:
    return sum(int(value) ** 2 for array in steps.values() for value in array.flat)


# ---------------------------------------------------------------- clipping whole updates


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["a", "b", "c"])
@pytest.mark.parametrize("size", [1e-3, 1e3])  # below and above the clip norm
def test_v01_one_bad_number_makes_the_whole_contribution_zero(
    bad: float, name: str, size: float
) -> None:
    update = {key: np.full(3, size, np.float32) for key in "abc"}
    update[name][1] = bad
    mechanism = _client()
    split = mechanism.blocks_weighted(
        {("a",): 1.0, ("b", "c"): 1.0}, {("a",): 0.5, ("b", "c"): 0.5}
    )
    for steps in (
        clip_update(update, 1.0),
        mechanism.clip_update(update, mechanism.blocks_flat(("a", "b", "c"), 1.0)),
        mechanism.clip_update(update, split),
    ):
        assert list(steps) == ["a", "b", "c"]
        assert _norm_squared(steps) == 0


@pytest.mark.parametrize("clip", [0.0, -1.0, np.nan, np.inf, 1e300])
def test_clip_norms_that_are_none_are_refused(clip: float) -> None:
    with pytest.raises(FedtuneError, match="clip norm"):
        clip_update({"a": np.ones(2)}, clip)
    with pytest.raises(FedtuneError, match="clip norm"):
        _client().release({"a": np.zeros(2)}, (Block(("a",), clip, 1.0),), SecureNoise())


# ---------------------------------------------------------------- range


def test_v37_whole_numbers_do_not_wrap_with_everybody_and_the_largest_noise() -> None:
    clip, size, people, z = 1.0, 4, 1_000_000, 100.0
    mechanism = Mechanism(Unit.CLIENT, Relation.REPLACE_SPECIAL, Everyone(), z, float(people))
    one = clip_update({"a": np.full(size, 1e9)}, clip)["a"]
    sums = {"a": one * people}
    blocks = mechanism.blocks_flat(("a",), clip)
    for value in (8.6, -8.6):
        out = mechanism.release(sums, blocks, Counting(value))["a"]
        assert np.allclose(out, 0.5 + value * z / people, rtol=1e-3)


def test_v37_what_could_wrap_is_refused() -> None:
    mechanism = _client(z=1e16)
    with pytest.raises(FedtuneError, match="do not fit whole numbers"):
        mechanism.release({"a": np.zeros(4)}, mechanism.blocks_flat(("a",), 1.0), SecureNoise())


# ---------------------------------------------------------------- how much noise


@pytest.mark.parametrize("kind", [np.int64, np.float64, np.float32])
@pytest.mark.parametrize("z", [0.3, 1.0, 7.5])
def test_v04_the_noise_on_the_sum_is_z_times_clip(kind: type, z: float) -> None:
    mechanism = _example(z, denominator=20.0)
    clip, size = 0.25, 100_000
    blocks = mechanism.blocks_flat(("a", "b"), clip)
    sums = {"a": np.zeros(size // 2, kind), "b": np.zeros((5, size // 10), kind)}
    out = mechanism.release(sums, blocks, SecureNoise())
    values = np.concatenate([out["a"], out["b"].ravel()]).astype(np.float64) * 20.0
    sigma = z * clip * (1.0 if kind is np.int64 else 1.0 + mechanism.margin)
    below = float(stats.chi2.cdf(np.sum((values / sigma) ** 2), size))
    assert 2 * min(below, 1 - below) > CHANCE
    assert stats.kstest(values / sigma, "norm").pvalue > CHANCE


def test_v04_a_float_sum_gets_the_margin_on_top_and_a_whole_one_does_not() -> None:
    mechanism = _example(2.0, denominator=1.0)
    blocks = mechanism.blocks_flat(("a",), 0.5)
    for kind, expected in ((np.float64, 1.0 + mechanism.margin), (np.int64, 1.0)):
        out = mechanism.release({"a": np.zeros(100, kind)}, blocks, Counting(1.0))["a"]
        assert float(out[0]) == pytest.approx(expected, abs=grid_of(0.5, 100))
    assert mechanism.margin > 10 * grid_of(0.5, 100)


def test_v09_noise_is_rounded_to_the_nearest_step() -> None:
    mechanism = _example(1.0, denominator=1.0)
    grid = grid_of(1.0, 1)
    sigma = 1.0 / grid
    for steps, expected in ((0.4, 0), (0.6, 1), (-0.6, -1), (-1.4, -1)):
        out = mechanism.release(
            {"a": np.zeros(1, np.int64)},
            mechanism.blocks_flat(("a",), 1.0),
            Counting(steps / sigma),
        )
        assert float(out["a"][0]) / grid == expected


def test_v04_shares_divide_the_noise_as_they_say() -> None:
    mechanism = _example(2.0, denominator=1.0)
    clips = {("a",): 1.0, ("b",): 0.1}
    blocks = mechanism.blocks_weighted(clips, {("a",): 0.99, ("b",): 0.01})
    assert math.fsum((b.clip / b.sigma) ** 2 for b in blocks) == pytest.approx(0.25)
    out = mechanism.release({"a": np.zeros(50_000), "b": np.zeros(50_000)}, blocks, SecureNoise())
    assert out["a"].std() == pytest.approx(2.0 / math.sqrt(0.99), rel=0.03)
    assert out["b"].std() == pytest.approx(2.0 * 0.1 / 0.1, rel=0.03)


def test_v07_two_releases_of_the_same_sum_share_no_noise() -> None:
    mechanism = _example()
    blocks = mechanism.blocks_flat(("a",), 1.0)
    source = SecureNoise()
    first, second = (
        mechanism.release({"a": np.zeros(100_000)}, blocks, source)["a"] for _ in range(2)
    )
    assert abs(float(np.corrcoef(first, second)[0, 1])) * math.sqrt(first.size) < 6.0


def test_the_sum_is_unchanged_but_for_noise_and_rounding() -> None:
    mechanism = _example(denominator=4.0)
    sums = {"b": np.arange(6.0).reshape(2, 3), "a": np.array(7.0)}
    out = mechanism.release(sums, mechanism.blocks_flat(("a", "b"), 1.0), Counting())
    assert list(out) == ["b", "a"]
    for name, value in sums.items():
        assert out[name].shape == value.shape
        assert out[name].dtype == np.float32
        assert np.allclose(out[name], value / 4.0, atol=grid_of(1.0, 7))


@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=6), st.floats(0.2, 20.0), st.data())
@settings(max_examples=60, deadline=None)
def test_any_shares_that_add_up_to_one_are_released(
    clips: list[float], z: float, data: st.DataObject
) -> None:
    raw = data.draw(st.lists(st.floats(0.01, 1.0), min_size=len(clips), max_size=len(clips)))
    names = [(f"t{i}",) for i in range(len(clips))]
    weights = {name: share / sum(raw) for name, share in zip(names, raw, strict=True)}
    mechanism = _example(z)
    blocks = mechanism.blocks_weighted(dict(zip(names, clips, strict=True)), weights)
    sums = {name[0]: np.zeros(3) for name in names}
    assert set(mechanism.release(sums, blocks, SecureNoise())) == set(sums)


# ---------------------------------------------------------------- the lattice


def test_v09_what_can_come_out_does_not_depend_on_what_went_in() -> None:
    mechanism = _example(1.0, denominator=1.0)
    blocks = mechanism.blocks_flat(("a",), 1.0)
    grid = grid_of(1.0, 1000)
    for value in (0.0, 1.0, 1 / 3, 1e-7, -0.9):
        for kind in (np.float32, np.float64):
            out = mechanism.release({"a": np.full(1000, value, kind)}, blocks, SecureNoise())["a"]
            steps = out.astype(np.float64) / grid
            assert np.array_equal(steps, np.rint(steps))
            # every residue of the step count comes out: no comb that gives the sum away
            assert len(np.unique(steps % 8)) == 8


def test_v09_floating_point_noise_would_tell_the_sums_apart() -> None:
    """The leak that the lattice closes: 1 + noise has lost bits that 0 + noise near 1 has."""
    z = InsecureSeededNoise(3).normal(20_000).astype(np.float32)
    near = np.abs(z) < 0.25
    kept = z[near]
    through_one = (np.float32(1.0) + kept) - np.float32(1.0)
    assert np.mean(through_one != kept) > 0.5


def _summed_in_float32(rows: NDArray[np.float32], micro_batch: int) -> NDArray[np.float64]:
    total = np.zeros(rows.shape[1])
    for start in range(0, len(rows), micro_batch):
        part = np.zeros(rows.shape[1], np.float32)
        for row in rows[start : start + micro_batch]:
            part += row
        total += part
    return total


@pytest.mark.parametrize("micro_batch", [1, 8, 32])
def test_v34_the_margin_covers_float32_sums_and_rounding(micro_batch: int) -> None:
    mechanism = Mechanism(
        Unit.EXAMPLE, Relation.ADD_OR_REMOVE_ONE, Poisson(0.1), 1.0, 64.0, micro_batch
    )
    source, size, clip = InsecureSeededNoise(12), 400, 1.0
    grid = grid_of(clip, size)
    worst = 0.0
    for _ in range(10):
        rows = (source.normal(129 * size).reshape(129, size) + 3.0).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        with_one = to_grid(_summed_in_float32(rows, micro_batch), grid, "a")
        without = to_grid(_summed_in_float32(rows[1:], micro_batch), grid, "a")
        worst = max(worst, float(np.linalg.norm((with_one - without) * grid)))
    assert worst <= clip * (1.0 + mechanism.margin)
    assert worst > clip * (1.0 - 1e-3)


def test_v11_a_margin_that_is_not_small_is_refused() -> None:
    with pytest.raises(FedtuneError, match="rounding of float32 sums") as error:
        _example(denominator=2000.0)
    assert "smaller micro-batch" in error.value.hint
    fine = Mechanism(Unit.EXAMPLE, Relation.ADD_OR_REMOVE_ONE, Poisson(0.1), 1.0, 2000.0, 8)
    assert fine.margin < 1e-2
    # whole numbers need none, so clients may be many; their float sums may not
    many = _client(denominator=50_000.0)
    blocks = many.blocks_flat(("a",), 1.0)
    assert many.release({"a": np.zeros(3, np.int64)}, blocks, SecureNoise())["a"].shape == (3,)
    with pytest.raises(FedtuneError, match="rounding of float32 sums"):
        many.release({"a": np.zeros(3)}, blocks, SecureNoise())


# ---------------------------------------------------------------- public denominator, empty batch


def test_v12_nothing_in_a_release_depends_on_the_number_of_units() -> None:
    sums, found = {"a": np.ones(5)}, []
    for n in (1023, 1024):
        mechanism, source = (
            _example(denominator=64.0, sampler=Poisson(1 / 16)),
            InsecureSeededNoise(3),
        )
        drawn = mechanism.draw(n, source)
        assert len(drawn) > 0
        found.append(
            mechanism.release(sums, mechanism.blocks_flat(("a",), 1.0), InsecureSeededNoise(4))
        )
    assert np.array_equal(found[0]["a"], found[1]["a"])


def test_v12_a_batch_far_beyond_the_denominator_is_refused() -> None:
    mechanism = _example(denominator=4.0, sampler=Poisson(0.5))
    assert len(mechanism.draw(10, SecureNoise())) <= 10
    with pytest.raises(FedtuneError, match="larger than denominator=4") as error:
        mechanism.draw(2000, SecureNoise())
    assert "2000" not in str(error.value)


def test_v13_clip_bits_ride_in_the_same_release_over_the_public_denominator() -> None:
    mechanism = _example(1.0, denominator=50.0)
    clips = {("w",): 1.0, ("clip-bits",): math.sqrt(2) / 2}
    blocks = mechanism.blocks_weighted(clips, {("w",): 0.99, ("clip-bits",): 0.01})
    empty = {"w": np.zeros(10), "clip-bits": np.zeros(2)}
    full = empty | {"clip-bits": np.array([25.0, -25.0])}
    assert np.allclose(mechanism.release(empty, blocks, Counting())["clip-bits"], 0.0)
    assert np.allclose(
        mechanism.release(full, blocks, Counting())["clip-bits"], [0.5, -0.5], atol=1e-4
    )


def test_v14_an_empty_batch_releases_pure_noise() -> None:
    mechanism = _example(1.0, denominator=1.0, sampler=Poisson(1e-9))
    assert mechanism.draw(100, SecureNoise()).size == 0
    out = mechanism.release(
        {"a": np.zeros(10_000)}, mechanism.blocks_flat(("a",), 1.0), SecureNoise()
    )
    assert out["a"].std() == pytest.approx(1.0, rel=0.1)


# ---------------------------------------------------------------- one object, and what it refuses


def test_v16_sampler_and_event_come_from_one_object() -> None:
    assert _example(1.5).event == PoissonGaussian(0.1, 1.5)
    capped = Mechanism(
        Unit.CLIENT, Relation.REPLACE_SPECIAL, TruncatedPoisson(0.2, 50, 20), 1.5, 10.0
    )
    assert capped.event == TruncatedPoissonGaussian(0.2, 1.5, 50, 20)
    assert capped.most_drawn == 20
    with pytest.raises(AttributeError):
        capped.noise_multiplier = 0.1  # type: ignore[misc]


def test_v16_a_cap_needs_a_public_number_of_units() -> None:
    with pytest.raises(FedtuneError, match="truncated Poisson") as error:
        _example(sampler=TruncatedPoisson(0.2, 50, 20))
    assert error.value.code is ExitCode.PRIVACY


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, True, "1", None])
def test_numbers_that_cannot_be_used_are_refused(value: float) -> None:
    with pytest.raises(FedtuneError, match="noise multiplier"):
        _example(z=value)
    with pytest.raises(FedtuneError, match="denominator"):
        _example(denominator=value)


GOOD = Block(("a", "b"), 1.0, 1.0)


@pytest.mark.parametrize(
    ("blocks", "why"),
    [
        ((), "exactly one block"),
        ((Block((), 1.0, 1.0), GOOD), "exactly one block"),
        ((Block(("a",), 1.0, 1.0),), "exactly one block"),
        ((Block(("a", "b", "c"), 1.0, 1.0),), "exactly one block"),
        ((Block(("a", "b", "b"), 1.0, 1.0),), "exactly one block"),
        ((Block(("a", "b"), 1.0, 2.0), Block(("b",), 1.0, 2.0)), "exactly one block"),
        ((Block(("a",), 1.0, 1.0), Block(("b",), 1.0, 1.0)), "more than 1 / z"),
        ((Block(("a", "b"), 1.0, 0.999999),), "more than 1 / z"),
        ((Block(("a", "b"), 1.0, 0.0),), "sigma"),
        ((Block(("a", "b"), 1.0, np.nan),), "sigma"),
        ((Block(("a", "b"), 1.0, np.inf),), "sigma"),
        ((Block(("a", "b"), -1.0, 1.0),), "clip norm"),
    ],
)
def test_blocks_that_promise_less_noise_or_other_tensors_are_refused(
    blocks: tuple[Block, ...], why: str
) -> None:
    source = Counting()
    with pytest.raises(FedtuneError, match=why) as error:
        _example().release({"a": np.zeros(2), "b": np.zeros(3)}, blocks, source)
    assert error.value.code is ExitCode.PRIVACY
    assert source.draws == 0


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (np.array([0.0, np.nan]), "not finite"),
        (np.array([np.inf, 0.0]), "not finite"),
        (np.array([1e300, 0.0]), "not finite or beyond"),
        (np.array([0.0, 1.0], np.float16), "float16"),
        (np.array([0, 1], np.int32), "int32"),
        (np.array([True, False]), "bool"),
        (np.array([]), "shape"),
        ([0.0, 1.0], "list"),
        (np.array([0, 1], np.int64), "different types"),
    ],
)
def test_v03_sums_that_cannot_be_right_are_refused_before_anything_is_drawn(
    value: object, why: str
) -> None:
    source = Counting()
    sums = {"b": np.zeros(3), "a": value}
    with pytest.raises(FedtuneError, match=why):
        _example().release(sums, (GOOD,), source)  # type: ignore[arg-type]
    assert source.draws == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_noise_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(FedtuneError, match="no usable noise"):
        _example().release({"a": np.zeros(2), "b": np.zeros(3)}, (GOOD,), Counting(value))


def test_shares_must_fit_the_blocks() -> None:
    mechanism = _example()
    for weights in ({("a",): 1.0}, {("a",): 0.5, ("b",): 0.6}, {("a",): 1.5, ("b",): -0.5}):
        with pytest.raises(FedtuneError, match="share"):
            mechanism.blocks_weighted({("a",): 1.0, ("b",): 1.0}, weights)


def test_the_description_is_json_and_holds_the_public_facts() -> None:
    mechanism = _example(1.25)
    told = mechanism.describe(mechanism.blocks_flat(("a",), 0.5), {"a": 64}, InsecureSeededNoise(1))
    assert json.loads(json.dumps(told)) == told
    assert told["sampler"] == "Poisson"
    assert told["noise_secure"] is False
    assert told["blocks"] == [{"names": ["a"], "clip": 0.5, "sigma": 0.625, "grid": 2.0**-18}]
