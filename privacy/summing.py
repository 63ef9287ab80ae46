"""Updates as whole numbers for a secure sum, and their share of the noise.

Client and server find the same step and the same range from public numbers alone: how many
coordinates, how many members, how much noise. A client clips in whole steps and adds whole
noise; the sum of all members, taken modulo 2^32, cannot wrap (V37).

Distributed noise. Each member adds ``rint(s N)`` with ``s = z C / sqrt(h)``, where ``h`` is the
smallest number of honest members whose numbers are in any sum that comes out. The sum of ``h``
such numbers has the law of ``rint(G + V)``: ``G`` is normal with variance ``h s^2 = (z C)^2``, and
``V`` a sum of independent uniforms (a rounded normal number is a normal number and a uniform one,
sampled at whole numbers). It is a function of what the Gaussian mechanism with multiplier ``z``
would release, so that its guarantee holds, up to how far sampling at whole numbers aliases:
below ``2 h exp(-pi^2 s^2)`` in total variation, with ``s`` in steps (Poisson summation; compare
Kairouz et al. 2021, section 3, for discrete Gaussians). Fewer than ``LEAST`` steps are refused.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.config import Config
from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.lattice import clip_update, grid_of
from fedtune.privacy.noise import NoiseSource
from fedtune.privacy.plan import client_promise, honest_survivors

__all__ = ["LEAST", "Summing", "model_digest", "summing", "summing_of"]

LEAST = 4.0
"""Least noise of one member, in steps: aliasing is then below 1e-60."""

_REACH = 9.0  # no normal number of noise.py is larger
_ROOM = 1 << 31
_COARSEST = 1e-2  # of the clip norm, that rounding may take of an update's length
_HISTORY = ("past", "past_scale")


@dataclass(frozen=True)
class Summing:
    """How one cohort's updates are added.

    Attributes
    ----------
    clip : float
        L2 norm of one update.
    sigma : float
        Standard deviation of one member's noise; 0: none.
    grid : float
        The step, a power of two.
    most : int
        No member's number is larger, in steps.
    names : tuple of (str, shape)
        The tensors, in the order of the vector.
    """

    clip: float
    sigma: float
    grid: float
    most: int
    names: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def length(self) -> int:
        """Return how many numbers the vector has."""
        return sum(math.prod(shape) for _, shape in self.names)

    def flatten(self, update: Mapping[str, NDArray[Any]], source: NoiseSource | None
                ) -> NDArray[np.int64]:  # fmt: skip
        """Return a clipped, noised update as one vector of steps.

        Parameters
        ----------
        update : mapping of name to float array
            What is not finite becomes zero as a whole, and is noised like any other.
        source : NoiseSource or None
            None where no noise is added here.

        Raises
        ------
        FedtuneError
            Other names or shapes than were agreed, or no source where there is noise.
        """
        found = tuple(sorted((name, value.shape) for name, value in update.items()))
        if found != self.names:
            raise _refused("an update has other tensors than the model that was sent")
        if bool(self.sigma) != (source is not None):
            raise _refused("noise is promised and there is no source for it")
        steps = clip_update(update, self.clip, self.grid)
        whole = np.concatenate([steps[name].reshape(-1) for name, _ in self.names])
        if source is not None:
            noise = source.normal(whole.size)
            if noise.shape != whole.shape or not bool(np.isfinite(noise).all()):
                raise _refused(f"'{source.name}' gave no usable noise")
            whole += np.rint(noise * (self.sigma / self.grid)).astype(np.int64)
        return whole

    def unflatten(self, total: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """Return a sum of vectors as tensors, in the unit of the updates."""
        if total.shape != (self.length,):
            raise _refused(f"a sum of {total.size} numbers for {self.length}")
        found: dict[str, NDArray[np.float64]] = {}
        start = 0
        for name, shape in self.names:
            end = start + math.prod(shape)
            found[name] = (total[start:end].astype(np.float64) * self.grid).reshape(shape)
            start = end
        return found


def summing(
    shapes: Mapping[str, tuple[int, ...]], members: int, clip: float, *, multiplier: float = 0.0,
    honest: int = 1,
) -> Summing:  # fmt: skip
    """Return how a cohort's updates are added; the same at every party.

    Parameters
    ----------
    shapes : mapping of name to shape
    members : int
        Of the cohort, before anybody dropped out.
    clip : float
    multiplier : float
        Noise multiplier of the whole sum, z; 0: no noise.
    honest : int
        Fewest honest members in a sum that comes out, h.

    Raises
    ------
    FedtuneError
        ``ExitCode.PRIVACY``: no step is fine enough for the numbers and coarse enough for
        the range, or nobody honest is counted on.

    Examples
    --------
    Ten members, seven of them in the sum at least; each adds more than a tenth of the noise:

    >>> how = summing({"a": (1000,)}, 10, 1.0, multiplier=2.0, honest=7)
    >>> round(how.sigma, 4), how.grid == 2.0**-19, 10 * how.most < 2**31
    (0.7559, True, True)
    """
    if honest < 1 or members < honest or not 0.0 <= multiplier < math.inf:
        raise _refused(f"{honest} honest of {members} members, noise multiplier {multiplier!r}")
    names = tuple(sorted((name, tuple(shape)) for name, shape in shapes.items()))
    size = sum(math.prod(shape) for _, shape in names)
    sigma = multiplier * clip / math.sqrt(honest)
    grid = grid_of(clip, size)
    while members * _most(clip, sigma, grid) >= _ROOM:
        grid *= 2.0
    coarse = grid * math.sqrt(size) / 2.0 > _COARSEST * clip
    if coarse or (multiplier > 0.0 and sigma < LEAST * grid):
        raise _refused(
            f"{size} numbers of {members} members with noise multiplier {multiplier:g} do not fit "
            "a sum modulo 2^32"
        )
    return Summing(clip, sigma, grid, _most(clip, sigma, grid), names)


def summing_of(config: Config, shapes: Mapping[str, tuple[int, ...]], members: int) -> Summing:
    """Return `summing` as the settings ask for it: the same at server and clients."""
    promise, settings = client_promise(config), config.federation.secure
    if promise is None:
        return summing(shapes, members, settings.clip_norm if settings else 0.0)
    return summing(
        shapes, members, promise.settings.clip_norm,
        multiplier=promise.mechanism.noise_multiplier, honest=honest_survivors(config),
    )  # fmt: skip


def model_digest(tensors: Mapping[str, NDArray[Any]], agreed: str, lr: float) -> bytes:
    """Return the SHA-256 of what a server asks of a member; every member's must be the same.

    Members whose noise counts on each other must have agreed to the same terms, and one that
    was sent another learning rate would stand out of the sum.

    Parameters
    ----------
    tensors : mapping of name to array
        The model.
    agreed : str
        SHA-256 of the experiment's terms.
    lr : float
        Learning rate of the round.

    What a client lacks of the past of a seed pool differs between clients, and is left out:
    the root hash of the rebuilt weights, which is part of it, stands for that.
    """
    found = hashlib.sha256(f"fedtune model, version 1;{agreed};{float(lr).hex()};".encode())
    for name in sorted(tensors.keys() - set(_HISTORY)):
        value = np.ascontiguousarray(tensors[name])
        found.update(f"{len(name)}:{name}:{value.dtype.str}:{value.shape};".encode())
        found.update(value.tobytes())
    return found.digest()


def _most(clip: float, sigma: float, grid: float) -> int:
    return math.ceil(clip / grid) + (math.ceil(_REACH * sigma / grid) + 1 if sigma else 0)


def _refused(what: str) -> FedtuneError:
    return FedtuneError(what, hint="fewer members, a smaller model, or less noise",
                        code=ExitCode.PRIVACY)  # fmt: skip
