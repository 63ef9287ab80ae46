from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedtune.adapters import attach, pairs, read
from fedtune.config import ModelConfig, TuningConfig
from fedtune.models import load_base, share
from fedtune.residual import Residual, join, set_residual, split
from tests.tiny import gpt2, llama


def tuned(folder: Path) -> nn.Module:
    base = load_base(ModelConfig(base=str(folder)))
    return attach(base, TuningConfig(rank=2), "causal-lm", seed=1)


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, shared: Path, tmp_path: Path) -> nn.Module:
    """Return LoRA on a model of ``Linear`` layers, and on one of GPT-2's ``Conv1D``."""
    return tuned({"llama": llama, "gpt2": gpt2}[request.param](tmp_path / "m", shared))


def residual_for(model: nn.Module, seed: int = 0) -> Residual:
    rng, shapes = np.random.default_rng(seed), read(model)
    return {
        pair.layer: (
            rng.standard_normal((shapes[pair.b].shape[0], 3)).astype(np.float32),
            rng.standard_normal((3, shapes[pair.a].shape[1])).astype(np.float32),
        )
        for pair in pairs(model)
    }


def test_each_layer_adds_exactly_its_residual(model: nn.Module) -> None:
    modules = dict(model.named_modules())
    for layer, (u, v) in residual_for(model).items():
        module = modules[layer]
        x = torch.randn(2, 5, v.shape[1])
        with torch.inference_mode():
            before = module(x)
            set_residual(model, {layer: (u, v)})
            after = module(x)
            set_residual(model, {})
            back = module(x)
        wanted = x.double().numpy() @ v.astype(np.float64).T @ u.astype(np.float64).T
        np.testing.assert_allclose((after - before).numpy(), wanted, atol=2e-4)
        assert torch.equal(back, before)


def test_a_residual_is_the_same_as_a_changed_weight(model: nn.Module) -> None:
    """Put ``U @ V`` into the base weights by hand, and compare what comes out at the end."""
    residual = {layer: (0.1 * u, 0.1 * v) for layer, (u, v) in residual_for(model).items()}
    ids = torch.arange(3, 15).reshape(2, 6)
    with torch.inference_mode():
        plain = model(input_ids=ids).logits
        set_residual(model, residual)
        ours = model(input_ids=ids).logits
        set_residual(model, {})
        removed = model(input_ids=ids).logits
        modules = dict(model.named_modules())
        for layer, (u, v) in residual.items():
            base = modules[layer].base_layer
            delta = torch.tensor(u @ v)
            assert isinstance(base, nn.Module)
            base.weight.data += delta if isinstance(base, nn.Linear) else delta.T
        by_hand = model(input_ids=ids).logits
    assert torch.equal(removed, plain)
    assert not torch.allclose(ours, plain, atol=1e-2)
    torch.testing.assert_close(ours, by_hand, atol=1e-4, rtol=1e-4)


def test_a_new_residual_replaces_the_old(model: nn.Module) -> None:
    first, second = residual_for(model, 1), residual_for(model, 2)
    ids = torch.arange(3, 15).reshape(2, 6)
    with torch.inference_mode():
        set_residual(model, second)
        wanted = model(input_ids=ids).logits
        set_residual(model, first)
        set_residual(model, second)
        assert torch.equal(model(input_ids=ids).logits, wanted)


def test_gradients_pass_through_a_residual(model: nn.Module) -> None:
    set_residual(model, residual_for(model))
    model(input_ids=torch.arange(3, 9)[None]).logits.sum().backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert all(grad is not None and bool(grad.any()) for grad in grads)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_a_shared_copy_has_a_residual_of_its_own(model: nn.Module) -> None:
    twin = share(model)
    ids = torch.arange(3, 15).reshape(2, 6)
    with torch.inference_mode():
        plain = model(input_ids=ids).logits
        set_residual(twin, residual_for(model))
        assert torch.equal(model(input_ids=ids).logits, plain)
        assert not torch.allclose(twin(input_ids=ids).logits, plain, atol=1e-2)


def test_join_and_split_are_inverse(model: nn.Module) -> None:
    adapter, residual = read(model), residual_for(model)
    flat = join(adapter, residual)
    assert len(flat) == len(adapter) + 2 * len(residual)
    back_adapter, back = split(flat)
    assert back_adapter.keys() == adapter.keys()
    assert back.keys() == residual.keys()
    for layer, (u, v) in residual.items():
        assert np.array_equal(back[layer][0], u)
        assert np.array_equal(back[layer][1], v)
    assert split(join(adapter, {}))[1] == {}
