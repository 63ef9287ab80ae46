from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedtune.adapters import Task, attach, averaging, methods, pairs, read, trainable, write
from fedtune.config import ModelConfig, TuningConfig
from fedtune.errors import ExitCode, FedtuneError
from fedtune.measure import forward_loss
from fedtune.models import Base, fingerprint, load_base, require_context, share
from tests.tiny import bert, gpt2, llama, noise, settings

LABELS = ("no", "yes")
NAMED = ("lora", "lora-frozen-a", "prompt", "prefix", "p-tuning-v2", "ia3", "layernorm", "bias")
# Options that the methods need on layers of 32: most of them have defaults for large ones.
OPTIONS: dict[str, dict[str, Any]] = {
    "c3a": {"block_size": 16},
    "fourierft": {"n_frequency": 50, "scaling": 10.0},
    "waveft": {"n_frequency": 50},
    "shira": {"r": 2},
    "miss": {"r": 2},
    "trainable_tokens": {"token_indices": [5, 6, 7]},
    "prompt_tuning": {"num_virtual_tokens": 4},
    "beft": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "ln_tuning": {"target_modules": ["input_layernorm", "norm"]},
    "loha": {"r": 2},
    "lokr": {"r": 2},
    "vera": {"r": 4},
    "frod": {},
    "tinylora": {},
}


@pytest.fixture(scope="module")
def folders(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "gpt2": gpt2(root / "gpt2", shared),
        "bert": bert(root / "bert", shared),
        "llama": llama(root / "llama", shared),
        "biased": llama(root / "biased", shared, bias=True),
    }


def tuning(adapter: str, **more: Any) -> TuningConfig:
    given: dict[str, Any] = {"rank": 2, "alpha": 4.0, "tokens": 4}
    return TuningConfig(adapter=adapter, **(given | {"options": OPTIONS.get(adapter, {})} | more))


def base_of(folders: dict[str, Path], kind: str) -> tuple[Base, Task]:
    """Return a base: ``bert`` classifies with its own head, ``bert-mean`` by mean pooling."""
    name, _, pooling = kind.partition("-")
    if name != "bert":
        return load_base(ModelConfig(base=str(folders[name]))), "causal-lm"
    made = ModelConfig(
        base=str(folders[name]),
        task="classification",
        pooling="mean" if pooling else "auto",
    )
    return load_base(made, LABELS), "classification"


def batch_for(task: Task) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    ids = torch.tensor(rng.integers(3, 500, (4, 10)))
    labels = ids.clone() if task == "causal-lm" else torch.tensor([0, 1, 1, 0])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


FITS = [(kind, name) for kind in ("gpt2", "bert", "bert-mean", "biased") for name in NAMED] + [
    ("llama", name) for name in NAMED if name != "bias"
]
OTHERS = [
    ("llama", name) for name in ("vera", "loha", "lokr", "fourierft", "miss", "c3a", "shira")
] + [("biased", "beft"), ("gpt2", "vera"), ("bert", "loha"), ("bert-mean", "fourierft")]
# Conv1D has no bias that peft's BEFT reaches, and IA3 does not know mean pooling by its name.
REFUSED = [("gpt2", "bias"), ("llama", "bias")]


@pytest.mark.parametrize(("kind", "name"), [pair for pair in FITS + OTHERS if pair not in REFUSED])
def test_an_adapter_trains_and_its_base_stays(
    folders: dict[str, Path], kind: str, name: str
) -> None:
    base, task = base_of(folders, kind)
    print_before = fingerprint(base.model)
    model = attach(base, tuning(name), task, seed=3)
    mine = {p.data_ptr() for n, p in model.named_parameters() if not p.requires_grad}
    theirs = {p.data_ptr() for p in base.model.parameters()}
    heads = {"classifier", "score"}
    kept = {p.data_ptr() for n, p in base.model.named_parameters() if not heads & set(n.split("."))}
    norms = {
        p.data_ptr()
        for m in base.model.modules()
        if "norm" in type(m).__name__.lower()
        for p in m.parameters()
    }
    assert theirs >= kept - norms
    assert mine >= kept - norms, "frozen weights were copied"
    start = read(model)
    assert all(value.dtype == np.float32 for value in start.values())
    optim = torch.optim.Adam(trainable(model).values(), lr=0.01)
    batch, losses = batch_for(task), []
    model.train()
    for _ in range(8):
        optim.zero_grad()
        loss = forward_loss(model, batch, task)[0].mean()
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(float(loss.detach()))
        optim.step()
    model.eval()
    assert np.mean(losses[-3:]) < losses[0]
    assert fingerprint(base.model) == print_before
    trained = read(model)
    assert any(not np.array_equal(trained[n], start[n]) for n in start)
    # What is written into a twin makes it the same model.
    twin = attach(base, tuning(name), task, seed=3)
    write(twin, trained)
    assert all(np.array_equal(value, trained[n]) for n, value in read(twin).items())
    with torch.inference_mode():
        assert torch.equal(logits(twin, batch), logits(model, batch))


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    found: torch.Tensor = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).logits
    return found


def test_the_same_seed_gives_the_same_adapter(folders: dict[str, Path]) -> None:
    base, task = base_of(folders, "bert")
    for name in ("lora", "prompt", "prefix", "loha"):
        torch.manual_seed(1)
        one = read(attach(base, tuning(name), task, seed=3))
        torch.manual_seed(2)
        same = read(attach(base, tuning(name), task, seed=3))
        other = read(attach(base, tuning(name), task, seed=4))
        assert all(np.array_equal(one[n], same[n]) for n in one)
        assert any(not np.array_equal(one[n], other[n]) for n in one)


def test_attaching_leaves_the_random_numbers_of_others_alone(folders: dict[str, Path]) -> None:
    base, task = base_of(folders, "llama")
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    attach(base, tuning("lora"), task, seed=3)
    assert torch.equal(torch.rand(3), wanted)


def test_frozen_a_trains_only_b(folders: dict[str, Path]) -> None:
    base, task = base_of(folders, "llama")
    frozen = trainable(attach(base, tuning("lora-frozen-a"), task, seed=3))
    both = attach(base, tuning("lora"), task, seed=3)
    assert frozen
    assert set(frozen) == {name for name in trainable(both) if ".lora_B." in name}
    assert pairs(attach(base, tuning("lora-frozen-a"), task, seed=3)) == ()
    assert len(pairs(both)) == 14
    assert {pair.scale for pair in pairs(both)} == {2.0}


def test_pairs_know_the_scale_of_a_variant(folders: dict[str, Path]) -> None:
    base, task = base_of(folders, "llama")
    rooted = attach(base, tuning("lora", options={"use_rslora": True}), task, seed=3)
    assert [p.scale for p in pairs(rooted)] == pytest.approx([4.0 / np.sqrt(2)] * 14)
    dora = attach(base, tuning("lora", options={"use_dora": True}), task, seed=3)
    assert pairs(dora) == ()


def test_a_classifier_trains_its_head_too(folders: dict[str, Path]) -> None:
    for kind in ("bert", "bert-mean"):
        base, task = base_of(folders, kind)
        model = attach(base, tuning("lora"), task, seed=3)
        assert [
            n for n in trainable(model) if n.endswith("classifier.modules_to_save.default.bias")
        ]


def test_threads_share_frozen_tensors_and_nothing_else(folders: dict[str, Path]) -> None:
    base, task = base_of(folders, "llama")
    one = attach(base, tuning("lora"), task, seed=3)
    two = share(one)
    ours, theirs = dict(one.named_parameters()), dict(two.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert (value.data_ptr() == theirs[name].data_ptr()) == (not value.requires_grad)
    write(two, noise(read(two), 1))
    assert all(not v.any() for n, v in read(one).items() if "lora_B" in n)


def test_values_that_do_not_fit_are_refused(folders: dict[str, Path]) -> None:
    base, task = base_of(folders, "llama")
    model = attach(base, tuning("lora"), task, seed=3)
    before = read(model)
    name = next(iter(before))
    with pytest.raises(FedtuneError, match="do not fit this model") as caught:
        write(model, {n: v for n, v in before.items() if n != name})
    assert name in str(caught.value)
    with pytest.raises(FedtuneError, match="do not fit this model"):
        write(model, before | {"stranger": before[name]})
    with pytest.raises(FedtuneError, match=r"has shape \(1, 2\), this model's is") as caught:
        write(model, before | {name: np.zeros((1, 2), np.float32)})
    assert caught.value.code == ExitCode.MODEL
    assert all(np.array_equal(value, before[n]) for n, value in read(model).items())


def test_an_unknown_adapter_names_the_choices(folders: dict[str, Path]) -> None:
    base, task = base_of(folders, "llama")
    with pytest.raises(FedtuneError, match="no adapter 'lroa'") as caught:
        attach(base, tuning("lroa"), task, seed=3)
    assert caught.value.code == ExitCode.MODEL
    assert all(f"{name}," in caught.value.hint for name in (*NAMED, "vera", "loha"))
    assert set(NAMED) <= set(methods())


@pytest.mark.parametrize(("kind", "name"), REFUSED)
def test_biases_need_a_model_that_has_them(folders: dict[str, Path], kind: str, name: str) -> None:
    base, task = base_of(folders, kind)
    with pytest.raises(FedtuneError, match="no linear layer of this model has a bias") as caught:
        attach(base, tuning(name), task, seed=3)
    assert caught.value.code == ExitCode.MODEL
    assert "layernorm" in caught.value.hint


@pytest.mark.parametrize(
    "changes",
    [{"targets": ("nothing",)}, {"options": {"no_such_option": 1}}, {"options": {"r": -1}}],
)
def test_what_peft_refuses_names_the_adapter(
    folders: dict[str, Path], changes: dict[str, Any]
) -> None:
    base, task = base_of(folders, "llama")
    with pytest.raises(FedtuneError, match=r"tuning\.adapter='lora' does not fit") as caught:
        attach(base, tuning("lora", **changes), task, seed=3)
    assert caught.value.code == ExitCode.MODEL


@pytest.mark.parametrize("start", ["pissa", "PiSSA_niter_4", "olora", "gaussian", "orthogonal"])
def test_no_start_changes_the_shared_base(folders: dict[str, Path], start: str) -> None:
    base, task = base_of(folders, "llama")
    before = fingerprint(base.model)
    chosen = tuning("lora", options={"init_lora_weights": start})
    if start in ("gaussian", "orthogonal"):
        assert attach(base, chosen, task, seed=3)
    else:
        with pytest.raises(FedtuneError, match="would change the base model") as caught:
            attach(base, chosen, task, seed=3)
        assert caught.value.code == ExitCode.MODEL
    assert fingerprint(base.model) == before


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_head_that_reads_the_last_token_takes_no_prompt(
    folders: dict[str, Path], kind: str
) -> None:
    """Given embeddings, such heads cannot tell text from padding, and would read padding."""
    made = ModelConfig(base=str(folders[kind]), task="classification")
    base = load_base(made, LABELS)
    with pytest.raises(FedtuneError, match="would read padding") as caught:
        attach(base, tuning("prompt"), "classification", seed=3)
    assert caught.value.code == ExitCode.MODEL
    assert "model.pooling='mean'" in caught.value.hint
    assert attach(base, tuning("p-tuning-v2"), "classification", seed=3)
    pooled = load_base(made.model_copy(update={"pooling": "mean"}), LABELS)
    assert attach(pooled, tuning("prompt"), "classification", seed=3)


@pytest.mark.parametrize("adapter", ["lora", "prompt", "prefix", "p-tuning-v2", "prompt_tuning"])
def test_virtual_tokens_count_against_the_context(
    shared: Path, tmp_path: Path, adapter: str
) -> None:
    """What is allowed runs, and what is refused would not: GPT-2 has a table of positions."""
    options = OPTIONS.get(adapter, {})
    most = 32 if adapter == "lora" else 28
    folder = gpt2(tmp_path / "m", shared, positions=32)
    table = {"adapter": adapter, "tokens": 4, "options": options}
    config = settings("x", folder, tuning=table, data={"max_length": most})
    base = load_base(config.model)
    require_context(base, config)
    model = attach(base, config.tuning, "causal-lm", 1)
    with torch.inference_mode():
        assert model(input_ids=torch.ones(1, most, dtype=torch.int64)).logits.isfinite().all()
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.ones(1, most + 1, dtype=torch.int64))
    longer = settings("x", folder, tuning=table, data={"max_length": most + 1})
    with pytest.raises(FedtuneError, match=rf"data\.max_length={most + 1}") as caught:
        require_context(base, longer)
    assert caught.value.code == ExitCode.CONFIG
    assert f"at most {most}" in caught.value.hint


def test_a_saved_head_for_other_classes_is_refused(shared: Path, tmp_path: Path) -> None:
    made = ModelConfig(base=str(bert(tmp_path / "two", shared)), task="classification")
    network: Any = load_base(made, LABELS).model
    network.save_pretrained(tmp_path / "two")
    with pytest.raises(FedtuneError, match="cannot be loaded") as caught:
        load_base(made, ("a", "b", "c"))
    assert caught.value.code == ExitCode.MODEL


# ---------------------------------------------------------------- how they average


def effect(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what an adapter amounts to: merged weights, or the prompt it puts in front."""
    plain: Any = copy.deepcopy(model)
    if plain.active_peft_config.is_prompt_learning:
        with torch.no_grad():
            prompt = plain.get_prompt(batch_size=1)
        if isinstance(prompt, torch.Tensor):
            return {"prompt": prompt.double()}
        found = {}
        for index, layer in enumerate(prompt.layers):
            found[f"{index}.keys"], found[f"{index}.values"] = layer.keys, layer.values
        return {name: value.detach().double() for name, value in found.items()}
    merged: nn.Module = plain.merge_and_unload()
    return {name: value.detach().double() for name, value in merged.state_dict().items()}


def gap(model: nn.Module, seeds: tuple[int, int] = (1, 2)) -> float:
    """Return ``|mean of effects - effect of mean| / |mean of effects - effect of none|``."""
    start = read(model)
    before = effect(model)
    clients = [{n: start[n] + d for n, d in noise(start, s, 0.3).items()} for s in seeds]
    each = []
    for values in clients:
        write(model, values)
        each.append(effect(model))
    write(model, {n: (clients[0][n] + clients[1][n]) / 2 for n in start})
    of_mean = effect(model)
    wanted = {n: (each[0][n] + each[1][n]) / 2 for n in before}
    off = sum(float((wanted[n] - of_mean[n]).square().sum()) for n in wanted)
    size = sum(float((wanted[n] - before[n]).square().sum()) for n in wanted)
    assert size > 1e-6, "the parameters changed nothing"
    return float(np.sqrt(off / size))


LINEAR = (
    "ia3", "layernorm", "bias", "lora-frozen-a", "prompt", "p-tuning-v2", "ln_tuning", "beft",
    "trainable_tokens", "fourierft", "waveft", "shira", "c3a", "miss", "frod", "tinylora",
    "prompt_tuning",
)  # fmt: skip


@pytest.mark.parametrize("name", LINEAR)
def test_the_mean_of_a_linear_adapter_is_exact(folders: dict[str, Path], name: str) -> None:
    base, task = base_of(folders, "biased")
    assert averaging(name) == "linear"
    assert gap(attach(base, tuning(name), task, seed=3)) < 1e-5


@pytest.mark.parametrize("name", ["lora", "loha", "lokr", "vera", "prefix"])
def test_the_mean_of_another_adapter_is_not(folders: dict[str, Path], name: str) -> None:
    base, task = base_of(folders, "biased")
    assert averaging(name) == ("product" if name == "lora" else "inexact")
    assert gap(attach(base, tuning(name), task, seed=3)) > 0.05
