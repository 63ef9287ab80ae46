"""The status page: who may see it, what it says, and how it looks in a real browser."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from fedtune.errors import ExitCode, FedtuneError
from fedtune.server.snapshot import NodeView, Snapshot, Trouble, snapshot_of
from fedtune.server.status_chart import chart_of
from fedtune.server.status_metrics import metrics_of
from fedtune.server.status_page import Status, start_status
from fedtune.server.status_view import page_of
from fedtune.simulations.browser import Browser, chromium_path, open_browser
from tests.server.standing import CLIENT, EXAMPLE, HOSTILE, Run

TOKEN = "correct-horse-battery"  # not a secret: a test's
NODES = [
    NodeView("ward-a", "online", 1_700_000_000.0), NodeView("ward-b", "offline", 1_600_000_000.0),
    NodeView("ward-c", "never"), NodeView("ward-d", "revoked"),
]  # fmt: skip
LONG = "n" * 1000


def standing(tmp_path: Path, **privacy: Any) -> Snapshot:
    """A run after two of four rounds, with troubles."""
    run = Run(tmp_path, **(privacy or {"example": EXAMPLE}))
    with run.folder.lock():
        run.base()
        run.round(1, "ward-a", "ward-b")
        run.begin(2, 2)
        run.done(2, "ward-a")
        run.done(2, "ward-b", "failed", "out of memory")
        run.commit(2, {"ward-a": "ok", "ward-b": "failed:out of memory"})
        run.begin(3, 2)
        run.done(3, "ward-a")
        return snapshot_of(
            run.folder, NODES, federation="wards", address="example.org:9092",
            certificate_days_left=200, queue=["next-run"],
        )  # fmt: skip


@pytest.fixture
def serve() -> Iterator[Callable[..., Status]]:
    """Start pages that are closed afterwards."""
    started: list[Status] = []

    def start(source: Any, *rest: Any, **named: Any) -> Status:
        look = source if callable(source) else lambda: source
        started.append(start_status(look, *rest, **named))
        return started[-1]

    yield start
    for one in started:
        one.close()


def port_of(status: Status) -> int:
    return int(status.url.rstrip("/").rpartition(":")[2])


def ask(
    status: Status, path: str = "/", method: str = "GET", **headers: str
) -> tuple[HTTPResponse, str]:
    """One request to the page; header names have _ for -."""
    connection = HTTPConnection("127.0.0.1", port_of(status), timeout=10)
    try:
        known = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, headers=known)
        answer = connection.getresponse()
        return answer, answer.read().decode()
    finally:
        connection.close()


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


# ---------------------------------------------------------------- names of others


@pytest.mark.parametrize(
    "name", [HOSTILE, '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}", "\u202eevil", "שלום", LONG,
             "</title><script>", "<!--", "&lt;b&gt;"],
    ids=["script", "attribute", "template", "turned", "hebrew", "long", "title", "comment",
         "entity"],
)  # fmt: skip
def test_names_are_text(name: str, tmp_path: Path) -> None:
    found = standing(tmp_path)
    clean = snapshot_of(
        None, [NodeView(name, "online", note=name)], federation=name, address=name, queue=[name],
        troubles=[Trouble(1.0, 1, name, name)],
    )  # fmt: skip
    # What did not come through the reader must be escaped all the same.
    raw = replace(
        found, federation=name, experiment=name, run=name, reason=name, phase=name, address=name,
        nodes=(NodeView(name, "online", 1.0, 1, 1, 1, name),), queue=(name,),
        troubles=(Trouble(1.0, 1, name, name),), status="failed",
    )  # fmt: skip
    for one in (clean, raw):
        text = page_of(one, "nonce")
        assert re.findall(r"<(script|img)\b[^>]*>", text) == ["script"]
        assert "<!--" not in text
        assert "{{ 7 * 7 }}" in text or "{" not in name
    assert "\u202e" not in page_of(clean, "nonce")
    assert LONG[:301] not in page_of(clean, "nonce")


# ---------------------------------------------------------------- states


def test_states_without_much_to_show(tmp_path: Path) -> None:
    empty = page_of(snapshot_of(None), "n")
    for words in ("no run yet", "Nothing measured yet.", "Nobody is enrolled yet", "None so far."):
        assert words in empty
    run = Run(tmp_path)
    run.folder.update_status(status="failed", reason="no client can take part: all are asleep")
    failed = page_of(run.look(), "n")
    assert 'role="alert">no client can take part: all are asleep' in failed
    assert "This run promises nothing" in failed
    old = page_of(replace(run.look(), certificate_days_left=-2), "n")
    assert "has expired" in old
    assert "ends in 5 days" in page_of(replace(run.look(), certificate_days_left=5), "n")


def test_over_budget_and_without_bound(tmp_path: Path) -> None:
    found = standing(tmp_path)
    (budget,) = found.budgets
    over = page_of(replace(found, budgets=(replace(budget, epsilon=9.0),)), "n")
    assert 'class="bad">ε ≤ 9.00' in over
    assert 'aria-valuenow="100"' in over
    never = page_of(
        replace(found, budgets=(replace(budget, epsilon=float("inf"), limit=None),)), "n"
    )
    assert "no bound" in never
    assert "no limit set" in never


def test_a_secret_cohort_is_not_on_the_page(tmp_path: Path) -> None:
    found = standing(tmp_path, client=CLIENT)
    text = page_of(replace(found, nodes=()), "n")
    assert "ward-a" not in text
    assert "out of memory" not in text
    assert "server&#39;s secret" in text or "server's secret" in text
    assert '<th scope="col">Answers' not in page_of(found, "n").partition('id="nodes"')[2]


def test_a_run_of_many_rounds_and_nodes_stays_small(tmp_path: Path) -> None:
    run = Run(tmp_path, rounds=5000)
    for number in range(5001):
        run.folder.append(
            {"round": number, "loss": 1.0 + 1 / (number + 1)}, []
        ) if not number else (None)
    rows = [{"round": n, "loss": 1.0 + 1 / (n + 1), "clients_ok": 3} for n in range(5001)]
    nodes = tuple(NodeView(f"node-{n:04d}", "online", 1.0) for n in range(1000))
    found = replace(run.look(), rows=tuple(rows), nodes=nodes, round=5000)
    text = page_of(found, "n")
    assert "and 800 more" in text
    assert "The newest 10 of 5001" in text
    assert len(text) < 150_000


def test_the_curve_stands_where_the_numbers_are() -> None:
    rows = [{"round": n, "loss": loss} for n, loss in enumerate([4.0, 3.0, None, 2.0])]
    chart = chart_of(rows, 4, 400, 200)
    assert chart is not None
    (line,) = chart.lines
    points = [tuple(map(float, pair.split(","))) for pair in line.points.split()]
    assert len(points) == 3
    across = (chart.right - chart.left) / 4
    assert [x for x, _ in points] == pytest.approx([chart.left + n * across for n in (0, 1, 3)])
    ticks = {label: y for y, label in chart.y_ticks}
    assert [y for _, y in points] == pytest.approx([ticks["4.0"], ticks["3.0"], ticks["2.0"]])
    assert chart.words == "held-out loss from 4 (round 0) to 2 (round 3)"
    assert chart_of([{"round": 0}], 4, 400, 200) is None
    assert chart_of([{"round": 0, "loss": float("nan")}], 4, 400, 200) is None


def test_a_curve_of_many_points_is_thinned_and_keeps_the_newest() -> None:
    rows = [{"round": n, "loss": 5.0 - n / 3000} for n in range(3001)]
    chart = chart_of(rows, 3000, 700, 200)
    assert chart is not None
    (line,) = chart.lines
    assert len(line.points.split()) <= 240
    assert (line.last, line.x) == (4.0, chart.right)


# ---------------------------------------------------------------- metrics


def scrape(snapshot: Snapshot) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(metrics_of(snapshot).decode())
    return {
        (sample.name, ",".join(sample.labels.values())): sample.value
        for family in families for sample in family.samples
    }  # fmt: skip


def test_prometheus_reads_it(tmp_path: Path, serve: Callable[..., Status]) -> None:
    found = standing(tmp_path)
    answer, text = ask(serve(found), "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    metrics = scrape(found)
    assert text.encode() == metrics_of(found)
    assert metrics["fedtune_up", ""] == 1
    assert metrics["fedtune_running", ""] == 1
    assert (metrics["fedtune_round", ""], metrics["fedtune_rounds", ""]) == (2, 4)
    assert metrics["fedtune_loss", "held_out"] == 4.0
    assert metrics["fedtune_loss", "training"] == pytest.approx(3.9)
    assert metrics["fedtune_bytes_total", "down"] == 6_000_000
    assert metrics["fedtune_bytes_total", "up"] == 4_000_000
    assert metrics["fedtune_epsilon", "example"] == found.budgets[0].epsilon
    assert metrics["fedtune_epsilon_limit", "example"] == 8.0
    assert [metrics["fedtune_nodes", s] for s in ("online", "offline", "never", "revoked")] == [
        1, 1, 1, 1,
    ]  # fmt: skip
    assert metrics["fedtune_answers_total", "ok"] == 3
    assert metrics["fedtune_answers_total", "failed"] == 1
    assert metrics["fedtune_round_seconds", ""] == 2.0
    assert "ward" not in text
    assert metrics == scrape(found), "a second scrape adds nothing up"


def test_metrics_leave_out_what_is_secret_or_unknown(tmp_path: Path) -> None:
    metrics = scrape(standing(tmp_path, client=CLIENT))
    assert not any("bytes" in name or "answers" in name for name, _ in metrics)
    assert ("fedtune_epsilon", "client") in metrics
    bare = scrape(snapshot_of(None))
    assert (bare["fedtune_up", ""], bare["fedtune_running", ""]) == (1, 0)
    assert not any("loss" in name or "seconds" in name for name, _ in bare)


# ---------------------------------------------------------------- in a real browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if chromium_path() is None:
        if os.environ.get("CI") and Path("/usr/bin/chromium").exists():
            pytest.fail("/usr/bin/chromium is there, and is not found")
        pytest.skip("no Chromium on this machine")
    with open_browser(patience=60.0) as found:
        yield found


@pytest.fixture
def quiet(browser: Browser, serve: Callable[..., Status]) -> Iterator[Browser]:
    """The browser; the page must have nothing to complain about while it is served."""
    browser.complaints.clear()
    yield browser
    browser.show("about:blank", 400, 400)
    assert browser.complaints == []


def crowded(tmp_path: Path) -> Snapshot:
    """Everything at once, with the worst names."""
    found = standing(tmp_path)
    nodes = tuple(
        NodeView(name, "offline", 1.0, 10, 20, 30, "round 2: " + "w" * 290)
        for name in ("N" * 80, HOSTILE, "ш" * 80, "שלום שלום")
    )
    troubles = tuple(Trouble(1e9 + n, n, "W" * 80, "x" * 300) for n in range(12))
    return replace(
        found, nodes=(*found.nodes, *nodes), troubles=troubles, run="r" * 80, federation="F" * 80,
        experiment="e" * 64, address="a" * 80, reason="q" * 300, status="failed",
        queue=("z" * 80,) * 5,
    )  # fmt: skip


@pytest.mark.parametrize("width", [320, 390, 700, 1280])
def test_nothing_sticks_out(
    width: int, quiet: Browser, tmp_path: Path, serve: Callable[..., Status]
) -> None:
    for found in (standing(tmp_path), crowded(tmp_path), snapshot_of(None)):
        quiet.show(serve(found).url, width, 844)
        assert quiet.value("innerWidth") == width
        assert quiet.value("document.documentElement.scrollWidth") <= width
        outside = quiet.value(
            "[...document.querySelectorAll('main *')].filter(e => !e.closest('[hidden]') && "
            f"e.getBoundingClientRect().right > {width} + .5).map(e => e.outerHTML.slice(0, 80))"
        )
        assert outside == []


def test_it_can_be_read(quiet: Browser, tmp_path: Path, serve: Callable[..., Status]) -> None:
    found = standing(tmp_path)
    url = serve(found).url
    quiet.show(url, 390, 844)
    seen = quiet.value("document.body.innerText")
    for words in ("round 3: 1 of 2 answered", "ε ≤", "of 8", "out of memory", "Loss by round"):
        assert words in seen
    bars = quiet.value(
        "[...document.querySelectorAll('[role=progressbar]')].map(e => "
        "[e.getAttribute('aria-label'), e.getAttribute('aria-valuenow'), "
        "e.getBoundingClientRect().width > 200])"
    )
    share = round(100 * found.budgets[0].epsilon / 8.0)
    assert bars == [["Rounds done", "50", True], ["Privacy spent, per example", str(share), True]]
    filled = quiet.value(
        "(e => e.firstElementChild.getBoundingClientRect().width / e.getBoundingClientRect().width)"
        "(document.querySelector('[role=progressbar]'))"
    )
    assert filled == pytest.approx(0.5, abs=0.01)
    assert quiet.value("document.querySelector('figure').getAttribute('aria-label')").startswith(
        "held-out loss from 4.5 (round 0) to 4 (round 2)"
    )
    small = quiet.value(
        "Math.min(...[...document.querySelectorAll('main *:not(svg *)')].filter(e => "
        "e.innerText).map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert small >= 12


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_colours_have_contrast(
    dark: bool, quiet: Browser, tmp_path: Path, serve: Callable[..., Status]
) -> None:
    """WCAG 2.1, 1.4.3: at least 4.5 to 1 for every text, on what is behind it."""
    quiet.show(serve(crowded(tmp_path)).url, 1280, 800, dark=dark)
    worst = quiet.value(_CONTRAST)
    assert worst["ratio"] >= 4.5, worst
    back = quiet.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", back))) < 3 * 60) == dark


_CONTRAST = """
(() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (c) => c.slice(0, 3).map((v) => (v /= 255) <= .04045 ? v / 12.92 :
    ((v + .055) / 1.055) ** 2.4).reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
  const behind = (e) => { for (; e; e = e.parentElement) {
    const c = rgb(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c; }
    return [255, 255, 255]; };
  let worst = { ratio: 99 };
  for (const e of document.querySelectorAll('main *')) {
    if (e.closest('[hidden]') || ![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
      continue;
    const style = getComputedStyle(e), svg = e.namespaceURI.endsWith('svg');
    const a = light(rgb(svg ? style.fill : style.color)), b = light(behind(e));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < worst.ratio) worst = { ratio, text: e.textContent.slice(0, 40) };
  }
  return worst;
})()
"""


def test_it_follows_the_run_without_jumps(
    quiet: Browser, tmp_path: Path, serve: Callable[..., Status]
) -> None:
    run = Run(tmp_path, example=EXAMPLE)
    with run.folder.lock():
        run.base()
        run.round(1, "a")
        quiet.show(serve(lambda: run.look("a")).url, 1280, 800)
        quiet.value("window.kept = document.getElementById('nodes'), window.first = "
                    "document.querySelector('h1'), 1")  # fmt: skip
        quiet.value("window.shift = 0, new PerformanceObserver(l => l.getEntries().forEach(e => "
                    "{ window.shift += e.value })).observe({type: 'layout-shift'}), 1")  # fmt: skip
        run.begin(2, 1)
        quiet.wait_for("document.body.innerText.includes('round 2: 0 of 1 answered')")
        run.done(2, "a")
        run.commit(2, {"a": "ok"})
        quiet.wait_for("document.getElementById('cards').innerText.includes('2 of 4')")
        assert quiet.value("document.title") == "running 2/4: ward-notes"
        assert quiet.value("window.first === document.querySelector('h1')"), "head has no news"
        assert quiet.value("window.shift") < 0.1
        run.begin(3, 1)
        run.done(3, HOSTILE, "failed", HOSTILE)
        quiet.wait_for("document.getElementById('troubles').innerText.includes('<script>')")
    assert quiet.value("document.scripts.length") == 1


def test_a_server_that_is_gone_is_said_and_one_that_is_back_too(
    browser: Browser, tmp_path: Path, serve: Callable[..., Status]
) -> None:
    found = standing(tmp_path)
    status = serve(found)
    browser.show(status.url, 390, 844)
    assert browser.value("document.getElementById('gone').hidden")
    status.close()
    browser.wait_for("!document.getElementById('gone').hidden")
    assert browser.value("document.getElementById('gone').innerText").startswith(
        "The server does not answer."
    )
    assert browser.value("document.documentElement.scrollWidth") <= 390
    serve(replace(found, phase="back again"), port=port_of(status))
    browser.wait_for("document.getElementById('gone').hidden")
    browser.wait_for("document.body.innerText.includes('back again')")


def test_a_token_once_and_then_the_cookie(
    quiet: Browser, tmp_path: Path, serve: Callable[..., Status]
) -> None:
    status = serve(standing(tmp_path), token=TOKEN)
    quiet.show(f"{status.url}?token={TOKEN}", 390, 844)
    assert quiet.value("location.href") == status.url
    assert "round 3" in quiet.value("document.body.innerText")
    assert quiet.value("document.cookie") == ""
    assert quiet.value("fetch('/state.json').then(a => a.status)") == 200


def test_without_scripts_it_is_loaded_again(
    quiet: Browser, tmp_path: Path, serve: Callable[..., Status]
) -> None:
    looks: list[int] = []
    found = standing(tmp_path)

    def look() -> Snapshot:
        looks.append(1)
        return found

    quiet.ask("Emulation.setScriptExecutionDisabled", value=True)
    try:
        quiet.ask("Page.navigate", url=serve(look).url)
        until = time.monotonic() + 20
        while len(looks) < 2 and time.monotonic() < until:
            time.sleep(0.2)
    finally:
        quiet.ask("Emulation.setScriptExecutionDisabled", value=False)
    assert len(looks) >= 2


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 800)])
def test_pictures_show_something(
    width: int, height: int, quiet: Browser, tmp_path: Path, serve: Callable[..., Status]
) -> None:
    quiet.show(serve(standing(tmp_path)).url, width, height)
    picture = Image.open(io.BytesIO(quiet.picture()))
    assert picture.size == (width, height)
    colours = picture.convert("RGB").getcolors(maxcolors=1 << 20)
    assert colours is not None
    assert len(colours) > 50
    assert max(count for count, _ in colours) < 0.95 * width * height
