"""The ledger behind Flower's ``PrivacyAccountant``, so that any Flower strategy can use it.

The only file of this room that imports Flower. A strategy asks ``would_exceed``
before a round and calls ``compose`` before it returns the noisy sum; each
``compose`` is a reservation and a release in the ledger, durable when it returns,
and raises when another job has spent the budget meanwhile: the sum then never
leaves the strategy.

Numbers are of the account, not of the job: people do not care which job it was.

What Flower's words cost here, all under add-or-remove-one:

``POISSON``
    ``PoissonGaussian(sample_size / population_size, z)``.
``NO_AMPLIFICATION``
    ``Gaussian(z / 2)``. A cohort of fixed size has no fewer members without a
    client: somebody else takes the place, so that the sum moves by up to twice the
    clip norm. (By quasi-convexity over who that is, the swap is the worst case.)
    Flower's own accountant charges ``Gaussian(z)``, which bounds only that a client's
    update becomes zero. The population size is public.
``WITHOUT_REPLACEMENT`` with ``REPLACE_ONE``
    Refused: ``dp_accounting`` answers it for noise over *twice* the clip norm, and a
    strategy gives noise over the clip norm.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from flwr.serverapp import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyAccountant,
    PrivacyConfig,
    PrivacySpent,
    SamplingMethod,
)

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy import accounting
from fedtune.privacy.bounds import rdp_log_delta
from fedtune.privacy.events import Event, Gaussian, PoissonGaussian, Relation, from_json
from fedtune.privacy.ledger import Account, Claim, Ledger
from fedtune.privacy.ledger_records import event_json, named

__all__ = ["LedgerAccountant", "event_of"]

STATE_SCHEMA = 1
METHOD = "fedtune-ledger"


@dataclass(frozen=True)
class LedgerAccountant:
    """Flower's ``PrivacyAccountant`` over one account of a ledger.

    Parameters
    ----------
    ledger : Ledger
    account : Account
        Its relation must be add-or-remove-one.
    given : PrivacyConfig
        ``max_epsilon`` at ``target_delta`` is for ``would_exceed``, beside the owner's
        cap. ``compose`` keeps to the owner's cap, which alone holds against other jobs.
    job : str
        What the ledger calls this training.

    Raises
    ------
    FedtuneError
        ``ExitCode.PRIVACY`` for a sampling or a relation that cannot be accounted.

    Examples
    --------
    Ten rounds of 30 clients out of 300, independent coins:

    >>> import tempfile
    >>> from pathlib import Path
    >>> from fedtune.privacy.events import Unit
    >>> from fedtune.privacy.ledger import open_ledger
    >>> folder = tempfile.TemporaryDirectory()
    >>> ledger = open_ledger(Path(folder.name) / "ledger.db")
    >>> phones = ledger.account("phones", Unit.CLIENT, Relation.ADD_OR_REMOVE_ONE)
    >>> config = PrivacyConfig(
    ...     1e-5, 300, NeighboringRelation.ADD_OR_REMOVE_ONE, SamplingMethod.POISSON, 2.0
    ... )
    >>> accountant = LedgerAccountant(ledger, phones, config, "job")
    >>> accountant.compose(GaussianPrivacyEvent(1.0, 30, 300), count=10)
    >>> f"{accountant.get_epsilon(1e-5):.2f}", accountant.num_releases
    ('2.85', 10)
    >>> folder.cleanup()
    """

    ledger: Ledger
    account: Account
    given: PrivacyConfig
    job: str

    def __post_init__(self) -> None:
        """Refuse what has no true account."""
        named("job", self.job)
        if self.account.relation is not Relation.ADD_OR_REMOVE_ONE:
            raise _refused(
                f"relation '{self.account.relation.value}' of data set '{self.account.dataset}'",
                "Flower accounts under add-or-remove-one: use an account with that relation",
            )
        _require_accountable(self.given)
        accounting.require_delta(self.given.target_delta, self.given.population_size)

    @property
    def config(self) -> PrivacyConfig:
        """What was given; without an own ``max_epsilon``, the owner's cap.

        A strategy asks ``would_exceed`` only when there is a ``max_epsilon``.
        """
        if self.given.max_epsilon is not None:
            return self.given
        return replace(self.given, max_epsilon=self._now().epsilon)

    @property
    def num_releases(self) -> int:
        """Releases that count, of all jobs."""
        return sum(self.ledger.groups(self.account).values())

    def compose(self, event: GaussianPrivacyEvent, count: int = 1) -> None:
        """Charge releases, durably; raise ``BUDGET_EXHAUSTED`` when they do not fit.

        A process that dies in here has charged them or not, and released nothing.
        """
        done = sum(self.ledger.groups(self.account, self.job).values())
        claim = self._claim(event, count, done)
        self.ledger.release(self.ledger.reserve(self.account, claim))

    def get_epsilon(self, delta: float) -> float:
        """Return epsilon of all that counts: the smallest valid bound (up to seconds)."""
        return self.ledger.spent(self.account, delta).epsilon

    def get_delta(self, epsilon: float) -> float:
        """Return delta of all that counts at ``epsilon``, by the Renyi bound."""
        if isinstance(epsilon, bool) or not math.isfinite(epsilon) or epsilon < 0:
            raise _refused(f"epsilon = {epsilon!r}", "epsilon is finite and not negative")
        vector = self.ledger.renyi(self.account)
        if not vector.any():
            return 0.0
        return float(np.exp(rdp_log_delta(vector, np.array([epsilon]))[0]))

    def get_privacy_spent(self, delta: float | None = None) -> PrivacySpent:
        """Return what all that counts has cost."""
        found = self.ledger.spent(self.account, self.given.target_delta if delta is None else delta)
        return PrivacySpent(
            epsilon=found.epsilon,
            delta=found.delta,
            num_releases=found.releases,
            accounting_method=found.accountant,
            optimal_order=found.order if found.accountant == "rdp" else None,
        )

    def would_exceed(
        self, event: GaussianPrivacyEvent, max_epsilon: float | None = None, count: int = 1
    ) -> bool:
        """Return whether releases would pass ``max_epsilon`` or the owner's cap."""
        limit = self.given.max_epsilon if max_epsilon is None else max_epsilon
        if limit is None and self._now().epsilon is None:
            raise _refused(
                "no max_epsilon and no budget to compare with",
                "give max_epsilon, or set a budget: fedtune budget set",
            )
        claim = self._claim(event, count, 0)
        if limit is None:
            return not self.ledger.admits(self.account, claim)
        return not self.ledger.admits(self.account, claim, (limit, self.given.target_delta))

    def state_dict(self) -> dict[str, object]:
        """Return what counts now, as JSON; the ledger itself stays where it is."""
        groups = [
            {"event": event_json(event), "count": count}
            for event, count in self.ledger.groups(self.account).items()
        ]
        account = self.account
        return {
            "schema_version": STATE_SCHEMA, "backend": METHOD, "config": _plain(self.given),
            "account": [account.dataset, account.unit.value, account.relation.value],
            "groups": groups,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Check that the ledger holds at least what the state says; change nothing.

        A checkpoint is older than the ledger, never the other way round: a ledger that
        holds less was lost or exchanged.
        """
        account = self.account
        expected = {
            "schema_version": STATE_SCHEMA, "backend": METHOD, "config": _plain(self.given),
            "account": [account.dataset, account.unit.value, account.relation.value],
        }  # fmt: skip
        for name, value in expected.items():
            if state.get(name) != value:
                raise _refused(
                    f"accountant state: {name} is {state.get(name)!r}, not {value!r}",
                    "go on with the settings and the ledger that the state was made with",
                )
        kept = self.ledger.groups(account)
        for event, count in _groups(state.get("groups")).items():
            if kept.get(event, 0) < count:
                raise FedtuneError(
                    f"the ledger holds {kept.get(event, 0)} x {event} for data set "
                    f"'{account.dataset}', the state {count}",
                    hint="restore the ledger that was in use; history is never dropped",
                    code=ExitCode.LEDGER,
                )

    def _now(self) -> Account:
        return self.ledger.account(self.account.dataset, self.account.unit, self.account.relation)

    def _claim(self, event: GaussianPrivacyEvent, count: int, number: int) -> Claim:
        if event.population_size != self.given.population_size:
            raise _refused(
                f"population_size = {event.population_size}",
                f"the population of this account is {self.given.population_size}",
            )
        ours = event_of(event, self.given.sampling_method)
        detail = {"flower": asdict(event), "sampling": self.given.sampling_method.value}
        # Flower has no attempts. A random one: no two calls can share a reservation.
        return Claim(self.job, number, secrets.randbelow(2**52), ours, count, "flower", detail)


def event_of(event: GaussianPrivacyEvent, sampling: SamplingMethod) -> Event:
    """Return what a Flower event costs under add-or-remove-one; see the module.

    Examples
    --------
    >>> event_of(GaussianPrivacyEvent(1.0, 30, 300), SamplingMethod.POISSON)
    PoissonGaussian(sampling_probability=0.1, noise_multiplier=1.0)
    >>> event_of(GaussianPrivacyEvent(1.0, 30, 300), SamplingMethod.NO_AMPLIFICATION)
    Gaussian(noise_multiplier=0.5)
    """
    if sampling is SamplingMethod.POISSON:
        return PoissonGaussian(event.sample_size / event.population_size, event.noise_multiplier)
    if sampling is SamplingMethod.NO_AMPLIFICATION:
        return Gaussian(event.noise_multiplier / 2)
    raise _refused(f"sampling_method = '{sampling.value}'", "use poisson or no-amplification")


def _require_accountable(config: PrivacyConfig) -> None:
    if config.neighboring_relation is not NeighboringRelation.ADD_OR_REMOVE_ONE:
        raise _refused(
            f"neighboring_relation = '{config.neighboring_relation.value}'",
            "use add-or-remove-one with poisson or no-amplification",
        )
    if config.sampling_method is SamplingMethod.WITHOUT_REPLACEMENT:
        raise _refused("sampling_method = 'without-replacement'", "use poisson or no-amplification")


def _plain(config: PrivacyConfig) -> dict[str, Any]:
    return {
        "target_delta": config.target_delta,
        "population_size": config.population_size,
        "neighboring_relation": config.neighboring_relation.value,
        "sampling_method": config.sampling_method.value,
        "max_epsilon": config.max_epsilon,
    }


def _groups(value: object) -> dict[Event, int]:
    """Read the groups of a state; raise for anything that is none."""
    found: dict[Event, int] = {}
    for group in value if isinstance(value, list) else [None]:
        event = group.get("event") if isinstance(group, Mapping) else None
        count = group.get("count") if isinstance(group, Mapping) else None
        if not isinstance(event, Mapping) or isinstance(count, bool) or not isinstance(count, int):
            raise _refused("accountant state: groups cannot be read", "use another checkpoint")
        read = from_json(event)
        found[read] = found.get(read, 0) + count
    return found


def _refused(what: str, hint: str) -> FedtuneError:
    return FedtuneError(what, hint=hint, code=ExitCode.PRIVACY)


def _conforms(accountant: LedgerAccountant) -> PrivacyAccountant:
    """Let the type checker compare with Flower's protocol."""
    return accountant
