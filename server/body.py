"""The server's side of the cut: the same class's own forward, with the hidden state put in."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import nn

from fedtune.models import Part, settings_of
from fedtune.split.blocks import Cut, Stand, Stopped, blocks_of, cut_of, network, outputs_of, seen
from fedtune.split.rows import Rows, mask_of, positions_of

__all__ = ["Body", "keep_body", "middle"]


class _Nowhere(nn.Module):
    """Stands for an embedding that the body does not need: zeros, of the right shape."""

    def __init__(self, like: nn.Module, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.padding_idx = getattr(like, "padding_idx", None)
        self.width = width
        self.dtype = dtype

    @property
    def weight(self) -> torch.Tensor:
        """Return nothing to initialise or tie."""
        return torch.empty(0)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return zeros of shape (B, T, d)."""
        return torch.zeros(*ids.shape, self.width, dtype=self.dtype, device=ids.device)


def keep_body(model: nn.Module, cut: Cut) -> None:
    """Take out of a model, in place, what its middle blocks do not need.

    Positions and norms stay: they are small, and the model's own code looks at them.
    """
    outputs = outputs_of(model)
    blocks = blocks_of(model).modules
    for index in range(cut.count):
        if not cut.is_body(index):
            blocks[index] = Stand(blocks[index], index, outputs)
    given: Any = network(model)
    embedding = given.get_input_embeddings()
    width = embedding.weight.shape[1]
    given.set_input_embeddings(_Nowhere(embedding, width, embedding.weight.dtype))
    if given.get_output_embeddings() is not None:
        given.set_output_embeddings(_Nowhere(embedding, width, embedding.weight.dtype))
    given.all_tied_weights_keys = {}


class Body:
    """The middle blocks of a model, as a function of hidden states; frozen, without memory.

    Parameters
    ----------
    model : nn.Module
        A Hugging Face model, changed in place: all but the body's blocks lose their
        weights' place in the list. In evaluation mode: no dropout in the body.
    cut : Cut

    Notes
    -----
    Masks, rotary tables and sliding windows are rebuilt by the model's own code from
    the lengths; the tokens it is called with are all zero. Calls of several threads
    do not disturb each other.
    """

    def __init__(self, model: nn.Module, cut: Cut) -> None:
        self.cut = cut
        self.model = network(model)
        self.model.eval()
        found = blocks_of(model)
        self.width = found.width
        blocks = found.modules
        if not all(isinstance(blocks[i], Stand) for i in range(cut.count) if not cut.is_body(i)):
            keep_body(model, cut)
        self._now = threading.local()
        self._names = frozenset(inspect.signature(self.model.forward).parameters)
        blocks[cut.body[0]].register_forward_pre_hook(self._enter, with_kwargs=True)
        blocks[cut.body[-1]].register_forward_hook(self._leave)

    def forward(self, hidden: torch.Tensor, rows: Rows, deep: torch.Tensor | None = None) -> Any:
        """Return the body's output (B, T, d) for hidden states of that shape.

        ``deep`` is (2 * blocks, B, heads, P, width), prefixes for every block's keys
        and values. Gradients flow if they are enabled.
        """
        return self._run(hidden, rows, self._prefixes(deep) if deep is not None else None)

    def go_on(self, hidden: torch.Tensor, rows: Rows, cache: Any = None) -> tuple[Any, Any]:
        """Return the output of new positions and the cache that holds all until now."""
        from transformers import DynamicCache

        if cache is None:
            cache = DynamicCache(config=settings_of(self.model))
        with torch.no_grad():
            return self._run(hidden, rows, cache), cache

    def gradients(
        self, hidden: torch.Tensor, rows: Rows, deep: torch.Tensor | None, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run forward again and return the gradients at ``hidden`` and ``deep``.

        Parameters of the body that require gradients collect theirs.
        """
        with torch.enable_grad():
            given = [hidden.detach().requires_grad_()]
            if deep is not None:
                given.append(deep.detach().requires_grad_())
            out = self.forward(given[0], rows, given[1] if deep is not None else None)
            out.backward(grad)
        found = [one.grad if one.grad is not None else torch.zeros_like(one) for one in given]
        return found[0], found[1] if deep is not None else None

    def _run(self, hidden: torch.Tensor, rows: Rows, cache: Any) -> torch.Tensor:
        device = hidden.device
        call: dict[str, Any] = {
            "input_ids": torch.zeros(rows.batch, rows.length, dtype=torch.long, device=device)
        }
        if rows.spans is not None:
            call["attention_mask"] = mask_of(rows).to(device)
        if rows.positions != "count":
            call["position_ids"] = positions_of(rows).to(device)
        call |= {"use_cache": cache is not None, "past_key_values": cache}
        self._now.hidden, self._now.out = hidden, None
        try:
            self.model(**{name: value for name, value in call.items() if name in self._names})
        except Stopped:
            return self._now.out  # type: ignore[no-any-return]
        finally:
            self._now.hidden = self._now.out = None
        raise RuntimeError("the model ended before its body did")

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": self._now.hidden}
        return (self._now.hidden, *args[1:]), kwargs

    def _leave(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._now.out = output[0] if isinstance(output, tuple) else output
        raise Stopped

    def _prefixes(self, deep: torch.Tensor) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache(config=settings_of(self.model))
        before = deep.new_zeros(deep.shape[1], deep.shape[3], 1)
        for index in range(self.cut.count):
            place = 2 * (index - self.cut.head)
            if self.cut.is_body(index):
                cache.update(deep[place], deep[place + 1], index)
            else:
                seen(cache, index, before)
        return cache


def middle(head: int, tail: int) -> Part:
    """Return the part of a model that a body server loads: no vocabulary, no ends."""

    def keep(model: nn.Module) -> None:
        keep_body(model, cut_of(model, head, tail))

    return Part(f"body {head} {tail}", keep)
