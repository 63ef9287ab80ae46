"""What the round loop tells whoever watches: a screen, a logger, a test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["ClientDone", "Event", "RoundDone", "RoundStarted", "Watcher"]

Outcome = Literal["ok", "late", "failed", "dropped"]


@dataclass(frozen=True)
class RoundStarted:
    """A cohort was asked."""

    round: int
    attempt: int
    cohort: int


@dataclass(frozen=True)
class ClientDone:
    """One client of the cohort answered, or can no longer."""

    round: int
    client: str
    outcome: Outcome
    reason: str
    bytes_up: int


@dataclass(frozen=True)
class RoundDone:
    """A round was committed; ``row`` is its line in ``metrics.jsonl``."""

    round: int
    row: Mapping[str, Any]


Event = RoundStarted | ClientDone | RoundDone
Watcher = Callable[[Event], None]
