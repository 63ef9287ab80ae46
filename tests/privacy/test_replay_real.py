"""The client's DP step and the server's sum as they run, under record and replay."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedtune.adapters import attach, read, trainable
from fedtune.client.private_steps import tune_privately
from fedtune.config import Config
from fedtune.data import Encoded
from fedtune.models import fingerprint, load_base
from fedtune.privacy.clipping import Automatic
from fedtune.privacy.noise import SecureNoise
from fedtune.privacy.per_example import PerExample
from fedtune.privacy.plan import client_promise, example_promise
from fedtune.privacy.replay import Stage, record, replay
from fedtune.privacy.replay_checks import audit, extremes, neighbours
from fedtune.privacy.rldp.named import policy_of
from fedtune.privacy.rldp.shape import Shape
from fedtune.server.private import PrivateSum
from tests.tiny import llama, settings

POPULATION, STEPS = 60, 10
EXAMPLE = {"relation": "add-or-remove-one", "population": POPULATION, "delta": 1e-3}
Tokens = NDArray[np.int64]


@pytest.fixture(scope="module")
def base(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("base"), shared)


def _config(base: Path, **privacy: Any) -> Config:
    return settings(
        "unused.jsonl", base, data={"holdout": 0.0},
        tuning={"batch_size": 6, "accumulate": 1, "steps": STEPS, "tokens": 4},
        federation={"rounds": 1, "weighting": "uniform"}, evaluation={"clients": 0},
        privacy={"dataset": "replay", **privacy},
    )  # fmt: skip


def _people(seed: int) -> list[Tokens]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 500, rng.integers(2, 24)) for _ in range(POPULATION)]


ODD: dict[str, Tokens] = {
    "longest": np.arange(3, 43),
    "shortest": np.array([3, 4]),
    "one token": np.array([3]),
    "repeated": np.full(24, 7),
    "padding": np.zeros(12, np.int64),
}


def _encoded(rows: list[Tokens]) -> Encoded:
    ids = tuple(row.astype(np.int64) for row in rows)
    return Encoded(ids, ids, len(ids), 0, 0)


def _client(stage: Stage, rows: list[Tokens], config: Config, spoil: bool = False) -> Any:
    model = attach(load_base(config.model), config.tuning, "causal-lm", 3)
    promise = example_promise(config)
    assert promise is not None
    watched = replace(promise, mechanism=stage.watch(promise.mechanism))
    optim = torch.optim.AdamW(trainable(model).values(), lr=0.01)
    if spoil:  # so that gradients are far from finite
        with torch.no_grad():
            for parameter in trainable(model).values():
                parameter *= 1e18
    sizes = {name: parameter.numel() for name, parameter in trainable(model).items()}
    policy = policy_of(promise, sizes, seed=5)
    log = tune_privately(
        model, PerExample(model), _encoded(rows), config, watched, optim, SecureNoise(),
        policy=policy, pad_id=0,
    )  # fmt: skip
    stage.emit("update", read(model))
    stage.emit("policy", policy.state())
    stage.emit("decisions", log)


RLDP = {"clip": "rldp", "rldp": {"mode": "online", "interval": 1, "warmup": 0.2}}


@pytest.mark.parametrize(
    "clip", [{"clip": "per-adapter"}, {"clip": "quantile"}, RLDP],
    ids=["per-adapter", "quantile", "rldp"],
)  # fmt: skip
def test_v40_a_client_keeps_its_promise_under_replay(clip: dict[str, Any], base: Path) -> None:
    example = EXAMPLE | {"noise_multiplier": 0.8, "clip_norm": 0.1} | clip
    config = _config(base, example=example)
    run = partial(_client, config=config)
    assert audit(run, neighbours(_people(0), ODD)[:5]) == []


def test_v01_a_client_whose_gradients_overflow_keeps_its_promise(base: Path) -> None:
    config = _config(base, example=EXAMPLE | {"noise_multiplier": 0.8, "clip_norm": 0.1})
    run = partial(_client, config=config, spoil=True)
    assert audit(run, neighbours(_people(1), {"longest": ODD["longest"]})) == []


def test_the_harness_sees_a_client_that_clips_at_twice_the_norm(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Shape, "rule", property(lambda shape: Automatic(2 * shape.norms[0])))
    example = EXAMPLE | {"clip": "automatic", "noise_multiplier": 0.8, "clip_norm": 0.1}
    config = _config(base, example=example)
    found = audit(partial(_client, config=config), neighbours(_people(0), ODD)[:3])
    assert {finding.check for finding in found} == {"sensitivity"}


def _server(stage: Stage, updates: list[NDArray[np.float32]], config: Config) -> None:
    promise = client_promise(config)
    assert promise is not None
    watched = stage.watch(promise.mechanism)
    policy = policy_of(promise, {"a": 40, "b": 8}, seed=5)
    for number in range(STEPS):
        adapter = {"a": np.zeros((5, 8), np.float32), "b": np.zeros(8, np.float32)}
        total = PrivateSum(watched, adapter, policy, SecureNoise(), number)
        for i in watched.draw(len(updates), SecureNoise()):
            update = {"a": updates[i][:40].reshape(5, 8), "b": updates[i][40:]}
            total.add(float(i + 1), update)
        stage.emit("model", total.release())
        stage.emit("policy", policy.state())
        stage.emit("decisions", total.decisions())


@pytest.mark.parametrize("clip", ["flat", "quantile", "quantile-per-adapter"])
def test_v25_v26_a_server_keeps_its_promise_under_replay(clip: str, base: Path) -> None:
    settings = {"relation": "add-or-remove-one", "population": 60, "delta": 1e-3, "clip_norm": 0.5}
    config = _config(base, client=settings | {"clip": clip, "noise_multiplier": 1.0})
    rng = np.random.default_rng(5)
    updates = [rng.normal(size=48).astype(np.float32) for _ in range(60)]
    run = partial(_server, config=config)
    assert audit(run, neighbours(updates, dict(extremes(updates[0])))[:10]) == []


def test_rounding_of_the_batch_stays_far_below_the_margin(base: Path) -> None:
    """One row more that adds nothing still moves the others' float32 gradients a little."""
    config = _config(base, example=EXAMPLE | {"noise_multiplier": 0.8, "clip_norm": 0.1})
    promise = example_promise(config)
    assert promise is not None
    rows, worst = _people(2), 0.0

    def run(stage: Stage, given: list[Tokens]) -> None:
        _client(stage, given, config)

    tape = record(run, rows)
    again = replay(run, [*rows, ODD["one token"]], tape)  # nothing to predict: no gradient
    for one, two in zip(tape.releases, again.releases, strict=True):
        gap = sum(float(np.square(two.sums[name] - one.sums[name]).sum()) for name in one.sums)
        worst = max(worst, math.sqrt(gap) / one.blocks[0].clip)
    assert 0.0 < worst < promise.mechanism.margin / 10


def test_v38_one_changed_bit_makes_another_base(base: Path) -> None:
    """Both sides must show the same fingerprint: see ``gather`` in ``server/members.py``."""
    config = _config(base)
    model = attach(load_base(config.model), config.tuning, "causal-lm", 3)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    before = fingerprint(model)
    for parameter in (frozen[0], frozen[-1]):
        flat = parameter.data.view(-1).view(torch.int32)
        flat[-1] ^= 1
        assert fingerprint(model) != before
        flat[-1] ^= 1
    assert fingerprint(model) == before
