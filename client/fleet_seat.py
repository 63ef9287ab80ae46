"""A node's place at its server: taken, kept with heartbeats, taken again, given up."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable

import grpc

from fedtune.client.fleet_checks import Verdict, diagnose, judge, probe, to_error
from fedtune.client.fleet_door import Door
from fedtune.client.fleet_line import Line, Signer, open_line
from fedtune.client.fleet_memory import Memo
from fedtune.errors import ExitCode, FedtuneError

__all__ = ["Seat"]

_NEW_PATIENCE = 2.0
_STRANGE_PATIENCE, _KNOWN_PATIENCE = 10.0, 60.0
"""Seconds a key may be unknown: a server that starts enrols its nodes a moment later."""
_STOP_PATIENCE = 10.0
_FIRST_PAUSE = 0.1
_FETCH_SECONDS = 1.0

_Tell = Callable[..., None]


class Seat:
    """Our place at one server, and the line we have now.

    Parameters
    ----------
    door : Door
    memo : Memo
    tell : callable
        ``tell(kind, words, seconds=...)``.
    stop : threading.Event
    over : callable
        Whether even the message at work has to end.
    """

    def __init__(
        self,
        door: Door,
        memo: Memo,
        tell: _Tell,
        stop: threading.Event,
        over: Callable[[], bool],
    ) -> None:
        self._door, self._memo, self._tell = door, memo, tell
        self._stop, self._over = stop, over
        self._signer = Signer(door.login)
        self._gone = threading.Event()
        self._was_connected = False
        self.line: Line | None = None

    def here(self) -> Line:
        """Return the line.

        Raises
        ------
        FedtuneError
            There is none any more: the node is stopping.
        """
        if self.line is None:
            raise FedtuneError("the node is stopping", code=ExitCode.INTERRUPTED)
        return self.line

    def connect(self, why: str = "") -> None:
        """Take our place at the server; returns when that is done, or when stopping.

        Raises
        ------
        FedtuneError
            The server refuses for good.
        """
        self._drop()
        began, pause, told = time.monotonic(), _FIRST_PAUSE, bool(why)
        if why:
            self._tell("lost", f"{why}; trying again")
        while not self._stop.is_set() or self._within(began, _STOP_PATIENCE):
            line = open_line(self._door, self._signer)
            try:
                if self._memo.node:
                    line.node = self._memo.node
                    line.beat()
                else:
                    line.activate()
            except grpc.RpcError as error:
                verdict = judge(error)
                try:
                    said = self._weigh(verdict, line, time.monotonic() - began)
                finally:
                    line.close()
                if not said:
                    continue
                if not told:
                    told = True
                    self._tell("lost", f"{said}; trying again")
                self._pause(pause * random.uniform(0.7, 1.3))
                pause = min(pause * 2, self._door.most_wait)
                continue
            self.line = line
            self._memo.settle(line.node)
            seconds = time.monotonic() - began
            self._tell("connected", f"connected to {self._door.address}", seconds=seconds)
            self._was_connected = True
            return

    def beat(self) -> None:
        """Send heartbeats, whatever else is going on, until we leave."""
        pause = self._door.heartbeat * 0.6
        while not self._gone.wait(pause * random.uniform(0.8, 1.2)):
            pause = self._door.heartbeat * 0.6
            line = self.line
            if line is None:
                continue
            try:
                line.beat()
            except (grpc.RpcError, ValueError):  # ValueError: the line was closed meanwhile
                pause = min(2.0, pause)

    def leave(self, since_answer: float) -> None:
        """Give up our place and close the line.

        Flower throws away the answer of a node that has left, if nobody had fetched it
        yet: so a moment passes after the last one, ``since_answer`` seconds ago.
        """
        self._gone.set()
        if self.line is not None:
            time.sleep(max(0.0, _FETCH_SECONDS - since_answer))
            with contextlib.suppress(grpc.RpcError):
                self.line.deactivate()
        self._drop()

    def _weigh(self, verdict: Verdict, line: Line, seconds: float) -> str:
        """Say why we are not connected; nothing means: try again at once.

        Raises
        ------
        FedtuneError
            For good.
        """
        kind, words = verdict.kind, verdict.words
        if kind == "moved" and self._memo.node:
            self._memo.settle(0)
            return ""
        if kind == "taken":
            verdict = probe(line)
            kind = "taken" if verdict.kind == "known" else verdict.kind
            words = words if kind == "taken" else verdict.words
        if kind == "taken" and seconds > 2 * self._door.heartbeat + 5:
            raise self._refused(
                FedtuneError(
                    f"server {self._door.address}: another process is connected with this key",
                    hint="stop it, or give this one a key of its own: fedtune keys node NAME",
                    code=ExitCode.ENGINE,
                )
            )
        patience = _KNOWN_PATIENCE if self._was_connected else _STRANGE_PATIENCE
        if kind == "stranger" and seconds > patience:
            checks = diagnose(self._door)
            if not all(check.ok for check in checks):
                raise self._refused(to_error(checks, self._door.address))
        if not self._was_connected and kind in {"away", "clock", "other"}:
            checks = diagnose(self._door)
            bad = next((check for check in checks if not check.ok), None)
            if bad is not None:
                lasting = (bad.name == "TLS" and not bad.passing) or kind == "other"
                if bad.name == "clock" or (lasting and seconds > _NEW_PATIENCE):
                    raise self._refused(to_error(checks, self._door.address))
                return f"{bad.name}: {bad.words}"
        return words

    def _refused(self, error: FedtuneError) -> FedtuneError:
        self._tell("refused", f"{error}; {error.hint}" if error.hint else str(error))
        return error

    def _drop(self) -> None:
        line, self.line = self.line, None
        if line is not None:
            line.close()

    def _within(self, began: float, seconds: float) -> bool:
        return self._was_connected and not self._over() and time.monotonic() - began < seconds

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            time.sleep(min(seconds, 0.2))
