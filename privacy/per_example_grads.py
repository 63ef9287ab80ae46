"""Per-example gradients of one parameter: their norms, and their weighted sum.

An ordinary tensor has the example as its first dimension. ``Rows`` is the same
for an embedding, of which an example touches only the rows of its own tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Grads", "Rows", "dense", "plus", "rows_of", "squared_norms", "weighted_sum"]

# Torch adds up a long float32 norm in few accumulators: 7e-3 off at 8 million equal
# entries. Pieces of this length are exact to 4e-7, and pieces are added in float64.
PIECE = 1024


@dataclass(frozen=True)
class Rows:
    """Gradients (count, size, width) of which only some rows are not zero.

    Attributes
    ----------
    count, size : int
        Examples, and rows of the table.
    example, row : Tensor, shape (U,), int64
        Which row of whose gradient; no pair twice.
    values : Tensor, shape (U, width), float32
    """

    count: int
    size: int
    example: torch.Tensor
    row: torch.Tensor
    values: torch.Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the dense gradients."""
        return (self.count, self.size, self.values.shape[1])


Grads = torch.Tensor | Rows


def rows_of(ids: torch.Tensor, values: torch.Tensor, size: int) -> Rows:
    """Add up the gradients of equal tokens of an example.

    Parameters
    ----------
    ids : Tensor, shape (B, T), int64
    values : Tensor, shape (B, T, width)
    size : int
        Rows of the table.

    Examples
    --------
    >>> found = rows_of(torch.tensor([[2, 2]]), torch.ones(1, 2, 1), 3)
    >>> dense(found).flatten().tolist()
    [0.0, 0.0, 2.0]
    """
    count = ids.shape[0]
    start = torch.arange(count, device=ids.device).mul_(size).unsqueeze(1)
    keys, place = torch.unique(ids + start, return_inverse=True)
    table = torch.zeros(len(keys), values.shape[-1], device=values.device)
    table.index_add_(0, place.flatten(), values.float().flatten(0, 1))
    example = keys.div(size, rounding_mode="floor")
    return Rows(count, size, example, keys - example * size, table)


def dense(grads: Grads) -> torch.Tensor:
    """Return gradients as one tensor (B, *shape)."""
    if not isinstance(grads, Rows):
        return grads
    full = grads.values.new_zeros(grads.shape)
    full[grads.example, grads.row] = grads.values
    return full


def plus(left: Grads, right: Grads) -> torch.Tensor:
    """Add the gradients of two uses of a parameter; neither is changed."""
    if isinstance(left, Rows):
        left, right = right, left
    if not isinstance(right, Rows):
        return dense(left) + right
    total = left.clone() if isinstance(left, torch.Tensor) else dense(left)
    return total.index_put_((right.example, right.row), right.values, accumulate=True)


def squared_norms(grads: Grads) -> torch.Tensor:
    """Return the squared L2 norm of each example's gradient, (B,), float64.

    Examples
    --------
    The plain float32 norm of these numbers is too small by more than 1e-5:

    >>> float(squared_norms(torch.full((1, 4_000_000), 0.1)).sqrt().round(decimals=3))
    200.0
    """
    if isinstance(grads, Rows):
        each = _squares(grads.values)
        return each.new_zeros(grads.count).index_add_(0, grads.example, each)
    return _squares(grads.flatten(1))


def weighted_sum(grads: Grads, weights: torch.Tensor, bad: torch.Tensor) -> torch.Tensor:
    """Return ``sum_i weights_i grads_i``, float32; examples in ``bad`` are not looked at.

    Parameters
    ----------
    grads : (B, *shape)
    weights : Tensor, shape (B,)
    bad : Tensor, shape (B,), bool
    """
    # Zero times infinity is not zero: bad rows are left out, not scaled.
    some = bool(bad.any())
    if isinstance(grads, Rows):
        example, row, values = grads.example, grads.row, grads.values
        if some:
            fine = ~bad[example]
            example, row, values = example[fine], row[fine], values[fine]
        total = values.new_zeros(grads.size, values.shape[1])
        return total.index_add_(0, row, values * weights[example].float().unsqueeze(1))
    flat, weights = grads.flatten(1), weights.float()
    if some:
        flat, weights = flat[~bad], weights[~bad]
    return (weights @ flat).view(grads.shape[1:])


def _squares(flat: torch.Tensor) -> torch.Tensor:
    """Return squared norms (B,) of (B, P): float32 in pieces, float64 across."""
    count, length = flat.shape
    whole = length // PIECE * PIECE
    pieces = flat[:, :whole].reshape(count, -1, PIECE) if whole else flat.new_zeros(count, 0, 1)
    main: torch.Tensor = torch.linalg.vector_norm(pieces, dim=2)
    rest: torch.Tensor = torch.linalg.vector_norm(flat[:, whole:], dim=1)
    return main.double().square().sum(1) + rest.double().square()
