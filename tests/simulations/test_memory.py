"""Memory stays flat over many rounds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.simulations.apps import experiment, rows, write_rows

pytestmark = pytest.mark.slow


def test_memory_does_not_grow_with_the_rounds(
    tmp_path: Path, shared: Path, record_property: Callable[[str, object], None]
) -> None:
    """In a process of its own, so that no other test's memory counts."""
    write_rows(tmp_path / "rows.jsonl", rows(3))
    file = experiment(
        tmp_path, shared,
        data__max_length=16, tuning__steps=1, tuning__batch_size=2, federation__rounds=50,
        evaluation__every=50, engine__workers=2,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "fedtune", "simulate", str(file), "--json"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = Path(json.loads(done.stdout)["result"]["run"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    memory = {row["round"]: row["memory_mb"] for row in lines}
    assert len(memory) == 51
    growth = memory[50] / memory[10] - 1
    record_property("memory_mb", [memory[10], memory[30], memory[50]])
    print(f"memory: {memory[10]} MB after round 10, {memory[50]} MB after 50: {growth:+.2%}")
    assert growth < 0.02
