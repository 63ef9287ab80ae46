"""What an experiment promises: mechanism, event, number of releases and bound in one place.

Made from the settings alone, never from data: server, clients and the plan that
``--dry-run`` prints build the same ``Promise`` and so account for the same thing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from scipy.stats import poisson

from fedtune.config import Config
from fedtune.config_privacy import ClientPrivacyConfig, ExamplePrivacyConfig
from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.accounting import Spent, most, noise_multiplier, require_delta, spent
from fedtune.privacy.clipping import split_noise
from fedtune.privacy.events import (
    Charge,
    Event,
    Gaussian,
    Levels,
    Relation,
    Unit,
    with_laplace,
)
from fedtune.privacy.mechanism import Block, Mechanism
from fedtune.privacy.noise import InsecureSeededNoise, NoiseSource, SecureNoise
from fedtune.privacy.rldp.course import Course, Moving
from fedtune.privacy.sampling import Everyone, Poisson, Sampler, TruncatedPoisson
from fedtune.seeds import derive

__all__ = [
    "BITS",
    "Promise",
    "client_promise",
    "dataset_name",
    "default_ledger",
    "example_promise",
    "honest_survivors",
    "least_survivors",
    "ledger_place",
    "noise_source",
    "promises",
    "resolve",
    "rounds_that_fit",
]

BITS = "clip-bits"
"""Name of the tensor that carries the quantile rule's bits in a release."""

_MOST_ROUNDS = 10_000_000


@dataclass(frozen=True)
class Promise:
    """One privacy statement, before it is true.

    Attributes
    ----------
    unit : Unit
    mechanism : Mechanism
        Draws, adds noise, divides, and names the event.
    settings : ExamplePrivacyConfig or ClientPrivacyConfig
    rounds : int
        Rounds planned.
    releases : int
        Releases in one round that concern the same units.
    """

    unit: Unit
    mechanism: Mechanism
    settings: ExamplePrivacyConfig | ClientPrivacyConfig
    rounds: int
    releases: int

    @property
    def relation(self) -> Relation:
        """Neighbouring relation."""
        return self.mechanism.relation

    @property
    def delta(self) -> float:
        """Delta of the statement."""
        return self.settings.delta

    @property
    def limit(self) -> tuple[float, float] | None:
        """Largest epsilon of this run, and its delta; None: the run sets itself no bound."""
        return (self.settings.epsilon, self.delta) if self.settings.epsilon else None

    @property
    def moving(self) -> Moving:
        """What one round is, and between which ends its noise moves."""
        course = _course(
            self.unit, self.mechanism.sampler, self.settings, self.releases, self.rounds
        )
        return course.at(self.mechanism.noise_multiplier)

    @property
    def charge(self) -> Charge:
        """What one round costs, whatever noise its releases are given."""
        moving = self.moving
        return Charge(moving.event, moving.count)

    def at(self, noise_multiplier: float) -> Mechanism:
        """Return the mechanism of one release, with noise that a `NoiseBook` gave.

        Raises
        ------
        FedtuneError
            No release may have such noise.
        """
        if noise_multiplier == self.mechanism.noise_multiplier:
            return self.mechanism
        moving = self.moving
        offered = moving.low <= noise_multiplier <= moving.high
        if isinstance(moving.event, Levels):
            offered = noise_multiplier in moving.event.noise_multipliers
        if not offered:
            raise FedtuneError(
                f"noise multiplier {noise_multiplier!r} was not offered: "
                f"{moving.low:g} to {moving.high:g}",
                hint="take it from the noise book of this promise", code=ExitCode.PRIVACY,
            )  # fmt: skip
        return replace(self.mechanism, noise_multiplier=noise_multiplier)

    @property
    def least_noise(self) -> float:
        """The smallest noise multiplier that a release may have."""
        return self.moving.low

    def spent(self, rounds: int | None = None) -> Spent:
        """Return the bound after so many rounds; after all of them without ``rounds``."""
        charge = self.charge
        count = charge.count * (self.rounds if rounds is None else rounds)
        return spent([Charge(charge.event, count)], self.delta, self.relation)

    def plain_spent(self) -> Spent:
        """Return the bound without amplification: as if the coins were no secret."""
        moving = self.moving
        event: Event = Gaussian(self.mechanism.noise_multiplier)
        event = with_laplace(event) if self.mechanism.law == "laplace" else event
        count = self.releases * self.rounds
        if isinstance(moving.event, Levels):
            event, count = replace(moving.event, sampling_probability=1.0), self.rounds
        elif moving.order:  # of a filter with sampling nothing else is known without it
            event = Gaussian(moving.low)
        return spent([Charge(event, count)], self.delta, self.relation)

    def holds(self, units: int) -> bool:
        """Say whether no batch of so many units is larger than the mechanism takes.

        A Poisson batch may be, with a probability below 1e-12.

        Examples
        --------
        >>> from fedtune.config import Config
        >>> told = {"relation": "add-or-remove-one", "population": 400, "delta": 1e-5}
        >>> promise = example_promise(Config.model_validate({
        ...     "data": {"pack": False, "holdout": 0.0}, "federation": {"weighting": "uniform"},
        ...     "privacy": {"example": told | {"noise_multiplier": 1.0}},
        ...     "evaluation": {"clients": 0}}))
        >>> promise.holds(1024), promise.holds(100_000)
        (True, False)
        """
        mechanism = self.mechanism
        if isinstance(mechanism.sampler, Everyone):
            return units <= mechanism.most_drawn
        mean = mechanism.sampler.rate * units
        return bool(poisson.sf(mechanism.most_drawn, mean) < 1e-12)

    def blocks(self, names: tuple[str, ...], clip_norm: float) -> tuple[Block, ...]:
        """Return the blocks of a flat release, with the quantile rule's bits if it is on.

        Andrew et al. 2021, theorem 1: bits of +-1/2 with noise ``sigma_b`` and the
        update with a multiplier a little above z cost together exactly z.
        """
        settings = self.settings
        if settings.clip != "quantile":
            return self.mechanism.blocks_flat(names, clip_norm)
        sigma = self.bits_noise
        z = split_noise(self.mechanism.noise_multiplier, sigma)
        return (Block(names, clip_norm, z * clip_norm), Block((BITS,), 0.5, sigma))

    @property
    def bits_noise(self) -> float:
        """Standard deviation of the noise on the quantile rule's count."""
        least = self.mechanism.noise_multiplier  # below half of it nothing is left to share
        return self.settings.quantile_noise or max(self.mechanism.denominator / 20, 2 * least)


def example_promise(config: Config) -> Promise | None:
    """Return what ``[privacy.example]`` promises for each client's examples."""
    settings = config.privacy.example
    if settings is None:
        return None
    tuning = config.tuning
    batch = tuning.batch_size * tuning.accumulate
    sampler: Sampler = Everyone()
    if settings.sampler == "poisson":
        sampler = Poisson(batch / settings.population)
    # A number of steps that depended on the true number of examples would reveal it.
    steps = tuning.steps or math.ceil(tuning.epochs * settings.population / batch)
    rounds = config.federation.rounds
    mechanism = Mechanism(
        Unit.EXAMPLE, Relation(settings.relation), sampler,
        _noise_of(Unit.EXAMPLE, sampler, settings, steps, rounds), float(batch),
        micro_batch=tuning.batch_size,
        law=settings.noise,
    )  # fmt: skip
    return Promise(Unit.EXAMPLE, mechanism, settings, rounds, steps)


def client_promise(config: Config) -> Promise | None:
    """Return what ``[privacy.client]`` promises for whole clients."""
    settings = config.privacy.client
    if settings is None:
        return None
    share = config.federation.cohort
    probability = share if share <= 1 else share / settings.population
    samplers: dict[str, Callable[[], Sampler]] = {
        "everyone": Everyone,
        "poisson": lambda: Poisson(probability),
        "truncated-poisson": lambda: TruncatedPoisson(
            probability, settings.population, settings.cap
        ),
    }
    sampler = samplers[settings.sampler]()
    rounds = config.federation.rounds
    mechanism = Mechanism(
        Unit.CLIENT, Relation(settings.relation), sampler,
        _noise_of(Unit.CLIENT, sampler, settings, 1, rounds), probability * settings.population,
        micro_batch=1,
    )  # fmt: skip
    return Promise(Unit.CLIENT, mechanism, settings, rounds, 1)


def least_survivors(config: Config) -> int:
    """Return the fewest updates that a secure sum must hold; every client enforces it.

    Under a promise about clients it is a share of the public population, so that the noise
    does not depend on who came.

    Raises
    ------
    FedtuneError
        There is no secure aggregation.
    """
    secure, client = config.federation.secure, config.privacy.client
    if secure is None:
        raise FedtuneError("no [federation.secure]", code=ExitCode.CONFIG)
    return max(2, secure.least(client.population if client else secure.min_cohort))


def honest_survivors(config: Config) -> int:
    """Return how many honest clients' noise is in every secure sum, at least.

    Raises
    ------
    FedtuneError
        There is no secure aggregation, or nobody would be honest.
    """
    secure = config.federation.secure
    found = least_survivors(config) - (secure.colluding if secure else 0)
    if found < 1:
        raise FedtuneError(
            "federation.secure.colluding leaves nobody honest in the smallest sum",
            hint="raise federation.secure.threshold, or lower colluding", code=ExitCode.PRIVACY,
        )  # fmt: skip
    return found


def promises(config: Config) -> tuple[Promise, ...]:
    """Return every statement of an experiment; none without ``[privacy]``."""
    return tuple(p for p in (example_promise(config), client_promise(config)) if p is not None)


def resolve(config: Config) -> Config:
    """Write the noise that was found for a target epsilon into the settings.

    So that a run, its resumption and an auditor read one number instead of
    finding it again.

    Raises
    ------
    FedtuneError
        ``ExitCode.PRIVACY`` when no noise keeps the bound, or the given noise does not.
    """
    update = {}
    for name, promise in (("example", example_promise(config)), ("client", client_promise(config))):
        if promise is None:
            continue
        require_delta(promise.delta, promise.settings.population)
        _require_kept(promise)
        found: dict[str, object] = {"noise_multiplier": promise.mechanism.noise_multiplier}
        rldp, order = promise.settings.rldp, promise.moving.order
        if rldp is not None and order:
            # The best order depends on epsilon, which an owner may lower at a client.
            found["rldp"] = rldp.model_copy(update={"order": order})
        update[name] = promise.settings.model_copy(update=found)
    return config.model_copy(update={"privacy": config.privacy.model_copy(update=update)})


def dataset_name(config: Config) -> str:
    """Return the name under which the ledger knows this data."""
    source = config.data.source
    if config.privacy.dataset:
        return config.privacy.dataset
    return source if source.startswith(("fedtune:", "hub:")) else Path(source).name


def ledger_place(config: Config) -> str:
    """Return the file or the database URL of the ledger: the settings', or this machine's."""
    return config.privacy.ledger or default_ledger()


def default_ledger() -> str:
    """Return where this user's ledger is: one for all runs, whatever folder they are in.

    ``FEDTUNE_LEDGER`` if it is set, else ``fedtune/ledger.db`` in the user's data folder.
    """
    if given := os.environ.get("FEDTUNE_LEDGER"):
        return given if "://" in given else str(Path(given).expanduser().resolve())
    home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return str(Path(home) / "fedtune" / "ledger.db")


def noise_source(config: Config, *purpose: int | str) -> NoiseSource:
    """Return the source of noise and coins; a seeded one only where the settings say insecure."""
    if config.privacy.insecure_seeded_noise:
        return InsecureSeededNoise(derive(config.seed, "insecure-noise", *purpose))
    return SecureNoise()


def _noise_of(
    unit: Unit, sampler: Sampler, settings: ExamplePrivacyConfig | ClientPrivacyConfig,
    releases: int, rounds: int,
) -> float:  # fmt: skip
    if settings.noise_multiplier:
        return settings.noise_multiplier
    return _found(_course(unit, sampler, settings, releases, rounds))


def _course(
    unit: Unit, sampler: Sampler, settings: ExamplePrivacyConfig | ClientPrivacyConfig,
    releases: int, rounds: int,
) -> Course:  # fmt: skip
    rldp = settings.rldp
    return Course(
        rldp.noise if rldp else "constant", rldp.spread if rldp else 0.0, unit, sampler,
        Relation(settings.relation), getattr(settings, "noise", "gaussian") == "laplace",
        releases, rounds, settings.epsilon, settings.delta, rldp.order if rldp else 0.0,
    )  # fmt: skip


@lru_cache(maxsize=64)
def _found(course: Course) -> float:
    return noise_multiplier(
        course.epsilon, course.delta, course.relation, course.at(1.0).count * course.rounds,
        lambda z: course.at(z).event,
    )  # fmt: skip


def _require_kept(promise: Promise) -> None:
    if promise.limit is None:
        return
    bound = promise.spent()
    if not bound.epsilon <= promise.settings.epsilon:
        name = promise.unit.value
        raise FedtuneError(
            f"privacy.{name}.noise_multiplier={promise.mechanism.noise_multiplier:g} over "
            f"{promise.rounds} rounds costs epsilon {bound.epsilon:.4g}, more than "
            f"privacy.{name}.epsilon={promise.settings.epsilon:g}",
            hint="leave noise_multiplier out, and the smallest that keeps epsilon is found",
            code=ExitCode.PRIVACY,
        )


def rounds_that_fit(promise: Promise, epsilon: float) -> int:
    """Return how many rounds of this promise keep ``epsilon``."""
    charge = promise.charge
    found = most(charge.event, epsilon, promise.delta, promise.relation, {})
    return min(found // charge.count, _MOST_ROUNDS)
