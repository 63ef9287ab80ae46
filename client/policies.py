"""A client's policy between its rounds: what it remembers, and the log of its decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from fedtune.files import numbered, numbered_name, read_tensors, write_atomic
from fedtune.jsonlines import add_rows
from fedtune.privacy.rldp import DECISIONS
from fedtune.privacy.rldp.policy import State

__all__ = ["keep", "log", "recall"]


def recall(home: Path, number: int) -> State:
    """Return what the newest round before ``number`` left; empty before the first."""
    known = {r: path for r, path in numbered(home, "policy").items() if r < number}
    return read_tensors(known[max(known)])[0] if known else {}


def keep(home: Path, number: int, state: Mapping[str, Any], committed: int) -> None:
    """Save what round ``number`` left; older than the last durable round is not needed."""
    arrays = {name: np.asarray(value, order="C") for name, value in state.items()}
    write_atomic(home / numbered_name("policy", number), save(arrays))
    durable = [path for r, path in numbered(home, "policy").items() if r <= committed]
    for old in durable[:-1]:
        old.unlink(missing_ok=True)


def log(home: Path, number: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add a round's decisions to the client's log; a round tried again writes its own."""
    add_rows(home / DECISIONS, ({"round": number, **row} for row in rows))
