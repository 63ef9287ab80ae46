"""The server's state after a round, as one safetensors file."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from safetensors.numpy import save

from fedtune.adapters import Tensors
from fedtune.errors import ExitCode, FedtuneError
from fedtune.files import numbered, numbered_name, read_tensors, write_atomic
from fedtune.pool.chain import Chain, read_chain, write_chain
from fedtune.residual import Residual, join, split
from fedtune.server.optimizer import Moments
from fedtune.server.run_folder import RunFolder

__all__ = ["State", "latest", "store"]


@dataclass(frozen=True)
class State:
    """All that the next round depends on, besides the settings.

    Attributes
    ----------
    round : int
        Last finished round; 0 is the fresh adapter.
    fingerprint : str
        Of the frozen weights that the adapter belongs to.
    policy : Tensors
        Client-level privacy: what the clipping policy remembers.
    chain : Chain or None
        Seed pool: what the weights are made of; ``adapter`` then holds the accumulators of
        the running pool in full precision.
    history : Tensors
        FedKSeed-Pro: what its probabilities come from.
    learner : Tensors
        ``rldp.mode = "federated"``: what learns the clients' clipping policy.
    """

    round: int
    adapter: Tensors
    fingerprint: str
    residual: Residual = field(default_factory=dict)
    moments: Moments = field(default_factory=Moments)
    policy: Tensors = field(default_factory=dict)
    chain: Chain | None = None
    history: Tensors = field(default_factory=dict)
    learner: Tensors = field(default_factory=dict)

    def tensors(self) -> Tensors:
        """Return what is tuned, as it is sent to clients."""
        return join(self.adapter, self.residual)


def store(folder: RunFolder, state: State, keep: int) -> None:
    """Commit a round: after this returns, a crash cannot lose it."""
    parts = {
        "model": state.tensors(),
        "first": state.moments.first,
        "second": state.moments.second,
        "history": state.history,
        "policy": {name: np.asarray(v, order="C") for name, v in state.policy.items()},
        "learner": {name: np.asarray(v, order="C") for name, v in state.learner.items()},
        "chain": write_chain(state.chain) if state.chain else {},
    }
    flat = {f"{part}:{name}": v for part, tensors in parts.items() for name, v in tensors.items()}
    note = {"round": str(state.round), "fingerprint": state.fingerprint}
    write_atomic(folder.checkpoints / numbered_name("round", state.round), save(flat, note))
    for old in list(numbered(folder.checkpoints, "round").values())[:-keep]:
        old.unlink(missing_ok=True)


def latest(folder: RunFolder, fingerprint: str) -> State | None:
    """Return the newest committed state, or None before the first.

    Raises
    ------
    FedtuneError
        The checkpoint belongs to other base weights.
    """
    rounds = numbered(folder.checkpoints, "round")
    if not rounds:
        return None
    flat, note = read_tensors(rounds[max(rounds)])
    if note.get("fingerprint") != fingerprint:
        raise FedtuneError(
            f"'{folder.path}' was tuned on another base model "
            f"({note.get('fingerprint', '?')[:12]}, here {fingerprint[:12]})",
            hint="resume with the same model files and library versions",
            code=ExitCode.RESUME_REFUSED,
        )
    parts: dict[str, Tensors] = {
        name: {} for name in ("model", "first", "second", "history", "policy", "learner", "chain")
    }
    for name, value in flat.items():
        part, _, rest = name.partition(":")
        parts[part][rest] = value
    adapter, residual = split(parts["model"])
    moments = Moments(parts["first"], parts["second"])
    size = len(next(iter(adapter.values()))) if parts["chain"] else 0
    chain = read_chain(parts["chain"], size) if size else None
    return State(
        int(note["round"]),
        adapter,
        fingerprint,
        residual,
        moments,
        parts["policy"],
        chain,
        parts["history"],
        parts["learner"],
    )
