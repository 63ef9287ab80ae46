"""One joint release: gradient and sensors in one Gaussian, and what a policy sees of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedtune.privacy.clipping import bits_sensitivity, clip_bits
from fedtune.privacy.mechanism import Mechanism
from fedtune.privacy.noise import NoiseSource
from fedtune.privacy.rldp.shape import BITS, HELD, LOSS, Sensing, Shape, mechanism_blocks
from fedtune.privacy.rldp.sight import Public, Released, unseal

__all__ = ["Collected", "Seen"]

Tensors = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Seen:
    """What one release shows, and all that a policy ever learns from it.

    Attributes
    ----------
    step : Public[int]
        Number of this release, from 0.
    shape : Shape
        Of this release.
    noise_multiplier : Public[float]
        z of the whole release.
    means : Released
        Noisy means by parameter, float32: (sum + noise) / denominator.
    deviations : Public[tuple of float]
        Standard deviation of the noise in ``means``, for each block (before ``scales``).
    inside : Released[tuple of float] or None
        Share of examples whose norm is within C_i, for each block, with noise.
    inside_deviation : Public[float]
    loss, loss_deviation
        Mean training loss in nats, clamped, with noise.
    held, held_deviation
        The same of the held-out part.
    """

    step: Public[int]
    shape: Shape
    noise_multiplier: Public[float]
    means: Released[Tensors]
    deviations: Public[tuple[float, ...]]
    inside: Released[tuple[float, ...]] | None = None
    inside_deviation: Public[float] | None = None
    loss: Released[float] | None = None
    loss_deviation: Public[float] | None = None
    held: Released[float] | None = None
    held_deviation: Public[float] | None = None


@dataclass
class Collected:
    """Sums over the units that were drawn; private until `release`.

    Parameters
    ----------
    shape : Shape
    sensing : Sensing
    sums : dict of str to array
        Of clipped contributions: float64, or int64 grid steps of ``clip_update``; zeros at
        first.
    held_share : float
        Share of the units that are in the held-out part, by a public coin.
    """

    shape: Shape
    sensing: Sensing
    sums: dict[str, NDArray[Any]]
    held_share: float = 0.0
    bits: NDArray[np.float64] = field(init=False)
    loss: float = 0.0
    held: float = 0.0

    def __post_init__(self) -> None:
        self.bits = np.zeros(len(self.shape.names))

    def add(self, sums: Mapping[str, NDArray[Any]]) -> None:
        """Add clipped contributions."""
        for name, value in sums.items():
            self.sums[name] += value

    def sense(self, norms: torch.Tensor, losses: torch.Tensor | None = None) -> None:
        """Add the sensors of units that contribute to the gradient.

        Parameters
        ----------
        norms : Tensor, shape (B, blocks)
            Before clipping; not finite for units that contribute nothing.
        losses : Tensor, shape (B,), optional
        """
        if self.sensing.bits and len(norms):
            self.bits += clip_bits(norms, self.shape.norms).cpu().numpy()
        if self.sensing.loss and losses is not None:
            self.loss += clamped(losses, self.sensing.loss_clip)

    def sense_held(self, losses: torch.Tensor) -> None:
        """Add the losses of units of the held-out part: they contribute nothing else."""
        self.held += clamped(losses, self.sensing.loss_clip)

    def release(self, mechanism: Mechanism, source: NoiseSource, step: int) -> Seen:
        """Return what the mechanism makes of it. Every call is a release of its own.

        Raises
        ------
        FedtuneError
            Before noise is drawn: the joint sensitivity is more than 1 / z, or a sum
            cannot be released.
        """
        blocks, held = mechanism_blocks(mechanism, self.shape, self.sensing)
        given: dict[str, NDArray[Any]] = dict(self.sums)
        if self.sensing.bits:
            given[BITS] = self.bits
        if self.sensing.loss:
            given[LOSS] = np.array([self.loss])
        if held:
            given[HELD] = np.array([self.held])
        noisy = dict(mechanism.release(given, blocks, source, apart=held))
        expected = mechanism.denominator
        sensors = {name: noisy.pop(name, None) for name in (BITS, LOSS, HELD)}
        spread = {block.names: block.sigma / expected for block in (*blocks, *held)}
        scales = self.shape.scales
        if scales is not None:
            noisy = {name: value / scales[name] for name, value in noisy.items()}
        training = 1.0 - self.held_share
        return Seen(
            step=Public(step), shape=self.shape,
            noise_multiplier=Public(float(mechanism.noise_multiplier)),
            means=unseal(noisy, by=mechanism),
            deviations=Public(tuple(spread[names] for names in self.shape.names)),
            **self._sensed(sensors, spread, training, mechanism),
        )  # fmt: skip

    def _sensed(
        self, sensors: Mapping[str, NDArray[np.float32] | None],
        spread: Mapping[tuple[str, ...], float], training: float, mechanism: Mechanism,
    ) -> dict[str, Any]:  # fmt: skip
        """Return sums of centred values as means: over the expected number, never the true one."""
        found: dict[str, Any] = {}
        bits, loss, held = (sensors[name] for name in (BITS, LOSS, HELD))
        middle = self.sensing.loss_clip / 2.0
        if bits is not None:
            inside = tuple(float(b) / training + 0.5 for b in bits)
            found["inside"] = unseal(inside, by=mechanism)
            found["inside_deviation"] = Public(spread[(BITS,)] / training)
        if loss is not None:
            found["loss"] = unseal(float(loss[0]) / training + middle, by=mechanism)
            found["loss_deviation"] = Public(spread[(LOSS,)] / training)
        if held is not None:
            found["held"] = unseal(float(held[0]) / self.held_share + middle, by=mechanism)
            found["held_deviation"] = Public(spread[(HELD,)] / self.held_share)
        return found


def clamped(losses: torch.Tensor, most: float) -> float:
    """Return the sum of losses clamped to [0, most], less most / 2 each; bad ones add 0.

    One example adds between -most / 2 and most / 2.

    Examples
    --------
    >>> clamped(torch.tensor([0.0, 4.0, 99.0, float("nan")]), 8.0)
    0.0
    """
    fine = torch.isfinite(losses)
    kept = torch.where(fine, losses.double().clamp(0.0, most) - most / 2.0, 0.0)
    total = float(kept.sum())
    return total if math.isfinite(total) else 0.0


def bits_deviation(blocks: int, noise_multiplier: float, share: float, denominator: float) -> float:
    """Return the noise on the share of examples inside, for one of so many blocks.

    Examples
    --------
    >>> round(bits_deviation(12, 1.0, 0.02, 512.0), 3)
    0.024
    """
    return bits_sensitivity(blocks) * noise_multiplier / math.sqrt(share) / denominator
