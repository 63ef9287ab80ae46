from __future__ import annotations

import numpy as np
import pytest
import torch

from fedtune.adapters import Tensors
from fedtune.config import ServerOptimizerConfig
from fedtune.server.optimizer import Moments, step

SHAPES = {"a": (3, 2), "b": (4,)}


def updates(count: int) -> list[Tensors]:
    rng = np.random.default_rng(0)
    return [
        {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
        for _ in range(count)
    ]


def run(settings: ServerOptimizerConfig, means: list[Tensors]) -> tuple[Tensors, Moments]:
    adapter, moments = {n: np.ones(s, np.float32) for n, s in SHAPES.items()}, Moments()
    for mean in means:
        before = {n: v.copy() for n, v in adapter.items()}
        moved, moments = step(settings, adapter, mean, moments)
        assert all(np.array_equal(adapter[n], before[n]) for n in adapter), "changed in place"
        assert all(v.dtype == np.float32 for v in moved.values())
        adapter = moved
    return adapter, moments


@pytest.mark.parametrize("lr", [1.0, 0.3])
def test_none_adds_the_mean(lr: float) -> None:
    means = updates(3)
    found, moments = run(ServerOptimizerConfig(lr=lr), means)
    assert moments == Moments()
    for name in SHAPES:
        np.testing.assert_allclose(found[name], 1 + lr * sum(m[name] for m in means), rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_momentum_is_that_of_torch(beta: float) -> None:
    """FedAvgM is SGD with momentum on the negative mean update."""
    means = updates(6)
    settings = ServerOptimizerConfig(name="momentum", lr=0.5, beta1=beta)
    found, moments = run(settings, means)
    assert moments.second == {}
    for name, shape in SHAPES.items():
        parameter = torch.nn.Parameter(torch.ones(shape))
        optim = torch.optim.SGD([parameter], lr=0.5, momentum=beta)
        for mean in means:
            parameter.grad = -torch.tensor(mean[name])
            optim.step()
        np.testing.assert_allclose(found[name], parameter.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_adam_is_that_of_the_paper() -> None:
    """Reddi et al. 2021, Algorithm 2: no bias correction, moments start at zero."""
    means = updates(6)
    settings = ServerOptimizerConfig(name="adam", lr=0.1, beta1=0.8, beta2=0.95, tau=0.01)
    found, moments = run(settings, means)
    for name, shape in SHAPES.items():
        x, m, v = np.ones(shape), np.zeros(shape), np.zeros(shape)
        for mean in means:
            m = 0.8 * m + 0.2 * mean[name]
            v = 0.95 * v + 0.05 * mean[name].astype(np.float64) ** 2
            x = x + 0.1 * m / (np.sqrt(v) + 0.01)
        np.testing.assert_allclose(found[name], x, rtol=1e-5)
        np.testing.assert_allclose(moments.first[name], m, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(moments.second[name], v, rtol=1e-4)


def test_the_first_adam_step_shows_that_nothing_is_corrected() -> None:
    mean = {"w": np.float32([0.5, -0.5])}
    settings = ServerOptimizerConfig(name="adam", lr=1.0, beta1=0.9, beta2=0.99, tau=1e-8)
    found, _ = step(settings, {"w": np.zeros(2, np.float32)}, mean, Moments())
    # (1 - beta1) / sqrt(1 - beta2) = 1; torch's corrected Adam would also give 1, so both betas:
    np.testing.assert_allclose(found["w"], [1.0, -1.0], rtol=1e-5)
    other = ServerOptimizerConfig(name="adam", lr=1.0, beta1=0.9, beta2=0.9, tau=1e-8)
    found, _ = step(other, {"w": np.zeros(2, np.float32)}, mean, Moments())
    np.testing.assert_allclose(found["w"], [0.1 / np.sqrt(0.1), -0.1 / np.sqrt(0.1)], rtol=1e-5)
