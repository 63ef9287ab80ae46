"""What a controller can do: nine numbers that become clip norms, shares and a noise level.

The same nine for every model, so that a controller that learnt on one can work on
another. Those that mean nothing in a setting change nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.config_privacy import RldpConfig
from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.clipping import Quantile, adapter_blocks
from fedtune.privacy.rldp.quantiles import moved
from fedtune.privacy.rldp.shape import Shape

__all__ = ["ACTIONS", "RANGE", "REACH", "ActionSpace", "interval_of", "noise_of"]

ACTIONS = 9
"""Global, depth slope, A/B split; exponents of d and of C in the shares, their depth
slope; two residual directions over adapters; noise. Zeros leave norms alone and deal the
noise out in closed form."""

REACH = 0.3
"""Most that the logarithm of a norm moves at one decision."""

RANGE = 1000.0
"""Norms stay within this factor of where they began."""

_TARGETS = 0.4  # how far an action moves the share of units that are not clipped
_PAPER_INTERVAL = 112
_SLOPE, _SPLIT, _RESIDUAL, _TILT = 0.5, 0.5, 0.3, 0.5
_RANK = 2
_LAYER = re.compile(r"\.(\d+)\.")
_FACTOR = re.compile(r"\.lora_(?:embedding_)?([AB])(?:\.|$)")

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ActionSpace:
    """Turns actions into shapes.

    Parameters
    ----------
    sizes : mapping of str to int
        Numbers in each parameter.
    clip_norm : float
        C of the settings: norms begin at C / sqrt(blocks) each.
    factors : bool
        Both factors of a low-rank pair are blocks of their own; else they are one.
    seed : int
        Of the residual's directions, which are public and the same in every run.

    Raises
    ------
    FedtuneError
        There are no parameters, or ``clip_norm`` cannot be used.

    Examples
    --------
    >>> sizes = {f"m.{i}.q.lora_{x}.weight": 8 * (i + 1) for i in range(2) for x in "AB"}
    >>> space = ActionSpace(sizes, 1.0)
    >>> louder = space.apply(space.start(), np.array([1, 0, 0, -1, -1, 0, 0, 0, 0]))
    >>> [round(c, 4) for c in louder.norms], louder.shares     # exp(0.3) / sqrt(2)
    ([0.9545, 0.9545], (0.5, 0.5))
    >>> closed = space.apply(space.start(), np.zeros(9))
    >>> [round(w, 4) for w in closed.shares]                    # as sqrt(16) to sqrt(32)
    [0.4142, 0.5858]
    """

    sizes: Mapping[str, int]
    clip_norm: float
    factors: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sizes:
            raise _refused("no parameters", "attach an adapter")
        if not (math.isfinite(self.clip_norm) and self.clip_norm > 0.0):
            raise _refused(f"clip_norm={self.clip_norm!r}", "use a finite number above 0")

    @property
    def size(self) -> int:
        """Numbers in an action."""
        return ACTIONS

    @cached_property
    def blocks(self) -> tuple[tuple[str, ...], ...]:
        """Parameters that are clipped together."""
        pairs = adapter_blocks(self.sizes)
        return tuple((n,) for pair in pairs for n in pair) if self.factors else pairs

    @cached_property
    def numbers(self) -> Array:
        """d_i: numbers in each block; shape (blocks,)."""
        return np.array([sum(self.sizes[n] for n in block) for block in self.blocks], np.float64)

    @cached_property
    def depth(self) -> Array:
        """Place of each block from -1 (first layer) to 1 (last); shape (blocks,)."""
        return _depth([block[0] for block in self.blocks])

    @cached_property
    def side(self) -> Array:
        """1 for a factor A, -1 for a factor B, 0 for what is neither; shape (blocks,)."""
        return np.array([_side(block) for block in self.blocks])

    @cached_property
    def directions(self) -> Array:
        """Fixed random directions over blocks, entries about 1; shape (blocks, 2)."""
        rng = np.random.default_rng(self.seed)
        return np.sign(rng.standard_normal((len(self.blocks), _RANK)))

    def start(self) -> Shape:
        """Return the shape of the first release: equal norms and shares."""
        n = len(self.blocks)
        return Shape(self.blocks, (self.clip_norm / math.sqrt(n),) * n, (1.0 / n,) * n)

    def apply(self, shape: Shape, action: NDArray[Any]) -> Shape:
        """Return the shape that an action makes of another.

        Parameters
        ----------
        shape : Shape
            Of the same blocks.
        action : array, shape (9,)
            From -1 to 1; beyond is cut off.

        Raises
        ------
        FedtuneError
            The action has another size or a number that is none.
        """
        given = checked(action)
        start = self.clip_norm / math.sqrt(len(self.blocks))
        norms = np.array(shape.norms) * np.exp(REACH * self.move(given))
        norms = np.clip(norms, start / RANGE, start * RANGE)
        return Shape(self.blocks, tuple(norms.tolist()), self._shares(norms, given))

    def move(self, action: NDArray[Any]) -> Array:
        """Return where an action wants each norm to go, from -1 to 1; shape (blocks,)."""
        given = checked(action)
        found: Array = np.clip(
            given[0] + _SLOPE * given[1] * self.depth + _SPLIT * given[2] * self.side
            + _RESIDUAL * (self.directions * given[6:8]).sum(1) / math.sqrt(_RANK),
            -1.0, 1.0,
        )  # fmt: skip
        return found

    def followed(self, shape: Shape, rule: Quantile, inside: Array, action: NDArray[Any]) -> Shape:
        """Return a shape whose norms the quantile rule moved, each by its own bit.

        With another target where the action wanted norms to grow or to shrink: the rule
        would take them back otherwise.

        Parameters
        ----------
        shape : Shape
        rule : Quantile
        inside : array, shape (blocks,)
            Released shares of units inside each norm.
        action : array, shape (9,)
            The last one; zeros leave the rule alone.
        """
        start = self.clip_norm / math.sqrt(len(shape.norms))
        targets = (rule.target + _TARGETS * self.move(action)).clip(0.05, 0.95)
        together = zip(targets.tolist(), shape.norms, inside.tolist(), strict=True)
        norms = tuple(moved(replace(rule, target=t), c, share, start) for t, c, share in together)
        return replace(shape, norms=norms)

    def _shares(self, norms: Array, given: Array) -> tuple[float, ...]:
        """Return w_i as d^a C^b: (1/2, 1) is least noise, (0, 0) uniform, (0, 2) isotropic."""
        of_size, of_norm = 0.5 * (1.0 + given[3]), 1.0 + given[4]
        logs = of_size * np.log(self.numbers) + of_norm * np.log(norms)
        logs += _TILT * given[5] * self.depth
        # A share near 0 would be noise without end in that block.
        weights = np.exp(np.maximum(logs - logs.max(), -math.log(RANGE)))
        return tuple((weights / math.fsum(weights)).tolist())


def interval_of(settings: RldpConfig, steps: int) -> int:
    """Return K, the releases between two decisions, of so many in the whole run.

    Examples
    --------
    >>> interval_of(RldpConfig(), 400), interval_of(RldpConfig(interval=7), 400)
    (10, 7)
    """
    if settings.interval:
        return settings.interval
    return _PAPER_INTERVAL if settings.preset else max(1, steps // 40)


def noise_of(action: NDArray[Any], planned: float, spread: float) -> float:
    """Return the noise multiplier that an action wants.

    Parameters
    ----------
    action : array, shape (9,)
    planned, spread : float
        Between ``planned * (1 - spread)`` and ``planned * (1 + spread)``.

    Examples
    --------
    >>> round(noise_of(np.array([0, 0, 0, 0, 0, 0, 0, 0, -1.0]), 1.2, 0.1), 4)
    1.08
    """
    return planned * (1.0 + spread * float(checked(action)[8]))


def checked(action: NDArray[Any] | Sequence[float]) -> Array:
    """Return an action as float64, cut off at -1 and 1."""
    given = np.asarray(action, np.float64)
    if given.shape != (ACTIONS,) or not bool(np.isfinite(given).all()):
        raise _refused(f"action {np.array2string(given)}", f"use {ACTIONS} numbers from -1 to 1")
    return np.clip(given, -1.0, 1.0)


def _depth(names: Sequence[str]) -> Array:
    """Return the places of layers, by their number or else by their order."""
    found = [_LAYER.search(name) for name in names]
    places = [float(match.group(1)) for match in found if match]
    if len(places) < len(names) or len(set(places)) < 2:
        places = [float(i) for i in range(len(names))]
    first, last = min(places), max(places)
    if last == first:
        return np.zeros(len(names))
    return 2.0 * (np.array(places) - first) / (last - first) - 1.0


def _side(block: Sequence[str]) -> float:
    sides = {match.group(1) for name in block if (match := _FACTOR.search(name))}
    if len(block) > 1 or len(sides) != 1:
        return 0.0
    return 1.0 if sides == {"A"} else -1.0


def _refused(message: str, hint: str) -> FedtuneError:
    return FedtuneError(f"controller's actions: {message}", hint=hint, code=ExitCode.PRIVACY)
