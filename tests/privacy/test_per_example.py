"""Per-example gradients against single-example backward passes that know nothing of them."""

import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from fedtune.adapters import trainable
from fedtune.errors import FedtuneError
from fedtune.privacy.clipping import Flat, PerBlock, adapter_blocks
from fedtune.privacy.per_example import PerExample, refuse_coupling
from tests.privacy.networks import (
    METHODS,
    by_hand,
    close,
    data,
    losses,
    network,
    reference,
    rules,
    task_of,
    tuned,
    worst,
)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ---------------------------------------------------------------- exact, on every family


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_gradients_are_those_of_single_examples(family: str, method: str) -> None:
    task = task_of(family)
    model = tuned(family, method).train()
    batch = data(model, task)
    engine = PerExample(model)
    expected = reference(model, batch, task)
    assert worst(engine.gradients(losses(model, task), batch), expected) < 1e-5
    proof = engine.prove(task)
    assert proof.mode == "fast"
    assert proof.error < 1e-5
    for rule in rules(engine):
        found = engine.clipped_sum(losses(model, task), batch, rule)
        assert close(found.sums, by_hand(expected, rule))


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_the_loop_says_the_same(family: str) -> None:
    task = task_of(family)
    model = tuned(family, "lora")
    batch = data(model, task)
    loop, fast = PerExample(model, loop=True), PerExample(model)
    assert (loop.mode, fast.mode) == ("loop", "fast")
    for rule in rules(fast):
        one = loop.clipped_sum(losses(model, task), batch, rule)
        other = fast.clipped_sum(losses(model, task), batch, rule)
        assert close(one.sums, other.sums)
        assert torch.allclose(one.norms, other.norms, rtol=1e-5, atol=1e-6)
        assert torch.allclose(one.losses, other.losses, rtol=1e-5)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}])
def test_variants_of_lora(options: dict[str, bool]) -> None:
    model = tuned("llama", "lora", **options)
    engine = PerExample(model)
    proof = engine.prove("causal-lm")
    # DoRA uses its matrices outside of their layers: there is no shortcut.
    assert (proof.mode == "loop") == ("use_dora" in options)
    batch = data(model, "causal-lm")
    found = engine.gradients(losses(model, "causal-lm"), batch)
    assert worst(found, reference(model, batch, "causal-lm")) < 1e-5


@pytest.mark.parametrize("method", ["bias", "loha", "p_tuning", "adalora"])
def test_other_methods_are_exact_too(method: str) -> None:
    options = {"p_tuning": {"num_virtual_tokens": 3, "encoder_hidden_size": 8}}.get(method, {})
    family = "bert" if method == "bias" else "llama"
    if method in ("loha", "adalora"):
        options = {"target_modules": ["q_proj"]} | (
            {"total_step": 9} if method == "adalora" else {}
        )
    model, task = tuned(family, method, **options), task_of(family)
    engine = PerExample(model)
    engine.prove(task)
    batch = data(model, task)
    expected = reference(model, batch, task)
    assert worst(engine.gradients(losses(model, task), batch), expected) < 1e-5


def test_v19_tied_weights_are_counted_once() -> None:
    tied = network("gpt2").requires_grad_(True)
    assert tied.lm_head.weight is tied.transformer.wte.weight
    engine = PerExample(tied)
    assert "lm_head.weight" not in engine.names
    batch = data(tied, "causal-lm")
    expected = reference(tied, batch, "causal-lm")
    assert worst(engine.gradients(losses(tied, "causal-lm"), batch), expected) < 1e-5
    blocks = tuple((name,) for name in engine.names)
    rule = PerBlock(blocks, (0.01,) * len(blocks))
    found = engine.clipped_sum(losses(tied, "causal-lm"), batch, rule)
    assert close(found.sums, by_hand(expected, rule))


# ---------------------------------------------------------------- the loss of an example


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
@pytest.mark.parametrize("method", ["full", "lora", "prompt"])
def test_v06_neighbours_change_nothing(family: str, method: str) -> None:
    task = task_of(family)
    model = tuned(family, method)
    engine = PerExample(model)
    mine = losses(model, task)
    whole = data(model, task, (5, 7, 12, 3))
    before = engine.gradients(mine, {name: value[:2, ...] for name, value in whole.items()})
    grown = engine.gradients(mine, whole)  # two more, one of them longer than all
    other = {name: value.clone() for name, value in whole.items()}
    other["input_ids"][1:] = 60 - other["input_ids"][1:]
    other["input_ids"].masked_fill_(other["attention_mask"] == 0, 0)
    changed = engine.gradients(mine, other)
    for name in engine.names:
        assert torch.allclose(before[name][0], grown[name][0], rtol=1e-4, atol=1e-6)
        assert torch.allclose(before[name][1], grown[name][1], rtol=1e-4, atol=1e-6)
        assert torch.allclose(grown[name][0], changed[name][0], rtol=1e-4, atol=1e-6)


def test_v06_an_example_without_targets_has_no_loss() -> None:
    model = tuned("llama", "lora")
    batch = data(model, "causal-lm", (6, 5))
    batch["labels"][1] = -100
    found = PerExample(model).clipped_sum(losses(model, "causal-lm"), batch, Flat(1.0))
    assert float(found.losses[1]) == 0.0
    assert found.norms[1].tolist() == [0.0]
    assert found.dropped == 0


def test_v20_models_that_couple_examples_are_refused() -> None:
    with pytest.raises(FedtuneError, match="normalises over the batch"):
        PerExample(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    balanced = network("llama")
    balanced.config.output_router_logits = True
    with pytest.raises(FedtuneError, match="balanced"):
        refuse_coupling(balanced)


class Coupled(nn.Module):
    """Subtracts the mean over the batch: nothing in its layers gives that away."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network("llama")
        self.config = self.inner.config

    def forward(self, **inputs: torch.Tensor) -> Any:
        found = self.inner(**inputs)
        found.logits = found.logits - found.logits.mean(0, keepdim=True)
        return found


def test_v20_hidden_coupling_is_found_and_taken_apart() -> None:
    model = Coupled()
    engine = PerExample(model)
    assert engine.mode == "fast"
    with pytest.warns(UserWarning, match="one backward pass for each example"):
        proof = engine.prove("causal-lm")
    assert proof.mode == engine.mode == "loop"
    assert "differ" in proof.reason
    batch = data(model, "causal-lm")
    other = batch | {"input_ids": batch["input_ids"].clone()}
    other["input_ids"][1, :4] = 9
    one, two = (engine.gradients(losses(model, "causal-lm"), b) for b in (batch, other))
    assert all(torch.equal(one[n][0], two[n][0]) for n in engine.names)


# ---------------------------------------------------------------- clipping


def test_v05_each_example_is_clipped_and_not_their_mean() -> None:
    model = tuned("llama", "lora")
    engine, mine = PerExample(model), losses(model, "causal-lm")
    batch = data(model, "causal-lm")
    for rule in rules(engine):
        parts = [engine.clipped_sum(mine, {n: v[i : i + 1] for n, v in batch.items()}, rule)
                 for i in range(4)]  # fmt: skip
        for part in parts:
            for block, bound in zip(rule.blocks(engine.names), rule.norms, strict=True):
                size = torch.stack([part.sums[n].double().square().sum() for n in block]).sum()
                assert float(size.sqrt()) <= bound * (1 + 1e-5)
        whole = engine.clipped_sum(mine, batch, rule)
        added = {n: sum(part.sums[n] for part in parts) for n in engine.names}
        assert close(added, whole.sums)  # type: ignore[arg-type]


def test_v05_the_sensitivity_is_reached() -> None:
    model = tuned("llama", "lora")
    engine = PerExample(model)
    blocks = adapter_blocks(engine.names)
    rule = PerBlock(blocks, (1e-4,) * len(blocks))
    batch = data(model, "causal-lm", (8,))
    found = engine.clipped_sum(losses(model, "causal-lm"), batch, rule)
    assert bool((found.norms > 1e-4).all())
    size = math.sqrt(sum(float(g.double().square().sum()) for g in found.sums.values()))
    assert size == pytest.approx(rule.sensitivity, rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "full", "ia3"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_v21_micro_batches_change_nothing(method: str, size: int) -> None:
    model = tuned("gpt2", method)
    engine, mine = PerExample(model), losses(model, "causal-lm")
    batch = data(model, "causal-lm", (9, 4, 6, 2, 8))
    for rule in rules(engine):
        whole = engine.clipped_sum(mine, batch, rule)
        total = {n: torch.zeros(g.shape, dtype=torch.float64) for n, g in whole.sums.items()}
        norms, count = [], 0
        for at in range(0, 5, size):
            part = engine.clipped_sum(mine, {n: v[at : at + size] for n, v in batch.items()}, rule)
            for name, grad in part.sums.items():
                total[name] += grad
            norms.append(part.norms)
            count += part.count
        assert close({n: g.float() for n, g in total.items()}, whole.sums)
        assert torch.allclose(torch.cat(norms), whole.norms, rtol=1e-5, atol=1e-6)
        assert count == whole.count == 5


@pytest.mark.parametrize("loop", [False, True])
def test_v14_an_empty_batch_gives_zeros_without_a_call(loop: bool) -> None:
    model = tuned("gpt2", "full")
    batch = {name: value[:0] for name, value in data(model, "causal-lm").items()}

    def never(batch: Any) -> torch.Tensor:
        raise AssertionError("the model was called")

    engine = PerExample(model, loop=loop)
    for rule in rules(engine):
        found = engine.clipped_sum(never, batch, rule)
        assert found.sums.keys() == trainable(model).keys()
        assert all(g.eq(0.0).all() for g in found.sums.values())
        assert found.norms.shape == (0, len(rule.norms))
        assert (found.count, found.dropped) == (0, 0)


# ---------------------------------------------------------------- numbers that are none


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf, 3e38, 1e25])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_v03_a_bad_example_adds_exactly_nothing(method: str, factor: float, loop: bool) -> None:
    model = tuned("gpt2", method)
    engine, mine = PerExample(model, loop=loop), losses(model, "causal-lm")
    batch = data(model, "causal-lm")
    good = {name: value[[0, 1, 3]] for name, value in batch.items()}

    def poisoned(batch: Any) -> torch.Tensor:
        third = (batch["input_ids"][:, :2] == start).all(1)
        return mine(batch) * torch.where(third, factor, 1.0)

    start = batch["input_ids"][2, :2]
    for rule in rules(engine):
        found = engine.clipped_sum(poisoned, batch, rule)
        clean = engine.clipped_sum(mine, good, rule)
        assert (found.count, found.dropped, clean.dropped) == (4, 1, 0)
        assert all(torch.isfinite(g).all() for g in found.sums.values())
        assert close(found.sums, clean.sums, most=1e-7)
        only = engine.clipped_sum(poisoned, {n: v[2:3] for n, v in batch.items()}, rule)
        assert all(g.eq(0.0).all() for g in only.sums.values())


class Poison(torch.autograd.Function):
    """Identity whose gradient is NaN for one example."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: int) -> torch.Tensor:
        ctx.index = index
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.clone()
        grad[ctx.index, 0, 0] = math.nan
        return grad, None


def test_v03_a_number_that_spoils_the_first_layers_only() -> None:
    # The last layers were clipped and added before the first ones turn out to be bad.
    model = tuned("llama", "lora")
    engine, mine = PerExample(model), losses(model, "causal-lm")
    batch = data(model, "causal-lm")
    layers: Any = next(m for m in model.modules() if type(m).__name__ == "LlamaModel").layers
    poison = layers[0].register_forward_hook(lambda _m, _i, out: Poison.apply(out, 2))
    for rule in rules(engine):
        found = engine.clipped_sum(mine, batch, rule)
        assert found.dropped == 1
        poison.remove()
        clean = engine.clipped_sum(mine, {n: v[[0, 1, 3]] for n, v in batch.items()}, rule)
        poison = layers[0].register_forward_hook(lambda _m, _i, out: Poison.apply(out, 2))
        assert close(found.sums, clean.sums, most=1e-7)


def test_v11_sixteen_bit_models_do_not_overshoot() -> None:
    model = tuned("llama", "lora").to(torch.bfloat16)
    engine, mine = PerExample(model), losses(model, "causal-lm")
    assert engine.prove("causal-lm").mode == "fast"
    batch = data(model, "causal-lm")
    for i in range(4):
        row = {n: v[i : i + 1] for n, v in batch.items()}
        found = engine.clipped_sum(mine, row, Flat(1e-3))
        size = math.sqrt(sum(float(g.double().square().sum()) for g in found.sums.values()))
        assert all(g.dtype == torch.float32 for g in found.sums.values())
        assert size == pytest.approx(1e-3, rel=1e-5)


def test_v11_long_vectors_do_not_overshoot() -> None:
    # A plain float32 norm of these 4 million equal numbers is 3e-3 too small.
    model = nn.Linear(2000, 2000, bias=False)
    engine = PerExample(model)
    batch = {"x": torch.full((2, 2000), 0.01)}
    found = engine.clipped_sum(lambda b: model(b["x"]).sum(1), batch, Flat(1.0))
    size = float(found.sums["weight"].double().norm()) / 2
    assert 1 - 1e-5 < size <= 1 + 1e-5
