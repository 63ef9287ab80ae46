"""What tests of clipping policies share: people with gradients, and the loop of a release."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedtune.privacy.events import Relation, Unit
from fedtune.privacy.mechanism import Mechanism
from fedtune.privacy.noise import InsecureSeededNoise, NoiseSource, SecureNoise
from fedtune.privacy.rldp import rules
from fedtune.privacy.rldp.geoclip import geoclip
from fedtune.privacy.rldp.joint import Collected, Seen
from fedtune.privacy.rldp.policy import Job, Policy
from fedtune.privacy.rldp.sight import Public, unseal
from fedtune.privacy.sampling import Poisson

SHAPES = {
    "l.0.q.lora_A.weight": (2, 8), "l.0.q.lora_B.weight": (8, 2),
    "l.1.q.lora_A.weight": (2, 16), "l.1.q.lora_B.weight": (16, 2),
}  # fmt: skip
SIZES = {name: math.prod(shape) for name, shape in SHAPES.items()}
WIDTH = sum(SIZES.values())
PEOPLE, BATCH, STEPS = 400, 80.0, 200

MAKERS: dict[str, Callable[[Job], Policy]] = {
    "flat": rules.fixed_flat,
    "per-adapter": rules.fixed_per_adapter,
    "automatic": rules.automatic,
    "quantile": rules.quantile_flat,
    "quantile-per-adapter": rules.quantile_per_adapter,
    "closed-form": rules.closed_form,
    "dp-lac": rules.dp_lac,
    "random": rules.random_walk,
    "constant": rules.constant_action,
    "geoclip": geoclip,
}
MOVING = sorted(set(MAKERS) - {"flat", "per-adapter", "automatic"})


def job_of(**changed: Any) -> Job:
    plain = Job(
        SIZES, steps=STEPS, noise_multiplier=1.0, denominator=BATCH, clip_norm=1.0, seed=3,
        options={"constant": (0.3, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)},
    )  # fmt: skip
    return replace(plain, **changed)


def mechanism_of(job: Job, people: int = PEOPLE) -> Mechanism:
    return Mechanism(
        Unit.EXAMPLE, Relation.ADD_OR_REMOVE_ONE, Poisson(job.denominator / people),
        job.noise_multiplier, job.denominator, micro_batch=1,
    )  # fmt: skip


def people(seed: int, scale: float | NDArray[np.float64] = 1.0) -> NDArray[np.float32]:
    """Return one gradient for each of `PEOPLE`, with a mean of its own."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(PEOPLE, WIDTH)) + 0.5 * rng.normal(size=WIDTH)
    return np.asarray(rows * scale, np.float32)


def step(
    policy: Policy,
    mechanism: Mechanism,
    rows: NDArray[np.float32],
    source: NoiseSource,
    number: int,
) -> Seen:
    """Take one step as the training loop does: draw, clip, sense, release, observe."""
    shape, sensing = policy.shape(), policy.sensing
    zeros = {name: np.zeros(size) for name, size in SHAPES.items()}
    collected = Collected(shape, sensing, zeros)
    drawn = rows[mechanism.draw(len(rows), source)].astype(np.float64)
    parts, at = {}, 0
    for name, size in SIZES.items():
        scale = 1.0 if shape.scales is None else shape.scales[name].reshape(-1)
        parts[name] = drawn[:, at : at + size] * scale
        at += size
    fine = np.isfinite(drawn).all(1)
    norms = np.stack(
        [np.sqrt(sum(np.square(parts[name]).sum(1) for name in block)) for block in shape.names],
        axis=1,
    )
    known = torch.from_numpy(np.where(fine[:, None], norms, np.nan))
    weights = shape.rule.weights(known).numpy()
    for index, block in enumerate(shape.names):
        for name in block:
            kept = np.where(fine[:, None], parts[name], 0.0) * weights[:, [index]]
            collected.add({name: kept.sum(0).reshape(SHAPES[name])})
    collected.sense(known, torch.zeros(len(known)))
    seen = collected.release(mechanism, source, number)
    policy.observe(seen)
    return seen


def run(
    policy: Policy, job: Job, rows: NDArray[np.float32], seed: int | None = None, steps: int = STEPS
) -> list[Seen]:  # fmt: skip
    source: NoiseSource = SecureNoise() if seed is None else InsecureSeededNoise(seed)
    mechanism = mechanism_of(job)
    return [step(policy, mechanism, rows, source, number) for number in range(steps)]


def true_quantile(rows: NDArray[np.float32], names: Sequence[str], quantile: float) -> float:
    at, found = 0, np.zeros(len(rows))
    for name, size in SIZES.items():
        if name in names:
            found += np.square(rows[:, at : at + size].astype(np.float64)).sum(1)
        at += size
    return float(np.quantile(np.sqrt(found), quantile))


def seen_of(
    policy: Policy, inside: Sequence[float] | None, square: float = 0.0, z: float = 1.0
) -> Seen:
    """Return a release that shows what is wanted, sealed by a mechanism as the loop does."""
    shape, mechanism = policy.shape(), mechanism_of(job_of())
    means = {name: np.zeros(size, np.float32) for name, size in SHAPES.items()}
    next(iter(means.values())).reshape(-1)[0] = square**0.5
    spread = tuple(s / BATCH for s in shape.deviations(z))
    return Seen(
        Public(0), shape, Public(z), unseal(means, by=mechanism), Public(spread),
        None if inside is None else unseal(tuple(inside), by=mechanism), Public(0.1),
    )  # fmt: skip
