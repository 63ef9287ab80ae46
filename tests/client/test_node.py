"""What a node agrees to, and what it refuses before anything is loaded."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.client.policy import OwnerPolicy, judge
from fedtune.keys.authority import make_authority
from fedtune.keys.node import new_identity, public_of
from fedtune.keys.roster import enrol, revoke
from fedtune.model_files import weights_digest
from fedtune.privacy.events import Unit
from fedtune.wire import Accepted, Hello, Task, Update
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
    read,
    task,
    told,
    words_of,
)

pytestmark = pytest.mark.usefixtures("identity")


def test_an_experiment_is_agreed_to_and_worked_on(here: Ward) -> None:
    answer = read(Accepted, here.send("query.terms", here.terms(PLAIN)))
    assert answer.client == "ann"
    hello = read(Hello, here.send("query.hello", Task(0, 0, 0, 0.0, {}, "job-1")))
    assert (hello.client, hello.rows) == ("ann", 0)
    update = read(Update, here.send("train", task(PLAIN)))
    assert (update.round, update.examples, update.steps) == (1, 1, 0)
    assert max(float(np.abs(v).max()) for v in update.tensors.values()) > 0
    assert charged(here) == 1
    assert here.node().spent() is not None


# The owner's policy

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "more-epsilon": ({"privacy__example": EXAMPLE | {"noise_multiplier": 0.3}}, {}, "at most 8"),
    "more-epsilon-per-run": ({}, {"max_epsilon_per_run": 1.9}, "epsilon 1.9.* over the whole run"),
    "more-delta": ({"privacy__example": EXAMPLE | {"delta": 1e-4}}, {}, "delta=0.0001"),
    "no-promise": ({"privacy__example": None}, {}, "no privacy is promised"),
    "noise-at-the-server": (
        {"privacy__example": None, "privacy__client": BY_SERVER}, {}, "the server adds the noise",
    ),
    "only-secure": ({}, {"secure": True}, "no secure aggregation"),
    "smaller-cohort": (SECURE, {"min_cohort": 5}, r"min_cohort=3 \(at least 5\)"),
    "nobody-colludes": (
        SECURE | {"federation__secure": {"colluding": 0}}, {"max_honest_share": 0.9},
        "100% honest survivors",
    ),
    "method": ({"tuning__method": "mezo"}, {"methods": ("backprop",)}, "tuning.method='mezo'"),
    "adapter": ({"tuning__adapter": "ia3"}, {"adapters": ("lora",)}, "tuning.adapter='ia3'"),
    "options": ({"tuning__options": {"use_rslora": True}}, {}, "tuning.options='use_rslora'"),
    "insecure-noise": ({"privacy__insecure_seeded_noise": True}, {}, "anybody can take away"),
    "rounds": ({"federation__rounds": 9}, {"rounds": 8}, r"9 rounds \(at most 8\)"),
    "model": ({}, {"models": ("ab" * 32,)}, "base model with SHA-256 c64ec01b82ca"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_owner_does_not_allow_is_refused(here: Ward, case: str) -> None:
    asked, policy, said = REFUSED[case]
    here.policies["ann"] = OwnerPolicy(**policy)
    config = experiment(**asked)
    words = here.agree(config)
    assert re.search(said, words), words
    assert "not agreed" in words_of(here.send("train", task(config))) or (
        "nothing was agreed" in words_of(here.send("train", task(config)))
    )
    assert charged(here) == charged(here, Unit.CLIENT) == 0
    assert here.node().work() is None


def test_what_the_owner_allows_is_agreed_to(here: Ward) -> None:
    """The other side of the cases above: each is refused for what it says, not for anything."""
    generous = OwnerPolicy(
        max_epsilon=1000, max_epsilon_per_run=1000, max_delta=1e-3, promises=BARE.promises,
        options=("use_rslora",), insecure_noise=True, min_colluding=0,
    )  # fmt: skip
    asked = [experiment(**tables) for tables, _, _ in REFUSED.values()]
    assert [judge(generous, config) for config in asked] == [()] * len(asked)
    here.policies["ann"] = OwnerPolicy(models=(weights_digest("fedtune:tiny"),))
    assert here.agree(PLAIN) == ""


def test_v38_another_base_model_is_refused(here: Ward) -> None:
    words = here.agree(PLAIN, fingerprint="0" * 64)
    assert "base model is 000000000000" in words
    assert here.node().work() is None
    assert charged(here) == 0
    bare = replace(here.terms(PLAIN), terms=changed(told(PLAIN), "model.base", "org/evil"))
    words = words_of(here.send("query.terms", bare))
    assert words == "the node failed (MODEL); its owner sees why"


def test_outside_the_owners_hours_nothing_is_done(here: Ward) -> None:
    here.policies["ann"] = OwnerPolicy(hours=("19:00-07:00",))
    assert "outside the owner's hours" in here.agree(PLAIN)
    here.now = here.now.replace(hour=23)
    assert here.agree(PLAIN) == ""
    here.now = here.now.replace(hour=7)
    assert "outside the owner's hours" in words_of(here.send("train", task(PLAIN)))
    assert charged(here) == 0


# Terms and rosters that lie

OTHERS = {
    "another-seed": changed(told(PLAIN), "seed", 8),
    "more-rounds": changed(told(PLAIN), "federation.rounds", 4),
    "another-order-of-keys": json.dumps(dict(reversed(told(PLAIN).items()))),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_job_keeps_its_terms(here: Ward, case: str) -> None:
    assert here.agree(PLAIN) == ""
    words = here.agree(PLAIN, terms=OTHERS[case])
    assert "had other terms before" in words
    here.restart()
    assert "had other terms before" in here.agree(PLAIN, terms=OTHERS[case])
    assert here.agree(PLAIN) == ""


@pytest.mark.parametrize(
    "job", ["", ".", "..", "../ann", "a/b", "/etc/x", "a\\b", "a\0", "a\n", "-a", "é", "x" * 151]
)
def test_the_name_of_a_job_is_no_path(here: Ward, job: str) -> None:
    before = {p.relative_to(here.folder) for p in here.folder.rglob("*")}
    assert here.agree(PLAIN, job) == "the job has no proper name"
    after = {str(p.relative_to(here.folder)) for p in here.folder.rglob("*")} - set(
        map(str, before)
    )
    assert {one for one in after if not one.startswith("ann.node/ledger.db")} <= {
        "ann.node", "ann.node/sent.jsonl", "ann.node/roster", "ann.node/roster.json",
    }  # fmt: skip


def test_terms_that_are_too_long_are_not_even_kept(here: Ward) -> None:
    assert "longer than" in here.agree(PLAIN, terms=" " * (256 * 1024 + 1))
    assert not (here.node().home / "proposed.json").exists()


def test_a_roster_of_others_is_refused(here: Ward, tmp_path: Path) -> None:
    """Of another CA, altered, without this node, under its name with another key, or none."""
    other = tmp_path / "other"
    make_authority(other, "other")
    enrol(other, *(public_of(one) for one in here.identities.values()))
    theirs = np.frombuffer((other / "roster").read_bytes(), np.uint8)
    ours = np.frombuffer(here.roster, np.uint8)
    bent = ours.copy()
    bent[len(bent) // 2] ^= 1
    stranger = new_identity("dan")
    here.identities = here.identities | {"dan": stranger, "ann2": new_identity("ann")}
    bad: list[dict[str, np.ndarray[Any, Any]]] = [
        {"roster": theirs}, {"roster": bent}, {}, {"roster": ours, "more": ours},
        {"roster": ours.view(np.int8)}, {"roster": ours.reshape(1, -1)}, {"roster": ours[:0]},
    ]  # fmt: skip
    for tensors in bad:
        assert here.agree(PLAIN, tensors=tensors) != ""
    assert "federation" in here.agree(PLAIN, tensors={"roster": theirs})
    here.nodes["dan"] = here.node("bob")
    here.nodes["dan"].identity = stranger
    assert "'dan' is not in the roster" in here.agree(PLAIN, name="dan")
    here.nodes["dan"].identity = here.identities["ann2"]
    assert "'ann' is not in the roster with this key" in here.agree(PLAIN, name="dan")
    assert here.node().work() is None
    assert here.agree(PLAIN) == ""


def test_an_older_roster_is_refused_after_a_restart_too(here: Ward) -> None:
    old = np.frombuffer(here.roster, np.uint8)
    revoke(here.keys, "cy")
    # Seen is seen, also with terms that are refused.
    assert "no privacy" in here.agree(experiment(privacy__example=None))
    for _ in range(2):
        assert "the roster is an old one" in here.agree(PLAIN, tensors={"roster": old})
        here.restart()
    assert here.agree(PLAIN) == ""


def test_a_revoked_node_learns_it_from_the_roster(here: Ward) -> None:
    revoke(here.keys, "ann")
    assert "'ann' is not in the roster" in here.agree(PLAIN)


def test_no_row_decides_what_a_server_hears_of_terms(here: Ward) -> None:
    """A label outside of the server's set, or a column that is not there, is nobody's business."""
    for number, labels in enumerate((["flu", "cold"], ["flu", "hiv"])):
        asked = experiment(
            data__kind="classification", data__labels=labels, model__task="classification",
            data__label="author", name=f"asks-{number}",
        )  # fmt: skip
        assert here.agree(asked, job=f"job-{number}") == ""
    assert here.agree(experiment(data__text="ssn"), job="job-columns") == ""


def test_a_name_for_training_that_flower_would_take_is_not_answered(here: Ward) -> None:
    config = experiment()
    assert here.agree(config) == ""
    for kind in ("train.default", "evaluate.default", "query.other"):
        assert "no answer to" in words_of(here.send(kind, task(config)))


def test_terms_whose_batches_could_tell_the_number_of_rows_are_refused(here: Ward) -> None:
    here.node("ann", rows=128)
    one = EXAMPLE | {"population": 1, "noise_multiplier": 1e5}
    asked = experiment(tuning__batch_size=1, privacy__example=one)
    assert "too small for a batch" in here.agree(asked)
