"""All policies by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.events import Unit
from fedtune.privacy.plan import Promise
from fedtune.privacy.rldp.controller import rldp
from fedtune.privacy.rldp.geoclip import geoclip
from fedtune.privacy.rldp.policy import Job, Policy, Utility, require_honest
from fedtune.privacy.rldp.rules import (
    automatic,
    closed_form,
    constant_action,
    dp_lac,
    fixed_flat,
    fixed_per_adapter,
    quantile_flat,
    quantile_per_adapter,
    random_walk,
)

__all__ = ["POLICIES", "make_policy", "policy_of"]

POLICIES: dict[str, Callable[[Job], Policy]] = {
    "flat": fixed_flat,
    "per-adapter": fixed_per_adapter,
    "automatic": automatic,
    "quantile": quantile_flat,
    "quantile-per-adapter": quantile_per_adapter,
    "closed-form": closed_form,
    "dp-lac": dp_lac,
    "geoclip": geoclip,
    "random": random_walk,
    "constant": constant_action,
    "rldp": rldp,
}
"""``clip`` of the settings, and what makes it."""


def make_policy(name: str, job: Job) -> Policy:
    """Return a policy that has seen nothing yet.

    Raises
    ------
    FedtuneError
        There is none of this name.
    """
    if name not in POLICIES:
        raise FedtuneError(
            f"clip='{name}'", hint=f"one of {', '.join(sorted(POLICIES))}", code=ExitCode.CONFIG
        )
    return POLICIES[name](job)


def policy_of(
    promise: Promise, sizes: Mapping[str, int], seed: int, utility: Utility | None = None
) -> Policy:
    """Return the policy of a promise, as it is before its first release.

    Parameters
    ----------
    promise : Promise
    sizes : mapping of str to int
        Numbers in each parameter.
    seed : int
        Of the policy's own random numbers, which are no secret.
    utility : callable, optional
        Measures on public text.

    Raises
    ------
    FedtuneError
        The policy would see private values.
    """
    settings, mechanism = promise.settings, promise.mechanism
    names = ("quantile", "quantile_lr", "quantile_noise", "constant", "rldp")
    job = Job(
        sizes=dict(sizes), steps=promise.rounds * promise.releases,
        noise_multiplier=mechanism.noise_multiplier, denominator=mechanism.denominator,
        clip_norm=settings.clip_norm, seed=seed, utility=utility,
        losses=promise.unit is Unit.EXAMPLE,
        options={name: getattr(settings, name) for name in names},
    )  # fmt: skip
    policy = make_policy(settings.clip, job)
    require_honest(policy)
    return policy
