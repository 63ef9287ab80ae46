"""Whether an update may count. A bad one is dropped and named; the round goes on."""

from __future__ import annotations

import numpy as np

from fedtune.adapters import Tensors
from fedtune.wire import WITHHELD, Evaluation, Task, Update

__all__ = ["problem_of", "problem_of_evaluation"]

_MOST_EXAMPLES = 10**9
_MOST_UNITS = 10**12
_LARGEST = 1e9
"""No training step is larger; with weights up to 1e9 the float32 sums stay finite."""


def problem_of(update: Update, task: Task, adapter: Tensors, *, private: bool = False) -> str:
    """Return what is wrong with an update, or an empty string.

    Parameters
    ----------
    update : Update
    task : Task
        What it answers.
    adapter : Tensors
        The parameters it must match in names, shapes and type.
    private : bool
        A privacy promise covers the data: figures about it must not be there.
    """
    if (update.round, update.attempt) != (task.round, task.attempt):
        return (
            f"answers round {update.round}.{update.attempt}, asked was {task.round}.{task.attempt}"
        )
    if not 1 <= update.examples <= _MOST_EXAMPLES:
        return f"examples={update.examples} is not a weight"
    figures = (update.examples, update.steps, update.truncated, update.loss)
    crossed = (update.cut_up, update.cut_down, update.kept)
    if min(crossed) < 0 or update.kept > update.examples:
        return f"what crossed the cut cannot be: {crossed}"
    if private and (figures != (1, 0, 0, WITHHELD) or any(crossed)):
        return "carries figures on private rows that no privacy budget covers"
    if not private and not 0 <= update.loss <= _LARGEST:
        return f"loss={update.loss:g} is not a loss"
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
        if value.size and max(value.max(), -value.min()) > _LARGEST:
            return f"'{name}' holds values above {_LARGEST:g}"
    return ""


def problem_of_evaluation(found: Evaluation, task: Task, labels: int) -> str:
    """Return what is wrong with one client's counts, or an empty string."""
    if found.round != task.round:
        return f"answers round {found.round}, asked was {task.round}"
    if not 0 <= found.correct <= found.units or found.examples < 0 or found.loss < 0:
        return f"counts cannot be: {found.correct} of {found.units} right, loss {found.loss}"
    if found.units > _MOST_UNITS or found.loss > _LARGEST * max(found.units, 1):
        return f"counts are too large: {found.units} units, loss {found.loss:g}"
    confusion = found.tensors.get("confusion")
    if confusion is None or len(found.tensors) != 1 or confusion.dtype != np.int64:
        return "has no confusion matrix of int64"
    if confusion.shape != (labels, labels) or (labels and confusion.min() < 0):
        return f"confusion matrix has shape {confusion.shape}, not {(labels, labels)}"
    if labels and confusion.max() > found.units:
        return f"confusion matrix holds {confusion.max()}, more than all {found.units}"
    if labels and int(confusion.sum()) != found.units:
        return f"confusion matrix counts {int(confusion.sum())}, not {found.units}"
    return ""
