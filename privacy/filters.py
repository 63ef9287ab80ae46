"""Privacy filters: a budget that holds when the noise itself is chosen as one goes.

An accountant adds up parameters that were fixed in advance. When the noise or the
sampling of a release depends on what was released before, or a run stops when
it looks good, a filter must refuse the release that would pass the budget, before
anything is sampled. Fixed-order Renyi filters are valid (Feldman and Zrnic 2021,
arXiv:2008.11193), and for the Gaussian mechanism without sampling so is
the sum of squares of mu (Smith and Thakurta 2022, arXiv:2210.17520; Koskela et al.
2022, arXiv:2209.15596). Privacy loss distributions composed in this way are not
(arXiv:2602.06756), and neither is choosing the order afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedtune.privacy.bounds import (
    ORDERS,
    check_delta,
    check_relation,
    gaussian_epsilon,
    rdp,
    refuse,
)
from fedtune.privacy.events import Event, Gaussian, PoissonGaussian, Relation, Unbounded

__all__ = ["GdpFilter", "RenyiFilter", "best_order", "mu_of"]


@dataclass
class RenyiFilter:
    """A budget at one Renyi order, chosen before the first release.

    Attributes
    ----------
    order : float
        One of ``accounting.ORDERS`` above 1.01.
    epsilon, delta : float
        What all admitted releases together keep, however they are chosen.
    relation : Relation
    spent : float
        Renyi divergence of what was admitted; only `admit` changes it.
    admitted : int

    Raises
    ------
    FedtuneError
        For a number that is none, an order that is not there, or a budget in which
        nothing fits at this order.

    Examples
    --------
    >>> budget = RenyiFilter(8.0, 2.0, 1e-5, Relation.ADD_OR_REMOVE_ONE)
    >>> round(budget.budget, 4)
    0.7859
    >>> [budget.admit(Gaussian(4.0)) for _ in range(4)], round(budget.spent, 4)
    ([True, True, True, False], 0.75)
    """

    order: float
    epsilon: float
    delta: float
    relation: Relation
    spent: float = 0.0
    admitted: int = 0

    def __post_init__(self) -> None:
        """Refuse a budget that could not be kept."""
        _check_budget(self.epsilon, self.delta)
        check_relation(Gaussian(1.0), self.relation)
        self.order = _known_order(self.order)
        _check_state(self.spent, self.admitted)
        if not self.budget > 0:
            raise refuse(
                f"epsilon={self.epsilon}, delta={self.delta}: nothing fits at order {self.order:g}",
                "ask best_order for an order",
            )

    @property
    def budget(self) -> float:
        """Renyi divergence that makes epsilon at delta (arXiv:2004.00010, proposition 12)."""
        return float(_budgets(self.epsilon, self.delta)[ORDERS.index(self.order)])

    def cost(self, event: Event) -> float:
        """Return what one release would take of ``budget``; infinite when unknown."""
        return float(rdp(event, self.relation)[ORDERS.index(self.order)])

    def fits(self, event: Event) -> bool:
        """Say whether one more release would be admitted."""
        return _sum_up(self.spent, self.cost(event)) <= self.budget

    def admit(self, event: Event) -> bool:
        """Take one release from the budget; False, and nothing is taken, when it is too much.

        To be called before anybody is sampled.
        """
        if not self.fits(event):
            return False
        self.spent = _sum_up(self.spent, self.cost(event))
        self.admitted += 1
        return True

    def state_dict(self) -> dict[str, float | int | str]:
        """Return the whole filter, for a checkpoint."""
        return {
            "order": self.order,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "relation": self.relation.value,
            "spent": self.spent,
            "admitted": self.admitted,
        }

    @staticmethod
    def from_state(state: Mapping[str, object]) -> RenyiFilter:
        """Read what `state_dict` wrote; raise for anything else."""
        names = ("order", "epsilon", "delta", "spent")
        order, epsilon, delta, spent = (_number(state, name) for name in names)
        admitted = state.get("admitted")
        if isinstance(admitted, bool) or not isinstance(admitted, int):
            raise refuse(f"state of a filter: admitted={admitted!r}")
        try:
            relation = Relation(str(state.get("relation")))
        except ValueError as error:
            raise refuse(f"state of a filter: relation={state.get('relation')!r}") from error
        return RenyiFilter(order, epsilon, delta, relation, spent, admitted)


@dataclass
class GdpFilter:
    """A budget of Gaussian differential privacy, for releases without sampling.

    Attributes
    ----------
    mu : float
        What all admitted releases together keep; see `mu_of`.
    spent : float
        Sum of 1 / z^2 of what was admitted; only `admit` changes it.
    admitted : int

    Examples
    --------
    >>> budget = GdpFilter(1.0)
    >>> [budget.admit(Gaussian(z)) for z in (2.0, 1.5, 1.5, 2.0)], round(budget.spent, 4)
    ([True, True, False, True], 0.9444)
    """

    mu: float
    spent: float = 0.0
    admitted: int = 0

    def __post_init__(self) -> None:
        """Refuse a budget that is no number."""
        if isinstance(self.mu, bool) or not 0 < self.mu < math.inf:
            raise refuse(f"mu={self.mu!r}", "use a number above 0")
        _check_state(self.spent, self.admitted)

    def cost(self, event: Event) -> float:
        """Return mu squared of one release.

        Raises
        ------
        FedtuneError
            For a sampled release: there the sum of squares bounds nothing.
        """
        check_relation(event, Relation.REPLACE_SPECIAL)
        match event:
            case Gaussian(z) | PoissonGaussian(1, z):
                return 1 / (z * z) if z * z > 0 else math.inf
            case Unbounded():
                return math.inf
            case _:
                raise refuse(f"{event} in a GDP filter", "sampled releases need a RenyiFilter")

    def fits(self, event: Event) -> bool:
        """Say whether one more release would be admitted."""
        return _sum_up(self.spent, self.cost(event)) <= self.mu * self.mu

    def admit(self, event: Event) -> bool:
        """Take one release from the budget; False, and nothing is taken, when it is too much."""
        if not self.fits(event):
            return False
        self.spent = _sum_up(self.spent, self.cost(event))
        self.admitted += 1
        return True

    def state_dict(self) -> dict[str, float | int]:
        """Return the whole filter, for a checkpoint."""
        return {"mu": self.mu, "spent": self.spent, "admitted": self.admitted}

    @staticmethod
    def from_state(state: Mapping[str, object]) -> GdpFilter:
        """Read what `state_dict` wrote; raise for anything else."""
        admitted = state.get("admitted")
        if isinstance(admitted, bool) or not isinstance(admitted, int):
            raise refuse(f"state of a filter: admitted={admitted!r}")
        return GdpFilter(_number(state, "mu"), _number(state, "spent"), admitted)


def best_order(
    epsilon: float, delta: float, relation: Relation, event: Event, also: Sequence[Event] = ()
) -> float:
    """Return the Renyi order at which the event fits most often.

    Parameters
    ----------
    epsilon, delta : float
    relation : Relation
    event : Event
        With the smallest noise that will be allowed: at a high order, a little less
        noise costs many times as much.
    also : sequence of Event
        Have a bound at this order too: the accountant leaves out single orders of some.

    Returns
    -------
    float

    Examples
    --------
    >>> relation = Relation.ADD_OR_REMOVE_ONE
    >>> round(best_order(2.0, 1e-5, relation, PoissonGaussian(512 / 50_000, 1.033)), 1)
    8.3
    """
    _check_budget(epsilon, delta)
    times = _budgets(epsilon, delta) / rdp(event, relation)
    for other in also:
        times = np.where(np.isfinite(rdp(other, relation)), times, -np.inf)
    if not np.nanmax(times) > 0:
        raise refuse(f"{event} does not fit into epsilon={epsilon} at delta={delta} at any order")
    return ORDERS[int(np.nanargmax(times))]


def mu_of(epsilon: float, delta: float) -> float:
    """Return the largest mu of Gaussian differential privacy within epsilon at delta.

    Parameters
    ----------
    epsilon, delta : float

    Returns
    -------
    float
        Rounded down.

    Examples
    --------
    >>> round(mu_of(4.3772, 1e-5), 4)
    1.0
    """
    _check_budget(epsilon, delta)
    low, high = 0.0, 1.0
    while gaussian_epsilon(high, delta) <= epsilon:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        fits = gaussian_epsilon(middle, delta) <= epsilon
        low, high = (middle, high) if fits else (low, middle)
    return low


def _budgets(epsilon: float, delta: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    order = np.array(ORDERS)
    room = epsilon - (np.log1p(-1 / order) - np.log(delta * order) / (order - 1))
    return np.where(order > 1.01, np.nextafter(room, -np.inf), -np.inf)


def _sum_up(spent: float, cost: float) -> float:
    return math.nextafter(spent + cost, math.inf)


def _known_order(order: float) -> float:
    for known in ORDERS:
        if math.isclose(known, order, rel_tol=1e-9):
            return known
    raise refuse(f"order={order!r} is not in accounting.ORDERS", "ask best_order for one")


def _check_budget(epsilon: float, delta: float) -> None:
    check_delta(delta)
    if isinstance(epsilon, bool) or not 0 < epsilon < math.inf:
        raise refuse(f"epsilon={epsilon!r}", "use a number above 0")


def _check_state(spent: float, admitted: int) -> None:
    if not 0 <= spent < math.inf or isinstance(admitted, bool) or admitted < 0:
        raise refuse(f"state of a filter: spent={spent!r}, admitted={admitted!r}")


def _number(state: Mapping[str, object], name: str) -> float:
    value = state.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refuse(f"state of a filter: {name}={value!r}")
    return float(value)
