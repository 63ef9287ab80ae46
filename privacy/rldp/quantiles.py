"""Norms that follow quantiles, shares of the noise for them, and what policies have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.clipping import Quantile
from fedtune.privacy.rldp.joint import Seen
from fedtune.privacy.rldp.policy import Job, State
from fedtune.privacy.rldp.shape import Sensing, Shape
from fedtune.privacy.rldp.sight import require_sight

__all__ = [
    "Blocks",
    "Deal",
    "Quantiles",
    "bounded",
    "equal",
    "least_noise",
    "moved",
    "noise_share",
    "norms_of",
    "option",
    "quantile_of",
    "refused",
    "require_like",
    "same_noise",
    "split_norm",
    "total_noise",
    "unusable",
]

Blocks = tuple[tuple[str, ...], ...]
Deal = Callable[[Sequence[int], Sequence[float]], tuple[float, ...]]
"""Sizes and norms of blocks to shares of the privacy, which add up to 1."""

_REACH = 1000.0


# ---------------------------------------------------------------- dealing out the noise


def equal(sizes: Sequence[int], norms: Sequence[float]) -> tuple[float, ...]:
    """Return equal shares: noise in proportion to each block's norm."""
    return (1.0 / len(norms),) * len(norms)


def least_noise(sizes: Sequence[int], norms: Sequence[float]) -> tuple[float, ...]:
    """Return the shares of least total noise: ``w_i`` proportional to ``sqrt(d_i) C_i``.

    The total is ``sum d_i s_i^2 = z^2 sum d_i C_i^2 / w_i`` with ``sum w_i = 1``; by the
    inequality of Cauchy and Schwarz it is at least ``z^2 (sum sqrt(d_i) C_i)^2``, and is that
    here. It is the least noise for these norms; no claim of the best training.

    Parameters
    ----------
    sizes : sequence of int
        d_i, numbers in each block.
    norms : sequence of float
        C_i.

    Examples
    --------
    Two blocks, a small one with large gradients and a large one with small ones:

    >>> sizes, norms = (100, 10_000), (3.0, 0.1)
    >>> for deal in (least_noise, equal, same_noise):
    ...     shares = deal(sizes, norms)
    ...     print([round(w, 3) for w in shares], round(total_noise(sizes, norms, shares)))
    [0.75, 0.25] 1600
    [0.5, 0.5] 2000
    [0.999, 0.001] 91001
    """
    return _parts([math.sqrt(d) * c for d, c in zip(sizes, norms, strict=True)])


def same_noise(sizes: Sequence[int], norms: Sequence[float]) -> tuple[float, ...]:
    """Return the shares of isotropic noise: ``w_i`` proportional to ``C_i^2``."""
    return _parts([c * c for c in norms])


def total_noise(
    sizes: Sequence[int], norms: Sequence[float], shares: Sequence[float],
    noise_multiplier: float = 1.0,
) -> float:  # fmt: skip
    """Return the variance of the noise, summed over all coordinates of the **sum**."""
    parts = zip(sizes, norms, shares, strict=True)
    return noise_multiplier**2 * math.fsum(d * c * c / w for d, c, w in parts)


def _parts(values: Sequence[float]) -> tuple[float, ...]:
    total = math.fsum(values)
    return tuple(value / total for value in values)


# ---------------------------------------------------------------- what all of them need


def bounded(norm: float, start: float) -> float:
    """Return a norm that lies within a factor of 1000 of where it started.

    Raises
    ------
    FedtuneError
        It is not a finite number above 0.

    Examples
    --------
    >>> bounded(2.0, 1.0), bounded(1e9, 1.0), bounded(1e-9, 1.0)
    (2.0, 1000.0, 0.001)
    """
    if not (math.isfinite(norm) and norm > 0.0):
        raise refused(f"clip norm {norm!r}", "use a finite number above 0")
    return min(max(norm, start / _REACH), start * _REACH)


def require_like(state: Mapping[str, Any], own: Mapping[str, Any], what: str) -> None:
    """Refuse a state that has other names, shapes or types than ``own``, or is not finite.

    Raises
    ------
    FedtuneError
        ``ExitCode.RESUME_REFUSED``
    """
    if set(state) != set(own):
        raise unusable(what, f"names {sorted(state)} instead of {sorted(own)}")
    for name, mine in own.items():
        value = np.asarray(state[name])
        if value.shape != mine.shape or value.dtype != mine.dtype:
            told = f"{value.dtype}{value.shape} instead of {mine.dtype}{mine.shape}"
            raise unusable(what, f"'{name}' is {told}")
        if not bool(np.isfinite(value).all()):
            raise unusable(what, f"'{name}' is not finite")


def quantile_of(job: Job) -> Quantile:
    """Return the quantile rule of a job's options."""
    return Quantile(option(job, "quantile", 0.5), option(job, "quantile_lr", 0.2))


def option(job: Job, name: str, default: float) -> float:
    """Return a number of a job's options."""
    value = job.options.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise refused(f"{name}={value!r}", "use a finite number")
    return float(value)


def moved(rule: Quantile, norm: float, inside: float, start: float) -> float:
    """Return the norm that the quantile rule has next, bounded around ``start``.

    Examples
    --------
    >>> round(moved(Quantile(), 1.0, 0.75, 1.0), 4)     # as in ``Quantile``
    0.9512
    >>> moved(Quantile(), 1.0, -1e300, 1.0)             # nothing but noise
    1000.0
    """
    # A larger move ends at the bound all the same, and must not overflow.
    most = 2.0 * math.log(_REACH) / rule.lr
    inside = min(max(inside, rule.target - most), rule.target + most)
    return bounded(rule.updated(norm, inside - 0.5, 1.0), start)


def noise_share(job: Job) -> float:
    """Return the share of one sum of clip bits with noise ``quantile_noise`` on it.

    Andrew et al. 2021, theorem 1: ``z_g^-2 = z^-2 - (2 sigma_b)^-2``, hence the bits' share is
    ``(z / 2 sigma_b)^2``. Without the option sigma_b is a twentieth of the expected units, or
    2 z where that is more.

    Examples
    --------
    >>> job = Job({"a": 1}, steps=10, noise_multiplier=1.0, denominator=64.0, clip_norm=1.0)
    >>> round(noise_share(job), 4)
    0.0244
    """
    z = job.noise_multiplier
    sigma = option(job, "quantile_noise", 0.0) or max(job.denominator / 20.0, 2.0 * z)
    share = (z / (2.0 * sigma)) ** 2 if sigma > 0.0 else math.inf
    if not share < 0.5:
        raise refused(
            f"quantile_noise={sigma:g} would take {share:.0%} of each release's privacy",
            f"use more than {z / math.sqrt(2.0):.4g}, or leave it out",
        )
    return share


def split_norm(norm: float, names: Blocks) -> tuple[float, ...]:
    """Return the norm dealt out to blocks so that all together have it."""
    return (norm / math.sqrt(len(names)),) * len(names)


# ---------------------------------------------------------------- quantiles


class Quantiles:
    """Moves the norm of each block to a quantile of its gradients' norms, by its own clip bit.

    Parameters
    ----------
    job : Job
        Options ``quantile`` and ``quantile_lr``. Norms start at ``clip_norm / sqrt(n)``.
    names : tuple of tuple of str
        Blocks.
    bits : float
        Share of each release's privacy for the bits.
    deal : callable
        Sizes and norms to shares.
    """

    honest = True

    def __init__(self, job: Job, names: Blocks, bits: float, deal: Deal = equal) -> None:
        self.names = names
        self.sensing = Sensing(bits=bits)
        self.norms = split_norm(job.clip_norm, names)
        self._starts = self.norms
        self._rule = quantile_of(job)
        self._deal = deal
        self._sizes = tuple(sum(job.sizes[name] for name in block) for block in names)

    def shape(self) -> Shape:
        """See ``Policy``."""
        return Shape(self.names, self.norms, self._deal(self._sizes, self.norms))

    def wanted_noise(self) -> float | None:
        """See ``Policy``."""
        return None

    def observe(self, seen: Seen) -> None:
        """See ``Policy``: every norm by its own bit (Andrew et al. 2021, algorithm 1)."""
        inside = require_sight(seen.inside)
        if inside is None:
            return
        together = zip(self.norms, inside, self._starts, strict=True)
        self.norms = tuple(moved(self._rule, c, share, start) for c, share, start in together)

    def decisions(self) -> list[dict[str, Any]]:
        """See ``Policy``."""
        return []

    def state(self) -> State:
        """See ``Policy``."""
        return {"norms": np.array(self.norms)}

    def restore(self, state: State) -> None:
        """See ``Policy``."""
        require_like(state, self.state(), "quantile")
        self.norms = norms_of(state, self._starts, "quantile")


def norms_of(state: State, starts: Sequence[float], what: str) -> tuple[float, ...]:
    """Return the norms of a state; refuse those that no run can have come to."""
    found = tuple(float(norm) for norm in state["norms"])
    for norm, start in zip(found, starts, strict=True):
        if not norm > 0.0 or bounded(norm, start) != norm:
            raise unusable(what, f"clip norm {norm!r}, begun at {start!r}")
    return found


def refused(message: str, hint: str) -> FedtuneError:
    """Return the error for what a policy cannot work with."""
    return FedtuneError(f"policy: {message}", hint=hint, code=ExitCode.PRIVACY)


def unusable(what: str, message: str) -> FedtuneError:
    """Return the error for a state that is not to be restored."""
    return FedtuneError(
        f"state of a policy ({what}): {message}",
        hint="resume with the settings and the model that it was saved with",
        code=ExitCode.RESUME_REFUSED,
    )
