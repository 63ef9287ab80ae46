"""A ServerApp that only beats, a supervisor to be killed, and how tests wait for them."""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fedtune.keys.authority import make_authority, make_server
from fedtune.server.superlink import Place

TOY = """
import os, subprocess, time
from pathlib import Path
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    folder = Path(context.run_config["folder"])
    print("toy at work")
    while not (folder / "end").exists():
        nodes = len(list(grid.get_node_ids()))
        (folder / "new").write_text(f"{os.getpid()} {nodes} {os.getcwd()}")
        os.replace(folder / "new", folder / "beat")
        if (folder / "spawn").exists():
            (folder / "spawn").unlink()
            helper = subprocess.Popen(["sleep", "600"])
            (folder / "new").write_text(str(helper.pid))
            os.replace(folder / "new", folder / "helper")
        time.sleep(0.05)
"""

SUPERVISOR = """
import sys, time
from pathlib import Path
from fedtune.server.bundle import build_bundle
from fedtune.server.superlink import Place, start_engine

keys, home, port, run = sys.argv[1:]
files = (Path(keys, name) for name in ("ca.pem", "server.pem", "server.key"))
place = Place(Path(home), f"127.0.0.1:{port}", *files)
engine = start_engine(place, print, bundle=build_bundle("toy_server_app:app"))
engine.start_run(Path(run))
time.sleep(600)
"""


class Words(list[str]):
    """What the engine said."""

    def __call__(self, words: str) -> None:
        self.append(words)

    def __contains__(self, part: object) -> bool:
        return any(str(part) in words for words in self)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(done: Callable[[], bool], seconds: float = 60.0, what: str = "it") -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"{what} did not happen within {seconds} s"
        time.sleep(0.02)


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if alive(child)]


def alive(process: psutil.Process) -> bool:
    """Say whether it runs; what nobody has waited for yet does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def beat(run: Path) -> list[str]:
    """Return what the ServerApp wrote last: its process, the nodes it sees, its folder."""
    file = run / "beat"
    return file.read_text().split() if file.exists() else []


def working(run: Path) -> None:
    """Wait until a ServerApp has written again."""
    (run / "beat").unlink(missing_ok=True)
    until(lambda: bool(beat(run)), what="work of the ServerApp")


def server_keys(folder: Path) -> Path:
    """Make a federation's authority and its server's certificate."""
    make_authority(folder, "test federation")
    make_server(folder, ["127.0.0.1", "localhost"])
    return folder


@contextlib.contextmanager
def hostile_environment(folder: Path) -> Iterator[None]:
    """An environment that would open another API, and send calls to nobody."""
    (folder / "toy_server_app.py").write_text(TOY)
    with pytest.MonkeyPatch.context() as patch:
        before = os.environ.get("PYTHONPATH")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(folder), before))))
        patch.setenv("FLWR_INTERNAL_GRPC_CONTROL_API", "1")
        patch.setenv("FLWR_DATABASE", ":memory:")
        patch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
        patch.delenv("NO_PROXY", raising=False)
        patch.delenv("no_proxy", raising=False)
        yield


def place_of(keys: Path, home: Path, host: str = "127.0.0.1") -> Place:
    files = (keys / name for name in ("ca.pem", "server.pem", "server.key"))
    return Place(home, f"{host}:{free_port()}", *files, most_bytes=8 << 20)
