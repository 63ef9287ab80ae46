"""What attaching leaves behind, and what does not fit: noticed, and done one by one."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.adapters import attach, trainable
from fedtune.config import TuningConfig
from fedtune.errors import FedtuneError
from fedtune.models import Base
from fedtune.privacy.clipping import Flat
from fedtune.privacy.per_example import ClippedSum, PerExample, example_losses
from tests.privacy.networks import (
    METHODS,
    by_hand,
    close,
    data,
    losses,
    network,
    reference,
    rules,
    tuned,
    worst,
)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ---------------------------------------------------------------- the model is left alone


def snapshot(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name] = (sorted(module.__dict__), module.training,
                       len(module._forward_hooks), len(module._backward_hooks))  # fmt: skip
    for name, parameter in model.named_parameters():
        found[f"p:{name}"] = (sorted(parameter.__dict__), parameter.detach().clone())
    return found


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(value[1], right[name][1]) and value[0] == right[name][0]
        if name.startswith("p:")
        else value == right[name]
        for name, value in left.items()
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_left_as_found(method: str, training: bool) -> None:
    model = tuned("gpt2", method).train(training)
    model.get_submodule("base_model" if method != "full" else "transformer").train(not training)
    marks = {name: torch.full_like(p, 3.0) for name, p in trainable(model).items()}
    for name, parameter in trainable(model).items():
        parameter.grad = marks[name]
    before = snapshot(model)
    engine = PerExample(model)
    assert engine.prove("causal-lm").mode == "fast"
    for rule in rules(engine):
        engine.clipped_sum(losses(model, "causal-lm"), data(model, "causal-lm"), rule)
    assert same(before, snapshot(model))
    for name, parameter in trainable(model).items():
        assert parameter.grad is marks[name]
        assert parameter.grad.eq(3.0).all()


@pytest.mark.parametrize("method", ["lora", "prompt", "layernorm"])
def test_attached_is_the_same_and_harmless_outside_a_call(method: str) -> None:
    model = tuned("llama", method)
    engine, mine = PerExample(model), losses(model, "causal-lm")
    batch = data(model, "causal-lm")
    before = engine.clipped_sum(mine, batch, Flat(0.2))
    untouched = mine(batch)
    with engine.attached():
        inside = engine.clipped_sum(mine, batch, Flat(0.2))
        again = engine.clipped_sum(mine, batch, Flat(0.2))
        assert torch.equal(mine(batch), untouched)
        mine(batch).sum().backward()
    plain = {name: p.grad for name, p in trainable(model).items()}
    summed = {name: g.sum(0) for name, g in engine.gradients(mine, batch).items()}
    assert close(plain, summed, most=1e-5)  # type: ignore[arg-type]
    assert close(before.sums, inside.sums, most=1e-7)
    assert close(inside.sums, again.sums, most=1e-7)


def test_an_error_inside_leaves_no_trace() -> None:
    model = tuned("llama", "layernorm")
    engine = PerExample(model)
    before = snapshot(model)

    def broken(batch: Any) -> torch.Tensor:
        example_losses(model, batch, "causal-lm")
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        engine.clipped_sum(broken, data(model, "causal-lm"), Flat(1.0))
    assert same(before, snapshot(model))
    found = engine.clipped_sum(losses(model, "causal-lm"), data(model, "causal-lm"), Flat(1.0))
    assert isinstance(found, ClippedSum)


# ---------------------------------------------------------------- what does not fit


def test_a_weight_used_behind_our_back_is_noticed() -> None:
    model = tuned("llama", "lora")
    name, weight = next(iter(trainable(model).items()))
    mine = losses(model, "causal-lm")

    def regularised(batch: Any) -> torch.Tensor:
        return mine(batch) + weight.square().sum()

    engine = PerExample(model)
    batch = data(model, "causal-lm")
    with pytest.raises(FedtuneError, match="outside of its layer"):
        engine.clipped_sum(regularised, batch, Flat(1.0))
    assert engine.prove("causal-lm", regularised).mode == "loop"
    found = engine.gradients(regularised, batch)
    expected = reference(model, batch, "causal-lm")
    assert torch.allclose(found[name], expected[name] + 2 * weight.detach(), atol=1e-5)


class Mixed(nn.Module):
    """Gives a layer all tokens of all examples as one long list."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, 8)
        self.layer = nn.Linear(8, 61)
        self.config = LlamaConfig(vocab_size=61, pad_token_id=0)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        del attention_mask
        hidden = self.embed(input_ids)
        logits = self.layer(hidden.flatten(0, 1)).view(*input_ids.shape, -1)
        return type("Output", (), {"logits": logits})


def test_a_layer_that_mixes_examples_is_found() -> None:
    model = Mixed()
    engine = PerExample(model)
    assert engine.prove("causal-lm").mode == "loop"
    assert "36, 61, 8) for 3 examples" in engine.reason
    batch = data(model, "causal-lm")
    expected = reference(model, batch, "causal-lm")
    assert worst(engine.gradients(losses(model, "causal-lm"), batch), expected) < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_exact(reentrant: bool) -> None:
    base = network("llama").requires_grad_(False)
    model = attach(Base(base, None, 0), TuningConfig(rank=2), "causal-lm", seed=1).train()
    batch = data(model, "causal-lm")
    expected = reference(model, batch, "causal-lm")
    inner: Any = next(m for m in model.modules() if isinstance(m, LlamaForCausalLM))
    inner.gradient_checkpointing_enable({"use_reentrant": reentrant})
    inner.enable_input_require_grads()
    engine = PerExample(model)
    for rule in rules(engine):
        found = engine.clipped_sum(losses(model, "causal-lm"), batch, rule)
        assert close(found.sums, by_hand(expected, rule))


def test_checkpointing_past_hooks_is_a_loop() -> None:
    model: Any = tuned("llama", "full")
    model.gradient_checkpointing_enable()
    assert PerExample(model).mode == "loop"


def test_losses_must_be_one_for_each_example() -> None:
    model = tuned("llama", "lora")
    engine = PerExample(model)
    with pytest.raises(FedtuneError, match="4 examples"):
        engine.clipped_sum(lambda b: losses(model, "causal-lm")(b).mean(),
                           data(model, "causal-lm"), Flat(1.0))  # fmt: skip


def test_dropout_is_fine_and_off_during_the_proof() -> None:
    base = network("llama", attention_dropout=0.5).requires_grad_(False)
    tuning = TuningConfig(rank=2, dropout=0.5)
    model = attach(Base(base, None, 0), tuning, "causal-lm", seed=1).train()
    engine = PerExample(model)
    assert engine.prove("causal-lm").mode == "fast"
    found = engine.clipped_sum(losses(model, "causal-lm"), data(model, "causal-lm"), Flat(1.0))
    assert found.dropped == 0
    assert all(module.training for module in model.modules())


def test_padding_of_embeddings_has_no_gradient() -> None:
    model = nn.Embedding(5, 3, padding_idx=2)
    batch = {"ids": torch.tensor([[2, 1, 1], [4, 2, 0]])}
    found = PerExample(model).gradients(lambda b: model(b["ids"]).sum((1, 2)), batch)["weight"]
    assert found[:, :, 0].tolist() == [[0, 2, 0, 0, 0], [1, 0, 0, 0, 1]]
