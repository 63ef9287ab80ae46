"""Where a Hugging Face model can be cut: its list of equal blocks, found and never shortened."""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fedtune.errors import ExitCode, FedtuneError
from fedtune.models import settings_of

__all__ = [
    "Blocks",
    "Cut",
    "Stand",
    "Stopped",
    "blocks_of",
    "cache_in",
    "cut_of",
    "marks",
    "network",
    "outputs_of",
    "seen",
    "shaped",
]

_PLAIN = (bool, int, float, str, type(None))


class Stopped(Exception):  # noqa: N818 - not an error: what was wanted has been seen
    """Ends a model's forward once the part that was asked for has run."""


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model.

    Attributes
    ----------
    path : str
        Name of their ``nn.ModuleList`` in the model.
    modules : nn.ModuleList
        As many as ``config.num_hidden_layers``; the list itself, not a copy.
    width : int
        Size d of a hidden state.
    """

    path: str
    modules: nn.ModuleList
    width: int


@dataclass(frozen=True)
class Cut:
    """Which blocks are whose: ``[0, head)`` and ``[count - tail, count)`` are the client's.

    Examples
    --------
    >>> cut = Cut(head=1, tail=1, count=6)
    >>> list(cut.body), cut.is_body(0)
    ([1, 2, 3, 4], False)
    """

    head: int
    tail: int
    count: int

    @property
    def body(self) -> range:
        """Return the indices of the server's blocks."""
        return range(self.head, self.count - self.tail)

    def is_body(self, index: int) -> bool:
        """Say whether block ``index`` is the server's."""
        return index in self.body


def blocks_of(model: nn.Module) -> Blocks:
    """Find the blocks of a model, adapted or not.

    The largest ``nn.ModuleList`` of one class with ``config.num_hidden_layers`` members.

    Raises
    ------
    FedtuneError
        There is none: encoder-decoder models and those of another build cannot be cut.
    """
    settings = settings_of(model)
    settings = settings.get_text_config() if hasattr(settings, "get_text_config") else settings
    wanted = getattr(settings, "num_hidden_layers", None)
    found = [
        (name, module) for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == wanted
        and len({type(block) for block in module if not _placed(block)}) <= 1
    ]  # fmt: skip
    if not found or getattr(settings, "is_encoder_decoder", False):
        raise FedtuneError(
            f"{type(model).__name__} has no single list of {wanted} equal blocks to cut",
            hint="split tuning takes decoders and encoders of one stack; tune this model whole",
            code=ExitCode.MODEL,
        )
    placed = [one for one in found if any(_placed(block) for block in one[1])]
    path, modules = placed[0] if placed else max(found, key=lambda one: _size(one[1]))
    return Blocks(path, modules, int(settings.hidden_size))


def cut_of(model: nn.Module, head: int, tail: int) -> Cut:
    """Return the cut of a model with so many blocks at the client's two ends.

    Raises
    ------
    FedtuneError
        No block would be left for the server.
    """
    count = len(blocks_of(model).modules)
    if head < 0 or tail < 0 or head + tail >= count:
        raise FedtuneError(
            f"tuning.split: head={head} and tail={tail} leave nothing of {count} blocks "
            "to the server",
            hint=f"head + tail must be at most {count - 1}",
            code=ExitCode.CONFIG,
        )
    return Cut(head, tail, count)


def outputs_of(model: nn.Module) -> int:
    """Return how many values a block returns: 0 for a bare tensor, else the tuple's length.

    The first block is run on two tokens; on the meta device that costs nothing. What
    cannot run there has to say it in the annotation of its ``forward``.
    """
    seen: list[int] = []

    def look(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(len(output) if isinstance(output, tuple) else 0)
        raise Stopped

    first = blocks_of(model).modules[0]
    handle = first.register_forward_hook(look)
    try:
        device = next(model.parameters()).device
        with torch.no_grad(), _Shapes(), contextlib.suppress(Stopped, RuntimeError):
            network(model)(
                input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False
            )
    finally:
        handle.remove()
    if seen:
        return seen[0]
    said = str(inspect.signature(first.forward).return_annotation)
    return 2 if said.lower().startswith("tuple") else 0


def network(model: nn.Module) -> nn.Module:
    """Return the outermost Hugging Face model: adapters and poolings are around it."""
    from transformers import PreTrainedModel

    return next(one for one in model.modules() if isinstance(one, PreTrainedModel))


class _Shapes(TorchFunctionMode):
    """Answers 0 where code asks a tensor without data for a number."""

    _asks: ClassVar[dict[Any, Any]] = {
        torch.Tensor.item: 0,
        torch.Tensor.__int__: 0,
        torch.Tensor.__bool__: False,
        torch.Tensor.__contains__: False,
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._asks and args[0].is_meta:
            return self._asks[func]
        return func(*args, **(kwargs or {}))


class Stand(nn.Module):
    """Keeps a block's place in the list, and what others read from it, without its weights.

    Models read masks and positions by a block's place, so the list keeps its length
    (``research/split_peft.md`` B.5). A cache is told the tokens it would have seen.
    """

    def __init__(self, block: nn.Module, index: int, outputs: int) -> None:
        super().__init__()
        self.index = index
        self.outputs = outputs
        for name, value in vars(block).items():
            if not name.startswith("_") and name != "training" and isinstance(value, _PLAIN):
                setattr(self, name, value)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Give back what came in, in the form that the block's class gives."""
        seen(cache_in((*args, *kwargs.values())), self.index, hidden_states)
        return shaped(hidden_states, self.outputs)


def shaped(hidden: torch.Tensor, outputs: int) -> Any:
    """Return a hidden state as a block of this class does."""
    return (hidden, *[None] * (outputs - 1)) if outputs else hidden


def cache_in(values: Any) -> Any:
    """Return the cache of keys and values among a block's arguments, or None."""
    from transformers.cache_utils import Cache

    return next((value for value in values if isinstance(value, Cache)), None)


def seen(cache: Any, index: int, hidden: torch.Tensor) -> None:
    """Count the tokens of ``hidden`` in the cache of a layer that is not here.

    Masks and positions then come out right. The keys are numbers of rows, one float a
    token: whoever reorders the rows of a cache leaves a trace (see ``marks``). Prefixes
    that are there already stay alone.
    """
    if cache is None or (index < len(cache.layers) and not hasattr(cache.layers[index], "keys")):
        return
    keys = cache.layers[index].keys if index < len(cache.layers) else None
    if keys is None or keys.numel() == 0 or marks(cache, index) is not None:
        batch, length = hidden.shape[:2]
        numbers = torch.arange(batch, device=hidden.device, dtype=hidden.dtype)
        keys = numbers[:, None, None, None].expand(batch, 1, length, 1)
        cache.update(keys, keys, index)


def marks(cache: Any, index: int) -> torch.Tensor | None:
    """Return what ``seen`` left for a layer, (B, 1, T, 1); None: real keys, or nothing."""
    keys = getattr(cache.layers[index], "keys", None) if index < len(cache.layers) else None
    if keys is None or keys.numel() == 0 or tuple(keys.shape[1::2]) != (1, 1):
        return None
    return keys  # type: ignore[no-any-return]


def _placed(block: nn.Module) -> bool:
    return isinstance(block, Stand) or bool(getattr(block, "is_remote_body", False))


def _size(modules: nn.ModuleList) -> int:
    return sum(p.numel() for p in modules.parameters())
