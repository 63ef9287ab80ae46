"""Samplers: the law they are accounted for is the law they follow."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.events import Gaussian, PoissonGaussian, TruncatedPoissonGaussian
from fedtune.privacy.noise import InsecureSeededNoise, SecureNoise
from fedtune.privacy.sampling import Everyone, Poisson, Sampler, TruncatedPoisson

CHANCE = 1e-6
SAMPLERS: list[Sampler] = [Everyone(), Poisson(0.3), TruncatedPoisson(0.3, 1000, 280)]


def _dispersion(sizes: list[int], n: int, q: float) -> float:
    return float(np.var(sizes, ddof=1)) / (n * q * (1 - q))


@pytest.mark.parametrize("q", [0.01, 0.1, 0.5, 0.9])
def test_v15_batch_sizes_vary_as_independent_coins_do(q: float) -> None:
    n, rounds = 1000, 2000
    sizes = [len(Poisson(q).draw(n, SecureNoise())) for _ in range(rounds)]
    ratio = _dispersion(sizes, n, q)
    below = float(stats.chi2.cdf(ratio * (rounds - 1), rounds - 1))
    assert 2 * min(below, 1 - below) > CHANCE
    z = (np.mean(sizes) - n * q) / np.sqrt(n * q * (1 - q) / rounds)
    assert 2 * stats.norm.sf(abs(z)) > CHANCE


def test_v15_the_dispersion_of_fixed_batches_is_far_from_one() -> None:
    assert _dispersion([100] * 50, 1000, 0.1) == 0.0


def test_v15_every_unit_has_the_same_chance_and_its_own_coin() -> None:
    n, rounds, q = 60, 20_000, 0.1
    source = InsecureSeededNoise(4)
    drawn = np.zeros((rounds, n))
    for row in drawn:
        row[Poisson(q).draw(n, source)] = 1.0
    assert stats.chisquare(drawn.sum(0), np.full(n, drawn.sum() / n)).pvalue > CHANCE
    correlation = np.corrcoef(drawn.T)[np.triu_indices(n, 1)] * np.sqrt(rounds)
    assert np.abs(correlation).max() < 6.0
    again = np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1] * np.sqrt(drawn.size)
    assert abs(again) < 6.0


def test_v14_a_poisson_draw_may_be_empty() -> None:
    sizes = [len(Poisson(0.01).draw(20, SecureNoise())) for _ in range(200)]
    assert 0 in sizes
    assert Poisson(0.5).draw(0, SecureNoise()).shape == (0,)


def test_a_sure_coin_draws_everybody() -> None:
    assert np.array_equal(Poisson(1.0).draw(500, SecureNoise()), np.arange(500))
    assert np.array_equal(Everyone().draw(500, SecureNoise()), np.arange(500))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__)
def test_draws_are_ascending_int64_of_the_population(sampler: Sampler) -> None:
    for _ in range(20):
        drawn = sampler.draw(1000, SecureNoise())
        assert drawn.dtype == np.int64
        assert np.array_equal(drawn, np.unique(drawn))
        assert 0 <= drawn[0] <= drawn[-1] < 1000


def test_the_cap_holds_and_a_cap_that_never_bites_changes_nothing() -> None:
    capped = TruncatedPoisson(0.5, population=100, cap=45)
    sizes = [len(capped.draw(100, SecureNoise())) for _ in range(500)]
    assert max(sizes) == 45
    assert min(sizes) < 45
    free = TruncatedPoisson(0.5, population=100, cap=100)
    ours, theirs = InsecureSeededNoise(8), InsecureSeededNoise(8)
    for _ in range(20):
        assert np.array_equal(free.draw(100, ours), Poisson(0.5).draw(100, theirs))


def test_a_full_cap_keeps_every_subset_equally_often() -> None:
    sampler, source = TruncatedPoisson(1.0, population=5, cap=2), InsecureSeededNoise(6)
    seen = Counter(tuple(sampler.draw(5, source).tolist()) for _ in range(10_000))
    counts = [seen[pair] for pair in combinations(range(5), 2)]
    assert sum(counts) == 10_000
    assert stats.chisquare(counts).pvalue > CHANCE


def test_v16_the_event_has_the_numbers_that_the_sampler_draws_with() -> None:
    assert Everyone().event(2.0) == Gaussian(2.0)
    assert Poisson(0.25).event(2.0) == PoissonGaussian(0.25, 2.0)
    assert TruncatedPoisson(0.25, 80, 40).event(2.0) == TruncatedPoissonGaussian(0.25, 2.0, 80, 40)
    assert [sampler.rate for sampler in SAMPLERS] == [1.0, 0.3, 0.3]


@pytest.mark.parametrize("n", [99, 101, 0])
def test_v16_a_truncated_sampler_refuses_another_population(n: int) -> None:
    with pytest.raises(FedtuneError, match="accounted for 100") as error:
        TruncatedPoisson(0.1, population=100, cap=20).draw(n, SecureNoise())
    assert error.value.code is ExitCode.PRIVACY


@pytest.mark.parametrize("q", [0.0, -0.1, 1.0001, float("nan"), float("inf"), True, "0.1", None])
def test_probabilities_that_are_none_are_refused(q: object) -> None:
    with pytest.raises(FedtuneError, match="sampling probability"):
        Poisson(q)  # type: ignore[arg-type]
    with pytest.raises(FedtuneError, match="sampling probability"):
        TruncatedPoisson(q, 10, 5)  # type: ignore[arg-type]


@pytest.mark.parametrize(("population", "cap"), [(0, 1), (10, 0), (10, 11), (10.0, 5), (10, True)])
def test_caps_that_make_no_sense_are_refused(population: int, cap: int) -> None:
    with pytest.raises(FedtuneError, match="truncated Poisson"):
        TruncatedPoisson(0.1, population, cap)


@pytest.mark.parametrize("sampler", [Everyone(), Poisson(0.5)], ids=["everyone", "poisson"])
@pytest.mark.parametrize("n", [-1, 2.5, True])
def test_numbers_of_units_that_are_none_are_refused(sampler: Sampler, n: int) -> None:
    with pytest.raises(FedtuneError, match="units to draw from"):
        sampler.draw(n, SecureNoise())
