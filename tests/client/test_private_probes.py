"""Private coefficients: what one example can do, and that the noise knows no direction."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from fedtune.adapters import attach, trainable
from fedtune.client import private_probes
from fedtune.client.private_probes import (
    Projector,
    tune_by_probes_privately,
    tune_projected_privately,
)
from fedtune.client.walker import Stream, Walker
from fedtune.config import Config
from fedtune.models import load_base
from fedtune.pool.hadamard import HadamardPool
from fedtune.pool.layout import Arena, Layout
from fedtune.privacy.noise import InsecureSeededNoise, NoiseSource, SecureNoise
from fedtune.privacy.per_example import example_losses
from fedtune.privacy.plan import noise_source
from fedtune.privacy.replay import Release, Stage, record
from fedtune.privacy.replay_checks import audit, neighbours
from tests.client.straight import (
    CLIP,
    GRADIENTS,
    POPULATION,
    PROJECTED,
    STEPS,
    D,
    config_of,
    everyone,
    promise_of,
    rows_of,
    straight,
)
from tests.tiny import llama


def _sums(config: Config, rows: Sequence[Sequence[int]], **more: Any) -> list[Release]:
    trace = record(partial(straight, config=config, **more), rows)
    assert trace.outcome == "done"
    assert not [left for left in trace.left if left.channel == "log"]
    return trace.releases


def _slopes(rows: Sequence[Sequence[int]], count: int, gradients: NDArray[Any] = GRADIENTS) -> Any:
    pool = HadamardPool(7, 64)
    Z = torch.stack([pool.direction(k, D) for k in range(count)]).double().numpy()
    return np.array([gradients[row[0]].astype(np.float64) @ Z.T / count for row in rows])


def _clipped(vectors: Any, clip: float) -> Any:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors * np.minimum(1.0, clip / norms)


@pytest.mark.parametrize("sides", ["two", "one"])
@pytest.mark.parametrize("clip", [0.1, 4.0, 1e3])
def test_the_sum_is_that_of_slopes_clipped_one_by_one(sides: str, clip: float) -> None:
    config = everyone(tuning={"probe": {"count": 4, "eps": 0.5, "sides": sides}})
    rows = [[i, 1] for i in range(30)]
    (release,) = _sums(config, rows, clip=clip)
    wanted = _clipped(_slopes(rows, 4), clip).sum(0)
    assert release.sums["slopes"] == pytest.approx(wanted, rel=1e-3, abs=30 * clip * 1e-4)
    assert release.margin == 0.0, "whole numbers need none"
    assert release.denominator == POPULATION


def test_projections_have_the_same_sum() -> None:
    config = everyone(tuning=PROJECTED)
    rows = [[i, 1] for i in range(30)]
    (release,) = _sums(config, rows, clip=4.0, projected=True)
    wanted = _clipped(_slopes(rows, 4), 4.0).sum(0)
    assert release.sums["slopes"] == pytest.approx(wanted, rel=1e-3, abs=30 * 4e-4)


@pytest.mark.parametrize("projected", [False, True])
def test_what_is_released_is_walked_and_nothing_else(projected: bool) -> None:
    more = PROJECTED if projected else {}
    config = everyone(tuning=more)
    rows = [[i, 1] for i in range(30)]
    seen: list[Any] = []

    def run(stage: Stage, data: Any) -> None:
        seen.extend(straight(stage, data, config, clip=4.0, projected=projected))

    (release,) = record(run, rows).releases
    coefficients, weights = seen
    wanted = np.zeros(64)
    wanted[:4] = -0.5 * release.output["slopes"]
    assert coefficients == pytest.approx(wanted, rel=1e-6)
    moved = sum(wanted[k] * HadamardPool(7, 64).direction(k, D).numpy() for k in range(4))
    assert weights == pytest.approx(moved, rel=1e-4, abs=1e-6)


def test_it_learns_under_privacy() -> None:
    """The mean gradient of all examples is followed, noise and clipping included."""
    rows = [[i, 1] for i in range(POPULATION)]
    shared = GRADIENTS + 2.0
    config = everyone(8, tuning={"steps": 60}, example={"noise_multiplier": 0.5})
    directions = [[(8 * s + j) % 64 for j in range(8)] for s in range(60)]
    _, weights = straight(None, rows, config, gradients=shared, clip=4.0, directions=directions)
    mean = shared[:POPULATION].mean(0)
    cosine = float(weights @ mean) / float(np.linalg.norm(weights) * np.linalg.norm(mean))
    assert cosine < -0.8


# ---------------------------------------------------------------- one example


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_v01_an_example_whose_loss_is_not_finite_adds_nothing(bad: float, projected: bool) -> None:
    more = PROJECTED if projected else {}
    gradients = GRADIENTS.copy()
    gradients[49] = bad
    config = everyone(tuning=more)
    rows = [[i, 1] for i in range(20)]
    (without,) = _sums(config, rows, gradients=gradients, projected=projected)
    more_rows = [*rows[:9], [49, 1], *rows[9:]]
    (among,) = _sums(config, more_rows, gradients=gradients, projected=projected)
    (alone,) = _sums(config, [[49, 1]], gradients=gradients, projected=projected)
    assert np.array_equal(without.sums["slopes"], among.sums["slopes"])
    assert not alone.sums["slopes"].any()


def test_v05_a_huge_slope_is_clipped_for_itself() -> None:
    """DPZero's OPT code clips one number per batch: there it would silence all others."""
    gradients = GRADIENTS.copy()
    gradients[49] *= 1e6
    config = everyone()
    rows = [[i, 1] for i in range(20)]
    (without,) = _sums(config, rows, gradients=gradients)
    (among,) = _sums(config, [*rows, [49, 1]], gradients=gradients)
    gap = among.sums["slopes"] - without.sums["slopes"]
    assert float(np.linalg.norm(gap)) == pytest.approx(CLIP, rel=1e-3)
    assert float(np.linalg.norm(gap)) <= CLIP
    wanted = _clipped(_slopes([*rows, [49, 1]], 4, gradients), CLIP).sum(0)
    assert among.sums["slopes"] == pytest.approx(wanted, abs=1e-3)
    assert float(np.linalg.norm(without.sums["slopes"])) > 2 * CLIP, "a batch is not one unit"


@pytest.mark.parametrize("clip", ["flat", "quantile"])
@pytest.mark.parametrize("projected", [False, True])
def test_v40_a_straight_loss_keeps_its_promise_under_replay(clip: str, projected: bool) -> None:
    gradients = GRADIENTS.copy()
    gradients[40] = np.nan
    gradients[41] *= 1e9
    gradients[42] = 0.0
    more = PROJECTED if projected else {}
    config = config_of(tuning={"steps": 20} | more, example={"clip": clip})
    people = [[i, 1] for i in range(POPULATION)]
    odd = {"nan": [40, 1], "huge": [41, 1], "zero": [42, 1], "plain": [43, 1]}
    run = partial(straight, config=config, gradients=gradients, projected=projected)
    directions = [[k % 64, (k + 1) % 64] for k in range(20)]
    assert audit(partial(run, directions=directions), neighbours(people, odd)) == []


def test_the_harness_sees_a_vector_that_is_not_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = private_probes._release

    def doubled(seen: Any, *rest: Any) -> Any:
        return plain(np.concatenate([seen, seen]), *rest)  # an example counts twice

    monkeypatch.setattr(private_probes, "_release", doubled)
    people = [[i, 1] for i in range(POPULATION)]
    run = partial(straight, config=config_of(tuning={"steps": 20}))
    found = audit(run, neighbours(people, {"plain": [43, 1]}))
    assert {finding.check for finding in found} == {"sensitivity"}


def test_v14_nobody_drawn_is_a_release_like_any_other() -> None:
    releases = _sums(config_of(), [])
    assert len(releases) == STEPS
    assert not any(release.sums["slopes"].any() for release in releases)
    assert all(release.output["slopes"].any() for release in releases)


# ---------------------------------------------------------------- a real network


@pytest.fixture(scope="module")
def base(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("base"), shared)


def _people(seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 500, rng.integers(2, 24)).tolist() for _ in range(POPULATION)]


ODD = {"longest": [*range(3, 43)], "one token": [3], "repeated": [7] * 24, "padding": [0] * 12}


def _network(stage: Stage, rows: list[list[int]], config: Config, projected: bool) -> None:
    model = attach(load_base(config.model), config.tuning, "causal-lm", 3)
    model.eval()
    named = trainable(model)
    arena = Arena.of(named.items())
    promise = promise_of(config)
    watched = replace(promise, mechanism=stage.watch(promise.mechanism))
    pool = HadamardPool(5, 64)
    walker = Walker(pool if projected else Stream(lambda n: HadamardPool(n, 64)), arena.flat)
    tune: Any = tune_by_probes_privately
    if projected:
        tune = partial(tune_projected_privately, projector=Projector(pool, arena.layout, named))
    norm = tune(
        walker, score_examples=lambda b: example_losses(model, b, "causal-lm"),
        encoded=rows_of(rows), config=config, promise=watched, source=SecureNoise(),
        directions=[[3 * s, 3 * s + 1] for s in range(promise.releases)],
        lr=0.05, clip_norm=CLIP, pad_id=0,
    )  # fmt: skip
    stage.emit("weights", arena.flat)
    stage.emit("clip", norm)


@pytest.mark.parametrize("projected", [False, True])
def test_v40_a_network_keeps_its_promise_under_replay(projected: bool, base: Path) -> None:
    tuning = PROJECTED if projected else {}
    config = config_of(base, tuning=tuning, example={"clip": "quantile"})
    run = partial(_network, config=config, projected=projected)
    assert audit(run, neighbours(_people(0), ODD)[:5]) == []


def test_v34_one_row_more_moves_no_bit_of_the_others(base: Path) -> None:
    """In a batch it would: rounding of the losses is divided by eps."""
    config = config_of(base, tuning={"batch_size": POPULATION, "steps": 1},
                     example={"sampler": "everyone"})  # fmt: skip
    run = partial(_network, config=config, projected=False)
    rows = _people(1)
    one, two = (record(run, data).releases[0] for data in (rows, [*rows, ODD["one token"]]))
    assert np.array_equal(one.sums["slopes"], two.sums["slopes"])


def test_a_projection_is_the_slope(base: Path) -> None:
    config = config_of(base)
    model = attach(load_base(config.model), config.tuning, "causal-lm", 3).eval()
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter += 0.05 * torch.randn(parameter.shape)
    named = trainable(model)
    arena = Arena.of(named.items())
    pool = HadamardPool(5, 16)
    batch = {name: torch.tensor([[5, 6, 7, 8, 9]]) for name in ("input_ids", "labels")}
    batch["attention_mask"] = torch.ones(1, 5, dtype=torch.long)
    loss = lambda: example_losses(model, batch, "causal-lm")[0]  # noqa: E731
    found = Projector(pool, arena.layout, named)(loss)
    assert all(parameter.grad is None for parameter in named.values())
    loss().backward()
    whole = torch.cat([named[span.name].grad.reshape(-1) for span in arena.layout.spans])
    assert found == pytest.approx(pool.project(whole).numpy(), rel=1e-4, abs=1e-6)
    eps = 1e-3
    slopes = private_probes._slopes(
        Walker(pool, arena.flat), lambda: np.array([float(loss().detach())]), range(16), (eps, -eps)
    )
    assert slopes[0] == pytest.approx(found, rel=0.02, abs=0.01)


def test_a_tied_weight_is_projected_once() -> None:
    table = nn.Embedding(6, 4)
    pool = HadamardPool(1, 8)
    named = dict(table.named_parameters())
    layout = Layout.of(named.items())
    loss = lambda: (table(torch.tensor([1, 2])) @ table.weight.T).square().sum()  # noqa: E731
    found = Projector(pool, layout, named)(loss)
    loss().backward()
    assert found == pytest.approx(pool.project(table.weight.grad.reshape(-1)).numpy(), rel=1e-5)


# ---------------------------------------------------------------- the noise knows no direction


def _noise(source: NoiseSource, config: Config, key: int = 7) -> NDArray[np.float64]:
    """Return what is released where there is no data: noise over the noise's size."""
    releases = _sums(config, [], source=source, key=key)
    size = promise_of(config).mechanism.noise_multiplier * CLIP / 6.0
    return np.concatenate([release.output["slopes"] for release in releases]) / size


def test_v41_the_same_directions_twice_have_other_noise() -> None:
    config = config_of()
    one, two = _noise(SecureNoise(), config), _noise(SecureNoise(), config)
    assert not (one == two).any()
    source = InsecureSeededNoise(3)
    assert not (_noise(source, config) == _noise(source, config)).any()


def test_v41_the_pool_key_changes_no_number_of_the_noise() -> None:
    config = config_of()
    one = _noise(InsecureSeededNoise(3), config, key=7)
    assert np.array_equal(one, _noise(InsecureSeededNoise(3), config, key=8))
    torch.manual_seed(8)
    np.random.seed(8)  # noqa: NPY002
    assert np.array_equal(one, _noise(InsecureSeededNoise(3), config, key=8))
    assert not (one == _noise(InsecureSeededNoise(4), config, key=7)).any()


class Reseeded:
    """DPZero's bug: noise from the generator that the direction's seed has just set."""

    name, secure = "planted", True

    def __init__(self) -> None:
        self.seed = 0

    def normal(self, n: int) -> NDArray[np.float64]:
        generator = torch.Generator().manual_seed(self.seed)
        self.seed += 1
        return torch.randn(n, generator=generator).double().numpy()

    def uniform(self, n: int) -> NDArray[np.float64]:
        return np.full(n, 0.5)

    def integers(self, n: int, below: int) -> NDArray[np.int64]:
        return np.zeros(n, np.int64)


def _guess(seed: int, n: int) -> NDArray[np.float64]:
    """Return the noise as somebody would guess it who knows the direction's seed."""
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).double().numpy()


def test_v41_who_knows_the_direction_seeds_cannot_guess_the_noise() -> None:
    """DPZero draws after re-seeding with the direction's seed, DP-AggZO from seed + step."""
    steps = 500
    config = config_of(tuning={"steps": steps})
    directions_seed = 0
    guesses = np.concatenate([_guess(directions_seed + step, 2) for step in range(steps)])
    chosen = {"planted": Reseeded(), "ours": SecureNoise(), "seeded": InsecureSeededNoise(0)}
    found = {}
    for name, source in chosen.items():
        noise = _noise(source, config)
        assert noise.std() == pytest.approx(1.0, abs=0.12)
        found[name] = float(np.corrcoef(noise, guesses)[0, 1])
    assert found["planted"] > 0.999, "the check finds the bug"
    assert abs(found["ours"]) < 5 / math.sqrt(2 * steps)
    assert abs(found["seeded"]) < 5 / math.sqrt(2 * steps)


def test_v41_noise_and_directions_are_uncorrelated() -> None:
    pool = HadamardPool(7, 64)
    noise = np.concatenate([_noise(SecureNoise(), config_of()) for _ in range(40)])
    signs = np.concatenate([pool.direction(k, D).numpy() for k in range(10)])[: len(noise)]
    assert abs(float(np.corrcoef(noise, signs)[0, 1])) < 5 / math.sqrt(len(noise))


def test_v41_a_run_that_starts_again_has_other_noise() -> None:
    config = config_of()
    sources = [noise_source(config, "client", "c0", 1, 1) for _ in range(2)]
    assert all(source.secure for source in sources)
    one, two = (_noise(source, config) for source in sources)
    assert not (one == two).any()
