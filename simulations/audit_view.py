"""What the server of a cut model has: what came over the wire, and a head of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from fedtune.adapters import peft_settings
from fedtune.models import settings_of, share
from fedtune.split.blocks import Cut, Stopped, blocks_of, network
from fedtune.split.rows import Rows

__all__ = ["Disturb", "Middle", "PublicHead", "Wire"]

Disturb = Callable[[torch.Tensor, Rows], torch.Tensor]
"""What the client does to a tensor (B, T, d) before it leaves."""

_ROOM = 1 << 21
"""Numbers held at once while candidates are tried."""


class Middle(Protocol):
    """What stands in the middle of the model: the server's ``Body``."""

    def forward(
        self, hidden: torch.Tensor, rows: Rows, deep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the output (B, T, d)."""
        ...

    def gradients(
        self, hidden: torch.Tensor, rows: Rows, deep: torch.Tensor | None, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the gradients at ``hidden`` and ``deep``."""
        ...


@dataclass
class Wire:
    """A link to a body in this process that keeps a copy of all that passes.

    Attributes
    ----------
    hidden, returned : Disturb or None
        Noise on hidden states, and on the gradients at the body's output.
    sent, given, back : list of Tensor
        Hidden states as they arrived, what the body made of them, gradients as they arrived.
    keep : bool
        Whether to keep copies.
    """

    body: Middle
    hidden: Disturb | None = None
    returned: Disturb | None = None
    keep: bool = True
    rows: list[Rows] = field(default_factory=list)
    sent: list[torch.Tensor] = field(default_factory=list)
    given: list[torch.Tensor] = field(default_factory=list)
    back: list[torch.Tensor] = field(default_factory=list)
    _open: dict[str, torch.Tensor] = field(default_factory=dict)

    def forward(
        self, hidden: torch.Tensor, rows: Rows, deep: torch.Tensor | None, step: str, *, grad: bool
    ) -> torch.Tensor:
        """Run the body on what arrives."""
        arrived = hidden.detach() if self.hidden is None else self.hidden(hidden.detach(), rows)
        with torch.no_grad():
            out = self.body.forward(arrived, rows, deep).clone()
        if grad:
            self._open[step] = arrived
        if self.keep:
            self.rows.append(rows)
            self.sent.append(arrived.clone())
            self.given.append(out.clone())
        return out

    def backward(
        self, hidden: torch.Tensor, rows: Rows, deep: torch.Tensor | None, grad: torch.Tensor,
        step: str,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """Take the gradient of a step and return those at its inputs."""
        arrived = grad if self.returned is None else self.returned(grad, rows)
        if self.keep:
            self.back.append(arrived.clone())
        return self.body.gradients(self._open.pop(step), rows, deep, arrived)

    def go_on(self, session: str, hidden: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Refuse: nothing is generated in an audit."""
        raise LookupError(session)


class PublicHead:
    """The server's own copy of the client's head, to try tokens on.

    Parameters
    ----------
    model : nn.Module
        Whole, with the adapter values that the server knows; not changed.
    cut : Cut

    Attributes
    ----------
    front : int
        Places before the text: prompts.
    table : Tensor, shape (V, e)
        Embeddings of all tokens.
    """

    def __init__(self, model: nn.Module, cut: Cut) -> None:
        self.model: Any = share(model).requires_grad_(False).eval()
        self.cut = cut
        self.network = _any(network(self.model))
        self._block = blocks_of(self.model).modules[cut.head]
        count, self._deep = 0, False
        if hasattr(model, "peft_config"):
            settings = peft_settings(model)
            if settings.is_prompt_learning:
                count = settings.num_virtual_tokens
                self._deep = settings.peft_type == "PREFIX_TUNING"
        self.front = 0 if self._deep else count
        self._past = count if self._deep else 0
        embedding: nn.Module = self.network.get_input_embeddings()
        with torch.no_grad():
            size = int(settings_of(self.network).get_text_config().vocab_size)
            self.table: torch.Tensor = embedding(torch.arange(size))
        self._fast: bool | None = None

    @property
    def vocabulary(self) -> int:
        """Return V."""
        return len(self.table)

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return hidden states (N, T, d) at the cut for tokens (N, T); no padding."""
        with torch.no_grad():
            return self.states_of(self.table[tokens])

    def states_of(
        self, embedded: torch.Tensor, mask: torch.Tensor | None = None, *, whole: bool = False
    ) -> torch.Tensor:
        """Return hidden states for embeddings (N, T, e); ``whole``: with the places in front."""
        batch = len(embedded)
        given = self._fronted(embedded)
        call: dict[str, Any] = {}
        if self._deep:
            call["past_key_values"] = self.model.get_prompt(batch)
        if mask is not None or self._deep:
            real = torch.ones(embedded.shape[:2]) if mask is None else mask
            before = torch.ones(batch, self.front + self._past)
            call["attention_mask"] = torch.cat([before.long(), real.long()], 1)
        out = self._caught(given, use_cache=self._deep, **call)
        return out if whole else out[:, self.front :]

    def after(self, before: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Return hidden states (N, K, d) of candidates (N, K) after tokens (N, t); causal heads."""
        if self._fast is None:
            self._fast = self._try_fast()
        run = self._after_fast if self._fast else self._after_slow
        width = before.shape[1] + self.front + self._past + 1
        count = candidates.shape[1]
        # Keys and values, or hidden states, of every candidate's whole row.
        most = max(1, _ROOM // (width * self.table.shape[1]))
        group, piece = max(1, most // count), min(count, most)
        rows = []
        with torch.no_grad():
            for i in range(0, len(before), group):
                part = candidates[i : i + group]
                rows.append(
                    torch.cat(
                        [
                            run(before[i : i + group], part[:, k : k + piece])
                            for k in range(0, count, piece)
                        ],
                        1,
                    )
                )
        return torch.cat(rows)

    def causal(self) -> bool:
        """Say, by trying, whether a place never sees those after it."""
        one = torch.arange(8)[None] % self.vocabulary
        other = one.clone()
        other[0, -1] = self.vocabulary - 1
        gap = (self.states(one) - self.states(other))[:, :-1].abs().max()
        return float(gap) < 1e-6 * float(self.states(one).abs().max())

    def expect(self, before: torch.Tensor) -> torch.Tensor:
        """Return the model's log-probabilities (N, V) for what follows tokens (N, t)."""
        if before.shape[1] + self.front == 0:
            return torch.zeros(len(before), self.vocabulary)
        with torch.no_grad():
            given = self._fronted(self.table[before])
            call: dict[str, Any] = {}
            if self._deep:
                call["past_key_values"] = self.model.get_prompt(len(before))
            logits = self.network(inputs_embeds=given, use_cache=self._deep, **call).logits[:, -1]
        found: torch.Tensor = logits.float().log_softmax(-1)[:, : self.vocabulary]
        return found

    def _fronted(self, embedded: torch.Tensor) -> torch.Tensor:
        if not self.front:
            return embedded
        prompts: torch.Tensor = self.model.get_prompt(len(embedded))
        return torch.cat([prompts, embedded], 1)

    def _after_slow(self, before: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        batch, count = candidates.shape
        rows = before.repeat_interleave(count, 0)
        made = self.states(torch.cat([rows, candidates.reshape(-1, 1)], 1))
        return made[:, -1].reshape(batch, count, -1)

    def _after_fast(self, before: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Run the tokens before once, and every candidate on their keys and values."""
        from transformers import DynamicCache

        batch, count = candidates.shape
        settings = settings_of(self.network)
        first = self.model.get_prompt(batch) if self._deep else _any(DynamicCache(config=settings))
        given = self._fronted(self.table[before])
        if given.shape[1]:
            self._caught(given, past_key_values=first, use_cache=True)
        cache = DynamicCache(config=settings)
        for index in range(self.cut.head):
            layer = first.layers[index]
            if getattr(layer, "keys", None) is not None and layer.keys.numel():
                cache.update(
                    layer.keys.repeat_interleave(count, 0),
                    layer.values.repeat_interleave(count, 0),
                    index,
                )
        tokens = self.table[candidates.reshape(-1, 1)]
        made = self._caught(tokens, past_key_values=cache, use_cache=True)
        return made.reshape(batch, count, -1)

    def _try_fast(self) -> bool:
        """Use keys and values where that gives what the whole row gives."""
        if not self.cut.head:
            return False
        tokens = torch.arange(24).reshape(2, 12) % self.vocabulary
        with (
            torch.no_grad(),
            contextlib.suppress(AttributeError, IndexError, TypeError, ValueError),
        ):
            slow = self._after_slow(tokens[:, :-2], tokens[:, -2:])
            fast = self._after_fast(tokens[:, :-2], tokens[:, -2:])
            self._after_fast(tokens[:, :0], tokens[:, :1])
            return torch.allclose(slow, fast, rtol=1e-4, atol=1e-5)
        return False

    def _caught(self, embedded: torch.Tensor, **call: Any) -> torch.Tensor:
        with _listening(self._block) as caught, contextlib.suppress(Stopped):
            self.network(inputs_embeds=embedded, **call)
        return caught[0]


def _any(value: Any) -> Any:
    """Return a value of a library whose types say less than they know."""
    return value


@contextlib.contextmanager
def _listening(block: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Catch what goes into a block, and stop there."""
    caught: list[torch.Tensor] = []

    def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
        raise Stopped

    handle = block.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield caught
    finally:
        handle.remove()
