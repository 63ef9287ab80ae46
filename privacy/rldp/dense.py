"""Clipping in scaled coordinates (GeoClip): needs every example's whole gradient at once."""

from __future__ import annotations

import torch

from fedtune.privacy.per_example import ClippedSum, LossOf, PerExample
from fedtune.privacy.per_example_loss import Batch, rows
from fedtune.privacy.rldp.shape import Shape

__all__ = ["scaled_sum"]


def scaled_sum(engine: PerExample, loss_of: LossOf, batch: Batch, shape: Shape) -> ClippedSum:
    """Return the sum over examples of their gradients, scaled and then clipped.

    Of each example ``clip(scales * g)``, where the norm is over all parameters: at most
    ``shape.norms[0]``. Whoever reads the noisy sum divides it by ``scales``.

    Parameters
    ----------
    engine : PerExample
    loss_of : callable
    batch : mapping of str to Tensor
        First dimension of each: examples.
    shape : Shape
        With ``scales``.
    """
    scales = shape.scales or {}
    kept: list[torch.Tensor] = []

    def losses_of(part: Batch) -> torch.Tensor:
        losses = loss_of(part)
        kept.append(losses.detach())
        return losses

    count = rows(batch)
    grads = engine.gradients(losses_of, batch)
    # One pass over the batch, or one for each example.
    losses = torch.cat(kept[-count:]) if engine.reason else kept[-1]
    scaled = {
        name: grad.flatten(1).double() * torch.from_numpy(scales[name]).to(grad.device).flatten()
        for name, grad in grads.items()
    }
    squares = torch.stack([value.square().sum(1) for value in scaled.values()])
    norms = squares.sum(0).sqrt()
    fine = torch.isfinite(norms) & torch.isfinite(losses)
    norms = torch.where(fine, norms, torch.nan)
    weights = shape.rule.weights(norms.unsqueeze(1))[:, 0]
    sums = {
        name: (torch.where(fine.unsqueeze(1), value, 0.0) * weights.unsqueeze(1)).sum(0)
        .reshape(grads[name].shape[1:]).float()
        for name, value in scaled.items()
    }  # fmt: skip
    return ClippedSum(sums, norms.unsqueeze(1), losses, int((~fine).sum()), count)
