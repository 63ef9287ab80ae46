"""Reads a run's files while they grow: each line once, however often somebody looks."""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.config import Config
from fedtune.privacy.words import shown
from fedtune.server.event_log import EVENTS
from fedtune.server.run_folder import RunFolder
from fedtune.server.snapshot_budget import Known

__all__ = ["Asked", "Seen", "Tally", "Trouble"]

_MARK = 64
"""Bytes before the place read to that tell whether a file is still the same."""
_EVENTS_FROM_END = 4 * 1024 * 1024
_MOST_TROUBLES = 50
_NAME, _WORDS = 80, 300


@dataclass(frozen=True)
class Trouble:
    """One thing that went wrong, in plain words.

    Attributes
    ----------
    when : float or None
        Unix time, if it is known.
    round : int or None
    who : str
        A node, or a part of the server; empty: the run as a whole.
    words : str
    """

    when: float | None
    round: int | None
    who: str
    words: str


@dataclass
class Tally:
    """What became of one client's answers in the rounds that count."""

    ok: int = 0
    failed: int = 0
    late: int = 0
    note: str = ""


@dataclass
class Asked:
    """The attempt that was begun last, and who has answered.

    ``attempt`` is the run's own number of it; ``begun`` is a Unix time.
    """

    round: int
    attempt: int
    cohort: int
    begun: float
    done: dict[str, str] = field(default_factory=dict)
    ended: bool = False


@dataclass
class _Tail:
    """A file of JSON lines that grows, or is replaced."""

    path: Path
    most: int = 0
    place: int = 0
    mark: bytes = b""
    inode: int = -1

    def new(self) -> tuple[list[dict[str, Any]], bool]:
        """Return the whole lines that came since, and whether the file began anew."""
        try:
            with self.path.open("rb") as file:
                begun = self._begun_anew(file.fileno())
                start = self.place
                if begun:
                    total = os.fstat(file.fileno()).st_size
                    start = max(0, total - self.most) if self.most else 0
                file.seek(start)
                data = file.read()
        except OSError:
            begun = self.inode != -1
            self.place, self.mark, self.inode = 0, b"", -1
            return [], begun
        whole = data[: data.rfind(b"\n") + 1]
        self.place = start + len(whole)
        self.mark = (self.mark + whole)[-_MARK:] if not begun else whole[-_MARK:]
        lines = whole.split(b"\n")
        # Read from the middle of a file, the first line is half of one.
        return list(_values(lines[1:] if begun and start else lines)), begun

    def _begun_anew(self, handle: int) -> bool:
        found = os.fstat(handle)
        same = found.st_ino == self.inode and found.st_size >= self.place
        if same and self.mark:
            same = os.pread(handle, len(self.mark), self.place - len(self.mark)) == self.mark
        self.inode = found.st_ino
        return not same


@dataclass
class Seen:
    """What was read of a run's files until now. Threads may share one.

    Keep one, and hand it to every ``snapshot_of``; another folder makes it begin anew.

    Attributes
    ----------
    rows : list of dict
        ``metrics.jsonl``.
    tallies : dict of str to Tally
        ``clients.jsonl``, by client. Under client-level privacy both this and ``asked`` are
        the server's secret.
    asked : Asked or None
        ``events.jsonl``.
    troubles : deque of Trouble
        Of the round loop, oldest first, each with whether it tells who was asked.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    tallies: dict[str, Tally] = field(default_factory=dict)
    asked: Asked | None = None
    troubles: deque[tuple[Trouble, bool]] = field(
        default_factory=lambda: deque(maxlen=_MOST_TROUBLES)
    )
    known: Known = field(default_factory=Known, repr=False)
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)
    _config: Config | None = None
    _path: Path | None = None
    _tails: tuple[_Tail, _Tail, _Tail] | None = None

    def look(self, folder: RunFolder) -> Config:
        """Read what is new in a run folder; hold ``lock`` while the values are used.

        Raises
        ------
        FedtuneError
            It is no run folder.
        """
        with self.lock:
            if self._path != folder.path or self._tails is None:
                self._forget(folder)
            if self._config is None:
                self._config = folder.config()
            if self._tails is not None:
                self._read(*self._tails)
            return self._config

    def _forget(self, folder: RunFolder) -> None:
        self._path, self._config = folder.path, None
        self._tails = (
            _Tail(folder.path / "metrics.jsonl"),
            _Tail(folder.path / "clients.jsonl"),
            _Tail(folder.path / EVENTS, most=_EVENTS_FROM_END),
        )
        self.rows, self.tallies, self.asked, self.known = [], {}, None, Known()
        self.troubles.clear()

    def _read(self, metrics: _Tail, clients: _Tail, events: _Tail) -> None:
        lines, anew = events.new()
        if anew:
            self.asked = None
            self.troubles.clear()
        for line in lines:
            self._event(line)
        lines, anew = clients.new()
        if anew:
            self.tallies = {}
        for line in lines:
            self._client(line)
        lines, anew = metrics.new()
        self.rows = [*([] if anew else self.rows), *(row for row in lines if "round" in row)]

    def _client(self, line: Mapping[str, Any]) -> None:
        outcome = line.get("outcome")
        tally = self.tallies.setdefault(shown(str(line.get("client", "?")), _NAME), Tally())
        tally.ok += outcome == "ok"
        tally.late += outcome == "late"
        tally.failed += outcome in ("failed", "dropped")
        reason = shown(str(line.get("reason", "")), _WORDS)
        tally.note = "" if outcome == "ok" else f"round {line.get('round')}: {reason}"

    def _event(self, line: Mapping[str, Any]) -> None:
        kind, number, when = line.get("event"), line.get("round"), _number(line.get("time"))
        if kind == "lost":
            words = f"{line.get('lines')} events could not be written: the disk refused them"
            self.troubles.append((Trouble(when, None, "", words), False))
        if not isinstance(number, int):
            return
        if kind == "round_started":
            self._started(line, number, when)
        elif kind == "client_done":
            name = shown(str(line.get("client", "?")), _NAME)
            outcome = str(line.get("outcome", "?"))
            if self.asked is not None and self.asked.round == number and not self.asked.ended:
                self.asked.done[name] = outcome
            if outcome != "ok":
                reason = shown(f"{outcome}: {line.get('reason', '')}", _WORDS)
                # Round 0 asks everybody who they are: that tells nothing about a draw.
                self.troubles.append((Trouble(when, number or None, name, reason), number > 0))
        elif kind == "round_done" and self.asked is not None:
            self.asked.ended = True

    def _started(self, line: Mapping[str, Any], number: int, when: float | None) -> None:
        before = self.asked
        if before is not None and before.round == number and not before.ended:
            all_in = len(before.done) >= before.cohort
            words = (
                "too few good answers: asked again" if all_in
                else "the round was interrupted: begun again"
            )  # fmt: skip
            self.troubles.append((Trouble(when, number, "", words), False))
        attempt, cohort = line.get("attempt"), line.get("cohort")
        self.asked = Asked(
            number, attempt if isinstance(attempt, int) else 0,
            cohort if isinstance(cohort, int) else 0, when or 0.0,
        )  # fmt: skip


def _values(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):  # half a line, from a disk that was full
            continue
        if isinstance(value, dict):
            yield value


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
