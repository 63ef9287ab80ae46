"""A client's own memory between rounds: its optimiser state, on its own disk.

A file is named by the last round it saw. The server may take back rounds it has
not committed, so a file is dropped only when a newer committed one exists.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save

from fedtune.files import numbered, numbered_name, write_atomic

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
    known = numbered(folder, "round")
    usable = {r: path for r, path in known.items() if r < before}
    durable = [path for r, path in usable.items() if r <= committed]
    lost = [path for r, path in known.items() if r >= before]
    for path in lost + durable[:-1]:
        path.unlink(missing_ok=True)
    if not usable:
        return
    flat = load_file(usable[max(usable)])
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
        write_atomic(folder / numbered_name("round", after), save(flat))
