"""A client's own memory between rounds: its optimiser state, on its own disk.

A file is named by the last round it saw. The server may take back rounds it has
not committed, so a file is dropped only when a newer committed one exists.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from fedtune.files import write_atomic

__all__ = ["recall", "remember"]


def recall(folder: Path, optim: torch.optim.Optimizer, *, before: int, committed: int) -> None:
    """Load the newest state from before round ``before``, if there is one.

    Parameters
    ----------
    folder : Path
        This client's own folder.
    before : int
        Round about to run; states of this round or later are from a lost future.
    committed : int
        Last durable round: older states than the newest one up to here are deleted.
    """
    rounds = _rounds(folder)
    for lost in [r for r in rounds if r >= before]:
        _path(folder, lost).unlink(missing_ok=True)
    usable = [r for r in rounds if r < before]
    durable = [r for r in usable if r <= committed]
    for old in durable[:-1]:
        _path(folder, old).unlink(missing_ok=True)
    if not usable:
        return
    flat = load_file(_path(folder, usable[-1]))
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in flat.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    packed = optim.state_dict()
    optim.load_state_dict({"state": state, "param_groups": packed["param_groups"]})


def remember(folder: Path, optim: torch.optim.Optimizer, *, after: int) -> None:
    """Save the optimiser's state as that of round ``after``."""
    flat = {
        f"{index}.{key}": value.detach().cpu().contiguous()
        for index, state in optim.state_dict()["state"].items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }
    if flat:
        write_atomic(_path(folder, after), save(flat))


def _rounds(folder: Path) -> list[int]:
    names = (re.fullmatch(r"round-(\d+)\.safetensors", p.name) for p in folder.glob("round-*"))
    return sorted(int(match.group(1)) for match in names if match)


def _path(folder: Path, number: int) -> Path:
    return folder / f"round-{number:06d}.safetensors"
