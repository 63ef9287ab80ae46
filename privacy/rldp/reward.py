"""What the controller learns from: how much better the model became, for its noise.

Never utility per epsilon: with constant noise the divisor is a constant, and otherwise
it pays for steps that buy nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["OVERPACING", "Yardstick", "over_pacing", "reward"]

OVERPACING = 0.5
"""Weight of spending faster than planned."""

_LEAST = 1e-6
_MOST = 1e6


@dataclass
class Yardstick:
    """Root mean square of changes so far, for a utility without noise of its own.

    Attributes
    ----------
    squares : float
    count : float

    Examples
    --------
    >>> yard = Yardstick()
    >>> yard.take(0.3), yard.take(-0.4)
    (0.3, 0.3535533905932738)
    """

    squares: float = 0.0
    count: float = 0.0

    def take(self, change: float) -> float:
        """Take note of a change and return the size of changes."""
        self.squares += min(change * change, _MOST)
        self.count += 1.0
        return max(math.sqrt(self.squares / self.count), _LEAST)


def reward(change: float, deviation: float, over: float = 0.0) -> float:
    """Return dU / sd - lambda * over, from -1 to 1 (research note, E.1.4).

    Parameters
    ----------
    change : float
        Of the utility since the last decision; higher is better.
    deviation : float
        Standard deviation of its noise.
    over : float
        See `over_pacing`.

    Examples
    --------
    >>> reward(0.02, 0.08), reward(9.0, 0.08), reward(0.02, 0.08, over=0.1)
    (0.25, 1.0, 0.2)
    """
    if not math.isfinite(change):
        return -1.0
    gain = change / max(deviation, _LEAST)
    return max(-1.0, min(1.0, gain - OVERPACING * max(over, 0.0)))


def over_pacing(spent: float, releases: int, planned: float) -> float:
    """Return by which share more was spent than planned so far; 0 for less.

    Parameters
    ----------
    spent : float
        Sum of 1 / z^2 over the releases.
    releases : int
    planned : float
        z of the plan.

    Examples
    --------
    >>> round(over_pacing(spent=2 / 0.9**2, releases=2, planned=1.0), 4)
    0.2346
    """
    if releases < 1:
        return 0.0
    return max(0.0, spent * planned * planned / releases - 1.0)
