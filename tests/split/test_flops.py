"""Operations counted by torch, against what the shapes say by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fedtune.client.remote import keep_ends
from fedtune.encoder import MeanPoolClassifier
from fedtune.errors import FedtuneError
from fedtune.split.blocks import blocks_of, cut_of
from fedtune.split.flops import Share, count_step, measure_share
from tests.split.zoo import make

B, T = 3, 16


def multiplied(module: nn.Module) -> int:
    """Weights that every token is multiplied with, and what attention adds in a block."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def block_forward(block: nn.Module, heads_width: int) -> int:
    return B * T * (2 * multiplied(block) + 4 * T * heads_width)


def frozen(name: str) -> nn.Module:
    model: nn.Module = make(name)
    return model.requires_grad_(False)


@pytest.mark.parametrize(("head", "tail"), [(1, 1), (0, 1), (2, 1)])
def test_a_language_model_is_counted_as_its_shapes_say(head: int, tail: int) -> None:
    model = frozen("Llama")
    share = measure_share(model, cut_of(model, head, tail), B, T)
    block = block_forward(blocks_of(model).modules[0], 32)
    output = B * T * 2 * 32 * 97
    assert share.whole_forward == 4 * block + output
    assert share.output == output
    assert share.client_forward == (head + tail) * block + output
    assert share.whole_step == share.whole_forward  # nothing is trained


def test_gradients_run_back_to_what_is_trained_and_no_further() -> None:
    plain = frozen("Llama")
    cut = cut_of(plain, 1, 1)
    tail = get_peft_model(plain, LoraConfig(r=4, target_modules=["model.layers.3.mlp.up_proj"]))
    late = measure_share(tail, cut, B, T)
    both = get_peft_model(
        frozen("Llama"),
        LoraConfig(
            r=4, target_modules=["model.layers.0.mlp.up_proj", "model.layers.3.mlp.up_proj"]
        ),
    )
    early = measure_share(both, cut, B, T)
    # With something trained before the cut, the body's backward is the server's, not ours.
    block = block_forward(blocks_of(plain).modules[0], 32)
    backward = early.whole_step - early.whole_forward
    assert backward - (late.whole_step - late.whole_forward) > 2 * block
    ours = early.client_step - early.client_forward
    # Both factors of an attention product have a gradient: twice its forward.
    assert backward - ours == 2 * (block + B * T * 4 * T * 32)
    assert late.client_step - late.client_forward == late.whole_step - late.whole_forward


def test_fused_attention_is_counted_too() -> None:
    """On a CPU torch does not count it: the copy is eager, the model given is not touched."""
    model = frozen("Llama")
    assert model.config._attn_implementation == "sdpa"
    fused = count_step(model, B, T)[0]
    share = measure_share(model, cut_of(model, 1, 1), B, T)
    assert share.whole_forward - fused == 4 * B * T * 4 * T * 32
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["GPT2", "Gemma2", "Bloom", "Mamba", "Bert", "DebertaV2"])
def test_other_architectures(name: str) -> None:
    model = frozen(name)
    next(blocks_of(model).modules[-1].parameters()).requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    share = measure_share(model, cut_of(model, 1, 1), B, T)
    assert 0 < share.client_forward < share.whole_forward < share.whole_step
    assert 0.4 < (share.client_forward - share.output) / (share.whole_forward - share.output) < 0.56
    assert share.client_step > share.client_forward
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert len(blocks_of(model).modules) == 4


def test_a_classifier_has_no_output_layer_over_words() -> None:
    bert = make("Bert")
    model = MeanPoolClassifier(bert.base_model, ("a", "b")).requires_grad_(False)
    model.classifier.requires_grad_(True)
    share = measure_share(model, cut_of(model, 1, 1), B, T)
    assert share.output == 0
    assert share.of_forward == pytest.approx(0.5, abs=0.01)  # two of four blocks
    assert share.of_step == pytest.approx(0.5, abs=0.01)


def test_a_part_is_refused() -> None:
    model = frozen("Llama")
    cut = cut_of(model, 1, 1)
    keep_ends(model, cut)
    with pytest.raises(FedtuneError, match="part of a model"):
        measure_share(model, cut, B, T)


def test_shares() -> None:
    share = Share(1000, 3000, 100, 600, 50)
    assert (share.of_forward, share.of_step, share.output_of_forward) == (0.1, 0.2, 0.05)
