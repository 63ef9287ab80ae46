"""A cut model joined again in one process: its two parts, and nothing between them."""

from __future__ import annotations

import copy
from typing import Any

import torch

from fedtune.client.remote import connect, keep_ends
from fedtune.server.body import Body
from fedtune.split.blocks import Cut, cut_of
from fedtune.split.rows import Rows


class Here:
    """A link that is a function call; ``calls`` is what would have travelled."""

    def __init__(self, body: Body) -> None:
        self.body = body
        self.calls: list[tuple[str, Any]] = []
        self.caches: dict[str, Any] = {}

    def forward(
        self, hidden: torch.Tensor, rows: Rows, deep: torch.Tensor | None, step: str, *, grad: bool
    ) -> torch.Tensor:
        self.calls.append(("forward", (hidden.detach().clone(), rows, step)))
        with torch.no_grad():
            return self.body.forward(hidden, rows, deep).clone()

    def backward(
        self, hidden: torch.Tensor, rows: Rows, deep: torch.Tensor | None, grad: torch.Tensor,
        step: str,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        self.calls.append(("backward", (grad.clone(), rows, step)))
        return self.body.gradients(hidden, rows, deep, grad)

    def go_on(self, session: str, hidden: torch.Tensor, rows: Rows) -> torch.Tensor:
        if rows.past and session not in self.caches:
            raise LookupError(session)
        out, self.caches[session] = self.body.go_on(hidden, rows, self.caches.get(session))
        return out


def split(whole: Any, head: int = 1, tail: int = 1) -> tuple[Any, Any, Here]:
    """Return the client's part and the server's part of a copy, and the link between them."""
    part, far = copy.deepcopy(whole), copy.deepcopy(whole)
    cut: Cut = cut_of(whole, head, tail)
    keep_ends(part, cut)
    link = Here(Body(far, cut))
    connect(part, link)
    return part, far, link
