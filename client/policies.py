"""A client's policy between its rounds: what it remembers, and the log of its decisions."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from fedtune.files import read_tensors, storage, write_atomic
from fedtune.privacy.rldp.policy import State

__all__ = ["DECISIONS", "keep", "log", "recall"]

DECISIONS = "decisions.jsonl"
"""In a client's own folder: what its policy chose. All of it was released or is public."""


def recall(home: Path, number: int) -> State:
    """Return what the newest round before ``number`` left; empty before the first."""
    known = {r: path for r, path in _kept(home) if r < number}
    return read_tensors(known[max(known)])[0] if known else {}


def keep(home: Path, number: int, state: Mapping[str, Any], committed: int) -> None:
    """Save what round ``number`` left; older than the last durable round is not needed."""
    arrays = {name: np.asarray(value, order="C") for name, value in state.items()}
    write_atomic(home / f"policy-{number:06d}.safetensors", save(arrays))
    durable = [path for r, path in _kept(home) if r <= committed]
    for old in durable[:-1]:
        old.unlink(missing_ok=True)


def log(home: Path, number: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add a round's decisions to the client's log; a round tried again writes its own."""
    path = home / DECISIONS
    with storage(path), path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({"round": number, **row}, allow_nan=False) + "\n")


def _kept(home: Path) -> list[tuple[int, Path]]:
    found = (
        (re.fullmatch(r"policy-(\d+)\.safetensors", p.name), p)
        for p in home.glob("policy-*.safetensors")
    )
    return sorted((int(match.group(1)), path) for match, path in found if match)
