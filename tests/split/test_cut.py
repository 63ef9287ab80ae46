"""The cut changes nothing: not one bit of loss, logits or gradients, for any architecture."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)

from fedtune.client.remote import remote_of
from fedtune.errors import FedtuneError
from fedtune.split.blocks import blocks_of, cut_of
from tests.split.joined import split
from tests.split.zoo import DECODERS, ENCODERS, make

ALL = [*DECODERS, *ENCODERS]
# Relative positions that every block looks up in one table: both sides hold it.
_SHARED = {"DebertaV2": "rel_embeddings", "MPNet": "relative_attention_bias"}
# A state-space model has no keys to cut: a test of its own sees it refused.
_NO_CACHE = ("Mamba",)

torch.set_num_threads(1)


def batch(name: str, *, left: bool = False) -> dict[str, torch.Tensor]:
    """Three rows of different length."""
    torch.manual_seed(0)
    ids = torch.randint(3, 97, (3, 10))
    mask = torch.ones_like(ids)
    for row, real in enumerate((10, 7, 4)):
        if left:
            mask[row, : 10 - real] = 0
        else:
            mask[row, real:] = 0
    labels = ids.masked_fill(mask == 0, -100) if name in DECODERS else torch.tensor([0, 1, 2])
    ids = ids.masked_fill(mask == 0, 0)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def called(model: Any, name: str, given: dict[str, torch.Tensor]) -> Any:
    """Forward and backward; a cache would lay keys otherwise in memory, and change last bits."""
    more = {"use_cache": False} if name in DECODERS else {}
    out = model(**given, **more)
    out.loss.backward()
    return out


def same_gradients(name: str, whole: Any, *parts: Any) -> int:
    """Compare gradients by name, bit for bit; return how many there were."""
    wanted = {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}
    found: dict[str, list[torch.Tensor]] = {}
    for part in parts:
        for key, parameter in part.named_parameters():
            if parameter.grad is not None:
                found.setdefault(key, []).append(parameter.grad)
    assert found.keys() == wanted.keys()
    for key, grads in found.items():
        if name in _SHARED and len(grads) > 1:
            # Both sides add to it: the order of the sum is another, the terms are not.
            torch.testing.assert_close(sum(grads), wanted[key], rtol=1e-5, atol=1e-7)
        else:
            assert len(grads) == 1, key
            assert torch.equal(grads[0], wanted[key]), key
    return len(found)


@pytest.mark.parametrize("name", ALL)
def test_loss_logits_and_every_gradient_are_those_of_the_whole_model(name: str) -> None:
    whole = make(name)
    part, far, _ = split(whole)
    given = batch(name)
    wanted, found = called(whole, name, given), called(part, name, given)
    assert torch.equal(found.loss, wanted.loss)
    assert torch.equal(found.logits, wanted.logits)
    assert same_gradients(name, whole, part, far) > 20


@pytest.mark.parametrize("name", ALL)
def test_lora_on_both_sides_of_the_cut(name: str) -> None:
    whole = make(name)
    names = {
        n.rsplit(".", 1)[-1] for n, m in blocks_of(whole).modules.named_modules()
        if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D"
    }  # fmt: skip
    names -= {"out_proj"} if name == "Mamba" else set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = get_peft_model(whole, LoraConfig(r=2, target_modules=sorted(names)))
    torch.manual_seed(1)
    for key, parameter in whole.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    part, far, _ = split(whole)
    given = batch(name)
    wanted, found = called(whole, name, given), called(part, name, given)
    assert torch.equal(found.loss, wanted.loss)
    assert torch.equal(found.logits, wanted.logits)
    assert same_gradients(name, whole, part, far) >= 8


@pytest.mark.parametrize("name", ALL)
def test_prompts_through_the_cut(name: str) -> None:
    base = make(name)
    kind = "CAUSAL_LM" if name in DECODERS else "SEQ_CLS"
    torch.manual_seed(2)
    settings = PromptTuningConfig(
        task_type=kind, num_virtual_tokens=3, token_dim=32, num_attention_heads=4, num_layers=4
    )
    whole = get_peft_model(base, settings)
    part, _, link = split(whole)
    given = batch(name)
    wanted, found = called(whole, name, given), called(part, name, given)
    assert torch.equal(found.loss, wanted.loss)
    assert torch.equal(found.logits, wanted.logits)
    ours, theirs = part.prompt_encoder.default.embedding, whole.prompt_encoder.default.embedding
    assert theirs.weight.grad.abs().sum() > 0
    assert torch.equal(ours.weight.grad, theirs.weight.grad)
    (_, (hidden, rows, _)), (kind, _) = link.calls
    assert kind == "backward"
    assert hidden.shape[1] == rows.length == 13  # the mask that the server sees has the prompts
    assert rows.spans == ((0, 13), (0, 10), (0, 7))


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Mistral", "GPT2", "OPT", "GPTNeoX"])
def test_deep_prompts_in_every_block(name: str) -> None:
    base = make(name)
    settings = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    torch.manual_seed(3)
    whole = get_peft_model(base, settings)
    part, _, link = split(whole)
    given = batch(name)
    wanted, found = called(whole, name, given), called(part, name, given)
    assert torch.equal(found.loss, wanted.loss)
    assert torch.equal(found.logits, wanted.logits)
    ours, theirs = part.prompt_encoder.default.embedding, whole.prompt_encoder.default.embedding
    assert torch.equal(ours.weight.grad, theirs.weight.grad)
    assert [kind for kind, _ in link.calls] == ["forward", "backward"]


@pytest.mark.parametrize(
    ("name", "cache"),
    [(n, c) for n in DECODERS for c in (False, True) if not (c and n in _NO_CACHE)],
)
def test_greedy_generation_is_the_same(name: str, cache: bool) -> None:
    whole = make(name)
    part, _, link = split(whole)
    given = batch(name)["input_ids"][:1, :5].repeat(2, 1)
    given[1] = given[1].flip(0)
    ask: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "use_cache": cache,
                           "pad_token_id": 0, "attention_mask": torch.ones_like(given)}  # fmt: skip
    wanted, found = whole.generate(given, **ask), part.generate(given, **ask)
    assert wanted.shape == (2, 11)
    assert torch.equal(found, wanted)
    assert bool(link.caches) == cache


def test_a_body_that_lost_its_cache_is_told_all_again() -> None:
    whole = make("Qwen3")
    part, _, link = split(whole)
    given = batch("Qwen3")["input_ids"][:1]
    ask: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    wanted = whole.generate(given, **ask)
    plain = link.go_on
    count = iter(range(100))

    def forgetful(session: str, hidden: torch.Tensor, rows: Any) -> torch.Tensor:
        if next(count) == 4:
            link.caches.clear()
        return plain(session, hidden, rows)

    link.go_on = forgetful  # type: ignore[method-assign]
    assert torch.equal(part.generate(given, **ask), wanted)


def test_left_padding_and_positions_counted_over_real_tokens() -> None:
    whole = make("Llama")
    part, _, link = split(whole)
    given = batch("Llama", left=True)
    ask: dict[str, Any] = {"attention_mask": given["attention_mask"], "max_new_tokens": 5,
                           "do_sample": False, "pad_token_id": 0}  # fmt: skip
    for cache in (False, True):
        wanted = whole.generate(given["input_ids"], use_cache=cache, **ask)
        assert torch.equal(part.generate(given["input_ids"], use_cache=cache, **ask), wanted)
    rows = link.calls[0][1][1]
    assert rows.positions == "mask-0"
    assert rows.spans == ((0, 10), (3, 10), (6, 10))


def test_states_that_cannot_be_cut_are_refused() -> None:
    part, _, _ = split(make("Mamba"))
    with pytest.raises(FedtuneError, match="cache"):
        part.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, use_cache=True, pad_token_id=0)


def test_beam_search_over_a_cut_cache_is_refused() -> None:
    part, _, _ = split(make("Llama"))
    ids = batch("Llama")["input_ids"][:1]
    with pytest.raises(FedtuneError, match="reordered"):
        part.generate(ids, max_new_tokens=9, num_beams=3, use_cache=True, pad_token_id=0)


@pytest.mark.parametrize(("head", "tail"), [(0, 0), (0, 1), (2, 0), (1, 2)])
def test_any_depth_of_head_and_tail(head: int, tail: int) -> None:
    for name in ("Gemma2", "Bert"):
        whole = make(name)
        part, far, _ = split(whole, head, tail)
        given = batch(name)
        wanted, found = called(whole, name, given), called(part, name, given)
        assert torch.equal(found.logits, wanted.logits)
        same_gradients(name, whole, part, far)


def test_nothing_of_the_body_is_left_at_the_client() -> None:
    whole = make("Llama")
    part, far, _ = split(whole)
    ours = {n for n, _ in part.named_parameters()}
    assert not {n for n in ours if n.startswith(("model.layers.1.", "model.layers.2."))}
    theirs = {n for n, _ in far.named_parameters()}
    assert {n.split(".")[2] for n in theirs if n.startswith("model.layers.")} == {"1", "2"}
    assert not {n for n in theirs if "embed" in n or "lm_head" in n}


def test_a_frozen_head_asks_for_no_gradient() -> None:
    whole = make("Llama").requires_grad_(False)
    part, _, link = split(whole)
    tail = blocks_of(part).modules[-1].requires_grad_(True)
    called(part, "Llama", batch("Llama"))
    assert all(p.grad is not None for p in tail.parameters())
    assert [kind for kind, _ in link.calls] == ["forward"]


def test_a_part_without_its_body_says_so() -> None:
    part, _, _ = split(make("Llama"))
    lonely = copy.deepcopy(part)
    assert remote_of(lonely) is not remote_of(part)
    with pytest.raises(FedtuneError, match="no link"):
        lonely(input_ids=torch.tensor([[3, 4]]))


def test_masks_with_holes_and_odd_positions_do_not_travel() -> None:
    part, _, _ = split(make("Llama"))
    ids = torch.tensor([[3, 4, 5, 6]])
    with pytest.raises(FedtuneError, match="holes"):
        part(input_ids=ids, attention_mask=torch.tensor([[1, 0, 1, 1]]))
    with pytest.raises(FedtuneError, match="position"):
        part(input_ids=ids, position_ids=torch.tensor([[0, 2, 1, 3]]))


@pytest.mark.parametrize(("head", "tail"), [(2, 2), (4, 0), (-1, 1)])
def test_a_cut_that_leaves_no_body_is_refused(head: int, tail: int) -> None:
    with pytest.raises(FedtuneError, match="nothing of 4 blocks"):
        cut_of(make("Llama"), head, tail)


def test_models_that_cannot_be_cut_are_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    shape = {"d_model": 16, "d_ff": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8}
    model = T5ForConditionalGeneration(T5Config(vocab_size=32, **shape))
    with pytest.raises(FedtuneError, match="to cut"):
        blocks_of(model)
