"""Whether what a server sent to be tuned is what this client's model has, and nothing more."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedtune.adapters import Pair
from fedtune.config import Config
from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.rldp.policy import State
from fedtune.privacy.rldp.travel import ACTOR, cut_off, require_actor, shared_policy
from fedtune.residual import split
from fedtune.wire import Task

__all__ = ["require_task", "without_actor"]

_MOST_RANK = 4096


def require_task(
    task: Task, shapes: Mapping[str, tuple[int, ...]], products: Iterable[Pair], *, fedex: bool
) -> None:
    """Refuse a task that a step could not be taken from, before anything is charged.

    A residual changes what a layer gives, and where it does not fit exactly one example could
    reach another through broadcasting: it must be one of ``fedex``, on a LoRA product.

    Parameters
    ----------
    shapes : mapping of name to shape
        Of the parameters that train here.
    products : iterable of Pair
        The LoRA products of this model.
    fedex : bool
        Whether ``federation.aggregation`` has residuals at all.

    Raises
    ------
    FedtuneError
        A learning rate that is none; a tensor with another name, shape or type, or one that
        is not finite.
    """
    if not (math.isfinite(task.lr) and task.lr >= 0.0):
        raise _refused(f"a learning rate of {task.lr}")
    adapter, residual = split(task.tensors)
    marked = len(task.tensors) - len(adapter)
    known = {pair.layer: pair for pair in products}
    if marked and not fedex:
        raise _refused("a residual, and federation.aggregation is not 'fedex'")
    if marked != 2 * len(residual) or residual.keys() - known.keys():
        raise _refused("a residual of a layer that has no LoRA product")
    if adapter.keys() != shapes.keys():
        raise _refused(f"other tensors: {sorted(adapter.keys() ^ shapes.keys())[:3]}")
    for name, value in adapter.items():
        _require(name, value, shapes[name])
    for layer, (u, v) in residual.items():
        pair, rank = known[layer], u.shape[1] if u.ndim == 2 else 0
        if not 1 <= rank <= _MOST_RANK:
            raise _refused(f"a residual of rank {rank} for '{layer}'")
        _require(f"{layer}.U", u, (shapes[pair.b][0], rank))
        _require(f"{layer}.V", v, (rank, shapes[pair.a][1]))


def without_actor(task: Task, config: Config) -> tuple[Task, State]:
    """Return a task's parameters alone, and the shared clipping policy's actor beside them.

    Without ``rldp.mode = "federated"`` nothing is taken off, and an actor is a tensor too many.

    Raises
    ------
    FedtuneError
        The actor is not there, or is none.
    """
    settings = shared_policy(config)
    if settings is None:
        return task, {}
    rest, actor = cut_off(ACTOR, task.tensors)
    require_actor(actor, settings)
    return replace(task, tensors=rest), actor


def _require(name: str, value: NDArray[np.generic], shape: tuple[int, ...]) -> None:
    if value.shape != shape or value.dtype != np.float32:
        raise _refused(f"'{name}' is {value.dtype} of shape {value.shape}, not float32 {shape}")
    if not bool(np.isfinite(value).all()):
        raise _refused(f"'{name}' is not finite")


def _refused(what: str) -> FedtuneError:
    return FedtuneError(
        f"the task has {what}", hint="the server is broken, of another version, or lies",
        code=ExitCode.PRIVACY,
    )  # fmt: skip
