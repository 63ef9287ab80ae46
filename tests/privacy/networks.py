"""Small networks with random weights, and gradients by plain autograd."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from fedtune.adapters import Task, attach, trainable
from fedtune.config import TuningConfig
from fedtune.models import Base
from fedtune.privacy.clipping import Automatic, Clip, Flat, PerBlock, adapter_blocks
from fedtune.privacy.per_example import PerExample, example_losses
from fedtune.privacy.per_example_loss import public_batch

Tensors = dict[str, torch.Tensor]
METHODS = ("full", "lora", "lora-frozen-a", "prompt", "prefix", "p-tuning-v2", "ia3", "layernorm")


def network(family: str, **changes: Any) -> nn.Module:
    torch.manual_seed(3)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**{
            "vocab_size": 61, "n_positions": 40, "n_embd": 16, "n_layer": 2, "n_head": 2,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1,
            "eos_token_id": 2, "pad_token_id": 0} | changes))  # fmt: skip
    if family == "bert":
        return BertForSequenceClassification(BertConfig(**{
            "vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 32, "max_position_embeddings": 40, "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0, "pad_token_id": 0, "num_labels": 3} | changes
        ))  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{
        "vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 40,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | changes))  # fmt: skip


def task_of(family: str) -> Task:
    return "classification" if family == "bert" else "causal-lm"


def tuned(family: str, method: str, **options: Any) -> nn.Module:
    base = network(family)
    if method == "full":
        return base.requires_grad_(True)
    base.requires_grad_(False)
    tuning = TuningConfig(adapter=method, rank=2, alpha=4.0, tokens=3, options=options)
    model = attach(Base(base, None, 0), tuning, task_of(family), seed=5)
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():  # B = 0 and the like would hide errors
        for parameter in trainable(model).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=random))
    return model


def data(model: nn.Module, task: Task, lengths: tuple[int, ...] = (9, 4, 6, 2)) -> Tensors:
    return public_batch(model, task, lengths, seed=11)


def losses(model: nn.Module, task: Task) -> Callable[[Any], torch.Tensor]:
    return lambda batch: example_losses(model, batch, task)


def alone(model: nn.Module, batch: Tensors, index: int, task: Task) -> Tensors:
    """Return the gradient of one example, cut to its own length, by plain autograd."""
    length = int(batch["attention_mask"][index].sum())
    ids = batch["input_ids"][index : index + 1, :length]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    if task == "classification":
        loss = F.cross_entropy(logits, batch["labels"][index : index + 1])
    else:
        target = batch["labels"][index, 1:length]
        loss = F.cross_entropy(logits[0, -length:-1], target)
    named = trainable(model)
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g.detach()
        for (name, p), g in zip(named.items(), found, strict=True)
    }


def reference(model: nn.Module, batch: Tensors, task: Task) -> Tensors:
    each = [alone(model, batch, i, task) for i in range(len(batch["input_ids"]))]
    return {name: torch.stack([grads[name] for grads in each]) for name in each[0]}


def worst(found: Tensors, expected: Tensors) -> float:
    """Return the largest error of any parameter, relative to its example's whole gradient."""
    assert found.keys() == expected.keys()
    size = (
        torch.stack([e.flatten(1).norm(dim=1) for e in expected.values()])
        .norm(dim=0)
        .clamp(min=1e-9)
    )
    gaps = [(found[n] - e).flatten(1).norm(dim=1) / size for n, e in expected.items()]
    return float(torch.stack(gaps).max())


def rules(engine: PerExample) -> list[Clip]:
    blocks = adapter_blocks(engine.names)
    norms = tuple(0.05 + 0.01 * i for i in range(len(blocks)))
    return [Flat(0.2), Automatic(0.7), PerBlock(blocks, norms)]


def close(left: Tensors, right: Tensors, most: float = 1e-6) -> bool:
    return all(torch.allclose(left[n], right[n], rtol=1e-5, atol=most) for n in right)


def by_hand(each: Tensors, rule: Clip) -> Tensors:
    """Clip and add gradients in float64, in the plainest way."""
    sums = {name: torch.zeros(e.shape[1:], dtype=torch.float64) for name, e in each.items()}
    blocks = rule.blocks(tuple(each))
    for i in range(len(next(iter(each.values())))):
        for block, bound in zip(blocks, rule.norms, strict=True):
            norm = math.sqrt(sum(float(each[n][i].double().square().sum()) for n in block))
            gamma = getattr(rule, "gamma", 0.0)
            factor = bound / (norm + gamma) if gamma else min(1.0, bound / max(norm, 1e-300))
            for name in block:
                sums[name] += factor * each[name][i].double()
    return {name: total.float() for name, total in sums.items()}
