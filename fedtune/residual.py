"""The frozen low-rank residual that makes averaged LoRA exact (FedEx-LoRA).

The mean of products is not the product of means. What is missing is itself of
low rank, ``U @ V``, and is added to the layer's output; base weights are never
touched, so they can be shared and quantised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedtune.adapters import Tensors

__all__ = ["Residual", "join", "set_residual", "split"]

Residual = dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
"""Layer name to (U, V): U is (d_out, R), V is (R, d_in); the delta is ``U @ V``."""

_MARK = "residual/"
_SLOT = "_fedtune_residual"


def join(adapter: Mapping[str, NDArray[np.float32]], residual: Residual) -> Tensors:
    """Put an adapter and its residual into one set of named tensors."""
    flat: Tensors = dict(adapter)
    for layer, (u, v) in residual.items():
        flat[f"{_MARK}{layer}.U"], flat[f"{_MARK}{layer}.V"] = u, v
    return flat


def split(tensors: Mapping[str, NDArray[np.float32]]) -> tuple[Tensors, Residual]:
    """Undo ``join``."""
    adapter = {name: value for name, value in tensors.items() if not name.startswith(_MARK)}
    layers = sorted(n[len(_MARK) : -2] for n in tensors if n.startswith(_MARK) and n.endswith(".U"))
    residual = {la: (tensors[f"{_MARK}{la}.U"], tensors[f"{_MARK}{la}.V"]) for la in layers}
    return adapter, residual


def set_residual(model: nn.Module, residual: Residual) -> None:
    """Make the named layers add ``x @ V.T @ U.T`` to their output; replaces what was set."""
    modules = dict(model.named_modules())
    for module in modules.values():
        if (old := getattr(module, _SLOT, None)) is not None:
            old.remove()
            delattr(module, _SLOT)
    for layer, (u, v) in residual.items():
        module = modules[layer]
        place = next(module.parameters())
        down = torch.tensor(v, device=place.device, dtype=torch.float32)
        up = torch.tensor(u, device=place.device, dtype=torch.float32)
        setattr(module, _SLOT, module.register_forward_hook(_adder(down, up)))


def _adder(down: torch.Tensor, up: torch.Tensor) -> Any:
    def add(_: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        hidden = inputs[0].to(down.dtype)
        delta = nn.functional.linear(nn.functional.linear(hidden, down), up)
        return output + delta.to(output.dtype)

    return add
