"""A body server as a child of this process, on a loopback port that it keeps over restarts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from fedtune.config import Config
from fedtune.errors import ExitCode, FedtuneError
from fedtune.server.body import Body

__all__ = ["BodyProcess", "load_body", "start_body"]

_START = 120.0
_STOP = 10.0


class BodyProcess:
    """A running ``fedtune body``. It ends when this process does, however that ends.

    Parameters
    ----------
    file : Path
        The experiment.
    options : sequence of str
        More arguments of ``fedtune body``.
    port : int
        0: any free one.
    """

    def __init__(self, file: Path, options: Sequence[str] = (), port: int = 0) -> None:
        self._file = file
        self._options = tuple(options)
        self._folder = tempfile.TemporaryDirectory(prefix="fedtune-body-")
        self.address = f"127.0.0.1:{port}"
        self._child: subprocess.Popen[bytes] | None = None
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Return the child's process id; 0 if there is none."""
        return self._child.pid if self._child is not None else 0

    def kill(self) -> None:
        """End the child at once, as a lost machine would."""
        if self._child is not None:
            self._child.kill()
            self._end()

    def restart(self) -> None:
        """Start again at the same address, after ``kill`` or instead of what runs."""
        self.kill()
        self._start()

    def close(self) -> int | None:
        """Ask the child to stop; return its exit status, None if it was not running."""
        status = None
        if self._child is not None:
            self._child.send_signal(signal.SIGTERM)
            try:
                status = self._child.wait(_STOP)
            except subprocess.TimeoutExpired:
                self._child.kill()
            self._end()
        self._folder.cleanup()
        return status

    def __enter__(self) -> BodyProcess:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def said(self) -> str:
        """Return what the child has written on its standard error."""
        try:
            return (Path(self._folder.name) / "log").read_text(errors="replace")
        except OSError:
            return ""

    def _start(self) -> None:
        ready = Path(self._folder.name) / "ready"
        ready.unlink(missing_ok=True)
        command = [
            sys.executable, "-m", "fedtune.cli.body", str(self._file), "--listen", self.address,
            "--ready", str(ready), "--until-eof", *self._options,
        ]  # fmt: skip
        with (Path(self._folder.name) / "log").open("ab") as log:
            # Its input is a pipe of ours: it ends with us, and the child with it.
            self._child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log,
                env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
            )  # fmt: skip
        end = time.monotonic() + _START
        while not ready.is_file():
            status = self._child.poll()
            if status is not None or time.monotonic() > end:
                self.kill()
                raise FedtuneError(
                    f"the body's server did not start (exit status {status}): "
                    f"{self.said()[-2000:].strip()}",
                    hint=f"try it by itself: fedtune body {self._file}",
                    code=ExitCode.ENGINE,
                )
            time.sleep(0.02)
        self.address = ready.read_text(encoding="ascii")

    def _end(self) -> None:
        if self._child is not None:
            self._child.wait()
            if self._child.stdin is not None:
                self._child.stdin.close()
            self._child = None


def start_body(file: Path, options: Sequence[str] = (), port: int = 0) -> BodyProcess:
    """Start a body server for an experiment file and return when it listens.

    Raises
    ------
    FedtuneError
        It did not start; what it said is in the message.
    """
    return BodyProcess(file, options, port)


def load_body(config: Config) -> tuple[Body, str]:
    """Return the body of an experiment's model, and the digest that its clients must have."""
    import torch

    from fedtune.client.remote import ends
    from fedtune.models import load_base
    from fedtune.server.body import middle
    from fedtune.split.blocks import cut_of
    from fedtune.split.parts import ends_digest

    if not config.tuning.cut:
        raise FedtuneError(
            f"tuning.method='{config.tuning.method}' has no body to serve",
            hint="split tuning is tuning.method='sfprompt'",
            code=ExitCode.CONFIG,
        )
    torch.set_num_threads(config.engine.threads)
    split = config.tuning.split
    # The head that is trained is the client's: how many classes it has is not known here.
    labels = config.data.labels or ("0", "1")
    given = (config.model, tuple(labels), config.seed, config.data.template)
    kept = load_base(*given, ends(split.head, split.tail))
    cut = cut_of(kept.model, split.head, split.tail)
    digest = ends_digest(kept.model, cut)
    del kept
    return Body(load_base(*given, middle(split.head, split.tail)).model, cut), digest
