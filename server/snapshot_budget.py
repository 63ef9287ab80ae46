"""What a run has spent of its promises until now: the run's own bound, and never too small.

The ledger says how often was charged, reserved rounds with it. The exact accountant
takes about a second, so it is asked for some twenty numbers of charges in a run and
for the next one up in between, where Renyi's bound is taken if that is smaller.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedtune.config import Config
from fedtune.errors import FedtuneError
from fedtune.privacy.accounting import epsilon_of_rdp, rdp, spent
from fedtune.privacy.events import Charge, Event, Unit
from fedtune.privacy.ledger import Ledger, open_ledger
from fedtune.privacy.plan import Promise, dataset_name, ledger_place, promises
from fedtune.privacy.policy import quick
from fedtune.server.run_folder import RunFolder
from fedtune.server.status_words import relation_words

__all__ = ["BudgetView", "Known", "budgets_of"]

Groups = Mapping[Event, int]

_STOPS = 20
_PAUSE = 2.0


@dataclass(frozen=True)
class BudgetView:
    """What a run has spent of one promise.

    Attributes
    ----------
    unit : str
        ``example`` or ``client``.
    epsilon : float
        Upper bound of what was released or reserved until now; infinite: no bound.
    limit : float or None
        ``epsilon`` of the settings; ``None`` when only the noise was set.
    delta : float
    relation : str
    words : str
        What is bounded, as a sentence.
    """

    unit: str
    epsilon: float
    limit: float | None
    delta: float
    relation: str
    words: str


@dataclass
class Known:
    """What was computed or opened already for one run; costs are kept by number of charges."""

    promises: tuple[Promise, ...] | None = None
    costs: dict[tuple[Unit, int], float] = field(default_factory=dict)
    ledgers: dict[str, Ledger] = field(default_factory=dict)
    groups: dict[Unit, tuple[object, Groups | None]] = field(default_factory=dict)


def budgets_of(
    folder: RunFolder, config: Config, facts: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]], now: float, known: Known,
) -> tuple[BudgetView, ...]:  # fmt: skip
    """Return one view for each promise of a run.

    Parameters
    ----------
    folder : RunFolder
    config : Config
    facts : mapping
        ``run.json``.
    rows : sequence of mapping
        ``metrics.jsonl``.
    now : float
        Unix time; ledgers are read every two seconds at most.
    known : Known
        Keep one for a run.
    """
    if not config.privacy.on:
        return ()
    if known.promises is None:
        known.promises = promises(config)
    reached = int(rows[-1]["round"]) if rows else 0
    return tuple(
        _view(promise, folder, config, facts, (reached, now // _PAUSE), reached, known)
        for promise in known.promises
    )


def _view(
    promise: Promise, folder: RunFolder, config: Config, facts: Mapping[str, Any], mark: object,
    reached: int, known: Known,
) -> BudgetView:  # fmt: skip
    if known.groups.get(promise.unit, (None, None))[0] != mark:
        known.groups[promise.unit] = (mark, _charged(promise, folder, config, facts, known))
    charged = known.groups[promise.unit][1]
    each = promise.charge
    groups = {each.event: each.count * reached} if charged is None else charged
    whole = charged is not None
    if promise.unit is Unit.CLIENT:
        whose = "All that one node contributed"
    else:
        whose = f"Each example of a node that was asked {'most often' if whole else 'every round'}"
    words = f"{whose}; {relation_words(promise.relation.value)}."
    if not whole:
        words += " The rounds that count, without attempts that failed."
    return BudgetView(
        promise.unit.value, _cost(promise, groups, known), promise.settings.epsilon or None,
        promise.delta, promise.relation.value, words,
    )  # fmt: skip


def _charged(
    promise: Promise, folder: RunFolder, config: Config, facts: Mapping[str, Any], known: Known
) -> Groups | None:
    """Return what the ledger was charged for this run; of the worst client's account.

    Under client-level privacy how often somebody was asked depends on secret coins: then the
    ledgers of examples are not looked at.
    """
    example = promise.unit is Unit.EXAMPLE
    if example and config.privacy.client is not None:
        return None
    elsewhere = example and folder.books.exists()
    place = str(folder.books) if elsewhere else str(facts.get("ledger") or ledger_place(config))
    job = facts.get("job")
    try:
        if place not in known.ledgers:
            known.ledgers[place] = open_ledger(place, create=False)
        ledger = known.ledgers[place]
        name = dataset_name(config)
        ours = [
            account for account in ledger.accounts()
            if account.unit is promise.unit and account.relation is promise.relation
            and (account.dataset == name or (example and account.dataset.startswith(f"{name}/")))
        ]  # fmt: skip
        found = [ledger.groups(one, str(job)) for one in ours]
        return max(found, key=lambda groups: sum(groups.values()), default=None)
    except FedtuneError:
        return None


def _cost(promise: Promise, groups: Groups, known: Known) -> float:
    charges, each = sum(groups.values()), promise.charge
    if charges == 0:
        return 0.0
    relation, delta = promise.relation, promise.delta
    if set(groups) != {each.event}:  # noise that was chosen on the way: without tables
        return quick(groups, delta, relation)
    planned = each.count * promise.rounds
    step = each.count * max(1, math.ceil(promise.rounds / _STOPS))
    stop = math.ceil(charges / step) * step
    if charges <= planned:
        stop = min(stop, planned)
    renyi = float(epsilon_of_rdp(charges * rdp(each.event, relation), delta)[0])
    if (promise.unit, stop) not in known.costs:
        try:
            exact = spent([Charge(each.event, stop)], delta, relation).epsilon
        except FedtuneError:
            exact = math.inf
        known.costs[promise.unit, stop] = exact
    return min(renyi, known.costs[promise.unit, stop])
