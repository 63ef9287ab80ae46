"""The noise: its law, its independence, and that nothing can play it again.

Statistical tests of the secure source cannot fix a seed. Each fails by chance at most
once in a million runs.
"""

import copy
import os
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy import noise
from fedtune.privacy.noise import InsecureSeededNoise, NoiseSource, SecureNoise

CHANCE = 1e-6
SOURCES = [SecureNoise(), InsecureSeededNoise(20)]


def _p_of_variance(values: NDArray[np.float64], sigma: float = 1.0) -> float:
    """Two-sided p value of the sum of squares under N(0, sigma^2)."""
    statistic = float(np.sum((values / sigma) ** 2))
    below = float(stats.chi2.cdf(statistic, values.size))
    return 2.0 * min(below, 1.0 - below)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_v04_normal_numbers_have_variance_one_and_the_normal_shape(source: NoiseSource) -> None:
    values = source.normal(100_000)
    assert values.shape == (100_000,)
    assert values.dtype == np.float64
    assert _p_of_variance(values) > CHANCE
    assert stats.kstest(values, "norm").pvalue > CHANCE
    assert 2 * stats.norm.sf(abs(values.mean()) * np.sqrt(values.size)) > CHANCE


@pytest.mark.parametrize("factor", [0.0, 0.5, 1 / 1.1, 1.1])
def test_v04_the_variance_test_sees_noise_of_another_size(factor: float) -> None:
    assert _p_of_variance(InsecureSeededNoise(1).normal(100_000) * factor) < CHANCE


def test_v04_the_tails_are_those_of_a_normal_law() -> None:
    values = np.abs(SecureNoise().normal(10_000_000))
    for threshold in (3.0, 4.0, 4.5):
        expected = 2 * stats.norm.sf(threshold) * values.size
        seen = int((values > threshold).sum())
        low, high = stats.poisson.ppf([CHANCE / 2, 1 - CHANCE / 2], expected)
        assert low <= seen <= high
    assert 4.8 < values.max() < 8.6


@pytest.mark.parametrize("n", [0, 1, 2, 3, 1000, noise.BLOCK, noise.BLOCK + 1, 3 * noise.BLOCK - 1])
def test_any_count_is_drawn_in_full(n: int) -> None:
    source = SecureNoise()
    for values in (source.normal(n), source.uniform(n), source.integers(n, 10)):
        assert values.shape == (n,)
        assert bool(np.isfinite(values).all())
    if n > 500:
        assert len(np.unique(source.normal(n))) == n


def test_neighbours_in_one_draw_are_independent() -> None:
    values = InsecureSeededNoise(3).normal(4 * noise.BLOCK)
    for lag in (1, 2, noise.BLOCK // 2, noise.BLOCK, 2 * noise.BLOCK):
        for left, right in ((values[:-lag], values[lag:]), (values[:-lag] ** 2, values[lag:] ** 2)):
            correlation = float(np.corrcoef(left, right)[0, 1])
            assert abs(correlation) * np.sqrt(left.size) < 5.0


def test_the_words_are_aes_256_in_counter_mode() -> None:
    # AES-256 of block 0 under the zero key: NIST AESAVS, key and text of zeros.
    words = next(noise._words(bytes(32), 4))
    assert words.tobytes()[:16].hex() == "dc95c078a2408989ad48a21492842087"
    stream = noise._words(bytes(32), 3 * noise.BLOCK)
    first = np.concatenate([next(stream).copy() for _ in range(3)])
    assert len(np.unique(first)) == 3 * noise.BLOCK


def test_uniform_numbers_never_touch_zero_or_one() -> None:
    ends = np.array([0, 2**64 - 1], dtype=np.uint64)
    out = np.empty(2)
    noise._to_uniform(ends, out)
    assert out.tolist() == [2.0**-53, 1.0 - 2.0**-53]
    values = SecureNoise().uniform(1_000_000)
    assert stats.kstest(values, "uniform").pvalue > CHANCE


def test_integers_are_without_bias_where_a_remainder_would_have_one() -> None:
    # 2^64 is 5 1/3 times 3 * 2^60: a plain remainder gives the lowest third 6 parts of 16.
    values = SecureNoise().integers(300_000, 3 << 60)
    counts = np.bincount(values >> 60, minlength=3)
    assert counts.size == 3
    assert stats.chisquare(counts).pvalue > CHANCE


# ---------------------------------------------------------------- nothing is ever repeated


def _alike(first: NDArray[np.float64], second: NDArray[np.float64]) -> bool:
    """Whether two draws share numbers or are correlated beyond chance."""
    shared = np.intersect1d(first, second).size > 0
    correlation = abs(float(np.corrcoef(first, second)[0, 1])) * np.sqrt(first.size)
    return shared or correlation > 6.0


def test_v07_two_calls_share_nothing() -> None:
    source = SecureNoise()
    assert not _alike(source.normal(100_000), source.normal(100_000))
    assert not _alike(SecureNoise().normal(100_000), SecureNoise().normal(100_000))
    assert _alike(InsecureSeededNoise(5).normal(1000), InsecureSeededNoise(5).normal(1000))


def test_v07_a_copy_does_not_play_the_same_stream() -> None:
    source = SecureNoise()
    copies = [copy.copy(source), copy.deepcopy(source), pickle.loads(pickle.dumps(source))]
    draws = [source.normal(1000), *(other.normal(1000) for other in copies)]
    for i, first in enumerate(draws):
        assert not any(_alike(first, second) for second in draws[i + 1 :])


def test_v07_parent_and_forked_child_share_nothing() -> None:
    source = SecureNoise()
    source.normal(10)
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:  # no pytest below: write and be gone
        os.write(theirs, source.normal(500).tobytes())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as stream:
        told = np.frombuffer(stream.read(), dtype=np.float64)
    os.waitpid(child, 0)
    assert told.size == 500
    assert not _alike(told, source.normal(500))


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_v07_threads_share_nothing(source: NoiseSource) -> None:
    with ThreadPoolExecutor(4) as pool:
        draws = list(pool.map(source.normal, [20_000] * 16))
    together = np.concatenate(draws)
    assert len(np.unique(together)) == together.size
    assert _p_of_variance(together) > CHANCE


def test_v08_seeds_of_libraries_change_nothing() -> None:
    source = SecureNoise()
    draws = []
    for _ in range(2):
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        random.seed(0)
        draws.append(source.normal(1000))
    assert not _alike(*draws)


def test_v08_the_insecure_source_says_so() -> None:
    assert SecureNoise().secure
    assert not InsecureSeededNoise(0).secure
    assert "insecure" in InsecureSeededNoise(0).name
    assert not _alike(InsecureSeededNoise(0).normal(1000), InsecureSeededNoise(1).normal(1000))


def test_v10_the_work_depends_on_the_count_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is rejected and drawn again, so that time tells nothing about the values."""
    words, pieces = noise._words, []

    def counted(key: bytes, n: int):  # type: ignore[no-untyped-def]
        for piece in words(key, n):
            pieces.append(len(piece))
            yield piece

    monkeypatch.setattr(noise, "_words", counted)
    n = noise.BLOCK * 3 + 77
    for _ in range(20):
        pieces.clear()
        SecureNoise().normal(n)
        assert pieces == [noise.BLOCK] * 4


@pytest.mark.parametrize("n", [-1, 2.0, True, None])
def test_counts_that_are_none_are_refused(n: object) -> None:
    for call in (SecureNoise().normal, SecureNoise().uniform, InsecureSeededNoise(0).normal):
        with pytest.raises(FedtuneError, match="random numbers") as error:
            call(n)  # type: ignore[arg-type]
        assert error.value.code is ExitCode.PRIVACY


@pytest.mark.parametrize("below", [0, -1, (1 << 62) + 1, 2.0, True])
def test_bounds_that_are_none_are_refused(below: object) -> None:
    with pytest.raises(FedtuneError, match="integers below"):
        SecureNoise().integers(1, below)  # type: ignore[arg-type]
