"""GeoClip for single coordinates: clip where gradients are known to vary, from releases alone.

Gilani et al. 2025 (2506.06549) clip ``M (g - a)`` and turn the noisy result back. For a
given expected norm the transformation of least noise is proportional to ``Lambda^(-1/4)
U^T``, with the gradients' covariance ``U Lambda U^T``. They estimate it from what was
released before, so that it costs nothing.

What differs here:

* Diagonal: one scale ``lambda_j^(-1/4)`` for each coordinate, and no eigenvectors.
* No centring: ``a = 0``. What counts then is the mean *square* of a coordinate over examples.
  The variance of a Poisson-sampled sum is made of just that, because the size of the batch is
  random too: ``Var(sum / m) = (1 - q) / m`` times the mean square.
* The variance of our own noise is known and is subtracted. A single coordinate hardly
  stands out of the noise of one run (its share is about ``m / (d z^2)``), so estimates are
  drawn toward the mean of their tensor, and tensors toward the mean of all, by as much as
  noise explains their spread (James and Stein). Without evidence nothing is scaled.
* Scales have mean logarithm 0 and stay within [1 / h, h].
* The norm in scaled coordinates is moved by a clip bit, as in `quantile_flat`, unless that is
  switched off.
"""

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
    moved,
    noise_share,
    norms_of,
    option,
    quantile_of,
    refused,
    require_like,
    unusable,
)
from fedtune.privacy.rldp.shape import Sensing, Shape
from fedtune.privacy.rldp.sight import require_sight

__all__ = ["GeoClip", "geoclip", "scales_of", "shrunk"]

Arrays = dict[str, NDArray[np.float32]]
_KINDS = ("mean", "square", "noise")


def shrunk(
    squares: Mapping[str, NDArray[np.float64]], errors: Mapping[str, NDArray[np.float64]]
) -> dict[str, NDArray[np.float64]] | None:
    """Return noisy estimates of mean squares, drawn together as far as noise explains them.

    Parameters
    ----------
    squares : mapping of str to float64 array
        Unbiased estimates; any may be below 0.
    errors : mapping of str to float64 array
        Their standard errors, above 0, in the same shapes.

    Returns
    -------
    dict of str to float64 array, or None
        All above 0. None: even the mean of all is less than two of its standard errors.

    Examples
    --------
    >>> found = shrunk({"a": np.array([1.0, 1.2, 0.8, 9.0])}, {"a": np.full(4, 0.1)})
    >>> [round(float(x), 2) for x in found["a"]]
    [1.0, 1.2, 0.8, 9.0]
    >>> found = shrunk({"a": np.array([1.0, 1.2, 0.8, 1.0])}, {"a": np.full(4, 0.2)})
    >>> [round(float(x), 2) for x in found["a"]]
    [1.0, 1.0, 1.0, 1.0]
    """
    sizes = np.array([value.size for value in squares.values()], np.float64)
    noise = np.array([float(np.mean(errors[name] ** 2)) for name in squares])
    means = np.array([float(value.mean()) for value in squares.values()])
    total = float(sizes.sum())
    middle = float((sizes * means).sum()) / total
    error = math.sqrt(float((sizes * noise).sum())) / total
    if not middle > 2.0 * error:
        return None
    kept = _kept(float(np.mean((means - middle) ** 2)), float(np.mean(noise / sizes)))
    found = {}
    for (name, value), mean, own, size in zip(squares.items(), means, noise, sizes, strict=True):
        center = max(middle + kept * (mean - middle), min(math.sqrt(own / size), middle))
        share = _kept(float(np.mean((value - mean) ** 2)), own)
        least = np.minimum(errors[name], center)
        found[name] = np.maximum(center + share * (value - mean), least)
    return found


def _kept(spread: float, noise: float) -> float:
    return max(0.0, 1.0 - noise / spread) if spread > 0.0 else 0.0


def scales_of(squares: Mapping[str, NDArray[np.float64]], limit: float) -> Arrays:
    """Return ``lambda^(-1/4)``, with mean logarithm 0 before it is cut to [1 / limit, limit].

    Examples
    --------
    >>> scales_of({"a": np.array([1.0]), "b": np.array([16.0])}, 10.0)["a"].round(4)
    array([1.4142], dtype=float32)
    """
    logs = {name: -0.25 * np.log(value) for name, value in squares.items()}
    count = sum(value.size for value in logs.values())
    middle = math.fsum(float(value.sum()) for value in logs.values()) / count
    most = math.log(limit)
    return {
        name: np.exp(np.clip(value - middle, -most, most)).astype(np.float32)
        for name, value in logs.items()
    }


class GeoClip:
    """Scales by coordinate from released means; one norm.

    Parameters
    ----------
    job : Job
        Options ``geoclip_every`` (releases between updates; 0: T / 40), ``geoclip_warmup``
        (releases before the first; 0: T / 10, at least 10), ``geoclip_window`` (releases that
        count; 0: T / 5, from 10 to 100), ``geoclip_limit`` (h, 10), ``geoclip_quantile`` (1: the
        norm is moved by a bit; 0: it is not) and those of `quantile_flat`.
    """

    honest = True

    def __init__(self, job: Job) -> None:
        self._sizes = dict(job.sizes)
        self._start = self._norm = job.clip_norm
        self._limit = option(job, "geoclip_limit", 10.0)
        if self._limit < 1.0:
            raise refused(f"geoclip_limit={self._limit!r}", "use 1 or more")
        self._every = _whole(job, "geoclip_every") or max(1, job.steps // 40)
        self._warmup = _whole(job, "geoclip_warmup") or max(10, job.steps // 10)
        window = _whole(job, "geoclip_window") or min(100, max(10, job.steps // 5))
        self._decay = 1.0 - 1.0 / window
        self._moves = bool(option(job, "geoclip_quantile", 1.0))
        self._rule = quantile_of(job)
        self.sensing = Sensing(bits=noise_share(job) if self._moves else 0.0)
        # In units of the first noise, so that squares fit float32.
        self._unit = job.noise_multiplier * job.clip_norm / job.denominator
        self._count = 0
        self._weight = self._weight_squared = 0.0
        self._sums: dict[str, Arrays] = {}
        self._scales: Arrays | None = None

    def shape(self) -> Shape:
        """See ``Policy``."""
        return Shape((tuple(self._sizes),), (self._norm,), (1.0,), scales=self._scales)

    def wanted_noise(self) -> float | None:
        """See ``Policy``."""
        return None

    def observe(self, seen: Seen) -> None:
        """See ``Policy``."""
        means: Mapping[str, NDArray[np.float32]] = require_sight(seen.means)
        (deviation,) = require_sight(seen.deviations)
        inside = require_sight(seen.inside)
        sizes = {name: value.size for name, value in means.items()}
        if sizes != self._sizes or not all(bool(np.isfinite(v).all()) for v in means.values()):
            raise refused(
                "released means are not of the parameters, or not finite", "use one model"
            )
        if self._moves and inside is not None:
            self._norm = moved(self._rule, self._norm, inside[0], self._start)
        self._add(means, deviation, seen.shape.scales)
        self._count += 1
        if self._count >= self._warmup and (self._count - self._warmup) % self._every == 0:
            self._rescale()

    def _add(
        self, means: Mapping[str, NDArray[np.float32]], deviation: float,
        scales: Mapping[str, NDArray[np.float32]] | None,
    ) -> None:  # fmt: skip
        """Take a release into running means; older ones fade."""
        if not self._sums:
            zeros = {name: np.zeros(value.shape, np.float32) for name, value in means.items()}
            self._sums = {kind: dict(zeros) for kind in _KINDS}
        self._weight = 1.0 + self._decay * self._weight
        self._weight_squared = 1.0 + self._decay**2 * self._weight_squared
        part = np.float32(1.0 / self._weight)
        noise = deviation / self._unit
        for name, value in means.items():
            given = (value / self._unit).astype(np.float32)
            spread = np.full_like(given, noise) if scales is None else noise / scales[name]
            new = {"mean": given, "square": np.square(given), "noise": np.square(spread)}
            for kind, one in new.items():
                old = self._sums[kind][name]
                self._sums[kind][name] = (old + (one - old) * part).astype(np.float32)

    def _rescale(self) -> None:
        number = self._weight**2 / self._weight_squared  # releases that these means stand for
        if number < 2.0:
            return
        squares, errors = {}, {}
        for name in self._sizes:
            mean, square, noise = (self._sums[kind][name].astype(np.float64) for kind in _KINDS)
            squares[name] = (square - mean**2) / (1.0 - 1.0 / number) - noise
            errors[name] = noise * math.sqrt(2.0 / number)
        found = shrunk(squares, errors)
        if found is None:
            return
        scales = scales_of(found, self._limit)
        before, after = (_norm_squared(found, one) for one in (self._scales, scales))
        # The norm that the same gradients have in the new coordinates.
        self._norm = bounded(self._norm * math.sqrt(after / before), self._start)
        self._scales = scales

    def decisions(self) -> list[dict[str, Any]]:
        """See ``Policy``."""
        return []

    def state(self) -> State:
        """See ``Policy``."""
        found: State = {
            "norms": np.array([self._norm]),
            "count": np.array([self._count], np.int64),
            "weights": np.array([self._weight, self._weight_squared]),
        }
        kept = self._sums | ({"scale": self._scales} if self._scales is not None else {})
        for kind, arrays in kept.items():
            found |= {f"{kind}/{name}": value.copy() for name, value in arrays.items()}
        return found

    def restore(self, state: State) -> None:
        """See ``Policy``."""
        kinds = [
            kind for kind in (*_KINDS, "scale") if any(n.startswith(f"{kind}/") for n in state)
        ]
        own = {n: v for n, v in self.state().items() if n in ("norms", "count", "weights")}
        for name, size in self._sizes.items():
            given = np.asarray(state.get(f"mean/{name}", np.zeros(size)))
            if given.size != size:
                raise unusable("geoclip", f"'{name}' of {given.size} numbers, not {size}")
            own |= {f"{kind}/{name}": np.zeros(given.shape, np.float32) for kind in kinds}
        require_like(state, own, "geoclip")
        (count,), (weight, squared) = state["count"], state["weights"]
        held = {
            kind: {name: state[f"{kind}/{name}"].copy() for name in self._sizes} for kind in kinds
        }
        scales = held.pop("scale", None)
        if count < 0 or bool(count) != bool(held) or (held and set(held) != set(_KINDS)):
            raise unusable("geoclip", f"count {count} with {kinds}")
        if held and not weight >= 1.0 <= squared:
            raise unusable("geoclip", f"weights {weight}, {squared}")
        if any(bool((v < 0).any()) for kind in held if kind != "mean" for v in held[kind].values()):
            raise unusable("geoclip", "a mean square is below 0")
        if scales is not None and any(bool((v <= 0).any()) for v in scales.values()):
            raise unusable("geoclip", "a scale is not above 0")
        (self._norm,) = norms_of(state, (self._start,), "geoclip")
        self._count, self._weight, self._weight_squared = int(count), float(weight), float(squared)
        self._sums, self._scales = held, scales


def _norm_squared(squares: Mapping[str, NDArray[np.float64]], scales: Arrays | None) -> float:
    """Return the mean squared norm of a gradient in scaled coordinates."""
    return math.fsum(
        float(
            (value if scales is None else value * np.square(scales[name], dtype=np.float64)).sum()
        )
        for name, value in squares.items()
    )


def _whole(job: Job, name: str) -> int:
    value = option(job, name, 0.0)
    if value < 0.0 or value != int(value):
        raise refused(f"{name}={value!r}", "use a whole number, 0 for the default")
    return int(value)


def geoclip(job: Job) -> Policy:
    """Return GeoClip for single coordinates: see the module for what differs from the paper."""
    return GeoClip(job)
