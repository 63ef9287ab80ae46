"""Helps to prove that per-example gradients are those of single examples."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["Proof", "difference", "moved", "still"]


@dataclass(frozen=True)
class Proof:
    """What the self-check found.

    Attributes
    ----------
    mode : {"fast", "loop"}
        How gradients are computed from here on.
    error : float
        Largest relative difference to single-example backward passes; 0 for ``loop``.
    reason : str
        Why it is a loop, or ''.
    """

    mode: str
    error: float
    reason: str


def difference(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """Return the largest relative difference of any parameter's gradient of any example.

    Relative to that gradient and a hundredth of the example's whole gradient: what is
    smaller than that is rounding of sums that cancel, even where nothing is wrong.
    """
    whole = torch.stack([e.flatten(1).norm(dim=1).double() for e in expected.values()])
    floor = 1e-2 * whole.square().sum(0).sqrt()
    worst = 0.0
    for name, reference in expected.items():
        gap = (found[name] - reference).flatten(1).norm(dim=1).double()
        size = reference.flatten(1).norm(dim=1).double() + floor
        ratio = gap / size.clamp(min=1e-30)
        worst = max(worst, float(ratio.nan_to_num(float("inf")).max()))
    return worst


@contextlib.contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and back to what each module was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def moved(named: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Move parameters a little, and back to the bit."""
    random = torch.Generator().manual_seed(1)
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    try:
        with torch.no_grad():
            for parameter in named.values():
                step = 0.02 * torch.randn(parameter.shape, generator=random)
                parameter.add_(step.to(parameter.device, parameter.dtype))
        yield
    finally:
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(before[name])
