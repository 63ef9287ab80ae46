"""A keys folder: made once, checked before a door opens, and what TLS makes of it."""

from __future__ import annotations

import datetime as dt
import os
import shutil
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from fedtune.errors import ExitCode
from fedtune.keys import authority
from fedtune.keys.authority import check_server, describe, make_authority, make_server
from fedtune.keys.node import new_identity, write_identity
from fedtune.keys.roster import enrol, read_roster
from tests.keys.kit import NOW, fails, federation, mode, public


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return federation(tmp_path / "keys")


def test_a_new_federation(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "keys"
    before = os.umask(0)
    try:
        made = make_authority(folder, "the study", 100)
        facts = make_server(folder, ["fl.example.org", "10.0.0.5"], 50)
    finally:
        os.umask(before)
    assert {path.name: mode(path) for path in folder.iterdir()} == {
        ".lock": 0o600, "ca.key": 0o600, "server.key": 0o600,
        "ca.pem": 0o644, "server.pem": 0o644, "roster": 0o644,
    }  # fmt: skip
    assert mode(folder) == 0o700
    assert (made.name, made.days_left, facts.days_left) == ("the study", 99, 49)
    assert facts.hosts == ("fl.example.org", "10.0.0.5")
    assert facts.authority.federation == made.federation == read_roster(folder).federation
    assert check_server(folder) == facts
    assert facts.warnings == ()


def test_nothing_is_overwritten(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    fails(lambda: make_authority(folder, "again"), "ca.pem' is there", ExitCode.CONFIG)
    fails(lambda: make_server(folder, ["localhost"]), "server.pem' is there", ExitCode.CONFIG)
    fails(lambda: make_server(folder, ["a b"], renew=True), "neither a host", ExitCode.CONFIG)
    fails(lambda: make_server(folder, ["a"], 0, renew=True), "--days 0", ExitCode.CONFIG)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_wrong_words_leave_nothing_behind(tmp_path: Path) -> None:
    fails(lambda: make_authority(tmp_path / "keys", "a\nb"), "--name", ExitCode.CONFIG)
    assert {path.name for path in (tmp_path / "keys").iterdir()} == {".lock"}
    make_authority(tmp_path / "keys", "study")
    fails(lambda: make_server(tmp_path / "keys", []), "0 hosts", ExitCode.CONFIG)
    assert not (tmp_path / "keys" / "server.key").exists()


def test_a_link_to_a_key_is_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    folder.mkdir(mode=0o700)
    (folder / "ca.key").symlink_to(tmp_path / "elsewhere")
    fails(lambda: make_authority(folder, "study"), "not there")
    (folder / "ca.key").unlink()
    make_authority(folder, "study")
    (folder / "server.key").symlink_to(tmp_path / "elsewhere")
    fails(lambda: make_server(folder, ["localhost"]), "not there")
    assert not (tmp_path / "elsewhere").exists()


def test_a_nodes_key_is_not_taken_for_the_cas(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    folder.mkdir(mode=0o700)
    write_identity(folder / "ca.key", new_identity("ca"))
    fails(lambda: make_authority(folder, "study"), "no private key without a password")
    assert not (folder / "ca.pem").exists()


def test_what_was_cut_short_is_finished(folder: Path) -> None:
    federation_ = read_roster(folder).federation
    enrol(folder, public("ann"))
    (folder / "ca.pem").unlink()
    assert make_authority(folder, "study").federation == federation_
    assert check_server(folder).authority.federation == federation_
    assert read_roster(folder).serial == 2


def test_renewal_keeps_the_key_and_the_hosts(folder: Path) -> None:
    key, old = (folder / "server.key").read_bytes(), (folder / "server.pem").read_bytes()
    facts = make_server(folder, [], 10, renew=True)
    assert facts.hosts == ("localhost", "127.0.0.1")
    assert (folder / "server.key").read_bytes() == key
    assert (folder / "server.pem").read_bytes() != old
    assert mode(folder / "server.pem") == 0o644
    assert check_server(folder) == facts
    assert "in 9 days" in facts.warnings[0]
    assert "keys server --renew" in facts.warnings[0]
    (folder / "server.key").unlink()
    assert make_server(folder, ["example.org"], renew=True).hosts == ("example.org",)
    assert (folder / "server.key").read_bytes() != key
    check_server(folder)


def test_a_server_does_not_outlive_its_ca(tmp_path: Path) -> None:
    made = make_authority(tmp_path / "keys", "study", 20)
    facts = make_server(tmp_path / "keys", ["localhost"], 825)
    assert facts.until == made.until
    assert len(facts.warnings) == 2


def test_a_door_is_not_opened_with_what_is_not_right(folder: Path, tmp_path: Path) -> None:
    other = federation(tmp_path / "other", days=100)
    spare = tmp_path / "spare"

    def check(words: str, hint: str, now: dt.datetime | None = None) -> None:
        assert hint in fails(lambda: check_server(folder, now), words).hint
        shutil.rmtree(folder)
        shutil.copytree(spare, folder)

    shutil.copytree(folder, spare)
    for name, hint in (
        ("ca.pem", "keys ca"), ("server.pem", "keys server"), ("server.key", "keys server"),
    ):  # fmt: skip
        (folder / name).unlink()
        check(f"{name}' is not there", hint)
    check("server.pem' expired on", "--renew", NOW + dt.timedelta(days=826))
    check("ca.pem' is not valid before", "clock", NOW - dt.timedelta(days=1))
    check("ca.pem' expired on", "new federation", NOW + dt.timedelta(days=3651))
    for name in ("server.key", "ca.key"):
        (folder / name).chmod(0o644)
        check(f"{name}' is open to others", "chmod 600")
        shutil.copy(other / name, folder / name)
        words = "does not belong to" if name == "server.key" else "another federation than ca.pem"
        check(words, "copy")
    shutil.copy(other / "server.pem", folder / "server.pem")
    check("server.pem' belongs to another federation", "one keys folder")
    shutil.copy(other / "ca.pem", folder / "ca.pem")
    check("server.pem' belongs to another federation", "one keys folder")
    folder.chmod(0o770)
    check("can be changed by others", "chmod 700")
    (folder / "server.pem").write_text("nonsense")
    check("is no certificate", "")
    (folder / "ca.key").unlink()
    assert check_server(folder).hosts == ("localhost", "127.0.0.1")


def test_a_server_that_another_name_signed_is_named(folder: Path, tmp_path: Path) -> None:
    other = federation(tmp_path / "other", "their study")
    shutil.copy(other / "server.pem", folder / "server.pem")
    fails(lambda: check_server(folder), "'their study' signed it, not the CA 'study'")


def test_an_expired_ca_makes_no_server(tmp_path: Path) -> None:
    make_authority(tmp_path / "keys", "study", 1, now=NOW - dt.timedelta(days=3))
    fails(lambda: make_server(tmp_path / "keys", ["localhost"]), "ca.pem' expired")


def test_describe_says_all_at_once(folder: Path) -> None:
    found = describe(folder)
    assert found["problems"] == found["warnings"] == found["nodes"] == []
    assert found["server"]["hosts"] == ["localhost", "127.0.0.1"]
    late = describe(folder, NOW + dt.timedelta(days=830))
    assert late["server"]["days_left"] < 0
    assert ["expired" in one["error"] for one in late["problems"]] == [True]
    (folder / "server.key").chmod(0o644)
    (folder / "roster").write_text("nonsense")
    words = [one["error"] for one in describe(folder)["problems"]]
    assert len(words) == 2
    assert "open to others" in words[0]
    assert "damaged" in words[1]
    for name in ("server.pem", "server.key", "ca.key"):
        (folder / name).unlink()
    found = describe(folder, NOW + dt.timedelta(days=3700))
    assert (found["server"], found["ca_key"], found["days_left"] < 0) == (None, False, True)
    assert "ca.pem' expired" in found["problems"][0]["error"]


# ---------------------------------------------------------------- TLS


@contextmanager
def _listening(folder: Path) -> Iterator[int]:
    """Answer TLS callers on a port until the end."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as door:
        door.settimeout(0.1)
        over = threading.Event()

        def answer() -> None:
            while not over.is_set():
                try:
                    plain, _ = door.accept()
                except TimeoutError:
                    continue
                plain.settimeout(5)
                try:
                    with context.wrap_socket(plain, server_side=True) as wire:
                        wire.sendall(b"hello")
                except (OSError, ssl.SSLError):
                    plain.close()

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield door.getsockname()[1]
        finally:
            over.set()
            thread.join()


def _call(port: int, root: Path, host: str) -> bytes:
    context = ssl.create_default_context(cafile=str(root))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    with (
        socket.create_connection(("127.0.0.1", port), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname=host) as wire,
    ):
        return wire.recv(5)


def test_tls_takes_the_right_ca_and_host_alone(folder: Path, tmp_path: Path) -> None:
    other = federation(tmp_path / "other")
    with _listening(folder) as port:
        for host in ("localhost", "127.0.0.1"):
            assert _call(port, folder / "ca.pem", host) == b"hello"
        with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
            _call(port, folder / "ca.pem", "example.org")
        with pytest.raises(ssl.SSLCertVerificationError):
            _call(port, other / "ca.pem", "localhost")
        # The server's own certificate is no root.
        with pytest.raises(ssl.SSLCertVerificationError):
            _call(port, other / "server.pem", "localhost")


def test_tls_refuses_what_is_expired(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    make_authority(folder, "study", now=NOW - dt.timedelta(days=3))
    make_server(folder, ["localhost"], 1, now=NOW - dt.timedelta(days=2))
    fails(lambda: check_server(folder), "server.pem' expired")
    refused = pytest.raises(ssl.SSLCertVerificationError, match="expired")
    with _listening(folder) as port, refused:
        _call(port, folder / "ca.pem", "localhost")
    make_server(folder, [], renew=True)
    with _listening(folder) as port:
        assert _call(port, folder / "ca.pem", "localhost") == b"hello"


def test_a_server_cannot_sign_for_another(folder: Path, tmp_path: Path) -> None:
    """Whoever steals server.key cannot make certificates that nodes would take."""
    from fedtune.keys import certificates as x5

    stolen = x5.read_pem_key(folder / "server.key", "hint")
    issuer = x5.to_certificate((folder / "server.pem").read_bytes(), "server.pem")
    key = x5.new_server_key()
    forged = tmp_path / "forged"
    forged.mkdir()
    made = x5.issue_server(issuer, stolen, key.public_key(), ["example.org"], 10, NOW)
    (forged / "server.pem").write_bytes(x5.pem_of(made) + (folder / "server.pem").read_bytes())
    (forged / "server.key").write_bytes(x5.secret_of(key))
    with _listening(forged) as port, pytest.raises(ssl.SSLCertVerificationError):
        _call(port, folder / "ca.pem", "example.org")


def test_grpc_takes_the_right_ca_and_host_alone(folder: Path, tmp_path: Path) -> None:
    other = federation(tmp_path / "other")
    pair = ((folder / "server.key").read_bytes(), (folder / "server.pem").read_bytes())
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    server.start()

    def reach(root: Path, host: str) -> str:
        secure = grpc.ssl_channel_credentials(authority.read_ca(root))
        options = (("grpc.ssl_target_name_override", host),)
        with grpc.secure_channel(f"127.0.0.1:{port}", secure, options) as channel:
            try:
                channel.unary_unary("/none/None")(b"", timeout=5)
            except grpc.RpcError as error:
                return str(error.code().name)
            return "answered"

    try:
        # Through TLS, then: there is no such method.
        assert reach(folder / "ca.pem", "localhost") == "UNIMPLEMENTED"
        assert reach(folder / "ca.pem", "127.0.0.1") == "UNIMPLEMENTED"
        assert reach(folder / "ca.pem", "example.org") == "UNAVAILABLE"
        assert reach(other / "ca.pem", "localhost") == "UNAVAILABLE"
    finally:
        server.stop(0).wait()
