"""DP-LAC: a private search for one norm, which then follows released gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.privacy.rldp.joint import Seen
from fedtune.privacy.rldp.policy import Job, Policy, State
from fedtune.privacy.rldp.quantiles import (
    bounded,
    norms_of,
    quantile_of,
    refused,
    require_like,
    unusable,
)
from fedtune.privacy.rldp.shape import Sensing, Shape, flat
from fedtune.privacy.rldp.sight import require_sight

__all__ = ["Lac", "dp_lac"]

_PROBES = 8  # releases in which it looks for its first norm
_PROBE_SHARE = 0.05
_FOLLOWED = 10.0  # how far it goes from that norm


class Lac:
    """Looks for one norm with bits in the first releases; then follows, free of charge.

    From the abstract of DP-LAC (2605.10272) alone: "estimates an initial clipping
    threshold within an order of magnitude of the optimum using private histogram
    estimation, and then adapts this threshold without consuming additional privacy
    budget". The text was not at hand, so that **both halves are ours**:

    * In place of a histogram, one clip bit in each of the first 8 releases, at 5 % of
      their privacy. The norm is moved by a factor of 4 toward the quantile until it has
      passed it; then the steps are halved. These releases also train.
    * Then no sensors. ``|g|^2 - d s^2`` of a released mean is an unbiased estimate of the
      squared norm of the clipped mean. The norm is that at the end of the search times the
      root of its running mean over the mean right after the search, both raised by two
      standard errors, so that noise alone moves little; within a factor of 10.
    """

    honest = True

    def __init__(self, job: Job) -> None:
        self._names = tuple(job.sizes)
        self._size = sum(job.sizes.values())
        self._target = quantile_of(job).target
        self._probes = min(_PROBES, max(1, job.steps // 4))
        self._window = min(20, max(1, job.steps // 10))
        self._start = self._norm = self._found = job.clip_norm
        self._count = 0
        self._stride, self._way = math.log(4.0), 0
        self._passed = False
        self._energy = self._first = self._error = 0.0

    @property
    def sensing(self) -> Sensing:
        """See ``Policy``: bits in the first releases only."""
        return Sensing(bits=_PROBE_SHARE if self._count < self._probes else 0.0)

    def shape(self) -> Shape:
        """See ``Policy``."""
        return flat(self._names, self._norm)

    def wanted_noise(self) -> float | None:
        """See ``Policy``."""
        return None

    def observe(self, seen: Seen) -> None:
        """See ``Policy``."""
        if self._count < self._probes:
            self._search(require_sight(seen.inside))
        else:
            self._follow(seen)
        self._count += 1

    def _search(self, inside: tuple[float, ...] | None) -> None:
        if inside is None:
            raise refused("dp-lac was shown no clip bit", "release with policy.sensing")
        if not math.isfinite(inside[0]):
            raise refused(f"share inside {inside[0]!r}", "use what a mechanism released")
        way = 1 if inside[0] < self._target else -1
        self._passed = self._passed or way == -self._way
        if self._passed:
            self._stride /= 2.0
        self._way = way
        self._norm = self._found = bounded(self._norm * math.exp(way * self._stride), self._start)

    def _follow(self, seen: Seen) -> None:
        (deviation,) = require_sight(seen.deviations)
        means: Mapping[str, NDArray[np.float32]] = require_sight(seen.means)
        square = sum(float(np.square(value, dtype=np.float64).sum()) for value in means.values())
        if not math.isfinite(square):
            raise refused("a released mean is not finite", "use what a mechanism released")
        energy = square - self._size * deviation**2
        done = self._count - self._probes + 1
        self._energy += (energy - self._energy) / min(done, self._window)
        error = deviation**2 * math.sqrt(2.0 * self._size / self._window)
        if done <= self._window:
            self._first, self._error = self._energy, error
            return
        error = max(error, self._error)  # the larger, so that louder noise does not feed itself
        now, first = (max(e + 2.0 * error, error / 2.0) for e in (self._energy, self._first))
        ratio = math.sqrt(now / first) if first > 0.0 else 1.0
        ratio = min(max(ratio, 1.0 / _FOLLOWED), _FOLLOWED)
        self._norm = bounded(self._found * ratio, self._start)

    def decisions(self) -> list[dict[str, Any]]:
        """See ``Policy``."""
        return []

    def state(self) -> State:
        """See ``Policy``."""
        return {
            "norms": np.array([self._norm, self._found]),
            "count": np.array([self._count, self._way, int(self._passed)], np.int64),
            "search": np.array([self._stride]),
            "energy": np.array([self._energy, self._first, self._error]),
        }

    def restore(self, state: State) -> None:
        """See ``Policy``."""
        require_like(state, self.state(), "dp-lac")
        norms = norms_of(state, (self._start,) * 2, "dp-lac")
        count, way, passed = (int(number) for number in state["count"])
        stride = float(state["search"][0])
        if count < 0 or way not in (-1, 0, 1) or passed not in (0, 1) or not 0.0 < stride < 2.0:
            raise unusable("dp-lac", f"count {count}, {way}, {passed}, stride {stride!r}")
        self._norm, self._found = norms
        self._count, self._way, self._passed, self._stride = count, way, bool(passed), stride
        self._energy, self._first, self._error = (float(number) for number in state["energy"])


def dp_lac(job: Job) -> Policy:
    """Return a policy after the abstract of DP-LAC: see `Lac` for what is ours."""
    return Lac(job)
