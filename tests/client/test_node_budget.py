"""What a node spends, and that it is spent once, whatever its server asks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.client.policy import OwnerPolicy
from fedtune.privacy.events import Unit
from fedtune.privacy.plan import promises
from fedtune.terms import propose
from tests.client.node_kit import (
    BARE,
    BY_SERVER,
    EXAMPLE,
    PLAIN,
    SECURE,
    Ward,
    changed,
    charged,
    experiment,
    task,
    told,
    total,
    tuned,
    words_of,
)

pytestmark = pytest.mark.usefixtures("identity")


def test_v29_the_same_attempt_twice_is_not_answered_twice(here: Ward) -> None:
    here.agree(PLAIN)
    assert words_of(here.send("train", task(PLAIN))) == ""
    assert "had ended" in words_of(here.send("train", task(PLAIN))) or charged(here) == 1
    again = words_of(here.send("train", task(PLAIN)))
    here.restart()
    after = words_of(here.send("train", task(PLAIN)))
    assert again
    assert after
    assert charged(here) == 1
    assert words_of(here.send("train", task(PLAIN, attempt=1))) == ""
    assert charged(here) == 2


def test_another_job_in_a_task_is_refused(here: Ward) -> None:
    here.agree(PLAIN)
    for job in ("job-2", "", "../job-1"):
        assert "this node agreed to job 'job-1'" in words_of(
            here.send("train", task(PLAIN, job=job))
        )
    assert charged(here) == 0


@pytest.mark.parametrize("number", [0, 4])
@pytest.mark.parametrize("promise", ["example", "client-by-server", "none"])
def test_a_round_beyond_the_plan_is_refused(here: Ward, promise: str, number: int) -> None:
    here.policies["ann"] = BARE
    client = BY_SERVER if promise == "client-by-server" else None
    example = EXAMPLE if promise == "example" else None
    tables = {"privacy__example": example, "privacy__client": client}
    config = experiment(**tables)
    assert here.agree(config) == ""
    assert "of a plan of 3" in words_of(here.send("train", task(config, number)))
    assert words_of(here.send("train", task(config, 3))) == ""


def test_v29_what_was_spent_stays_spent(here: Ward) -> None:
    """A second job on the same text, under another name each time, after restarts."""
    here.policies["ann"] = OwnerPolicy(max_epsilon=2.5)
    plan = promises(PLAIN)[0].spent().epsilon
    assert 1.25 < plan < 2.5  # one run fits, two do not
    refused = ""
    for job in ("job-0", "job-1", "wards-2"):
        refused = here.agree(PLAIN, job)
        for number in (1, 2, 3):
            refused = refused or words_of(here.send("train", task(PLAIN, number, job=job)))
        here.restart()
        if refused:
            break
    assert refused.startswith("budget exhausted")
    assert charged(here) >= 3
    assert total(here) <= 2.5
    # Nor do the first job's terms, asked for again, help.
    assert here.agree(PLAIN, "job-0") == ""
    again = [words_of(here.send("train", task(PLAIN, 3, n, "job-0"))) for n in (7, 8, 9)]
    assert again[-1].startswith("budget exhausted")
    assert total(here) <= 2.5


def test_another_relation_is_no_second_budget(here: Ward) -> None:
    assert here.agree(PLAIN) == ""
    other = experiment(privacy__example=EXAMPLE | {"relation": "replace-special"})
    words = here.agree(other, "job-2") or words_of(here.send("train", task(other, job="job-2")))
    assert "a second relation would be a second budget" in words or "LEDGER" in words
    assert len(here.node().ledger.accounts()) == 1


def test_another_unit_is_no_second_budget(here: Ward) -> None:
    """A server that promises something about clients instead of examples opens no new purse."""
    here.policies["ann"] = OwnerPolicy(max_epsilon=5.0, promises=BARE.promises)
    kinds: list[dict[str, Any]] = [{}, {"privacy__example": None, "privacy__client": BY_SERVER}]
    said = []
    for at in range(6):
        config, job = experiment(**kinds[at % 2]), f"job-{at}"
        words = here.agree(config, job)
        for number in (1, 2, 3):
            words = words or words_of(here.send("train", task(config, number, job=job)))
        said.append(words)
    assert said[:2] == ["", ""]
    assert [words for words in said if words and not words.startswith("budget exhausted")] == []
    assert said[-2:].count("") == 0
    ledger, share = here.node().ledger, here.node().policy.max_delta / 2
    found = {one.unit: ledger.spent(one, share).epsilon for one in ledger.accounts()}
    assert len(found) == 2
    assert 3.5 < sum(found.values()) <= 5.0
    shown = here.node().spent()
    assert shown is not None
    assert shown[0] == pytest.approx(sum(found.values()), rel=0.05)


def test_rounds_that_are_tried_again_end_at_the_bound_of_one_run(here: Ward) -> None:
    """Also where the server's own bound is generous, or there is none."""
    here.policies["ann"] = OwnerPolicy(max_epsilon=50.0, max_epsilon_per_run=2.5)
    for number, bound in enumerate((100.0, 0.0)):
        config = experiment(privacy__example=EXAMPLE | {"epsilon": bound})
        job = f"job-{number}"
        assert here.agree(config, job) == ""
        words = ""
        for attempt in range(12):
            words = words_of(here.send("train", task(config, 1, attempt, job)))
            if words:
                break
        assert words.startswith("budget exhausted")
        account = here.node().ledger.accounts()[0]
        spent_here = here.node().ledger.spent(account, 1e-6, job).epsilon
        assert 1.9 < spent_here <= 2.5


def test_where_the_server_adds_the_noise_the_plan_is_charged_once(here: Ward) -> None:
    here.policies["ann"] = OwnerPolicy(promises=("client-by-server",), max_epsilon=3.0)
    config = experiment(privacy__example=None, privacy__client=BY_SERVER)
    for _ in range(3):
        assert here.agree(config) == ""
        here.restart()
    assert charged(here, Unit.CLIENT) == 3
    before = total(here)
    assert words_of(here.send("train", task(config))) == ""
    assert total(here) == before
    # The same job with a longer plan is another plan; a renamed job pays again.
    longer = changed(told(config), "federation.rounds", 30)
    assert "had other terms before" in here.agree(config, terms=longer)
    said = [here.agree(config, f"job-{n}") for n in range(2, 9)]
    assert said[-1].startswith("budget exhausted")
    assert total(here) <= 3.0


def test_a_plan_is_not_charged_for_other_terms_when_the_disk_fills(
    here: Ward, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Charged for three rounds, nothing noted: then the same job asks for thirty."""
    here.policies["ann"] = OwnerPolicy(promises=("client-by-server",))
    config = experiment(privacy__example=None, privacy__client=BY_SERVER)
    real = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name in {"terms.json", "current.json"}:
            raise OSError(28, "No space left on device")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert "STORAGE" in here.agree(config)
    longer = experiment(
        privacy__example=None, privacy__client=BY_SERVER, federation__rounds=30,
    )  # fmt: skip
    words = here.agree(longer)
    assert words or charged(here, Unit.CLIENT) >= 30


def test_a_stricter_policy_holds_after_a_restart(here: Ward) -> None:
    assert here.agree(PLAIN) == ""
    assert words_of(here.send("train", task(PLAIN))) == ""
    here.policies["ann"] = OwnerPolicy(methods=("mezo",))
    here.restart()
    assert "does not allow" in words_of(here.send("train", task(PLAIN, 2)))
    assert charged(here) == 1


def test_a_node_that_restarts_goes_on_in_a_secure_run(here: Ward) -> None:
    """It knows who the others are, without being told again."""
    from fedtune.privacy.summing import model_digest
    from fedtune.terms import digest_of
    from fedtune.wire import Advert

    here.policies["ann"] = OwnerPolicy()
    config = experiment(**SECURE)
    assert here.agree(config) == ""
    here.restart()
    digest = np.frombuffer(
        model_digest(tuned(config).start().tensors(), digest_of(propose(config)), 5e-3), np.uint8
    )
    advert = Advert(1, 0, {"model": digest}, "job-1")
    assert words_of(here.send("query.advert", advert)) == ""


def test_v24_scores_on_private_rows_are_refused(here: Ward) -> None:
    here.agree(PLAIN)
    assert here.send("evaluate", task(PLAIN)).has_error()


def test_a_task_with_more_than_the_model_has_is_refused_before_it_is_charged(here: Ward) -> None:
    config = experiment()
    assert here.agree(config) == ""
    layer = "base_model.model.model.embed_tokens"
    some = {f"residual/{layer}.U": np.ones((4, 1), np.float32),
            f"residual/{layer}.V": np.ones((1, 4), np.float32)}  # fmt: skip
    good = task(config).tensors
    name = next(iter(good))
    bad = [
        good | some, good | {"more": np.zeros(1, np.float32)},
        good | {name: good[name].astype(np.float64)},
        good | {name: np.full_like(good[name], np.nan)},
    ]  # fmt: skip
    for tensors in bad:
        assert "the client failed" in words_of(here.send("train", task(config, tensors=tensors)))
    ledger = here.node().ledger
    assert not any(ledger.groups(account) for account in ledger.accounts())


def test_the_owners_own_smaller_cap_stays(here: Ward) -> None:
    assert here.agree(experiment(), job="job-1") == ""
    ledger = here.node().ledger
    ledger.set_budget(ledger.accounts()[0], 0.5, 1e-6, actor="owner", note="enough")
    here.agree(experiment(), job="job-2")
    assert (ledger.accounts()[0].epsilon, ledger.accounts()[0].delta) == (0.5, 1e-6)
