"""Example-level privacy at the client: DP-SGD, paid for before anything leaves.

The server need not be trusted with it: examples are drawn by the client's own
secret coins, gradients are clipped one by one, noise is added here, and the
client's own ledger admits the round before the first gradient is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedtune.config import Config
from fedtune.errors import ExitCode, FedtuneError
from fedtune.files import write_atomic
from fedtune.privacy.ledger import Account, Claim, Ledger, Reservation, open_ledger
from fedtune.privacy.plan import (
    Promise,
    client_promise,
    dataset_name,
    example_promise,
    ledger_place,
)
from fedtune.wire import BUDGET, Task

__all__ = [
    "Guard",
    "open_guard",
    "open_shared_guard",
    "require_job",
]


@dataclass(frozen=True)
class Guard:
    """The owner's own ledger and caps; whatever the server asks, this decides."""

    promise: Promise
    ledger: Ledger
    dataset: str

    def account(self, client: str) -> Account:
        """Return the account of one client's examples, or of the client as a whole."""
        name = f"{self.dataset}/{client}"
        return self.ledger.account(name, self.promise.unit, self.promise.relation)

    def require_room(self, client: str, begun: int = 0) -> None:
        """Refuse a plan whose rounds after ``begun`` would pass the owner's cap.

        Raises
        ------
        FedtuneError
            ``ExitCode.BUDGET_EXHAUSTED``, with what is left.
        """
        charge, account = self.promise.charge, self.account(client)
        rounds = max(0, self.promise.rounds - begun)
        fit = self.ledger.would_fit(account, {charge.event: charge.count * rounds})
        if not fit.fits:
            raise FedtuneError(
                f"{BUDGET}: '{account.dataset}' allows epsilon {fit.cap:.4g}, "
                f"the plan of {rounds} rounds would bring it to {fit.epsilon:.4g}",
                hint="fewer rounds or more noise; or the owner decides: fedtune budget set",
                code=ExitCode.BUDGET_EXHAUSTED,
            )

    def reserve(self, client: str, task: Task, detail: Mapping[str, Any]) -> Reservation:
        """Charge one round before its first gradient; durable when it returns."""
        if not 1 <= task.round <= self.promise.rounds:
            raise FedtuneError(
                f"{BUDGET}: round {task.round} of a plan of {self.promise.rounds}",
                code=ExitCode.BUDGET_EXHAUSTED,
            )
        charge = self.promise.charge
        claim = Claim(
            job=task.job, round=task.round, attempt=task.attempt, event=charge.event,
            count=charge.count, purpose="train", detail=dict(detail),
            limit=self.promise.limit or _twice(self.promise),
        )  # fmt: skip
        try:
            return self.ledger.reserve(self.account(client), claim)
        except FedtuneError as error:
            if error.code != ExitCode.BUDGET_EXHAUSTED:
                raise
            raise FedtuneError(
                f"{BUDGET}: {error}", hint=error.hint, code=ExitCode.BUDGET_EXHAUSTED
            ) from error


def open_guard(config: Config) -> Guard | None:
    """Return what keeps ``[privacy.example]``, or None when nothing is promised there."""
    promise = example_promise(config)
    if promise is None:
        return None
    return Guard(promise, open_ledger(ledger_place(config)), dataset_name(config))


def open_shared_guard(config: Config) -> Guard | None:
    """Return what admits this client's share of the noise, where clients add it themselves."""
    promise, settings = client_promise(config), config.privacy.client
    if promise is None or settings is None or settings.noise_at != "clients":
        return None
    return Guard(promise, open_ledger(ledger_place(config)), dataset_name(config))


@lru_cache(maxsize=8)
def _twice(promise: Promise) -> tuple[float, float]:
    """Bound a run that sets itself none: the whole plan, and as much again for lost rounds."""
    return promise.spent(2 * promise.rounds).epsilon, promise.delta


def require_job(folder: Path, job: str) -> None:
    """Bind a client to the first job it hears of: another name would be another budget.

    Raises
    ------
    FedtuneError
        The server has changed the job's name.
    """
    file = folder / "job"
    if not file.exists():
        write_atomic(file, job.encode())
    elif (known := file.read_text(encoding="utf-8")) != job:
        raise FedtuneError(
            f"{BUDGET}: this client takes part in job '{known}', not in '{job}'",
            hint="a new run has a folder of its own",
            code=ExitCode.BUDGET_EXHAUSTED,
        )
