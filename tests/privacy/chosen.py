"""Policies that really decided: through the real mechanism, on made-up gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fedtune.config import Config
from fedtune.privacy.noise import InsecureSeededNoise
from fedtune.privacy.plan import Promise, client_promise, example_promise
from fedtune.privacy.rldp.joint import Collected, Seen
from fedtune.privacy.rldp.levels import noise_book
from fedtune.privacy.rldp.named import policy_of
from fedtune.privacy.rldp.policy import Policy
from fedtune.privacy.rldp.sight import Public

SIZES = {
    f"base_model.model.layers.{layer}.q_proj.lora_{side}.default.weight": 8 * (layer + 1)
    for layer in range(3)
    for side in "AB"
}
ROUNDS, STEPS, POPULATION, BATCH = 4, 15, 640, 64
HELD = 0.25


def example_of(**changes: Any) -> Promise:
    """Return a promise about examples: ``clip`` and ``rldp`` are the changes that matter."""
    told = {
        "relation": "add-or-remove-one", "population": POPULATION, "delta": 1e-5,
        "noise_multiplier": 1.0,
    }  # fmt: skip
    found = example_promise(
        Config.model_validate(
            {
                "data": {"pack": False, "holdout": 0.0},
                "federation": {"weighting": "uniform", "rounds": ROUNDS},
                "tuning": {"batch_size": BATCH, "steps": STEPS},
                "evaluation": {"clients": 0},
                "privacy": {"example": told | changes},
            }
        )
    )
    assert found is not None
    return found


def client_of(cohort: float = 0.1, **changes: Any) -> Promise:
    """Return a promise about clients: one release in each of 40 rounds."""
    told = {
        "relation": "add-or-remove-one", "population": 640, "delta": 1e-5, "noise_multiplier": 1.0,
    }  # fmt: skip
    found = client_promise(
        Config.model_validate(
            {
                "federation": {"weighting": "uniform", "rounds": 40, "cohort": cohort},
                "evaluation": {"clients": 0},
                "privacy": {"client": told | changes},
            }
        )
    )
    assert found is not None
    return found


def policy(promise: Promise, seed: int = 0) -> Policy:
    return policy_of(promise, SIZES, seed, lambda: Public(-1.0))


def release(
    promise: Promise, chooser: Policy, step: int, rng: np.random.Generator, z: float
) -> Seen:
    """Release the sum over units that were drawn, as a step of training does."""
    shape, sensing = chooser.shape(), chooser.sensing
    held = promise.settings.rldp.held_out if sensing.held and promise.settings.rldp else 0.0
    sums = {name: np.zeros(size) for name, size in SIZES.items()}
    collected = Collected(shape, sensing, sums, held)
    norms = rng.lognormal(-1.0, 0.5, (BATCH, len(shape.names)))
    for index, (names, limit) in enumerate(zip(shape.names, shape.norms, strict=True)):
        length = float(np.minimum(norms[:, index], limit).sum()) / len(names) ** 0.5
        collected.add({n: np.full(SIZES[n], 0.3 * length / SIZES[n] ** 0.5) for n in names})
    losses = torch.tensor(rng.uniform(2.0, 4.0, BATCH))
    collected.sense(torch.tensor(norms), losses)
    if sensing.held:
        collected.sense_held(losses[:16])
    return collected.release(promise.at(z), InsecureSeededNoise(1000 + step), step)


def rows_of(promise: Promise, seed: int = 0) -> list[dict[str, Any]]:
    """Return the log of a whole run of one policy, in the words of the training loop."""
    rng, chooser = np.random.default_rng(seed), policy(promise, seed)
    rows, step = [], 0
    for number in range(1, promise.rounds + 1):
        book = noise_book(promise)
        for _ in range(promise.releases):
            z = book.take(chooser.wanted_noise())
            if z is None:
                rows.append({"round": number, "step": step, "refused": True})
                break
            seen = release(promise, chooser, step, rng, z)
            chooser.observe(seen)
            said = chooser.decisions()
            row = {"round": number, "step": step, "noise_multiplier": z, **seen.shape.facts()}
            rows.append((said[-1] if said else {}) | row)
            step += 1
    return rows
