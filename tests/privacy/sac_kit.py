"""A small soft actor-critic for tests, and what it is fed with."""

from __future__ import annotations

import numpy as np

from fedtune.privacy.rldp.sac import Sac, SacSettings, Transition

QUICK = SacSettings(hidden=(16, 16), lr=3e-3, batch_size=32, start=4, updates=4, buffer=64)


def transition(random: np.random.Generator, states: int = 3, actions: int = 2) -> Transition:
    return Transition(
        state=random.normal(size=states),
        action=np.tanh(random.normal(size=actions)),
        reward=float(random.normal()),
        next_state=random.normal(size=states),
        done=bool(random.random() < 0.2),
    )


def fed(seed: int, count: int, settings: SacSettings = QUICK) -> Sac:
    random = np.random.default_rng(seed)
    sac = Sac(3, 2, settings, seed=seed)
    for _ in range(count):
        sac.learn(transition(random))
    return sac


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)
