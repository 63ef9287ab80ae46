"""Clipping rules: what one example may add, and how the bound is learnt.

A rule sees nothing but norms of per-example gradients, one for each block of
parameters, and gives the factor that each is scaled by. It states the L2
sensitivity of the sum that results, which is what noise is scaled to.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fedtune.errors import ExitCode, FedtuneError

__all__ = [
    "Automatic",
    "Clip",
    "Flat",
    "PerBlock",
    "Quantile",
    "adapter_blocks",
    "bits_sensitivity",
    "clip_bits",
    "split_noise",
]

Blocks = tuple[tuple[str, ...], ...]


class Clip(Protocol):
    """A rule that bounds the contribution of one example."""

    @property
    def sensitivity(self) -> float:
        """L2 norm that no example's whole contribution exceeds."""
        ...

    @property
    def norms(self) -> tuple[float, ...]:
        """L2 norm that no example's contribution to each block exceeds."""
        ...

    def blocks(self, names: Sequence[str]) -> Blocks:
        """Split parameter names into the blocks that are clipped together."""
        ...

    def weights(self, norms: torch.Tensor) -> torch.Tensor:
        """Turn norms (B, blocks) into factors (B, blocks); column j depends on column j only."""
        ...


@dataclass(frozen=True)
class Flat:
    """One bound for the whole gradient (Abadi et al. 2016, 1607.00133, algorithm 1).

    Attributes
    ----------
    norm : float
        The clip norm C; the factor is ``min(1, C / |g|)``.

    Examples
    --------
    >>> Flat(1.0).weights(torch.tensor([[0.5], [4.0]])).flatten().tolist()
    [1.0, 0.25]
    """

    norm: float

    def __post_init__(self) -> None:
        _positive("norm", self.norm)

    @property
    def sensitivity(self) -> float:
        """See ``Clip``."""
        return self.norm

    @property
    def norms(self) -> tuple[float, ...]:
        """See ``Clip``."""
        return (self.norm,)

    def blocks(self, names: Sequence[str]) -> Blocks:
        """See ``Clip``."""
        return (tuple(names),)

    def weights(self, norms: torch.Tensor) -> torch.Tensor:
        """See ``Clip``; 0 where a norm is not finite."""
        return _factors(norms, self.norms, 0.0)


@dataclass(frozen=True)
class Automatic:
    """AUTO-S: every gradient is scaled to just under C (Bu et al. 2022, 2206.07136, eq. 4).

    Attributes
    ----------
    norm : float
        C; with a learning rate of its own it only rescales that.
    gamma : float
        Keeps small gradients small: the factor is ``C / (|g| + gamma)``.

    Examples
    --------
    >>> rule = Automatic(1.0)
    >>> [round(float(w), 4) for w in rule.weights(torch.tensor([[0.0], [0.99]]))]
    [100.0, 1.0]
    """

    norm: float = 1.0
    gamma: float = 0.01

    def __post_init__(self) -> None:
        _positive("norm", self.norm)
        _positive("gamma", self.gamma)

    @property
    def sensitivity(self) -> float:
        """See ``Clip``."""
        return self.norm

    @property
    def norms(self) -> tuple[float, ...]:
        """See ``Clip``."""
        return (self.norm,)

    def blocks(self, names: Sequence[str]) -> Blocks:
        """See ``Clip``."""
        return (tuple(names),)

    def weights(self, norms: torch.Tensor) -> torch.Tensor:
        """See ``Clip``; 0 where a norm is not finite."""
        return _factors(norms, self.norms, self.gamma)


@dataclass(frozen=True)
class PerBlock:
    """A bound for each block; one example may reach all of them at once.

    Because it may, the sensitivity is ``sqrt(sum_b C_b^2)`` and not the largest
    C_b (McMahan et al. 2018, 1710.06963, section 3).

    Attributes
    ----------
    names : tuple of tuple of str
        Parameter names of each block: together all, none twice.
    norms : tuple of float
        C_b of each block.
    gamma : float
        Above 0: the automatic rule in each block.

    Examples
    --------
    >>> PerBlock((("a",), ("b",)), (3.0, 4.0)).sensitivity
    5.0
    """

    names: Blocks
    norms: tuple[float, ...]
    gamma: float = 0.0

    def __post_init__(self) -> None:
        if len(self.names) != len(self.norms) or not self.norms:
            raise _refused(f"{len(self.names)} blocks with {len(self.norms)} clip norms")
        for norm in self.norms:
            _positive("norms", norm)
        if self.gamma:
            _positive("gamma", self.gamma)
        given = [name for block in self.names for name in block]
        if len(set(given)) != len(given) or not all(self.names):
            raise _refused("a block is empty, or a parameter is in two blocks")

    @property
    def sensitivity(self) -> float:
        """See ``Clip``."""
        return math.hypot(*self.norms)

    def blocks(self, names: Sequence[str]) -> Blocks:
        """See ``Clip``; refuses names other than its own."""
        mine = {name for block in self.names for name in block}
        if odd := sorted(mine ^ set(names)):
            raise _refused(f"blocks do not cover the trainable parameters: {odd[:3]}")
        return self.names

    def weights(self, norms: torch.Tensor) -> torch.Tensor:
        """See ``Clip``; 0 where a norm is not finite."""
        return _factors(norms, self.norms, self.gamma)


@dataclass(frozen=True)
class Quantile:
    """Moves a clip norm to a quantile of the norms (Andrew et al. 2021, 1905.03871, alg. 1).

    Attributes
    ----------
    target : float
        Share of examples that should stay unclipped.
    lr : float
        Learning rate of the logarithm of the norm.

    Examples
    --------
    Of 64 examples expected, the noisy sum of bits says that three quarters are unclipped:

    >>> round(Quantile().updated(1.0, 16.0, expected_batch=64), 4)
    0.9512
    """

    target: float = 0.5
    lr: float = 0.2

    def __post_init__(self) -> None:
        _positive("lr", self.lr)
        if not 0.0 < self.target < 1.0:
            raise _refused(f"target={self.target}", "use a share between 0 and 1")

    def updated(self, norm: float, noisy_sum: float, expected_batch: float) -> float:
        """Return the next clip norm.

        Parameters
        ----------
        norm : float
            Its value now.
        noisy_sum : float
            Of ``clip_bits``, as the mechanism released it.
        expected_batch : float
            Public expected number of examples. The real number is private.

        Raises
        ------
        FedtuneError
            A number is not finite, or the new norm would not be.
        """
        _positive("norm", norm)
        _positive("expected_batch", expected_batch)
        if not math.isfinite(noisy_sum):
            raise _refused(f"noisy_sum={noisy_sum}")
        unclipped = noisy_sum / expected_batch + 0.5
        found = norm * math.exp(min(-self.lr * (unclipped - self.target), 700.0))
        _positive("the updated norm", found)
        return found


def clip_bits(norms: torch.Tensor, clips: Sequence[float]) -> torch.Tensor:
    """Return the sum of ``1[norm <= C] - 1/2`` over examples, for each block.

    An example adds a vector of entries +-1/2: its L2 norm is
    ``bits_sensitivity(blocks)`` exactly, whatever it contains. A dropped example,
    whose norm is not finite, adds -1/2 everywhere.

    Parameters
    ----------
    norms : Tensor, shape (B, blocks)
    clips : sequence of float
        C of each block.

    Returns
    -------
    Tensor, shape (blocks,), float64
        Private until the mechanism has added its noise.

    Examples
    --------
    >>> clip_bits(torch.tensor([[0.5], [0.9], [3.0], [float("nan")]]), (1.0,)).tolist()
    [0.0]
    """
    bounds = torch.tensor(tuple(clips), dtype=torch.float64, device=norms.device)
    inside = norms.double() <= bounds
    return (inside.double() - 0.5).sum(0)


def bits_sensitivity(blocks: int) -> float:
    """Return the joint L2 sensitivity of so many sums of bits: ``sqrt(blocks) / 2``.

    Examples
    --------
    >>> bits_sensitivity(4)
    1.0
    """
    if blocks < 1:
        raise _refused(f"blocks={blocks}")
    return math.sqrt(blocks) / 2.0


def split_noise(noise_multiplier: float, sigma_bits: float, blocks: int = 1) -> float:
    """Return the gradient's noise multiplier when bits share its release.

    Gradient and bits together are one Gaussian mechanism of ``noise_multiplier``
    (Andrew et al. 2021, theorem 1, for ``blocks`` bits):
    ``z_g = (z^-2 - (2 sigma_b / sqrt(blocks))^-2)^(-1/2)``.

    Parameters
    ----------
    noise_multiplier : float
        z of the whole release.
    sigma_bits : float
        Standard deviation of the noise on each sum of ``clip_bits``.
    blocks : int
        How many such sums.

    Raises
    ------
    FedtuneError
        The bits alone would cost more than the whole release.

    Examples
    --------
    >>> round(split_noise(1.0, sigma_bits=3.2), 4)
    1.0124
    """
    _positive("noise_multiplier", noise_multiplier)
    _positive("sigma_bits", sigma_bits)
    alone = sigma_bits / bits_sensitivity(blocks)
    if alone <= noise_multiplier:
        raise _refused(
            f"sigma_bits={sigma_bits} on {blocks} sums of bits leaves nothing of "
            f"noise_multiplier={noise_multiplier} for the gradient",
            f"use more than {noise_multiplier * bits_sensitivity(blocks):.4g}",
        )
    return float((noise_multiplier**-2 - alone**-2) ** -0.5)


def adapter_blocks(names: Iterable[str]) -> Blocks:
    """Group parameter names by layer: both factors of a low-rank pair are one block.

    Examples
    --------
    >>> adapter_blocks(["q.lora_A.default.weight", "q.lora_B.default.weight", "head.weight"])
    (('q.lora_A.default.weight', 'q.lora_B.default.weight'), ('head.weight',))
    """
    found: dict[str, list[str]] = {}
    for name in names:
        layer = re.sub(r"\.lora_(embedding_)?[AB](\..*)?$", "", name)
        found.setdefault(layer if layer != name else name.rpartition(".")[0], []).append(name)
    return tuple(tuple(block) for block in found.values())


def _factors(norms: torch.Tensor, bounds: tuple[float, ...], gamma: float) -> torch.Tensor:
    if norms.dim() != 2 or norms.shape[1] != len(bounds):
        raise _refused(f"norms of shape {tuple(norms.shape)} for {len(bounds)} blocks")
    limit = torch.tensor(bounds, dtype=torch.float64, device=norms.device)
    given = norms.double()
    below = given + gamma if gamma else torch.maximum(given, limit)
    # Nothing is said of what is not finite: such an example contributes nothing.
    return torch.where(torch.isfinite(given), limit / below, 0.0)


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0.0):
        raise _refused(f"{name}={value}", "use a finite number above 0")


def _refused(message: str, hint: str = "") -> FedtuneError:
    return FedtuneError(f"clipping: {message}", hint=hint, code=ExitCode.PRIVACY)
