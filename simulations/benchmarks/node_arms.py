"""The two sides of the measurement ``node``: Flower's own node, and ours, same payload.

Both: TLS, node keys, a database file, everything on this machine.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.server.bundle import build_bundle
from fedtune.server.superlink import Place, start_engine
from fedtune.simulations.benchmarks.node_server import (
    SuperLink,
    bundle,
    free_ports,
    make_certificates,
    offline,
)

__all__ = ["Figures", "Steps", "ours", "stock"]

Steps = list[tuple[int, int, bool]]
"""Bytes each way, rounds, and whether one more goes before them that does not count."""

_APP = "fedtune.simulations.benchmarks.node_apps:app"
_PATIENCE = 1200.0
_PER_PROCESS = 50

_PROJECT = """[project]
name = "stock"
version = "1.0.0"
license = "Apache-2.0"
description = ""
dependencies = []
[tool.flwr.app]
publisher = "fedtune"
[tool.flwr.app.components]
serverapp = "stock.server:app"
clientapp = "stock.client:app"
[tool.flwr.app.config]
folder = "FOLDER"
"""

_SERVER = """
import json, time
from pathlib import Path
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    folder = Path(context.run_config["folder"])
    plan = json.loads((folder / "plan.json").read_text())
    while len(nodes := list(grid.get_node_ids())) < plan["nodes"]:
        time.sleep(0.1)
    with (folder / "rounds.jsonl").open("a") as out:
        for size, rounds in plan["steps"]:
            for number in range(rounds):
                content = RecordDict({"fields": ConfigRecord({"round": number})})
                data = np.random.default_rng(number).bytes(size)
                if size:
                    array = Array("uint8", (size,), "bytes", data)
                    content["arrays"] = ArrayRecord({"x": array})
                began = time.perf_counter()
                heard = list(grid.send_and_receive([Message(content, n, "train") for n in nodes]))
                seconds = time.perf_counter() - began
                good = 0
                for reply in heard:
                    if reply.has_error():
                        print("error", reply.error, flush=True)
                    elif size:
                        back = reply.content["arrays"]["x"].data
                        good += len(back) == size and back[0] != data[0]
                    else:
                        good += reply.content["fields"]["round"] == number
                line = {"bytes": size, "seconds": seconds, "good": good}
                out.write(json.dumps(line) + "\\n")
                out.flush()
"""

_CLIENT = """
import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    answer = RecordDict({"fields": message.content["fields"]})
    if "arrays" in message.content:
        add = np.uint8(message.metadata.dst_node_id % 255 + 1)
        data = np.frombuffer(message.content["arrays"]["x"].data, np.uint8) + add
        answer["arrays"] = ArrayRecord({"x": Array("uint8", data.shape, "bytes", data.tobytes())})
    return Message(answer, reply_to=message)
"""


@dataclass(frozen=True)
class Figures:
    """What one side took.

    Attributes
    ----------
    seconds : dict
        Of every round that counts, by bytes each way.
    start_mb, end_mb : list of float
        Memory of the SuperLink before nodes joined, and after each round.
    idle_server, idle_node : float
        CPU seconds per second and node, while there is nothing to do.
    """

    seconds: dict[int, list[float]]
    start_mb: float
    end_mb: list[float]
    idle_server: float = 0.0
    idle_node: float = 0.0


def stock(steps: Steps, folder: Path) -> Figures:
    """Time two of Flower's own SuperNodes: ``flower-supernode``, ``grid.send_and_receive``."""
    _plan(folder, 2, steps)
    make_certificates(folder)
    link = SuperLink(folder, isolation="subprocess")
    keys = [ec.generate_private_key(ec.SECP384R1()) for _ in range(2)]
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        link.start()
        link.enrol([key.public_key() for key in keys])
        before = _memory(link.pid)
        for number, key in enumerate(keys):
            nodes.append(_supernode(link, folder, number, key))
        project = _PROJECT.replace("FOLDER", str(folder))
        files = {"pyproject.toml": project, "stock/server.py": _SERVER, "stock/client.py": _CLIENT}
        link.run(bundle(files | {"stock/__init__.py": ""}))
        seconds, memory = _follow(folder, 2, steps, lambda: _memory(link.pid), nodes)
    finally:
        for process in nodes:
            _end(process)
        link.stop()
    return Figures(seconds, before, memory)


def ours(steps: Steps, folder: Path, count: int = 2, idle: float = 0.0) -> Figures:
    """Time ``count`` of our nodes, under the server that ``fedtune serve`` runs."""
    _plan(folder, count, steps)
    make_certificates(folder)
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    place = Place(
        folder / "home", address, folder / "ca.pem", folder / "server.pem", folder / "server.key"
    )
    keys = [ec.generate_private_key(ec.SECP384R1()) for _ in range(count)]
    with contextlib.ExitStack() as ending:
        engine = start_engine(place, lambda words: None, bundle=build_bundle(_APP))
        ending.callback(engine.close)
        engine.sync({f"node-{n}": key.public_key() for n, key in enumerate(keys)})
        server = _listener(port)
        before = _memory(server)
        nodes = [
            _our_nodes(folder, address, number, keys[start : start + _PER_PROCESS])
            for number, start in enumerate(range(0, count, _PER_PROCESS))
        ]
        for process in nodes:
            ending.callback(_end, process)
        engine.start_run(folder)
        seconds, memory = _follow(folder, count, steps, lambda: _memory(server), nodes)
        lazy = (0.0, 0.0)
        if idle:
            time.sleep(idle)  # until the nodes ask as seldom as they ever do
            pids = [server, *(process.pid for process in nodes)]
            began = [_cpu(pid) for pid in pids]
            time.sleep(idle)
            used = [_cpu(pid) - start for pid, start in zip(pids, began, strict=True)]
            lazy = (used[0] / idle / count, sum(used[1:]) / idle / count)
    return Figures(seconds, before, memory, *lazy)


def _plan(folder: Path, nodes: int, steps: Steps) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    plan = {"nodes": nodes, "steps": [(size, rounds + warm) for size, rounds, warm in steps]}
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "rounds.jsonl").touch()


def _follow(
    folder: Path,
    nodes: int,
    steps: Steps,
    memory: Callable[[], float],
    processes: list[subprocess.Popen[bytes]],
) -> tuple[dict[int, list[float]], list[float]]:
    """Read the rounds as they are done, and the server's memory after each."""
    wanted = sum(rounds + warm for _, rounds, warm in steps)
    seconds: dict[int, list[float]] = {}
    used: list[float] = []
    deadline = time.monotonic() + _PATIENCE
    with (folder / "rounds.jsonl").open() as lines:
        while len(used) < wanted:
            line = lines.readline()
            if not line.endswith("\n"):
                if time.monotonic() > deadline or any(p.poll() is not None for p in processes):
                    raise RuntimeError(f"{len(used)} of {wanted} rounds were done: see {folder}")
                time.sleep(0.05)
                continue
            done = json.loads(line)
            if done["good"] != nodes:
                raise RuntimeError(f"{done['good']} of {nodes} answers are right: see {folder}")
            used.append(memory())
            seconds.setdefault(done["bytes"], []).append(done["seconds"])
    return {size: seconds[size][warm:] for size, _, warm in steps}, used


def _supernode(
    link: SuperLink, folder: Path, number: int, key: ec.EllipticCurvePrivateKey
) -> subprocess.Popen[bytes]:
    path, (port,) = folder / f"node-{number}.key", free_ports(1)
    form = serialization.PrivateFormat.OpenSSH
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    )
    path.chmod(0o600)
    command = [
        str(Path(sys.executable).with_name("flower-supernode")),
        "--superlink", link.fleet,
        "--root-certificates", str(folder / "ca.pem"),
        "--auth-supernode-private-key", str(path),
        "--port", str(port),
    ]  # fmt: skip
    return _spawn(command, folder / f"node-{number}.log", offline(folder / f"flwr-{number}"))


def _our_nodes(
    folder: Path, address: str, number: int, keys: list[ec.EllipticCurvePrivateKey]
) -> subprocess.Popen[bytes]:
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    texts = [key.private_bytes(pem, form, serialization.NoEncryption()).decode() for key in keys]
    order = {"address": address, "root": str(folder / "ca.pem"), "keys": texts}
    path = folder / f"nodes-{number}.json"
    path.touch(0o600)
    path.write_text(json.dumps(order))
    command = [sys.executable, "-m", "fedtune.simulations.benchmarks.node_apps", str(path)]
    return _spawn(command, folder / f"nodes-{number}.log", offline(folder / "flwr"))


def _spawn(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("ab") as out:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.terminate()
        process.terminate()
        _, stubborn = psutil.wait_procs(children, timeout=5)
        for child in stubborn:
            child.kill()
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _listener(port: int) -> int:
    """Return the process of ours that listens on a port."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            for one in child.net_connections():
                if one.status == psutil.CONN_LISTEN and one.laddr.port == port:
                    return child.pid
    raise RuntimeError(f"nobody listens on {port}")


def _memory(pid: int) -> float:
    """Return a process's own memory in MB: proportional share of what it shares."""
    return float(psutil.Process(pid).memory_full_info().pss) / 2**20


def _cpu(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Return a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="fedtune-node-") as folder:
        yield Path(folder)
