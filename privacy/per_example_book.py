"""Keeps the per-example gradients of one backward pass, and turns them into clipped sums.

A block of parameters is clipped and summed as soon as all of its gradients are
there, which for a block of one layer is inside that layer's own backward: what
is kept is then a sum, and never all per-example gradients at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.clipping import Clip
from fedtune.privacy.per_example_grads import Grads, plus, squared_norms, weighted_sum

__all__ = ["Book", "ClippedSum", "block_of", "clipped"]


@dataclass(frozen=True)
class ClippedSum:
    """Clipped gradients of a batch, added up. Private until noise is added.

    Attributes
    ----------
    sums : dict of str to Tensor
        By parameter name, shape of the parameter, float32.
    norms : Tensor, shape (B, blocks), float64
        Before clipping, for each block of the rule; not finite for dropped examples.
    losses : Tensor, shape (B,), float32
    dropped : int
        Examples that contribute exactly zero, because something was not finite.
    count : int
        Examples, B.
    """

    sums: dict[str, torch.Tensor]
    norms: torch.Tensor
    losses: torch.Tensor
    dropped: int
    count: int


@dataclass
class Book:
    """Per-example gradients of one pass.

    Attributes
    ----------
    count : int
        Examples, B.
    names : dict of int to str
        Name of each trainable parameter, by ``id``.
    blocks : sequence of sequence of str
        What is clipped together.
    rule : Clip or None
        None: gradients are only collected.
    late : set of str
        Parameters that arrive after the backward pass; their blocks wait.
    eager : bool
        Clip a block as soon as it is complete.
    """

    count: int
    names: Mapping[int, str]
    blocks: Sequence[Sequence[str]]
    rule: Clip | None
    late: frozenset[str] = frozenset()
    eager: bool = True
    held: dict[str, Grads] = field(default_factory=dict)
    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.norms = torch.zeros(self.count, len(self.blocks), dtype=torch.float64)
        self._block = block_of(self.blocks)
        self._squares: dict[str, torch.Tensor] = {}
        self._pending: dict[str, int] = {}
        self._closed: set[int] = set()
        late = {self._block[name] for name in self.late}
        self._waiting = [index in late or not self.eager for index in range(len(self.blocks))]

    def expect(self, parameter: torch.Tensor) -> None:
        """Note that a forward pass used a parameter: its gradient will come once more."""
        name = self.names[id(parameter)]
        self._pending[name] = self._pending.get(name, 0) + 1

    def add(self, parameter: torch.Tensor, grads: Grads) -> None:
        """Take per-example gradients (B, *shape) of a parameter; those of several uses add up."""
        name = self.names[id(parameter)]
        if self._block[name] in self._closed:
            raise FedtuneError(
                f"a gradient of '{name}' came after its block had been clipped",
                hint="use PerExample(model, loop=True), or no reentrant checkpointing",
                code=ExitCode.MODEL,
            )
        if tuple(grads.shape) != (self.count, *parameter.shape):
            raise FedtuneError(
                f"'{name}' gave gradients {tuple(grads.shape)} for {self.count} examples",
                hint="its layer does not keep examples apart",
                code=ExitCode.MODEL,
            )
        if isinstance(grads, torch.Tensor):
            grads = grads.float()
        self.held[name] = plus(self.held[name], grads) if name in self.held else grads
        self._pending[name] = self._pending.get(name, 1) - 1
        if self.rule is None or self._pending[name]:
            return
        self._squares[name] = squared_norms(self.held[name])  # while it is in the cache
        block = self._block[name]
        if not self._waiting[block] and all(n in self._squares for n in self.blocks[block]):
            self._measure(block)
            self._close(block, ~torch.isfinite(self.norms[:, block]))

    def finish(self, lost: torch.Tensor) -> torch.Tensor | None:
        """Clip what is still held.

        Parameters
        ----------
        lost : Tensor, shape (B,), bool
            Examples known to be unusable.

        Returns
        -------
        Tensor, shape (B,), bool, or None
            Examples that contribute nothing anywhere. None: an example turned out
            to be unusable after it had been added to an earlier block.
        """
        rest = [index for index in range(len(self.blocks)) if index not in self._closed]
        for index in rest:
            self._measure(index)
        bad = lost.to(self.norms.device) | ~torch.isfinite(self.norms).all(1)
        added = torch.isfinite(self.norms[:, sorted(self._closed)]).any(1)
        if bool((bad & added).any()):
            return None
        for index in rest:
            self._close(index, bad)
        return bad

    def _measure(self, block: int) -> None:
        held = [name for name in self.blocks[block] if name in self.held]
        for name in held:
            if name not in self._squares or self._pending.get(name):
                self._squares[name] = squared_norms(self.held[name])
        if held:
            self.norms = self.norms.to(self._squares[held[0]].device)
            self.norms[:, block] = sum(self._squares[name] for name in held) ** 0.5

    def _close(self, block: int, bad: torch.Tensor) -> None:
        self._closed.add(block)
        if self.rule is None:
            return
        weights = self.rule.weights(self.norms)[:, block]
        for name in self.blocks[block]:
            if name in self.held:
                self.sums[name] = weighted_sum(self.held.pop(name), weights, bad)


def block_of(blocks: Sequence[Sequence[str]]) -> dict[str, int]:
    """Return the number of the block that each parameter is in."""
    return {name: index for index, block in enumerate(blocks) for name in block}


def clipped(
    grads: Mapping[str, torch.Tensor], blocks: Sequence[Sequence[str]], rule: Clip
) -> tuple[dict[str, torch.Tensor], torch.Tensor, bool]:
    """Clip the gradient of one example.

    Returns
    -------
    dict of str to Tensor
        float32; empty when something was not finite.
    Tensor, shape (blocks,), float64
        Norms before clipping.
    bool
        Whether the example counts.
    """
    rows = {name: grad.float().unsqueeze(0) for name, grad in grads.items()}
    squares = [torch.stack([squared_norms(rows[n]) for n in block]).sum() for block in blocks]
    norms = torch.stack(squares).sqrt()
    if not bool(torch.isfinite(norms).all()):
        return {}, norms, False
    weights = rule.weights(norms.unsqueeze(0))[0].float()
    index = block_of(blocks)
    return {name: row[0] * weights[index[name]] for name, row in rows.items()}, norms, True
