"""Tiny random models of many architectures, each as Hugging Face builds it."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

_COMMON: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_NO_DROPOUT = {
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "dropout": 0.0, "activation_dropout": 0.0,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "residual_dropout": 0.0,
    "resid_dropout": 0.0, "embed_dropout": 0.0, "embedding_dropout": 0.0, "mlp_dropout": 0.0,
    "qa_dropout": 0.0, "seq_classif_dropout": 0.0, "pooler_dropout": 0.0,
}  # fmt: skip
_GPT = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "n_inner": 48}

DECODERS: dict[str, dict[str, Any]] = {
    "Llama": {}, "Mistral": {"sliding_window": 6}, "Qwen2": {}, "Qwen3": {}, "Gemma": {},
    "Gemma2": {"sliding_window": 6}, "Gemma3Text": {"sliding_window": 6}, "Phi3": {},
    "Phi": {}, "Olmo2": {}, "SmolLM3": {}, "Granite": {}, "StableLm": {}, "Starcoder2": {},
    "Cohere": {}, "Glm": {}, "Mixtral": {"num_local_experts": 2}, "GPT2": _GPT,
    "GPTNeoX": {"num_key_value_heads": 4}, "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Bloom": {"n_layer": 4, "n_head": 4}, "Falcon": {"num_kv_heads": 2}, "GPTJ": {
        **_GPT, "rotary_dim": 4}, "Mamba": {"state_size": 4}, "CodeGen": {**_GPT, "rotary_dim": 4},
}  # fmt: skip
ENCODERS: dict[str, dict[str, Any]] = {
    "Bert": {}, "Roberta": {"max_position_embeddings": 70}, "DebertaV2": {
        "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    "ModernBert": {"local_attention": 8}, "DistilBert": {
        "dim": 32, "hidden_dim": 48, "n_layers": 4, "n_heads": 4}, "Electra": {
        "embedding_size": 32}, "XLMRoberta": {"max_position_embeddings": 70}, "MPNet": {},
}  # fmt: skip

_MODULES = {
    "Gemma3Text": "gemma3", "GPTNeoX": "gpt_neox", "SmolLM3": "smollm3", "DebertaV2": "deberta_v2",
    "ModernBert": "modernbert", "DistilBert": "distilbert", "XLMRoberta": "xlm_roberta",
    "StableLm": "stablelm", "CodeGen": "codegen", "MPNet": "mpnet", "Starcoder2": "starcoder2",
}  # fmt: skip


def make(name: str, kind: str = "") -> Any:
    """Return a tiny random model: ``kind`` is the head, by default the one it is known for."""
    module = importlib.import_module(f"transformers.models.{_MODULES.get(name, name.lower())}")
    config_class = getattr(module, f"{name}Config" if name != "Gemma3Text" else "Gemma3TextConfig")
    special = DECODERS.get(name, {}) | ENCODERS.get(name, {})
    decoder = name in DECODERS
    given = _COMMON | _NO_DROPOUT | special
    known = set(config_class.__init__.__code__.co_varnames) | set(
        getattr(config_class, "__dataclass_fields__", {})
    ) | set(getattr(config_class, "attribute_map", {}))  # fmt: skip
    config = config_class(**{key: value for key, value in given.items() if key in known})
    config.num_labels = 3
    kind = kind or ("CausalLM" if decoder else "SequenceClassification")
    if kind == "SequenceClassification" or name == "Gemma3Text":
        family = name.removesuffix("Text")
    else:
        family = {"GPT2": "GPT2", "Gemma3Text": "Gemma3"}.get(name, name)
    head = {"GPT2CausalLM": "GPT2LMHeadModel"}.get(name + kind, f"{family}For{kind}")
    torch.manual_seed(len(name))
    model: nn.Module = getattr(module, head)(config)
    return model.eval()
