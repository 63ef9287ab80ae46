"""Who takes part in a release, and the privacy event that this is.

A sampler draws the units **and** names its event, so that what is accounted is
what ran. There are three, because only these can be accounted: a shuffled epoch
or a fixed-size cohort must not be called Poisson (Chua et al. 2024, arXiv
2403.17673), and is not here.

The draw must stay secret for the amplification to hold: it comes from the noise
source, never from a public seed, and is neither logged nor sent to others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.events import Event, Gaussian, PoissonGaussian, TruncatedPoissonGaussian
from fedtune.privacy.noise import NoiseSource

__all__ = ["Everyone", "Poisson", "Sampler", "TruncatedPoisson"]


class Sampler(Protocol):
    """Draws units, and says which event a Gaussian release of them is."""

    @property
    def rate(self) -> float:
        """Probability that a unit is drawn, truncation aside."""

    def draw(self, n: int, source: NoiseSource) -> NDArray[np.int64]:
        """Return the drawn units of ``n``, ascending. Often none."""

    def event(self, noise_multiplier: float) -> Event:
        """Return the event of one release of what was drawn."""


@dataclass(frozen=True)
class Everyone:
    """All units, every time: no amplification.

    Examples
    --------
    >>> from fedtune.privacy.noise import SecureNoise
    >>> Everyone().draw(3, SecureNoise()), Everyone().event(2.0)
    (array([0, 1, 2]), Gaussian(noise_multiplier=2.0))
    """

    @property
    def rate(self) -> float:
        """Every unit is drawn."""
        return 1.0

    def draw(self, n: int, source: NoiseSource) -> NDArray[np.int64]:
        """Return 0 to n - 1, shape (n,)."""
        del source
        _require_units(n)
        return np.arange(n, dtype=np.int64)

    def event(self, noise_multiplier: float) -> Event:
        """Return the event of a Gaussian release on all units."""
        return Gaussian(noise_multiplier)


@dataclass(frozen=True)
class Poisson:
    """Each unit by its own coin. Batches differ in size, and may be empty.

    Attributes
    ----------
    probability : float
        Of each coin, in (0, 1]. The coins are exact to 2^-52.

    Raises
    ------
    FedtuneError
        When ``probability`` is not in (0, 1].

    Examples
    --------
    >>> from fedtune.privacy.noise import InsecureSeededNoise
    >>> Poisson(0.2).draw(10, InsecureSeededNoise(1))
    array([3, 5])
    >>> Poisson(0.01).event(1.0)
    PoissonGaussian(sampling_probability=0.01, noise_multiplier=1.0)
    """

    probability: float

    def __post_init__(self) -> None:
        _require_probability(self.probability)

    @property
    def rate(self) -> float:
        """Probability of the coin."""
        return self.probability

    def draw(self, n: int, source: NoiseSource) -> NDArray[np.int64]:
        """Return the units whose coin fell, ascending, shape (drawn,)."""
        return _coins(n, self.probability, source)

    def event(self, noise_multiplier: float) -> Event:
        """Return the Poisson-sampled Gaussian with this probability."""
        return PoissonGaussian(self.probability, noise_multiplier)


@dataclass(frozen=True)
class TruncatedPoisson:
    """Poisson, and when more than ``cap`` are drawn, ``cap`` of them at random.

    The cap must hold for every data set alike, so the number of units is public
    (relation ``replace-special``).

    Attributes
    ----------
    probability : float
        Of each coin, in (0, 1].
    population : int
        Public number of units. ``draw`` refuses another.
    cap : int
        Most units in one release, 1 to ``population``.

    Raises
    ------
    FedtuneError
        When a number is out of range.

    Examples
    --------
    >>> from fedtune.privacy.noise import SecureNoise
    >>> sampler = TruncatedPoisson(0.5, population=1000, cap=10)
    >>> len(sampler.draw(1000, SecureNoise()))
    10
    """

    probability: float
    population: int
    cap: int

    def __post_init__(self) -> None:
        _require_probability(self.probability)
        for name, value, most in (
            ("population", self.population, math.inf),
            ("cap", self.cap, self.population),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise FedtuneError(
                    f"{name}={value!r} of a truncated Poisson sampler",
                    hint="population is 1 or more, cap is 1 to population, both whole",
                    code=ExitCode.PRIVACY,
                )

    @property
    def rate(self) -> float:
        """Probability of the coin, before the cap."""
        return self.probability

    def draw(self, n: int, source: NoiseSource) -> NDArray[np.int64]:
        """Return at most ``cap`` units, ascending. ``n`` must be the public population."""
        if n != self.population:
            raise FedtuneError(
                f"{n} units, but the sampler was accounted for {self.population}",
                hint="a truncated sampler needs the public number of units; absent ones send zero",
                code=ExitCode.PRIVACY,
            )
        drawn = _coins(n, self.probability, source)
        if len(drawn) <= self.cap:
            return drawn
        return np.sort(drawn[_subset(len(drawn), self.cap, source)])

    def event(self, noise_multiplier: float) -> Event:
        """Return the truncated Poisson-sampled Gaussian of this sampler."""
        return TruncatedPoissonGaussian(
            self.probability, noise_multiplier, self.population, self.cap
        )


def _coins(n: int, probability: float, source: NoiseSource) -> NDArray[np.int64]:
    _require_units(n)
    return np.flatnonzero(source.uniform(n) < probability).astype(np.int64)


def _subset(n: int, size: int, source: NoiseSource) -> NDArray[np.int64]:
    """Return ``size`` of ``n`` positions; every subset is equally likely."""
    while True:
        keys = source.integers(n, 1 << 62)
        if len(np.unique(keys)) == n:  # a tie would favour somebody; there is next to never one
            return np.argpartition(keys, size - 1)[:size].astype(np.int64)


def _require_probability(value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise FedtuneError(
            f"sampling probability {value!r}",
            hint="above 0 and at most 1",
            code=ExitCode.PRIVACY,
        )


def _require_units(n: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 0:
        raise FedtuneError(
            f"{n!r} units to draw from", hint="a whole number, 0 or more", code=ExitCode.PRIVACY
        )
