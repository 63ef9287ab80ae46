"""What a server may propose, and that nothing of the owner's can be among it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.config import Config
from fedtune.configfile import load
from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.plan import promises
from fedtune.terms import MOST_BYTES, Own, accept, check_length, digest_of, leaving, propose
from tests.client.node_kit import CLIENTS, EXAMPLE, changed, experiment, told

OWN = Own(
    "ann", "/data/ann/notes.jsonl", "notes", "/data/ann/ledger.db", threads=3, device="cuda:1"
)
TERMS = told(experiment())
SECURE = experiment(
    privacy__example=None, privacy__client=CLIENTS, federation__secure={"colluding": 0}
)


@pytest.mark.parametrize("config", [experiment(), SECURE], ids=["example", "clients"])
def test_both_ends_promise_the_same(config: Config) -> None:
    found = accept(propose(config), OWN)
    assert promises(found) == promises(config)
    assert found.tuning == config.tuning
    assert found.federation.secure == config.federation.secure
    assert (found.seed, found.name, found.model.base) == (7, "wards", "fedtune:tiny")


def test_what_is_the_owners_is_the_owners() -> None:
    own = Own(**{**vars(OWN), "data": {"text": "note", "format": "csv"}})
    found = accept(propose(experiment()), own)
    assert (found.data.source, found.data.eval) == (OWN.source, "")
    assert (found.data.text, found.data.format) == ("note", "csv")
    assert (found.privacy.ledger, found.privacy.dataset) == (OWN.ledger, "notes")
    assert (found.engine.threads, found.model.device) == (3, "cuda:1")
    assert (found.engine.body, found.engine.body_root, found.engine.body_key) == ("local", "", "")
    assert (found.data.partition.by, found.data.partition.column) == ("owner", "ann")


THEIRS: dict[str, Any] = {
    "data.source": "/etc/passwd", "data.eval": "/etc/passwd", "data.format": "parquet",
    "data.split": "test", "data.encoding": "latin-1",
    "data.separator": "x", "data.pattern": "(a+)+b", "data.partition": {"by": "iid"},
    "model.device": "cuda", "model.revision": "main", "privacy.ledger": "/tmp/l.db",
    "privacy.dataset": "other", "engine": {"body": "evil:1"}, "output": {"folder": "/tmp"},
    "federation.server": {"keys": "/tmp"}, "policy": {}, "extra": 1, "data.extra": 1,
}  # fmt: skip


@pytest.mark.parametrize("place", THEIRS)
def test_terms_that_set_what_is_the_owners_are_refused(place: str) -> None:
    with pytest.raises(FedtuneError, match=f"the terms set '{place}'") as caught:
        accept(changed(TERMS, place, THEIRS[place]), OWN)
    assert caught.value.code == ExitCode.CONFIG


BAD: dict[str, str] = {
    "long": " " * (MOST_BYTES + 1),
    "deep": "[" * 100_000,
    "deep inside": changed(TERMS, "tuning.options", json.loads("[" * 20 + "]" * 20)),
    "nan": changed(TERMS, "tuning.lr", float("nan")),
    "infinite": changed(TERMS, "tuning.lr", float("inf")),
    "too large a number": changed(TERMS, "tuning.lr", 0).replace('"lr": 0', '"lr": 1e999'),
    "many digits": changed(TERMS, "seed", 0).replace('"seed": 0', '"seed": ' + "9" * 5000),
    "negative rounds": changed(TERMS, "federation.rounds", -1),
    "no rounds": changed(TERMS, "federation.rounds", 0),
    "a list": "[]",
    "nothing": "{}",
    "no text": "\ud800",
    "half": json.dumps(TERMS)[:-1],
    "no table": changed(TERMS, "data", []),
    "a word for a table": changed(TERMS, "privacy", "none"),
    "newer": changed(TERMS, "schema", 99),
    "a bound that the noise does not keep": changed(
        TERMS, "privacy.example", EXAMPLE | {"epsilon": 0.5}
    ),
    "delta of one person": changed(TERMS, "privacy.example", EXAMPLE | {"delta": 0.2}),
    "no noise": changed(TERMS, "privacy.example", EXAMPLE | {"noise_multiplier": 0.0}),
    "negative noise": changed(TERMS, "privacy.example", EXAMPLE | {"noise_multiplier": -1.0}),
    "classes found in the data": changed(TERMS, "data.kind", "classification"),
    "scores on private rows": changed(TERMS, "evaluation.clients", -1),
    "packed rows": changed(TERMS, "data.pack", True),
    "weights by rows": changed(TERMS, "federation.weighting", "examples"),
}


@pytest.mark.parametrize("case", BAD)
def test_terms_that_make_no_sense_are_refused(case: str) -> None:
    with pytest.raises(FedtuneError) as caught:
        accept(BAD[case], OWN)
    assert caught.value.code in {ExitCode.CONFIG, ExitCode.PRIVACY}
    assert OWN.source not in str(caught.value)
    assert OWN.ledger not in str(caught.value)


def test_a_missing_part_is_refused() -> None:
    for name in TERMS:
        with pytest.raises(FedtuneError, match="not whole"):
            accept(json.dumps({key: value for key, value in TERMS.items() if key != name}), OWN)


def test_what_is_proposed_names_no_place(tmp_path: Path) -> None:
    """The file of a server with paths, keys and a model of its own on disk."""
    (tmp_path / "model").mkdir()
    file = tmp_path / "federation.toml"
    file.write_text(
        f"""
        schema = 1
        [model]
        base = "{tmp_path}/model"
        [data]
        source = "{tmp_path}/rows.jsonl"
        [privacy]
        ledger = "{tmp_path}/l.db"
        dataset = "secret-project"
        [federation.server]
        keys = "{tmp_path}/keys"
        [output]
        folder = "{tmp_path}/runs"
        """
    )
    text = propose(load(file))
    assert str(tmp_path) not in text
    assert "secret-project" not in text
    assert "127.0.0.1" not in text


def test_a_model_that_is_not_embedded_is_the_owners_folder(tmp_path: Path) -> None:
    asked = changed(TERMS, "model.base", "org/evil-model")
    with pytest.raises(FedtuneError, match="not one that comes with fedtune") as caught:
        accept(asked, OWN)
    assert caught.value.code == ExitCode.MODEL
    own = Own(**{**vars(OWN), "model": str(tmp_path)})
    for base in ("org/evil-model", "../../x", "/etc", "fedtune:tiny"):
        assert accept(changed(TERMS, "model.base", base), own).model.base == str(tmp_path)
    with pytest.raises(FedtuneError, match="no model folder"):
        accept(asked, Own(**{**vars(OWN), "model": str(tmp_path / "nowhere")}))


def rewarded(public: str) -> Config:
    told = {"mode": "online", "reward": "public", "public": public}
    return experiment(privacy__example=EXAMPLE | {"clip": "rldp", "rldp": told})


def test_public_text_of_a_reward_is_the_owners_copy(tmp_path: Path) -> None:
    asked = propose(rewarded("/srv/secret-place/public.jsonl"))
    assert "/srv" not in asked
    with pytest.raises(FedtuneError, match="there is none here") as caught:
        accept(asked, OWN)
    assert "[data] public" in caught.value.hint
    own = Own(**{**vars(OWN), "data": {"text": "note", "public": str(tmp_path / "p.jsonl")}})
    for place in ("/etc/passwd", "../../x", "fedtune:stdlib", ["/etc"], 7):
        terms = changed(json.loads(asked), "privacy.example.rldp.public", place)
        found = accept(terms, own)
        example = found.privacy.example
        assert example is not None
        assert example.rldp is not None
        assert example.rldp.public == str(tmp_path / "p.jsonl")
        assert found.data.text == "note"


def test_public_text_that_is_the_private_text_is_refused() -> None:
    own = Own(**{**vars(OWN), "data": {"public": "/data/ann/../ann/notes.jsonl"}})
    with pytest.raises(FedtuneError, match="is the private text itself") as caught:
        accept(propose(rewarded("/srv/public.jsonl")), own)
    assert caught.value.code == ExitCode.PRIVACY


@pytest.mark.parametrize("place", ["/etc/passwd", ["/etc"], 7])
def test_without_a_copy_no_place_of_a_server_is_opened(place: Any) -> None:
    asked = changed(told(rewarded("x.jsonl")), "privacy.example.rldp.public", place)
    with pytest.raises(FedtuneError, match="there is none here"):
        accept(asked, OWN)


def test_public_text_of_a_policy_at_the_server_stays_there() -> None:
    asked = experiment(
        privacy__example=None,
        privacy__client=CLIENTS | {
            "noise_at": "server", "clip": "rldp",
            "rldp": {"mode": "online", "reward": "public", "public": "/srv/public.jsonl"},
        },
    )  # fmt: skip
    assert "/srv" not in propose(asked)
    terms = changed(told(asked), "privacy.client.rldp.public", "/etc/passwd")
    client = accept(terms, OWN).privacy.client
    assert client is not None
    assert client.rldp is not None
    assert not client.rldp.public.startswith("/")
    assert (client.rldp.reward, client.rldp.mode) == ("public", "online")


def test_terms_say_that_transitions_leave() -> None:
    for mode, words in (("federated", 1), ("online", 0), ("meta", 0)):
        asked = experiment(privacy__example=EXAMPLE | {"clip": "rldp", "rldp": {"mode": mode}})
        found = accept(propose(asked), OWN)
        assert len(leaving(found)) == words
        assert found.privacy.example == asked.privacy.example


@settings(deadline=None, derandomize=True, database=None)
@given(st.text(max_size=50))
def test_the_digest_is_of_every_letter(text: str) -> None:
    try:
        check_length(text)
    except FedtuneError:
        return
    assert digest_of(text) != digest_of(text + " ")
    assert digest_of(text) == digest_of(str(text.encode(), "utf-8"))
