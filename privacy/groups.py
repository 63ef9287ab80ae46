"""Privacy of a person who owns several of the protected records.

Multiplying epsilon by the number of records is wrong, and too small: delta grows
too. Two valid answers: from the profile delta(epsilon) of one record, whatever the
mechanism; or exactly, for records that are sampled by independent coins (Charles et
al. 2024, arXiv:2407.07737), where the sum of k contributions is a mixture of
Gaussians. The same holds for one person who is in k clients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from fedtune.privacy import bounds, distributions, policy
from fedtune.privacy.events import (
    Charge,
    Event,
    Gaussian,
    PoissonGaussian,
    Relation,
    Unbounded,
    grouped,
    least_noise,
    releases_in,
)

__all__ = ["group_epsilon"]

STEPS = 4000
SLOPES = 48
MAX_LOSS = 200.0  # beyond, the delta of this one: the library's exponentials overflow
MAX_BINS = 250_000  # half a minute at the most


def group_epsilon(
    charges: Mapping[Event, int] | list[Charge] | tuple[Charge, ...],
    delta: float,
    relation: Relation,
    k: int,
    exact: bool = False,
) -> float:
    """Return epsilon of all ``k`` records of one person together.

    Parameters
    ----------
    charges : mapping from event to count, or sequence of Charge
        What each single record went through.
    delta : float
    relation : Relation
    k : int
        Number of records, each sampled independently of the others.
    exact : bool
        Use the mixture of Gaussians: seconds instead of a fraction of one. Without
        sampling the answer is exact either way.

    Returns
    -------
    float
        Infinite when nothing can be said.

    Raises
    ------
    FedtuneError
        With ``exact``, for events that have no such mixture or too large a one.

    Examples
    --------
    >>> steps = {PoissonGaussian(0.01, 1.0): 1000}
    >>> relation = Relation.ADD_OR_REMOVE_ONE
    >>> round(group_epsilon(steps, 1e-5, relation, 2, exact=True), 3)
    3.979
    >>> round(group_epsilon(steps, 1e-5, relation, 2), 2)
    4.08
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise bounds.refuse(f"k={k!r} records of one person", "use at least 1")
    groups = grouped(charges)
    simple = policy.simplified(groups, relation)
    if k == 1 or not simple or any(isinstance(event, Unbounded) for event in simple):
        return policy.price(groups, delta, relation)
    if all(isinstance(event, Gaussian) for event in simple):  # sensitivities add
        return policy.price({_together(event, k): 1 for event in simple}, delta, relation)
    releases = sum(count * releases_in(event) for event, count in groups.items())
    if exact:
        return _exact(simple, releases, delta, relation, k)
    return _generic(policy.bound(groups, delta, relation), simple, releases, delta, relation, k)


def _together(event: Event, k: int) -> Gaussian:
    if not isinstance(event, Gaussian):
        raise bounds.refuse(f"{event} is sampled")
    return Gaussian(event.noise_multiplier / k)


# ---------------------------------------------------------------- any mechanism


def _generic(
    found: policy.Bound,
    simple: Mapping[Event, int],
    releases: int,
    delta: float,
    relation: Relation,
    k: int,
) -> float:
    """Walk from all records to none, one at a time, and add what each step costs.

    P_0(S) <= e^e_1 P_1(S) + delta(e_1) <= e^(e_1 + e_2) P_2(S) + e^e_1 delta(e_2) +
    delta(e_1), and so on: epsilon is the sum of the e_i, and later steps, whose delta
    counts more, are given more. The e_i rise linearly, with the best of some slopes.
    """
    vector = policy.renyi(simple, relation)
    best, reach = math.inf, max(1.0, 2 * found.epsilon)
    while reach < 1e5:
        epsilon, largest = _best_split(_profile(found, releases, vector, reach), reach, delta, k)
        best = min(best, epsilon)
        if math.isfinite(epsilon):
            return min(best, _refined(found, releases, vector, largest, delta, k))
        reach *= 2
    return best


def _refined(
    found: policy.Bound,
    releases: int,
    vector: NDArray[np.float64],
    largest: float,
    delta: float,
    k: int,
) -> float:
    reach = 1.2 * largest
    return _best_split(_profile(found, releases, vector, reach), reach, delta, k)[0]


def _profile(
    found: policy.Bound, releases: int, vector: NDArray[np.float64], reach: float
) -> NDArray[np.float64]:
    """Return log delta of one record at ``STEPS`` epsilons from 0 to ``reach``."""
    epsilon = np.linspace(0.0, reach, STEPS)
    log_delta: NDArray[np.float64] = bounds.rdp_log_delta(vector, epsilon)
    if found.distribution is not None:
        deltas = found.distribution.get_delta_for_epsilon(np.minimum(epsilon, MAX_LOSS))
        deltas = np.maximum(deltas, 0.0) + distributions.PLD_ROUNDING * (releases + 1)
        log_delta = np.minimum(log_delta, np.log(deltas))
    return np.minimum(log_delta, 0.0)


def _best_split(
    log_delta: NDArray[np.float64], reach: float, delta: float, k: int
) -> tuple[float, float]:
    """Return the smallest sum of k epsilons that keeps delta, and the largest of them."""
    step = reach / (STEPS - 1)
    best, largest = math.inf, math.inf
    for slope in sorted({0, *np.geomspace(1, STEPS / k, SLOPES).astype(int).tolist()}):
        room = STEPS - slope * (k - 1)
        if room < 1:
            break
        starts = np.arange(room)
        total = np.full(room, -np.inf)
        before = np.zeros(room)
        for index in range(k):
            here = starts + slope * index
            total = np.logaddexp(total, before + log_delta[here])
            before = before + step * here
        fits = np.flatnonzero(total <= math.log(delta))
        if len(fits) and before[fits[0]] < best:
            best = float(before[fits[0]])
            largest = step * float(fits[0] + slope * (k - 1))
    return best, largest


# ---------------------------------------------------------------- independent coins


def _exact(
    simple: Mapping[Event, int], releases: int, delta: float, relation: Relation, k: int
) -> float:
    grid = _mixture_grid(simple, k)
    epsilon = distributions.epsilon_of_pld(_mixture_pld(simple, k, grid, relation), releases, delta)
    if epsilon < 1 and grid == policy.MIDDLE:
        finer = _mixture_pld(simple, k, policy.FINE, relation)
        epsilon = min(epsilon, distributions.epsilon_of_pld(finer, releases, delta))
    return epsilon


def _mixture_grid(simple: Mapping[Event, int], k: int) -> float:
    for event in simple:
        if not isinstance(event, Gaussian | PoissonGaussian):
            raise bounds.refuse(f"{event} has no exact group epsilon", "use exact=False")
    z = min((least_noise(event) or math.inf) / k for event in simple)
    reach = 20 / z + 1 / (z * z)
    for grid in (policy.MIDDLE, policy.COARSE):
        if reach / grid <= MAX_BINS:
            return grid
    raise bounds.refuse(f"k={k} records are too many for an exact answer", "use exact=False")


def _mixture_pld(simple: Mapping[Event, int], k: int, grid: float, relation: Relation) -> Any:
    plds = []
    for event, count in simple.items():
        if isinstance(event, PoissonGaussian):
            weights = [float(binom.pmf(j, k, event.sampling_probability)) for j in range(k + 1)]
            plds.append(
                distributions.mixture_pld(event.noise_multiplier, tuple(weights), count, grid)
            )
        else:
            plds.append(distributions.composed_pld({_together(event, k): count}, grid, relation))
    result = plds[0]
    for pld in plds[1:]:
        result = result.compose(pld)
    return result
