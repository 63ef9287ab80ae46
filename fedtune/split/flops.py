"""What of a step's arithmetic is the client's: counted by torch, on the user's own model.

``torch.utils.flop_counter`` counts the products of a forward and a backward pass as they run;
what is frozen and what is not is seen by it as by autograd. Attention is made eager, since its
fused forms on a CPU are not counted. Where the model allows it nothing is computed: shapes on
the meta device are enough.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedtune.errors import ExitCode, FedtuneError
from fedtune.split.blocks import Cut, Stand, blocks_of

__all__ = ["Share", "count_step", "measure_share"]


@dataclass(frozen=True)
class Share:
    """Floating-point operations of one batch.

    Attributes
    ----------
    whole_forward, whole_step : int
        Of the whole model; a step is forward and backward.
    client_forward, client_step : int
        Of head and tail, with everything around them.
    output : int
        Of the output layer, forward: the vocabulary's share. 0 where there is none.

    Examples
    --------
    >>> share = Share(100, 200, 30, 50, 21)
    >>> share.of_step, share.of_forward, share.output_of_forward
    (0.25, 0.3, 0.21)
    """

    whole_forward: int
    whole_step: int
    client_forward: int
    client_step: int
    output: int

    @property
    def of_step(self) -> float:
        """Return the client's share of a step."""
        return self.client_step / self.whole_step

    @property
    def of_forward(self) -> float:
        """Return the client's share of a forward pass."""
        return self.client_forward / self.whole_forward

    @property
    def output_of_forward(self) -> float:
        """Return the output layer's share of the whole model's forward pass."""
        return self.output / self.whole_forward


def measure_share(model: nn.Module, cut: Cut, batch: int, length: int) -> Share:
    """Count a step of the whole model, and the client's part of it.

    Parameters
    ----------
    model : nn.Module
        Whole, with its adapter: what requires gradients is what is trained. Not changed.
    cut : Cut
    batch, length : int
        B examples of T tokens, none of them padding.

    Raises
    ------
    FedtuneError
        The model has no list of blocks, or is only a part.
    """
    if any(isinstance(block, Stand) for block in blocks_of(model).modules):
        raise FedtuneError(
            f"{type(model).__name__} is a part of a model: nothing to compare it with",
            hint="count on the whole model",
            code=ExitCode.MODEL,
        )
    whole = _copy(model, meta=True)
    try:
        return _measure(whole, cut, batch, length)
    except (RuntimeError, NotImplementedError):
        # Some masks are looked at while they are made: then there must be values to look at.
        return _measure(_copy(model, meta=False), cut, batch, length)


def count_step(model: nn.Module, batch: int, length: int) -> tuple[int, int]:
    """Return the operations of a forward pass, and of forward and backward.

    The model is called with ``input_ids`` and ``attention_mask``; what is not trained costs
    no gradient of its own. Nothing is trained: both are equal.
    """
    device = next(model.parameters()).device
    ids = torch.ones(batch, length, dtype=torch.long, device=device)
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        forward = int(counter.get_total_flops())
        if logits.requires_grad:
            logits.float().sum().backward()
        return forward, int(counter.get_total_flops())


def _measure(model: nn.Module, cut: Cut, batch: int, length: int) -> Share:
    blocks = blocks_of(model).modules
    kinds: list[int] = []
    made: list[int] = []

    def look(_module: nn.Module, _args: Any, output: Any) -> None:
        kinds.append(len(output) if isinstance(output, tuple) else 0)

    def multiplied(module: Any, _args: Any, output: torch.Tensor) -> None:
        made.append(2 * output.numel() * int(module.weight.shape[-1]))

    handles = [blocks[0].register_forward_hook(look)]
    if (layer := _output(model)) is not None:
        handles.append(layer.register_forward_hook(multiplied))
    forward, step = count_step(model, batch, length)
    for handle in handles:
        handle.remove()
    for index in cut.body:
        blocks[index] = Stand(blocks[index], index, kinds[0])
    client_forward, client_step = count_step(model, batch, length)
    return Share(forward, step, client_forward, client_step, sum(made))


def _output(model: nn.Module) -> nn.Module | None:
    """Return the layer that gives one value per word, if the model has one."""
    asked = [getattr(one, "get_output_embeddings", None) for one in model.modules()]
    found = [ask() for ask in asked if callable(ask)]
    return next((one for one in found if isinstance(one, nn.Linear)), None)


def _copy(model: nn.Module, *, meta: bool) -> nn.Module:
    """Copy a model's structure, with eager attention; weights are shared, or only shapes."""
    from transformers import PreTrainedModel

    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        values = torch.empty_like(parameter, device="meta") if meta else parameter.detach()
        memo[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta") if meta else buffer
    copied: nn.Module = copy.deepcopy(model, memo)
    for module in copied.modules():
        choose = getattr(module, "set_attn_implementation", None)
        if callable(choose) and isinstance(module, PreTrainedModel):
            choose("eager")
    return copied
