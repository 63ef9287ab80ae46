"""What the server that runs the body of a cut model can read: the text, from hidden states.

The server is honest but curious: it does what it is asked and looks at what it gets. It
knows the public model, so it has the client's head too: a function from tokens to hidden
states that it can run as often as it likes. Every attack here gets such a function and
what came over the wire, and returns tokens. No attack sees the text.

What one of them fails to recover is not safe: better attacks may exist. What one of them
recovers is lost.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = [
    "After",
    "States",
    "invert_by_gradient",
    "invert_causal",
    "invert_lookup",
    "refine",
    "scales",
]

States = Callable[[torch.Tensor], torch.Tensor]
"""The head: tokens (N, T) in, hidden states (N, T, d) out; no padding."""

After = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A causal head: tokens before (N, t) and candidates (N, K) for the next place in; hidden
states (N, K, d) of the candidates out."""

_ROOM = 1 << 23
"""Numbers that an attack holds at once."""


def scales(seen: torch.Tensor, made: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return by how much each row was scaled down: the least-squares factor, at most 1.

    Parameters
    ----------
    seen, made : Tensor, shape (B, T, d)
        What came over the wire, and what the head makes of the tokens that are known.
    mask : Tensor of bool, shape (B, T)
        Which places are known.

    Returns
    -------
    Tensor, shape (B,)
        1 where nothing is known.

    Examples
    --------
    >>> made = torch.ones(2, 3, 4)
    >>> scales(0.5 * made, made, torch.ones(2, 3, dtype=torch.bool))
    tensor([0.5000, 0.5000])
    """
    used = made * mask[..., None]
    norm = used.square().sum((1, 2))
    factor = (seen * used).sum((1, 2)) / norm.clamp(min=1e-20)
    return torch.where(norm > 0, factor.clamp(1e-6, 1.0), torch.ones_like(norm))


def invert_lookup(
    states: States, seen: torch.Tensor, mask: torch.Tensor, vocabulary: int,
    scale: torch.Tensor | None = None, *, chunk: int = 256,
) -> torch.Tensor:  # fmt: skip
    """Find each token alone: the nearest of all rows that repeat one token at every place.

    Exact where places do not see each other: a cut right after the embeddings
    (``head = 0``). Elsewhere a first guess.

    Parameters
    ----------
    states : States
    seen : Tensor, shape (B, T, d)
        Hidden states from the wire.
    mask : Tensor of bool, shape (B, T)
        Real places, from the lengths that travel with them.
    vocabulary : int
        V; tokens are 0 to V - 1.
    scale : Tensor, shape (B,), or None
        Factor by which each row was clipped.

    Returns
    -------
    Tensor of int64, shape (B, T)
        Zero where ``mask`` is False.
    """
    batch, length, _ = seen.shape
    factor = torch.ones(batch) if scale is None else scale
    best = torch.full((batch, length), torch.inf)
    found = torch.zeros(batch, length, dtype=torch.long)
    for start in range(0, vocabulary, chunk):
        tokens = torch.arange(start, min(start + chunk, vocabulary))
        made = states(tokens[:, None].expand(-1, length))
        gap = made.square().sum(-1).T[None] * factor[:, None, None].square()
        gap = gap - 2 * factor[:, None, None] * torch.einsum("btd,ktd->btk", seen, made)
        low, place = gap.min(-1)
        closer = low < best
        best = torch.where(closer, low, best)
        found = torch.where(closer, tokens[place], found)
    return found * mask


def invert_causal(
    after: After, seen: torch.Tensor, mask: torch.Tensor, vocabulary: int, *,
    candidates: torch.Tensor | None = None, deviation: float = 0.0, clipped: bool = False,
    front: tuple[torch.Tensor, torch.Tensor] | None = None,
    prior: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Find the tokens of a causal model one after the other, by trying all of them.

    At place t the hidden state depends on the tokens found before and on one unknown
    token: the nearest candidate is it (SipIt, Nikolaou et al. 2025, arXiv 2510.15511).
    With noise, the score is that of Bayes: squared distance over twice the variance,
    plus what a public language model expects.

    Parameters
    ----------
    after : After
    seen : Tensor, shape (B, T, d)
    mask : Tensor of bool, shape (B, T)
        True at the real places, which come first.
    vocabulary : int
        V.
    candidates : Tensor of int64, shape (B, T, K), or None
        Tokens worth trying at each place; None: all V.
    deviation : float
        Standard deviation of the noise in each coordinate.
    clipped : bool
        Rows were scaled down by an unknown factor; it is estimated from what is found.
    front : pair of Tensor, shapes (B, P, d) and (P, d), or None
        Places before the text, as they came and as the server knows them to be: prompts.
    prior : callable or None
        Tokens before (N, t) to log-probabilities (N, V) of the next.

    Returns
    -------
    Tensor of int64, shape (B, T)
        Zero where ``mask`` is False.
    """
    batch, length, width = seen.shape
    tried = vocabulary if candidates is None else candidates.shape[2]
    group = max(1, _ROOM // (tried * width))
    if batch > group:
        parts = [
            invert_causal(
                after, seen[i : i + group], mask[i : i + group], vocabulary,
                candidates=None if candidates is None else candidates[i : i + group],
                deviation=deviation, clipped=clipped, prior=prior,
                front=None if front is None else (front[0][i : i + group], front[1]),
            )
            for i in range(0, batch, group)
        ]  # fmt: skip
        return torch.cat(parts)
    found = torch.zeros(batch, length, dtype=torch.long)
    top, bottom = torch.zeros(batch), torch.zeros(batch)
    if front is not None:
        top += (front[0] * front[1]).sum((1, 2))
        bottom += front[1].square().sum()
    rows = torch.arange(batch)
    for t in range(int(mask.sum(1).max())):
        if candidates is None:
            options = torch.arange(vocabulary).expand(batch, -1)
        else:
            options = candidates[:, t]
        made = after(found[:, :t], options)
        here = seen[:, t, None]
        inner, norm = (here * made).sum(-1), made.square().sum(-1)
        if clipped:
            # Before anything is found every candidate may have the factor that suits it.
            own = inner / norm.clamp(min=1e-20)
            shared = (top / bottom.clamp(min=1e-20))[:, None].expand_as(own)
            factor = torch.where(bottom[:, None] > 0, shared, own).clamp(1e-6, 1.0)
            score = 2 * factor * inner - factor.square() * norm
        else:
            score = -(here - made).square().sum(-1)
        if prior is not None and deviation:
            expected = prior(found[:, :t]).gather(1, options)
            score = score / (2 * deviation**2) + expected
        choice = score.argmax(1)
        found[:, t] = options[rows, choice] * mask[:, t]
        top += inner[rows, choice] * mask[:, t]
        bottom += norm[rows, choice] * mask[:, t]
    return found


def invert_by_gradient(
    states_of: States, start: torch.Tensor, seen: torch.Tensor, mask: torch.Tensor,
    scale: torch.Tensor | None = None, *, steps: int = 100, rate: float = 0.03,
) -> torch.Tensor:  # fmt: skip
    """Move embeddings by gradient descent until the head makes of them what came (Adam).

    Parameters
    ----------
    states_of : callable
        Embeddings (B, T, e) to hidden states (B, T, d), differentiable; it knows the lengths.
    start : Tensor, shape (B, T, e)
        A first guess.
    seen : Tensor, shape (B, T, d)
    mask : Tensor of bool, shape (B, T)
    scale : Tensor, shape (B,), or None
        Factor by which each row was clipped.
    steps : int
    rate : float
        Length of a step, in standard deviations of the guess.

    Returns
    -------
    Tensor, shape (B, T, e)
        Embeddings; ``nearest`` makes tokens of them.
    """
    factor = torch.ones(len(seen)) if scale is None else scale
    moved = start.detach().clone().requires_grad_()
    optimiser = torch.optim.Adam([moved], lr=rate * float(start.std()))
    with torch.enable_grad():
        for _ in range(steps):
            optimiser.zero_grad()
            gap = factor[:, None, None] * states_of(moved) - seen
            (gap * mask[..., None]).square().sum().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return moved.detach()


def refine(
    states: States, start: torch.Tensor, seen: torch.Tensor, mask: torch.Tensor,
    candidates: torch.Tensor, scale: torch.Tensor | None = None, *,
    deviation: float = 0.0, sweeps: int = 2,
) -> torch.Tensor:  # fmt: skip
    """Better a guess place by place: keep the candidate with which the whole row fits best.

    For heads in which places see each other both ways. Without noise, places that fit
    already are left alone, and a row that fits is done.

    Parameters
    ----------
    states : States
    start : Tensor of int64, shape (B, T)
    seen : Tensor, shape (B, T, d)
    mask : Tensor of bool, shape (B, T)
        True at the real places, which come first.
    candidates : Tensor of int64, shape (B, T, K)
    scale : Tensor, shape (B,), or None
        Factor by which each row was clipped.
    deviation : float
        Standard deviation of the noise in each coordinate.
    sweeps : int

    Returns
    -------
    Tensor of int64, shape (B, T)
    """
    found = start.clone()
    factor = torch.ones(len(seen)) if scale is None else scale
    for row, length in enumerate(mask.sum(1).tolist()):
        target, tokens = seen[row, :length], found[row, :length].clone()
        tolerance = 1e-8 * float(target.square().sum(-1).mean()) if length else 0.0
        for _ in range(sweeps):
            before = tokens.clone()
            gap = _gaps(states, tokens, target, factor[row])
            for t in gap.argsort(descending=True).tolist():
                if not deviation and float(gap[t]) <= tolerance:
                    continue
                options = torch.cat([tokens[t : t + 1], candidates[row, t]])
                rows = tokens.repeat(len(options), 1)
                rows[:, t] = options
                total = (factor[row] * states(rows) - target).square().sum((1, 2))
                chosen = options[total.argmin()]
                if chosen != tokens[t]:
                    tokens[t] = chosen
                    gap = _gaps(states, tokens, target, factor[row])
            if torch.equal(tokens, before):
                break
        found[row, :length] = tokens
    return found * mask


def _gaps(
    states: States, tokens: torch.Tensor, target: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    """Return how far each place of one row is from what came, squared, (T,)."""
    return (factor * states(tokens[None])[0] - target).square().sum(-1)
