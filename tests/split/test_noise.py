"""Noise at the cut: sensitivity, size of the noise, and what epsilon says of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm

from fedtune.errors import FedtuneError
from fedtune.privacy.cut_noise import noised, record_epsilon
from fedtune.privacy.noise import InsecureSeededNoise, SecureNoise

TINY = 1e-12  # a noise multiplier whose noise rounds to nothing


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_whole_record_is_clipped_and_padding_does_not_count() -> None:
    hidden = normal(3, 6, 8) * torch.tensor([100.0, 0.001, 1.0])[:, None, None]
    hidden[2, 4:] = 1e6  # padding
    spans = [(0, 6), (2, 6), (0, 4)]
    sent = noised(hidden, spans, clip=2.0, z=TINY, source=InsecureSeededNoise(0))
    norms = sent.flatten(1).norm(dim=1)
    assert norms[0] == pytest.approx(2.0, rel=1e-4)
    assert torch.allclose(sent[1, 2:], hidden[1, 2:], atol=1e-4)  # small ones stay
    assert not sent[1, :2].any()
    assert not sent[2, 4:].any()
    assert torch.allclose(sent[0] / sent[0].norm(), hidden[0] / hidden[0].norm(), atol=1e-4)
    assert float(norms.max()) <= 2.0


@pytest.mark.parametrize("seed", range(5))
def test_replacing_an_example_moves_its_record_by_two_clips_at_most(seed: int) -> None:
    one, two = normal(1, 7, 16, seed=seed) * 50, -normal(1, 7, 16, seed=seed) * 50
    # The same noise on both: what is left is the records alone.
    a, b = (noised(x, None, 1.5, 0.7, InsecureSeededNoise(seed)) for x in (one, two))
    assert float((a - b).norm()) <= 3.0 + 1e-4
    assert float((a - b).norm()) == pytest.approx(3.0, rel=1e-3)  # and that is reached


def test_noise_has_the_size_that_is_accounted_for() -> None:
    z, clip = 1.3, 4.0
    hidden = torch.zeros(2, 50, 400)
    sent = noised(hidden, [(0, 50), (0, 25)], clip, z, SecureNoise())
    real = torch.cat([sent[0].flatten(), sent[1, :25].flatten()]).double().numpy()
    count = len(real)
    assert real.std() == pytest.approx(z * clip, rel=5 / math.sqrt(2 * count))
    assert abs(real.mean()) < 5 * z * clip / math.sqrt(count)
    # Of independent coordinates: neighbours do not go together.
    assert abs(np.corrcoef(real[:-1], real[1:])[0, 1]) < 5 / math.sqrt(count)
    assert not sent[1, 25:].any()


def test_every_call_and_every_example_has_noise_of_its_own() -> None:
    hidden = torch.zeros(2, 3, 8)
    first, second = (noised(hidden, None, 1.0, 1.0, SecureNoise()) for _ in range(2))
    assert not (first == second).any()
    assert not (first[0] == first[1]).any()


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_record_that_is_not_finite_becomes_noise_alone(odd: float) -> None:
    hidden = normal(2, 4, 8) * 10
    hidden[0, 1, 2] = odd
    source = InsecureSeededNoise(3)
    sent = noised(hidden, None, 1.0, 0.5, source)
    zero = noised(torch.zeros(1, 4, 8), None, 1.0, 0.5, InsecureSeededNoise(3))
    assert torch.equal(sent[0], zero[0])
    assert bool(torch.isfinite(sent).all())


def test_values_lie_on_a_grid_that_does_not_depend_on_the_text() -> None:
    from fedtune.privacy.lattice import grid_of

    # One token of one number: what float32 shows is the grid itself.
    values = [torch.full((1, 1, 1), x) for x in (0.1, 0.7321)]
    for value in values:
        sent = float(noised(value, None, 1.0, 0.25, SecureNoise()))
        steps = sent / grid_of(1.0, 1)
        assert steps == round(steps)


def test_input_keeps_its_graph_to_itself() -> None:
    hidden = normal(1, 2, 4).requires_grad_()
    sent = noised(hidden, None, 1.0, 1.0, SecureNoise())
    assert not sent.requires_grad
    assert sent.dtype == torch.float32


@pytest.mark.parametrize(
    ("clip", "z", "spans"),
    [(0.0, 1.0, None), (math.inf, 1.0, None), (1.0, 0.0, None), (1.0, math.nan, None),
     (1.0, -1.0, None), (1.0, 1.0, [(0, 9)]), (1.0, 1.0, [(2, 1)]), (1.0, 1.0, [(0, 1)] * 2)],
)  # fmt: skip
def test_what_promises_nothing_is_refused(
    clip: float, z: float, spans: list[tuple[int, int]] | None
) -> None:
    with pytest.raises(FedtuneError):
        noised(normal(1, 3, 4), spans, clip, z, SecureNoise())


def exact(z: float, delta: float) -> float:
    """Balle and Wang 2018, equation 6, for mu = 2 / z."""
    mu = 2 / z

    def gap(epsilon: float) -> float:
        first = norm.cdf(mu / 2 - epsilon / mu)
        return float(first - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu) - delta)

    return float(brentq(gap, 0.0, 500.0))


@pytest.mark.parametrize("z", [1.38, 5.0, 0.5, 20.0])
def test_epsilon_of_one_record_is_that_of_a_gaussian_of_twice_the_clip(z: float) -> None:
    found = record_epsilon(z, 1e-5)
    assert found == pytest.approx(exact(z, 1e-5), rel=1e-3)
    assert found >= exact(z, 1e-5) * (1 - 1e-6)
    rho = 2 / z**2
    assert found <= rho + 2 * math.sqrt(rho * math.log(1e5))
