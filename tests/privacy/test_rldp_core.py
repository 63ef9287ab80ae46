"""What a policy may see, what a shape costs, and what one joint release shows."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.config import Config
from fedtune.config_privacy import RldpConfig
from fedtune.errors import FedtuneError
from fedtune.privacy.events import Relation, Unit
from fedtune.privacy.mechanism import Block, Mechanism
from fedtune.privacy.noise import InsecureSeededNoise, SecureNoise
from fedtune.privacy.plan import example_promise, resolve
from fedtune.privacy.replay import Stage
from fedtune.privacy.replay_checks import Finding, audit, neighbours
from fedtune.privacy.rldp.joint import Collected, bits_deviation, clamped
from fedtune.privacy.rldp.shape import Sensing, Shape, flat, isotropic, mechanism_blocks
from fedtune.privacy.rldp.sight import Public, Released, require_sight, unseal
from fedtune.privacy.sampling import Everyone, Poisson


def _mechanism(z: float = 1.0, m: float = 16.0) -> Mechanism:
    return Mechanism(Unit.EXAMPLE, Relation.ADD_OR_REMOVE_ONE, Poisson(0.25), z, m)


# ---------------------------------------------------------------- sight


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(1), torch.tensor(0.5), np.zeros(1), np.float64(0.5), np.float32(0.5),
        [0.5], {"a": 1}, None, (0.5, np.float64(1.0)), (torch.tensor(1.0),), Released, 1j,
        math.nan, math.inf,
    ],
)  # fmt: skip
def test_v21_public_takes_plain_values_only(value: Any) -> None:
    with pytest.raises(FedtuneError, match=r"public"):
        Public(value)


@pytest.mark.parametrize("value", [torch.zeros(3), np.zeros(3), 0.5, "text", [1.0]])
def test_v21_nothing_is_released_but_by_a_mechanism(value: Any) -> None:
    with pytest.raises(FedtuneError, match="only when a mechanism"):
        Released(value)
    with pytest.raises(FedtuneError, match="only when a mechanism"):
        Released(value, object())
    with pytest.raises(FedtuneError, match="releases nothing"):
        unseal(value, by=object())
    with pytest.raises(FedtuneError, match="was shown a"):
        require_sight(value)


def test_what_is_made_of_released_values_is_released() -> None:
    made = unseal(2.0, by=_mechanism()).map(lambda x: x + 1)
    assert isinstance(made, Released)
    assert require_sight(made) == 3.0
    with pytest.raises(FedtuneError, match="stays as it is"):
        made.other = 1  # type: ignore[attr-defined]


# ---------------------------------------------------------------- shapes


def _shapes(n: int) -> st.SearchStrategy[Shape]:
    numbers = st.lists(st.floats(1e-3, 1e3), min_size=n, max_size=n)
    names = tuple((f"p{i}",) for i in range(n))
    return st.tuples(numbers, numbers).map(
        lambda pair: Shape(names, tuple(pair[0]), tuple(w / math.fsum(pair[1]) for w in pair[1]))
    )


@given(
    st.integers(1, 24).flatmap(_shapes), st.floats(0.05, 20.0), st.floats(0.0, 0.2),
    st.floats(0.0, 0.2),
)  # fmt: skip
@settings(deadline=None)
def test_v16_whatever_norms_and_shares_are_the_joint_sensitivity_is_that_of_the_event(
    shape: Shape, z: float, bits: float, loss: float
) -> None:
    blocks, held = mechanism_blocks(_mechanism(z), shape, Sensing(bits, loss, held=True))
    assert sum((b.clip / b.sigma) ** 2 for b in blocks) == pytest.approx(z**-2, rel=1e-9)
    assert sum((b.clip / b.sigma) ** 2 for b in held) == pytest.approx(z**-2, rel=1e-9)


def test_v16_noise_for_each_block_alone_is_refused_before_anything_is_drawn() -> None:
    """The square root of n: noise z C_i on n blocks has the privacy of z / sqrt(n)."""
    mechanism, n = _mechanism(), 12
    sums = {f"p{i}": np.zeros(3) for i in range(n)}
    alone = [Block((name,), 0.5, 0.5 * mechanism.noise_multiplier) for name in sums]

    class Never:
        name, secure = "never", True

        def normal(self, count: int) -> Any:
            raise AssertionError("drawn")

    with pytest.raises(FedtuneError, match=r"sum \(clip / sigma\)\^2 = 12"):
        mechanism.release(sums, alone, Never())  # type: ignore[arg-type]


def test_shares_of_the_held_out_part_do_not_add_to_the_others() -> None:
    mechanism = _mechanism()
    sums = {"a": np.zeros(2), "held": np.zeros(1)}
    first, second = mechanism.blocks_flat(["a"], 1.0), mechanism.blocks_flat(["held"], 4.0)
    mechanism.release(sums, first, SecureNoise(), apart=second)
    with pytest.raises(FedtuneError, match=r"sum \(clip / sigma\)\^2 = 2"):
        mechanism.release(sums, (*first, *second), SecureNoise())
    louder = [Block(("held",), 4.0, 2.0)]
    with pytest.raises(FedtuneError, match=r"sum \(clip / sigma\)\^2 = 4"):
        mechanism.release(sums, first, SecureNoise(), apart=louder)


@pytest.mark.parametrize(
    ("norms", "shares"),
    [
        ((1.0,), (0.5, 0.5)), ((1.0, 0.0), (0.5, 0.5)), ((1.0, math.nan), (0.5, 0.5)),
        ((1.0, math.inf), (0.5, 0.5)), ((1.0, 1.0), (1.0, 0.0)), ((1.0, 1.0), (0.9, 0.2)),
        ((1.0, 1.0), (1.5, -0.5)), ((1.0, 1.0), (math.nan, 0.5)),
    ],
)  # fmt: skip
def test_shapes_that_are_none_are_refused(norms: Any, shares: Any) -> None:
    with pytest.raises(FedtuneError, match="shape of a release"):
        Shape((("a",), ("b",)), norms, shares)


@pytest.mark.parametrize(
    "scales",
    [
        {"a": np.ones(3, np.float32)}, {"a": np.ones(3, np.float32), "b": np.zeros(3, np.float32)},
        {"a": np.ones(3, np.float32), "b": np.array([1, np.nan, 1], np.float32)},
    ],
)  # fmt: skip
def test_scales_that_are_none_are_refused(scales: Any) -> None:
    with pytest.raises(FedtuneError, match="scale"):
        Shape((("a", "b"),), (1.0,), (1.0,), scales=scales)


def test_isotropic_noise_is_that_of_the_joint_norm() -> None:
    shape = isotropic((("a",), ("b",), ("c",)), (1.0, 2.0, 2.0))
    assert shape.deviations(1.5) == pytest.approx((4.5, 4.5, 4.5))


# ---------------------------------------------------------------- a release


def _observed(z: float, repeats: int, sensing: Sensing, held: float = 0.0) -> list[Any]:
    mechanism, source = _mechanism(z, 8.0), SecureNoise()
    found = []
    for _ in range(repeats):
        collected = Collected(
            flat(["a"], 1.0), sensing, {"a": np.zeros(4)}, held_share=held
        )  # fmt: skip
        collected.sense(torch.tensor([[0.5], [0.9], [2.0], [3.0]]), torch.tensor([1.0, 2, 3, 99]))
        if held:
            collected.sense_held(torch.tensor([2.0, 4.0]))
        found.append(collected.release(mechanism, source, 3))
    return found


def test_sensors_are_unbiased_with_the_noise_that_is_stated() -> None:
    seen = _observed(0.5, 400, Sensing(0.02, 0.03, loss_clip=8.0, held=True), held=0.25)
    # 4 of 8 expected drew: 2 within; means are over the public constant 8 * 0.75.
    inside = np.array([one.inside.value[0] for one in seen])
    loss = np.array([one.loss.value for one in seen])
    held = np.array([one.held.value for one in seen])
    expected = {
        "inside": (inside, 0.5 + 0.0 / 6, seen[0].inside_deviation.value),
        "loss": (loss, 4.0 + (1 + 2 + 3 + 8 - 16) / 6, seen[0].loss_deviation.value),
        "held": (held, 4.0 + (2 + 4 - 8) / 2, seen[0].held_deviation.value),
    }
    for name, (values, mean, deviation) in expected.items():
        assert abs(values.mean() - mean) < 5 * deviation / math.sqrt(len(values)), name
        assert 0.85 < values.std() / deviation < 1.15, name
    assert bits_deviation(1, 0.5, 0.02, 8.0) / 0.75 == pytest.approx(seen[0].inside_deviation.value)


def test_without_sensors_a_release_shows_means_alone() -> None:
    (seen,) = _observed(1.0, 1, Sensing())
    assert (seen.inside, seen.loss, seen.held) == (None, None, None)
    assert seen.deviations.value == (1.0 / 8.0,)
    assert seen.step.value == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_v01_a_loss_that_is_no_number_adds_nothing(bad: float) -> None:
    assert clamped(torch.tensor([bad]), 8.0) == 0.0
    assert clamped(torch.tensor([bad, 8.0]), 8.0) == 4.0


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=1))
def test_one_example_moves_the_loss_by_half_the_clamp_at_most(values: list[float]) -> None:
    assert abs(clamped(torch.tensor(values), 6.0)) <= 3.0


def test_scales_are_undone_after_the_noise() -> None:
    scales = {"a": np.array([0.5, 2.0], np.float32)}
    shape = Shape((("a",),), (1.0,), (1.0,), scales=scales)
    mechanism = _mechanism(1e-4, 1.0)
    collected = Collected(shape, Sensing(), {"a": np.array([0.25, 1.0])})
    seen = collected.release(mechanism, InsecureSeededNoise(1), 0)
    assert seen.means.value["a"] == pytest.approx([0.5, 0.5], abs=1e-2)


# ---------------------------------------------------------------- the planted bug


def _release_all(stage: Stage, rows: list[Any], sigma: float | None) -> None:
    """One release of twelve blocks; ``sigma``: noise of each block alone over its clip norm."""
    base = Mechanism(Unit.EXAMPLE, Relation.ADD_OR_REMOVE_ONE, Everyone(), 1.0, 8.0)
    mechanism, source = stage.watch(base), SecureNoise()
    names = tuple((f"p{i}",) for i in range(12))
    shape = Shape(names, (0.5,) * 12, (1 / 12,) * 12)
    drawn = mechanism.draw(len(rows), source)
    sums = {f"p{i}": np.zeros(20) for i in range(12)}
    for i in drawn:
        for j, name in enumerate(sums):
            row = np.asarray(rows[i], np.float64)[20 * j : 20 * (j + 1)]
            norm = float(np.linalg.norm(row))
            if math.isfinite(norm):
                sums[name] += row * min(1.0, 0.5 / norm) if norm > 0 else 0.0
    blocks, _ = mechanism_blocks(base, shape, Sensing())
    if sigma is not None:
        blocks = tuple(Block(b.names, b.clip, sigma * b.clip) for b in blocks)
    stage.emit("means", mechanism.release(sums, blocks, source))


def _hits_every_radius() -> list[Any]:
    rng = np.random.default_rng(0)
    return neighbours(list(rng.normal(size=(4, 240)) * 0.01), {"all radii": np.full(240, 9.0)})


def test_the_square_root_of_n_is_caught_in_a_copy_without_the_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs = _hits_every_radius()
    assert audit(lambda stage, rows: _release_all(stage, rows, None), pairs) == []
    refused = audit(lambda stage, rows: _release_all(stage, rows, 1.0), pairs)
    assert any("no release at all" in finding.detail for finding in refused)
    monkeypatch.setattr(Mechanism, "_check", lambda *_args: None)
    found = audit(lambda stage, rows: _release_all(stage, rows, 1.0), pairs)
    assert {finding.check for finding in found} >= {"sensitivity", "declared"}
    apart = [f for f in found if f.check == "sensitivity" and "together 3.46" in f.detail]
    assert apart, [Finding.__repr__(f) for f in found]  # sqrt(12)


# ---------------------------------------------------------------- what a review found


def test_values_that_a_policy_may_see_stay_as_they_are() -> None:
    for one in (Public(0.5), unseal(0.5, by=_mechanism())):
        with pytest.raises(FedtuneError, match="stays as it is"):
            one.value = 1.0
        assert require_sight(one) == 0.5


def test_what_has_a_release_and_is_no_mechanism_releases_nothing() -> None:
    with pytest.raises(FedtuneError, match="releases nothing"):
        unseal(0.5, by=threading.Lock())


@pytest.mark.parametrize(
    ("name", "value"),
    [("loss_clip", 1e300), ("loss_clip", 1e-30), ("held_out", 1e-320), ("sensing", 1e-300)],
)
def test_settings_that_only_a_release_would_refuse_are_refused_before_a_charge(
    name: str, value: float
) -> None:
    with pytest.raises(ValueError, match=name):
        RldpConfig.model_validate({name: value, "reward": "held-out"})


def _filtered(**example: Any) -> Config:
    told = {"relation": "add-or-remove-one", "population": 3200, "delta": 1e-5, "clip": "rldp",
            "rldp": {"noise": "filtered", "spread": 0.3, "mode": "online"}}  # fmt: skip
    return Config.model_validate({
        "data": {"pack": False, "holdout": 0.0}, "evaluation": {"clients": 0},
        "tuning": {"batch_size": 32, "steps": 40},
        "federation": {"weighting": "uniform", "rounds": 10},
        "privacy": {"example": told | example},
    })  # fmt: skip


def test_an_owners_lower_epsilon_leaves_the_filter_as_it_was_agreed() -> None:
    agreed = resolve(_filtered(noise_multiplier=1.2))
    example = agreed.privacy.example
    assert example is not None
    assert example.rldp is not None
    assert example.rldp.order > 1.0
    first = example_promise(agreed)
    lower = example.model_copy(update={"epsilon": 8.0})
    privacy = agreed.privacy.model_copy(update={"example": lower})
    second = example_promise(agreed.model_copy(update={"privacy": privacy}))
    assert first is not None
    assert second is not None
    assert first.charge == second.charge
    free = _filtered(noise_multiplier=1.2, epsilon=8.0)  # without the order that was agreed
    third = example_promise(free)
    assert third is not None
    assert third.charge != first.charge
