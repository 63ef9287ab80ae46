"""SFPrompt's phases: what is scored, what is kept, what leaves."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from fedtune.adapters import attach, read, trainable
from fedtune.client.across import Noisy
from fedtune.client.backprop import optimizer, tune
from fedtune.client.remote import connect, keep_ends, remote_of
from fedtune.client.split import bypassed, el2n, kept_of, only, tune_split
from fedtune.config import SplitConfig, TuningConfig
from fedtune.data import Encoded
from fedtune.errors import FedtuneError
from fedtune.models import Base
from fedtune.privacy.noise import InsecureSeededNoise
from fedtune.server.body import Body
from fedtune.split.blocks import cut_of
from tests.split.joined import Here
from tests.split.zoo import make

torch.set_num_threads(1)


def texts(count: int = 12, seed: int = 0) -> Encoded:
    rng = np.random.default_rng(seed)
    rows = tuple(rng.integers(3, 97, rng.integers(4, 12)).astype(np.int32) for _ in range(count))
    return Encoded(rows, rows, count, 0, 0)


def settings(**changes: object) -> TuningConfig:
    given = {
        "adapter": "sfprompt", "method": "sfprompt", "tokens": 3, "rank": 2, "batch_size": 4,
        "lr": 0.01,
    }  # fmt: skip
    return TuningConfig.model_validate(given | changes)


def client(tuning: TuningConfig) -> tuple[torch.nn.Module, Here]:
    """A tiny client and its body, in one process."""
    whole = make("Llama").requires_grad_(False)
    cut = cut_of(whole, 1, 1)
    part = copy.deepcopy(whole)
    keep_ends(part, cut)
    model = attach(Base(part, None, 0), tuning, "causal-lm", seed=5)
    link = Here(Body(copy.deepcopy(whole), cut))
    connect(model, link)
    return model, link


def test_el2n_is_the_distance_of_the_probabilities_from_the_truth() -> None:
    model, _ = client(settings())
    encoded = texts()
    with bypassed(model):
        found = el2n(model, encoded, "causal-lm", pad_id=0, batch_size=5)
        for index, row in enumerate(encoded.ids):
            ids = torch.tensor(row[None].astype(np.int64))
            with torch.no_grad():
                chances = model(input_ids=ids).logits[0, -len(row) :].softmax(-1)
            truth = torch.nn.functional.one_hot(ids[0, 1:], 97)
            wanted = (chances[:-1] - truth).norm(dim=-1).mean()
            assert found[index] == pytest.approx(float(wanted), rel=1e-5)


def test_scores_and_local_steps_send_nothing() -> None:
    tuning = settings(split={"local_epochs": 2.0, "keep": 0.5})
    model, link = client(tuning)
    encoded = texts()
    kept_of(model, encoded, tuning.split, "causal-lm", seed=1, pad_id=0)
    assert link.calls == []
    before = read(model)
    short = tuning.model_copy(update={"epochs": 2.0})
    with bypassed(model):
        tune(model, encoded, short, "causal-lm", optimizer(model, tuning, 0.01), seed=1, pad_id=0)
    assert link.calls == []
    after = read(model)
    assert all(not np.array_equal(before[name], after[name]) for name in before)
    remote = remote_of(model)
    assert remote is not None
    assert not remote.bypass


def test_only_what_is_kept_crosses_the_cut() -> None:
    tuning = settings(split={"local_epochs": 1.0, "keep": 0.25})
    model, link = client(tuning)
    encoded = texts(12)
    ran = tune_split(
        model, encoded, tuning, "causal-lm", optimizer(model, tuning, 0.01), lr=0.01, seed=3,
        pad_id=0,
    )  # fmt: skip
    assert ran.kept == 3
    assert ran.local is not None
    assert ran.local.steps == 3
    assert ran.run.steps == 1
    assert [kind for kind, _ in link.calls] == ["forward", "backward"]
    assert link.calls[0][1][0].shape[0] == 3


def test_el2n_keeps_the_hardest_and_random_does_not_look() -> None:
    model, _ = client(settings())
    encoded = texts(20)
    with bypassed(model):
        scores = el2n(model, encoded, "causal-lm", pad_id=0)
    kept = kept_of(model, encoded, SplitConfig(keep=0.3), "causal-lm", seed=1, pad_id=0)
    assert sorted(kept) == sorted(np.argsort(-scores)[:6])
    random = SplitConfig(keep=0.3, prune="random")
    first = kept_of(model, encoded, random, "causal-lm", seed=1, pad_id=0)
    assert len(first) == 6
    assert not np.array_equal(first, kept)
    assert np.array_equal(first, kept_of(model, encoded, random, "causal-lm", seed=1, pad_id=0))
    other = kept_of(model, encoded, random, "causal-lm", seed=2, pad_id=0)
    assert not np.array_equal(first, other)


def test_el2n_keeps_its_share_of_every_class() -> None:
    """Half of a small client by score alone is often one class: tuning then forgets the rest."""
    whole = make("Bert").requires_grad_(False)
    part = copy.deepcopy(whole)
    keep_ends(part, cut_of(whole, 1, 1))
    rows = texts(20).ids
    labels = tuple(np.array([0 if i < 14 else 1], np.int32) for i in range(20))
    encoded = Encoded(rows, labels, 20, 0, 0)
    with bypassed(part):
        scores = el2n(part, encoded, "classification", pad_id=0)
    kept = kept_of(part, encoded, SplitConfig(keep=0.5), "classification", seed=1, pad_id=0)
    assert (kept < 14).sum() == 7
    assert (kept >= 14).sum() == 3
    assert sorted(kept[kept < 14]) == sorted(np.argsort(-scores[:14])[:7])


def test_a_threshold_looks_at_each_example_alone() -> None:
    """What lets a promise about examples hold: nobody is displaced by somebody else."""
    model, _ = client(settings())
    encoded = texts(20)
    with bypassed(model):
        scores = el2n(model, encoded, "causal-lm", pad_id=0)
    split = SplitConfig(keep=1.0, threshold=float(np.median(scores)))
    whole = set(kept_of(model, encoded, split, "causal-lm", seed=1, pad_id=0).tolist())
    assert 0 < len(whole) < 20
    for gone in range(20):
        rest = np.delete(np.arange(20), gone)
        some = kept_of(model, only(encoded, rest), split, "causal-lm", seed=1, pad_id=0)
        assert set(rest[some].tolist()) == whole - {gone}


def test_scores_that_are_not_finite_are_never_kept() -> None:
    model, _ = client(settings())
    with torch.no_grad():
        model.get_submodule("base_model.base_model.model.model.norm").weight.fill_(float("nan"))  # type: ignore[operator]
    for split in (SplitConfig(keep=0.5), SplitConfig(keep=1.0, threshold=0.1)):
        assert len(kept_of(model, texts(), split, "causal-lm", seed=1, pad_id=0)) == 0


def test_no_example_is_no_step_and_nothing_leaves() -> None:
    tuning = settings(split={"local_epochs": 0.0, "keep": 1.0, "threshold": 100.0})
    model, link = client(tuning)
    before = read(model)
    ran = tune_split(
        model, texts(), tuning, "causal-lm", optimizer(model, tuning, 0.01), lr=0.01, seed=3,
        pad_id=0,
    )  # fmt: skip
    assert (ran.kept, ran.run.steps, link.calls) == (0, 0, [])
    assert all(np.array_equal(before[name], value) for name, value in read(model).items())


def test_only_prompts_and_tail_train() -> None:
    model, _ = client(settings())
    names = list(trainable(model))
    assert any("prompt_encoder" in name for name in names)
    assert {name.split("layers.")[1][0] for name in names if "layers." in name} == {"3"}
    both, _ = client(settings(adapter="lora", split={"adapt": "ends"}))
    assert {name.split("layers.")[1][0] for name in trainable(both)} == {"0", "3"}


def test_noise_is_drawn_once_for_each_release() -> None:
    model, link = client(settings())
    remote = remote_of(model)
    assert remote is not None
    remote.link = Noisy(link, 1.0, 0.5, InsecureSeededNoise(1))
    ids = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    (_, (sent, _, _)), (_, (grad, _, _)) = link.calls
    assert sent.isfinite().all()
    # Two records of (3 + 6) x 32 numbers: a norm of at most 1, and noise of 0.5 on each.
    assert sent.std() == pytest.approx(0.5, rel=0.15)
    assert grad.std() == pytest.approx(0.5, rel=0.15)


def test_padding_has_no_part_in_the_noise() -> None:
    model, link = client(settings(adapter="lora"))
    remote = remote_of(model)
    assert remote is not None
    remote.link = Noisy(link, 1.0, 0.5, InsecureSeededNoise(1))
    ids = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    sent = link.calls[0][1][0]
    assert not sent[0, 4:].any()
    assert sent[0, :4].all()


def test_an_example_that_is_not_finite_says_nothing_to_the_others() -> None:
    """Under a promise about examples it counts as zero, and the update leaves all the same."""
    model, link = client(settings(adapter="lora", split={"adapt": "ends"}))
    remote = remote_of(model)
    assert remote is not None
    ids = torch.randint(3, 97, (3, 6), generator=torch.Generator().manual_seed(0))
    calm = model(input_ids=ids).logits
    with torch.no_grad():
        model.get_input_embeddings().weight[int(ids[1, 0])] = float("inf")  # type: ignore[operator]
    ids[0][ids[0] == ids[1, 0]] = 5
    ids[2][ids[2] == ids[1, 0]] = 5
    wanted = model(input_ids=ids[[0, 2]]).logits
    remote.total = True
    found = model(input_ids=ids).logits
    assert not found[1].isfinite().any()
    torch.testing.assert_close(found[[0, 2]], wanted, rtol=1e-4, atol=1e-5)
    assert calm.isfinite().all()
    found[[0, 2]].sum().backward()
    for kind, (sent, _, _) in link.calls[2:]:
        assert kind == "backward" or sent.isfinite().all()


def test_nothing_is_generated_through_noise() -> None:
    model, link = client(settings(adapter="lora"))
    remote = remote_of(model)
    assert remote is not None
    remote.link = Noisy(link, 1.0, 0.5, InsecureSeededNoise(1))
    with pytest.raises(FedtuneError, match="noise"):
        model.generate(  # type: ignore[operator]
            input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=3, use_cache=True, pad_token_id=0
        )


def test_a_whole_model_has_no_body_to_skip(tmp_path: Path) -> None:
    with pytest.raises(FedtuneError, match="whole"), bypassed(make("Llama")):
        pass


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"adapter": "ia3"}, "server's part"),
        ({"split": {"release": "once"}}, "head=0"),
        ({"adapter": "lora", "split": {"release": "once", "adapt": "ends"}}, "adapt='tail'"),
        ({"split": {"prune": "random", "threshold": 0.5, "keep": 1.0}}, "prune='el2n'"),
        ({"split": {"threshold": 0.5, "keep": 0.5}}, "keep=1"),
        ({"split": {"rank": 4}}, "lowrank"),
        ({"split": {"clip": 2.0}}, "noise above 0"),
        ({"split": {"local_epochs": 0.0, "local_lr": 0.1}}, "local_epochs above 0"),
        ({"adapter": "prompt", "split": {"adapt": "ends"}}, "does nothing"),
        ({"adapter": "lora", "split": {"release": "once", "noise": 1.0}}, "other noise"),
        ({"options": {"target_modules": "all-linear"}}, "server's part"),
        ({"options": {"modules_to_save": ["embed_tokens"]}}, "server's part"),
        ({"method": "backprop", "adapter": "lora", "split": {"head": 2}}, "does nothing"),
        ({"probe": {"count": 4}}, "does nothing"),
    ],
)
def test_settings_that_cannot_be_are_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        settings(**given)
