"""What a node refuses, whatever its server asks; and what leaves it, and what does not."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

import fedtune
from fedtune.client.policy import OwnerPolicy, judge
from fedtune.config import Config
from fedtune.errors import ExitCode, FedtuneError
from fedtune.keys.authority import make_authority
from fedtune.keys.node import new_identity, public_of
from fedtune.keys.roster import enrol, revoke
from fedtune.model_files import weights_digest
from fedtune.privacy.events import Unit
from fedtune.privacy.plan import promises
from fedtune.terms import propose
from fedtune.wire import Accepted, Hello, Task, Update, to_record
from tests.client.node_kit import (
    BARE,
    BY_SERVER,
    CLIENTS,
    EXAMPLE,
    SECRET,
    Ward,
    changed,
    experiment,
    read,
    task,
    task_identity,
    told,
    tuned,
    ward,
    words_of,
)

PLAIN = experiment()
SECURE: dict[str, Any] = {
    "privacy__example": None, "privacy__client": CLIENTS, "federation__secure": {"threshold": 1.0},
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _identity() -> Iterator[None]:
    with task_identity():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys and text, made once and copied: keys take time."""
    folder = tmp_path_factory.mktemp("ward")
    Ward.first = ward(folder)  # type: ignore[attr-defined]
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Ward:
    folder = tmp_path / "here"
    shutil.copytree(made, folder)
    return Ward(folder, Ward.first.identities)  # type: ignore[attr-defined]


def charged(here: Ward, unit: Unit = Unit.EXAMPLE, name: str = "ann") -> int:
    """Return how many releases the node's ledger holds, over all relations."""
    ledger = here.node(name).ledger
    accounts = [one for one in ledger.accounts() if one.unit is unit]
    return sum(sum(ledger.groups(one).values()) for one in accounts)


def total(here: Ward, name: str = "ann") -> float:
    """Return the sum of what the ledger's accounts hold."""
    ledger = here.node(name).ledger
    return sum(
        ledger.spent(one, here.node(name).policy.max_delta).epsilon for one in ledger.accounts()
    )


# What is agreed to, and how a round goes


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


# The budget


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
    from fedtune.terms import digest_of, propose
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


# Code


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (os.environ["FEDTUNE_TEST_BOMB"],))


def test_code_that_a_server_ships_is_never_loaded(
    here: Ward, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pickles, bundles, dotted paths: in every place of a message that holds bytes or words."""
    place = tmp_path / "exploded"
    monkeypatch.setenv("FEDTUNE_TEST_BOMB", str(place))
    bomb = pickle.dumps(_Bomb())
    pickle.loads(bomb)  # it works
    place.rmdir()
    shutil.rmtree(tmp_path / "evil", ignore_errors=True)
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "fedtune_evil.py").write_text("raise SystemExit('ran')\n")
    monkeypatch.syspath_prepend(str(tmp_path / "evil"))
    here.agree(PLAIN)
    here.send("train", task(PLAIN))  # what is imported lazily is imported now
    modules = set(sys.modules)
    from flwr.app import Array, ArrayRecord

    def fields(value: Any) -> RecordDict:
        return RecordDict({"fields": ConfigRecord(value)})

    ours = dict(to_record(task(PLAIN, 2)).config_records["fields"])
    arrays = [
        ArrayRecord({"blob": Array("uint8", (len(bomb),), stype, bomb)})
        for stype in ("safetensors", "pickle", "numpy.ndarray", "cloudpickle")
    ]
    records: list[RecordDict] = [
        fields(ours | {"tensors": bomb}), fields({"fab": bomb}),
        RecordDict({"fab": ConfigRecord({"content": bomb})}),
        fields({"clientapp": "fedtune_evil:app", "module": "fedtune_evil"}),
        *(RecordDict({"fields": ConfigRecord({**ours}), "tensors": one}) for one in arrays),
    ]  # fmt: skip
    for name in ("fedtune_evil:app", "os:system", "fedtune_evil"):
        for setting in ("tuning.method", "tuning.adapter", "tuning.target", "data.format"):
            terms = replace(here.terms(PLAIN, "job-9"), terms=changed(told(PLAIN), setting, name))
            records.append(to_record(terms))
    kinds = ["train", "evaluate", "query.hello", "query.terms", "query.fab", "query.x", "system.x"]
    for kind in kinds:
        for record in records:
            assert here.send(kind, record).has_error()
    assert not place.exists()
    assert set(sys.modules) - modules == set()


def test_no_client_code_asks_for_a_bundle_or_loads_objects() -> None:
    """GetFab is what Flower's own node calls for code."""
    root = Path(fedtune.client.__path__[0])
    found = {
        path.name: [
            word
            for word in ("GetFab(", "GetFabRequest", "GetRun(", "pickle", "importlib", "exec(",
                         "eval(", "__import__", "load_app", "get_fab", "runpy")
            if re.search(rf"(?<![\w.`]){re.escape(word)}", path.read_text(encoding="utf-8"))
        ]
        for path in sorted(root.glob("*.py"))
    }  # fmt: skip
    assert len(found) > 20
    assert {name: words for name, words in found.items() if words} == {}


# What leaves


def test_every_reply_is_written_down_before_it_leaves_with_its_bytes(here: Ward) -> None:
    written: list[tuple[str, int]] = []

    def ask(kind: str, value: Any) -> Message:
        reply = here.send(kind, value)
        line = here.sent()[-1]  # there when the reply is handed over
        whole = sum(len(part.deflate()) for part in get_all_nested_objects(reply).values())
        assert (line["asked"], line["bytes"]) == (kind, whole)
        written.append((line["what"], whole))
        return reply

    ask("query.terms", here.terms(experiment(privacy__example=None)))
    ask("query.terms", here.terms(PLAIN))
    ask("query.hello", Task(0, 0, 0, 0.0, {}, "job-1"))
    ask("train", task(PLAIN))
    ask("train", task(PLAIN))
    ask("evaluate", task(PLAIN))
    ask("query.nothing", task(PLAIN))
    words = [what for what, _ in written]
    assert len(here.sent()) == len(words) == 7
    assert words[0].startswith("a refusal: the owner's policy")
    assert words[1] == "agreed to the experiment's terms"
    assert words[3] == "round 1: an update, 84 tensors of 40,704 numbers"
    assert all(one.startswith("a refusal: ") for one in words[4:])
    assert [line["job"] for line in here.sent()] == ["", *["job-1"] * 6]
    assert (here.node().home / "sent.jsonl").stat().st_mode & 0o77 == 0


def test_what_cannot_be_written_down_does_not_leave(
    here: Ward, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.agree(PLAIN)

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fedtune.files.os.fsync", full)
        with pytest.raises(FedtuneError, match="nothing does") as caught:
            here.send("query.hello", Task(0, 0, 0, 0.0, {}, "job-1"))
    assert caught.value.code == ExitCode.STORAGE
    # The connection tells the server this text: nothing of this machine is in it.
    assert str(here.folder) not in str(caught.value)
    assert any(str(here.folder) in words for words in here.told)
    assert words_of(here.send("query.hello", Task(0, 0, 0, 0.0, {}, "job-1"))) == ""


FAILING: dict[str, tuple[dict[str, Any], str]] = {
    "a column that is not there": ({"data__text": "diagnosis"}, ""),
    "a class that is not there": (
        {"data__kind": "classification", "data__labels": ["a", "b"], "data__label": "text",
         "model__task": "classification"}, "",
    ),
    "a prompt of another kind": (
        {"data__kind": "instruction", "data__prompt": "{text}", "data__completion": "{nothing}"},
        "",
    ),
    "longer than the model": ({"data__max_length": 100_000}, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILING)
@pytest.mark.parametrize("promised", [True, False])
def test_v40_errors_tell_the_server_neither_rows_nor_places(
    here: Ward, case: str, promised: bool
) -> None:
    here.policies["ann"] = BARE
    config = experiment(**FAILING[case][0], privacy__example=EXAMPLE if promised else None)
    asked = replace(here.terms(PLAIN), terms=propose(config), fingerprint="x" * 64)
    said = [words_of(here.send("query.terms", asked))]
    asked = replace(asked, fingerprint=_fingerprint(config))
    said.append(words_of(here.send("query.terms", asked)))
    start = tuned(PLAIN).start().tensors()
    said += [
        words_of(here.send(kind, task(config, tensors=start)))
        for kind in ("query.hello", "train", "evaluate")
    ]
    assert any(said)
    private = [SECRET, "slept", str(here.folder), "ann.jsonl", "ledger.db", "notes/ann", "/"]
    for words in said:
        assert not [one for one in private if one in words], words
    log = (here.node().home / "sent.jsonl").read_text()
    assert SECRET not in log
    assert str(here.folder) not in log


def _fingerprint(config: Config) -> str:
    try:
        return tuned(config).fingerprint
    except FedtuneError:
        return "y" * 64


def test_v40_a_training_that_breaks_says_its_kind_and_no_more(
    here: Ward, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever raises inside of training, with words about rows in it."""
    here.policies["ann"] = BARE
    from fedtune.client import private_round, worker

    def broken(*_args: Any, **_named: Any) -> None:
        raise ValueError(f"cannot tune on '{SECRET}' in {here.folder}/ann.jsonl")

    for example in (None, EXAMPLE):
        config = experiment(privacy__example=example)
        job = f"job-{bool(example)}"
        assert here.agree(config, job) == ""
        with monkeypatch.context() as patch:
            patch.setattr(worker, "tune", broken)
            patch.setattr(private_round, "tune_privately", broken)
            words = words_of(here.send("train", task(config, job=job)))
        assert words
        assert SECRET not in words
        assert str(here.folder) not in words
    logs = "".join(p.read_text() for p in here.node().home.rglob("errors.log"))
    assert logs.count(SECRET) >= 2  # the owner sees why


def test_v40_a_client_whose_tuning_diverges_adds_nothing(here: Ward) -> None:
    """Under a promise about clients a failure would tell something about the rows."""
    here.policies["ann"] = BARE
    config = experiment(privacy__example=None, privacy__client=BY_SERVER, tuning__lr=1e30)
    assert here.agree(config) == ""
    spoilt = {name: np.full_like(v, 1e30) for name, v in tuned(config).start().tensors().items()}
    update = read(Update, here.send("train", task(config, tensors=spoilt)))
    assert all(not value.any() for value in update.tensors.values())
    bare = experiment(privacy__example=None, tuning__lr=1e30)
    assert here.agree(bare, "job-2") == ""
    assert "diverged" in words_of(here.send("train", task(bare, job="job-2", tensors=spoilt)))


def test_words_of_a_server_move_no_cursor(here: Ward) -> None:
    here.agree(PLAIN)
    here.send("train", task(PLAIN, job="\x1b[2J" + "x" * 5000))
    assert len(here.told[-1]) < 1000
    line = (here.node().home / "sent.jsonl").read_text().splitlines()[-1]
    assert "\x1b" not in line


# ---------------------------------------------------------------- what a hostile review found


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


def test_terms_whose_batches_could_tell_the_number_of_rows_are_refused(here: Ward) -> None:
    here.node("ann", rows=128)
    one = EXAMPLE | {"population": 1, "noise_multiplier": 1e5}
    asked = experiment(tuning__batch_size=1, privacy__example=one)
    assert "too small for a batch" in here.agree(asked)
