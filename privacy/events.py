"""What a mechanism did, as values that an accountant understands.

An event says how the noise and the sampling were, for one release, and nothing
about who, when or how often. Events are stored, never epsilons: a ledger of
events can be accounted again, by anybody, with another accountant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any

from fedtune.errors import ExitCode, FedtuneError

__all__ = [
    "Bounded",
    "Charge",
    "Event",
    "Gaussian",
    "Laplace",
    "Levels",
    "PoissonGaussian",
    "PoissonLaplace",
    "Relation",
    "RenyiFiltered",
    "TruncatedPoissonGaussian",
    "Unbounded",
    "Unit",
    "from_json",
    "grouped",
    "least_noise",
    "releases_in",
    "to_dp_event",
    "to_json",
    "with_laplace",
]

EVENT_SCHEMA = 1

MOST_LEVELS = 32
"""Different noise multipliers in one `Levels`: each costs the accountant a table."""

_MOST_TIMES = 10**9


class Relation(StrEnum):
    """Which two data sets the guarantee cannot tell apart (dp.md 0.3, 2.9)."""

    ADD_OR_REMOVE_ONE = "add-or-remove-one"
    """One unit more or less. The number of units is private."""
    REPLACE_SPECIAL = "replace-special"
    """One unit's contribution becomes zero. The number of units is public."""


class Unit(StrEnum):
    """Whose contribution is hidden."""

    EXAMPLE = "example"
    CLIENT = "client"


@dataclass(frozen=True)
class Gaussian:
    """The Gaussian mechanism without sampling.

    Attributes
    ----------
    noise_multiplier : float
        Standard deviation of the noise over the L2 sensitivity.
    """

    noise_multiplier: float


@dataclass(frozen=True)
class PoissonGaussian:
    """The Gaussian mechanism on units that each took part by an independent coin.

    Attributes
    ----------
    sampling_probability : float
        Of the coin, in (0, 1].
    noise_multiplier : float
        Standard deviation of the noise over the L2 sensitivity.
    """

    sampling_probability: float
    noise_multiplier: float


@dataclass(frozen=True)
class TruncatedPoissonGaussian:
    """Poisson sampling with a hard cap on how many units take part.

    Attributes
    ----------
    sampling_probability : float
    noise_multiplier : float
    population : int
        Public number of units that the coins are flipped for.
    cap : int
        When more are drawn, ``cap`` of them are kept, at random.
    """

    sampling_probability: float
    noise_multiplier: float
    population: int
    cap: int


@dataclass(frozen=True)
class Laplace:
    """The Laplace mechanism for one number, without sampling.

    Attributes
    ----------
    noise_multiplier : float
        Scale of the noise over the sensitivity: 1 / epsilon of one release.
    """

    noise_multiplier: float


@dataclass(frozen=True)
class PoissonLaplace:
    """The Laplace mechanism on units that each took part by an independent coin.

    Attributes
    ----------
    sampling_probability : float
        Of the coin, in (0, 1].
    noise_multiplier : float
        Scale of the noise over the sensitivity.
    """

    sampling_probability: float
    noise_multiplier: float


@dataclass(frozen=True)
class Levels:
    """Many releases whose noise was fixed beforehand, but for its order.

    The noise of each release is one of those that are left, chosen from what was released
    before; each is used as often as its count says, or less often. It costs what the same
    releases in a fixed order cost: ``fedtune.privacy.rldp.levels`` has the proof.

    Attributes
    ----------
    sampling_probability : float
        Of the coins in every release, in (0, 1]. 1: no sampling.
    noise_multipliers : tuple of float
        Ascending, all different, at most ``MOST_LEVELS``.
    counts : tuple of int
        How many releases have each of them.
    """

    sampling_probability: float
    noise_multipliers: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class RenyiFiltered:
    """Releases with noise that was chosen freely, behind a Renyi filter of fixed order.

    Whatever was chosen, all of them together have at most this Renyi divergence (Feldman
    and Zrnic 2021, arXiv:2008.11193), and nothing else is known of them.

    Attributes
    ----------
    order : float
        One of ``accounting.ORDERS`` above 1.01.
    divergence : float
        Budget of the filter at this order.
    """

    order: float
    divergence: float


@dataclass(frozen=True)
class Unbounded:
    """A release without a bound: epsilon is infinite from here on."""

    reason: str


Bounded = (
    Gaussian | PoissonGaussian | TruncatedPoissonGaussian | Laplace | PoissonLaplace | Levels
    | RenyiFiltered
)  # fmt: skip
Event = Bounded | Unbounded

_KINDS: dict[str, type[Bounded | Unbounded]] = {
    "gaussian": Gaussian,
    "laplace": Laplace,
    "levels": Levels,
    "poisson-gaussian": PoissonGaussian,
    "poisson-laplace": PoissonLaplace,
    "renyi-filtered": RenyiFiltered,
    "truncated-poisson-gaussian": TruncatedPoissonGaussian,
    "unbounded": Unbounded,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}
_LISTS = ("noise_multipliers", "counts")


@dataclass(frozen=True)
class Charge:
    """The same event, ``count`` times."""

    event: Event
    count: int = 1


def check(event: Event) -> None:
    """Raise unless every number of the event can be accounted."""
    if isinstance(event, Levels):
        _check_levels(event)
        return
    for name, value in asdict(event).items():
        if isinstance(value, str):
            continue
        _check_number(event, name, value)
    if isinstance(event, RenyiFiltered) and not event.order > 1.01:
        raise _refused(event, "order", event.order)


def _check_number(event: Event, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _refused(event, name, value)
    low, high = (0.0, 1.0) if name == "sampling_probability" else (0.0, math.inf)
    if not math.isfinite(value) or not low < value <= high:
        raise _refused(event, name, value)


def _check_levels(event: Levels) -> None:
    _check_number(event, "sampling_probability", event.sampling_probability)
    noises, counts = event.noise_multipliers, event.counts
    for name, values in (("noise_multipliers", noises), ("counts", counts)):
        if not isinstance(values, tuple) or not 1 <= len(values) <= MOST_LEVELS:
            raise _refused(event, name, values)
        for value in values:
            _check_number(event, name, value)
    if any(not isinstance(count, int) or count > _MOST_TIMES for count in counts):
        raise _refused(event, "counts", counts)
    if len(noises) != len(counts) or any(a >= b for a, b in pairwise(noises)):
        raise _refused(event, "noise_multipliers", noises)


def releases_in(event: Event) -> int:
    """Return how many releases the event stands for.

    Behind a filter it is not known beforehand; all of them count as one.

    Examples
    --------
    >>> releases_in(Levels(0.01, (0.9, 1.1), (5, 7))), releases_in(PoissonGaussian(0.01, 1.0))
    (12, 1)
    """
    return sum(event.counts) if isinstance(event, Levels) else 1


def least_noise(event: Event) -> float | None:
    """Return the smallest noise multiplier in an event; None where it says none.

    Examples
    --------
    >>> least_noise(Levels(0.01, (0.9, 1.1), (5, 7))), least_noise(RenyiFiltered(8.0, 0.5))
    (0.9, None)
    """
    match event:
        case Levels(_, noises, _):
            return noises[0]
        case RenyiFiltered() | Unbounded():
            return None
        case _:
            return event.noise_multiplier


def to_json(event: Event) -> dict[str, Any]:
    """Return the stored form of an event.

    Examples
    --------
    >>> to_json(PoissonGaussian(0.01, 1.0))
    {'schema': 1, 'kind': 'poisson-gaussian', 'sampling_probability': 0.01, 'noise_multiplier': 1.0}
    """
    check(event)
    values = {name: list(value) if isinstance(value, tuple) else value
              for name, value in asdict(event).items()}  # fmt: skip
    return {"schema": EVENT_SCHEMA, "kind": _NAMES[type(event)]} | values


def from_json(stored: Mapping[str, Any]) -> Event:
    """Read a stored event; one that is not understood is unbounded, never free.

    Examples
    --------
    >>> from_json({"schema": 1, "kind": "gaussian", "noise_multiplier": 2.0})
    Gaussian(noise_multiplier=2.0)
    >>> from_json({"schema": 1, "kind": "staircase", "scale": 2.0})
    Unbounded(reason="unknown event 'staircase'")
    """
    given = dict(stored)
    schema, name = given.pop("schema", None), given.pop("kind", None)
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if schema != EVENT_SCHEMA or kind is None:
        return Unbounded(f"unknown event {name!r}")
    for field in _LISTS:
        if isinstance(given.get(field), list):
            given[field] = tuple(given[field])
    try:
        event: Event = kind(**given)
        check(event)
    except (TypeError, FedtuneError) as error:
        return Unbounded(f"unreadable event {name!r}: {error}")
    return event


def to_dp_event(event: Event) -> Any:
    """Return the same event in the words of ``dp_accounting``.

    It has none for `RenyiFiltered`, and no event stands for a budget at one order: that
    becomes one without a bound, never one that is too cheap.

    Examples
    --------
    >>> to_dp_event(PoissonGaussian(0.01, 1.0))
    PoissonSampledDpEvent(sampling_probability=0.01, event=GaussianDpEvent(noise_multiplier=1.0))
    """
    import dp_accounting as dp

    check(event)
    match event:
        case Gaussian(z):
            return dp.GaussianDpEvent(z)
        case PoissonGaussian(q, z):
            return dp.PoissonSampledDpEvent(q, dp.GaussianDpEvent(z))
        case TruncatedPoissonGaussian(q, z, population, cap):
            return dp.dp_event.TruncatedSubsampledGaussianDpEvent(
                dataset_size=population,
                sampling_probability=q,
                truncated_batch_size=cap,
                noise_multiplier=z,
            )
        case Laplace(z):
            return dp.LaplaceDpEvent(z)
        case PoissonLaplace(q, z):
            return dp.PoissonSampledDpEvent(q, dp.LaplaceDpEvent(z))
        case Levels(q, noises, counts):
            parts = [
                dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(q, dp.GaussianDpEvent(z)), n)
                for z, n in zip(noises, counts, strict=True)
            ]
            return dp.ComposedDpEvent(parts)
        case RenyiFiltered() | Unbounded():
            return dp.NonPrivateDpEvent()


def with_laplace(event: Event) -> Event:
    """Return the event of the same units with Laplace noise, of one number.

    Raises
    ------
    FedtuneError
        For a sampler that no accountant knows with Laplace noise.

    Examples
    --------
    >>> with_laplace(PoissonGaussian(0.01, 2.0))
    PoissonLaplace(sampling_probability=0.01, noise_multiplier=2.0)
    """
    match event:
        case Gaussian(z):
            return Laplace(z)
        case PoissonGaussian(q, z):
            return PoissonLaplace(q, z)
        case _:
            raise FedtuneError(
                f"{type(event).__name__} has no bound with Laplace noise",
                hint="use sampler 'poisson' or 'everyone'",
                code=ExitCode.PRIVACY,
            )


def grouped(charges: Mapping[Event, int] | list[Charge] | tuple[Charge, ...]) -> dict[Event, int]:
    """Add up equal events; composition does not depend on their order.

    Examples
    --------
    >>> grouped([Charge(Gaussian(1.0)), Charge(Gaussian(2.0)), Charge(Gaussian(1.0), 3)])
    {Gaussian(noise_multiplier=1.0): 4, Gaussian(noise_multiplier=2.0): 1}
    """
    if isinstance(charges, Mapping):
        return dict(charges)
    found: dict[Event, int] = {}
    for charge in charges:
        if isinstance(charge.count, bool) or charge.count < 0:
            raise FedtuneError(
                f"an event cannot happen {charge.count} times", code=ExitCode.PRIVACY
            )
        found[charge.event] = found.get(charge.event, 0) + charge.count
    return found


def _refused(event: Event, name: str, value: object) -> FedtuneError:
    return FedtuneError(
        f"{type(event).__name__}.{name} = {value!r}: such an event cannot be accounted",
        hint="probabilities are in (0, 1]; everything else is finite and above 0",
        code=ExitCode.PRIVACY,
    )
