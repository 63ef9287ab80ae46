"""``fedtune`` in a process of its own that need not import everything first."""

from __future__ import annotations

import os
from pathlib import Path

from fedtune.simulations.workshop import workshop

__all__ = ["Warm"]


class Warm:
    """A command that began as a fork of a process in which nothing has run yet."""

    def __init__(self, *words: str, log: Path) -> None:
        self._process = workshop().Process(target=_run, args=(words, str(log)))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        assert code is not None, f"still running after {timeout} s"
        return code

    def kill(self) -> None:
        self._process.kill()


def _run(words: tuple[str, ...], log: str) -> None:
    from fedtune.cli.app import app

    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(handle, standard)
    app(words)
