"""SFPrompt's phases: what is scored, what is kept, what leaves."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedtune.adapters import attach, read, trainable
from fedtune.client.across import Across, Noisy
from fedtune.client.backprop import optimizer, tune
from fedtune.client.remote import connect, keep_ends, remote_of
from fedtune.client.split import bypassed, el2n, kept_of, only, tune_split
from fedtune.config import Config, SplitConfig, TuningConfig
from fedtune.data import Encoded
from fedtune.errors import FedtuneError
from fedtune.models import Base
from fedtune.server.body import Body
from fedtune.split.blocks import cut_of
from fedtune.wire import Task
from tests.split.joined import Here
from tests.split.zoo import make

torch.set_num_threads(1)

SECRET = bytes(range(32))


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


def test_a_threshold_looks_at_each_example_alone() -> None:
    """What lets a promise about examples hold: nobody is displaced by somebody else."""
    model, _ = client(settings())
    encoded = texts(20)
    with bypassed(model):
        scores = el2n(model, encoded, "causal-lm", pad_id=0)
    split = SplitConfig(threshold=float(np.median(scores)))
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
    for split in (SplitConfig(keep=0.5), SplitConfig(threshold=0.1)):
        assert len(kept_of(model, texts(), split, "causal-lm", seed=1, pad_id=0)) == 0


def test_no_example_is_no_step_and_nothing_leaves() -> None:
    tuning = settings(split={"local_epochs": 0.0, "threshold": 100.0})
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
    remote.link = Noisy(link, 1.0, 0.5, SECRET)
    ids = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    (_, (sent, _, _)), (_, (grad, _, _)) = link.calls
    assert sent.isfinite().all()
    # Two records of (3 + 6) x 32 numbers: a norm of at most 1, and noise of 0.5 on each.
    assert sent.std() == pytest.approx(0.5, rel=0.15)
    assert grad.std() == pytest.approx(0.5, rel=0.15)
    # Asked for again after a crash, it is the same release; of another text it is not.
    model(input_ids=ids, labels=ids).loss.backward()
    (_, (again, _, _)), (_, (grad_again, _, _)) = link.calls[2:]
    assert torch.equal(again, sent)
    assert torch.equal(grad_again, grad)
    other = ids.clone()
    other[0, -1] = 5
    model(input_ids=other, labels=other)
    moved = link.calls[4][1][0]
    assert torch.equal(moved[1], sent[1])
    assert not torch.isclose(moved[0], sent[0]).any()


def test_padding_has_no_part_in_the_noise() -> None:
    model, link = client(settings(adapter="lora"))
    remote = remote_of(model)
    assert remote is not None
    remote.link = Noisy(link, 1.0, 0.5, SECRET)
    ids = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    sent = link.calls[0][1][0]
    assert not sent[0, 4:].any()
    assert sent[0, :4].all()


@pytest.mark.parametrize("folder", [True, False])
def test_a_round_is_released_from_one_set_of_parameters(tmp_path: Path, folder: bool) -> None:
    """A server that asks for the same round again and again gets the same records, or none."""
    config = Config.model_validate(
        {"tuning": settings(split={"noise": 1.0}).model_dump(), "federation": {"rounds": 2}}
    )
    base = Base(torch.nn.Identity(), None, 0)

    def across() -> Across:
        home = tmp_path if folder else None
        return Across(config, base, cut_of(make("Llama"), 1, 1), "", "", home)

    task = Task(1, 0, 0, 0.1, {"a": np.ones(3, np.float32)}, "job")
    one = across()
    one._require_first(0, task)
    one._require_first(0, replace(task, attempt=1))
    one._require_first(1, replace(task, tensors={"a": np.zeros(3, np.float32)}))
    one._require_first(0, replace(task, round=2, lr=0.2))
    later = across() if folder else one
    for odd in (
        replace(task, tensors={"a": np.zeros(3, np.float32)}),
        replace(task, lr=0.2),
        replace(task, round=3),
    ):
        with pytest.raises(FedtuneError, match="answered before"):
            later._require_first(0, odd)
    later._require_first(0, task)


def test_nothing_is_generated_through_noise() -> None:
    model, link = client(settings(adapter="lora"))
    remote = remote_of(model)
    assert remote is not None
    remote.link = Noisy(link, 1.0, 0.5, SECRET)
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
        ({"split": {"prune": "random", "threshold": 0.5}}, "prune='el2n'"),
        ({"method": "backprop", "adapter": "lora", "split": {"head": 2}}, "does nothing"),
        ({"probe": {"count": 4}}, "does nothing"),
    ],
)
def test_settings_that_cannot_be_are_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        settings(**given)
