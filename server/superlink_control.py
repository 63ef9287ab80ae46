"""How the engine speaks with its SuperLink: over TLS on this machine, with a secret."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import httpx
from flwr.app.user_config import UserConfig
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.run_pb2 import Run
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.runtime import RuntimeHttpClient

from fedtune.errors import ExitCode, FedtuneError
from fedtune.server.bundle import bundle_hash

__all__ = ["Control", "Secrets", "open_control"]

_Reply = TypeVar("_Reply")
_LOCAL = "127.0.0.1"
_NO_PROXY = ("NO_PROXY", "no_proxy")


@dataclass(frozen=True)
class Secrets:
    """What the engine shows its SuperLink; both are in memory only.

    Attributes
    ----------
    control : str
        For starting runs and enrolling nodes.
    tasks : bytes
        For taking the task of a run: Flower signs each call with it.
    """

    control: str = field(repr=False)
    tasks: bytes = field(repr=False)


@dataclass(frozen=True)
class _Bearer:
    secret: str = field(repr=False)

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers["authorization"] = f"Bearer {self.secret}"
        return call_next(context)


@dataclass(frozen=True)
class Control:
    """The calls that the engine needs.

    A SuperLink that cannot be reached is an ``httpx.TransportError``, one that refuses is a
    ``FedtuneError``.
    """

    _control: ControlHttpClient
    _tasks: RuntimeHttpClient
    _http: httpx.Client

    def healthy(self, seconds: float) -> bool:
        """Say whether the SuperLink answers within ``seconds``."""
        try:
            return self._http.get("/health", timeout=seconds).is_success
        except httpx.HTTPError:
            return False

    def nodes(self) -> list[NodeInfo]:
        """Return every node that was ever enrolled, those cut off too."""
        return list(_plain(lambda: self._control.ListNodes(ListNodesRequest())).nodes_info)

    def register(self, name: str, key: bytes) -> None:
        """Enrol a node by its public key (PEM)."""
        _plain(lambda: self._control.RegisterNode(RegisterNodeRequest(public_key=key, name=name)))

    def unregister(self, node: int) -> None:
        """Cut a node off."""
        _plain(lambda: self._control.UnregisterNode(UnregisterNodeRequest(node_id=node)))

    def start(self, bundle: bytes, settings: UserConfig) -> int:
        """Start a run of a bundle; return its id."""
        request = StartRunRequest(
            fab=fab_to_proto(Fab(bundle_hash(bundle), bundle, {})),
            override_config=user_config_to_proto(settings),
        )
        return int(_plain(lambda: self._control.StartRun(request)).run_id)

    def runs(self) -> Mapping[int, Run]:
        """Return all runs by id."""
        return _plain(lambda: self._control.ListRuns(ListRunsRequest())).run_dict

    def run(self, run: int) -> Run:
        """Return one run."""
        return _plain(lambda: self._control.ListRuns(ListRunsRequest(run_id=run))).run_dict[run]

    def stop(self, run: int) -> None:
        """Stop a run that has not ended; its messages are dropped."""
        _plain(lambda: self._control.StopRun(StopRunRequest(run_id=run)))

    def take_task(self) -> tuple[int, str] | None:
        """Take the task of a run that nobody works on: the run's id and the task's token."""
        request = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
        reply = _plain(lambda: self._tasks.AcquireTask(request))
        if not reply.HasField("task") or not reply.token:
            return None
        return int(reply.task.run_id), str(reply.token)

    def close(self) -> None:
        """Close the connections."""
        for client in (self._control, self._tasks, self._http):
            client.close()


def open_control(port: int, root: Path, secrets: Secrets) -> Control:
    """Return the calls to the SuperLink on a loopback port; nothing is sent yet.

    Parameters
    ----------
    root : Path
        Certificate that the SuperLink shows there, PEM.
    """
    for name in _NO_PROXY:
        # Flower's client obeys HTTPS_PROXY, and a proxy cannot reach this machine's loopback.
        before = os.environ.get(name, "")
        if _LOCAL not in before.split(","):
            os.environ[name] = ",".join(filter(None, (before, _LOCAL)))
    address, trusted = f"{_LOCAL}:{port}", root.read_bytes()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=trusted.decode("ascii"))
    signed = SuperExecAuthHttpInterceptor(
        master_secret=secrets.tasks, protected_methods={"/flwr.proto.Runtime/AcquireTask"}
    )
    bearer = _Bearer(secrets.control)
    return Control(
        ControlHttpClient.from_server_address(address, False, trusted, [bearer]),
        RuntimeHttpClient.from_server_address(address, False, trusted, [signed]),
        httpx.Client(base_url=f"https://{address}", verify=context, trust_env=False),
    )


def _plain(call: Callable[[], _Reply]) -> _Reply:
    """Turn a refusal into an error with the SuperLink's words."""
    try:
        return call()
    except httpx.HTTPStatusError as error:
        raise FedtuneError(
            f"the SuperLink answers {error.response.status_code}: {error.response.text[:300]}",
            hint="its log says more: superlink.log in the server's folder",
            code=ExitCode.ENGINE,
        ) from error
