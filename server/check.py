"""Whether an update may count. A bad one is dropped and named; the round goes on."""

from __future__ import annotations

import numpy as np

from fedtune.adapters import Tensors
from fedtune.wire import Task, Update

__all__ = ["problem_of"]

_MOST_EXAMPLES = 10**9


def problem_of(update: Update, task: Task, adapter: Tensors) -> str:
    """Return what is wrong with an update, or an empty string.

    Parameters
    ----------
    update : Update
    task : Task
        What it answers.
    adapter : Tensors
        The parameters it must match in names, shapes and type.
    """
    if (update.round, update.attempt) != (task.round, task.attempt):
        return (
            f"answers round {update.round}.{update.attempt}, asked was {task.round}.{task.attempt}"
        )
    if not 1 <= update.examples <= _MOST_EXAMPLES:
        return f"examples={update.examples} is not a weight"
    if update.tensors.keys() != adapter.keys():
        odd = sorted(update.tensors.keys() ^ adapter.keys())
        return f"tensors do not match: {odd[:3]}"
    for name, value in update.tensors.items():
        if value.shape != adapter[name].shape:
            return f"'{name}' has shape {value.shape}, not {adapter[name].shape}"
        if value.dtype != np.float32:
            return f"'{name}' is {value.dtype}, not float32"
        # The sum is finite only if all are, and needs no temporary.
        if not np.isfinite(value.sum(dtype=np.float64)):
            return f"'{name}' holds NaN or infinity"
    return ""
