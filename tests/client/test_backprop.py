from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedtune.adapters import Task, Tensors, attach, read, trainable
from fedtune.client.backprop import LocalRun, optimizer, steps_of, tune
from fedtune.client.memory import recall, remember
from fedtune.config import DataConfig, ModelConfig, TuningConfig
from fedtune.data import Encoded, encode
from fedtune.models import Base, load_base
from tests.tiny import TEXTS, bert, llama

LABELS = ("no", "yes")


@pytest.fixture(params=["causal-lm", "classification"], scope="module")
def base(
    request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Base, Task]:
    made = {"causal-lm": llama, "classification": bert}[request.param]
    folder = made(tmp_path_factory.mktemp("model") / "m", shared)
    model = ModelConfig(base=str(folder), task=request.param)
    return load_base(model, LABELS if request.param == "classification" else ()), request.param


def examples(base: Base, task: Task, count: int = 16) -> Encoded:
    rows = [{"text": TEXTS[n % 6][: 8 + 3 * n], "label": LABELS[n % 2]} for n in range(count)]
    kind = {"causal-lm": "text", "classification": "classification"}[task]
    data = DataConfig.model_validate({"kind": kind, "max_length": 24, "pack": False})
    return encode(rows, base.tokenizer, data, LABELS if kind == "classification" else ())


def run(base: tuple[Base, Task], seed: int = 5, **changes: Any) -> tuple[LocalRun, Tensors]:
    tuning = TuningConfig(**({"rank": 2, "lr": 0.01, "batch_size": 8} | changes))
    model = attach(base[0], tuning, base[1], seed=1)
    found = examples(*base)
    optim = optimizer(model, tuning, tuning.lr)
    ran = tune(model, found, tuning, base[1], optim, seed=seed, pad_id=base[0].pad_id)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    return ran, read(model)


def same(one: Tensors, other: Tensors) -> bool:
    return all(np.array_equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("chosen", ["sgd", "adamw"])
def test_accumulating_changes_memory_and_not_the_result(
    base: tuple[Base, Task], chosen: str
) -> None:
    more = {"optimizer": chosen, "lr": 0.5 if chosen == "sgd" else 0.001, "max_grad_norm": 1.0}
    whole, at_once = run(base, batch_size=8, **more)
    parts, in_two = run(base, batch_size=4, accumulate=2, **more)
    assert (whole.steps, parts.steps) == (2, 2)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    for name in at_once:
        np.testing.assert_allclose(in_two[name], at_once[name], atol=1e-6)


def test_the_same_seed_gives_the_same_bits(base: tuple[Base, Task]) -> None:
    _, one = run(base, dropout=0.2)
    torch.manual_seed(0)
    assert same(one, run(base, dropout=0.2)[1])
    assert not same(one, run(base, dropout=0.2, seed=6)[1])


@pytest.mark.parametrize("chosen", ["sgd", "adamw"])
def test_more_steps_lower_the_loss(base: tuple[Base, Task], chosen: str) -> None:
    lr = {"sgd": 0.1, "adamw": 0.01}[chosen]
    few, _ = run(base, optimizer=chosen, lr=lr, momentum=0.5, steps=1, batch_size=16)
    many, _ = run(base, optimizer=chosen, lr=lr, momentum=0.5, steps=12, batch_size=16)
    assert (few.steps, many.steps) == (1, 12)
    assert many.loss < few.loss


@pytest.mark.parametrize(
    ("examples", "changes", "steps"),
    [
        (100, {"batch_size": 8}, 13),
        (100, {"batch_size": 8, "accumulate": 4}, 4),
        (100, {"batch_size": 8, "epochs": 0.5}, 7),
        (1, {"batch_size": 8, "epochs": 0.01}, 1),
        (16, {"batch_size": 8, "epochs": 2.5}, 5),
        (100, {"batch_size": 8, "steps": 3, "epochs": 9.0}, 3),
    ],
)
def test_steps(examples: int, changes: dict[str, Any], steps: int) -> None:
    assert steps_of(examples, TuningConfig(**changes)) == steps


def test_a_fraction_of_a_pass_sees_a_fraction(base: tuple[Base, Task]) -> None:
    found, changed = run(base, epochs=0.25, batch_size=3)
    assert found.steps == 2
    assert not same(changed, read(attach(base[0], TuningConfig(rank=2), base[1], seed=1)))


# ---------------------------------------------------------------- memory


def train(model: nn.Module, optim: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in trainable(model).values():
        parameter.grad = torch.randn_like(parameter)
    optim.step()


@pytest.mark.parametrize("changes", [{}, {"optimizer": "sgd", "momentum": 0.9}])
def test_a_state_goes_on_as_if_never_stopped(
    base: tuple[Base, Task], tmp_path: Path, changes: dict[str, Any]
) -> None:
    tuning = TuningConfig(rank=2, **changes)
    found = []
    for stopped in (False, True):
        model = attach(base[0], tuning, base[1], seed=1)
        optim = optimizer(model, tuning, 0.01)
        train(model, optim, 1)
        train(model, optim, 2)
        if stopped:
            remember(tmp_path, optim, after=1)
            optim = optimizer(model, tuning, 0.01)
            recall(tmp_path, optim, before=2, committed=1)
        train(model, optim, 3)
        found.append(read(model))
    assert same(*found)


def names(folder: Path) -> list[str]:
    return sorted(path.name[6:12] for path in folder.iterdir())


def test_what_is_kept_and_what_is_dropped(base: tuple[Base, Task], tmp_path: Path) -> None:
    tuning = TuningConfig(rank=2)
    model = attach(base[0], tuning, base[1], seed=1)
    steps: dict[int, float] = {}
    optim = optimizer(model, tuning, 0.01)
    for number in (1, 2, 4, 6, 7):
        train(model, optim, number)
        remember(tmp_path, optim, after=number)
        steps[number] = float(next(iter(optim.state.values()))["step"])

    def recalled(before: int, committed: int) -> float | None:
        fresh = optimizer(model, tuning, 0.01)
        recall(tmp_path, fresh, before=before, committed=committed)
        state = next(iter(fresh.state.values()), None)
        return None if state is None else float(state["step"])

    # Round 7 runs again: its own state is of a lost future. 4 is the newest durable one.
    assert recalled(7, 5) == steps[6]
    assert names(tmp_path) == ["000004", "000006"]
    # Back to the last committed round.
    assert recalled(6, 5) == steps[4]
    assert names(tmp_path) == ["000004"]
    assert recalled(3, 2) is None
    assert names(tmp_path) == []
    assert recalled(1, 0) is None


def test_an_optimiser_without_state_leaves_no_file(base: tuple[Base, Task], tmp_path: Path) -> None:
    tuning = TuningConfig(rank=2, optimizer="sgd")
    model = attach(base[0], tuning, base[1], seed=1)
    optim = optimizer(model, tuning, 0.01)
    train(model, optim, 1)
    remember(tmp_path, optim, after=1)
    assert names(tmp_path) == []
