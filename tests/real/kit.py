"""A real federation in a temporary folder: real processes, TLS, node keys, loopback."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from fedtune.keys.authority import make_authority, make_server
from fedtune.keys.node import new_identity, public_of, write_identity
from fedtune.keys.roster import enrol

WORDS = "the patient slept well and had no fever in the night ward notes say so".split()

TOML = """
schema = 1
name = "wards"
seed = 7
[data]
source = "notes.jsonl"
max_length = 32
pack = false
holdout = 0.0
[data.partition]
by = "column"
column = "author"
[tuning]
rank = 2
lr = 5e-3
batch_size = 4
steps = 2
[federation]
rounds = {rounds}
deadline = {deadline}
{federation}
[federation.server]
address = "127.0.0.1:{port}"
nodes = {nodes}
status = ""
[evaluation]
clients = 0
[output]
folder = "runs"
{more}
"""

OPEN = """
promises = ["none", "example", "client", "client-by-server"]
insecure_noise = true
min_colluding = 0
max_delta = 1e-3
max_epsilon = 50.0
max_epsilon_per_run = 50.0
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass
class Process:
    """A command of ours in a process group of its own, with its output in a file."""

    arguments: Sequence[str]
    folder: Path
    log: Path
    running: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1", "FLWR_TELEMETRY_ENABLED": "0", "NO_COLOR": "1",
            "FEDTUNE_LEDGER": str(self.folder / "server-ledger.db"), "COLUMNS": "200",
        }  # fmt: skip
        with self.log.open("ab") as out:
            self.running = subprocess.Popen(
                [sys.executable, "-m", "fedtune", *self.arguments], cwd=self.folder,
                env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip

    @property
    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def alive(self) -> bool:
        return self.running.poll() is None

    def kill(self) -> None:
        """Kill this process alone, at once; its children must see to themselves."""
        self.running.kill()
        self.running.wait()

    def stop(self, seconds: float = 40) -> int:
        """Ask it to end, and wait."""
        if self.alive():
            self.running.send_signal(signal.SIGTERM)
        return self.wait(seconds)

    def wait(self, seconds: float) -> int:
        try:
            return self.running.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.text[-3000:]}") from None

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.running.pid, signal.SIGKILL)
        self.running.wait()


@dataclass
class Federation:
    """A folder with keys and text for ``names``, and the processes that were started in it."""

    folder: Path
    names: tuple[str, ...]
    port: int
    file: Path
    processes: list[Process] = field(default_factory=list)

    def command(self, *arguments: str, log: str = "command") -> Process:
        process = Process(arguments, self.folder, self.folder / f"{log}.log")
        self.processes.append(process)
        return process

    def serve(self, *more: str, log: str = "serve") -> Process:
        return self.command("serve", *(more or (self.file.name,)), log=log)

    def join(
        self, name: str, *more: str, port: int | None = None, policy: str = "open.toml",
        log: str = "",
    ) -> Process:  # fmt: skip
        return self.command(
            "join", "--server", f"127.0.0.1:{port or self.port}", "--ca", "keys/ca.pem",
            "--key", f"{name}.key", "--data", f"{name}.jsonl", "--policy", policy,
            "--grace", "5", *more, log=log or name,
        )  # fmt: skip

    def run(self) -> Path:
        """Return the newest run folder."""
        return max(
            (self.folder / "runs").glob("*/run.json"), key=lambda p: p.stat().st_mtime
        ).parent

    def status(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.run() / "run.json").read_text(encoding="utf-8")))
        except (ValueError, OSError):
            return {}

    def rows(self) -> list[dict[str, Any]]:
        """Return the committed rounds so far."""
        try:
            text = (self.run() / "metrics.jsonl").read_text(encoding="utf-8")
        except (ValueError, OSError):
            return []
        return [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]

    def adapter(self, run: Path | None = None) -> dict[str, np.ndarray[Any, Any]]:
        return load_file((run or self.run()) / "adapter" / "adapter_model.safetensors")

    def sent(self, name: str) -> list[dict[str, Any]]:
        """Return the log of what left a node."""
        file = self.folder / f"{name}.node" / "sent.jsonl"
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    def logs(self) -> str:
        return "\n".join(
            f"--- {file.name}\n{file.read_text(encoding='utf-8', errors='replace')[-2500:]}"
            for file in [*self.folder.glob("*.log"), *self.folder.glob("federation/*.log")]
        )

    def until(self, what: Callable[[], object], seconds: float, words: str) -> None:
        """Wait for something; fail with every log if it does not come."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if what():
                return
            time.sleep(0.1)
        raise AssertionError(f"{words}: not within {seconds} s\n{self.logs()}")

    def children(self, process: Process) -> dict[str, int]:
        """Return the process ids of a server's SuperLink and ServerApp."""
        import psutil

        found = {}
        for child in psutil.Process(process.running.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                # What they are comes by standard input; their logs tell them apart.
                for file in child.open_files():
                    if (what := Path(file.path).stem) in ("superlink", "serverapp"):
                        found[what] = child.pid
        return found

    def end(self) -> None:
        for process in self.processes:
            process.end()


def rows_of(name: str, count: int = 24) -> list[dict[str, str]]:
    """Return made-up notes, the same at every call; other names have other notes."""
    rng = np.random.default_rng(sum(name.encode()))
    return [
        {"author": name, "text": " ".join(rng.choice(WORDS, 14).tolist())} for _ in range(count)
    ]


@contextlib.contextmanager
def federation(
    folder: Path, names: Sequence[str] = ("ward-1", "ward-2", "ward-3"), *, rounds: int = 3,
    more: str = "", settings: str = "", deadline: float = 120.0,
) -> Iterator[Federation]:  # fmt: skip
    """Make a federation, and end every process of it afterwards, whatever happened."""
    keys = folder / "keys"
    make_authority(keys, "test")
    make_server(keys, ["127.0.0.1", "localhost"])
    publics, rows = [], []
    for name in names:
        identity = new_identity(name)
        write_identity(folder / f"{name}.key", identity)
        publics.append(public_of(identity))
        mine = rows_of(name)
        rows += mine
        text = "".join(json.dumps(row) + "\n" for row in mine)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    enrol(keys, *publics)
    everything = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "notes.jsonl").write_text(everything, encoding="utf-8")
    (folder / "open.toml").write_text(OPEN, encoding="utf-8")
    port = free_port()
    file = folder / "federation.toml"
    file.write_text(
        TOML.format(
            rounds=rounds, federation=settings, port=port, nodes=len(names), more=more,
            deadline=deadline,
        ),
        encoding="utf-8",
    )  # fmt: skip
    made = Federation(folder, tuple(names), port, file)
    try:
        yield made
    finally:
        made.end()
