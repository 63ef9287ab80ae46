"""The log of a child: its last lines, and what happens when it is long."""

import errno
from pathlib import Path

import pytest

from fedtune.server import superlink_process
from fedtune.server.superlink_process import cut, tail


def test_a_long_log_is_cut_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(superlink_process, "_MOST_LOG_BYTES", 100)
    log = tmp_path / "some.log"
    assert tail(log) == "(empty)"
    with log.open("ab", buffering=0) as file:
        file.write(b"first\n" * 10)
        cut(log)
        assert log.stat().st_size == 60
        file.write(b"second\n" * 10)
        cut(log)
        assert log.stat().st_size == 0
        file.write(b"\nthird\n\n")
    assert tail(log) == "third"
    assert (tmp_path / "some.log.1").read_bytes() == b"first\n" * 10 + b"second\n" * 10


def test_a_full_disk_costs_old_lines_and_not_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(superlink_process, "_MOST_LOG_BYTES", 100)
    log = tmp_path / "some.log"
    log.write_bytes(b"line\n" * 100)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(superlink_process, "_private", full)
    cut(log)
    assert log.stat().st_size == 0
