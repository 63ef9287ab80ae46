"""Linear guesses at what a head was given: its inverse, and the likeliest token under noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Forward", "Inverse", "fit_forward", "fit_inverse", "likeliest", "nearest"]


@dataclass(frozen=True)
class Inverse:
    """A linear map from hidden states back to token embeddings.

    Attributes
    ----------
    centre : Tensor, shape (T, d)
        Mean hidden state at each place.
    weight : Tensor, shape (d, e)
    offset : Tensor, shape (T, e)
        Mean embedding at each place.
    """

    centre: torch.Tensor
    weight: torch.Tensor
    offset: torch.Tensor

    def __call__(self, seen: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Return the embeddings (B, T, e) that (B, T, d) may have come from."""
        whole = seen if scale is None else seen / scale[:, None, None]
        length = seen.shape[1]
        return (whole - self.centre[:length]) @ self.weight + self.offset[:length]


def fit_inverse(
    made: torch.Tensor, embedded: torch.Tensor, *, deviation: float = 0.0, ridge: float = 1e-6
) -> Inverse:
    """Fit the inverse of a head on text that the server made up: ridge regression.

    Parameters
    ----------
    made : Tensor, shape (N, T, d)
        Hidden states of any tokens, by the head.
    embedded : Tensor, shape (N, T, e)
        Embeddings of those tokens.
    deviation : float
        Standard deviation of the noise that will be on what is inverted.
    ridge : float
        Of the mean variance of a coordinate.

    Examples
    --------
    >>> torch.manual_seed(0).initial_seed()
    0
    >>> embedded, mix = torch.randn(50, 3, 4), torch.randn(4, 4)
    >>> inverse = fit_inverse(embedded @ mix, embedded)
    >>> bool((inverse(embedded @ mix) - embedded).abs().max() < 1e-3)
    True
    """
    centre, offset = made.mean(0), embedded.mean(0)
    x = (made - centre).flatten(0, 1).double()
    y = (embedded - offset).flatten(0, 1).double()
    inner = x.T @ x
    # Noise on the states acts as this much more of their own variance.
    extra = ridge * inner.diagonal().mean() + len(x) * deviation**2
    weight = torch.linalg.solve(inner + extra * torch.eye(len(inner)), x.T @ y)
    return Inverse(centre, weight.float(), offset)


@dataclass(frozen=True)
class Forward:
    """A head as a linear map from token embeddings to hidden states, and what is left over.

    Attributes
    ----------
    centre : Tensor, shape (T, d)
        Mean hidden state at each place.
    weight : Tensor, shape (e, d)
    offset : Tensor, shape (T, e)
        Mean embedding at each place.
    rest : Tensor, shape (d, d), float64
        Covariance of what the token at a place does not explain: its context.
    """

    centre: torch.Tensor
    weight: torch.Tensor
    offset: torch.Tensor
    rest: torch.Tensor


def fit_forward(made: torch.Tensor, embedded: torch.Tensor) -> Forward:
    """Fit a head by least squares on text that the server made up.

    Parameters
    ----------
    made : Tensor, shape (N, T, d)
        Hidden states of any tokens, by the head.
    embedded : Tensor, shape (N, T, e)
        Embeddings of those tokens.
    """
    centre, offset = made.mean(0), embedded.mean(0)
    y = (made - centre).flatten(0, 1).double()
    x = (embedded - offset).flatten(0, 1).double()
    inner = x.T @ x
    inner += 1e-6 * inner.diagonal().mean() * torch.eye(len(inner))
    weight = torch.linalg.solve(inner, x.T @ y)
    left = y - x @ weight
    return Forward(centre, weight.float(), offset, left.T @ left / len(left))


def likeliest(
    head: Forward, table: torch.Tensor, seen: torch.Tensor, scale: torch.Tensor | None = None,
    *, deviation: float = 0.0, count: int = 1,
) -> torch.Tensor:  # fmt: skip
    """Return the tokens that explain each hidden state best, the best first.

    The nearest neighbour among all V tokens in hidden space, in the metric in which both
    the noise and the unknown context are white (a matched filter).

    Parameters
    ----------
    head : Forward
    table : Tensor, shape (V, e)
        The public embeddings.
    seen : Tensor, shape (B, T, d)
    scale : Tensor, shape (B,), or None
        Factor by which each row was clipped.
    deviation : float
        Standard deviation of the noise in each coordinate.
    count : int
        K, how many.

    Returns
    -------
    Tensor of int64, shape (B, T, K)

    Examples
    --------
    >>> torch.manual_seed(0).initial_seed()
    0
    >>> table, mix = torch.randn(9, 4), torch.randn(4, 4)
    >>> tokens = torch.randint(9, (50, 3))
    >>> head = fit_forward(table[tokens] @ mix, table[tokens])
    >>> bool((likeliest(head, table, table[tokens] @ mix)[..., 0] == tokens).all())
    True
    """
    factor = torch.ones(len(seen)) if scale is None else scale
    noise = (deviation / float(factor.mean())) ** 2
    small = 1e-6 * head.rest.diagonal().mean() + 1e-12
    total = head.rest + (noise + small) * torch.eye(len(head.rest))
    white = torch.linalg.cholesky(torch.linalg.inv(total)).float()
    length = seen.shape[1]
    # The mean token of a place is added to the states: one table then serves all places.
    states = seen / factor[:, None, None] - head.centre[:length]
    states = states + head.offset[:length] @ head.weight
    return nearest(states @ white, table @ head.weight @ white, count)


def nearest(guess: torch.Tensor, table: torch.Tensor, count: int = 1) -> torch.Tensor:
    """Return the tokens whose embeddings are nearest, the nearest first.

    Parameters
    ----------
    guess : Tensor, shape (B, T, e)
    table : Tensor, shape (V, e)
        The public embeddings.
    count : int
        K, how many.

    Returns
    -------
    Tensor of int64, shape (B, T, K)

    Examples
    --------
    >>> nearest(torch.tensor([[[0.9, 0.1]]]), torch.eye(2), 2)
    tensor([[[0, 1]]])
    """
    norm = table.square().sum(1)
    count = min(count, len(table))
    rows = [(2 * row @ table.T - norm).topk(count).indices for row in guess]
    return torch.stack(rows)
