"""The example-level promise without gradients of weights: MeZO and the seed methods."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedtune.adapters import trainable
from fedtune.client.mezo import fresh, walker_of
from fedtune.client.private_probes import (
    Projector,
    ScoreExamples,
    tune_by_probes_privately,
    tune_projected_privately,
)
from fedtune.client.probes import rate, see
from fedtune.client.seeded import Schedule, distinct
from fedtune.client.walker import Walker
from fedtune.config import Config
from fedtune.data import Encoded
from fedtune.pool.weights import PoolWeights
from fedtune.privacy.noise import NoiseSource
from fedtune.privacy.per_example import example_losses
from fedtune.privacy.plan import Promise

__all__ = ["mezo_privately", "seeded_privately"]


def mezo_privately(
    model: nn.Module, encoded: Encoded, config: Config, promise: Promise, source: NoiseSource,
    *, lr: float, seed: int, clip_norm: float, pad_id: int,
) -> float:  # fmt: skip
    """Run one round of MeZO in place under the promise; return the next clip norm.

    Parameters
    ----------
    seed : int
        Gives the directions, which are public; never the noise.
    """
    model.eval()
    walker = walker_of(model, seed, config.engine.threads)
    directions = [fresh(s, config.tuning.probe.count) for s in range(promise.releases)]
    return tune_by_probes_privately(
        walker, _scores(model, config), encoded, config, promise, source, directions,
        lr=lr, clip_norm=clip_norm, pad_id=pad_id, device=walker.weights.device,
    )  # fmt: skip


def seeded_privately(
    weights: PoolWeights, encoded: Encoded, config: Config, promise: Promise, source: NoiseSource,
    schedule: Schedule, start: NDArray[np.float32],
    *, lr: float, seed: int, clip_norm: float, pad_id: int,
) -> tuple[NDArray[np.float32], float]:  # fmt: skip
    """Run one round of a seed method in place; return its coefficients and the next clip norm."""
    weights.model.eval()
    walker = Walker(weights.pool, weights.arena.flat, weights.base, start)
    run = partial(
        tune_by_probes_privately, walker, _scores(weights.model, config), encoded, config, promise,
        source,
    )  # fmt: skip
    if config.tuning.pool.engine == "projected":
        projector = Projector(weights.pool, weights.arena.layout, trainable(weights.model))
        run = partial(
            tune_projected_privately, walker, projector, _scores(weights.model, config), encoded,
            config, promise, source,
        )  # fmt: skip
        directions: list[Sequence[int]] = [schedule.columns.tolist()] * promise.releases
    else:
        order = schedule.order(np.random.default_rng(seed))
        directions = [distinct(order, config.tuning.probe.count) for _ in range(promise.releases)]
    after = run(
        directions, lr=lr, clip_norm=clip_norm, pad_id=pad_id, device=weights.arena.flat.device
    )
    return walker.coefficients, after


def _scores(model: nn.Module, config: Config) -> ScoreExamples:
    """Return what gives each example's score: its loss, or 1 minus what is to be improved."""
    task, objective = config.model.task, config.tuning.probe.objective
    if objective == "loss":
        return lambda batch: example_losses(model, dict(batch), task)
    return lambda batch: torch.tensor([rate([see(model, dict(batch), task)], objective)])
