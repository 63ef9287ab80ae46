"""Noise that moves over time: a fixed set of levels in any order, or a Renyi filter.

Two ways to let a controller choose the noise of each release from what was released
before. With sampling both cost precision against constant noise of the same epsilon:
the loss of a release is convex in its noise.

**Order** (`Levels`). How often each noise multiplier is used is fixed beforehand; the
controller only chooses which is next. That is free. Let H_S(a) be the hockey-stick
divergence E_a(P || Q) of the product of the dominating pairs (P_f, Q_f) of all releases
f in the set S, and claim: releases that take the levels of S in any order, each chosen
from the outputs before it, have divergence at most H_S(a) at every a >= 0. For one level
it is domination. If f is chosen first and p, q are the densities of its output y,

    E_a = int p(y) E_{a q(y) / p(y)}(the rest after y) dy  <=  int p(y) H_{S-f}(a q(y) / p(y)) dy
        <=  E_a(P_f x P_{S-f} || Q_f x Q_{S-f})  =  H_S(a)

by induction (S without f is left, whatever y was), by domination (Zhu, Dong and Wang
2022, arXiv:2106.08567), and because a product does not depend on the order:
privacy losses add up, and their convolution commutes. A choice that is drawn at random is
a mixture of such procedures and a function of y alone. For two data sets of which the
first has one unit more, every release has the pair (P_f, Q_f) of removing it; the other
way round all have the pair of adding it. Each direction has its own induction, and the
larger divergence counts. Stopping early is post-processing: the levels that are left
could be used and their outputs thrown away. Rounds that follow are part of S.

**Filtered** (`RenyiFiltered`). Any noise within bounds, so long as the Renyi divergences at
one order that was fixed beforehand stay within a budget; a release that would pass it is
refused before anybody is sampled (Feldman and Zrnic 2021, arXiv:2008.11193).
Composing the distributions of what was chosen would be smaller, and is no bound at all
(arXiv:2602.06756). Without sampling the sum of 1 / z^2 is a filter (Smith and Thakurta
2022, arXiv:2210.17520), and exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.events import Levels, Relation
from fedtune.privacy.rldp.course import cost_in_filter, six_digits

if TYPE_CHECKING:
    from fedtune.privacy.plan import Promise

__all__ = ["Constant", "Filtered", "NoiseBook", "Ordered", "noise_book"]

State = dict[str, NDArray[Any]]

_STEPS = 32
_UP = 1.0 + 1e-14  # a quotient of two rounded numbers is not below the true one by more


class NoiseBook(Protocol):
    """What noise the releases of one round may still have.

    One attempt at a round has one book: a crash loses the attempt, and its charge stays.
    """

    def offers(self) -> tuple[float, ...]:
        """Return what may be asked for: one, the levels that are left, or both ends."""
        ...

    def take(self, wanted: float | None) -> float | None:
        """Return the allowed noise multiplier next to the wanted one; it is taken then.

        To be called before anybody is sampled. None: nothing is left, the round is over.
        Without a wish, or with one that is no number, the planned noise is the wish.
        """
        ...

    def state(self) -> State:
        """Return what was taken and of what, for a checkpoint."""
        ...

    def restore(self, state: State) -> None:
        """Go on from `state`.

        Raises
        ------
        FedtuneError
            The state is of another plan, or has more left than this book.
        """
        ...


@dataclass
class Constant:
    """The same noise in every release; no more releases than were planned.

    Examples
    --------
    >>> book = Constant(1.1, 2)
    >>> [book.take(wanted) for wanted in (0.5, None, 2.0)]
    [1.1, 1.1, None]
    """

    noise_multiplier: float
    left: int

    def offers(self) -> tuple[float, ...]:
        """See `NoiseBook`."""
        return (self.noise_multiplier,) if self.left else ()

    def take(self, wanted: float | None) -> float | None:
        """See `NoiseBook`."""
        del wanted
        if not self.left:
            return None
        self.left -= 1
        return self.noise_multiplier

    def state(self) -> State:
        """See `NoiseBook`."""
        return self._plan() | {"left": np.array([self.left], np.int64)}

    def restore(self, state: State) -> None:
        """See `NoiseBook`."""
        _same(state, self._plan(), "left")
        (self.left,) = _fewer(state, [self.left])

    def _plan(self) -> State:
        return {"noise": np.array([self.noise_multiplier])}


@dataclass
class Ordered:
    """The levels of one round, in the order in which they are asked for.

    Examples
    --------
    >>> book = Ordered(Levels(0.01, (0.9, 1.0, 1.1), (1, 1, 1)), planned=1.0)
    >>> [book.take(wanted) for wanted in (0.1, 0.1, float("nan"), 0.1)]
    [0.9, 1.0, 1.1, None]
    """

    levels: Levels
    planned: float
    left: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.left = list(self.levels.counts)

    def offers(self) -> tuple[float, ...]:
        """See `NoiseBook`."""
        pairs = zip(self.levels.noise_multipliers, self.left, strict=True)
        return tuple(z for z, left in pairs if left)

    def take(self, wanted: float | None) -> float | None:
        """See `NoiseBook`; of two that are as near, the larger."""
        offered = self.offers()
        if not offered:
            return None
        goal = _wish(wanted, self.planned, offered[0], offered[-1])
        found = min(offered, key=lambda z: (abs(z - goal), -z))
        self.left[self.levels.noise_multipliers.index(found)] -= 1
        return found

    def state(self) -> State:
        """See `NoiseBook`."""
        return self._plan() | {"left": np.array(self.left, np.int64)}

    def restore(self, state: State) -> None:
        """See `NoiseBook`."""
        _same(state, self._plan(), "left")
        self.left = _fewer(state, self.left)

    def _plan(self) -> State:
        levels = self.levels
        return {
            "sampling": np.array([levels.sampling_probability]),
            "noise": np.array(levels.noise_multipliers),
            "counts": np.array(levels.counts, np.int64),
        }


@dataclass
class Filtered:
    """Noise between two ends, so long as it fits a budget; more of it when less would not.

    Attributes
    ----------
    q : float
        Sampling probability.
    relation : Relation
    order : float
        Of the Renyi filter. With q = 1 the filter is the sum of 1 / z^2, and this is 0.
    low, planned, high : float
    left : int
        Releases of the round.
    budget : float
        What so many releases with the planned noise take.
    spent : float
        Of the budget; only `take` changes it, rounding up.

    Examples
    --------
    >>> book = Filtered(0.01, Relation.ADD_OR_REMOVE_ONE, 8.0, 0.9, 1.0, 1.1, left=4, budget=4.0)
    >>> [book.take(wanted) for wanted in (None, -1.0, None, None)], book.spent < 4.0
    ([1.0, 0.940387, None, None], True)
    """

    q: float
    relation: Relation
    order: float
    low: float
    planned: float
    high: float
    left: int
    budget: float
    spent: float = 0.0

    def offers(self) -> tuple[float, ...]:
        """See `NoiseBook`."""
        allowed = [z for z in self._grid() if self._fits(z)] if self.left else []
        return (allowed[0], allowed[-1]) if allowed else ()

    def take(self, wanted: float | None) -> float | None:
        """See `NoiseBook`."""
        if not self.left:
            return None
        grid = self._grid()
        goal = _wish(wanted, self.planned, self.low, self.high)
        nearest = min(range(len(grid)), key=lambda i: (abs(grid[i] - goal), -grid[i]))
        for z in grid[nearest:]:
            if self._fits(z):
                self.spent = _sum_up(self.spent, self._cost(z))
                self.left -= 1
                return z
        return None

    def state(self) -> State:
        """See `NoiseBook`."""
        return self._plan() | {
            "left": np.array([self.left], np.int64), "spent": np.array([self.spent]),
        }  # fmt: skip

    def restore(self, state: State) -> None:
        """See `NoiseBook`."""
        _same(state, self._plan(), "left", "spent")
        spent = np.asarray(state["spent"])
        # NaN compares as False.
        fine = spent.dtype == np.float64 and spent.shape == (1,)
        if not fine or not self.spent <= float(spent[0]) <= self.budget:
            raise _state(f"spent={state['spent']!r}, {self.spent!r} here")
        (self.left,) = _fewer(state, [self.left])
        self.spent = float(spent[0])

    def _plan(self) -> State:
        numbers = [self.q, self.order, self.low, self.planned, self.high, self.budget]
        relation = np.array([[*Relation].index(self.relation)], np.int64)
        return {"filter": np.array(numbers), "relation": relation}

    def _grid(self) -> tuple[float, ...]:
        return _grid(self.low, self.planned, self.high)

    def _fits(self, z: float) -> bool:
        after = _sum_up(self.spent, self._cost(z))
        return math.isfinite(after) and after <= self.budget

    def _cost(self, z: float) -> float:
        """Return what a release takes, in releases of the planned noise; exactly 1 for that."""
        if z == self.planned:
            return 1.0
        if self.q == 1.0:
            return (self.planned / z) ** 2 * _UP
        one, planned = (
            cost_in_filter(self.q, each, self.order, self.relation) for each in (z, self.planned)
        )
        return one / planned * _UP


@lru_cache(maxsize=64)
def _grid(low: float, planned: float, high: float) -> tuple[float, ...]:
    """Return what a filter allows: steps of some parts in a thousand, and the planned noise.

    Few, so that the accountant is asked once for each of them.
    """
    steps = [low * (high / low) ** (step / _STEPS) for step in range(_STEPS + 1)]
    return tuple(sorted({*map(six_digits, steps), low, planned, high}))


def noise_book(promise: Promise) -> NoiseBook:
    """Return the book of one round of a promise.

    Examples
    --------
    >>> from fedtune.config import Config
    >>> from fedtune.privacy.plan import client_promise
    >>> promise = client_promise(Config.model_validate({
    ...     "federation": {"weighting": "uniform", "rounds": 3},
    ...     "data": {"pack": False, "holdout": 0.0}, "evaluation": {"clients": 0},
    ...     "privacy": {"client": {"relation": "add-or-remove-one", "population": 100,
    ...         "delta": 1e-4, "noise_multiplier": 1.0, "sampler": "everyone"}}}))
    >>> noise_book(promise).offers()
    (1.0,)
    """
    moving, planned = promise.moving, promise.mechanism.noise_multiplier
    if isinstance(moving.event, Levels):
        return Ordered(moving.event, planned)
    if moving.low == moving.high:
        return Constant(planned, promise.releases)
    return Filtered(
        promise.mechanism.sampler.rate, promise.relation, moving.order, moving.low, planned,
        moving.high, promise.releases, float(promise.releases),
    )  # fmt: skip


def _wish(wanted: float | None, planned: float, low: float, high: float) -> float:
    """Return a wish as a number between both ends."""
    if wanted is None or math.isnan(wanted):
        return planned
    return min(max(wanted, low), high)


def _sum_up(spent: float, cost: float) -> float:
    """Return the sum of two numbers, rounded up where it is not exact (Knuth's TwoSum)."""
    total = spent + cost
    back = total - spent
    lost = (spent - (total - back)) + (cost - back)
    return math.nextafter(total, math.inf) if lost > 0.0 else total


def _same(state: State, plan: State, *more: str) -> None:
    """Raise unless a state has these names, and is of this plan."""
    if set(state) != {*plan, *more}:
        raise _state(f"names {sorted(state)}")
    for name, value in plan.items():
        given = np.asarray(state[name])
        if given.dtype != value.dtype or not np.array_equal(given, value):
            raise _state(f"{name}={state[name]!r} of another plan: {value!r}")


def _fewer(state: State, now: list[int]) -> list[int]:
    """Return how many are left; never more than there are now."""
    left = np.asarray(state["left"])
    fine = left.dtype == np.int64 and left.shape == (len(now),)
    if not fine or bool((left < 0).any()) or bool((left > np.array(now)).any()):
        raise _state(f"left={state['left']!r}, {now} here")
    return [int(one) for one in left]


def _state(message: str) -> FedtuneError:
    return _refused(f"state of a noise book: {message}", "a book goes on from its own state only")


def _refused(message: str, hint: str) -> FedtuneError:
    return FedtuneError(message, hint=hint, code=ExitCode.PRIVACY)
