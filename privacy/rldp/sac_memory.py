"""What the soft actor-critic remembers: transitions, and where its states lie.

Every number that comes in is checked here: one NaN in a buffer would come back for ever.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import ExitCode, FedtuneError

__all__ = ["Memory", "Transition", "check_state", "foreign", "row"]

Array = NDArray[Any]
Floats = NDArray[np.float32]

FARTHEST, LEAST_STD = 10.0, 0.01  # of a normalised state
HOTTEST = 50.0  # logarithm of a temperature, either way


@dataclass(frozen=True)
class Transition:
    """One decision and what came of it.

    Attributes
    ----------
    state, next_state : ndarray, (states,)
        What the controller saw, and what it saw next: the true next state.
    action : ndarray, (actions,)
        What it did, in [-1, 1].
    reward : float
    done : bool
        Whether nothing can come after. Running out of time is not that: then the
        worth of the next state still counts, and ``done`` is False.
    """

    state: Array
    action: Array
    reward: float
    next_state: Array
    done: bool


class Memory:
    """A ring of transitions, and the mean and variance of all states ever kept.

    Welford's sums, begun with one imagined state at 0 with variance 1, so that the
    first few states are not blown up.

    Parameters
    ----------
    states, actions : int
    size : int
        Transitions kept; the oldest make room.
    normalise : bool
    """

    def __init__(self, states: int, actions: int, size: int, normalise: bool) -> None:
        self.size, self.normalise = size, normalise
        self.mean, self.squares, self.count = np.zeros(states), np.ones(states), 1
        widths = {"state": states, "action": actions, "reward": 1, "next_state": states, "going": 1}
        self.rows = {name: np.zeros((size, wide), np.float32) for name, wide in widths.items()}
        self.seen = 0

    @property
    def kept(self) -> int:
        """Transitions in the ring."""
        return min(self.seen, self.size)

    def keep(self, transition: Transition) -> None:
        """Add a transition.

        Raises
        ------
        FedtuneError
            For another shape, NaN, infinity, or an action outside [-1, 1]; then nothing
            is kept.
        """
        new = {
            "state": transition.state,
            "action": transition.action,
            "reward": np.array([transition.reward]),
            "next_state": transition.next_state,
            "going": np.array([0.0 if transition.done else 1.0]),
        }
        checked = {name: row(name, new[name], at.shape[1]) for name, at in self.rows.items()}
        if np.abs(checked["action"]).max() > 1:
            raise FedtuneError(
                f"action={checked['action']}", hint="actions lie between -1 and 1: scale them"
            )
        for name, values in checked.items():
            self.rows[name][self.seen % self.size] = values
        self.seen += 1
        self.count += 1
        away = checked["state"].astype(np.float64) - self.mean
        self.mean += away / self.count
        self.squares += away * (checked["state"] - self.mean)

    def normalised(self, states: Floats) -> Floats:
        """Return states (..., states), centred and scaled by what was seen so far."""
        if not self.normalise:
            return states
        spread = np.sqrt(self.squares / self.count).clip(LEAST_STD).astype(np.float32)
        centred = (states - self.mean.astype(np.float32)) / spread
        return cast(Floats, centred.clip(-FARTHEST, FARTHEST))

    def seen_state(self) -> dict[str, Array]:
        """Return copies of the sums over states."""
        return {
            "seen.mean": self.mean.copy(),
            "seen.squares": self.squares.copy(),
            "seen.count": np.array([self.count], np.int64),
        }

    def buffer_state(self) -> dict[str, Array]:
        """Return copies of the transitions."""
        found = {f"buffer.{name}": rows[: self.kept].copy() for name, rows in self.rows.items()}
        return {**found, "buffer.seen": np.array([self.seen], np.int64)}

    def set_seen(self, state: Mapping[str, Array]) -> None:
        """Take over the sums over states."""
        self.mean[:], self.squares[:] = state["seen.mean"], state["seen.squares"]
        self.count = int(state["seen.count"][0])

    def set_buffer(self, state: Mapping[str, Array]) -> None:
        """Take over the transitions."""
        self.seen = int(state["buffer.seen"][0])
        for name, rows in self.rows.items():
            rows[: self.kept] = state[f"buffer.{name}"]


def row(name: str, values: Array, size: int) -> Floats:
    """Return ``values`` as (size,) float32.

    Raises
    ------
    FedtuneError
        For another shape, NaN or infinity, also after rounding to float32.
    """
    with np.errstate(over="ignore"):
        found = np.asarray(values, np.float32)
    if found.shape != (size,):
        raise FedtuneError(f"{name} has shape {found.shape}", hint=f"give it the shape ({size},)")
    if not np.isfinite(found).all():
        raise FedtuneError(f"{name}={found}", hint="a controller sees finite numbers only")
    return found


def foreign(name: str, value: object, code: ExitCode) -> FedtuneError:
    """Return the error for a saved value that does not belong here."""
    return FedtuneError(
        f"{name}={value} is not of this controller",
        hint="restore it with the settings, and from the file, that it was saved with",
        code=code,
    )


def check_state(
    state: Mapping[str, Array], like: Mapping[str, Array], size: int, code: ExitCode
) -> None:
    """Refuse a saved state that does not fit ``like``, the own one, or cannot be true.

    Raises
    ------
    FedtuneError
        With ``code``, for other names, shapes or types, for NaN, and for a number out
        of its range.
    """
    if odd := sorted(set(state) ^ set(like)):
        raise foreign("names", odd, code)
    for name in sorted(like, key="buffer.seen".__ne__):  # it says how many rows the rest has
        own, value, shape = like[name], state[name], list(like[name].shape)
        if name.startswith("buffer.") and name != "buffer.seen":
            shape[0] = max(0, min(int(state["buffer.seen"].flat[0]), size))
        if value.dtype != own.dtype or list(value.shape) != shape:
            raise foreign(name, f"{value.dtype}{list(value.shape)}", code)
        if not np.isfinite(value).all():
            raise foreign(name, "NaN or infinity", code)
        low, high = _range(name)
        if value.size and (value.min() < low or value.max() > high):
            raise foreign(name, f"{value.min()} to {value.max()}", code)


def _range(name: str) -> tuple[float, float]:
    """Return what a saved number may be."""
    if name.endswith((".moment2", ".squares")) or name in ("steps", "buffer.seen"):
        return 0.0, math.inf
    return {
        "temperature": (-HOTTEST, HOTTEST),
        "seen.count": (1.0, math.inf),
        "buffer.action": (-1.0, 1.0),
        "buffer.going": (0.0, 1.0),
    }.get(name, (-math.inf, math.inf))
