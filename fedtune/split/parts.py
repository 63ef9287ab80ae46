"""Which frozen weights a part of a cut model holds, and how both sides know they mean the same."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from fedtune.split.blocks import Cut, blocks_of, network

__all__ = ["body_names", "ends_digest"]


def body_names(model: nn.Module, cut: Cut) -> tuple[str, ...]:
    """Return how the names of the body's parameters begin, adapted or not."""
    path = blocks_of(model).path
    return tuple(f"{path}.{index}." for index in cut.body)


def ends_digest(model: nn.Module, cut: Cut) -> str:
    """Return a SHA-256 of the client's frozen part: embeddings, head blocks, tail blocks, cut.

    A client and a body server with the same digest hold parts of the same model, cut at
    the same places. Heads that are trained do not count.

    Parameters
    ----------
    model : nn.Module
        Without an adapter; whole, or the client's part.
    cut : Cut
    """
    digest = hashlib.sha256(f"{cut.head},{cut.tail},{cut.count};".encode())
    blocks = blocks_of(model).modules
    given: Any = network(model)
    embedding = given.get_input_embeddings()
    parts = [("embedding", embedding)] + [
        (str(index), blocks[index]) for index in range(cut.count) if not cut.is_body(index)
    ]
    for part, module in parts:
        for name, value in sorted(module.named_parameters()):
            array = value.detach().cpu().contiguous()
            digest.update(f"{part}.{name}:{tuple(array.shape)}:{array.dtype};".encode())
            digest.update(array.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
