"""A model whose weights are a function of coefficients: rebuilt, hashed, agreed upon.

Weights are always rebuilt from those at the start of the pool's epoch, with one rounding,
and never walked from round to round: so they have the same bits for who was there all the
time, who joined late, and who resumed.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedtune.adapters import trainable
from fedtune.config import TuningConfig
from fedtune.errors import ExitCode, FedtuneError
from fedtune.pool.chain import Broadcast, Chain, same
from fedtune.pool.codec import Packed, unpack
from fedtune.pool.layout import Arena, root
from fedtune.pool.pool import Pool, make_pool

__all__ = ["PoolWeights", "kind_of"]

_MARK_DIGITS = 4
_ON_DISK = 256 * 2**20


def kind_of(tuning: TuningConfig) -> str:
    """Return which pool a method uses, unless the file says so.

    Examples
    --------
    >>> kind_of(TuningConfig(method="fedkseed")), kind_of(TuningConfig(method="seedpool"))
    ('gaussian', 'hadamard')
    """
    if tuning.pool.kind != "auto":
        return tuning.pool.kind
    return "hadamard" if tuning.method == "seedpool" else "gaussian"


@dataclass
class PoolWeights:
    """The trainable parameters of one model, in one flat vector, and the pool that moves them.

    Parameters
    ----------
    model : nn.Module
        With its starting values; its parameters become views of ``arena.flat``.
    tuning : TuningConfig
    threads : int
        Threads of the kernels; changes no bit.

    Attributes
    ----------
    pool : Pool
        Of the epoch that was put last.
    base : Tensor, shape (d,)
        Weights at the start of that epoch.
    """

    model: nn.Module
    tuning: TuningConfig
    threads: int = 1
    arena: Arena = field(init=False)
    base: torch.Tensor = field(init=False)
    pool: Pool = field(init=False)
    _first: torch.Tensor = field(init=False)
    _folded: tuple[Packed, ...] = ()
    _key: bytes = b""
    _exact: tuple[Packed, torch.Tensor] | None = None

    def __post_init__(self) -> None:
        self.arena = Arena.of(trainable(self.model).items())
        self._first = _aside(self.arena.flat)
        self.base = self._first

    def put(self, chain: Chain) -> None:
        """Write the weights of a chain into the model."""
        self._fold(chain)
        if self._exact is not None and same(self._exact[0], chain.running):
            self.arena.flat.copy_(self._exact[1])
            return
        self.pool.rebuild(self.base, self.arena.flat, _vector(chain.running))
        # Independent seeds are slow to rebuild: a second client of this round copies.
        slow = self.pool.name == "gaussian"
        self._exact = (chain.running, self.arena.flat.clone()) if slow else None

    def hashes(self) -> tuple[bytes, NDArray[np.uint16]]:
        """Hash the weights in the model now, once.

        Returns
        -------
        root : bytes
            One hash of all, 32 bytes.
        marks : ndarray of uint16
            The first two bytes of each tensor's own.
        """
        digests = self.arena.digests()
        marks = [int(digest[:_MARK_DIGITS], 16) for digest in digests]
        return bytes.fromhex(root(digests)), np.array(marks, np.uint16)

    def require(self, sent: Broadcast) -> None:
        """Refuse to go on when the rebuilt weights are not those of the server.

        Raises
        ------
        FedtuneError
            Names the first tensor that differs.
        """
        found, mine = self.hashes()
        if found == sent.root:
            return
        names = [span.name for span in self.arena.layout.spans]
        if mine.shape != sent.marks.shape:
            what = f"{len(mine)} tensors here, {len(sent.marks)} at the server"
        else:
            odd = [name for name, a, b in zip(names, mine, sent.marks, strict=True) if a != b]
            what = f"tensor '{odd[0]}' and {len(odd) - 1} more" if odd else "a tensor unnamed"
        raise FedtuneError(
            f"the rebuilt weights are not the server's: {what} differ in epoch {sent.epoch}",
            hint="both need the same model files, seed and library versions",
            code=ExitCode.ENGINE,
        )

    def _fold(self, chain: Chain) -> None:
        """Bring ``base`` to the start of the chain's epoch, replaying as little as possible."""
        known = len(self._folded)
        went_on = (
            chain.key == self._key and known <= chain.epoch
            and all(map(same, self._folded, chain.finished[:known]))
        )  # fmt: skip
        if went_on and known == chain.epoch:
            return
        if not went_on:
            self.base, known = self._first, 0
        for epoch in range(known, chain.epoch):
            if self.base is self._first:
                self.base = _aside(self._first)
                source = self._first
            else:
                source = self.base
            made = self._make(chain.key, epoch)
            made.rebuild(source, self.base, _vector(chain.finished[epoch]))
        self._folded, self._key, self._exact = chain.finished, chain.key, None
        self.pool = self._make(chain.key, chain.epoch)

    def _make(self, key: bytes, epoch: int) -> Pool:
        return make_pool(
            kind_of(self.tuning), key, epoch, self.tuning.pool.size, self.arena.layout,
            self.threads,
        )  # fmt: skip


def _aside(flat: torch.Tensor) -> torch.Tensor:
    """Copy weights that are read once a round: large ones to a file, not to memory."""
    if flat.device.type != "cpu" or flat.nbytes < _ON_DISK:
        return flat.clone()
    with tempfile.TemporaryDirectory(prefix="fedtune-") as folder:
        # The mapping outlives the name.
        size, name = flat.numel(), f"{folder}/weights"
        mapped = torch.from_file(name, shared=True, size=size, dtype=flat.dtype)
        return mapped.copy_(flat)


def _vector(packed: Packed) -> torch.Tensor:
    return torch.from_numpy(unpack(packed))
