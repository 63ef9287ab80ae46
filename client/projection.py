"""Gradients that are projected on a seed pool as they come, and never all there at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
from torch import nn

from fedtune.pool.layout import Layout

__all__ = ["Projects", "projecting"]


class Projects(Protocol):
    """What is needed of a seed pool."""

    @property
    def size(self) -> int:
        """K, how many directions there are."""

    def project(
        self, g: torch.Tensor, start: int = 0, into: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return <z_k, g> for every direction, of a piece that begins at ``start``."""


@contextlib.contextmanager
def projecting(
    pool: Projects, layout: Layout, parameters: Mapping[str, nn.Parameter], into: torch.Tensor
) -> Iterator[list[str]]:
    """Project each parameter's gradient when it is whole, add it to ``into``, and free it.

    Parameters
    ----------
    layout : Layout
        Where each parameter stands in the vector of the pool.
    parameters : mapping of name to Parameter
        At least those of ``layout``.
    into : Tensor of float32, shape (K,)
        On the device of the parameters.

    Yields
    ------
    list of str
        Names of the parameters whose gradient was not finite so far: ``into`` lacks them.
    """
    broken: list[str] = []

    def taken(name: str, start: int) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                return
            if bool(torch.isfinite(gradient).all()):
                pool.project(gradient.reshape(-1), start, into)
            else:
                broken.append(name)

        return hook

    hooks = [
        parameters[span.name].register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            taken(span.name, span.start)
        )
        for span in layout.spans
    ]
    try:
        yield broken
    finally:
        for one in hooks:
            one.remove()
