"""The controller with private values in its view, to measure what honesty costs: NOT DP."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedtune.privacy.rldp.features import read
from fedtune.privacy.rldp.joint import Seen
from fedtune.privacy.rldp.policy import State
from fedtune.privacy.rldp.shape import Sensing, Shape

if TYPE_CHECKING:  # it imports this module
    from fedtune.privacy.rldp.controller import Controller

__all__ = ["RawController"]


class RawController:
    """The controller with private norms and losses in its view: NOT differentially private.

    What honesty costs is measured against it. `require_honest` refuses it wherever
    a privacy statement could be made.

    Parameters
    ----------
    inner : Controller
    """

    honest = False

    def __init__(self, inner: Controller) -> None:
        self.inner = inner
        self._count, self._loss = 0, 0.0
        self._inside = np.zeros(len(inner.shape().norms))

    @property
    def sensing(self) -> Sensing:
        """See `Policy`: it needs none."""
        return self.inner.sensing

    def peek(self, norms: torch.Tensor, losses: torch.Tensor) -> None:
        """Look at unclipped norms (B, blocks) and losses (B,)."""
        bounds = torch.tensor(self.inner.shape().norms, dtype=torch.float64, device=norms.device)
        fine = torch.isfinite(norms).all(1) & torch.isfinite(losses)
        self._count += int(fine.sum())
        self._inside += (norms.double() <= bounds)[fine].sum(0).cpu().numpy()
        self._loss += float(losses.double()[fine].sum())

    def observe(self, seen: Seen) -> None:
        """See `Policy`."""
        reading = read(seen)
        if self._count:
            inside, loss = self._inside / self._count, self._loss / self._count
            reading = replace(reading, inside=inside, loss=loss, loss_deviation=0.0)
        self._count, self._loss, self._inside = 0, 0.0, np.zeros_like(self._inside)
        self.inner.take(reading)

    def shape(self) -> Shape:
        """See `Policy`."""
        return self.inner.shape()

    def wanted_noise(self) -> float | None:
        """See `Policy`."""
        return self.inner.wanted_noise()

    def decisions(self) -> list[dict[str, Any]]:
        """See `Policy`."""
        return self.inner.decisions()

    def state(self) -> State:
        """See `Policy`."""
        return self.inner.state()

    def restore(self, state: State) -> None:
        """See `Policy`."""
        self.inner.restore(state)
