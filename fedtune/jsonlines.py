"""Records in JSON, one a line, safe against a crash in the middle of a line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedtune.files import append, storage, write_atomic

__all__ = ["add_rows", "read_rows", "write_rows"]


def add_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add records, durable before it returns; no file is made for none.

    Half of a line, which a crash left, is dropped before: it never counted.
    """
    if data := _lines(rows):
        _drop_half(path)
        append(path, data)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Put these records in place of all that were there, atomically."""
    write_atomic(path, _lines(rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read complete lines, oldest first; none of a file that is not there."""
    if not path.is_file():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines() if line]


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows).encode()


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """Give null for what is no number: a diverged model must not end the run's record."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


def _drop_half(path: Path) -> None:
    if not path.is_file():
        return
    with storage(path), path.open("rb+") as file:
        if not file.seek(0, os.SEEK_END):
            return
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
