"""The server's copy of what clients spend, where each keeps its ledger on its own machine.

Every client that is asked in a round is charged here, before it is asked and whether or
not it answers: never less than what the client's own ledger holds of this run. The report
of a run is made from it; a budget is kept by the client's ledger alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedtune.config import Config
from fedtune.privacy.events import Unit
from fedtune.privacy.ledger import Claim, Ledger, open_ledger
from fedtune.privacy.plan import Promise, dataset_name, example_promise

__all__ = ["Books", "open_books"]


@dataclass(frozen=True)
class Books:
    """The copy for one run.

    Attributes
    ----------
    promise : Promise
        About each client's examples.
    dataset : str
        Begins the names of accounts, as in a simulation.
    """

    promise: Promise
    ledger: Ledger
    dataset: str
    job: str

    def charge(self, number: int, attempt: int, clients: Iterable[str]) -> None:
        """Charge one attempt to everybody who is about to be asked; durable when it returns."""
        cost = self.promise.charge
        for client in clients:
            account = self.ledger.account(
                f"{self.dataset}/{client}", Unit.EXAMPLE, self.promise.relation
            )
            claim = Claim(
                job=self.job, round=number, attempt=attempt, event=cost.event, count=cost.count,
                purpose="train", detail={"kept": "the client's own ledger decides"}, limit=None,
            )  # fmt: skip
            self.ledger.release(self.ledger.reserve(account, claim))


def open_books(config: Config, place: Path, job: str) -> Books | None:
    """Return the copy for a run, or None where no example is promised anything."""
    promise = example_promise(config)
    if promise is None:
        return None
    return Books(promise, open_ledger(place), dataset_name(config), job)
