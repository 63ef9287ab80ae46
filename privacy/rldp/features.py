"""What the controller sees of an interval: thirty numbers from -1 to 1, made of `Seen`.

As many for every model, so that a controller that learnt on one can work on another.
All of it is post-processing of what the mechanism released (research note, C and E.1.3):
nothing here costs privacy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.privacy.rldp.actions import ACTIONS, ActionSpace
from fedtune.privacy.rldp.joint import Seen
from fedtune.privacy.rldp.shape import Shape
from fedtune.privacy.rldp.sight import require_sight

__all__ = ["STATES", "Context", "Interval", "Reading", "features", "read"]

STATES = 21 + ACTIONS
"""Numbers in what the controller sees."""

COORDINATES = 1 << 16
"""Most coordinates of the gradient that are kept for its direction: every k-th one."""

_HUGE = 1e6

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Reading:
    """One release as plain numbers.

    Attributes
    ----------
    step : int
    noise_multiplier : float
    signal : array, shape (blocks,)
        (||g||^2 - d s^2) / (d s^2): unbiased for the squared norm of the clipped mean over
        what noise adds to it.
    coordinates : float32 array
        Of the noisy mean.
    inside : array, shape (blocks,), or None
    loss, loss_deviation, held, held_deviation : float or None
    """

    step: int
    noise_multiplier: float
    signal: Array
    coordinates: NDArray[np.float32]
    inside: Array | None
    loss: float | None
    loss_deviation: float | None
    held: float | None
    held_deviation: float | None


def read(seen: Seen) -> Reading:
    """Return a release as plain numbers, none of them NaN or infinite.

    Raises
    ------
    FedtuneError
        Something in it is neither `Released` nor `Public`.
    """
    means = require_sight(seen.means)
    deviations = require_sight(seen.deviations)
    signal, parts = [], []
    for block, deviation in zip(seen.shape.names, deviations, strict=True):
        kept = [np.ravel(means[name]) for name in block]
        # In float64: the square of a float32 number may be beyond float32.
        power = sum(float(np.square(part, dtype=np.float64).sum()) for part in kept)
        if not math.isfinite(power):
            kept = [np.nan_to_num(part) for part in kept]
            power = _HUGE
        noise = sum(part.size for part in kept) * deviation * deviation
        signal.append(power / noise - 1.0 if noise > 0.0 else 0.0)
        parts += kept
    whole = np.concatenate(parts)
    inside = require_sight(seen.inside)
    require_sight(seen.inside_deviation)
    return Reading(
        step=require_sight(seen.step),
        noise_multiplier=require_sight(seen.noise_multiplier),
        signal=_tame(signal),
        coordinates=whole[:: _stride(whole.size)].astype(np.float32),
        inside=None if inside is None else _tame(inside),
        loss=_number(require_sight(seen.loss)),
        loss_deviation=_number(require_sight(seen.loss_deviation)),
        held=_number(require_sight(seen.held)),
        held_deviation=_number(require_sight(seen.held_deviation)),
    )  # fmt: skip


@dataclass(frozen=True)
class Context:
    """What a decision knows besides the releases of its interval; all public.

    Attributes
    ----------
    done : float
        Share of the steps done.
    noise_multiplier, denominator : float
        z as planned, m.
    level : float
        Utility (minus a loss in nats).
    gain : float
        Its change, in standard deviations of its noise.
    action : array, shape (9,)
        The last one.
    """

    done: float
    noise_multiplier: float
    denominator: float
    level: float
    gain: float
    action: Array


class Interval:
    """Sums over the releases since the last decision, and the direction before that.

    Parameters
    ----------
    blocks : int
    """

    def __init__(self, blocks: int) -> None:
        self.count, self.sensed, self.noise = 0, 0, 0.0
        self.signal, self.inside = np.zeros(blocks), np.zeros(blocks)
        self.sums: dict[str, Array] = {k: np.zeros(3) for k in ("loss", "held")}
        self.direction = np.zeros(0, np.float32)
        self.before = np.zeros(0, np.float32)

    @staticmethod
    def kept(whole: int) -> int:
        """Return how many coordinates are kept of so many."""
        return len(range(0, whole, _stride(whole)))

    def add(self, reading: Reading) -> None:
        """Take note of one release."""
        self.count += 1
        self.noise += reading.noise_multiplier
        self.signal += reading.signal
        if reading.inside is not None:
            self.sensed += 1
            self.inside += reading.inside
        for name, value, deviation in (
            ("loss", reading.loss, reading.loss_deviation),
            ("held", reading.held, reading.held_deviation),
        ):
            if value is not None:
                self.sums[name] += (1.0, value, (deviation or 0.0) ** 2)
        if not self.direction.size:
            self.direction = np.zeros_like(reading.coordinates)
        # Beyond this it is no direction; float32 must not overflow.
        self.direction += np.clip(reading.coordinates, -1e15, 1e15)

    def mean(self, name: str) -> tuple[float, float] | None:
        """Return the mean of ``loss`` or ``held``, and the variance of its noise."""
        count, total, variance = self.sums[name].tolist()
        return (total / count, variance / count**2) if count else None

    @property
    def cosine(self) -> float:
        """Between the noisy gradients of this interval and of the one before; 0 at first."""
        if self.direction.size != self.before.size or not self.before.size:
            return 0.0
        one, two = self.direction.astype(np.float64), self.before.astype(np.float64)
        # Not by BLAS, whose threads would get in the way of the training.
        below = math.sqrt(float(np.square(one).sum()) * float(np.square(two).sum()))
        return float((one * two).sum()) / below if below > 0.0 else 0.0

    def next(self) -> Interval:
        """Return another interval, that begins where this one ends."""
        fresh = Interval(len(self.signal))
        fresh.before = self.direction
        return fresh

    def state(self) -> dict[str, NDArray[Any]]:
        """Return everything."""
        return {
            "count": np.array([self.count, self.sensed], np.int64),
            "noise": np.array([self.noise]),
            "signal": self.signal.copy(), "inside": self.inside.copy(),
            **{name: value.copy() for name, value in self.sums.items()},
            "direction": self.direction.copy(), "before": self.before.copy(),
        }  # fmt: skip

    def restore(self, state: dict[str, NDArray[Any]]) -> None:
        """Go on from what `state` returned; names, types and sizes were checked before."""
        self.count, self.sensed = (int(n) for n in state["count"])
        self.noise = float(state["noise"][0])
        self.signal, self.inside = state["signal"].copy(), state["inside"].copy()
        self.sums = {name: state[name].copy() for name in self.sums}
        self.direction, self.before = state["direction"].copy(), state["before"].copy()


def features(
    interval: Interval, shape: Shape, space: ActionSpace, context: Context
) -> NDArray[np.float32]:
    """Return the state of a decision; shape (30,), float32, each from -1 to 1.

    In order: share of examples inside (mean, least, most, spread, slope over depth); signal over
    noise (mean, least, most, slope); cosine; utility and its change; share of steps done;
    norms over where they began (mean, spread, slope); shares (spread, slope); noise over the
    plan, noise for a batch, noise of the whole gradient; the last action.
    """
    count = max(interval.count, 1)
    # Without bits: as if half of all examples were inside.
    inside = 2.0 * interval.inside / interval.sensed - 1.0 if interval.sensed else space.depth * 0
    signal = _signed_log(interval.signal / count, 0.01) / 4.0
    norms = np.log(np.array(shape.norms) * math.sqrt(len(shape.norms)) / space.clip_norm) / 3.0
    shares = np.log(np.array(shape.shares) * len(shape.shares))
    z, m = context.noise_multiplier, context.denominator
    noise = interval.noise / count / z - 1.0 if interval.count else 0.0
    found = [
        inside.mean(), inside.min(), inside.max(), inside.std(), _slope(inside, space.depth),
        signal.mean(), signal.min(), signal.max(), _slope(signal, space.depth),
        interval.cosine,
        context.level / 4.0, context.gain,
        2.0 * context.done - 1.0,
        norms.mean(), norms.std(), _slope(norms, space.depth),
        shares.std(), _slope(shares, space.depth),
        5.0 * noise, math.log(z), math.log10(z * math.sqrt(space.numbers.sum()) / m),
    ]  # fmt: skip
    squeezed = np.tanh(np.nan_to_num(np.array(found, np.float64), posinf=_HUGE, neginf=-_HUGE))
    return np.concatenate([squeezed, context.action]).astype(np.float32)


def _stride(whole: int) -> int:
    return max(1, math.ceil(whole / COORDINATES))


def _slope(values: Array, depth: Array) -> float:
    """Return by how much values rise from the middle layer to the last."""
    below = float(depth @ depth)
    return float((depth * values).sum()) / below if below > 0.0 else 0.0


def _signed_log(values: Array, unit: float) -> Array:
    found: Array = np.sign(values) * np.log1p(np.abs(values) / unit)
    return found


def _tame(values: Any) -> Array:
    found = np.nan_to_num(np.asarray(values, np.float64), posinf=_HUGE, neginf=-_HUGE)
    return np.clip(found, -_HUGE, _HUGE)


def _number(value: float | None) -> float | None:
    if value is None:
        return None
    return max(-_HUGE, min(_HUGE, value)) if math.isfinite(value) else _HUGE
