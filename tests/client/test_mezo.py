from __future__ import annotations

import gc
import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.adapters import Task, Tensors, attach, read, trainable
from fedtune.client import mezo
from fedtune.client.backprop import LocalRun, groups, steps_of
from fedtune.client.mezo import arena_of, tune
from fedtune.client.worker import Worker
from fedtune.config import DataConfig, ModelConfig, TuningConfig
from fedtune.data import Encoded, encode
from fedtune.errors import FedtuneError
from fedtune.measure import measure
from fedtune.models import Base, load_base
from fedtune.pool.hadamard import HadamardPool
from fedtune.pool.philox import pool_key
from fedtune.seeds import derive
from fedtune.wire import Task as Order
from tests.tiny import TEXTS, bert, jsonl, llama, settings

LABELS = ("no", "yes")


@pytest.fixture(scope="module")
def bases(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Task, Base]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "causal-lm": load_base(ModelConfig(base=str(llama(folder / "l", shared)))),
        "classification": load_base(
            ModelConfig(base=str(bert(folder / "b", shared)), task="classification"), LABELS
        ),
    }


def examples(base: Base, task: Task, count: int = 12) -> Encoded:
    rows = [{"text": TEXTS[n % 6][: 8 + 3 * n], "label": LABELS[n % 2]} for n in range(count)]
    kind = {"causal-lm": "text", "classification": "classification"}[task]
    data = DataConfig.model_validate({"kind": kind, "max_length": 24, "pack": False})
    return encode(rows, base.tokenizer, data, LABELS if kind == "classification" else ())


def tuning_of(**changes: Any) -> TuningConfig:
    probe = {"eps": 1e-3} | changes.pop("probe", {})
    known = {"method": "mezo", "rank": 2, "tokens": 3, "lr": 1e-3, "batch_size": 4}
    return TuningConfig.model_validate(known | changes | {"probe": probe})


def run(
    bases: dict[Task, Base], task: Task = "causal-lm", seed: int = 5, threads: int = 1,
    **changes: Any,
) -> tuple[LocalRun, Tensors, Tensors]:  # fmt: skip
    base, tuning = bases[task], tuning_of(**changes)
    model = attach(base, tuning, task, seed=1)
    before = read(model)
    ran = tune(
        model, examples(base, task), tuning, task, lr=tuning.lr, seed=seed, pad_id=base.pad_id,
        threads=threads,
    )  # fmt: skip
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    return ran, before, read(model)


def same(one: Tensors, other: Tensors) -> bool:
    return all(np.array_equal(one[n], other[n]) for n in one)


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize(
    ("task", "adapter", "lr"),
    [
        ("causal-lm", "full", 1e-2),
        ("causal-lm", "lora", 3e-2),
        ("causal-lm", "prefix", 0.1),
        ("causal-lm", "prompt", 30.0),
        ("classification", "lora", 3e-2),
        ("classification", "full", 2e-2),
    ],
)
def test_the_loss_goes_down(bases: dict[Task, Base], task: Task, adapter: str, lr: float) -> None:
    base = bases[task]
    tuning = tuning_of(
        adapter=adapter, lr=lr, steps=40, batch_size=12, probe={"count": 4, "eps": 1e-2}
    )
    model, data = attach(base, tuning, task, seed=1), examples(base, task)

    def loss() -> float:
        seen = measure(model, data, task, batch_size=12, pad_id=base.pad_id)
        return seen.loss / seen.units

    before = loss()
    ran = tune(model, data, tuning, task, lr=lr, seed=1, pad_id=base.pad_id)
    assert (ran.steps, ran.passes) == (40, 40 * 4 * 2)
    assert loss() < before - 0.01
    assert loss() < ran.loss < before + 0.01


@pytest.mark.parametrize("step", ["normalised", "curvature"])
def test_other_steps_learn_too(bases: dict[Task, Base], step: str) -> None:
    lr = {"normalised": 3e-5, "curvature": 1e-3}[step]
    changes = {"adapter": "full", "steps": 30, "batch_size": 12, "lr": lr}
    ran, before, after = run(bases, probe={"count": 8, "step": step}, **changes)
    assert ran.passes == 30 * (16 + (step == "curvature"))
    few, _, _ = run(bases, probe={"count": 8, "step": step}, **(changes | {"steps": 1}))
    assert ran.loss < few.loss - 0.01
    assert not same(before, after)


def test_accuracy_is_improved_where_it_has_no_gradient(bases: dict[Task, Base]) -> None:
    task: Task = "classification"
    tuning = tuning_of(
        adapter="full", lr=1e-3, steps=60, batch_size=12,
        probe={"count": 8, "eps": 2e-2, "objective": "accuracy"},
    )  # fmt: skip
    base = bases[task]
    model, data = attach(base, tuning, task, seed=1), examples(base, task)

    def correct() -> int:
        return measure(model, data, task, batch_size=12, pad_id=base.pad_id, labels=2).correct

    before = correct()
    ran = tune(model, data, tuning, task, lr=tuning.lr, seed=1, pad_id=base.pad_id)
    assert correct() >= before + 3
    assert 0.1 < ran.loss < 2.0, "the figure is the loss in nats, whatever is improved"


# ---------------------------------------------------------------- the same again


def test_the_same_seed_gives_the_same_bits(bases: dict[Task, Base]) -> None:
    first, _, one = run(bases, adapter="full", probe={"count": 2})
    torch.manual_seed(0)
    again, _, other = run(bases, adapter="full", probe={"count": 2}, threads=2)
    assert same(one, other)
    assert first == again
    assert not same(one, run(bases, adapter="full", probe={"count": 2}, seed=6)[2])


def test_batched_and_single_probes_lead_to_one_place(bases: dict[Task, Base]) -> None:
    changes: dict[str, Any] = {"adapter": "lora", "steps": 4, "lr": 1e-3}
    single, before, one = run(bases, probe={"count": 3, "batched": 1, "eps": 1e-2}, **changes)
    batched, _, other = run(bases, probe={"count": 3, "batched": 0, "eps": 1e-2}, **changes)
    assert single.passes == batched.passes == 4 * 6
    moved = max(float(np.abs(one[n] - before[n]).max()) for n in one)
    assert moved > 1e-4
    for name in one:
        np.testing.assert_allclose(other[name], one[name], atol=0.02 * moved)


def test_the_step_is_along_the_probed_directions(bases: dict[Task, Base]) -> None:
    ran, before, after = run(bases, adapter="full", steps=2, probe={"count": 2})
    key = b"".join(derive(5, "directions", part).to_bytes(8) for part in (0, 1))
    pool = HadamardPool(pool_key(key, 0), mezo.POOL)
    moved = np.concatenate([(after[n] - before[n]).ravel() for n in sorted(after)])
    # The model's matrices are tied or not: what is read stands in the order of the arena.
    z = torch.stack([pool.direction(k, len(moved)) for k in range(4)]).double().numpy()
    along = z @ moved / len(moved)
    rest = moved - along @ z
    assert ran.steps == 2
    assert np.abs(rest).max() < 1e-6
    assert np.abs(along).min() > 1e-7


def test_batches_come_in_the_order_of_backpropagation(
    bases: dict[Task, Base], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    real = mezo.see

    def spy(model: Any, batch: dict[str, torch.Tensor], task: Task) -> Any:
        seen.append(batch["input_ids"])
        return real(model, batch, task)

    monkeypatch.setattr(mezo, "see", spy)
    ran, _, _ = run(bases, accumulate=2, epochs=2.0, probe={"batched": 1})
    base, tuning = bases["causal-lm"], tuning_of(accumulate=2, epochs=2.0)
    data = examples(base, "causal-lm")
    total = steps_of(len(data.ids), tuning)
    wanted = [
        batch["input_ids"]
        for group in groups(data, tuning, "causal-lm", total, 5, base.pad_id)
        for _ in range(2)
        for batch in group
    ]
    assert (ran.steps, ran.passes) == (total, len(wanted))
    assert all(torch.equal(one, other) for one, other in zip(seen, wanted, strict=True))


def test_weight_decay_shrinks_what_no_slope_holds(bases: dict[Task, Base]) -> None:
    _, before, after = run(bases, adapter="full", steps=3, lr=1e-9, weight_decay=1e7)
    for name in before:
        np.testing.assert_allclose(after[name], before[name] * 0.99**3, atol=1e-6)


# ---------------------------------------------------------------- what goes wrong


def test_a_model_that_is_broken_at_the_start_stays_where_it_is(
    bases: dict[Task, Base],
) -> None:
    tuning, base = tuning_of(adapter="lora", steps=2), bases["causal-lm"]
    model = attach(base, tuning, "causal-lm", seed=1)
    with torch.no_grad():
        next(iter(trainable(model).values())).fill_(math.nan)
    before = read(model)
    ran = tune(
        model, examples(base, "causal-lm"), tuning, "causal-lm", lr=1.0, seed=1,
        pad_id=base.pad_id,
    )  # fmt: skip
    assert math.isnan(ran.loss)
    for name, value in read(model).items():
        np.testing.assert_array_equal(np.isnan(value), np.isnan(before[name]))


# ---------------------------------------------------------------- the arena, and the worker


def test_the_arena_is_made_once_and_goes_with_its_model(bases: dict[Task, Base]) -> None:
    model = attach(bases["causal-lm"], tuning_of(), "causal-lm", seed=1)
    arena = arena_of(model)
    assert arena_of(model) is arena
    name, first = next(iter(trainable(model).items()))
    first.data = first.data.clone()
    other = arena_of(model)
    assert other is not arena
    span = next(span for span in other.layout.spans if span.name == name)
    other.flat[span.start] = 7.0
    assert first.flatten()[0] == 7.0
    gone = weakref.ref(model)
    del model, first
    gc.collect()
    assert gone() is None


def order(worker: Worker, tensors: Tensors, number: int = 1) -> Order:
    return Order(
        job="j", round=number, attempt=1, committed=0, lr=worker.config.tuning.lr, tensors=tensors
    )


def test_a_worker_tunes_by_forward_passes(shared: Path, tmp_path: Path) -> None:
    base, rows = llama(tmp_path / "m", shared), jsonl(tmp_path / "rows.jsonl")
    config = settings(
        rows, base, tuning={"method": "mezo", "lr": 1e-3, "steps": 3, "probe": {"count": 2}}
    )
    worker = Worker(config)
    start = read(worker._first)
    update = worker.train(0, order(worker, start))
    assert update.steps == 3
    assert any(np.abs(value).max() > 0 for value in update.tensors.values())
    again = Worker(config).train(0, order(worker, start))
    assert same(update.tensors, again.tensors)
    other = worker.train(0, order(worker, start, number=2))
    assert not same(update.tensors, other.tensors)
    broken = {name: np.full_like(value, math.nan) for name, value in start.items()}
    with pytest.raises(FedtuneError, match="is not finite"):
        worker.train(0, order(worker, broken))
