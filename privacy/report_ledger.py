"""What a run keeps of the ledger, ``RUN/ledger.json``, as typed values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedtune.privacy.events import Relation, Unit, from_json, releases_in
from fedtune.privacy.facts import read_model

__all__ = ["Account", "Budget", "Extract", "Group", "JobUse", "compare", "read_extract"]

_OURS = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

Positive = Annotated[float, Field(gt=0.0)]
Delta = Annotated[float, Field(gt=0.0, lt=1.0)]


class Budget(BaseModel):
    """What an owner allows."""

    model_config = _OURS

    epsilon: Positive
    delta: Delta


class Group(BaseModel):
    """Equal events of an account."""

    model_config = _OURS

    event: dict[str, Any]
    """As ``privacy.events.to_json`` writes it."""
    count: int = Field(ge=0)


class JobUse(BaseModel):
    """What one job did to an account."""

    model_config = _OURS

    job: str
    groups: tuple[Group, ...]
    first: str | float | None = None
    last: str | float | None = None


class Account(BaseModel):
    """One data set under one unit and relation."""

    model_config = _OURS

    dataset: str
    unit: Unit
    relation: Relation
    budget: Budget | None = None
    head: str
    """Hash at the end of the account's chain."""
    groups: tuple[Group, ...]
    """This job."""
    all_jobs: tuple[JobUse, ...] = ()
    all_groups: tuple[Group, ...] = ()
    length: int = 0
    """Entries in the chain."""
    unfinished: int = 0
    """Releases of this job that were reserved and never noted as done. They count."""

    @model_validator(mode="before")
    @classmethod
    def _count_unfinished(cls, given: Any) -> Any:
        """Count what was lost in flight; the single entries are not kept."""
        if not isinstance(given, dict) or "unfinished" in given:
            return given
        entries, runs = given.get("entries") or (), given.get("runs") or ()
        ended = {one.get("reservation") for one in entries}
        open_ones = [
            one["count"] * _releases(one)
            for one in entries
            if one.get("kind") == "reserve" and one.get("seq") not in ended
        ]
        open_ones += [
            one["count"] * one["times"] * _releases(one)
            for one in runs
            if one["state"] == "reserved"
        ]
        return given | {"unfinished": sum(open_ones)}

    @model_validator(mode="after")
    def _contains(self) -> Account:
        ours, every = (sum(g.count for g in part) for part in (self.groups, self.all_groups))
        if self.all_groups and every < ours:
            raise ValueError(f"'{self.dataset}': all jobs have {every} events, this one {ours}")
        return self


class Extract(BaseModel):
    """What a ledger knows of one job: ``RUN/ledger.json``, without the single entries."""

    model_config = _OURS

    version: Literal[1] = Field(alias="schema")
    job: str
    accounts: tuple[Account, ...]


def read_extract(path: Path) -> Extract:
    """Read ``ledger.json``.

    Raises
    ------
    FedtuneError
        ``ExitCode.RUN_FOLDER`` when it is not there or not understood.
    """
    return read_model(path, Extract)


def compare(left: Extract, now: Extract) -> str:
    """Say how the ledger of now differs from what a run left of it, for this job.

    Returns
    -------
    str
        "same"; "more": the ledger has releases that the run could not note, because it
        was killed; or "less": it is another ledger, or an old copy of it.
    """
    counts = {(a.dataset, a.unit, a.relation): _count(a) for a in now.accounts}
    before = {(a.dataset, a.unit, a.relation): _count(a) for a in left.accounts}
    if any(counts.get(key, 0) < count for key, count in before.items()):
        return "less"
    return "more" if sum(counts.values()) > sum(before.values()) else "same"


def _releases(entry: Mapping[str, Any]) -> int:
    return releases_in(from_json(entry.get("event") or {}))


def _count(account: Account) -> int:
    return sum(group.count for group in account.groups)
