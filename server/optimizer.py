"""What the server does with the mean update: nothing, momentum, or Adam."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fedtune.adapters import Tensors
from fedtune.config import ServerOptimizerConfig

__all__ = ["Moments", "step"]


@dataclass(frozen=True)
class Moments:
    """State of the server optimiser; empty before the first step."""

    first: Tensors = field(default_factory=dict)
    second: Tensors = field(default_factory=dict)


def step(
    settings: ServerOptimizerConfig, adapter: Tensors, mean: Tensors, moments: Moments
) -> tuple[Tensors, Moments]:
    """Apply one mean update (Reddi et al. 2021, Algorithm 2; FedAvgM, FedAdam).

    Parameters
    ----------
    adapter, mean : Tensors
        Current parameters and the cohort's mean difference, same names and shapes.

    Examples
    --------
    >>> start, mean = {"w": np.zeros(1, np.float32)}, {"w": np.ones(1, np.float32)}
    >>> settings = ServerOptimizerConfig(name="momentum", beta1=0.5)
    >>> once, moments = step(settings, start, mean, Moments())
    >>> twice, _ = step(settings, once, mean, moments)
    >>> float(once["w"][0]), float(twice["w"][0])
    (1.0, 2.5)
    """
    lr = np.float32(settings.lr)
    if settings.name == "none":
        return {name: adapter[name] + lr * mean[name] for name in adapter}, moments
    beta1, beta2 = np.float32(settings.beta1), np.float32(settings.beta2)
    zeros = {name: np.zeros_like(value) for name, value in mean.items()}
    first, second = moments.first or zeros, moments.second or zeros
    if settings.name == "momentum":
        first = {name: beta1 * first[name] + mean[name] for name in mean}
        moved = {name: adapter[name] + lr * first[name] for name in adapter}
        return moved, Moments(first, moments.second)
    first = {n: beta1 * first[n] + (1 - beta1) * mean[n] for n in mean}
    second = {n: beta2 * second[n] + (1 - beta2) * mean[n] ** 2 for n in mean}
    tau = np.float32(settings.tau)
    moved = {n: adapter[n] + lr * first[n] / (np.sqrt(second[n]) + tau) for n in adapter}
    return moved, Moments(first, second)
