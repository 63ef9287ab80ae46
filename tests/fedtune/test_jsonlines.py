"""Records in JSON, one a line."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fedtune.jsonlines import add_rows, read_rows, write_rows

ROWS = [{"round": 1, "loss": 0.5, "name": "Zo\u00eb"}, {"round": 2, "loss": 0.25, "name": ""}]


def test_records_come_back(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    add_rows(path, [])
    assert not path.exists()
    add_rows(path, ROWS[:1])
    add_rows(path, ROWS[1:])
    assert read_rows(path) == ROWS
    write_rows(path, ROWS[1:])
    assert read_rows(path) == ROWS[1:]


def test_what_is_no_number_is_nothing(tmp_path: Path) -> None:
    add_rows(tmp_path / "rows.jsonl", [{"loss": math.nan, "worst": math.inf, "n": 1}])
    assert read_rows(tmp_path / "rows.jsonl") == [{"loss": None, "worst": None, "n": 1}]


@pytest.mark.parametrize("whole", [0, 1])
def test_half_a_line_never_counted(tmp_path: Path, whole: int) -> None:
    path = tmp_path / "rows.jsonl"
    add_rows(path, ROWS[:whole])
    before = path.read_bytes() if whole else b""
    for cut in range(1, 27):
        path.write_bytes(before + b'{"round": 2, "loss": 0.25}\n'[:cut])
        assert read_rows(path) == ROWS[:whole]
        add_rows(path, ROWS[1:])
        assert read_rows(path) == ROWS[:whole] + ROWS[1:]
