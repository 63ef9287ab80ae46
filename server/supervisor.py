"""``fedtune serve`` behind its command: runs one after another on one engine, kept alive.

The engine's children die and come back; a ServerApp that died is started again on its run
folder, where its last committed round is. What may join follows the roster while runs last.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from fedtune.errors import ExitCode, FedtuneError
from fedtune.files import Fresh
from fedtune.keys.roster import Roster, logins, read_roster
from fedtune.server.run_folder import RunFolder
from fedtune.server.snapshot import NodeView, Seen, Snapshot, Trouble, snapshot_of
from fedtune.server.superlink import Node

__all__ = ["Engine", "Supervisor"]

_LOOK = 0.5
_MOST_DEATHS = 5
_TROUBLES = 50
_ENDED = ("finished", "failed", "stopped")


class Engine(Protocol):
    """What is needed of ``superlink.Engine``."""

    def sync(
        self, members: Mapping[str, EllipticCurvePublicKey]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Let exactly these in."""
        ...

    def nodes(self) -> tuple[Node, ...]:
        """Return the nodes that may join."""
        ...

    def start_run(self, folder: Path) -> int:
        """Start a ServerApp on a folder."""
        ...

    def app_alive(self, folder: Path) -> bool:
        """Say whether one works on it."""
        ...

    def stop_run(self, run: int) -> None:
        """End a run; nothing works on its folder then."""
        ...

    def tend(self) -> None:
        """Bring back what died."""
        ...


@dataclass
class Supervisor:
    """Works through a queue of run folders.

    Parameters
    ----------
    engine : Engine
    keys : Path
        Folder with the roster.
    facts : mapping
        ``federation``, ``address`` and ``certificate_days_left``, for the status page.
    tell : callable
        Hears in plain words what a person should know.
    """

    engine: Engine
    keys: Path
    facts: Mapping[str, Any]
    tell: Callable[[str], None]
    stop: threading.Event = field(default_factory=threading.Event)
    _folder: RunFolder | None = None
    _queue: list[str] = field(default_factory=list)
    _roster: Roster | None = None
    _troubles: list[Trouble] = field(default_factory=list)
    _seen: Seen = field(default_factory=Seen)
    _nodes: tuple[Node, ...] = ()

    def __post_init__(self) -> None:
        self._file = Fresh(self.keys / "roster", lambda: read_roster(self.keys))

    def run(self, folders: Sequence[RunFolder]) -> None:
        """Run every folder to its end, one after another.

        Raises
        ------
        FedtuneError
            What ended a run that failed, with its exit code; later ones are not begun.
        """
        self._queue = [folder.path.name for folder in folders]
        self.follow_roster()
        for folder in folders:
            self._queue.pop(0)
            self._folder = folder
            self._one(folder)
            if self.stop.is_set():
                return

    def heard(self, words: str) -> None:
        """Hear what happens to the engine's children."""
        self._trouble("the server", words)

    def snapshot(self) -> Snapshot:
        """Return how everything stands; from any thread."""
        roster = self._roster
        views = [NodeView(one.name, _seen_as(one), one.last_seen) for one in self._nodes]
        known = {view.name for view in views}
        if roster:
            views += [
                NodeView(one.name, "never") for one in roster.members if one.name not in known
            ]
            views += [NodeView(one.name, "revoked") for one in roster.revoked]
        return snapshot_of(
            self._folder, views, queue=tuple(self._queue), troubles=tuple(self._troubles),
            seen=self._seen, **self.facts,
        )  # fmt: skip

    def follow_roster(self) -> None:
        """Let in who is enrolled now, and nobody else."""
        roster = self._file.now()
        if roster is self._roster:
            return
        added, removed = self.engine.sync(logins(roster))
        if self._roster is not None:
            for name in added:
                self.tell(f"'{name}' may join now")
            for name in removed:
                self.tell(f"'{name}' is cut off")
        self._roster = roster

    def _one(self, folder: RunFolder) -> None:
        """Keep a ServerApp on a folder until its run has ended."""
        folder.update_status(status="starting", reason="")
        run, deaths, reached = self.engine.start_run(folder.path), 0, -1
        while True:
            self.stop.wait(_LOOK)
            if self.stop.is_set():
                self.engine.stop_run(run)
                self._note_stop(folder, "stopped by Ctrl-C or a termination signal")
                return
            self.engine.tend()
            self._look()
            if self.engine.app_alive(folder.path):
                continue
            status = folder.status()
            if status.get("status") in _ENDED:
                self.engine.stop_run(run)
                self._ended(folder, status)
                return
            rounds = len(folder.metrics())
            deaths = deaths + 1 if rounds == reached else 1
            reached = rounds
            if deaths > _MOST_DEATHS:
                self._note_stop(folder, "the ServerApp died again and again")
                raise FedtuneError(
                    f"the ServerApp of '{folder.path.name}' died {deaths} times without a round",
                    hint="see serverapp.log in federation.server.state", code=ExitCode.ENGINE,
                )  # fmt: skip
            self._trouble("the ServerApp", "died; going on from the last committed round")
            self.engine.stop_run(run)
            # Where the disk is full that raises: another ServerApp would only die of it too.
            folder.update_status(status="starting")
            run = self.engine.start_run(folder.path)

    def _ended(self, folder: RunFolder, status: Mapping[str, Any]) -> None:
        if status["status"] == "finished":
            self.tell(f"run '{folder.path.name}' finished")
            return
        if status["status"] == "stopped":
            self.tell(f"run '{folder.path.name}' was stopped; go on with --resume")
            return
        raise FedtuneError(
            str(status.get("reason", "the run failed")), hint=str(status.get("hint", "")),
            code=ExitCode(int(status.get("code", ExitCode.ENGINE))),
        )  # fmt: skip

    def _note_stop(self, folder: RunFolder, reason: str) -> None:
        if folder.status().get("status") not in _ENDED:
            folder.update_status(status="stopped", reason=reason)

    def _look(self) -> None:
        """See who is there and who is enrolled; neither must end a run."""
        try:
            self.follow_roster()
            self._nodes = self.engine.nodes()
        except (FedtuneError, OSError) as error:
            self._trouble("the server", str(error))

    def _trouble(self, who: str, words: str) -> None:
        if self._troubles and self._troubles[-1].words == words:
            return
        self._troubles = [*self._troubles[1 - _TROUBLES :], Trouble(time.time(), None, who, words)]
        self.tell(f"{who}: {words}")


def _seen_as(node: Node) -> Any:
    return "never" if node.status == "registered" else node.status
