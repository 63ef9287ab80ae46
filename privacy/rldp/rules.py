"""The policies to beat, by name: fixed norms, quantiles, the closed form, and those next door.

All see ``Seen`` alone and are deterministic: the same releases give the same shapes. A norm
never leaves ``[C / 1000, 1000 C]`` around where it started, whatever was released.
"""

from __future__ import annotations

from typing import Any

from fedtune.privacy.clipping import adapter_blocks
from fedtune.privacy.rldp.joint import Seen
from fedtune.privacy.rldp.lac import dp_lac
from fedtune.privacy.rldp.policy import Job, Policy, State
from fedtune.privacy.rldp.quantiles import (
    Deal,
    Quantiles,
    bounded,
    equal,
    least_noise,
    moved,
    noise_share,
    option,
    quantile_of,
    require_like,
    same_noise,
    split_norm,
    total_noise,
)
from fedtune.privacy.rldp.shape import Sensing, Shape, flat, isotropic
from fedtune.privacy.rldp.steered import constant_action, random_walk

__all__ = [
    "Deal",
    "Fixed",
    "Quantiles",
    "automatic",
    "bounded",
    "closed_form",
    "constant_action",
    "dp_lac",
    "equal",
    "fixed_flat",
    "fixed_per_adapter",
    "least_noise",
    "moved",
    "quantile_flat",
    "quantile_of",
    "quantile_per_adapter",
    "random_walk",
    "require_like",
    "same_noise",
    "total_noise",
]


class Fixed:
    """One shape for all releases, without sensors."""

    honest = True
    sensing = Sensing()

    def __init__(self, kept: Shape) -> None:
        self._kept = kept

    def shape(self) -> Shape:
        """See ``Policy``."""
        return self._kept

    def wanted_noise(self) -> float | None:
        """See ``Policy``."""
        return None

    def observe(self, seen: Seen) -> None:
        """See ``Policy``; learns nothing."""

    def decisions(self) -> list[dict[str, Any]]:
        """See ``Policy``."""
        return []

    def state(self) -> State:
        """See ``Policy``."""
        return {}

    def restore(self, state: State) -> None:
        """See ``Policy``."""
        require_like(state, {}, "fixed")


def fixed_flat(job: Job) -> Policy:
    """Return the rule of Abadi et al. 2016 (1607.00133): one norm over everything."""
    return Fixed(flat(tuple(job.sizes), job.clip_norm))


def fixed_per_adapter(job: Job) -> Policy:
    """Return one norm ``C / sqrt(n)`` for each of n adapters, and the same noise on everything."""
    names = adapter_blocks(job.sizes)
    return Fixed(isotropic(names, split_norm(job.clip_norm, names)))


def automatic(job: Job) -> Policy:
    """Return AUTO-S (Bu et al. 2022, 2206.07136): every gradient scaled to just under C."""
    return Fixed(flat(tuple(job.sizes), job.clip_norm, option(job, "gamma", 0.01)))


def quantile_flat(job: Job) -> Policy:
    """Return the quantile rule for one norm over everything (Andrew et al. 2021, 1905.03871)."""
    return Quantiles(job, (tuple(job.sizes),), noise_share(job))


def quantile_per_adapter(job: Job) -> Policy:
    """Return the quantile rule for each adapter, with equal shares of the privacy.

    Per-layer thresholds by private quantiles are of He et al. 2022 (2212.01539), and so is
    the equal budget; their text was not at hand: what is here is Andrew et al.'s rule in
    each block. The bits' share is the option ``sensing``, 1 % by default.
    """
    return Quantiles(job, adapter_blocks(job.sizes), option(job, "sensing", 0.01))


def closed_form(job: Job) -> Policy:
    """Return the quantile rule for each adapter, with the shares of least total noise."""
    return Quantiles(job, adapter_blocks(job.sizes), option(job, "sensing", 0.01), least_noise)
