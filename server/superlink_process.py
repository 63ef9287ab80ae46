"""One child process of the engine: started, looked at, ended, and its log."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.files import storage

__all__ = ["Child", "cut", "spawn", "tail"]

_MOST_LOG_BYTES = 8 << 20
_LOCAL = "127.0.0.1"
_ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT


@dataclass(frozen=True)
class Child:
    """A process of its own group, and the file that it writes to."""

    process: subprocess.Popen[bytes]
    log: Path

    def alive(self) -> bool:
        """Say whether it runs."""
        if self.process.returncode is not None:
            return False
        with contextlib.suppress(ChildProcessError):
            if os.waitid(os.P_PID, self.process.pid, _ENDED) is None:
                return True
            # While it is not waited for, no other process can have its number.
            self._kill_group()
        return self.process.poll() is None

    def ending(self) -> str:
        """Say how it ended, in words."""
        code = self.process.returncode
        if code is None:
            return "nothing: it runs"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def stop(self, grace: float) -> None:
        """End it, and what it started; kill what is there after ``grace`` seconds."""
        if not self.alive():
            return
        self.process.terminate()
        end = time.monotonic() + grace
        while self.alive():
            if time.monotonic() > end:
                self._kill_group()
            time.sleep(0.02)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def spawn(order: Mapping[str, Any], log: Path, *, home: Path, lock: int) -> Child:
    """Start a child that does ``order`` (see ``superlink_child``).

    Parameters
    ----------
    log : Path
        Its output is appended; the terminal sees none of it.
    home : Path
        The engine's folder; Flower's own lies in it.
    lock : int
        File descriptor of the engine's lock. The child holds it too: no other engine starts
        in this folder while one of the children lives.
    """
    cut(log)
    with storage(log), os.fdopen(_private(log), "ab") as out:
        process = subprocess.Popen(
            # -P: a folder named fedtune where the server is started must not be imported.
            [sys.executable, "-P", "-u", "-m", "fedtune.server.superlink_child"],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=_environment(home),
            pass_fds=(lock,),
            start_new_session=True,
        )
    child = Child(process, log)
    if process.stdin is not None:
        # One that died at once is seen dead by whoever looks next.
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(json.dumps({**order, "parent": os.getpid()}).encode() + b"\n")
    return child


def _private(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def _environment(home: Path) -> dict[str, str]:
    """Return this process's environment with nothing in it that opens or calls anything."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
    kept.setdefault("HF_HUB_OFFLINE", "1")
    kept.setdefault("TRANSFORMERS_OFFLINE", kept["HF_HUB_OFFLINE"])
    kept["NO_PROXY"] = kept["no_proxy"] = ",".join(
        filter(None, (kept.get("NO_PROXY") or kept.get("no_proxy"), _LOCAL))
    )
    return kept | {
        "FLWR_HOME": str(home / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }


def cut(log: Path) -> None:
    """Move a long log aside, over the one that was moved before; who writes to it goes on."""
    if not log.exists() or log.stat().st_size <= _MOST_LOG_BYTES:
        return
    older = log.with_suffix(".log.1")
    # Where the disk is full, the old lines are what has to go.
    with contextlib.suppress(OSError):
        older.unlink(missing_ok=True)
        with log.open("rb") as old, os.fdopen(_private(older), "wb") as new:
            while block := old.read(1 << 20):
                new.write(block)
    os.truncate(log, 0)


def tail(log: Path, lines: int = 8) -> str:
    """Return the last lines of a log, or a word when there are none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 8192))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        text = ""
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:]) or "(empty)"
