"""The training steps that ``dp_step`` compares: plain, ours, and Opacus as its guide shows it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedtune.adapters import trainable
from fedtune.privacy.clipping import Clip, Flat, PerBlock, adapter_blocks
from fedtune.privacy.events import Relation, Unit
from fedtune.privacy.mechanism import Block, Mechanism
from fedtune.privacy.noise import SecureNoise
from fedtune.privacy.per_example import PerExample
from fedtune.privacy.per_example_loss import Batch, example_losses
from fedtune.privacy.sampling import Poisson

__all__ = ["METHODS", "VARIANTS", "Size", "batch_of", "norms_of", "step_of"]

METHODS = ("lora", "full", "prompt")
VARIANTS = ("plain", "ours", "ours-adapter", "opacus-hooks", "opacus-ghost")
NOISE, CLIP, LR = 1.0, 1.0, 1e-4

Step = Callable[[], None]


@dataclass(frozen=True)
class Size:
    """A Llama with random weights, and the batch that it is given.

    Attributes
    ----------
    layers, width, inner, heads, vocabulary : int
        6, 512, 1408, 8 and 8,192 make 27.7 million parameters.
    batch, length : int
        Examples, and tokens of each.
    rank : int
        Of LoRA, on all linear layers.
    tokens : int
        Of the prompt.
    micro : int
        Examples at a time in full tuning, where each brings a gradient as large as
        the model.
    """

    layers: int = 6
    width: int = 512
    inner: int = 1408
    heads: int = 8
    vocabulary: int = 8192
    batch: int = 32
    length: int = 128
    rank: int = 16
    tokens: int = 20
    micro: int = 8


def batch_of(size: Size, rows: int = 0, length: int = 0) -> dict[str, torch.Tensor]:
    """Return random tokens, (rows, length)."""
    shape = (rows or size.batch, length or size.length)
    ids = torch.randint(1, size.vocabulary, shape, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def step_of(method: str, variant: str, size: Size) -> tuple[nn.Module, Callable[[Batch], None]]:
    """Return a model, and one step of training on a batch: gradients and optimiser."""
    model = _model(method, size)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=LR, fused=True)
    if variant == "plain":
        return model, functools.partial(_plain, model, optimizer)
    if variant.startswith("ours"):
        return model, _ours(model, optimizer, method, variant, size)
    return model, _opacus(model, optimizer, method, variant.removeprefix("opacus-"), size)


def norms_of(method: str, variant: str, size: Size, batch: Batch) -> torch.Tensor:
    """Return the gradient norm of each example, to show that both compute the same."""
    model = _model(method, size)
    if variant.startswith("ours"):
        found = PerExample(model).clipped_sum(
            lambda rows: example_losses(model, rows, "causal-lm"), batch, Flat(CLIP)
        )
        return found.norms.flatten()
    wrapped, _, _ = _wrapped(model, torch.optim.SGD(trainable(model).values()), "hooks")
    if method == "prompt" and variant != "opacus-as-is":
        _prompt_for_each(model)
    example_losses(wrapped, batch, "causal-lm").mean().backward()  # type: ignore[no-untyped-call]
    grads = [p.grad_sample.flatten(1).norm(dim=1) for p in trainable(model).values()]  # type: ignore[attr-defined]
    found_norms: torch.Tensor = torch.stack(grads).double().norm(dim=0)
    return found_norms


def _model(method: str, size: Size) -> nn.Module:
    from peft import LoraConfig, PromptTuningConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    network: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=size.inner,
            num_hidden_layers=size.layers, num_attention_heads=size.heads,
            num_key_value_heads=size.heads, max_position_embeddings=256, pad_token_id=0,
        )
    )  # fmt: skip
    if method == "lora":
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=size.rank)
        network = get_peft_model(network, lora)
    elif method == "prompt":
        prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=size.tokens)
        network = get_peft_model(network, prompt)
    network.train()
    tuned: nn.Module = network
    return tuned


def _plain(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    optimizer.zero_grad(set_to_none=True)
    example_losses(model, batch, "causal-lm").mean().backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _ours(
    model: nn.Module, optimizer: torch.optim.Optimizer, method: str, variant: str, size: Size
) -> Callable[[Batch], None]:
    engine, source = PerExample(model), SecureNoise()
    engine.prove("causal-lm")
    if engine.reason:
        raise RuntimeError(f"{method}: {engine.reason}")
    names = adapter_blocks(engine.names)
    rule: Clip = (
        PerBlock(names, (CLIP / len(names) ** 0.5,) * len(names))
        if variant == "ours-adapter"
        else Flat(CLIP)
    )
    micro = min(size.micro, size.batch) if method == "full" else size.batch
    mechanism = Mechanism(
        Unit.EXAMPLE, Relation.ADD_OR_REMOVE_ONE, Poisson(0.01), NOISE,
        denominator=float(size.batch), micro_batch=micro,
    )  # fmt: skip
    blocks = tuple(
        Block(block, clip, NOISE * rule.sensitivity)
        for block, clip in zip(rule.blocks(engine.names), rule.norms, strict=True)
    )
    parameters = trainable(model)
    attached = engine.attached()
    attached.__enter__()  # for the life of the process

    def step(batch: Batch) -> None:
        sums: dict[str, Any] = {}
        for at in range(0, len(batch["input_ids"]), micro):
            found = engine.clipped_sum(
                lambda rows: example_losses(model, rows, "causal-lm"),
                {name: value[at : at + micro] for name, value in batch.items()},
                rule,
            ).sums
            if micro >= size.batch:
                sums = {name: total.numpy() for name, total in found.items()}
            elif not sums:
                sums = {name: total.double().numpy() for name, total in found.items()}
            else:
                for name, total in found.items():
                    sums[name] += total.numpy()
        for name, mean in mechanism.release(sums, blocks, source).items():
            parameters[name].grad = torch.from_numpy(mean)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _opacus(
    model: nn.Module, optimizer: torch.optim.Optimizer, method: str, mode: str, size: Size
) -> Callable[[Batch], None]:
    if method == "prompt":
        _prompt_for_each(model)
    wrapped, noisy, criterion = _wrapped(model, optimizer, mode)

    def step(batch: Batch) -> None:
        noisy.zero_grad(set_to_none=True)
        if criterion is None:
            example_losses(wrapped, batch, "causal-lm").mean().backward()  # type: ignore[no-untyped-call]
        else:
            criterion(wrapped, batch).backward()
        noisy.step()

    del size
    return step


def _wrapped(
    model: nn.Module, optimizer: torch.optim.Optimizer, mode: str
) -> tuple[nn.Module, Any, Any]:
    """Call ``make_private`` as the guide of Opacus does."""
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(torch.zeros(64, 1)), batch_size=32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = PrivacyEngine().make_private(
            module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=NOISE,
            max_grad_norm=CLIP, poisson_sampling=False, grad_sample_mode=mode,
            **({"criterion": _Losses()} if mode == "ghost" else {}),
        )  # fmt: skip
    if mode == "ghost":
        wrapped, noisy, criterion, _ = made
        return wrapped, noisy, criterion
    wrapped, noisy, _ = made
    return wrapped, noisy, None


class _Losses:
    """A criterion in the form that ghost clipping asks for."""

    reduction = "mean"

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return example_losses(model, batch, "causal-lm")


def _prompt_for_each(model: nn.Module) -> None:
    """Embed the prompt once for each example: as it is, peft hides them from Opacus."""
    tuned: Any = model

    def get_prompt(batch_size: int, **_: Any) -> torch.Tensor:
        tokens = tuned.prompt_tokens["default"].repeat(batch_size, 1)
        found: torch.Tensor = tuned.prompt_encoder["default"](tokens)
        return found

    tuned.get_prompt = get_prompt
