"""What the server must know of a batch besides its hidden states: where the padding is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fedtune.errors import ExitCode, FedtuneError

__all__ = ["Positions", "Rows", "mask_of", "positions_of", "real_of", "rows_of"]

Positions = Literal["count", "mask-0", "mask-1"]
"""``count``: 0, 1, 2, ... ``mask-0``, ``mask-1``: counted over real tokens, 0 or 1 at padding."""


@dataclass(frozen=True)
class Rows:
    """Lengths of a batch; no token and no label can be said with them.

    Attributes
    ----------
    batch : int
        Rows, B.
    length : int
        New positions of each row, T.
    past : int
        Positions before them, in a cache or as prefixes; the mask is (B, past + T).
    spans : tuple of (int, int), or None
        Per row, where its real positions begin and end. None: the model was given no mask.
    positions : str
        How position ids are counted.
    examples : tuple of int, or None
        Per row, a name drawn at random for this run: what the server holds is found by it.
    fresh : int
        Leading positions that change with every step, such as prompts; the others of an
        example stay as they were first released.
    """

    batch: int
    length: int
    past: int = 0
    spans: tuple[tuple[int, int], ...] | None = None
    positions: Positions = "count"
    examples: tuple[int, ...] | None = None
    fresh: int = 0

    def __post_init__(self) -> None:
        width = self.past + self.length
        spans = self.spans or ()
        if min(self.batch, self.length) < 1 or self.past < 0:
            raise ValueError(f"{self.batch} rows of {self.length} positions after {self.past}")
        if self.examples is not None and len(self.examples) != self.batch:
            raise ValueError(f"{len(self.examples)} names for {self.batch} rows")
        if not 0 <= self.fresh <= self.length:
            raise ValueError(f"{self.fresh} fresh positions of {self.length}")
        if self.spans is not None and len(spans) != self.batch:
            raise ValueError(f"{len(spans)} lengths for {self.batch} rows")
        if any(not 0 <= start <= end <= width for start, end in spans):
            raise ValueError(f"a row's real positions are not within the {width} there are")


def rows_of(
    mask: torch.Tensor | None, batch: int, length: int, past: int = 0,
    position_ids: torch.Tensor | None = None,
) -> Rows:  # fmt: skip
    """Return the lengths that stand for an attention mask of shape (B, past + T).

    Raises
    ------
    FedtuneError
        A mask with holes, or position ids that no rule gives: they would have to travel.

    Examples
    --------
    >>> rows_of(torch.tensor([[1, 1, 0], [1, 1, 1]]), 2, 3).spans
    ((0, 2), (0, 3))
    """
    spans = None
    if mask is not None:
        if mask.dim() != 2 or mask.shape != (batch, past + length):
            raise _cannot(f"an attention mask of shape {tuple(mask.shape)}")
        real = mask.bool()
        starts = [int(row) for row in real.long().argmax(1)]
        counts = [int(row) for row in real.sum(1)]
        spans = tuple((s, s + n) for s, n in zip(starts, counts, strict=True))
    rows = Rows(batch, length, past, spans)
    if mask is not None and not torch.equal(mask_of(rows), mask.cpu().long().bool().long()):
        raise _cannot("an attention mask with holes")
    if position_ids is None:
        return rows
    found = position_ids.cpu().expand(batch, -1)
    kinds: tuple[Positions, ...] = ("count", "mask-0", "mask-1")
    for kind in kinds:
        made = Rows(batch, length, past, spans, kind)
        if torch.equal(positions_of(made).expand(batch, -1), found):
            return made
    raise _cannot("position ids that neither count positions nor real tokens")


def mask_of(rows: Rows) -> torch.Tensor:
    """Return the attention mask, int64 of shape (B, past + T)."""
    width = rows.past + rows.length
    spans: Sequence[tuple[int, int]] = rows.spans or [(0, width)] * rows.batch
    places = torch.arange(width)
    edges = torch.tensor(spans)
    return ((places >= edges[:, :1]) & (places < edges[:, 1:])).long()


def real_of(rows: Rows) -> list[tuple[int, int]]:
    """Return, per row, where its real positions begin and end among the T new ones."""
    spans = rows.spans or ((0, rows.past + rows.length),) * rows.batch
    return [(max(0, a - rows.past), max(0, b - rows.past)) for a, b in spans]


def positions_of(rows: Rows) -> torch.Tensor:
    """Return the position ids of the new positions, int64 of shape (1 or B, T)."""
    if rows.positions == "count":
        return torch.arange(rows.past, rows.past + rows.length)[None]
    mask = mask_of(rows)
    counted = (mask.cumsum(1) - 1).masked_fill(mask == 0, int(rows.positions[-1]))
    return counted[:, -rows.length :]


def _cannot(what: str) -> FedtuneError:
    return FedtuneError(
        f"{what} cannot go through the cut: only lengths travel",
        hint="pad on one side, and leave position_ids out",
        code=ExitCode.MODEL,
    )
