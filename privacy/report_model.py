"""The privacy report as typed values; its JSON is what is signed."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from fedtune.privacy.facts import Facts, Omission
from fedtune.privacy.report_choices import Choices
from fedtune.privacy.report_fields import Named
from fedtune.privacy.report_ledger import Extract
from fedtune.privacy.server_view import ServerView
from fedtune.privacy.statement import Number, Statement

__all__ = ["Answer", "Chapter", "Left", "Note", "OtherJob", "Person", "Point", "Report"]

_FROZEN = ConfigDict(extra="forbid", frozen=True)


class Note(BaseModel):
    """Something to know before signing."""

    model_config = _FROZEN

    level: Literal["danger", "caution"]
    text: str


class Point(BaseModel):
    """Epsilon after so many rounds."""

    model_config = _FROZEN

    round: float
    epsilon: Number
    unsampled: Number


class Person(BaseModel):
    """Epsilon for somebody who stands behind several units."""

    model_config = _FROZEN

    units: int
    one_place: Number
    """All of them at one client (unit example), or so many clients (unit client)."""
    several_places: Number | None
    """Unit example: one example, present at so many clients."""


class Left(BaseModel):
    """The budget of one data set, over all jobs."""

    model_config = _FROZEN

    name: str
    run: Number
    spent: Number
    """All jobs, at the budget's delta, or at the statement's when there is no budget."""
    delta: float
    budget: float | None
    left: float | None
    more: int | None
    """How many more releases like this run's last kind fit. Worst account only."""


class OtherJob(BaseModel):
    """Another job that used the same data."""

    model_config = _FROZEN

    job: str
    first: str
    last: str
    datasets: int
    releases: int
    epsilon: Number
    """Alone, on the data set of this run where it cost most."""


class Answer(BaseModel):
    """One of the three questions, answered."""

    model_config = _FROZEN

    question: str
    text: str
    strong: str
    """What must not be overlooked."""


class Chapter(BaseModel):
    """A statement with everything that explains it."""

    model_config = _FROZEN

    statement: Statement
    answers: tuple[Answer, ...]
    model: str
    bounded_for: tuple[str, ...]
    unbounded_for: tuple[str, ...]
    beyond: tuple[str, ...]
    ran: tuple[tuple[str, str], ...]
    target: float | None
    curve: tuple[Point, ...] = ()
    people: tuple[Person, ...] = ()
    budgets: tuple[Left, ...] = ()
    jobs: tuple[OtherJob, ...] = ()
    choices: Choices | None = None
    """What the clipping policy chose, where it chose anything."""


class Report(BaseModel):
    """All that is signed."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_version: Literal[1] = Field(default=1, alias="schema")
    made: str
    by: str
    as_of: str
    """Until when other jobs and budgets are known."""
    private: bool
    """Every statement holds, and there is one."""
    answer: str
    notes: tuple[Note, ...]
    facts: Facts
    chapters: tuple[Chapter, ...]
    not_covered: tuple[Omission, ...]
    server_view: ServerView | None = None
    """Of a split run: what bounds what the server of the body sees. Never added to the rest."""
    fields: tuple[Named, ...]
    ledger: Extract
