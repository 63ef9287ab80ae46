"""Privacy loss distributions: the tight accountant, up to seconds for an answer.

Connect the dots (Doroshenko et al. 2022, arXiv:2207.04380), as ``dp_accounting`` has
it; every grid gives an upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from fedtune.privacy.bounds import gaussian_log_delta, library_modules, neighbours, refuse
from fedtune.privacy.events import (
    Event,
    Gaussian,
    Laplace,
    Levels,
    PoissonGaussian,
    PoissonLaplace,
    Relation,
    RenyiFiltered,
    TruncatedPoissonGaussian,
    Unbounded,
)

__all__ = [
    "PLD_ROUNDING",
    "composed_pld",
    "epsilon_of_pld",
    "fitted_mu",
    "left_of_delta",
    "mixture_pld",
    "round_up",
]

PLD_ROUNDING = 1e-15
"""Delta per release that the Fourier transform may lose; measured: 2e-17."""


@lru_cache(maxsize=64)
def _single_pld(event: Event, grid: float, relation: Relation) -> Any:
    _, module, _ = library_modules()
    match event:
        case Gaussian(z):
            return module.from_gaussian_mechanism(
                z,
                value_discretization_interval=grid,
                neighboring_relation=neighbours(relation),
            )
        case PoissonGaussian(q, z):
            return module.from_gaussian_mechanism(
                z,
                value_discretization_interval=grid,
                sampling_prob=q,
                neighboring_relation=neighbours(relation),
            )
        case TruncatedPoissonGaussian(q, z, population, cap):
            return module.from_truncated_subsampled_gaussian_mechanism(
                dataset_size=population,
                sampling_probability=q,
                truncated_batch_size=cap,
                noise_multiplier=z,
                value_discretization_interval=grid,
                neighboring_relation=neighbours(relation),
            )
        case Laplace(z):
            return module.from_laplace_mechanism(z, value_discretization_interval=grid)
        case PoissonLaplace(q, z):
            # One pair of distributions serves both of our relations, as for the Gaussian.
            return module.from_laplace_mechanism(
                z, value_discretization_interval=grid, sampling_prob=q
            )
        case Levels(q, noises, counts):
            parts: dict[Event, int] = {
                PoissonGaussian(q, z): n for z, n in zip(noises, counts, strict=True)
            }
            return composed_pld(parts, grid, relation)
        case RenyiFiltered():
            # The loss of a filter depends on what was chosen: its budget is no distribution,
            # and to compose those of the chosen ones is invalid (arXiv:2602.06756).
            raise refuse(f"no privacy loss distribution: {event}")
        case Unbounded():
            raise refuse(f"no privacy loss distribution: {event.reason}")


@lru_cache(maxsize=16)
def _repeated_pld(event: Event, count: int, grid: float, relation: Relation) -> Any:
    single = _single_pld(event, grid, relation)
    return single if count == 1 else single.self_compose(count)


def composed_pld(groups: Mapping[Event, int], grid: float, relation: Relation) -> Any:
    """Return the privacy loss distribution of all releases together.

    Parameters
    ----------
    groups : Mapping[Event, int]
        How often each event happened; not empty.
    grid : float
        Step of the discretisation. Any step gives an upper bound.
    relation : Relation

    Returns
    -------
    dp_accounting.pld.privacy_loss_distribution.PrivacyLossDistribution

    Examples
    --------
    >>> groups = {PoissonGaussian(0.01, 1.0): 1000}
    >>> pld = composed_pld(groups, 1e-3, Relation.ADD_OR_REMOVE_ONE)
    >>> round(epsilon_of_pld(pld, 1000, 1e-5), 3)
    1.829
    """
    result = None
    for event, count in groups.items():
        part = _repeated_pld(event, count, grid, relation)
        result = part if result is None else result.compose(part)
    return result


@lru_cache(maxsize=8)
def mixture_pld(z: float, weights: tuple[float, ...], count: int, grid: float) -> Any:
    """Return the distribution of ``count`` sums in which j records are with ``weights[j]``.

    Parameters
    ----------
    z : float
        Noise multiplier for one record; j of them add up to a sensitivity of j.
    weights : tuple[float, ...]
        Probabilities of 0, 1, 2, ... records.
    count : int
    grid : float

    Returns
    -------
    dp_accounting.pld.privacy_loss_distribution.PrivacyLossDistribution

    Examples
    --------
    >>> alone = mixture_pld(1.0, (0.99, 0.01), 1000, 1e-2)
    >>> round(epsilon_of_pld(alone, 1000, 1e-5), 1)
    1.9
    """
    _, module, _ = library_modules()
    single = module.from_mixture_gaussian_mechanism(
        z, list(range(len(weights))), list(weights), value_discretization_interval=grid
    )
    return single if count == 1 else single.self_compose(count)


def left_of_delta(delta: float, releases: int) -> float:
    """Return delta without what rounding may take, or 0 when that is over half."""
    left = delta - PLD_ROUNDING * releases
    return left if left >= delta / 2 else 0.0


def epsilon_of_pld(pld: Any, releases: int, delta: float) -> float:
    """Return epsilon at ``delta``, or ``inf`` where this accountant cannot know.

    A part of delta is kept for the rounding of the Fourier transform, which grows
    with the number of releases; without it, a million releases of the Gaussian
    mechanism come out below the exact value.

    Raises
    ------
    FedtuneError
        When the distribution has lost mass, or the answer is NaN or negative.
    """
    left = left_of_delta(delta, releases)
    if left == 0:
        return math.inf
    mass = float(pld.get_delta_for_epsilon(-math.inf))
    if not mass > 1 - 1e-9:
        raise refuse(f"the privacy loss distribution has mass {mass}")
    epsilon = float(pld.get_epsilon_for_delta(left))
    if not epsilon >= 0:
        raise refuse(f"the privacy loss distribution answered epsilon={epsilon}")
    return epsilon


def fitted_mu(pld: Any, releases: int, delta: float, points: int = 40) -> float | None:
    """Return the smallest mu whose Gaussian profile covers that of the releases.

    After Gomez et al. 2025 (arXiv:2503.10945): one number of Gaussian differential
    privacy, conservative at every ``points`` epsilons between zero and epsilon of
    ``delta``. Beyond, towards smaller deltas, it promises nothing.

    Parameters
    ----------
    pld : PrivacyLossDistribution
    releases : int
    delta : float
    points : int

    Returns
    -------
    float or None
        Rounded up to four digits; None when the distribution cannot say.
    """
    last = epsilon_of_pld(pld, releases, delta)
    if not math.isfinite(last):
        return None
    epsilon = np.linspace(0.0, last, points) if last > 0 else np.zeros(1)
    deltas = [float(pld.get_delta_for_epsilon(float(point))) for point in epsilon]
    profile = np.array(deltas) + PLD_ROUNDING * releases
    if not np.all(profile < 1):
        return None
    goal = np.log(profile)
    low, high = 0.0, 1.0
    while not np.all(gaussian_log_delta(high, epsilon) >= goal):
        low, high = high, 2 * high
        if high > 1e6:
            return None
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        covered = np.all(gaussian_log_delta(middle, epsilon) >= goal)
        low, high = (low, middle) if covered else (middle, high)
    return round_up(high)


def round_up(value: float, digits: int = 4) -> float:
    """Return the smallest number of so many digits that is not below ``value``.

    Examples
    --------
    >>> round_up(0.97101), round_up(12.345), round_up(0.5)
    (0.9711, 12.35, 0.5)
    """
    if value <= 0 or not math.isfinite(value):
        return value
    places = digits - 1 - math.floor(math.log10(value))
    rounded = float(f"{value:.{digits - 1}e}")
    if rounded < value:
        rounded = round(rounded + 10.0**-places, max(places, 0))
    return rounded
