"""Chooses, layer by layer, who makes the gradients of the examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.per_example_layers import kind_of

__all__ = ["assign", "refuse_coupling"]


def refuse_coupling(model: nn.Module) -> None:
    """Raise if one example of a batch changes what another one computes.

    Batch normalisation also keeps statistics of the data that no noise is added to.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise _coupled(f"'{name}' normalises over the batch")
    settings: Any = getattr(model, "config", None)
    if getattr(settings, "output_router_logits", False):
        raise _coupled("its experts are balanced over the batch (output_router_logits)")
    if getattr(settings, "expert_capacity", None):
        raise _coupled("tokens of the batch compete for its experts (expert_capacity)")


def _coupled(why: str) -> FedtuneError:
    return FedtuneError(
        f"this model cannot be trained with privacy for each example: {why}",
        hint="use a model in which examples do not see each other",
        code=ExitCode.MODEL,
    )


def assign(
    model: nn.Module, named: Mapping[str, nn.Parameter]
) -> tuple[list[nn.Module], list[nn.Module], frozenset[str], str]:
    """Choose who makes the gradients of which parameters.

    Returns
    -------
    own, others : list of Module
        Layers that do it themselves, and layers for Opacus.
    late : frozenset of str
        Parameters of the latter.
    reason : str
        Why it must be a loop, or ''.
    """
    names = {id(parameter): name for name, parameter in named.items()}
    own, others = [], []
    ours: set[int] = set()
    theirs: set[int] = set()
    for module in model.modules():
        mine = {id(p) for p in module.parameters() if p.requires_grad}
        direct = {id(p) for p in module.parameters(recurse=False) if p.requires_grad}
        kind = kind_of(module) if mine else ""
        if kind in ("linear", "embedding"):
            own.append(module)
            ours |= direct
        elif kind and mine - ours:
            own.append(module)
            ours |= {id(p) for p in _vectors(module)}
        elif direct - ours and mine == direct and not _container(module):
            others.append(module)
            theirs |= direct
    late = frozenset(names[i] for i in theirs)
    both = ours & theirs
    left = sorted(name for i, name in names.items() if i not in ours | theirs)
    if both:
        return [], [], frozenset(), f"'{names[both.pop()]}' is shared by layers of two sorts"
    if left:
        return [], [], frozenset(), f"'{left[0]}' is in a layer of an unknown sort"
    if others and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        return [], [], frozenset(), "gradient checkpointing runs past hooks"
    return own, others, late, ""


def _container(module: nn.Module) -> bool:
    return isinstance(module, nn.ParameterDict | nn.ParameterList)


def _vectors(module: Any) -> Iterator[nn.Parameter]:
    for attribute in ("ia3_l", "beft_bias"):
        yield from (p for p in getattr(module, attribute, {}).values() if p.requires_grad)
