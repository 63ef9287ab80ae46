"""What the controller learns from, as arrays: for a checkpoint, and for the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.rldp.actions import ACTIONS
from fedtune.privacy.rldp.features import STATES
from fedtune.privacy.rldp.policy import State
from fedtune.privacy.rldp.sac import Transition

__all__ = ["PARTS", "packed", "transitions_of"]

PARTS = ("state", "action", "reward", "next_state", "done")
"""Names of the arrays."""


def transitions_of(arrays: Mapping[str, NDArray[Any]]) -> list[Transition]:
    """Return what `packed` made arrays of.

    Raises
    ------
    FedtuneError
        Names, sizes or numbers that no controller makes.
    """
    sizes: dict[str, tuple[int, ...]]
    sizes = {"state": (STATES,), "action": (ACTIONS,), "next_state": (STATES,)}
    if set(arrays) != set(PARTS):
        raise _refused(f"transitions of {sorted(arrays)}", f"give {', '.join(PARTS)}")
    count = arrays["reward"].shape[:1]
    for name, value in arrays.items():
        fits = value.shape == count + sizes.get(name, ()) and value.dtype == np.float32
        if not (count and fits and bool((np.abs(value) <= 1.0).all())):
            raise _refused(f"transitions' {name}: {value.dtype}{value.shape}", "from -1 to 1")
    return [
        Transition(s.copy(), a.copy(), float(r), n.copy(), bool(d))
        for s, a, r, n, d in zip(*(arrays[name] for name in PARTS), strict=True)
    ]


def packed(made: Sequence[Transition]) -> State:
    """Return transitions as arrays; `transitions_of` undoes it.

    Examples
    --------
    >>> [(name, value.shape) for name, value in packed([]).items()][:2]
    [('state', (0, 30)), ('action', (0, 9))]
    """
    sizes = {"state": STATES, "action": ACTIONS, "next_state": STATES}
    found: State = {}
    for name in PARTS:
        rows = np.array([getattr(one, name) for one in made], np.float32)
        found[name] = rows.reshape(len(made), *([sizes[name]] if name in sizes else []))
    return found


def _refused(message: str, hint: str) -> FedtuneError:
    return FedtuneError(f"rldp: {message}", hint=hint, code=ExitCode.PRIVACY)
