"""The controller's actions without its learning: random ones, or the same one all the time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.config_privacy import RldpConfig
from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.rldp.actions import ActionSpace, interval_of, noise_of
from fedtune.privacy.rldp.joint import Seen
from fedtune.privacy.rldp.policy import Job, Policy, State
from fedtune.privacy.rldp.quantiles import norms_of, quantile_of, require_like, unusable
from fedtune.privacy.rldp.shape import Sensing, Shape
from fedtune.privacy.rldp.sight import require_sight

__all__ = ["Steered", "constant_action", "random_walk"]


class Steered:
    """Takes actions as the controller does, at the same times, and learns nothing from them.

    Parameters
    ----------
    job : Job
        Option ``rldp``: `RldpConfig`; interval, warm-up, factors and noise are those of the
        controller, and so is what moves norms between two actions.
    action : callable
        Number of a decision, from 0, to an action in [-1, 1].
    """

    honest = True

    def __init__(self, job: Job, action: Callable[[int], NDArray[np.float64]]) -> None:
        settings = job.options.get("rldp") or RldpConfig()
        self._settings, self._action = settings, action
        self._space = ActionSpace(job.sizes, job.clip_norm, settings.factors)
        self._rule = quantile_of(job)
        # As the controller's: half of the share is for its loss, where it learns from that.
        bits = settings.sensing / (2.0 if settings.reward == "loss" and job.losses else 1.0)
        self._sensing = Sensing(bits=bits)
        self._until = math.ceil(settings.warmup * job.steps)
        self._every = interval_of(settings, job.steps)
        self._planned = job.noise_multiplier
        self._count = 0
        self._shape = self._space.start()
        self._starts = self._shape.norms
        self._said: list[dict[str, Any]] = []
        if not self._until:
            self._decide()

    @property
    def sensing(self) -> Sensing:
        """See ``Policy``."""
        return self._sensing

    def shape(self) -> Shape:
        """See ``Policy``."""
        return self._shape

    def wanted_noise(self) -> float | None:
        """See ``Policy``."""
        if self._settings.noise == "constant" or self._count < self._until:
            return None
        return noise_of(self._last(), self._planned, self._settings.spread)

    def observe(self, seen: Seen) -> None:
        """See ``Policy``."""
        inside, decided = require_sight(seen.inside), self._count >= self._until
        if inside is not None and not (decided and self._settings.preset):
            last = self._last() if decided else np.zeros(self._space.size)
            self._shape = self._space.followed(self._shape, self._rule, np.asarray(inside), last)
        self._count += 1
        if self._count >= self._until and (self._count - self._until) % self._every == 0:
            self._decide()

    def _last(self) -> NDArray[np.float64]:
        return self._action((self._count - self._until) // self._every)

    def _decide(self) -> None:
        action = self._last()
        self._shape = self._space.apply(self._shape, action)
        self._said.append({"step": self._count, "action": [float(a) for a in action]})

    def decisions(self) -> list[dict[str, Any]]:
        """See ``Policy``."""
        said, self._said = self._said, []
        return said

    def state(self) -> State:
        """See ``Policy``."""
        return {
            "count": np.array([self._count], np.int64),
            "norms": np.array(self._shape.norms),
            "shares": np.array(self._shape.shares),
        }

    def restore(self, state: State) -> None:
        """See ``Policy``."""
        require_like(state, self.state(), "steered")
        norms = norms_of(state, self._starts, "steered")
        shares = tuple(float(share) for share in state["shares"])
        if int(state["count"][0]) < 0 or min(shares) <= 0.0 or abs(math.fsum(shares) - 1.0) > 1e-6:
            raise unusable("steered", f"count {state['count']}, shares {shares}")
        self._count = int(state["count"][0])
        self._shape = Shape(self._space.blocks, norms, shares)
        self._said = []


def random_walk(job: Job) -> Policy:
    """Return a policy that takes uniformly random actions: what learning has to beat."""
    size = ActionSpace(job.sizes, job.clip_norm).size

    def action(number: int) -> NDArray[np.float64]:
        # Made from the number, so that a resumed run needs no generator's state.
        return np.random.default_rng([job.seed % 2**64, number]).uniform(-1.0, 1.0, size)

    return Steered(job, action)


def constant_action(job: Job) -> Policy:
    """Return a policy that takes one action again and again: option ``constant``.

    Raises
    ------
    FedtuneError
        The action is not as many numbers from -1 to 1 as there are.
    """
    size = ActionSpace(job.sizes, job.clip_norm).size
    given = tuple(job.options.get("constant", ()))
    fine = len(given) == size and all(
        isinstance(a, int | float) and not isinstance(a, bool) and -1.0 <= a <= 1.0 for a in given
    )
    if not fine:
        raise FedtuneError(
            f"constant={given!r}", hint=f"{size} numbers from -1 to 1", code=ExitCode.CONFIG
        )
    held = np.array(given, np.float64)
    return Steered(job, lambda number: held)
