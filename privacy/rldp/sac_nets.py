"""The networks of the soft actor-critic, their gradients and Adam, on plain vectors.

Small networks on a CPU spend their time between operations: gradients are written out,
the two critics go through each layer together, and each network is one vector, so that
Adam and the soft update are a few operations. The tests compare with autograd.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "LOG_STD", "Adam", "Net", "adam", "fill", "forward", "gradients", "input_gradient", "net",
    "read", "squashed", "step", "step_number", "write",
]  # fmt: skip

LOG_STD = (-20.0, 2.0)  # as everybody has it
BETAS, EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Net:
    """Perceptrons of one shape, stacked, in one vector of which the others are views.

    Attributes
    ----------
    flat : Tensor, (parameters,)
    weights : tuple of Tensor, (stack, in, out) each
    biases : tuple of Tensor, (stack, 1, out) each
    """

    flat: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]


@dataclass(frozen=True)
class Adam:
    """The two moments of Adam (Kingma and Ba 2014, arXiv:1412.6980), (parameters,) each."""

    moment1: Tensor
    moment2: Tensor


def net(stack: int, sizes: tuple[int, ...]) -> Net:
    """Return perceptrons of zeros; ``sizes`` from the input to the output."""
    pairs = list(itertools.pairwise(sizes))
    flat = torch.zeros(
        sum(stack * (below + 1) * above for below, above in pairs),
        dtype=torch.float32,
        device="cpu",
    )
    weights, biases, at = [], [], 0
    for below, above in pairs:
        weights.append(flat[at : (at := at + stack * below * above)].view(stack, below, above))
        biases.append(flat[at : (at := at + stack * above)].view(stack, 1, above))
    return Net(flat, tuple(weights), tuple(biases))


def fill(values: Net, generator: torch.Generator) -> None:
    """Draw weights and biases as torch's own linear layer does."""
    for weight, bias in zip(values.weights, values.biases, strict=True):
        bound = 1 / math.sqrt(weight.shape[1])
        weight.uniform_(-bound, bound, generator=generator)
        bias.uniform_(-bound, bound, generator=generator)


def write(values: Net, name: str) -> dict[str, NDArray[Any]]:
    """Return copies of all layers, by name."""
    found = {}
    for at, (weight, bias) in enumerate(zip(values.weights, values.biases, strict=True)):
        found[f"{name}.{at}.weight"] = weight.numpy().copy()
        found[f"{name}.{at}.bias"] = bias.numpy().copy()
    return found


def read(values: Net, name: str, state: Mapping[str, NDArray[Any]]) -> None:
    """Take over what `write` returned."""
    for at, (weight, bias) in enumerate(zip(values.weights, values.biases, strict=True)):
        weight.numpy()[:] = state[f"{name}.{at}.weight"]
        bias.numpy()[:] = state[f"{name}.{at}.bias"]


def adam(values: Net) -> Adam:
    """Return Adam's moments before the first step."""
    return Adam(torch.zeros_like(values.flat), torch.zeros_like(values.flat))


def step(values: Net, gradient: Net, moments: Adam, lr: float, steps: int) -> None:
    """Move ``values`` by Adam, for the so-manieth time, counted from 1."""
    moments.moment1.lerp_(gradient.flat, 1 - BETAS[0])
    moments.moment2.mul_(BETAS[1])
    moments.moment2.addcmul_(gradient.flat, gradient.flat, value=1 - BETAS[1])
    below = moments.moment2.sqrt().mul_(1 / math.sqrt(1 - BETAS[1] ** steps)).add_(EPS)
    values.flat.addcdiv_(moments.moment1, below, value=-lr / (1 - BETAS[0] ** steps))


def step_number(
    value: float, gradient: float, moments: NDArray[np.float64], lr: float, steps: int
) -> float:
    """Return a single number moved by Adam; ``moments`` (2,) is changed in place."""
    moments[0] += (1 - BETAS[0]) * (gradient - moments[0])
    moments[1] += (1 - BETAS[1]) * (gradient * gradient - moments[1])
    below = math.sqrt(moments[1] / (1 - BETAS[1] ** steps)) + EPS
    return float(value - lr * moments[0] / (1 - BETAS[0] ** steps) / below)


def forward(values: Net, x: Tensor) -> list[Tensor]:
    """Return the input of every layer, and the output: (stack, batch, units) each."""
    layers = [x]
    for weight, bias in zip(values.weights[:-1], values.biases[:-1], strict=True):
        layers.append(torch.baddbmm(bias, layers[-1], weight).relu_())
    layers.append(torch.baddbmm(values.biases[-1], layers[-1], values.weights[-1]))
    return layers


def gradients(values: Net, layers: list[Tensor], gradient: Tensor, into: Net) -> None:
    """Write into ``into`` the gradient by every parameter, from that by the output."""
    for at in reversed(range(len(values.weights))):
        torch.bmm(layers[at].transpose(1, 2), gradient, out=into.weights[at])
        torch.sum(gradient, 1, keepdim=True, out=into.biases[at])
        if at:
            gradient = _below(values, layers, gradient, at)


def input_gradient(values: Net, layers: list[Tensor], gradient: Tensor) -> Tensor:
    """Return the gradient by the input, (stack, batch, in), from that by the output."""
    for at in reversed(range(1, len(values.weights))):
        gradient = _below(values, layers, gradient, at)
    return torch.bmm(gradient, values.weights[0].transpose(1, 2))


def _below(values: Net, layers: list[Tensor], gradient: Tensor, at: int) -> Tensor:
    gradient = torch.bmm(gradient, values.weights[at].transpose(1, 2))
    through: Tensor = torch.ops.aten.threshold_backward.default(gradient, layers[at], 0)
    return through


def squashed(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return the action of a tanh-squashed Gaussian before tanh, and its log-probability.

    Haarnoja et al. 2018, arXiv:1812.05905, appendix C, equation 21, with
    ``log(1 - tanh(a)^2) = 2 (log 2 - a - softplus(-2a))``, which never is log 0.

    Parameters
    ----------
    mean, log_std, noise : Tensor, (..., actions)
        The action is ``tanh(mean + exp(log_std) * noise)``.

    Returns
    -------
    Tensor, (..., actions)
        The action before tanh.
    Tensor, (..., 1)
        In nats.

    Examples
    --------
    >>> action, log_probability = squashed(*torch.tensor([[50.0], [0.0], [0.0]]))
    >>> torch.tanh(action).item(), round(log_probability.item(), 3)
    (1.0, 97.695)
    """
    action = mean + log_std.exp() * noise
    inside = -0.5 * (noise * noise + math.log(2 * math.pi)) - log_std
    correction = 2 * (math.log(2) - action - F.softplus(-2 * action))
    return action, (inside - correction).sum(-1, keepdim=True)
