"""Tiny real models, data and settings that tests of several folders share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from fedtune.adapters import Tensors
from fedtune.config import Config

# Tiny models gain nothing from threads, and lose much on a busy machine.
torch.set_num_threads(1)

TEXTS = (
    "Once upon a time there was a little girl named Lily.",
    "Tom and his dog went to the park to play with a big red ball.",
    "The sun was warm.",
    "She was happy and said thank you to her mom.",
    "One day a small bird could not fly and it was very sad.",
    "They all had cake and milk, and then they went home to sleep.",
)


def _save(network: Any, folder: Path, shared: Path) -> Path:
    network.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shared / "models" / "stories260K" / name, folder)
    return folder


def gpt2(folder: Path, shared: Path, positions: int = 64) -> Path:
    """Save a random GPT-2 (Conv1D layers, biases, learned positions)."""
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=512, n_positions=positions, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return _save(GPT2LMHeadModel(config), folder, shared)


def bert(folder: Path, shared: Path, layers: int = 2) -> Path:
    """Save a random BERT without a head."""
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, pad_token_id=0,
    )  # fmt: skip
    return _save(BertModel(config), folder, shared)


def llama(folder: Path, shared: Path, *, bias: bool = False) -> Path:
    """Save a random Llama; square layers, and biases if asked for."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
        attention_bias=bias, mlp_bias=bias, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return _save(LlamaForCausalLM(config), folder, shared)


def jsonl(path: Path, clients: int = 3, rows: int = 6, label: bool = False) -> Path:
    """Write so many clients; client ``i`` has ``rows + i`` rows."""
    lines = []
    for client in range(clients):
        for number in range(rows + client):
            row = {"client": f"c{client}", "text": TEXTS[(number + client) % len(TEXTS)]}
            if label:
                row["label"] = "yes" if (number + client) % 2 else "no"
            lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def settings(source: Path | str, base: Path | str, **tables: dict[str, Any]) -> Config:
    """Return a small experiment; keyword tables go on top."""
    known: dict[str, dict[str, Any]] = {
        "model": {"base": str(base)},
        "data": {"source": str(source), "max_length": 24, "holdout": 0.2, "pack": False},
        "tuning": {"rank": 2, "alpha": 4.0, "lr": 0.01, "batch_size": 4, "tokens": 4},
        "federation": {"rounds": 2},
        "engine": {"threads": 1},
    }
    for name, table in tables.items():
        known[name] = known.get(name, {}) | table
    return Config.model_validate({"name": "tiny", "seed": 7} | known)


def noise(tensors: Tensors, seed: int, scale: float = 0.1) -> Tensors:
    """Return random float32 values of the same names and shapes."""
    rng = np.random.default_rng(seed)
    return {
        name: (scale * rng.standard_normal(value.shape)).astype(np.float32)
        for name, value in tensors.items()
    }
