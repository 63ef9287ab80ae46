"""Private coefficients: settings without a budget, and errors, are refused before a draw."""

from typing import Any

import pytest
import torch
from torch import nn

from fedtune.client.private_probes import (
    Projector,
    tune_by_probes_privately,
)
from fedtune.client.walker import Walker
from fedtune.errors import ExitCode, FedtuneError
from fedtune.pool.hadamard import HadamardPool
from fedtune.pool.layout import Layout
from fedtune.privacy.noise import SecureNoise
from fedtune.privacy.plan import client_promise
from tests.client.straight import (
    PROJECTED,
    STEPS,
    D,
    config_of,
    everyone,
    promise_of,
    rows_of,
    straight,
    unchecked,
)


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"tuning": {"probe": {"count": 2, "step": "normalised"}}}, "step='normalised'"),
        ({"tuning": {"probe": {"count": 2, "step": "curvature"}}}, "step='curvature'"),
        ({"tuning": {"probe": {"objective": "f1"}}}, "objective='f1'"),
        ({"tuning": {"weight_decay": 0.1}}, "weight_decay=0.1"),
        ({"tuning": {"momentum": 0.9}}, "momentum=0.9"),
        ({"example": {"clip": "automatic"}}, "clip='automatic'"),
        ({"example": {"clip": "per-adapter"}}, "clip='per-adapter'"),
    ],
)
def test_settings_that_have_no_budget_are_refused(tables: dict[str, Any], said: str) -> None:
    with pytest.raises(FedtuneError, match=said) as caught:
        straight(None, [], unchecked(**tables))
    assert caught.value.code == ExitCode.CONFIG
    assert caught.value.hint


def test_the_projected_engine_refuses_what_it_would_not_do() -> None:
    seedpool = {"method": "seedpool"}
    with pytest.raises(FedtuneError, match="optimizer='adamw'"):
        straight(None, [], unchecked(tuning=seedpool), projected=True)
    config = unchecked(tuning=seedpool | {"probe": {"objective": "accuracy"}, "optimizer": "sgd"})
    with pytest.raises(FedtuneError, match="objective='accuracy'"):
        straight(None, [], config, projected=True)
    config = config_of(tuning=PROJECTED)
    with pytest.raises(FedtuneError, match="direction 64 of 64"):
        straight(None, [], config, projected=True, directions=[[64]] * STEPS)


@pytest.mark.parametrize("directions", [[[0]] * (STEPS - 1), [[0]] * (STEPS + 1), [[]] * STEPS])
def test_every_release_has_its_directions(directions: list[list[int]]) -> None:
    with pytest.raises(FedtuneError, match="sets of directions for 8 releases"):
        straight(None, [], config_of(), directions=directions)


def test_a_promise_about_clients_is_another_one() -> None:
    client = {"relation": "add-or-remove-one", "population": 50, "delta": 1e-3,
              "noise_multiplier": 1.0}  # fmt: skip
    config = config_of()
    privacy = config.privacy.model_validate({"client": client})
    promise = client_promise(config.model_copy(update={"privacy": privacy}))
    assert promise is not None
    with pytest.raises(FedtuneError, match="a promise about each client"):
        tune_by_probes_privately(
            Walker(HadamardPool(1, 8), torch.zeros(4)), lambda b: torch.zeros(1), rows_of([]),
            config, promise, SecureNoise(), [], lr=0.1, clip_norm=1.0, pad_id=0,
        )  # fmt: skip


def test_a_projector_wants_the_parameters_of_its_layout() -> None:
    layer = nn.Linear(3, 2)
    layout = Layout.of(layer.named_parameters())
    with pytest.raises(FedtuneError, match="'bias' of the layout is missing"):
        Projector(HadamardPool(1, 8), layout, {"weight": layer.weight})
    layer.bias.requires_grad_(False)
    with pytest.raises(FedtuneError, match="or frozen"):
        Projector(HadamardPool(1, 8), layout, dict(layer.named_parameters()))


def test_an_error_leaves_the_weights_where_they_were() -> None:
    weights = torch.zeros(D)
    calls = []

    def score(batch: Any) -> torch.Tensor:
        calls.append(float(weights.abs().max()))
        raise OSError("the disk is gone")

    config = everyone()
    with pytest.raises(OSError, match="the disk is gone"):
        tune_by_probes_privately(
            Walker(HadamardPool(1, 64), weights), score, rows_of([[1, 2]]), config,
            promise_of(config), SecureNoise(), [[1, 2, 3, 4]], lr=0.1, clip_norm=1.0, pad_id=0,
        )  # fmt: skip
    assert calls == [0.5]
    assert not weights.any()
    with pytest.raises(FedtuneError, match="scores of shape"):
        tune_by_probes_privately(
            Walker(HadamardPool(1, 64), weights), lambda b: torch.zeros(2), rows_of([[1, 2]]),
            config, promise_of(config), SecureNoise(), [[1, 2]], lr=0.1, clip_norm=1.0, pad_id=0,
        )  # fmt: skip
