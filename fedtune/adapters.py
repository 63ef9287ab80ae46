"""What is tuned: adapters of ``peft``, by name, and how each of them averages."""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedtune.config import TuningConfig
from fedtune.errors import ExitCode, FedtuneError
from fedtune.models import Base, settings_of, share
from fedtune.seeds import derive
from fedtune.split.blocks import blocks_of, cut_of

__all__ = [
    "FULL",
    "SFPROMPT",
    "Pair",
    "Tensors",
    "attach",
    "averaging",
    "change",
    "methods",
    "pairs",
    "peft_settings",
    "read",
    "tail_of",
    "trainable",
    "write",
]

Tensors = dict[str, NDArray[np.float32]]
"""Parameters by name, float32."""

Task = Literal["causal-lm", "classification"]

FULL = "full"
"""No adapter: every parameter of the model trains."""

SFPROMPT = "sfprompt"
"""Prompts in front, and LoRA on the tail's blocks: two adapters of peft, one in the other."""

_PEFT_TASK = {"causal-lm": "CAUSAL_LM", "classification": "SEQ_CLS"}
# Measured in docs/decisions.md: plain averaging of these is exact.
_LINEAR = frozenset(
    {"ia3", "layernorm", "bias", "lora-frozen-a", "prompt", "p-tuning-v2", "ln_tuning", "beft",
     "trainable_tokens", "fourierft", "waveft", "shira", "c3a", "miss", "frod", "tinylora",
     "prompt_tuning", FULL}
)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """One low-rank product ``scale * B @ A`` inside the adapter.

    Attributes
    ----------
    layer : str
        Name of the adapted layer in the tuned model.
    a, b : str
        Parameter names; A is (r, d_in), B is (d_out, r).
    scale : float
        ``alpha / r``, or what the variant uses instead.
    """

    layer: str
    a: str
    b: str
    scale: float


def averaging(adapter: str) -> Literal["linear", "product", "inexact"]:
    """Say whether the mean of adapters is the adapter of the mean.

    ``linear``: yes. ``product``: not, and the exact rule knows what to add.
    ``inexact``: not, and no exact rule is known here.

    Examples
    --------
    >>> averaging("prompt"), averaging("lora"), averaging("loha")
    ('linear', 'product', 'inexact')
    """
    name = adapter.lower()
    if name in _LINEAR:
        return "linear"
    return "product" if name in ("lora", SFPROMPT) else "inexact"


def methods() -> tuple[str, ...]:
    """Return every adapter name that ``attach`` takes with this peft."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    return (
        FULL,
        *_NAMED,
        *sorted(kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING),
    )


def attach(base: Base, tuning: TuningConfig, task: Task, seed: int) -> nn.Module:
    """Put a fresh adapter on a model.

    Parameters
    ----------
    base : Base
        Its weights stay frozen and are not copied.
    tuning : TuningConfig
    task : {"causal-lm", "classification"}
    seed : int
        Root seed: the same seed gives the same adapter on every machine.

    Returns
    -------
    nn.Module
        A ``peft.PeftModel``, or with ``full`` a copy of the model itself; trainable
        parameters are float32.

    Raises
    ------
    FedtuneError
        Unknown method, wrong options, or a method that does not fit the model.
    """
    from peft import get_peft_model

    if tuning.adapter == FULL:
        whole = copy.deepcopy(base.model)
        return whole.requires_grad_(True).eval()
    with _readable(tuning, task), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(derive(seed, "adapter"))
        network = share(base.model)
        if tuning.adapter == SFPROMPT and tuning.split.tail:
            network = get_peft_model(network, _tail(base, tuning))
        model: Any = get_peft_model(network, _peft_config(base, tuning, task))
        if network is not model:
            for name, parameter in network.named_parameters():
                # A second adapter freezes the first.
                parameter.requires_grad_(parameter.requires_grad or ".lora_" in name)
    chosen = peft_settings(model)
    in_front = chosen.is_prompt_learning and chosen.peft_type != "PREFIX_TUNING"
    if in_front and task == "classification" and hasattr(base.model, "score"):
        # Such heads read the last token, and find it only when they see token ids.
        raise FedtuneError(
            f"tuning.adapter='{tuning.adapter}' with model.pooling='auto' would read padding here",
            hint="set model.pooling='mean', or use p-tuning-v2",
            code=ExitCode.MODEL,
        )
    if tuning.adapter == "lora-frozen-a":
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
    if not trainable(model):
        raise FedtuneError(
            f"tuning.adapter='{tuning.adapter}' leaves nothing to train on this model",
            hint="check tuning.targets",
            code=ExitCode.MODEL,
        )
    tuned: nn.Module = model.eval()
    return tuned


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train and travel, sorted by name."""
    return dict(sorted((n, p) for n, p in model.named_parameters() if p.requires_grad))


def read(model: nn.Module) -> Tensors:
    """Copy the trainable parameters out."""
    return {
        name: p.detach().to("cpu", torch.float32).numpy().copy()
        for name, p in trainable(model).items()
    }


def change(model: nn.Module, before: Tensors) -> Tensors:
    """Return how far the trainable parameters went since they were ``before``."""
    after = read(model)
    return {name: after[name] - value for name, value in before.items()}


def write(model: nn.Module, tensors: Mapping[str, NDArray[np.float32]]) -> None:
    """Copy values into the trainable parameters; names and shapes must be exactly theirs."""
    parameters = trainable(model)
    if parameters.keys() != tensors.keys():
        odd = sorted(parameters.keys() ^ tensors.keys())
        raise FedtuneError(f"adapter tensors do not fit this model: {odd[:3]}", code=ExitCode.MODEL)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if tuple(parameter.shape) != tensors[name].shape:
                raise FedtuneError(
                    f"'{name}' has shape {tensors[name].shape}, this model's is "
                    f"{tuple(parameter.shape)}",
                    code=ExitCode.MODEL,
                )
            parameter.copy_(torch.tensor(tensors[name]))


def peft_settings(model: nn.Module) -> Any:
    """Return the peft config of the adapter on a model."""
    tuned: Any = model
    return tuned.peft_config["default"]


def tail_of(model: nn.Module) -> Any:
    """Return the adapter that SFPrompt's prompts are put on; None where there is none."""
    from peft import PeftModel

    tuned: Any = model
    return tuned.base_model if isinstance(tuned.base_model, PeftModel) else None


def pairs(model: nn.Module) -> tuple[Pair, ...]:
    """Return the low-rank products of a LoRA model in which both factors train."""
    if not hasattr(model, "peft_config"):
        return ()
    settings = peft_settings(model)
    if getattr(settings, "use_dora", False) or getattr(settings, "lora_bias", False):
        return ()
    found, names = [], trainable(model)
    modules = dict(model.named_modules())
    for name in names:
        match = re.fullmatch(r"(.*)\.lora_A\.default\.weight", name)
        other = name.replace(".lora_A.", ".lora_B.")
        if match and other in names:
            scale = float(modules[match.group(1)].scaling["default"])
            found.append(Pair(match.group(1), name, other, scale))
    return tuple(found)


def _peft_config(base: Base, tuning: TuningConfig, task: Task) -> Any:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    if named := _NAMED.get(tuning.adapter.lower()):
        return named(base, tuning, _PEFT_TASK[task])
    kinds = {kind.value.lower(): made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if tuning.adapter.lower() not in kinds:
        raise FedtuneError(
            f"no adapter '{tuning.adapter}' in the installed peft",
            hint=f"choose one of: {', '.join(methods())}",
            code=ExitCode.MODEL,
        )
    options = dict(tuning.options)
    fields = kinds[tuning.adapter.lower()].__dataclass_fields__
    if "target_modules" in fields and tuning.targets:
        options.setdefault("target_modules", _targets(base, tuning))
    return kinds[tuning.adapter.lower()](task_type=_PEFT_TASK[task], **options)


def _targets(base: Base, tuning: TuningConfig) -> str | list[str]:
    if tuning.cut:
        return _ends(base, tuning)
    return "all-linear" if tuning.targets == ("all-linear",) else list(tuning.targets)


def _lora(base: Base, tuning: TuningConfig, task: str) -> Any:
    from peft import LoraConfig

    start = str(tuning.options.get("init_lora_weights", "")).lower()
    if start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise FedtuneError(
            f"tuning.options.init_lora_weights='{start}' would change the base model",
            hint="clients share the base as it is: use 'gaussian' or 'orthogonal', or leave it out",
            code=ExitCode.MODEL,
        )
    given = {
        "r": tuning.rank,
        "lora_alpha": tuning.alpha,
        "lora_dropout": tuning.dropout,
        "target_modules": _targets(base, tuning),
    }
    return LoraConfig(task_type=task, **(given | tuning.options))


def _tail(base: Base, tuning: TuningConfig) -> Any:
    """LoRA on the blocks of the tail, by their full names: it fits the whole model as well."""
    from peft import LoraConfig

    given: dict[str, Any] = {
        "r": tuning.rank, "lora_alpha": tuning.alpha, "lora_dropout": tuning.dropout,
        "target_modules": _ends(base, tuning),
    }  # fmt: skip
    return LoraConfig(**given)


def _ends(base: Base, tuning: TuningConfig) -> list[str]:
    """Return the full names of the linear layers in the client's blocks that are adapted."""
    from transformers.pytorch_utils import Conv1D

    split = tuning.split
    blocks = blocks_of(base.model)
    cut = cut_of(base.model, split.head, split.tail)
    first = 0 if split.adapt == "ends" else cut.body[-1] + 1
    chosen = [index for index in range(first, cut.count) if not cut.is_body(index)]
    wanted = set(tuning.targets) - {"all-linear"}
    found = [
        f"{blocks.path}.{index}.{name}" for index in chosen
        for name, module in blocks.modules[index].named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and (not wanted or wanted & {name, name.rsplit(".", 1)[-1]})
    ]  # fmt: skip
    if not found:
        raise FedtuneError(
            f"tuning.adapter='{tuning.adapter}' finds nothing in the client's blocks {chosen}",
            hint="raise tuning.split.tail, check tuning.targets, or use tuning.adapter='prompt'",
            code=ExitCode.MODEL,
        )
    return found


def _prompt(base: Base, tuning: TuningConfig, task: str) -> Any:
    from peft import PromptTuningConfig

    given: dict[str, Any] = {"num_virtual_tokens": tuning.tokens}
    if tuning.adapter == SFPROMPT:
        # Random prompts cost a small model half a nat before the first step; words do not.
        given["prompt_tuning_init"] = "SAMPLE_VOCAB"
    return PromptTuningConfig(task_type=task, **(given | tuning.options))


def _prefix(base: Base, tuning: TuningConfig, task: str) -> Any:
    """Prefix tuning as published: the prefix comes out of a small network."""
    from peft import PrefixTuningConfig

    given = {
        "num_virtual_tokens": tuning.tokens,
        "prefix_projection": True,
        "encoder_hidden_size": int(settings_of(base.model).hidden_size),
    }
    return PrefixTuningConfig(task_type=task, **(given | tuning.options))


def _p_tuning_v2(base: Base, tuning: TuningConfig, task: str) -> Any:
    """Deep prompts without the network (Liu et al. 2022)."""
    from peft import PrefixTuningConfig

    given = {"num_virtual_tokens": tuning.tokens, "prefix_projection": False}
    return PrefixTuningConfig(task_type=task, **(given | tuning.options))


def _ia3(base: Base, tuning: TuningConfig, task: str) -> Any:
    from peft import IA3Config

    given = {} if tuning.targets == ("all-linear",) else {"target_modules": list(tuning.targets)}
    return IA3Config(task_type=task, **(given | tuning.options))


def _layernorm(base: Base, tuning: TuningConfig, task: str) -> Any:
    from peft import LNTuningConfig

    norms = [
        name for name, module in base.model.named_modules()
        if re.search(r"norm", type(module).__name__, re.IGNORECASE)
    ]  # fmt: skip
    return LNTuningConfig(task_type=task, **({"target_modules": norms} | tuning.options))


def _bias(base: Base, tuning: TuningConfig, task: str) -> Any:
    """Biases of the linear layers (BitFit), in the format of peft's BEFT."""
    from peft import BeftConfig

    heads = {"classifier", "score", "lm_head"}
    biased = [
        name for name, module in base.model.named_modules()
        if isinstance(module, nn.Linear) and module.bias is not None
        and not heads & set(name.split("."))
    ]  # fmt: skip
    if not biased:
        raise FedtuneError(
            "tuning.adapter='bias': no linear layer of this model has a bias",
            hint="use layernorm or ia3, which are as small",
            code=ExitCode.MODEL,
        )
    return BeftConfig(task_type=task, **({"target_modules": biased} | tuning.options))


_NAMED: dict[str, Callable[[Base, TuningConfig, str], Any]] = {
    "lora": _lora,
    "lora-frozen-a": _lora,
    "prompt": _prompt,
    SFPROMPT: _prompt,
    "prefix": _prefix,
    "p-tuning-v2": _p_tuning_v2,
    "ia3": _ia3,
    "layernorm": _layernorm,
    "bias": _bias,
}


@contextlib.contextmanager
def _readable(tuning: TuningConfig, task: Task) -> Iterator[None]:
    """Turn what peft raises into an error that names the setting."""
    try:
        yield
    except (TypeError, ValueError, KeyError, AttributeError, NotImplementedError) as error:
        raise FedtuneError(
            f"tuning.adapter='{tuning.adapter}' does not fit this model ({task}): {error}",
            hint="check tuning.targets and tuning.options, or choose another adapter",
            code=ExitCode.MODEL,
        ) from error
