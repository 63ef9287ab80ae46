"""The shape of a release: which parameters are clipped together, how much, with what noise.

With clip norms ``C_i`` and shares ``w_i`` of the privacy that add up to 1, the noise

    s_i = z_g C_i / sqrt(w_i)

gives a sum whose sensitivity, in units of the noise, is ``sqrt(sum (C_i / s_i)^2) = 1 /
z_g`` whatever the norms and shares are: choosing them costs nothing, so long as the
choice depends on what was released before. Noise ``z_g C_i`` on each of n blocks alone
would be a mechanism of noise multiplier ``z_g / sqrt(n)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.clipping import Automatic, Clip, Flat, PerBlock, bits_sensitivity
from fedtune.privacy.mechanism import Block, Mechanism

__all__ = ["BITS", "HELD", "LOSS", "Sensing", "Shape", "flat", "isotropic", "mechanism_blocks"]

BITS, LOSS, HELD = "clip-bits", "loss", "held-out-loss"
"""Names of the sensors' tensors in a release."""

_MOST_SHARE = 0.5


@dataclass(frozen=True)
class Shape:
    """How the next release is clipped, and how its noise is dealt out.

    Attributes
    ----------
    names : tuple of tuple of str
        Parameters that are clipped together; each parameter in one block.
    norms : tuple of float
        C_i, one for each block.
    shares : tuple of float
        w_i above 0, adding up to 1.
    gamma : float
        Above 0: AUTO-S instead of a bound, in each block.
    scales : mapping of str to float32 array, or None
        GeoClip: gradients are multiplied by these before they are clipped, and the noisy
        sum is divided by them. Needs one block. The same shapes as the parameters.

    Raises
    ------
    FedtuneError
        A number that cannot be used.

    Examples
    --------
    >>> shape = Shape((("a",), ("b",)), (0.5, 2.0), (0.25, 0.75))
    >>> [round(s, 4) for s in shape.deviations(1.0)]
    [1.0, 2.3094]
    >>> round(sum((c / s) ** 2 for c, s in zip(shape.norms, shape.deviations(1.0))), 12)
    1.0
    """

    names: tuple[tuple[str, ...], ...]
    norms: tuple[float, ...]
    shares: tuple[float, ...]
    gamma: float = 0.0
    scales: Mapping[str, NDArray[np.float32]] | None = None

    def __post_init__(self) -> None:
        if not self.names or not len(self.names) == len(self.norms) == len(self.shares):
            raise _refused(
                f"{len(self.names)} blocks, {len(self.norms)} norms, {len(self.shares)} shares"
            )
        for name, values in (("norm", self.norms), ("share", self.shares)):
            for value in values:
                if not (math.isfinite(value) and value > 0.0):
                    raise _refused(f"{name} {value!r}")
        if not abs(math.fsum(self.shares) - 1.0) < 1e-6:
            raise _refused(f"shares add up to {math.fsum(self.shares)!r}")
        if self.scales is not None:
            self._check_scales(self.scales)

    def _check_scales(self, scales: Mapping[str, NDArray[np.float32]]) -> None:
        if len(self.names) != 1 or set(scales) != set(self.names[0]):
            raise _refused("scales need one block, and every parameter of it")
        for name, scale in scales.items():
            if not bool(np.isfinite(scale).all()) or not bool((scale > 0).all()):
                raise _refused(f"a scale of '{name}' is not finite and above 0")

    @property
    def rule(self) -> Clip:
        """The clipping rule."""
        if len(self.names) > 1:
            return PerBlock(self.names, self.norms, self.gamma)
        norm = self.norms[0]
        return Automatic(norm, self.gamma) if self.gamma else Flat(norm)

    def deviations(self, noise_multiplier: float) -> tuple[float, ...]:
        """Return s_i, the noise on each coordinate of each block of the **sum**."""
        return tuple(
            noise_multiplier * norm / math.sqrt(share)
            for norm, share in zip(self.norms, self.shares, strict=True)
        )

    def facts(self) -> dict[str, Any]:
        """Return what a log or a report says of it."""
        return {"norms": list(self.norms), "shares": list(self.shares)}


@dataclass(frozen=True)
class Sensing:
    """How much of each release's privacy its sensors take.

    The gradient is left ``z_g = z / sqrt(1 - bits - loss)``: 1 % costs it 0.5 % more noise.

    Attributes
    ----------
    bits : float
        Share for one clip bit per block; 0: none.
    loss : float
        Share for the clamped training loss; 0: none.
    loss_clip : float
        L: losses are clamped to [0, L] nats.
    held : bool
        Examples of a held-out part give their loss to the same release, and nothing else.
        They take part in no gradient, so they cost it nothing (parallel composition).

    Examples
    --------
    >>> round(Sensing(0.005, 0.005).left ** -0.5, 5)
    1.00504
    """

    bits: float = 0.0
    loss: float = 0.0
    loss_clip: float = 8.0
    held: bool = False

    def __post_init__(self) -> None:
        for name, value in (("bits", self.bits), ("loss", self.loss)):
            if not (math.isfinite(value) and 0.0 <= value < _MOST_SHARE):
                raise _refused(f"share for {name} {value!r}", f"use 0 to {_MOST_SHARE}")
        if not (math.isfinite(self.loss_clip) and self.loss_clip > 0):
            raise _refused(f"loss_clip {self.loss_clip!r}")
        if self.bits + self.loss >= _MOST_SHARE:
            raise _refused(f"sensors take {self.bits + self.loss}", f"use less than {_MOST_SHARE}")

    @property
    def left(self) -> float:
        """Share that is left for the gradient."""
        return 1.0 - self.bits - self.loss

    @property
    def extra_noise(self) -> float:
        """Relative addition to the gradient's noise."""
        return float(self.left**-0.5 - 1.0)


def mechanism_blocks(
    mechanism: Mechanism, shape: Shape, sensing: Sensing
) -> tuple[tuple[Block, ...], tuple[Block, ...]]:
    """Return the blocks of a joint release: of gradient and sensors, and of the held-out part.

    Examples
    --------
    >>> from fedtune.privacy.events import Relation, Unit
    >>> from fedtune.privacy.sampling import Everyone
    >>> mechanism = Mechanism(
    ...     Unit.CLIENT, Relation.REPLACE_SPECIAL, Everyone(), 2.0, denominator=10.0
    ... )
    >>> shape = Shape((("a",), ("b",)), (3.0, 4.0), (0.5, 0.5))
    >>> blocks, _ = mechanism_blocks(mechanism, shape, Sensing(bits=0.01))
    >>> [block.names for block in blocks]
    [('a',), ('b',), ('clip-bits',)]
    >>> round(sum((block.clip / block.sigma) ** 2 for block in blocks), 12)    # 1 / z^2
    0.25
    """
    clips = dict(zip(shape.names, shape.norms, strict=True))
    shares = {
        names: share * sensing.left
        for names, share in zip(shape.names, shape.shares, strict=True)
    }  # fmt: skip
    if sensing.bits:
        clips[(BITS,)] = bits_sensitivity(len(shape.names))
        shares[(BITS,)] = sensing.bits
    if sensing.loss:
        clips[(LOSS,)] = sensing.loss_clip / 2.0
        shares[(LOSS,)] = sensing.loss
    held = mechanism.blocks_flat((HELD,), sensing.loss_clip / 2.0) if sensing.held else ()
    return mechanism.blocks_weighted(clips, shares), held


def flat(names: Sequence[str], norm: float, gamma: float = 0.0) -> Shape:
    """Return one block of everything."""
    return Shape((tuple(names),), (norm,), (1.0,), gamma)


def isotropic(
    names: tuple[tuple[str, ...], ...], norms: Sequence[float], gamma: float = 0.0
) -> Shape:
    """Return blocks with norms of their own and the same noise on all coordinates.

    Examples
    --------
    >>> isotropic((("a",), ("b",)), (3.0, 4.0)).deviations(2.0)
    (10.0, 10.0)
    """
    total = math.fsum(norm * norm for norm in norms)
    shares = tuple(norm * norm / total for norm in norms)
    return Shape(names, tuple(norms), shares, gamma)


def _refused(message: str, hint: str = "use finite numbers above 0") -> FedtuneError:
    return FedtuneError(f"shape of a release: {message}", hint=hint, code=ExitCode.PRIVACY)
