"""Every event of a run as one line of ``RUN/events.jsonl``, for whoever looks while it lasts."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.server.events import ClientDone, Event, RoundStarted

__all__ = ["EVENTS", "EventLog"]

EVENTS = "events.jsonl"
"""Its name in the run folder. As secret as ``clients.jsonl``: it says who was asked."""


@dataclass
class EventLog:
    """Appends events to a file; a disk that refuses must not end the run.

    Lines that could not be written are lost, and counted by a line of their own as
    soon as the disk takes one again. Threads may share one log.

    Parameters
    ----------
    path : Path
        Made when the first event comes; usually ``folder.path / EVENTS``.
    """

    path: Path
    _lost: int = 0
    _torn: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def hear(self, event: Event) -> None:
        """Write one event down. Never raises for the disk's sake."""
        with self._lock:
            lines = [_told(event)]
            if self._lost:
                lines.insert(0, {"event": "lost", "lines": self._lost})
            now = round(time.time(), 3)
            text = "".join(json.dumps({"time": now} | line) + "\n" for line in lines)
            if self._write(("\n" if self._torn else "") + text):
                self._lost, self._torn = 0, False
            else:
                self._lost += 1

    def _write(self, text: str) -> bool:
        data = text.encode()
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                written = os.write(handle, data)
            finally:
                os.close(handle)
        except OSError:
            return False
        # A disk may take half a line; the next one must not grow onto it.
        self._torn = self._torn or written < len(data)
        return written == len(data)


def _told(event: Event) -> dict[str, Any]:
    if isinstance(event, RoundStarted):
        return {
            "event": "round_started", "round": event.round, "attempt": event.attempt,
            "cohort": event.cohort,
        }  # fmt: skip
    if isinstance(event, ClientDone):
        return {
            "event": "client_done", "round": event.round, "client": event.client,
            "outcome": event.outcome, "reason": event.reason, "bytes_up": event.bytes_up,
        }  # fmt: skip
    # The row itself stands in metrics.jsonl.
    return {"event": "round_done", "round": event.round}
