"""What the events of an account cost, asked once for each different list of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

from fedtune.privacy import accounting
from fedtune.privacy.accounting import Spent
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
    from_json,
    grouped,
)
from fedtune.privacy.report_ledger import Group

__all__ = ["Groups", "bare", "cost", "events_of", "guess", "within"]

Groups = Mapping[Event, int]


def events_of(groups: Sequence[Group]) -> dict[Event, int]:
    """Return the events of an account; one that is not understood has no bound."""
    found: dict[Event, int] = {}
    for group in groups:
        if group.count:
            event = from_json(group.event)
            found[event] = found.get(event, 0) + group.count
    return found


def bare(groups: Groups) -> dict[Event, int]:
    """Return the same releases without credit for sampling.

    Examples
    --------
    >>> bare({PoissonGaussian(0.01, 2.0): 7})
    {Gaussian(noise_multiplier=2.0): 7}
    """
    found: dict[Event, int] = {}
    for event, count in groups.items():
        match event:
            case PoissonGaussian(_, z) | TruncatedPoissonGaussian(_, z, _, _):
                event = Gaussian(z)
            case PoissonLaplace(_, z):
                event = Laplace(z)
            case Levels(_, noises, counts):
                event = Levels(1.0, noises, counts)
            case RenyiFiltered():
                event = Unbounded("a filter with sampling says nothing of one without")
        found[event] = found.get(event, 0) + count
    return found


def cost(groups: Groups, delta: float, relation: Relation) -> Spent:
    """Return what events cost together; the same question is answered once.

    Examples
    --------
    >>> round(cost({PoissonGaussian(0.01, 1.0): 1000}, 1e-5, Relation.ADD_OR_REMOVE_ONE).epsilon, 4)
    1.8282
    """
    return _cost(tuple(sorted(groups.items(), key=repr)), delta, relation)


@lru_cache(maxsize=4096)
def _cost(groups: tuple[tuple[Event, int], ...], delta: float, relation: Relation) -> Spent:
    return accounting.spent(grouped(dict(groups)), delta, relation)


def guess(epsilon: float, delta: float) -> float:
    """Return how often the best guess at "did it take part?" can be right.

    Half of the time it did; 0.5 is a coin. The best test of two hypotheses under
    (epsilon, delta) gains at most (e^eps - 1 + 2 delta) / (e^eps + 1) (Kairouz, Oh
    and Viswanath 2015, arXiv 1311.0776, theorem 2.1).

    Examples
    --------
    >>> round(guess(1.0, 1e-5), 4), guess(float("inf"), 1e-5)
    (0.7311, 1.0)
    """
    if epsilon > 700:
        return 1.0
    grown = math.exp(epsilon)
    return min(1.0, 0.5 + (grown - 1 + 2 * delta) / (grown + 1) / 2)


def within(small: Groups, big: Groups) -> bool:
    """Say whether ``small`` surely costs no more: fewer releases, noisier, less often sampled.

    Examples
    --------
    >>> within({PoissonGaussian(0.01, 2.0): 7}, {PoissonGaussian(0.02, 2.0): 7})
    True
    >>> within({PoissonGaussian(0.02, 2.0): 7}, {Gaussian(9.0): 7})
    False
    """
    if len(small) != 1 or len(big) != 1:
        return not small or small == big
    ((one, times),), ((two, most),) = small.items(), big.items()
    if type(one) is not type(two) or not isinstance(one, PoissonGaussian | Gaussian):
        return small == big
    if isinstance(one, PoissonGaussian) and isinstance(two, PoissonGaussian):
        rarer = one.sampling_probability <= two.sampling_probability
    else:
        rarer = True
    noisier = one.noise_multiplier >= two.noise_multiplier  # type: ignore[union-attr]
    return times <= most and rarer and noisier
