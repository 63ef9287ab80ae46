"""A real SuperLink, a run whose ServerApp is the test itself, and nodes in threads."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message, RecordDict
from flwr.common.serde import run_from_proto
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullTaskInputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from fedtune.client.fleet import Door, NodeEvent, serve_messages
from fedtune.server.patient import Patient
from fedtune.server.pauses import pauses
from fedtune.simulations.benchmarks.node_server import SuperLink, bundle

PROJECT = """[project]
name = "test"
version = "1.0.0"
license = "Apache-2.0"
description = ""
dependencies = []
[tool.flwr.app]
publisher = "fedtune"
[tool.flwr.app.components]
serverapp = "fedtune.server.app:app"
clientapp = "fedtune.client.app:app"
[tool.flwr.app.config]
"""


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


@contextlib.contextmanager
def serverapp(link: SuperLink) -> Iterator[HttpGrid]:
    """Start a run and be its ServerApp: what flower-superexec and flwr-serverapp do."""
    link.run(bundle({"pyproject.toml": PROJECT}))
    acquire = "/flwr.proto.Runtime/AcquireTask"
    secret = (link.folder / "superexec.secret").read_bytes()
    client = RuntimeHttpClient.from_server_address(
        link.address,
        False,
        link.root,
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperExec"),
            SuperExecAuthHttpInterceptor(
                master_secret=secret, protected_methods=frozenset({acquire})
            ),
        ],
    )
    task = client.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-serverapp"]))
    client.close()
    assert task.token
    grid = HttpGrid(link.address, False, link.root, token=task.token)
    given = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
    TaskIdentity.task_id = given.task_id
    TaskIdentity.run_id = given.run.run_id
    TaskIdentity.node_id = given.context.node_id
    grid.set_run(run_from_proto(given.run))
    over = threading.Event()

    def beat() -> None:
        while not over.wait(10):
            with contextlib.suppress(Exception):
                grid._runtime_client.SendTaskHeartbeat(SendTaskHeartbeatRequest())

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield grid
    finally:
        over.set()
        grid.close()


@dataclass
class Joined:
    """A node in a thread: what it told, and how it ended."""

    stop: threading.Event = field(default_factory=threading.Event)
    events: list[NodeEvent] = field(default_factory=list)
    error: BaseException | None = None
    thread: threading.Thread | None = None

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def wait_for(self, kind: str, count: int = 1, seconds: float = 20) -> NodeEvent:
        deadline = time.monotonic() + seconds
        while self.kinds().count(kind) < count:
            assert time.monotonic() < deadline, (kind, self.events, self.error)
            time.sleep(0.02)
        return [event for event in self.events if event.kind == kind][count - 1]

    def join(self, seconds: float = 20) -> None:
        assert self.thread is not None
        self.thread.join(seconds)
        assert not self.thread.is_alive()


def start(door: Door, answer: Callable[[Message], Message], grace: float | None = None) -> Joined:
    node = Joined()

    def run() -> None:
        try:
            serve_messages(door, answer, node.events.append, node.stop, grace=grace)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            node.error = error

    node.thread = threading.Thread(target=run, daemon=True)
    node.thread.start()
    return node


@contextlib.contextmanager
def joined(
    door: Door, answer: Callable[[Message], Message], grace: float | None = None, **changes: object
) -> Iterator[Joined]:
    """Run a node while the block runs; wait until it is connected."""
    node = start(replace(door, **changes), answer, grace)  # type: ignore[arg-type]
    try:
        node.wait_for("connected")
        yield node
    finally:
        node.stop.set()
        node.join()


def echo(message: Message) -> Message:
    return Message(message.content, reply_to=message)


def ask(
    grid: HttpGrid, node: int, content: RecordDict, ttl: float = 60, seconds: float = 30
) -> Message:
    """Send one message and wait for its answer."""
    (name,) = grid.push_messages([Message(content, node, "train", ttl=ttl, group_id="1")])
    deadline = time.monotonic() + seconds
    mail = Patient(grid)
    for pause in pauses():
        for reply in mail.pull_messages([name]):
            return reply
        assert time.monotonic() < deadline, "no answer"
        time.sleep(pause)
    raise AssertionError
