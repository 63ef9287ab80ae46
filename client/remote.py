"""The client's side of the cut: a stand-in for the body, in the model's own list of blocks."""

from __future__ import annotations

import hashlib
import hmac
import inspect
import uuid
import weakref
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn

from fedtune.errors import ExitCode, FedtuneError
from fedtune.models import Part
from fedtune.split.blocks import (
    Cut,
    Stand,
    blocks_of,
    cache_in,
    cut_of,
    marks,
    network,
    outputs_of,
    seen,
    shaped,
)
from fedtune.split.rows import Rows, rows_of

__all__ = ["BodyLink", "Remote", "connect", "ends", "keep_ends", "remote_of"]


class BodyLink(Protocol):
    """How the client reaches the body; what is lost on the way is asked for again."""

    def forward(
        self, hidden: torch.Tensor, rows: Rows, deep: torch.Tensor | None, step: str, *, grad: bool
    ) -> torch.Tensor:
        """Run the body.

        Parameters
        ----------
        hidden : Tensor, shape (B, T, d)
            Output of the head.
        deep : Tensor or None, shape (2 * blocks, B, heads, P, width)
            Keys and values put before those of each block of the body.
        step : str
            Names this call: the same name always has the same arguments.
        grad : bool
            A ``backward`` of the same step will follow.
        """
        ...

    def backward(
        self, hidden: torch.Tensor, rows: Rows, deep: torch.Tensor | None, grad: torch.Tensor,
        step: str,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """Return the gradients at ``hidden`` and at ``deep``, given the one at the output."""
        ...

    def go_on(self, session: str, hidden: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Run the body on new positions (B, T, d) after those of a session, for generation.

        Raises
        ------
        LookupError
            The body does not hold the ``rows.past`` positions before.
        """
        ...


class Remote(nn.Module):
    """Stands where the body begins; sends hidden states through ``link``.

    It hears the masks and positions that the whole model is called with.
    """

    is_remote_body = True
    link: BodyLink | None

    def __init__(self, cut: Cut, outputs: int) -> None:
        super().__init__()
        self.cut = cut
        self.outputs = outputs
        self.link = None
        self.bypass = False
        self.total = False
        """Under a promise about examples: one that is not finite counts as zero, and says nothing
        to the others."""
        self.step = 0
        self.name = uuid.uuid4().hex
        self._rows: Rows | None = None
        self._cached = False
        self._secret, self._fresh = b"", 0
        self._sessions: Any = weakref.WeakKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> Remote:
        twin = Remote(self.cut, self.outputs)
        twin.train(self.training)
        memo[id(self)] = twin
        return twin

    def begin(self, name: str, *, secret: bytes = b"", fresh: int = 0) -> None:
        """Name the calls from now on ``name.1``, ``name.2``, ...

        Parameters
        ----------
        secret : bytes
            Not empty: every example gets a name under it, and needs to be sent once.
        fresh : int
            Leading positions that change: prompts.
        """
        self.name, self.step = name, 0
        self._secret, self._fresh = secret, fresh

    def note(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Remember the lengths of the batch that the model is called with.

        Without a cache to go on with, none is made: keys that went through one lie
        otherwise in memory, and sums come out in another order.
        """
        form = inspect.signature(module.forward)
        given = form.bind_partial(*args, **kwargs).arguments
        given = given | given.pop("kwargs", {})
        tokens = given.get("input_ids")
        shape = (tokens if tokens is not None else given["inputs_embeds"]).shape
        cache = cache_in(given.values())
        past = _length(cache) if cache is not None else 0
        self._cached = cache is not None
        self._rows = rows_of(
            given.get("attention_mask"), shape[0], shape[1], past, given.get("position_ids")
        )
        if self._secret:
            seen_ids = tokens if tokens is not None else given["inputs_embeds"][:, self._fresh :]
            self._rows = replace(
                self._rows, examples=self._names(seen_ids, self._rows), fresh=self._fresh
            )
            self._still(module)
        if cache is None and "use_cache" in form.parameters:
            kwargs = kwargs | {"use_cache": False}
        return args, kwargs

    def _names(self, given: torch.Tensor, rows: Rows) -> tuple[int, ...]:
        """Name each row by what is in it, under a key that only this client has."""
        found = []
        spans = rows.spans or ((0, rows.length),) * rows.batch
        for row, (start, end) in zip(given.detach().cpu(), spans, strict=True):
            first = max(0, start - self._fresh)
            real = row[first : max(first, end - self._fresh)].contiguous()
            digest = hmac.new(self._secret, real.numpy().tobytes(), hashlib.sha256).digest()
            found.append(int.from_bytes(digest[:8], "little") >> 1)
        return tuple(found)

    def _still(self, module: nn.Module) -> None:
        """Turn off dropout before the cut: what is sent once must not be drawn anew."""
        blocks = blocks_of(module).modules
        inside = {id(one) for one in blocks.modules()}
        for one in module.modules():
            if isinstance(one, nn.Dropout) and id(one) not in inside:
                one.eval()
        for index in range(self.cut.head):
            blocks[index].eval()

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the body's output for (B, T, d)."""
        if self.bypass:
            return shaped(hidden_states, self.outputs)
        rows, link = self._rows, self.link
        if rows is None or link is None:
            raise FedtuneError(
                "the body of this model is not here, and no link to it is open",
                hint="name the body's address, or load the whole model",
                code=ExitCode.MODEL,
            )
        cache = cache_in((*args, *kwargs.values()))
        deep = self._deep(cache) if self._cached else None
        self.step += 1
        step = f"{self.name}.{self.step}"
        if self._cached and deep is None and not torch.is_grad_enabled():
            out = self._in_session(link, hidden_states, rows, cache)
        elif torch.is_grad_enabled() and any(
            value is not None and value.requires_grad for value in (hidden_states, deep)
        ):
            out = _through(hidden_states, deep, _Total(link) if self.total else link, rows, step)
        else:
            out = link.forward(hidden_states.detach(), rows, deep, step, grad=False)
        if deep is None:
            seen(cache, self.cut.head, hidden_states)
        return shaped(out, self.outputs)

    def _deep(self, cache: Any) -> torch.Tensor | None:
        """Return the prefixes that a prompt method has put before each block's keys."""
        layers = [one for index, one in enumerate(cache.layers) if self.cut.is_body(index)]
        if marks(cache, self.cut.head) is not None or not layers:
            return None
        if any(one.keys is None or one.keys.numel() == 0 for one in layers):
            return None
        return torch.stack([part for one in layers for part in (one.keys, one.values)])

    def _in_session(
        self, link: BodyLink, hidden: torch.Tensor, rows: Rows, cache: Any
    ) -> torch.Tensor:
        """Go on with a cached text; a body that lost it is told all of it again."""
        name, before = self._sessions.get(cache, (uuid.uuid4().hex, []))
        mark = marks(cache, self.cut.head)
        order = list(range(len(hidden))) if mark is None else mark[:, 0, -1, 0].tolist()
        held = sum(part.shape[1] for part in before)
        if held != rows.past or order != list(range(len(hidden))):
            raise FedtuneError(
                "this cache was not filled through this cut, or its rows were reordered",
                hint="generate with use_cache=False for beam search",
                code=ExitCode.MODEL,
            )
        hidden = hidden.detach()
        self._sessions[cache] = (name, [*before, hidden])
        try:
            return link.go_on(name, hidden, rows)
        except LookupError:
            whole = torch.cat([*before, hidden], dim=1)
            width = rows.past + rows.length
            again = Rows(rows.batch, width, 0, rows.spans, rows.positions)
            return link.go_on(name, whole, again)[:, rows.past :]


def _length(cache: Any) -> int:
    try:
        return int(cache.get_seq_length())
    except ValueError as error:
        raise FedtuneError(
            "the state of this architecture's cache cannot be kept on both sides of the cut",
            hint="generate with use_cache=False",
            code=ExitCode.MODEL,
        ) from error


def _through(
    hidden: torch.Tensor, deep: torch.Tensor | None, link: BodyLink, rows: Rows, step: str
) -> torch.Tensor:
    apply: Any = _Through.apply
    return apply(hidden, deep, link, rows, step)  # type: ignore[no-any-return]


class _Total:
    """A link for promises about examples: what is not finite does not travel, and stops no other.

    An example with a NaN or an infinity is sent as zeros; here it stays not finite, so that
    per-example clipping counts it as zero.
    """

    def __init__(self, link: BodyLink) -> None:
        self._link = link

    def forward(
        self, hidden: torch.Tensor, rows: Rows, deep: torch.Tensor | None, step: str, *, grad: bool
    ) -> torch.Tensor:
        bad = _odd(hidden)
        out = self._link.forward(_without(hidden, bad), rows, deep, step, grad=grad)
        out[bad] = float("nan")
        return out

    def backward(
        self, hidden: torch.Tensor, rows: Rows, deep: torch.Tensor | None, grad: torch.Tensor,
        step: str,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        bad, odd = _odd(hidden), _odd(grad)
        sent = _without(hidden, bad)
        found, at_deep = self._link.backward(sent, rows, deep, _without(grad, odd), step)
        found[bad | odd] = float("nan")
        if at_deep is not None:
            at_deep[:, bad | odd] = float("nan")
        return found, at_deep

    def go_on(self, session: str, hidden: torch.Tensor, rows: Rows) -> torch.Tensor:
        return self._link.go_on(session, hidden, rows)


def _odd(values: torch.Tensor) -> torch.Tensor:
    """Say which rows of (B, T, d) hold a NaN or an infinity, shape (B,)."""
    return ~values.detach().isfinite().flatten(1).all(1)


def _without(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return values.detach().masked_fill(rows[:, None, None], 0.0) if rows.any() else values.detach()


class _Through(torch.autograd.Function):
    """The body as one differentiable function; its graph is on the other side."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, deep: torch.Tensor | None, link: BodyLink, rows: Rows,
        step: str,
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(hidden, deep)
        ctx.call = (link, rows, step)
        return link.forward(hidden, rows, deep, step, grad=True)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        hidden, deep = ctx.saved_tensors
        link, rows, step = ctx.call
        at_hidden, at_deep = link.backward(hidden, rows, deep, grad.contiguous(), step)
        return at_hidden, at_deep, None, None, None


def keep_ends(model: nn.Module, cut: Cut) -> Remote:
    """Turn a model, in place, into the client's part of it: head, stand-in, tail.

    The list of blocks keeps its length, so every parameter keeps its name.
    """
    outputs = outputs_of(model)
    blocks = blocks_of(model).modules
    remote = Remote(cut, outputs)
    for index in cut.body:
        blocks[index] = Stand(blocks[index], index, outputs)
    first = blocks[cut.head]
    for name, value in vars(first).items():
        if not name.startswith("_") and name not in ("training", "index", "outputs"):
            setattr(remote, name, value)
    blocks[cut.head] = remote
    network(model).register_forward_pre_hook(remote.note, with_kwargs=True)
    return remote


def remote_of(model: nn.Module) -> Remote | None:
    """Return the stand-in of a client's part; None for a whole model."""
    return next((one for one in model.modules() if isinstance(one, Remote)), None)


def connect(model: nn.Module, link: BodyLink) -> None:
    """Give a client's part its link to the body."""
    remote = remote_of(model)
    if remote is None:
        raise FedtuneError("this model is whole: nothing to connect", code=ExitCode.MODEL)
    remote.link = link


def ends(head: int, tail: int) -> Part:
    """Return the part of a model that a client loads: all but the body."""

    def keep(model: nn.Module) -> None:
        keep_ends(model, cut_of(model, head, tail))

    return Part(f"ends {head} {tail}", keep)
