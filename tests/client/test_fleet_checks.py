from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto import fleet_pb2_grpc

from fedtune.client import fleet_line
from fedtune.client.fleet_checks import Check, diagnose, to_error
from fedtune.client.fleet_door import Door, host_and_port
from fedtune.errors import ExitCode, FedtuneError
from fedtune.simulations.benchmarks.node_server import (
    SuperLink,
    free_ports,
    make_certificates,
    superlink,
)
from tests.client.fleet_kit import echo, new_key, start


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    with superlink(tmp_path_factory.mktemp("link")) as link:
        yield link


@pytest.fixture(scope="module")
def door(link: SuperLink) -> Door:
    key = new_key()
    link.enrol([key.public_key()])
    return Door(link.fleet, link.root, key)


def last(door: Door) -> Check:
    checks = diagnose(door)
    assert all(check.ok for check in checks[:-1])
    return checks[-1]


def refused(door: Door) -> FedtuneError:
    """Return the error that a node ends with."""
    node = start(door, echo)
    node.join(20)
    assert isinstance(node.error, FedtuneError)
    assert node.kinds()[-1] == "refused"
    return node.error


@pytest.fixture
def tls_server(tmp_path: Path) -> Iterator[Callable[..., Door]]:
    """Return a maker of gRPC servers that are not Flower's, with certificates to choose."""
    servers = []

    def make(root: Path | None = None, **options: object) -> Door:
        make_certificates(tmp_path, **options)  # type: ignore[arg-type]
        server = grpc.server(ThreadPoolExecutor(2))
        pair = ((tmp_path / "server.key").read_bytes(), (tmp_path / "server.pem").read_bytes())
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
        server.start()
        servers.append(server)
        return Door(f"127.0.0.1:{port}", (tmp_path / "ca.pem").read_bytes(), new_key())

    yield make
    for server in servers:
        server.stop(None)


def test_all_is_well(door: Door) -> None:
    checks = diagnose(door)
    assert [check.name for check in checks] == ["name", "port", "TLS", "version", "clock", "key"]
    assert all(check.ok for check in checks)


def test_diagnosing_takes_nobodys_place(link: SuperLink, door: Door) -> None:
    node = start(door, echo)
    node.wait_for("connected")
    assert last(door).ok
    node.stop.set()
    node.join()
    assert node.kinds() == ["connected"]


def test_a_name_that_does_not_exist(door: Door) -> None:
    check = last(replace(door, address="no-such-host.invalid:9092"))
    assert (check.name, check.ok) == ("name", False)
    assert "DNS" in check.fix


def test_a_port_where_nobody_listens(door: Door) -> None:
    check = last(replace(door, address=f"127.0.0.1:{free_ports(1)[0]}"))
    assert (check.name, check.ok) == ("port", False)
    assert "nobody listens" in check.words


def test_being_away_is_no_refusal(door: Door) -> None:
    node = start(replace(door, address=f"127.0.0.1:{free_ports(1)[0]}"), echo)
    assert "nobody listens" in node.wait_for("lost").words
    node.thread.join(4)  # type: ignore[union-attr]
    assert node.error is None
    node.stop.set()
    node.join()


def test_another_federations_ca(door: Door, tmp_path: Path) -> None:
    make_certificates(tmp_path)
    error = refused(replace(door, root=(tmp_path / "ca.pem").read_bytes()))
    assert error.code is ExitCode.SIGNATURE
    assert "not from this federation's CA" in str(error)
    assert "do not connect" in error.hint


def test_a_ca_that_is_none(door: Door) -> None:
    check = last(replace(door, root=b"not a certificate"))
    assert "cannot be read" in check.words
    assert "ca.pem" in check.fix


@pytest.mark.parametrize(
    ("options", "said"),
    [({"days": -1}, "no longer valid"), ({"names": ("fed.example.org",)}, "not for '127.0.0.1'")],
)
def test_a_certificate_that_does_not_hold(
    tls_server: Callable[..., Door], options: dict[str, object], said: str
) -> None:
    error = refused(tls_server(**options))
    assert error.code is ExitCode.SIGNATURE
    assert said in str(error)
    assert "fedtune keys server" in error.hint


def test_a_server_of_something_else(tls_server: Callable[..., Door]) -> None:
    error = refused(tls_server())
    assert error.code is ExitCode.ENGINE
    assert "not as a Flower server" in str(error)


def test_a_server_in_plain_text(door: Door) -> None:
    server = grpc.server(ThreadPoolExecutor(2))
    fleet_pb2_grpc.add_FleetServicer_to_server(  # type: ignore[no-untyped-call]
        fleet_pb2_grpc.FleetServicer(), server
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        error = refused(replace(door, address=f"127.0.0.1:{port}"))
    finally:
        server.stop(None)
    assert error.code is ExitCode.SIGNATURE
    assert "does not speak TLS" in str(error)


def test_a_listener_that_never_answers(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.client.fleet_checks._SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        held: list[socket.socket] = []
        threading.Thread(target=lambda: held.append(silent.accept()[0]), daemon=True).start()
        check = last(replace(door, address=f"127.0.0.1:{silent.getsockname()[1]}"))
    assert (check.name, check.ok) == ("TLS", False)


@pytest.mark.parametrize(("ahead", "said"), [(-3600.0, "behind"), (1200.0, "ahead of")])
def test_a_wrong_clock(
    door: Door, ahead: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This machine's clock is set off for everything that signs."""
    import datetime as dt

    real = fleet_line.now
    monkeypatch.setattr(fleet_line, "now", lambda: real() + dt.timedelta(seconds=ahead))
    error = refused(door)
    assert error.code is ExitCode.SIGNATURE
    assert f"minutes {said} the server's" in str(error)
    minutes = int(str(error).split("about ")[1].split(" minutes")[0])
    assert abs(minutes - abs(ahead) / 60) <= 5


def test_a_key_that_is_not_enrolled(door: Door) -> None:
    check = last(replace(door, login=new_key()))
    assert (check.name, check.ok) == ("key", False)
    assert "fedtune keys enrol" in check.fix
    error = to_error([check], door.address)
    assert error.code is ExitCode.SIGNATURE


def test_a_key_of_another_kind(door: Door) -> None:
    with pytest.raises(FedtuneError, match="secp256r1"):
        replace(door, login=ec.generate_private_key(ec.SECP256R1()))


@pytest.mark.parametrize(
    "address",
    ["host", "host:", ":9092", "host:0", "host:65536", "a b:1", "::1:9092", "h:1x", "http://h:1"],
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(FedtuneError, match="is not a server's address"):
        host_and_port(address)


@pytest.mark.parametrize(
    "change",
    [{"heartbeat": 5.0}, {"most_bytes": 0}, {"poll": 0.0}, {"poll": 9.0}, {"most_wait": 0.0}],
)
def test_a_door_that_cannot_work(door: Door, change: dict[str, float]) -> None:
    with pytest.raises(FedtuneError):
        replace(door, **change)  # type: ignore[arg-type]
