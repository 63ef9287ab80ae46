"""What chooses the shape of releases, whatever it is, and how it is made by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from numpy.typing import NDArray

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.rldp.joint import Seen
from fedtune.privacy.rldp.shape import Sensing, Shape
from fedtune.privacy.rldp.sight import Public

__all__ = ["Job", "Peeking", "Policy", "State", "Utility", "require_honest"]

State = dict[str, NDArray[Any]]
"""A policy's memory, for a checkpoint: names and arrays, no other types."""

Utility = Callable[[], Public[float]]
"""Measures the released weights on public text: higher is better."""


class Policy(Protocol):
    """Chooses the shape of each release from what was released before.

    The loop is ``shape() -> release -> observe(seen) -> shape() -> ...``. A policy holds no
    reference to a model, to data or to a batch, and draws random numbers from its own
    seeded generators alone.
    """

    @property
    def honest(self) -> bool:
        """Whether it sees nothing but `Seen`; otherwise no privacy may be stated."""
        ...

    @property
    def sensing(self) -> Sensing:
        """The sensors it needs in every release."""
        ...

    def shape(self) -> Shape:
        """Return the shape of the next release; asked twice, the same."""
        ...

    def wanted_noise(self) -> float | None:
        """Return the noise multiplier it would like next; None: what is planned."""
        ...

    def observe(self, seen: Seen) -> None:
        """Take note of a release."""
        ...

    def decisions(self) -> list[dict[str, Any]]:
        """Return what it decided since it was asked last, for the log; often nothing."""
        ...

    def state(self) -> State:
        """Return all that it remembers."""
        ...

    def restore(self, state: State) -> None:
        """Go on from what `state` returned; raise for anything else."""
        ...


@runtime_checkable
class Peeking(Protocol):
    """A policy that looks at private values. For comparison alone: it has no privacy."""

    def peek(self, norms: torch.Tensor, losses: torch.Tensor) -> None:
        """Look at unclipped norms (B, blocks) and losses (B,)."""
        ...


def require_honest(policy: Policy) -> None:
    """Refuse a policy that no privacy may be stated of.

    Raises
    ------
    FedtuneError
        ``ExitCode.PRIVACY``
    """
    if not policy.honest or isinstance(policy, Peeking):
        raise FedtuneError(
            f"'{type(policy).__name__}' sees private values: NOT differentially private, and no "
            "privacy statement can be made of it",
            hint="it is for comparison in benchmarks; use clip='rldp'", code=ExitCode.PRIVACY,
        )  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What a policy is told about its task when it is made; all public.

    Attributes
    ----------
    sizes : mapping of str to int
        Numbers in each parameter, in the order of names.
    steps : int
        T: releases of the whole run.
    noise_multiplier : float
        z of a release, as planned.
    denominator : float
        m: expected units in a release.
    clip_norm : float
        C of the settings: the norm of the whole gradient to begin with.
    seed : int
        Of the policy's own random numbers.
    utility : callable or None
        Measures on public text, where there is any.
    losses : bool
        Whether units have a loss that a sensor can take: examples do, clients do not.
    options : mapping of str to object
        The policy's own settings.
    """

    sizes: Mapping[str, int]
    steps: int
    noise_multiplier: float
    denominator: float
    clip_norm: float
    seed: int = 0
    utility: Utility | None = None
    losses: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
