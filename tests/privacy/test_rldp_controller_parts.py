"""Actions, features and rewards of the controller, each alone."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedtune.errors import FedtuneError
from fedtune.privacy.events import Relation, Unit
from fedtune.privacy.mechanism import Mechanism
from fedtune.privacy.rldp.actions import ACTIONS, ActionSpace, noise_of
from fedtune.privacy.rldp.features import STATES, Context, Interval, Reading, features
from fedtune.privacy.rldp.quantiles import equal, least_noise, same_noise
from fedtune.privacy.rldp.reward import Yardstick, over_pacing, reward
from fedtune.privacy.rldp.shape import Sensing, mechanism_blocks
from fedtune.privacy.sampling import Poisson

SIZES = {
    f"base.layers.{i}.{m}.lora_{x}.default.weight": 8 + 24 * i
    for i in range(3)
    for m in ("q_proj", "v_proj")
    for x in "AB"
}
MECHANISM = Mechanism(Unit.EXAMPLE, Relation.ADD_OR_REMOVE_ONE, Poisson(0.1), 1.3, denominator=32.0)

ACTION = st.lists(st.floats(-1.0, 1.0), min_size=ACTIONS, max_size=ACTIONS)


def _action(**entries: float) -> NDArray[np.float64]:
    names = ("all", "slope", "split", "sizes", "norms", "tilt", "first", "second", "noise")
    return np.array([entries.get(name, 0.0) for name in names])


@settings(max_examples=60, deadline=None)
@given(
    actions=st.lists(ACTION, min_size=1, max_size=40), factors=st.booleans(),
    clip_norm=st.floats(1e-6, 1e6), repeats=st.integers(1, 30),
)  # fmt: skip
def test_whatever_the_actions_a_release_costs_what_it_should(
    actions: list[list[float]], factors: bool, clip_norm: float, repeats: int
) -> None:
    space = ActionSpace(SIZES, clip_norm, factors)
    shape = space.start()
    start = shape.norms[0]
    for action in actions * repeats:
        before, shape = shape, space.apply(shape, np.array(action))
        for old, new in zip(before.norms, shape.norms, strict=True):
            assert math.exp(-0.3) * (1 - 1e-9) <= new / old <= math.exp(0.3) * (1 + 1e-9)
            assert start / 1000 * (1 - 1e-9) <= new <= start * 1000 * (1 + 1e-9)
        assert math.fsum(shape.shares) == pytest.approx(1.0, abs=1e-12)
        assert min(shape.shares) > 0.0
    blocks, _ = mechanism_blocks(MECHANISM, shape, Sensing(0.005, 0.005))
    cost = math.fsum((block.clip / block.sigma) ** 2 for block in blocks)
    assert cost == pytest.approx(1.3**-2, rel=1e-12)


def test_corners_of_the_shares_are_the_known_rules() -> None:
    space = ActionSpace(SIZES, 2.0)
    sizes = [int(n) for n in space.numbers]
    for action, rule in (
        (_action(sizes=-1, norms=-1), equal),
        (_action(), least_noise),
        (_action(sizes=-1, norms=1), same_noise),
    ):
        action[1] = 1.0  # so that norms differ
        shape = space.apply(space.start(), action)
        np.testing.assert_allclose(shape.shares, rule(sizes, shape.norms), rtol=1e-12)
    assert len(set(shape.norms)) == 3


def test_depth_and_side_move_what_they_name() -> None:
    together, apart = ActionSpace(SIZES, 1.0), ActionSpace(SIZES, 1.0, factors=True)
    assert (len(together.blocks), len(apart.blocks)) == (6, 12)
    start = together.start()
    assert together.apply(start, _action(split=1.0)).norms == start.norms
    rising = together.apply(start, _action(slope=1.0)).norms
    assert rising[0] == rising[1] < start.norms[0] == rising[2] < rising[4] == rising[5]
    split = dict(
        zip(apart.blocks, apart.apply(apart.start(), _action(split=1.0)).norms, strict=True)
    )
    for block, norm in split.items():
        assert (norm > apart.start().norms[0]) == (".lora_A." in block[0])
    residual = together.apply(start, _action(first=1.0, second=-0.5)).norms
    assert len(set(residual)) > 1


def test_depth_goes_by_the_number_of_the_layer() -> None:
    shuffled = ["h.10.q", "h.2.q", "h.6.q"]
    space = ActionSpace(dict.fromkeys([f"{n}.lora_A.w" for n in shuffled], 4), 1.0)
    assert space.depth.tolist() == [1.0, -1.0, 0.0]
    assert ActionSpace({"a.lora_A.w": 1, "b.lora_A.w": 1}, 1.0).depth.tolist() == [-1.0, 1.0]
    assert ActionSpace({"a.lora_A.w": 1}, 1.0).depth.tolist() == [0.0]


def test_bad_actions_and_spaces_are_refused() -> None:
    space = ActionSpace(SIZES, 1.0)
    for bad in (np.zeros(8), np.full(9, math.nan), np.zeros((1, 9)), np.full(9, math.inf)):
        with pytest.raises(FedtuneError, match="action"):
            space.apply(space.start(), bad)
    for sizes, norm in (({}, 1.0), (SIZES, 0.0), (SIZES, math.nan), (SIZES, math.inf)):
        with pytest.raises(FedtuneError):
            ActionSpace(sizes, norm)
    assert space.apply(space.start(), np.full(9, 7.0)) == space.apply(space.start(), np.ones(9))


@given(token=st.floats(-1.0, 1.0), planned=st.floats(0.1, 50.0), spread=st.floats(0.01, 0.49))
def test_noise_stays_within_its_spread(token: float, planned: float, spread: float) -> None:
    found = noise_of(_action(noise=token), planned, spread)
    assert planned * (1 - spread) * (1 - 1e-12) <= found <= planned * (1 + spread) * (1 + 1e-12)


def _reading(blocks: int = 6, **change: object) -> Reading:
    plain = Reading(
        step=0, noise_multiplier=1.3, signal=np.zeros(blocks),
        coordinates=np.arange(1.0, 9.0, dtype=np.float32), inside=np.full(blocks, 0.5), loss=3.0,
        loss_deviation=0.2, held=None, held_deviation=None,
    )  # fmt: skip
    return replace(plain, **change)  # type: ignore[arg-type]


CONTEXT = Context(0.25, 1.3, 32.0, -3.0, 0.5, np.zeros(ACTIONS))


@given(
    numbers=st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=4), count=st.integers(1, 5),
    level=st.floats(), gain=st.floats(),
)  # fmt: skip
def test_features_are_bounded_and_as_many_for_every_model(
    numbers: list[float], count: int, level: float, gain: float
) -> None:
    for sizes in (SIZES, {"a.lora_A.w": 3}):
        space = ActionSpace(sizes, 1.0)
        interval, n = Interval(len(space.blocks)), len(space.blocks)
        for _ in range(count):
            interval.add(_reading(
                n, signal=np.full(n, numbers[0]), inside=np.full(n, numbers[1]),
                coordinates=np.full(7, numbers[2], np.float32), loss=numbers[3],
            ))  # fmt: skip
        found = features(interval, space.start(), space, replace(CONTEXT, level=level, gain=gain))
        assert found.shape == (STATES,)
        assert found.dtype == np.float32
        assert bool((np.abs(found) <= 1.0).all())


def test_features_tell_what_happened() -> None:
    space = ActionSpace(SIZES, 1.0)

    def seen(reading: Reading, before: Reading | None = None) -> NDArray[np.float32]:
        interval = Interval(6)
        if before is not None:
            interval.add(before)
            interval = interval.next()
        interval.add(reading)
        return features(interval, space.start(), space, CONTEXT)

    plain = seen(_reading())
    assert plain[0] == 0.0 and seen(_reading(inside=np.full(6, 0.9)))[0] > 0.5  # noqa: PT018
    rising = seen(_reading(inside=np.linspace(0.1, 0.9, 6)))
    assert rising[4] > 0.3
    assert seen(_reading(signal=np.full(6, 0.05)))[5] > seen(_reading(signal=np.full(6, 0.01)))[5]
    same = seen(_reading(), _reading())
    turned = seen(_reading(), _reading(coordinates=-np.arange(1.0, 9.0, dtype=np.float32)))
    assert same[9] == pytest.approx(math.tanh(1.0)) == pytest.approx(-turned[9])
    assert plain[9] == 0.0
    assert seen(_reading(noise_multiplier=1.43))[18] == pytest.approx(math.tanh(0.5), rel=1e-6)


def test_the_mean_of_an_interval_has_less_noise() -> None:
    interval = Interval(6)
    for loss in (2.0, 4.0, 3.0, 3.0):
        interval.add(_reading(loss=loss))
    assert interval.mean("loss") == pytest.approx((3.0, 0.2**2 / 4))
    assert interval.mean("held") is None


def test_rewards_are_in_units_of_their_noise_and_punish_haste() -> None:
    assert reward(0.1, 0.4) == pytest.approx(0.25)
    assert reward(-9.0, 0.1) == -1.0
    assert reward(math.nan, 1.0) == -1.0
    assert reward(math.inf, 1.0) == -1.0
    assert reward(0.0, 1.0, over_pacing(3 / 0.8**2, 3, 1.0)) == pytest.approx(-0.28125)
    assert over_pacing(3 / 1.2**2, 3, 1.0) == 0.0 == over_pacing(0.0, 0, 1.0)
    yard = Yardstick()
    sizes = [yard.take(change) for change in (0.0, 0.3, -0.3, 1e300)]
    assert sizes[0] == 1e-6 < sizes[1] < sizes[2] < sizes[3] < 1e3
