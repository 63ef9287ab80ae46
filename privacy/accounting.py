"""How much privacy a list of releases costs: the smallest valid upper bound.

`fedtune.privacy.policy` says which accountants are asked. Planning asks the same
question backwards: how much noise, how many releases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version

from fedtune.privacy import bounds, distributions, policy
from fedtune.privacy.bounds import ORDERS, epsilon_of_rdp, rdp
from fedtune.privacy.events import Charge, Event, Relation, grouped, releases_in
from fedtune.privacy.groups import group_epsilon
from fedtune.privacy.laplace import pure_epsilon

__all__ = [
    "ORDERS",
    "Charges",
    "Spent",
    "curve",
    "epsilon_of_rdp",
    "group_epsilon",
    "most",
    "noise_multiplier",
    "pure_epsilon",
    "rdp",
    "require_delta",
    "spent",
]

Charges = Mapping[Event, int] | list[Charge] | tuple[Charge, ...]

MIN_NOISE, MAX_NOISE = 1e-3, 1e6
MAX_COUNT = 10**9


@dataclass(frozen=True)
class Spent:
    """What a list of releases cost.

    Attributes
    ----------
    epsilon : float
        The smallest of the valid upper bounds at ``delta``.
    delta : float
    accountant : str
        Which bound it is: "pld", "rdp", "analytic", or "none" (nothing was
        released, or nothing bounds what was).
    epsilon_rdp : float
    epsilon_pld : float or None
        None where it was not computed or cannot know.
    order : float
        Renyi order of ``epsilon_rdp``.
    mu : float or None
        Of Gaussian differential privacy: exact for releases without sampling,
        fitted from above to the privacy loss distribution otherwise.
    library : str
    releases : int
        What a filter admitted counts as one for each of its budgets.
    grid : float or None
        Step of the privacy loss distribution behind ``epsilon_pld``.
    pure : float or None
        Epsilon at delta 0, where there is one: for Laplace noise alone.
    """

    epsilon: float
    delta: float
    accountant: str
    epsilon_rdp: float
    epsilon_pld: float | None
    order: float
    mu: float | None
    library: str
    releases: int
    grid: float | None = None
    pure: float | None = None


def spent(charges: Charges, delta: float, relation: Relation) -> Spent:
    """Return what the releases cost together.

    Parameters
    ----------
    charges : mapping from event to count, or sequence of Charge
        Fixed in advance, or with noise and sampling that do not depend on what was
        released before; otherwise use `fedtune.privacy.filters`.
    delta : float
    relation : Relation

    Returns
    -------
    Spent

    Raises
    ------
    FedtuneError
        When an accountant answers NaN, a negative or an impossible number.

    Examples
    --------
    >>> from fedtune.privacy.events import PoissonGaussian
    >>> steps = [Charge(PoissonGaussian(0.01, 1.0), 1000)]
    >>> answer = spent(steps, 1e-5, Relation.ADD_OR_REMOVE_ONE)
    >>> round(answer.epsilon, 4), answer.accountant, round(answer.epsilon_rdp, 4), answer.mu
    (1.8282, 'pld', 2.1014, 0.4628)
    """
    groups = grouped(charges)
    found = policy.bound(groups, delta, relation)
    releases = sum(count * releases_in(event) for event, count in groups.items())
    mu = found.mu
    if found.distribution is not None:
        mu = distributions.fitted_mu(found.distribution, releases, delta)
    pure = pure_epsilon(groups)
    return Spent(
        epsilon=found.epsilon,
        delta=delta,
        accountant=found.accountant,
        epsilon_rdp=found.rdp,
        epsilon_pld=found.pld,
        order=found.order,
        mu=mu,
        library=library(),
        releases=releases,
        grid=found.grid,
        pure=pure if math.isfinite(pure) and releases else None,
    )


@lru_cache(maxsize=1)
def library() -> str:
    """Return the accountant's name and version."""
    return f"dp-accounting {version('dp-accounting')}"


def require_delta(delta: float, units: int) -> None:
    """Refuse a delta that allows to publish somebody's data outright.

    Parameters
    ----------
    delta : float
    units : int
        How many people, clients or examples the guarantee speaks of.

    Examples
    --------
    >>> require_delta(1e-5, 50_000)
    >>> require_delta(1e-3, 1000)
    Traceback (most recent call last):
    fedtune.errors.FedtuneError: delta=0.001 is not below 1/1000
    """
    bounds.check_delta(delta)
    if isinstance(units, bool) or units < 1:
        raise bounds.refuse(f"units={units!r}", "count who the guarantee speaks of")
    if delta * units >= 1:
        raise bounds.refuse(
            f"delta={delta} is not below 1/{units}", f"for example {1 / units**1.1:.1g}"
        )


# ---------------------------------------------------------------- planning


def noise_multiplier(
    epsilon: float,
    delta: float,
    relation: Relation,
    count: int,
    make: Callable[[float], Event],
) -> float:
    """Return the smallest noise multiplier that keeps the releases within epsilon.

    Parameters
    ----------
    epsilon, delta : float
    relation : Relation
    count : int
        How often the event will happen.
    make : callable
        From a noise multiplier to the event.

    Returns
    -------
    float
        Four digits, rounded up: what it costs is never above ``epsilon``.

    Raises
    ------
    FedtuneError
        When not even a noise multiplier of a million is enough.

    Examples
    --------
    >>> from fedtune.privacy.events import PoissonGaussian
    >>> relation = Relation.ADD_OR_REMOVE_ONE
    >>> noise_multiplier(2.0, 1e-5, relation, 1000, lambda z: PoissonGaussian(512 / 50_000, z))
    0.9704
    """
    _check_goal(epsilon, delta)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise bounds.refuse(f"count={count!r}: nothing to calibrate", "use at least 1")

    def cost(finest: float) -> Callable[[int], float]:
        return lambda n: policy.price({make(_noise(-n)): count}, delta, relation, finest)

    least, most_ = -_index(MAX_NOISE), -_index(MIN_NOISE)
    n = _last(cost(policy.COARSE), 0, epsilon, least, most_, step=3000, until=32)
    n = _last(cost(policy.MIDDLE), n, epsilon, least, most_, step=_percent(n, 3), until=2)
    n = _last(cost(policy.FINEST), n, epsilon, least, most_, step=_percent(n, 0.1))
    if cost(policy.FINEST)(n) > epsilon:
        raise bounds.refuse(
            f"epsilon={epsilon}, delta={delta}: no noise multiplier up to {MAX_NOISE:g} is enough",
            "allow more, or release less often",
        )
    return _noise(-n)


def most(
    event: Event,
    epsilon: float,
    delta: float,
    relation: Relation,
    before: Mapping[Event, int] | None = None,
) -> int:
    """Return how many more times the event fits into the budget.

    Parameters
    ----------
    event : Event
    epsilon, delta : float
        The whole budget.
    relation : Relation
    before : Mapping[Event, int]
        What was released already.

    Returns
    -------
    int
        At most a thousand million.

    Examples
    --------
    >>> from fedtune.privacy.events import PoissonGaussian
    >>> most(PoissonGaussian(0.01, 1.0), 1.8283, 1e-5, Relation.ADD_OR_REMOVE_ONE)
    1000
    """
    _check_goal(epsilon, delta)
    groups = dict(before or {})

    def cost(finest: float) -> Callable[[int], float]:
        return lambda n: policy.price(
            groups | {event: groups.get(event, 0) + n}, delta, relation, finest
        )

    n = _last(cost(policy.COARSE), 0, epsilon, 0, MAX_COUNT, step=64, until=2)
    n = _last(cost(policy.MIDDLE), n, epsilon, 0, MAX_COUNT, step=max(1, n // 10), until=2)
    return _last(cost(policy.FINEST), n, epsilon, 0, MAX_COUNT, step=max(1, n // 500))


def curve(
    charges: Charges, delta: float, relation: Relation, points: int = 24
) -> list[tuple[int, float]]:
    """Return epsilon after the first releases, for a picture.

    Parameters
    ----------
    charges : mapping from event to count, or sequence of Charge
        In the order of the releases.
    delta : float
    relation : Relation
    points : int
        How many, evenly spaced; the last is the whole.

    Returns
    -------
    list[tuple[int, float]]
        Number of releases, and epsilon; neither ever falls.

    Examples
    --------
    >>> from fedtune.privacy.events import PoissonGaussian
    >>> steps = [Charge(PoissonGaussian(0.1, 2.0), 100)]
    >>> [(n, round(e, 2)) for n, e in curve(steps, 1e-5, Relation.ADD_OR_REMOVE_ONE, 2)]
    [(50, 1.65), (100, 2.34)]
    """
    if isinstance(points, bool) or points < 1:
        raise bounds.refuse(f"points={points!r}", "use at least 1")
    order = [Charge(*item) for item in charges.items()] if isinstance(charges, Mapping) else charges
    total = sum(grouped(charges).values())
    counts = sorted({math.ceil(total * point / points) for point in range(1, points + 1)} - {0})
    found: list[tuple[int, float]] = []
    last = 0.0
    for count in counts:
        epsilon = policy.price(_first(order, count), delta, relation)
        if epsilon < 0.99 * last - 1e-3:
            raise bounds.refuse(f"epsilon falls from {last} to {epsilon} at release {count}")
        last = max(last, epsilon)
        found.append((count, last))
    return found


def _first(order: list[Charge] | tuple[Charge, ...], count: int) -> dict[Event, int]:
    groups: dict[Event, int] = {}
    for charge in order:
        taken = min(charge.count, count)
        groups[charge.event] = groups.get(charge.event, 0) + taken
        count -= taken
        if count == 0:
            break
    return groups


def _check_goal(epsilon: float, delta: float) -> None:
    bounds.check_delta(delta)
    if isinstance(epsilon, bool) or not 0 < epsilon < math.inf:
        raise bounds.refuse(f"epsilon={epsilon!r}", "use a number above 0")


def _noise(index: int) -> float:
    """Return the noise multiplier of four digits with this index; 0 is 1.0."""
    decade, mantissa = divmod(index, 9000)
    return float(f"{1000 + mantissa}e{decade - 3}")


def _index(noise: float) -> int:
    decade = math.floor(math.log10(noise))
    return 9000 * decade + round(noise / 10.0 ** (decade - 3)) - 1000


def _percent(n: int, percent: float) -> int:
    return max(1, round((1000 + -n % 9000) * percent / 100))


def _last(
    cost: Callable[[int], float],
    start: int,
    goal: float,
    least: int,
    greatest: int,
    *,
    step: int,
    until: int = 1,
) -> int:
    """Return the last n whose cost is within the goal; the cost grows with n.

    From ``start`` in growing steps, then false position (Illinois) on the logarithm.
    The answer is within the goal, or it is ``least``, and at most ``until`` away.
    """
    cost = lru_cache(maxsize=None)(cost)
    low = high = start
    while low > least and cost(low) > goal:
        low, high, step = max(least, low - step), low, 2 * step
    if low == high:
        while high < greatest and cost(high) <= goal:
            low, high, step = high, min(greatest, high + step), 2 * step
    weight_low = weight_high = 1.0
    while high - low > until:
        below = weight_low * _gap(cost(low), goal)
        above = weight_high * _gap(cost(high), goal)
        share = below / (below - above) if below < above else 0.5
        middle = min(max(low + round(share * (high - low)), low + 1), high - 1)
        if cost(middle) <= goal:
            low, weight_low, weight_high = middle, 1.0, weight_high / 2
        else:
            high, weight_high, weight_low = middle, 1.0, weight_low / 2
    return low


def _gap(cost: float, goal: float) -> float:
    return min(max(math.log(max(cost, 1e-300) / goal), -5.0), 5.0) if cost > 0 else -5.0
