"""A run that pages show, and how to ask a page."""

from __future__ import annotations

from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

from fedtune.server.snapshot import NodeView, Snapshot, snapshot_of
from fedtune.server.status_page import Status
from tests.server.standing import EXAMPLE, Run

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
