"""Per-example gradients by Opacus, for the layers that are not handled by ourselves."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from fedtune.errors import ExitCode, FedtuneError

__all__ = ["Hooks"]


class Hooks:
    """Opacus' hooks on chosen modules of a model, without wrapping it.

    Parameters
    ----------
    modules : sequence of nn.Module
        Each owns trainable parameters, has no trainable children, and is called
        with one tensor whose first dimension is the example.

    Raises
    ------
    NotImplementedError
        If Opacus cannot handle a module, for example one with buffers.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        from opacus.grad_sample.grad_sample_module import GradSampleHooks

        # Of layers on frozen inputs; their parameters' gradients are right all the same.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        self._modules = tuple(modules)
        self._modes: list[bool] = []
        with torch.no_grad():
            self._hooks = GradSampleHooks(
                nn.ModuleList(modules), loss_reduction="sum", strict=False
            )
        self._hooks.disable_hooks()

    def start(self) -> None:
        """Record from here on."""
        self._modes = [module.training for module in self._modules]
        for module in self._modules:
            # Opacus records in training mode only. A layer that behaves differently
            # in it would be found out by the proof.
            module.training = True
        self._hooks.enable_hooks()

    def collect(
        self, parameters: Iterable[nn.Parameter], add: Callable[[nn.Parameter, torch.Tensor], None]
    ) -> None:
        """Hand over what was recorded, as gradients of shape (B, *shape)."""
        for parameter in parameters:
            found: Any = parameter.grad_sample  # type: ignore[attr-defined]
            for part in found if isinstance(found, list) else [found]:
                if part is not None:
                    add(parameter, part)
                elif parameter.grad is not None:
                    raise FedtuneError(
                        "a parameter has a gradient, but none for each example",
                        hint="its layer is used in a way that hooks do not see",
                        code=ExitCode.MODEL,
                    )

    def stop(self) -> None:
        """Record no more, and forget what was recorded."""
        self._hooks.disable_hooks()
        for module, mode in zip(self._modules, self._modes, strict=False):
            module.training = mode
        self._modes = []
        for module in self._modules:
            for leftover in ("activations", "max_batch_len"):
                if hasattr(module, leftover):
                    delattr(module, leftover)
            for parameter in module.parameters():
                parameter.grad_sample = None  # type: ignore[attr-defined]
                parameter._forward_counter = 0  # type: ignore[attr-defined]
                if hasattr(parameter, "_current_grad_sample"):
                    del parameter._current_grad_sample

    def remove(self) -> None:
        """Leave the model as it was found."""
        self.stop()
        self._hooks.cleanup()
        for module in self._modules:
            if hasattr(module, "ft_compute_sample_grad"):
                del module.ft_compute_sample_grad
