"""Which directions of a pool a client uses in a round: public, and never a matter of its data."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from fedtune.config import Config, TuningConfig
from fedtune.privacy.events import Unit
from fedtune.privacy.plan import client_promise
from fedtune.privacy.schedule import schedule_of

__all__ = ["Groups", "groups_of", "projected", "released"]

ROOM = 8


@dataclass(frozen=True)
class Groups:
    """Clients of one group use the same directions; groups use different ones.

    Each round goes on where the one before ended, around the pool.

    Attributes
    ----------
    groups : int
        G.
    directions : int
        S: directions of one group in a round.
    size : int
        K: directions of the pool, at least G S.

    Examples
    --------
    >>> groups = Groups(groups=2, directions=3, size=8)
    >>> groups.columns(0, number=1).tolist(), groups.columns(1, number=1).tolist()
    ([0, 1, 2], [3, 4, 5])
    >>> groups.used(number=2).tolist()
    [6, 7, 0, 1, 2, 3]
    """

    groups: int
    directions: int
    size: int

    def used(self, number: int) -> NDArray[np.int64]:
        """Return the directions that round ``number`` (from 1) uses, shape (G S,)."""
        width = self.groups * self.directions
        return ((number - 1) * width + np.arange(width)) % self.size

    def columns(self, group: int, number: int) -> NDArray[np.int64]:
        """Return those of one group, shape (S,)."""
        first = group * self.directions
        return self.used(number)[first : first + self.directions]

    def of(self, client: str, key: bytes) -> int:
        """Return a client's group, from its name and the pool's key."""
        said = hashlib.sha256(b"fedtune group 1" + key + client.encode()).digest()
        return int.from_bytes(said[:8], "big") % self.groups


def projected(tuning: TuningConfig, parameters: int, device: torch.device) -> bool:
    """Say which engine runs: backpropagation projected on the pool, or forward passes.

    ``auto`` asks that the device has ``ROOM`` times the weights: model, base, activations, a
    layer's gradient, and the system. What is free at the moment does not count, so that a
    resumed run goes on as it began.

    Parameters
    ----------
    parameters : int
        All of the model, frozen ones too.
    """
    if tuning.method != "seedpool" or tuning.pool.engine != "auto":
        return tuning.method == "seedpool" and tuning.pool.engine == "projected"
    total = psutil.virtual_memory().total
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
    return bool(total > ROOM * 4 * parameters)


def released(config: Config, parameters: int, unit: Unit) -> int:
    """Return how many numbers one noisy release of a run holds.

    Parameters
    ----------
    parameters : int
        Trainable ones of the model.

    Examples
    --------
    >>> mezo = Config.model_validate({"tuning": {"method": "mezo", "probe": {"count": 4}}})
    >>> released(mezo, 1000, Unit.EXAMPLE), released(mezo, 1000, Unit.CLIENT)
    (4, 1000)
    """
    tuning = config.tuning
    if tuning.by_gradient:
        return parameters
    if unit is Unit.EXAMPLE and tuning.pool.engine != "projected":
        return tuning.probe.count
    if tuning.method == "mezo":
        return parameters
    groups = groups_of(config)
    if groups is None:
        return tuning.pool.directions or tuning.pool.size
    return groups.directions * (1 if unit is Unit.EXAMPLE else groups.groups)


def groups_of(config: Config) -> Groups | None:
    """Return the schedule groups of a run, or None where every client draws its own.

    Under client-level privacy there are always some: only the numbers that somebody may use
    need noise.

    Raises
    ------
    FedtuneError
        More directions than the pool has.
    """
    tuning = config.tuning
    if tuning.method != "seedpool":
        return None
    pool = tuning.pool
    if made := schedule_of(config, client_promise(config)):
        return Groups(made.groups, made.directions, pool.size)
    if pool.groups:
        return Groups(pool.groups, pool.directions or pool.size // pool.groups, pool.size)
    return None
