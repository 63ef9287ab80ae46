"""What tests of private coefficients share: settings, and a straight loss of known gradients."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedtune.client.private_probes import (
    Projector,
    tune_by_probes_privately,
    tune_projected_privately,
)
from fedtune.client.walker import Walker
from fedtune.config import Config
from fedtune.data import Encoded
from fedtune.pool.hadamard import HadamardPool
from fedtune.pool.layout import Arena
from fedtune.privacy.noise import NoiseSource, SecureNoise
from fedtune.privacy.plan import Promise, example_promise
from fedtune.privacy.replay import Stage
from tests.tiny import settings

POPULATION, STEPS, CLIP = 40, 8, 0.1
EXAMPLE = {
    "relation": "add-or-remove-one", "population": POPULATION, "delta": 1e-3,
    "noise_multiplier": 0.8,
}  # fmt: skip
Tokens = NDArray[np.int64]


def config_of(base: Path | str = "fedtune:tiny", **tables: dict[str, Any]) -> Config:
    tuning = {
        "method": "mezo", "batch_size": 6, "accumulate": 1, "steps": STEPS,
        "probe": {"count": 2}, **tables.pop("tuning", {}),
    }  # fmt: skip
    example = EXAMPLE | tables.pop("example", {})
    return settings(
        "unused.jsonl", base, data={"holdout": 0.0}, tuning=tuning,
        federation={"rounds": 1, "weighting": "uniform"}, evaluation={"clients": 0},
        privacy={"dataset": "probes", "example": example}, **tables,
    )  # fmt: skip


PROJECTED: dict[str, Any] = {
    "optimizer": "sgd", "method": "seedpool", "pool": {"engine": "projected"},
}  # fmt: skip


def unchecked(
    tuning: dict[str, Any] | None = None, example: dict[str, Any] | None = None
) -> Config:
    """Return settings that the file's own rules would refuse: the second line of defence."""
    config, given = config_of(), dict(tuning or {})
    probe = config.tuning.probe.model_copy(update=given.pop("probe", {}))
    assert config.privacy.example is not None
    promised = config.privacy.example.model_copy(update=example or {})
    return config.model_copy(
        update={
            "tuning": config.tuning.model_copy(update=given | {"probe": probe}),
            "privacy": config.privacy.model_copy(update={"example": promised}),
        }
    )


def promise_of(config: Config) -> Promise:
    promise = example_promise(config)
    assert promise is not None
    return promise


def rows_of(values: Sequence[Sequence[int]]) -> Encoded:
    ids = tuple(np.array(row, np.int64) for row in values)
    return Encoded(ids, ids, len(ids), 0, 0)


# ---------------------------------------------------------------- a straight loss

D = 64
"""Weights of the straight loss: example ``[i]`` has the gradient ``GRADIENTS[i]``."""
GRADIENTS = np.random.default_rng(0).normal(size=(50, D)).astype(np.float32)


def straight(
    stage: Stage | None,
    rows: Sequence[Sequence[int]],
    config: Config,
    *,
    source: NoiseSource | None = None,
    key: int = 7,
    projected: bool = False,
    gradients: NDArray[np.float32] = GRADIENTS,
    clip: float = CLIP,
    directions: Sequence[Sequence[int]] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Run one round on losses g_i.w; return the coefficients and the weights."""
    pool = HadamardPool(key, 64)
    weights = nn.Parameter(torch.zeros(D))
    arena = Arena.of([("w", weights)])
    walker = Walker(pool, arena.flat)
    table = torch.from_numpy(gradients)
    promise = promise_of(config)
    if stage is not None:
        promise = replace(promise, mechanism=stage.watch(promise.mechanism))
    count = config.tuning.probe.count
    steps = range(promise.releases)
    chosen = directions or [[(s * count + j) % 64 for j in range(count)] for s in steps]
    tune: Any = tune_by_probes_privately
    if projected:
        projector = Projector(pool, arena.layout, {"w": weights})
        tune = partial(tune_projected_privately, projector=projector)
    norm = tune(
        walker, score_examples=lambda b: table[b["input_ids"][:, 0]] @ weights,
        encoded=rows_of(rows), config=config, promise=promise, source=source or SecureNoise(),
        directions=chosen, lr=0.5, clip_norm=clip, pad_id=0,
    )  # fmt: skip
    if stage is not None:
        stage.emit("weights", arena.flat)
        stage.emit("coefficients", walker.coefficients)
        stage.emit("clip", norm)
    return walker.coefficients, arena.flat.numpy().copy()


def everyone(count: int = 4, **tables: dict[str, Any]) -> Config:
    """Every example in every step, so that sums are known."""
    return config_of(
        tuning={"batch_size": POPULATION, "steps": 1, "probe": {"count": count, "eps": 0.5}}
        | tables.pop("tuning", {}),
        example={"sampler": "everyone"} | tables.pop("example", {}),
        **tables,
    )
