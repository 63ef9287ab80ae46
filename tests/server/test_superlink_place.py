"""Addresses and certificates that a server cannot start with."""

import socket
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedtune.errors import ExitCode, FedtuneError
from fedtune.keys.authority import make_authority, make_server
from fedtune.server.superlink import Place, start_engine
from fedtune.server.superlink_place import check_certificate, check_port


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _place(keys: Path, home: Path) -> Place:
    files = (keys / name for name in ("ca.pem", "server.pem", "server.key"))
    return Place(home, f"127.0.0.1:{_free_port()}", *files)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    make_authority(tmp_path / "keys", "test federation")
    make_server(tmp_path / "keys", ["127.0.0.1"])
    return tmp_path / "keys"


@pytest.mark.parametrize("address", ["", "9092", "host:", "0.0.0.0:0", "0.0.0.0:70000", ":9092"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(FedtuneError, match="no address to listen on"):
        check_port(address)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(FedtuneError, match="this machine has no such address"):
        check_port(f"192.0.2.1:{_free_port()}")


def test_a_key_of_another_certificate_is_refused(keys: Path, tmp_path: Path) -> None:
    make_authority(tmp_path / "other", "other")
    make_server(tmp_path / "other", ["localhost"])
    place = replace(_place(keys, tmp_path / "home"), key=tmp_path / "other" / "server.key")
    with pytest.raises(FedtuneError, match="is not the key of") as error:
        start_engine(place, print)
    assert error.value.code == ExitCode.SIGNATURE
    check_certificate(_place(keys, tmp_path))
    with pytest.raises(FedtuneError, match="cannot be read"):
        check_certificate(replace(place, certificate=tmp_path / "missing.pem"))


def test_an_expired_certificate_is_refused(tmp_path: Path) -> None:
    past = datetime.now(UTC) - timedelta(days=30)
    make_authority(tmp_path / "keys", "old", now=past)
    make_server(tmp_path / "keys", ["localhost"], days=7, now=past)
    with pytest.raises(FedtuneError, match="and this machine's clock says"):
        check_certificate(_place(tmp_path / "keys", tmp_path))
