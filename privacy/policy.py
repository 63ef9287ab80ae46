"""Which accountants are asked, and the smallest of their answers.

Renyi always (milliseconds), and nothing else for what a filter admitted. Releases
without sampling have a closed form. Otherwise a privacy loss distribution is computed
unless Renyi epsilon is above 50 (there the two are within some percent, and the
distribution takes minutes): grid 1e-3 from 20 on, 1e-4 below, 1e-5 when the answer is
below 0.05. Any grid gives an upper bound; a coarse one only costs tightness.

The same rule bounds time and memory, so that no child process with limits is
needed. Measured over noise multipliers from 0.05 to 100, sampling rates from 1e-8 to
0.5 and up to a million releases: at most 2.5 s of one processor for one kind of event
and 12 s for 32 or 150 kinds, and 500 MB.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.privacy import bounds, distributions
from fedtune.privacy.bounds import ORDERS, epsilon_of_rdp, rdp
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
    least_noise,
    releases_in,
)

__all__ = [
    "COARSE",
    "FINE",
    "FINEST",
    "MIDDLE",
    "Bound",
    "bound",
    "price",
    "quick",
    "renyi",
    "simplified",
]

MIN_DELTA = 1e-12  # a composed distribution keeps about 1e-15 in its tail
MAX_EPSILON = 50.0
MAX_GUESS = 2000.0
COARSE, MIDDLE, FINE, FINEST = 1e-2, 1e-3, 1e-4, 1e-5
MAX_BINS = 1_000_000
MAX_EVENTS, MAX_FINE_EVENTS = 150, 32  # distinct ones; each costs a table
MAX_RELEASES = 1_000_000


@dataclass(frozen=True)
class Bound:
    """Answers of the accountants for one composition; the smallest is ``epsilon``."""

    epsilon: float
    accountant: str
    rdp: float
    order: float
    pld: float | None = None
    mu: float | None = None
    distribution: Any = None
    grid: float | None = None


def simplified(groups: Mapping[Event, int], relation: Relation) -> dict[Event, int]:
    """Return fewer events that cost the same.

    Sampling everybody is no sampling, Gaussian releases without sampling are one
    Gaussian release, and levels cost what their releases cost in any order.

    Examples
    --------
    >>> simplified({Gaussian(2.0): 4, PoissonGaussian(1.0, 1.0): 3}, Relation.ADD_OR_REMOVE_ONE)
    {Gaussian(noise_multiplier=0.5): 1}
    """
    simple: dict[Event, int] = {}
    precision = 0.0
    for event, count in groups.items():
        bounds.check_relation(event, relation)
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise bounds.refuse(f"{event} cannot happen {count!r} times")
    for event, count in _without_levels(groups):
        if count == 0:
            continue
        match event:
            case Gaussian(z) | PoissonGaussian(1, z):
                if z * z == 0.0:
                    raise bounds.refuse(f"{event}: the noise is too small for a number")
                precision += count / (z * z)
            case PoissonLaplace(1, z):
                simple[Laplace(z)] = simple.get(Laplace(z), 0) + count
            case _:
                simple[event] = simple.get(event, 0) + count
    if precision > 0:
        simple[Gaussian(1 / math.sqrt(precision))] = 1
    return dict(sorted(simple.items(), key=repr))  # one order, so one rounding


def _without_levels(groups: Mapping[Event, int]) -> Iterator[tuple[Event, int]]:
    for event, count in groups.items():
        if isinstance(event, Levels):
            q = event.sampling_probability
            for z, times in zip(event.noise_multipliers, event.counts, strict=True):
                yield PoissonGaussian(q, z), times * count
        else:
            yield event, count


def bound(
    groups: Mapping[Event, int], delta: float, relation: Relation, finest: float = FINEST
) -> Bound:
    """Return the bounds on what the releases cost together.

    Parameters
    ----------
    groups : Mapping[Event, int]
    delta : float
    relation : Relation
    finest : float
        No grid below this one; `quick` is the answer without any.

    Returns
    -------
    Bound

    Examples
    --------
    >>> groups = {PoissonGaussian(0.1, 1.0): 100}
    >>> round(bound(groups, 1e-5, Relation.ADD_OR_REMOVE_ONE).epsilon, 4)
    7.0466
    """
    bounds.check_delta(delta)
    simple = simplified(groups, relation)
    if not simple:
        return Bound(0.0, "none", 0.0, 0.0, mu=0.0)
    if any(isinstance(event, Unbounded) for event in simple):
        return Bound(math.inf, "none", math.inf, 0.0)
    if all(isinstance(event, Gaussian) for event in simple):
        (event,) = simple
        mu = 1 / event.noise_multiplier  # type: ignore[union-attr]
        epsilon, order = epsilon_of_rdp(rdp(event, relation), delta)
        exact = bounds.gaussian_epsilon(mu, delta)
        return Bound(exact, "analytic", epsilon, order, mu=mu)
    releases = sum(count * releases_in(event) for event, count in groups.items())
    return _sampled(simple, releases, delta, relation, finest)


def price(
    groups: Mapping[Event, int], delta: float, relation: Relation, finest: float = FINEST
) -> float:
    """Return only the smallest bound, from a cache: see `bound`."""
    return _price(frozenset(groups.items()), delta, relation, finest)


def quick(groups: Mapping[Event, int], delta: float, relation: Relation) -> float:
    """Return a bound within milliseconds: see `bound`, which is never above it."""
    return _price(frozenset(groups.items()), delta, relation, COARSE)


@lru_cache(maxsize=4096)
def _price(
    groups: frozenset[tuple[Event, int]], delta: float, relation: Relation, finest: float
) -> float:
    return bound(dict(groups), delta, relation, finest).epsilon


def _sampled(
    simple: Mapping[Event, int], releases: int, delta: float, relation: Relation, finest: float
) -> Bound:
    epsilon_rdp, order = epsilon_of_rdp(renyi(simple, relation), delta)
    best, distribution, grid, used = math.inf, None, None, None
    # A filter's budget is a Renyi divergence and nothing else.
    filtered = any(isinstance(event, RenyiFiltered) for event in simple)
    if not filtered and delta >= MIN_DELTA and distributions.left_of_delta(delta, releases) > 0:
        grid = _grid(simple, releases, epsilon_rdp, finest)
        if math.isinf(epsilon_rdp):
            grid = _first_look(simple, delta, relation)
    while grid is not None:
        pld = distributions.composed_pld(simple, grid, relation)
        epsilon = distributions.epsilon_of_pld(pld, releases, delta)
        if epsilon < best:
            best, distribution, used = epsilon, pld, grid
        finer = _grid(simple, releases, min(best, epsilon_rdp), finest)
        grid = finer if finer is not None and finer < grid else None
    epsilon = min(best, epsilon_rdp)
    if math.isinf(epsilon):
        return Bound(math.inf, "none", math.inf, 0.0)
    return Bound(
        epsilon,
        "pld" if best <= epsilon_rdp else "rdp",
        epsilon_rdp,
        order,
        best if math.isfinite(best) else None,
        distribution=distribution,
        grid=used,
    )


def _grid(simple: Mapping[Event, int], releases: int, about: float, finest: float) -> float | None:
    """Return the finest grid that is worth its time, for an epsilon of ``about``."""
    if about > MAX_EPSILON or len(simple) > MAX_EVENTS or releases > MAX_RELEASES:
        return None
    grids = [MIDDLE, COARSE]
    if about <= 20 and len(simple) <= MAX_FINE_EVENTS:
        grids = [FINEST, FINE, *grids] if about < 0.05 else [FINE, *grids]
    # Losses up to about (10 / z + 1 / 2 z^2) must be in the table of one event.
    z = min(
        (least_noise(event) or math.inf) / (2 if isinstance(event, TruncatedPoissonGaussian) else 1)
        for event in simple
    )
    reach = 20 / z + 1 / (z * z)
    return next((grid for grid in grids if grid >= finest and reach / grid <= MAX_BINS), None)


def _first_look(simple: Mapping[Event, int], delta: float, relation: Relation) -> float | None:
    """Return a coarse grid where Renyi has no bound, unless even that is too much."""
    half: dict[Event, int] = {}
    for event, count in simple.items():
        match event:
            case TruncatedPoissonGaussian(q, z, _, _):
                event = PoissonGaussian(q, z / 2)
            case PoissonLaplace(q, z):
                event = PoissonGaussian(q, z)
        half[event] = half.get(event, 0) + count
    guess, _ = epsilon_of_rdp(renyi(half, relation), delta)
    return COARSE if guess <= MAX_GUESS and len(simple) <= MAX_EVENTS else None


def renyi(simple: Mapping[Event, int], relation: Relation) -> NDArray[np.float64]:
    """Return the sum of the Renyi divergences, shape (len(ORDERS),)."""
    total = np.zeros(len(ORDERS))
    for event, count in simple.items():
        total = total + count * rdp(event, relation)
    return total
