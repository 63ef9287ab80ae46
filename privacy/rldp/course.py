"""What a round is charged as when its noise moves over time, before it begins.

Why each charge bounds what follows it stands in ``levels.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.bounds import (
    RDP_ROUNDING,
    epsilon_of_rdp,
    library_modules,
    neighbours,
    rdp,
)
from fedtune.privacy.events import (
    Event,
    Levels,
    PoissonGaussian,
    Relation,
    RenyiFiltered,
    Unit,
    to_dp_event,
    with_laplace,
)
from fedtune.privacy.filters import best_order
from fedtune.privacy.sampling import Sampler, TruncatedPoisson

__all__ = [
    "Course",
    "Moving",
    "cost_in_filter",
    "filter_order",
    "levels_of",
    "six_digits",
]


@dataclass(frozen=True)
class Moving:
    """What one round is, with a planned noise multiplier.

    Attributes
    ----------
    event, count
        What it is charged as, before it begins.
    low, high : float
        No release has less noise, or more.
    order : float
        Of the Renyi filter; 0: there is none, or the sum of 1 / z^2 is the filter.
    """

    event: Event
    count: int
    low: float
    high: float
    order: float = 0.0


@dataclass(frozen=True)
class Course:
    """How the noise of a run may move, but for its size.

    Attributes
    ----------
    noise : {"constant", "order", "filtered"}
    spread : float
        How far the noise moves, as a share of it.
    unit, sampler, relation
        Of the mechanism.
    laplace : bool
    releases, rounds : int
        Releases in a round, rounds.
    epsilon, delta : float
        Target of the whole run; epsilon 0: there is none.
    order : float
        Of the Renyi filter, where it was fixed; 0: the best one.

    Examples
    --------
    >>> from fedtune.privacy.sampling import Poisson
    >>> course = Course("order", 0.1, Unit.EXAMPLE, Poisson(0.01), Relation.ADD_OR_REMOVE_ONE,
    ...                 False, releases=9, rounds=5, epsilon=0.0, delta=1e-5)
    >>> course.at(2.0).event
    Levels(sampling_probability=0.01, noise_multipliers=(1.8, 2.0, 2.2), counts=(3, 3, 3))
    """

    noise: Literal["constant", "order", "filtered"]
    spread: float
    unit: Unit
    sampler: Sampler
    relation: Relation
    laplace: bool
    releases: int
    rounds: int
    epsilon: float
    delta: float
    order: float = 0.0

    def at(self, noise_multiplier: float) -> Moving:
        """Return what a round is with noise of this size.

        Raises
        ------
        FedtuneError
            Its noise cannot move in this way.
        """
        return _moving(self, noise_multiplier)


@lru_cache(maxsize=256)
def _moving(course: Course, z: float) -> Moving:
    event = course.sampler.event(z)
    if course.noise == "constant":
        return Moving(with_laplace(event) if course.laplace else event, course.releases, z, z)
    if course.laplace or isinstance(course.sampler, TruncatedPoisson):
        raise _refused(
            f"noise='{course.noise}' with {type(course.sampler).__name__}"
            + (" and Laplace noise" if course.laplace else ""),
            "use Gaussian noise with sampler 'poisson' or 'everyone'",
        )
    q, spread = course.sampler.rate, course.spread
    if course.noise == "order":
        if course.unit is Unit.CLIENT:
            raise _refused(
                "noise='order' at client level: a round is one release, nothing to order",
                "use noise='constant' or 'filtered'",
            )
        levels = levels_of(q, z, course.releases, spread)
        return Moving(levels, 1, levels.noise_multipliers[0], levels.noise_multipliers[-1])
    low, high = six_digits(z * (1.0 - spread)), six_digits(z * (1.0 + spread))
    if not 0.0 < low < z < high:
        raise _refused(f"spread={spread!r} of noise {z:g}", "use a spread above 0 and below 0.5")
    if q == 1.0:
        return Moving(event, course.releases, low, high)
    times = course.releases * course.rounds
    ends = (low, z, high)
    order = course.order or filter_order(
        q, ends, times, course.delta, course.relation, course.epsilon
    )
    one = cost_in_filter(q, z, order, course.relation)
    whole = one if course.releases == 1 else math.nextafter(course.releases * one, math.inf)
    return Moving(RenyiFiltered(order, whole), 1, low, high, order)


def levels_of(q: float, noise_multiplier: float, releases: int, spread: float) -> Levels:
    """Return one round in three levels: a third of the releases each, the rest in the middle.

    Parameters
    ----------
    q : float
        Sampling probability.
    noise_multiplier : float
        z of the middle.
    releases : int
        In the round, at least 3.
    spread : float
        s: the levels are z (1 - s), z and z (1 + s), to six digits.

    Raises
    ------
    FedtuneError
        There is nothing to order.

    Examples
    --------
    >>> levels_of(0.01, 1.0, 40, 0.1)
    Levels(sampling_probability=0.01, noise_multipliers=(0.9, 1.0, 1.1), counts=(13, 14, 13))
    """
    third = releases // 3
    if third < 1:
        raise _refused(
            f"{releases} releases in a round: nothing to order",
            "noise='order' needs 3 steps or more in a round; use noise='constant'",
        )
    levels = tuple(six_digits(noise_multiplier * (1.0 + side * spread)) for side in (-1, 0, 1))
    if not 0.0 < levels[0] < levels[1] < levels[2]:
        raise _refused(f"spread={spread!r}: levels {levels}", "use a spread above 0 and below 0.5")
    return Levels(q, levels, (third, releases - 2 * third, third))


def filter_order(
    q: float,
    noises: Sequence[float],
    releases: int,
    delta: float,
    relation: Relation,
    epsilon: float = 0.0,
) -> float:
    """Return the order of a filter: the best one for the smallest noise that it allows.

    At a higher order a little less noise costs many times as much.

    Parameters
    ----------
    q : float
        Sampling probability.
    noises : sequence of float
        Noise multipliers, the smallest first; all have a bound at this order.
    releases : int
        Of the whole run.
    delta : float
    relation : Relation
    epsilon : float
        Of the whole run; 0: what so many releases with the least noise cost.

    Raises
    ------
    FedtuneError
        Nothing fits.

    Examples
    --------
    >>> filter_order(512 / 50_000, [1.033], 1000, 1e-5, Relation.ADD_OR_REMOVE_ONE, 2.0)
    8.3
    """
    first, *others = (PoissonGaussian(q, z) for z in noises)
    if epsilon:
        return best_order(epsilon, delta, relation, first, others)
    vector = releases * rdp(first, relation)
    for other in others:
        vector = np.where(np.isfinite(rdp(other, relation)), vector, np.inf)
    found, order = epsilon_of_rdp(vector, delta)
    if not (math.isfinite(found) and order > 1.01):
        raise _refused(f"{releases} x {first} has no Renyi bound", "use more noise")
    return order


@lru_cache(maxsize=4096)
def cost_in_filter(q: float, noise_multiplier: float, order: float, relation: Relation) -> float:
    """Return what one sampled release takes of a Renyi filter: `rdp` at one order, sooner.

    Infinite where the accountant has no bound.

    Examples
    --------
    >>> round(cost_in_filter(512 / 50_000, 1.033, 8.3, Relation.ADD_OR_REMOVE_ONE), 6)
    0.000842
    """
    event = PoissonGaussian(q, noise_multiplier)
    _, _, module = library_modules()
    accountant = module.RdpAccountant([order], neighbours(relation))
    try:
        accountant.compose(to_dp_event(event))
        found = float(accountant.rdp[0]) + RDP_ROUNDING
    except (ArithmeticError, ValueError):
        return math.inf
    return found if found > 0.0 else math.inf


def six_digits(value: float) -> float:
    """Return a number as it is printed, so that a ledger is easy to read.

    Examples
    --------
    >>> six_digits(0.9 * 0.9704)
    0.87336
    """
    return float(f"{value:.6g}")


def _refused(message: str, hint: str) -> FedtuneError:
    return FedtuneError(message, hint=hint, code=ExitCode.PRIVACY)
