"""The status page: who may see it, and what it bears."""

from __future__ import annotations

import json
import re
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.client import HTTPSConnection
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.errors import ExitCode, FedtuneError
from fedtune.server.snapshot import Snapshot
from fedtune.server.status_page import Status, start_status
from tests.server.standing import Run
from tests.server.status_kit import TOKEN, ask, port_of, standing

# ---------------------------------------------------------------- who may see it


def test_the_page_says_how_things_stand(tmp_path: Path, serve: Callable[..., Status]) -> None:
    status = serve(standing(tmp_path))
    answer, text = ask(status)
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    plain = " ".join(re.sub(r"<[^>]*>", " ", text).split())
    for words in (
        "round 3: 1 of 2 answered", "2 of 4", "ward-a", "out of memory", "example.org:9092",
        "ε ≤", "of 8, at δ = 10⁻⁵", "certificate good for 200 days", "next-run", "never seen",
        "revoked", "held-out (nats)", "1 ok, 1 failed",
    ):  # fmt: skip
        assert words in plain, words


def test_state_is_json_for_machines(tmp_path: Path, serve: Callable[..., Status]) -> None:
    found = standing(tmp_path)
    answer, text = ask(serve(found), "/state.json")
    assert answer.headers["content-type"] == "application/json"
    state = json.loads(text)
    assert (state["round"], state["rounds"], state["status"]) == (2, 4, "running")
    assert state["budgets"][0]["epsilon"] == found.budgets[0].epsilon
    assert [node["name"] for node in state["nodes"]] == ["ward-a", "ward-b", "ward-c", "ward-d"]


def test_nothing_can_be_changed(serve: Callable[..., Status]) -> None:
    status = serve(lambda: pytest.fail("it looked"))
    for path in ("/", "/state.json", "/metrics", "/healthz", "/nothing"):
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"):
            answer, _ = ask(status, path, method)
            assert answer.status == 405
            assert answer.headers["allow"] == "GET, HEAD"


def test_head_has_no_body(tmp_path: Path, serve: Callable[..., Status]) -> None:
    status = serve(standing(tmp_path))
    for path in ("/", "/state.json", "/metrics", "/healthz"):
        answer, text = ask(status, path, "HEAD")
        assert (answer.status, text) == (200, "")
        assert int(answer.headers["content-length"]) > 2
    assert ask(status, "/nothing")[0].status == 404
    assert ask(status, "/../../etc/passwd")[0].status == 404


def test_every_answer_is_locked_down(tmp_path: Path, serve: Callable[..., Status]) -> None:
    status = serve(standing(tmp_path))
    nonces = set()
    for path in ("/", "/", "/state.json", "/metrics", "/nothing"):
        answer, text = ask(status, path)
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy
        for name, value in (
            ("x-frame-options", "DENY"), ("x-content-type-options", "nosniff"),
            ("referrer-policy", "no-referrer"), ("cache-control", "no-store"),
        ):  # fmt: skip
            assert answer.headers.get_all(name) == [value]
        assert "server" not in answer.headers
        if path == "/":
            nonces.add(re.search(r"script-src 'nonce-([\w-]+)'", policy)[1])  # type: ignore[index]
            assert set(re.findall(r'nonce="([^"]+)"', text)) <= nonces
            assert "http://" not in text
            assert "https://" not in text
            assert " style=" not in text
            assert not re.search(r"\son\w+=", text)
    assert len(nonces) == 2


def test_another_name_for_this_machine_is_refused(
    serve: Callable[..., Status], tmp_path: Path
) -> None:
    page = serve(standing(tmp_path))
    ours = ("127.0.0.1", "127.0.0.1:1", "localhost:9000", "LOCALHOST", "[::1]:80", "127.9.9.9")
    others = (
        "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "10.0.0.1",
        "0.0.0.0", "127.1", "evil.example:127", "evil@127.0.0.1", "[::2]", "localhost:",
    )  # fmt: skip
    for host in (*ours, *others):
        for path in ("/", "/state.json", "/metrics"):
            answer, text = ask(page, path, Host=host)
            assert answer.status == (200 if host in ours else 421), host
            assert ("fedtune" in text) == (host in ours and path != "/state.json")


def test_others_need_a_token(tmp_path: Path, serve: Callable[..., Status]) -> None:
    found = standing(tmp_path)
    for token in ("", "short", "x" * 15):
        with pytest.raises(FedtuneError, match="16 are needed") as caught:
            start_status(lambda: found, "0.0.0.0", token=token)
        assert caught.value.code == ExitCode.CONFIG
    with pytest.raises(FedtuneError, match="16 are needed"):
        start_status(lambda: found, token="short")
    with pytest.raises(FedtuneError, match="characters that do not fit"):
        start_status(lambda: found, token="a token with blanks in it")
    status = serve(found, "0.0.0.0", token=TOKEN)
    assert TOKEN not in status.url
    for path in ("/", "/state.json", "/metrics", "/nothing"):
        answer, text = ask(status, path)
        assert answer.status == 401
        assert "ward" not in text
    assert ask(status, "/healthz")[1] == "ok\n"
    # Its own name is not known here, so every name is let through to the token.
    assert ask(status, Host="wards.example", authorization=f"Bearer {TOKEN}")[0].status == 200


def test_bearer_and_cookie(tmp_path: Path, serve: Callable[..., Status]) -> None:
    status = serve(standing(tmp_path), token=TOKEN)
    assert ask(status, "/metrics", authorization=f"Bearer {TOKEN}")[0].status == 200
    assert ask(status, "/metrics", authorization=f"bearer {TOKEN}")[0].status == 200
    for wrong in (f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN, "Bearer", "Bearer \xff\xfe", ""):
        assert ask(status, authorization=wrong)[0].status == 401
    assert ask(status, "/?token=nearly-the-right-one")[0].status == 401
    answer, text = ask(status, f"/?token={TOKEN}")
    assert (answer.status, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert TOKEN not in cookie + text
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
    assert "Secure" not in cookie
    value = cookie.partition(";")[0]
    assert ask(status, cookie=value)[0].status == 200
    assert ask(status, "/state.json", cookie=value)[0].status == 200
    for wrong in (value[:-1], f"{value}0", "fedtune-status=", f"fedtune-status={TOKEN}"):
        assert ask(status, cookie=wrong)[0].status == 401
    # Another server's cookie opens nothing here.
    other = serve(standing(tmp_path), token=TOKEN + "-other")
    assert ask(other, cookie=value)[0].status == 401


def certificate(folder: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "status")])
    now, local = datetime.now(UTC), ip_address("127.0.0.1")
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(local)]), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    pem, secret = folder / "server.pem", folder / "server.key"
    pem.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )  # fmt: skip
    return pem, secret


def test_over_tls_the_cookie_is_for_tls_alone(tmp_path: Path, serve: Callable[..., Status]) -> None:
    pem, key = certificate(tmp_path)
    status = serve(standing(tmp_path), token=TOKEN, certificate=pem, key=key)
    assert status.url.startswith("https://127.0.0.1:")
    context = ssl.create_default_context(cafile=str(pem))
    connection = HTTPSConnection("127.0.0.1", port_of(status), timeout=10, context=context)
    connection.request("GET", f"/?token={TOKEN}")
    answer = connection.getresponse()
    assert answer.status == 303
    assert "Secure" in answer.headers["set-cookie"]
    connection.close()
    with pytest.raises(FedtuneError, match="key=None"):
        start_status(lambda: standing(tmp_path), certificate=pem)
    (tmp_path / "bad.pem").write_text("no certificate")
    with pytest.raises(FedtuneError, match="cannot use") as caught:
        start_status(lambda: standing(tmp_path), certificate=tmp_path / "bad.pem", key=key)
    assert caught.value.code == ExitCode.CONFIG


def test_nothing_listens_outside(tmp_path: Path, serve: Callable[..., Status]) -> None:
    import psutil

    status = serve(standing(tmp_path))
    places = {
        one.laddr.ip for one in psutil.Process().net_connections("inet")
        if one.status == psutil.CONN_LISTEN and one.laddr.port == port_of(status)
    }  # fmt: skip
    assert places == {"127.0.0.1"}


def test_a_taken_port_is_said_and_a_closed_page_is_gone(
    tmp_path: Path, serve: Callable[..., Status]
) -> None:
    status = serve(standing(tmp_path))
    with pytest.raises(FedtuneError, match=f"port {port_of(status)}") as caught:
        start_status(lambda: standing(tmp_path), port=port_of(status))
    assert caught.value.code == ExitCode.ENGINE
    for host, port in (("no.such.host.invalid", 0), ("127.0.0.1", 70_000)):
        with pytest.raises(FedtuneError, match="cannot listen"):
            start_status(lambda: standing(tmp_path), host, port, TOKEN)
    status.close()
    status.close()
    with pytest.raises(ConnectionRefusedError):
        ask(status)
    again = serve(standing(tmp_path), port=port_of(status))
    assert ask(again)[0].status == 200


def test_a_run_folder_that_cannot_be_read_is_said(
    tmp_path: Path, serve: Callable[..., Status]
) -> None:
    run = Run(tmp_path)
    status = serve(run.look)
    assert ask(status)[0].status == 200
    (run.folder.path / "run.json").write_text("{")
    time.sleep(0.6)
    for path in ("/", "/state.json", "/metrics"):
        answer, text = ask(status, path)
        assert answer.status == 503
        assert "run.json' cannot be read" in text
    run.folder.path.joinpath("run.json").write_text('{"status": "finished"}')
    time.sleep(0.6)
    assert ask(status)[0].status == 200


def test_what_nobody_foresaw_is_logged_and_not_shown(
    serve: Callable[..., Status], caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> Snapshot:
        raise RuntimeError("the inner workings")

    status = serve(broken)
    answer, text = ask(status)
    assert answer.status == 500
    assert "inner workings" not in text
    until = time.monotonic() + 5
    while "inner workings" not in caplog.text and time.monotonic() < until:
        time.sleep(0.05)
    assert "inner workings" in caplog.text
    assert ask(status, "/healthz")[0].status == 200


# ---------------------------------------------------------------- limits


def test_many_readers_are_one_look(tmp_path: Path, serve: Callable[..., Status]) -> None:
    looks: list[float] = []
    found = standing(tmp_path)

    def look() -> Snapshot:
        looks.append(time.monotonic())
        return found

    status, begun = serve(look), time.monotonic()
    for _ in range(40):
        assert ask(status, "/state.json")[0].status == 200
    assert len(looks) <= 1 + (time.monotonic() - begun) / 0.5


def test_large_or_broken_requests_are_turned_away(
    tmp_path: Path, serve: Callable[..., Status]
) -> None:
    status = serve(standing(tmp_path))
    for data in (
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
        b"GET /" + b"y" * 200_000 + b" HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: localhost\r\n\r\n",
        b"nonsense\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port_of(status)), timeout=10) as raw:
            answer = b""
            try:
                raw.sendall(data)
                while more := raw.recv(65536):
                    answer += more
            except OSError:  # closed while it was still being sent to
                pass
        assert not answer or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))
    assert ask(status)[0].status == 200


def test_one_connection_one_answer(tmp_path: Path, serve: Callable[..., Status]) -> None:
    status = serve(standing(tmp_path))
    request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port_of(status)), timeout=10) as raw:
        raw.sendall(request + request)
        answer = b""
        while more := raw.recv(65536):
            answer += more
    assert answer.count(b"HTTP/1.1 200") == 1


def test_who_says_nothing_is_cut_off(
    tmp_path: Path, serve: Callable[..., Status], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtune.server.status_http._DEADLINE", 1.0)
    status = serve(standing(tmp_path))
    silent = [socket.create_connection(("127.0.0.1", port_of(status))) for _ in range(80)]
    for raw in silent[::2]:
        raw.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
    time.sleep(1.5)
    try:
        assert ask(status)[0].status == 200
        for raw in silent:
            raw.settimeout(3)
            try:
                while raw.recv(65536):
                    pass
            except ConnectionResetError:
                continue
    finally:
        for raw in silent:
            raw.close()


_ALONE = """
import sys, time
from fedtune.server.snapshot import snapshot_of
from fedtune.server.status_page import start_status
status = start_status(lambda: snapshot_of(None))
print(status.url, flush=True)
sys.stdin.readline()
raise SystemExit(3)
"""


def test_a_page_never_keeps_a_process_alive_or_takes_its_signals() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _ALONE], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert ask(Status(url, lambda: None))[0].status == 200
        out, err = process.communicate("\n", timeout=20)
    assert (process.returncode, out, err) == (3, "", "")
