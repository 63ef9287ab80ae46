"""Layers that give per-example gradients in their own backward pass.

While attached, the forward of such a layer runs through a function whose backward
builds the gradients of each example and hands them to a book. The ordinary
gradient of the parameter is never computed, and its ``.grad`` stays None: were it
not None afterwards, the parameter had been used in some other way too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fedtune.privacy.per_example_grads import rows_of

__all__ = ["Sink", "forward_of", "kind_of", "prompt_of"]

Sink = Any
"""Has ``count``, ``expect(parameter)`` and ``add(parameter, grads)``: see ``Book``."""


def kind_of(module: nn.Module) -> str:
    """Name how a module with trainable parameters is handled here, or return ''.

    Only exact types count: a subclass may compute something else.
    """
    from peft.tuners.beft.layer import Linear as BeftLinear
    from peft.tuners.ia3.layer import Linear as IA3Linear
    from transformers.pytorch_utils import Conv1D

    if type(module) in (nn.Linear, Conv1D):
        return "linear"
    if type(module) is nn.Embedding:
        plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        return "embedding" if plain else ""
    if type(module) is IA3Linear and _one_vector(module, "ia3_l"):
        return "scale"
    return "shift" if type(module) is BeftLinear and _one_vector(module, "beft_bias") else ""


def forward_of(module: nn.Module, sink: Callable[[], Sink | None]) -> Callable[..., Any]:
    """Return the forward that stands in for the module's own while ``sink()`` is not None."""
    made = {
        "linear": _linear_forward,
        "embedding": _embedding_forward,
        "scale": _scale_forward,
        "shift": _shift_forward,
    }[kind_of(module)]
    return partial(_when_recording, module, module.forward, made, sink)


def prompt_of(model: nn.Module, sink: Callable[[], Sink | None]) -> Callable[..., Any] | None:
    """Return the ``get_prompt`` that stands in for that of a peft model, if it needs one.

    peft embeds the prompt once and repeats it for each example, which adds the
    gradients of the examples up before they reach the embedding. Here every example
    embeds a prompt of its own.
    """
    tuned: Any = model
    settings = getattr(tuned, "active_peft_config", None)
    if getattr(settings, "peft_type", None) not in ("PROMPT_TUNING", "P_TUNING"):
        return None
    own = tuned.get_prompt

    def get_prompt(batch_size: int, *rest: Any, **named: Any) -> Any:
        book = sink()
        if book is None or not torch.is_grad_enabled():
            return own(batch_size, *rest, **named)
        tokens = tuned.prompt_tokens[tuned.active_adapter].unsqueeze(0).expand(batch_size, -1)
        encoder = tuned.prompt_encoder[tuned.active_adapter]
        return encoder(tokens.to(encoder.embedding.weight.device))

    return get_prompt


def _when_recording(
    module: nn.Module,
    own: Callable[..., Any],
    ours: Callable[..., Any],
    sink: Callable[[], Sink | None],
    *inputs: Any,
    **named: Any,
) -> Any:
    book = sink()
    if book is None or not torch.is_grad_enabled():
        return own(*inputs, **named)
    return ours(module, book, *inputs, **named)


def _one_vector(module: Any, attribute: str) -> bool:
    """Say whether exactly one adapter is active, and not merged into the layer."""
    own = getattr(module, attribute)
    active = [name for name in module.active_adapters if name in own]
    return len(active) == 1 and not module.merged and not module.disable_adapters


# ---------------------------------------------------------------- linear layers


def _linear_forward(module: Any, book: Sink, x: torch.Tensor) -> torch.Tensor:
    weight, bias = module.weight, module.bias
    turned = not isinstance(module, nn.Linear)  # GPT-2 keeps its matrices as (in, out)
    for parameter in (weight, bias):
        if parameter is not None and parameter.requires_grad:
            book.expect(parameter)
    out: torch.Tensor = _Linear.apply(x, weight, bias, book, turned)  # type: ignore[no-untyped-call]
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        book: Sink,
        turned: bool,
    ) -> torch.Tensor:
        ctx.book, ctx.weight, ctx.bias, ctx.turned = book, weight, bias, turned
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        return F.linear(x, weight.T if turned else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        weight, bias = ctx.weight, ctx.bias
        if ctx.needs_input_grad[1]:
            pair = (x, grad) if ctx.turned else (grad, x)
            ctx.book.add(weight, _outer(*pair))
        if ctx.needs_input_grad[2]:
            ctx.book.add(bias, _over_tokens(grad))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        w = weight.to(grad.dtype)
        return grad @ (w.T if ctx.turned else w), None, None, None, None


def _outer(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return ``sum_t left_bt right_bt'`` as (B, m, n), for (B, ..., m) and (B, ..., n)."""
    right = right.to(left.dtype)
    if left.dim() == 2:
        return left.unsqueeze(2) * right.unsqueeze(1)
    left, right = left.flatten(1, -2), right.flatten(1, -2)
    return torch.bmm(left.transpose(1, 2), right)


def _over_tokens(grad: torch.Tensor) -> torch.Tensor:
    """Sum (B, ..., n) over everything between the example and the features."""
    return grad if grad.dim() == 2 else grad.float().flatten(1, -2).sum(1)


# ---------------------------------------------------------------- embeddings


def _embedding_forward(module: Any, book: Sink, ids: torch.Tensor) -> torch.Tensor:
    if ids.shape[0] == 1 and book.count > 1:
        # Positions that are the same for all examples: one row each, or their
        # gradient arrives already added up over the examples.
        ids = ids.expand(book.count, *ids.shape[1:])
    book.expect(module.weight)
    out: torch.Tensor = _Embedding.apply(  # type: ignore[no-untyped-call]
        ids, module.weight, module.padding_idx, book
    )
    return out


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ids: torch.Tensor, weight: torch.Tensor, padding: int | None, book: Sink
    ) -> torch.Tensor:
        ctx.book, ctx.weight, ctx.padding = book, weight, padding
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        (ids,) = ctx.saved_tensors
        rows, width = ctx.weight.shape
        count = ids.shape[0]
        values = grad.reshape(count, -1, width).float()
        if ctx.padding is not None:
            values = values.masked_fill((ids == ctx.padding).reshape(count, -1, 1), 0.0)
        ctx.book.add(ctx.weight, rows_of(ids.reshape(count, -1), values, rows))
        return None, None, None, None


# ---------------------------------------------------------------- vectors of peft


def _scale_forward(module: Any, book: Sink, x: torch.Tensor, *rest: Any, **named: Any) -> Any:
    """IA3: the layer's input or output times a vector."""
    vector = _vector(module, "ia3_l")
    book.expect(vector)
    if module.is_feedforward:
        scaled = _Scale.apply(x.to(vector.dtype), vector, book).to(x.dtype)  # type: ignore[no-untyped-call]
        return module.base_layer(scaled, *rest, **named)
    out = module.base_layer(x, *rest, **named)
    return _Scale.apply(out, vector, book).to(out.dtype)  # type: ignore[no-untyped-call]


def _shift_forward(module: Any, book: Sink, x: torch.Tensor, *rest: Any, **named: Any) -> Any:
    """BEFT: the layer's output plus a vector."""
    vector = _vector(module, "beft_bias")
    book.expect(vector)
    out = module.base_layer(x, *rest, **named)
    return _Shift.apply(out, vector, book).to(out.dtype)  # type: ignore[no-untyped-call]


def _vector(module: Any, attribute: str) -> nn.Parameter:
    own = getattr(module, attribute)
    found: nn.Parameter = own[next(name for name in module.active_adapters if name in own)]
    return found


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, vector: torch.Tensor, book: Sink) -> torch.Tensor:
        ctx.book, ctx.vector = book, vector
        ctx.save_for_backward(x)
        return x * vector.flatten()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            each = _over_tokens(grad.float() * x.float())
            ctx.book.add(ctx.vector, each.view(-1, *ctx.vector.shape))
        return grad * ctx.vector.flatten().to(grad.dtype), None, None


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, vector: torch.Tensor, book: Sink) -> torch.Tensor:
        ctx.book, ctx.vector = book, vector
        return x + vector.flatten()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        if ctx.needs_input_grad[1]:
            ctx.book.add(ctx.vector, _over_tokens(grad).view(-1, *ctx.vector.shape))
        return grad, None, None
