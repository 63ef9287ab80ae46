"""Under a promise about clients, failing is something that others must not see."""

from __future__ import annotations

from fedtune.client.failures import log_failure
from fedtune.client.worker import Worker
from fedtune.errors import ExitCode, FedtuneError
from fedtune.wire import Task, Update

__all__ = ["train_quietly"]

_PUBLIC = frozenset({ExitCode.BUDGET_EXHAUSTED, ExitCode.LEDGER, ExitCode.PRIVACY})
"""What these say depends on the task and on the books, not on rows."""


def train_quietly(worker: Worker, index: int, task: Task) -> Update:
    """Tune; where whole clients are promised something, a failure is an update of zeros.

    Whether training fails may depend on the rows, and who drops out is seen.
    """
    if worker.config.privacy.client is None:
        return worker.train(index, task)
    try:
        return worker.train(index, task)
    except Exception as error:
        if isinstance(error, FedtuneError) and error.code in _PUBLIC:
            raise
        if worker.folder is not None:
            log_failure(worker.folder / f"{index:06d}" / "errors.log", error)
        return worker.nothing(task)
