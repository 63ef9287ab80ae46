"""The engine with real processes: what listens, who gets in, and what comes back when killed."""

import contextlib
import os
import signal
import socket
import ssl
import stat
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node as ProtoNode
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from fedtune.errors import ExitCode, FedtuneError
from fedtune.server.bundle import build_bundle
from fedtune.server.superlink import Engine, Place, start_engine
from fedtune.server.superlink_process import tail
from tests.server.toy_server import (
    Words,
    alive,
    beat,
    children,
    hostile_environment,
    place_of,
    server_keys,
    until,
    working,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return server_keys(tmp_path_factory.mktemp("keys") / "keys")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with hostile_environment(tmp_path_factory.mktemp("toy")):
        yield


@pytest.fixture(scope="module")
def said() -> Words:
    return Words()


@pytest.fixture(scope="module")
def engine(
    keys: Path, hostile: None, said: Words, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    place = place_of(keys, tmp_path_factory.mktemp("server") / "home", "0.0.0.0")
    with start_engine(place, said, bundle=build_bundle("toy_server_app:app")) as running:
        yield running
    assert children() == []


@pytest.fixture
def run(engine: Engine, tmp_path: Path) -> Iterator[tuple[int, Path]]:
    number = engine.start_run(tmp_path)
    working(tmp_path)
    yield number, tmp_path
    # How it ends when it is asked to is a test of its own.
    engine.stop_run(number, grace=0.0)


@contextlib.contextmanager
def _fleet(
    engine: Engine, keys: Path, key: ec.EllipticCurvePrivateKey | None = None
) -> Iterator[FleetStub]:
    """Flower's fleet API as a node reaches it."""
    address = f"127.0.0.1:{engine.join_address.rpartition(':')[2]}"
    trusted = grpc.ssl_channel_credentials((keys / "ca.pem").read_bytes())
    with grpc.secure_channel(address, trusted) as channel:
        if key is None:
            yield FleetStub(channel)
        else:
            signer = NodeAuthClientInterceptor(key, key.public_key())
            yield FleetStub(grpc.intercept_channel(channel, signer))


def _activate(stub: FleetStub, key: ec.EllipticCurvePrivateKey) -> int:
    request = ActivateNodeRequest(
        public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=30
    )
    return int(stub.ActivateNode(request, timeout=10).node_id)


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


# ---------------------------------------------------------------- what listens


def test_only_the_fleet_listens_outside(engine: Engine, run: tuple[int, Path]) -> None:
    listening, seen = set(), 0
    for process in [psutil.Process(), *children()]:
        with contextlib.suppress(psutil.NoSuchProcess):  # a child of an earlier test is ending
            connections = process.net_connections("inet")
            seen += 1
            listening |= {
                (one.laddr.ip, one.laddr.port) for one in connections
                if one.status == psutil.CONN_LISTEN or one.type == socket.SOCK_DGRAM
            }  # fmt: skip
    assert seen >= 3  # this one, the SuperLink, the ServerApp
    fleet = int(engine.join_address.rpartition(":")[2])
    outside = {(ip, port) for ip, port in listening if ip not in ("127.0.0.1", "::1")}
    assert {port for _, port in outside} == {fleet}
    assert {ip for ip, _ in outside} <= {"0.0.0.0", "::"}
    assert len(listening - outside) == 1  # Control and Runtime


def _loopback(engine: Engine, home: Path, trust: bool = True) -> httpx.Client:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if trust:
        context.load_verify_locations(home / "loopback.pem")
    (port,) = {
        connection.laddr.port
        for process in children()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.ip == "127.0.0.1"
    }
    return httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=context, trust_env=False)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/health", 200),
        ("/v1/control/start-run", 403),
        ("/v1/control/register-node", 403),
        ("/v1/control/get-login-details", 403),
        ("/v1/responses", 403),
        ("/docs", 403),
        ("/openapi.json", 403),
        ("/v1/runtime/../control/list-nodes", 403),
        ("/v1/runtime/%2e%2e/control/list-nodes", 404),
        ("//v1/control/list-nodes", 403),
        ("/v1/runtime/acquire-task", 401),
        ("/v1/runtime/pull-pending-tasks", 401),
        ("/v1/runtime/get-nodes", 401),
        ("/v1/runtime/pull-messages", 401),
    ],
)
def test_another_account_of_this_machine_is_kept_out(
    engine: Engine, path: str, status: int
) -> None:
    home = Path(_place_of(engine).home)
    with _loopback(engine, home) as client:
        method = "GET" if path in ("/health", "/docs", "/openapi.json") else "POST"
        headers = {"content-type": PROTOBUF_MEDIA_TYPE, "accept": PROTOBUF_MEDIA_TYPE}
        assert client.request(method, path, headers=headers).status_code == status
        wrong = headers | {"authorization": "Bearer " + "0" * 64}
        assert client.request(method, path, headers=wrong).status_code == status


def _place_of(engine: Engine) -> Place:
    return engine._place


def test_the_loopback_port_speaks_tls_with_its_own_certificate(engine: Engine) -> None:
    home = _place_of(engine).home
    with _loopback(engine, home) as client:
        plain = str(client.base_url).replace("https", "http")
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{plain}/health", trust_env=False)
    with (
        _loopback(engine, home, trust=False) as stranger,
        pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        stranger.get("/health")


def test_nobody_else_reads_the_state(engine: Engine, run: tuple[int, Path]) -> None:
    home = _place_of(engine).home
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    files = [path for path in home.rglob("*") if path.is_file()]
    assert {"state.db", "superlink.log", "serverapp.log", "loopback.key"} <= {f.name for f in files}
    assert {path.name: oct(path.stat().st_mode & 0o077) for path in files} == {
        path.name: "0o0" for path in files
    }


def test_no_secret_is_among_the_arguments(engine: Engine, run: tuple[int, Path]) -> None:
    ours = ["-P", "-u", "-m", "fedtune.server.superlink_child"]
    lines = [child.cmdline()[1:] for child in children() if child.ppid() == os.getpid()]
    assert lines == [ours, ours]


# ---------------------------------------------------------------- who gets in


def test_enrolled_nodes_come_in_and_revoked_ones_are_cut_off(
    engine: Engine, keys: Path, said: Words
) -> None:
    ann, bob = _new_key(), _new_key()
    assert engine.sync({"ann": ann.public_key(), "bob": bob.public_key()}) == (("ann", "bob"), ())
    assert engine.sync({"ann": ann.public_key(), "bob": bob.public_key()}) == ((), ())
    assert [(n.name, n.status, n.last_seen) for n in engine.nodes()] == [
        ("ann", "registered", None),
        ("bob", "registered", None),
    ]
    with _fleet(engine, keys, ann) as stub:
        number = _activate(stub, ann)
        first, second = engine.nodes()
        assert (first.name, first.node_id, first.status) == ("ann", number, "online")
        assert first.last_seen == pytest.approx(time.time(), abs=5)
        assert second.status == "registered"

        assert engine.sync({"bobby": bob.public_key()}) == ((), ("ann",))
        assert [node.name for node in engine.nodes()] == ["bobby"]
        with pytest.raises(grpc.RpcError) as gone:
            stub.DeactivateNode(DeactivateNodeRequest(node_id=number), timeout=10)
        assert gone.value.code() == grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.RpcError):
            _activate(stub, ann)

    said.clear()
    assert engine.sync({"ann": ann.public_key(), "bobby": bob.public_key()}) == ((), ())
    engine.sync({"ann": ann.public_key(), "bobby": bob.public_key()})
    assert len(said) == 1
    assert "ann cannot join: its key was revoked" in said
    assert [node.name for node in engine.nodes()] == ["bobby"]
    assert engine.sync({}) == ((), ("bobby",))


def test_one_key_for_two_names_is_refused(engine: Engine) -> None:
    key = _new_key().public_key()
    with pytest.raises(FedtuneError, match="also another node's") as error:
        engine.sync({"ann": key, "bob": key})
    assert error.value.code == ExitCode.SIGNATURE
    assert engine.nodes() == ()


def test_an_unknown_key_is_refused(engine: Engine, keys: Path) -> None:
    key = _new_key()
    with _fleet(engine, keys, key) as stub:
        with pytest.raises(grpc.RpcError):
            _activate(stub, key)
        # Flower lets nodes enrol themselves unless told not to.
        myself = RegisterNodeFleetRequest(public_key=public_key_to_bytes(key.public_key()))
        with pytest.raises(grpc.RpcError):
            stub.RegisterNode(myself, timeout=10)
        with pytest.raises(grpc.RpcError):
            _activate(stub, key)
    assert engine.nodes() == ()


def test_a_call_without_a_signature_is_refused(engine: Engine, keys: Path) -> None:
    with _fleet(engine, keys) as stub, pytest.raises(grpc.RpcError) as refused:
        _activate(stub, _new_key())
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_a_plain_text_client_is_refused(engine: Engine) -> None:
    address = f"127.0.0.1:{engine.join_address.rpartition(':')[2]}"
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as refused:
        _activate(FleetStub(channel), _new_key())
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


def test_a_call_that_is_too_long_is_refused(engine: Engine, keys: Path) -> None:
    key = _new_key()
    with _fleet(engine, keys, key) as stub:
        for size, code in [
            (7 << 20, grpc.StatusCode.UNAUTHENTICATED),
            (9 << 20, grpc.StatusCode.RESOURCE_EXHAUSTED),
        ]:
            request = PushObjectRequest(node=ProtoNode(node_id=1), object_content=bytes(size))
            with pytest.raises(grpc.RpcError) as refused:
                stub.PushObject(request, timeout=20)
            assert refused.value.code() == code


# ---------------------------------------------------------------- runs


def test_a_run_ends_well(engine: Engine, run: tuple[int, Path]) -> None:
    number, folder = run
    assert engine.run_status(number) == ("running", "")
    assert engine.app_alive(folder)
    assert not engine.app_alive(folder.parent)
    assert beat(folder)[1:] == ["0", os.getcwd()]
    with pytest.raises(FedtuneError, match="is being worked on"):
        engine.start_run(folder)
    (folder / "end").touch()
    until(lambda: not engine.app_alive(folder))
    assert engine.run_status(number) == ("finished:completed", "")
    assert [*_place_of(engine).home.rglob("*.py")] == []
    assert "toy at work" in tail(_place_of(engine).serverapp_log)


def test_a_killed_serverapp_is_seen_at_once(
    engine: Engine, run: tuple[int, Path], said: Words
) -> None:
    number, folder = run
    os.kill(int(beat(folder)[0]), signal.SIGKILL)
    until(lambda: not engine.app_alive(folder), 2.0)
    assert engine.run_status(number) == (
        "finished:failed",
        "the ServerApp ended with signal SIGKILL",
    )
    said.clear()
    engine.tend()
    engine.tend()
    assert said == [f"the ServerApp of run {number} ended with signal SIGKILL"]

    engine.stop_run(number)
    again = engine.start_run(folder)
    working(folder)
    assert engine.run_status(again) == ("running", "")
    engine.stop_run(again)
    assert engine.run_status(again) == ("finished:stopped", "")


def test_a_stopped_run_leaves_no_process(engine: Engine, run: tuple[int, Path]) -> None:
    number, folder = run
    process = psutil.Process(int(beat(folder)[0]))
    process.suspend()  # it cannot even hear that it should end
    engine.stop_run(number, grace=0.3)
    assert not alive(process)
    assert not engine.app_alive(folder)
    assert engine.run_status(number) == ("finished:stopped", "")
    engine.stop_run(number)


def test_a_run_that_nobody_works_on_is_stopped(engine: Engine, tmp_path: Path) -> None:
    lost = engine._control.start(build_bundle("toy_server_app:app"), {"folder": "nowhere"})
    assert engine.run_status(lost) == ("pending", "")
    number = engine.start_run(tmp_path)
    working(tmp_path)
    assert engine.run_status(lost) == ("finished:stopped", "")
    assert engine.run_status(number) == ("running", "")
    engine.stop_run(number)


def test_what_a_serverapp_started_ends_with_it(engine: Engine, run: tuple[int, Path]) -> None:
    _, folder = run
    worker = psutil.Process(int(beat(folder)[0]))
    (folder / "spawn").touch()
    until((folder / "helper").exists)
    helper = psutil.Process(int((folder / "helper").read_text()))
    assert os.getpgid(helper.pid) == worker.pid
    worker.kill()
    until(lambda: not engine.app_alive(folder))
    until(lambda: not alive(helper), 5.0, "its end")


def test_an_unknown_run_is_an_error(engine: Engine) -> None:
    with pytest.raises(FedtuneError, match="404"):
        engine.run_status(7)


# ---------------------------------------------------------------- life


def _superlink() -> psutil.Process:
    (found,) = [child for child in children() if child.net_connections("inet4") and _listens(child)]
    return found


def _listens(process: psutil.Process) -> bool:
    return any(c.status == psutil.CONN_LISTEN for c in process.net_connections("inet"))


def test_a_killed_superlink_comes_back_with_its_nodes_and_the_run(
    engine: Engine, keys: Path, run: tuple[int, Path], said: Words
) -> None:
    number, folder = run
    ann = _new_key()
    engine.sync({"ann": ann.public_key()})
    with _fleet(engine, keys, ann) as stub:
        _activate(stub, ann)
        before, worker = engine.nodes(), beat(folder)[0]
        until(lambda: beat(folder)[1] == "1")
        said.clear()
        _superlink().kill()
        until(lambda: (engine.tend(), "the SuperLink is back after" in said)[1])
        assert "the SuperLink ended with signal SIGKILL" in said
        assert engine.nodes() == before
        working(folder)
        assert beat(folder)[:2] == [worker, "1"]
        assert engine.run_status(number) == ("running", "")

        # A call that finds it away brings it back by itself.
        _superlink().kill()
        assert engine.nodes() == before
    engine.sync({})


def test_a_superlink_that_hangs_is_ended_and_comes_back(
    engine: Engine, said: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in {"_LOOK": 0.0, "_ANSWER": 0.3, "_STUCK": 0.5}.items():
        monkeypatch.setattr(f"fedtune.server.superlink.{name}_SECONDS", seconds)
    engine.tend()
    said.clear()
    _superlink().suspend()
    until(lambda: (engine.tend(), "the SuperLink is back after" in said)[1])
    assert "has not answered for a minute" in said[0]
    assert engine.nodes() == ()


def test_it_gives_up_when_it_dies_again_and_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_deaths", [time.monotonic()] * 5)
    (dying := _superlink()).kill()
    psutil.wait_procs([dying], 5)
    with pytest.raises(FedtuneError, match="died 6 times in 10 minutes; its last lines") as error:
        engine.tend()
    assert error.value.code == ExitCode.ENGINE
    monkeypatch.undo()
    engine.tend()
    assert engine.nodes() == ()


def test_a_second_server_in_one_folder_is_refused(
    engine: Engine, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtune.server.superlink_place._PATIENCE", 0.2)
    with pytest.raises(FedtuneError, match="a server already runs in"):
        start_engine(place_of(keys, _place_of(engine).home), print)
    assert engine.nodes() == ()


def test_a_taken_port_is_said_before_anything_starts(
    engine: Engine, keys: Path, tmp_path: Path
) -> None:
    before = children()
    place = replace(place_of(keys, tmp_path / "home"), address=engine.join_address)
    with pytest.raises(FedtuneError, match="the port is taken") as error:
        start_engine(place, print)
    assert "another port" in error.value.hint
    assert children() == before
    # The folder is free again.
    with pytest.raises(FedtuneError, match="the port is taken"):
        start_engine(place, print)
