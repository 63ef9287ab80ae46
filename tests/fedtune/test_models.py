"""Loading models: once, shared, offline, and with clear refusals."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.adapters import attach, trainable
from fedtune.config import Config, ModelConfig, TuningConfig
from fedtune.errors import ExitCode, FedtuneError
from fedtune.models import (
    context_length,
    fingerprint,
    load_base,
    model_folder,
    require_context,
    share,
)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a local model reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("base", ["fedtune:tiny", "stories260K"])
def test_local_models_load_without_the_network(base: str, shared: Path) -> None:
    name = str(shared / "models" / base) if base == "stories260K" else base
    loaded = load_base(ModelConfig(base=name))
    assert all(p.dtype == torch.float32 for p in loaded.model.parameters())
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert load_base(ModelConfig(base=name)) is loaded


def test_the_embedded_model_is_as_small_as_promised() -> None:
    weights = Path(model_folder("fedtune:tiny")) / "model.safetensors"
    assert weights.stat().st_size <= 6_000_000
    model = load_base(ModelConfig()).model
    assert sum(p.numel() for p in model.parameters()) <= 3_000_000
    card = (weights.parent / "README.md").read_text(encoding="utf-8")
    assert "held-out loss" in card


def test_minilm_classifies_by_mean_pooling() -> None:
    config = ModelConfig(base="fedtune:minilm", task="classification", pooling="mean")
    base = load_base(config, ("bad", "good"))
    tokens = base.tokenizer(["fine", "a longer and worse one"], padding=True, return_tensors="pt")
    given = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        both = base.model(**given).logits
        alone = base.tokenizer(["fine"], return_tensors="pt")
        first = base.model(
            input_ids=alone["input_ids"], attention_mask=alone["attention_mask"]
        ).logits
    assert both.shape == (2, 2)
    assert torch.allclose(both[:1], first, atol=1e-5)


def test_the_seed_makes_the_head_and_nothing_else() -> None:
    config = ModelConfig(base="fedtune:minilm", task="classification", pooling="mean")
    one = load_base(config, ("a", "b"), seed=1).model
    two = load_base(config, ("a", "b"), seed=2).model
    same = load_base(config, ("a", "b"), seed=1).model
    heads = [dict(m.named_parameters())["classifier.weight"] for m in (one, two, same)]
    assert torch.equal(heads[0], heads[2])
    assert not torch.equal(heads[0], heads[1])


def test_sharing_copies_structure_and_no_frozen_weight(shared: Path) -> None:
    base = load_base(ModelConfig(base=str(shared / "models/stories260K")))
    tuned = attach(base, TuningConfig(), "causal-lm", seed=0)
    twin = share(tuned)
    originals = {p.data_ptr() for p in base.model.parameters()}
    mine = {p.data_ptr() for p in twin.parameters() if not p.requires_grad}
    assert mine == originals
    pairs = zip(trainable(tuned).values(), trainable(twin).values(), strict=True)
    assert all(a.data_ptr() != b.data_ptr() and torch.equal(a, b) for a, b in pairs)


def test_a_changed_weight_changes_the_fingerprint(shared: Path) -> None:
    base = load_base(ModelConfig(base=str(shared / "models/stories260K")))
    before = fingerprint(base.model)
    weight = next(iter(base.model.parameters()))
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.view(-1)[0] += 1e-3
    changed = fingerprint(base.model)
    with torch.no_grad():
        weight.copy_(kept)
    assert changed != before
    assert fingerprint(base.model) == before


def test_texts_longer_than_the_model_are_refused_by_number(shared: Path) -> None:
    model = ModelConfig(base=str(shared / "models/stories260K"))
    base = load_base(model)
    assert context_length(base) == 512
    config = Config.model_validate({"model": model.model_dump(), "data": {"max_length": 600}})
    with pytest.raises(FedtuneError, match=r"data\.max_length=600") as refused:
        require_context(base, config)
    assert refused.value.code == ExitCode.CONFIG
    assert refused.value.hint == "set data.max_length to at most 512"


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("fedtune:huge", "no embedded model 'fedtune:huge'"),
        ("/no/such/folder", "no model folder '/no/such/folder'"),
    ],
)
def test_models_that_are_not_there_are_named(base: str, message: str) -> None:
    with pytest.raises(FedtuneError, match=message) as refused:
        load_base(ModelConfig(base=base))
    assert refused.value.code == ExitCode.MODEL
    assert refused.value.hint


def test_a_folder_that_holds_no_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(FedtuneError, match="cannot be loaded"):
        load_base(ModelConfig(base=str(tmp_path)))


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(FedtuneError, match=r"model\.device='warp'"):
        load_base(ModelConfig(device="warp"))
