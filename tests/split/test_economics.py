"""The planner: its figures against what is counted and sent, and the words of its verdict."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fedtune.client.remote import keep_ends
from fedtune.config import Config
from fedtune.server.tuned import load_tuned
from fedtune.simulations.plan_split import shape_of, split_lines, split_plan
from fedtune.split.blocks import cut_of
from fedtune.split.codec import CODECS, Codec, encode, nbytes
from fedtune.split.economics import Shape, Work, advice, break_even_tokens, costs, output_share
from fedtune.split.flops import measure_share
from tests.split.zoo import make

ONE_B = Shape(
    total=1_235_814_400, client=384_000_000, looked_up=0, output=262_668_288, width=2048,
    blocks=16, client_blocks=2, lora=11_272_192, trained=745_472,
)  # fmt: skip


def by(shape: Shape, work: Work, bandwidth: float = 0.0) -> dict[str, Any]:
    return {cost.method: cost for cost in costs(shape, work, bandwidth)}


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_are_those_of_real_tensors(codec: Codec) -> None:
    """Four tensors of each example: hidden state and gradient, each way."""
    shape = replace(ONE_B, width=24, trained=0)
    work = Work(tokens=5 * 30, length=30, prompt=4, codec=codec, rank=3, epochs=2.0)
    one = nbytes(encode(torch.randn(1, 34, 24), codec, rank=3))
    assert by(shape, work)["split each"].bytes == 2 * 5 * 4 * one


def test_without_anything_before_the_cut_no_gradient_crosses_it() -> None:
    work = Work(tokens=300, length=30, prompt=0)
    shape = replace(ONE_B, trained=0)
    both = by(shape, work)["split each"].bytes
    assert by(replace(shape, before=False), work)["split each"].bytes == both / 2


def test_sent_once_is_spread_over_the_run() -> None:
    shape = replace(ONE_B, trained=0)
    work = Work(tokens=300, length=30, prompt=5, epochs=3.0, rounds=10)
    tensor = 4 * 2048
    # 10 examples: 30 positions up once in 10 rounds; in every pass 5 prompts up and their
    # gradient down, and the output and its gradient of 35 positions.
    expected = 10 * (30 / 10 + 3 * (2 * 5 + 2 * 35)) * tensor
    assert by(shape, work)["split once"].bytes == expected
    assert by(shape, work)["split each"].bytes == 10 * 3 * 4 * 35 * tensor


def test_pruning_sends_less_and_the_trained_part_travels_anyway() -> None:
    work = Work(tokens=3000, length=30)
    whole, half = (by(ONE_B, replace(work, keep=k))["split each"].bytes for k in (1.0, 0.5))
    fixed = 8 * ONE_B.trained
    assert half - fixed == (whole - fixed) / 2


def test_seconds_are_bits_over_the_link() -> None:
    work = Work(tokens=3000, length=30)
    assert by(ONE_B, work)["lora"].seconds is None
    assert by(ONE_B, work, 8.0)["lora"].seconds == pytest.approx(8 * ONE_B.lora / 1e6)


def test_break_even_is_where_the_bytes_are_equal() -> None:
    """bf16 both ways, against an adapter of two bytes a number."""
    tokens = break_even_tokens(ONE_B.lora, ONE_B.width)
    assert tokens == 2752
    shape = replace(ONE_B, trained=0)
    cut = by(shape, Work(tokens, 1, prompt=0, codec="bf16"))["split each"].bytes
    assert cut == pytest.approx(by(shape, Work(tokens, 1))["lora"].bytes / 2, rel=1e-9)


# ---------------------------------------------------------------- operations


def test_operations_are_those_that_torch_counts() -> None:
    model: nn.Module = make("Llama").requires_grad_(False)
    cut = cut_of(model, 1, 1)
    shape = shape_of(model, cut, rank=4, trained=0, before=True, words=True)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    tuned = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules=names))
    assert shape.lora == sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    share = measure_share(tuned, cut, batch=4, length=16)
    work = Work(tokens=64, length=16, prompt=0, local_epochs=0.0)
    found = by(shape, work)
    # First layer: no gradient at the embeddings' side of the first products.
    assert found["lora"].flops == pytest.approx(share.whole_step, rel=0.05)
    assert share.output == 2 * 64 * shape.output
    plain = measure_share(model, cut, batch=4, length=1)
    assert output_share(32, 97, shape.total - shape.looked_up) == pytest.approx(
        plain.output_of_forward, rel=0.05
    )  # at length 1 attention is next to nothing


def test_the_cut_costs_the_client_its_ends() -> None:
    model: nn.Module = make("Llama").requires_grad_(False)
    cut = cut_of(model, 1, 1)
    shape = shape_of(model, cut, rank=4, trained=0, before=True, words=True)
    counted = copy_trained_embeddings(model)
    share = measure_share(counted, cut, batch=4, length=16)
    work = Work(tokens=64, length=16, prompt=0, local_epochs=0.0)
    assert by(shape, work)["split each"].flops == pytest.approx(share.client_step, rel=0.05)
    # Phase 1 is the same on all, without traffic; scores are forward passes on all.
    pruned = by(shape, replace(work, local_epochs=1.0, keep=0.5))["split each"].flops
    assert pruned == pytest.approx(1.5 * share.client_step + share.client_forward, rel=0.05)


def copy_trained_embeddings(model: nn.Module) -> nn.Module:
    """What stands before the first block is trained, as prompts are; it multiplies nothing."""
    model.get_input_embeddings().requires_grad_(True)  # type: ignore[operator]
    return model


# ---------------------------------------------------------------- the model in numbers


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma", "OPT", "Bert"])
@pytest.mark.parametrize("ends", [(1, 1), (0, 2)])
def test_the_clients_part_is_what_a_client_keeps(name: str, ends: tuple[int, int]) -> None:
    model: nn.Module = make(name)
    cut = cut_of(model, *ends)
    shape = shape_of(model, cut, rank=2, trained=0, before=True, words=name != "Bert")
    assert shape.total == sum(p.numel() for p in model.parameters())
    keep_ends(model, cut)
    assert shape.client == sum(p.numel() for p in model.parameters())
    assert shape.client_blocks == sum(ends)


def test_tied_tables_are_multiplied_and_others_looked_up() -> None:
    free, tied = make("Llama"), make("Gemma")
    found = [
        shape_of(m, cut_of(m, 1, 1), rank=1, trained=0, before=True, words=True)
        for m in (free, tied)
    ]
    assert [shape.looked_up for shape in found] == [97 * 32, 0]
    assert [shape.output for shape in found] == [97 * 32, 97 * 32]


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("memory", "tokens", "words"),
    [
        (64e9, 100_000, "split is the wrong choice: this client can hold the model"),
        (64e9, 100, "split sends"),
        (8e9, 100_000, "split is what fits"),
        (1e9, 100_000, "split does not fit either"),
        (0.0, 100_000, "LoRA on the whole model sends 44 times less: split is for clients that"),
    ],
)
def test_the_verdict(memory: float, tokens: int, words: str) -> None:
    work = Work(tokens, 100)
    lines = advice(ONE_B, work, costs(ONE_B, work), memory)
    assert words in lines[0]
    assert any("2,752 tokens" in line for line in lines)
    assert any("output layer over the vocabulary is 21%" in line for line in lines)


def test_a_classifier_has_no_line_about_words() -> None:
    shape, work = replace(ONE_B, output=0), Work(1000, 100)
    assert not any("vocabulary" in line for line in advice(shape, work, costs(shape, work)))


def settings(**split: Any) -> Config:
    tuning = {"method": "sfprompt", "adapter": "sfprompt", "tokens": 8, "split": split}
    return Config.model_validate(
        {
            "name": "cut", "model": {"base": "fedtune:tiny"},
            "data": {"source": "fedtune:stdlib", "text": "text", "max_length": 64},
            "federation": {"rounds": 4}, "tuning": tuning,
        }
    )  # fmt: skip


def test_the_plan_of_a_real_configuration() -> None:
    config = settings(memory_mb=4000.0, bandwidth_mbit=10.0)
    made = split_plan(config, load_tuned(config, ()), 50_000, 64)
    text = "\n".join(split_lines(made))
    for words in ("LoRA, whole model", "seeds, whole model", "split, sent each step", " *",
                  "split is the wrong choice", "break-even", "output layer"):  # fmt: skip
        assert words in text, words
    assert "once" not in text  # prompts change hidden states in every block of the head
    found = {one["method"]: one for one in made["methods"]}
    shape = made["shape"]
    assert found["full"]["bytes"] == 8 * shape["total"]
    assert shape["trained"] > 8 * 192  # prompts, and LoRA on the tail
    each = 4 * 4 * 192 * (64 + 8) * 50_000 / 64 * config.tuning.split.keep
    assert found["split each"]["bytes"] == pytest.approx(each + 8 * shape["trained"], rel=1e-6)
    assert found["split each"]["seconds"] == pytest.approx(found["split each"]["bytes"] * 8e-7)


def test_the_plan_without_knowledge_of_the_client() -> None:
    config = settings(head=0, release="once")
    made = split_plan(config, load_tuned(config, ()), 5_000, 64)
    text = "\n".join(split_lines(made))
    assert "set tuning.split.bandwidth_mbit" in text
    assert made["chosen"] == "split once"
    assert text.count(" *") == 1


def test_docs_quote_the_break_even_of_this_code() -> None:
    docs = (Path(__file__).parents[2] / "docs" / "split.md").read_text(encoding="utf-8")
    for lora, width in ((11_272_192, 2048), (41_943_040, 4096)):
        assert f"{break_even_tokens(lora, width):,}" in docs
