"""What a run leaves: an adapter that plain peft loads, its card, and the proof that it does."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment
from torch import nn

from fedtune.adapters import FULL, SFPROMPT, Tensors, peft_settings, tail_of, trainable
from fedtune.config import Config, ModelConfig
from fedtune.errors import ExitCode, FedtuneError
from fedtune.files import storage, write_atomic, write_json
from fedtune.models import share
from fedtune.privacy.server_view import crossing_of, server_view
from fedtune.server.checkpoint import State
from fedtune.server.disclose import statement_of
from fedtune.server.run_folder import RunFolder
from fedtune.server.seeds_file import SEEDS, save_full, save_seeds, verify_seeds
from fedtune.server.tuned import Tuned

__all__ = ["save_result", "verify_adapter"]

_PROBE = "Federated tuning keeps the text where it is; def main() -> None: return 42"
_TOLERANCE = 2e-3
PROMPT, TAIL = "prompt", "tail"
"""SFPrompt's two adapters, each in a folder of its own: neither is the result without the other."""
_SHOWN = (
    ("loss", "loss (nats)"), ("perplexity", "perplexity"), ("accuracy", "accuracy"),
    ("macro_f1", "macro-F1"), ("client_worst", "worst client"),
)  # fmt: skip


def save_result(tuned: Tuned, state: State, folder: RunFolder, clients: int) -> float:
    """Write ``adapter/`` and check that plain peft gives the run's own outputs with it.

    Returns
    -------
    float
        Largest difference of the logits, relative to their largest magnitude.

    Raises
    ------
    FedtuneError
        ``ExitCode.ADAPTER_MISMATCH`` when the saved adapter behaves differently.
    """
    fresh = folder.path / ".adapter"
    shutil.rmtree(fresh, ignore_errors=True)
    model = tuned.put(state)
    saved = merged(tuned, state) if state.residual else model
    full, seeded = tuned.config.tuning.adapter == FULL, tuned.weights is not None
    if seeded:
        save_seeds(tuned, state, fresh)
    elif full:
        save_full(saved, fresh)
    if not full:
        _save_adapter(tuned, saved, fresh)
    statement, told = statement_of(folder)
    write_atomic(fresh / "README.md", _card(tuned, folder, clients, saved, told).encode())
    write_json(fresh / "privacy.json", statement)
    difference = verify_seeds(tuned, fresh / SEEDS) if seeded else 0.0
    if not full:
        difference = max(difference, verify_adapter(tuned, state, fresh))
    with storage(folder.adapter):
        old = folder.path / ".adapter-old"
        shutil.rmtree(old, ignore_errors=True)
        if folder.adapter.exists():
            folder.adapter.rename(old)
        fresh.rename(folder.adapter)
        shutil.rmtree(old, ignore_errors=True)
    return difference


def _save_adapter(tuned: Tuned, saved: nn.Module, fresh: Path) -> None:
    with storage(fresh), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_settings(saved).base_model_name_or_path = tuned.config.model.base
        inner = tail_of(saved) if tuned.config.tuning.adapter == SFPROMPT else None
        outer = fresh / PROMPT if inner is not None else fresh
        saved.save_pretrained(str(outer), save_embedding_layers=False)  # type: ignore[operator]
        if inner is not None:
            peft_settings(inner).base_model_name_or_path = tuned.config.model.base
            inner.save_pretrained(str(fresh / TAIL), save_embedding_layers=False)


def verify_adapter(tuned: Tuned, state: State, path: Path) -> float:
    """Load an adapter folder with plain peft and compare its logits with the run's.

    Parameters
    ----------
    path : Path
        Folder in PEFT format.

    Returns
    -------
    float
        Largest difference, relative to the largest magnitude.
    """
    from peft import PeftModel

    inputs = tuned.base.tokenizer([_PROBE, _PROBE[:20]], padding=True, return_tensors="pt")
    device = next(tuned.model.parameters()).device
    given = {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = share(tuned.base.model)
        if (path / TAIL).is_dir():
            # With one adapter in another, peft writes the head where it stands.
            network = copy.deepcopy(tuned.base.model)
            network = PeftModel.from_pretrained(network, str(path / TAIL))
            path = path / PROMPT
        loaded = PeftModel.from_pretrained(network, str(path)).eval()
        theirs = loaded(**given).logits.float()
        ours = tuned.put(state)(**given).logits.float()
    keep = given["attention_mask"].bool() if ours.dim() == 3 else ...
    if ours.dim() == 3:
        length = given["attention_mask"].shape[1]
        theirs, ours = theirs[:, -length:][keep], ours[:, -length:][keep]
    difference = float((theirs - ours).abs().max() / ours.abs().max().clamp(min=1e-9))
    if not difference <= _TOLERANCE:
        raise FedtuneError(
            f"the saved adapter '{path}' does not behave like the run: "
            f"logits differ by {difference:.2%}",
            hint="report this; the run's checkpoints are intact",
            code=ExitCode.ADAPTER_MISMATCH,
        )
    return difference


def merged(tuned: Tuned, state: State) -> nn.Module:
    """Return one plain LoRA that holds both the averaged factors and the residual.

    Per layer ``A' = [A; V]`` and ``B' = [s B, U]`` with scale 1, so its rank is
    the sum of the two.
    """
    from peft import get_peft_model

    ranks: dict[str, int] = {}
    tensors: Tensors = dict(state.adapter)
    for pair in tuned.pairs:
        u, v = state.residual[pair.layer]
        tensors[pair.a] = np.vstack([state.adapter[pair.a], v])
        tensors[pair.b] = np.hstack([np.float32(pair.scale) * state.adapter[pair.b], u])
        ranks[pair.layer.removeprefix("base_model.model.")] = tensors[pair.a].shape[0]
    settings = copy.deepcopy(peft_settings(tuned.model))
    settings.r = settings.lora_alpha = max(ranks.values())
    settings.use_rslora = False
    settings.init_lora_weights = True
    settings.rank_pattern = dict(ranks)
    settings.alpha_pattern = dict(ranks)
    model: Any = get_peft_model(share(tuned.base.model), settings)
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            parameter.copy_(torch.tensor(tensors[name]))
    return model.eval()  # type: ignore[no-any-return]


def _card(tuned: Tuned, folder: RunFolder, clients: int, saved: nn.Module, told: list[str]) -> str:
    rows = folder.metrics()
    template = (files("fedtune") / "assets" / "templates" / "adapter_card.md.j2").read_text()
    config = tuned.config
    first, last = rows[0], rows[-1]
    markdown = Environment(autoescape=False, keep_trailing_newline=True)  # noqa: S701 - no HTML
    return markdown.from_string(template).render(
        name=config.name, base=config.model.base, adapter=config.tuning.adapter,
        method=_method(config), seed=config.seed,
        full=config.tuning.adapter == FULL, seeded=config.tuning.seeded,
        parameters=sum(p.numel() for p in trainable(saved).values()), version=version("fedtune"),
        clients=_clients(config, clients), rounds=last["round"],
        aggregation=config.federation.aggregation,
        bytes=sum(row.get(f"bytes_{way}", 0) for row in rows for way in ("down", "up", "cut")),
        figures=[(label, _figure(first, key), _figure(last, key)) for key, label in _SHOWN
                 if key in last],
        snippet=_snippet(tuned), told=told,
        crossed=server_view(crossing_of(config)).statement if config.tuning.cut else "",
    )  # fmt: skip


def _method(config: Config) -> str:
    tuning = config.tuning
    return f"{tuning.method} ({tuning.optimizer})" if tuning.by_gradient else tuning.method


def _clients(config: Config, clients: int) -> int:
    """Return how many clients the card names: under a promise about them, the public number."""
    return config.privacy.client.population if config.privacy.client else clients


def _figure(row: Mapping[str, Any], key: str) -> str:
    return f"{row[key]:.4g}" if row.get(key) is not None else "-"


def _snippet(tuned: Tuned) -> str:
    """Return code that loads base and adapter; embedded models are found by fedtune."""
    model = tuned.config.model
    folder = json.dumps(model.base)
    if tuned.config.tuning.adapter == FULL:
        return _snippet_full(tuned)
    lines = ["from peft import PeftModel"]
    if model.base.startswith("fedtune:") or model.task == "classification":
        lines += [
            "from fedtune.config import ModelConfig",
            "from fedtune.models import load_base",
            f"base = load_base(ModelConfig(base={folder}, task={json.dumps(model.task)}, "
            f"pooling={json.dumps(model.pooling)}{_words(model)}), labels={tuned.labels!r}, "
            f"seed={tuned.config.seed}{_template(tuned.config)})",
            *_loads("base.model", tuned),
        ]
    else:
        lines += [
            "from transformers import AutoModelForCausalLM",
            f"base = AutoModelForCausalLM.from_pretrained({folder}, dtype='float32')",
            *_loads("base", tuned),
        ]
    return "\n".join(lines)


def _loads(base: str, tuned: Tuned) -> list[str]:
    """Return the lines that put the adapter on a base; SFPrompt's is two."""
    if tuned.config.tuning.adapter != SFPROMPT or not tuned.config.tuning.split.tail:
        return [f'model = PeftModel.from_pretrained({base}, "adapter")']
    return [
        f'model = PeftModel.from_pretrained({base}, "adapter/{TAIL}")',
        f'model = PeftModel.from_pretrained(model, "adapter/{PROMPT}")',
    ]


def _words(model: ModelConfig) -> str:
    return f", words={model.words!r}" if model.words else ""


def _template(config: Config) -> str:
    """Return what a prompted model must be asked with, as an argument."""
    asked = config.model.pooling == "prompt"
    return f", template={json.dumps(config.data.template)}" if asked else ""


def _snippet_full(tuned: Tuned) -> str:
    if tuned.weights is not None:
        return "# coefficients and a key; full weights come out of: fedtune export RUN FOLDER"
    if tuned.config.model.task == "causal-lm" or tuned.config.model.pooling == "prompt":
        return (
            "from transformers import AutoModelForCausalLM\n"
            'model = AutoModelForCausalLM.from_pretrained("adapter")'
        )
    return "# load with the task's class; or: fedtune export RUN FOLDER"
