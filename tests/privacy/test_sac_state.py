"""The soft actor-critic: bits, state, what is refused, what it costs, and a real task."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.rldp.sac import Sac, SacSettings, Transition
from tests.privacy.sac_kit import QUICK, equal, fed, transition

# Bits


def test_restored_goes_on_with_the_same_bits() -> None:
    """Before learning starts, in the middle, and when the buffer went round."""
    for count in (0, 3, 20, 100):
        sac = fed(7, count)
        saved = sac.state()
        other = Sac(3, 2, QUICK, seed=99)
        other.restore(saved)
        assert equal(other.state(), saved)
        random = np.random.default_rng(8)
        for _ in range(12):
            new = transition(random)
            assert np.array_equal(sac.act(new.state), other.act(new.state))
            assert sac.learn(new) == other.learn(new)
        assert equal(sac.state(), other.state())
        assert not equal(sac.state(), saved)  # a copy: it did not move along


def test_same_seed_same_bits_and_another_seed_others() -> None:
    assert equal(fed(1, 20).state(), fed(1, 20).state())
    one, other = Sac(3, 2, seed=1), Sac(3, 2, seed=2)
    assert not np.array_equal(one.act(np.ones(3)), other.act(np.ones(3)))


def test_global_random_numbers_are_neither_used_nor_moved() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = fed(3, 20).state()
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numbers)  # noqa: NPY002
    torch.manual_seed(1)
    assert equal(fed(3, 20).state(), first)


def test_the_mean_action_draws_nothing_and_is_the_middle_of_the_draws() -> None:
    sac = fed(2, 20)
    before = sac.state()["generator"]
    middle = sac.act(np.ones(3), mean=True)
    assert np.array_equal(sac.state()["generator"], before)
    draws = np.array([sac.act(np.ones(3)) for _ in range(400)])
    assert len(np.unique(draws, axis=0)) == 400
    assert not np.array_equal(sac.state()["generator"], before)
    np.testing.assert_allclose(np.median(draws, axis=0), middle, atol=0.15)


def test_actions_have_their_shape_and_stay_inside() -> None:
    sac = Sac(3, 2, SacSettings(hidden=()), seed=1)  # a linear policy: as far as one likes
    sac._actor.biases[-1][..., :2] = torch.tensor([40.0, -40.0])
    for mean in (True, False):
        action = sac.act(np.zeros(3), mean=mean)
        assert action.shape == (2,)
        assert action.dtype == np.float32
        assert (abs(action) < 1).all()
        assert action[0] > 0.999 > -0.999 > action[1]


def test_actor_alone_carries_the_policy_over() -> None:
    teacher, pupil = fed(1, 40), fed(2, 10)
    generator = pupil.state()["generator"]
    pupil.load_actor(teacher.actor_state())
    for state in np.random.default_rng(0).normal(size=(5, 3)):
        assert np.array_equal(teacher.act(state, mean=True), pupil.act(state, mean=True))
    assert pupil.temperature == teacher.temperature
    assert pupil.transitions == 10
    assert np.array_equal(pupil.state()["generator"], generator)
    assert not pupil.state()["actor.moment1"].any()
    assert pupil.learn(transition(np.random.default_rng(1))) is not None


def test_the_oldest_make_room() -> None:
    settings = SacSettings(hidden=(4,), buffer=3, start=99)
    sac, random = Sac(3, 2, settings), np.random.default_rng(0)
    given = [transition(random) for _ in range(5)]
    for one in given:
        sac.learn(one)
    assert sac.transitions == 3
    kept = {round(float(value), 5) for value in sac.state()["buffer.reward"][:, 0]}
    assert kept == {round(one.reward, 5) for one in given[2:]}


def test_learning_starts_when_enough_are_there() -> None:
    random = np.random.default_rng(0)
    sac = Sac(3, 2, SacSettings(hidden=(4,), start=3, updates=2), seed=0)
    found = [sac.learn(transition(random)) is None for _ in range(4)]
    assert found == [True, True, False, False]
    assert int(sac.state()["steps"][0]) == 4


# What is refused


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e39])
@pytest.mark.parametrize("name", ["state", "action", "reward", "next_state"])
def test_numbers_that_are_none_never_enter(name: str, bad: float) -> None:
    sac, good = fed(1, 6), transition(np.random.default_rng(1))
    values = dict(vars(good))
    if name == "reward":
        values[name] = bad
    else:
        values[name] = values[name].copy()
        values[name][1] = bad
    before = sac.state()
    with pytest.raises(FedtuneError, match=name):
        sac.learn(Transition(**values))
    assert equal(sac.state(), before)
    assert sac.learn(good) is not None


def test_wrong_shapes_and_actions_outside_are_refused() -> None:
    sac, good = Sac(3, 2), vars(transition(np.random.default_rng(1)))
    for name, value in {
        "state": np.zeros(4), "next_state": np.zeros((1, 3)), "action": np.array([0.0, 1.01]),
    }.items():  # fmt: skip
        with pytest.raises(FedtuneError, match=name):
            sac.learn(Transition(**{**good, name: value}))
    with pytest.raises(FedtuneError, match="state has shape"):
        sac.act(np.zeros(2))
    with pytest.raises(FedtuneError, match="nan"):
        sac.act(np.array([0, 0, np.nan]))
    with pytest.raises(FedtuneError, match="0 transitions"):
        sac.pretrain([], 5)
    assert sac.transitions == 0


def test_learning_that_runs_away_is_an_error() -> None:
    sac = fed(1, 6)
    huge = Transition(np.zeros(3), np.zeros(2), 3e38, np.zeros(3), False)
    with pytest.raises(FedtuneError, match="losses=") as raised:
        sac.pretrain([huge] * 8, 50)
    assert "ran away" in raised.value.hint


def spoilt(state: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """One state for everything that must be refused."""
    cases = {}
    for name, value in state.items():
        cases[f"{name} is gone"] = {k: v for k, v in state.items() if k != name}
        cases[f"{name} is longer"] = {**state, name: np.concatenate([value, value])}
        cases[f"{name} is of another type"] = {**state, name: value.astype(np.float16)}
        cases[f"{name} is empty"] = {**state, name: value[:0]}
        if value.dtype.kind == "f":
            broken = value.copy()
            broken.flat[0] = math.nan
            cases[f"{name} has NaN"] = {**state, name: broken}
    cases["one too many"] = {**state, "more": np.zeros(1)}
    for name, number in {
        "actor.moment2": -1, "seen.squares": -1, "buffer.action": 1.5, "buffer.seen": -1,
        "steps": -1, "seen.count": 0, "temperature": 1e4, "temperature.moment2": -1,
    }.items():  # fmt: skip
        cases[f"{name} is {number}"] = {**state, name: np.full_like(state[name], number)}
    cases["generator of noise"] = {**state, "generator": np.full_like(state["generator"], 255)}
    return cases


def test_foreign_states_are_refused_and_change_nothing() -> None:
    sac = fed(1, 10, SacSettings(hidden=(4,), buffer=16))
    saved = sac.state()
    for case, state in spoilt(saved).items():
        with pytest.raises(FedtuneError) as raised:
            sac.restore(state)
        assert raised.value.code is ExitCode.RESUME_REFUSED, case
        assert equal(sac.state(), saved), case
    sac.restore(saved)


def test_a_policy_of_another_shape_is_refused() -> None:
    sac = Sac(3, 2, QUICK)
    for other in (Sac(4, 2, QUICK), Sac(3, 1, QUICK), Sac(3, 2, SacSettings(hidden=(16, 8)))):
        with pytest.raises(FedtuneError) as raised:
            sac.load_actor(other.actor_state())
        assert raised.value.code is ExitCode.MODEL
    with pytest.raises(FedtuneError, match="names"):
        sac.load_actor(sac.state())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden", (8, 0)), ("gamma", 1.1), ("gamma", math.nan), ("tau", 0.0), ("lr", 0.0),
        ("lr", math.inf), ("batch_size", 0), ("buffer", 0), ("start", 0), ("updates", 0),
        ("target_entropy", math.nan), ("first_temperature", -1.0),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(FedtuneError, match=name) as raised:
        Sac(3, 2, SacSettings(**{name: value}))
    assert raised.value.code is ExitCode.CONFIG


def test_sizes_and_seed_out_of_range_are_refused() -> None:
    for arguments, name in (((0, 1), "states"), ((1, 0), "actions")):
        with pytest.raises(FedtuneError, match=name):
            Sac(*arguments)
    for seed in (-1, 1 << 63):
        with pytest.raises(FedtuneError, match="seed"):
            Sac(1, 1, seed=seed)


# What it costs


def test_memory_stays_under_five_megabytes() -> None:
    sac, random = Sac(40, 12, SacSettings(start=10_000)), np.random.default_rng(0)
    for one in itertools.islice(iter(lambda: transition(random, 40, 12), None), 2048):
        sac.learn(one)
    everything = sum(value.nbytes for value in sac.state().values())
    gradients = sum(net.flat.nbytes for net in (sac._actor_gradient, sac._critic_gradient))
    assert sac.transitions == 2048
    assert everything + gradients < 5_000_000


def test_a_decision_and_what_is_learnt_from_it_take_milliseconds() -> None:
    random = np.random.default_rng(0)
    sac = Sac(30, 10, seed=0)
    spent = []
    for _ in range(40):
        new = transition(random, 30, 10)
        started = time.process_time()
        sac.act(new.state)
        sac.learn(new)
        spent.append(time.process_time() - started)
    assert min(spent[8:]) < 0.05  # about 8 ms on a quiet core


def test_the_package_does_not_need_the_library_it_is_compared_with() -> None:
    code = (
        "import sys, fedtune.privacy.rldp.sac\n"
        "sys.exit(any(name in sys.modules for name in ('gymnasium', 'stable_baselines3')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


# Against the one of stable-baselines3


def test_swings_up_a_pendulum() -> None:
    """A random policy gets about -1,200, and stable-baselines3's with this little -200 to -300."""
    from fedtune.simulations.benchmarks.sac import SMALL, play_ours

    played = play_ours(2, 3000, SMALL)
    assert played.evaluated > -600


def test_both_are_trained_alike_and_told_alike() -> None:
    from fedtune.simulations.benchmarks.sac import SMALL, interval, play_ours, play_sb3

    torch.manual_seed(0)
    runs = [play(1, 220, replace(SMALL, hidden=(8,))) for play in (play_ours, play_sb3)]
    for run in runs:
        assert -2000 < run.last < -500
        assert -2000 < run.evaluated < -500
        assert run.seconds > 0
    mean, half = interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(2.4841, abs=1e-4))
    assert math.isnan(interval([1.0])[1])
