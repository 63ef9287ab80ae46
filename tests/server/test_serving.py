"""Who is heard, and what a node or a server that lies achieves: real rounds with real nodes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedtune.client.policy import OwnerPolicy
from fedtune.errors import ExitCode, FedtuneError
from fedtune.keys.node import new_identity
from fedtune.keys.roster import revoke
from fedtune.server.checkpoint import State
from fedtune.wire import Hello, Signed, Update
from tests.client.node_kit import (
    BARE,
    CLIENTS,
    EXAMPLE,
    NAMES,
    Ward,
    experiment,
    task_identity,
    tuned,
    ward,
    words_of,
)
from tests.server.owners_kit import Federation, federation, remade, replaced, separate_processes

BARE_RUN = experiment(privacy__example=None, federation__rounds=1, federation__server={"nodes": 3})
SECURE_RUN = experiment(
    privacy__example=None, federation__rounds=1, federation__secure={"clip_norm": 5.0},
    federation__server={"nodes": 3}, federation__retries=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Ward:
    return ward(tmp_path_factory.mktemp("ward"))


@pytest.fixture
def here(first: Ward, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ward]:
    folder = tmp_path / "here"
    shutil.copytree(first.folder, folder)
    separate_processes(monkeypatch)
    with task_identity():
        yield Ward(folder, dict(first.identities), dict.fromkeys(NAMES, BARE))


def outcomes(made: Federation) -> dict[str, str]:
    return {row["client"]: row["outcome"] for row in made.folder.client_rows()}


# Who takes part


def test_only_who_is_enrolled_and_there_is_asked(here: Ward) -> None:
    """A stranger, whose key is in no roster, and a revoked node are not even sent the terms."""
    here.identities["dan"] = new_identity("dan")
    shutil.copy(here.folder / "bob.jsonl", here.folder / "dan.jsonl")
    revoke(here.keys, "cy")
    config = experiment(
        privacy__example=None, federation__rounds=1, federation__server={"nodes": 2}
    )
    made = federation(here, config, names=("ann", "bob", "cy", "dan"))
    made.run()
    assert outcomes(made) == {"ann": "ok", "bob": "ok"}
    assert {name for _, name, _ in made.wire.log} == {"ann", "bob"}


def test_a_node_that_is_revoked_is_not_asked_again(here: Ward) -> None:
    made = federation(here, experiment(
        privacy__example=None, federation__rounds=3, federation__server={"nodes": 3},
    ))  # fmt: skip

    def cut_off(kind: str, name: str, record: Any) -> Any:
        if kind == "train" and record.round == 2 and name == "ann":
            revoke(here.keys, "bob")
        return record

    made.wire.asking = cut_off
    state = made.run()
    assert state.round == 3
    rows = [(row["round"], row["client"]) for row in made.folder.client_rows()]
    assert (3, "bob") not in rows
    assert {client for number, client in rows if number == 3} == {"ann", "cy"}
    assert made.wire.node_of("bob") not in _nodes(made)


def _nodes(made: Federation) -> list[int]:
    """Return who takes part now, with a quorum that two keep."""
    served = made.served()
    served._begun = True
    return served.nodes()


def test_a_node_is_heard_under_its_own_name_only(here: Ward) -> None:
    made = federation(here, BARE_RUN)
    served = made.served()
    assert served.nodes() == [10, 11, 12]
    made.wire.answering = lambda kind, name, reply: (
        remade(reply, Hello, lambda one: replace(one, client="ann"))
        if (kind, name) == ("query.hello", "bob") else reply
    )  # fmt: skip
    made.run(served)
    assert outcomes(made) == {"ann": "ok", "cy": "ok"}
    assert any("'bob' calls itself 'ann'" in r for r in made.reasons("node 11"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"client": "ann"}, "calls itself 'ann'"), ({"digest": "0" * 64}, "agreed to other terms"),
     ({"client": "\x1b[2J"}, "calls itself '?[2J'"), ({"digest": None}, "wrong fields")],
)  # fmt: skip
def test_a_node_that_agrees_badly_does_not_take_part(
    here: Ward, changes: dict[str, Any], said: str
) -> None:
    made = federation(here, BARE_RUN)
    made.wire.answering = lambda kind, name, reply: (
        replaced(reply, **changes) if (kind, name) == ("query.terms", "bob") else reply
    )
    served = made.served()
    served.sleep = lambda _seconds: made.pass_time(5000)
    with pytest.raises(FedtuneError, match="2 of 3 nodes take part") as caught:
        made.run(served)
    assert caught.value.code == ExitCode.QUORUM
    assert any(said in reason for reason in made.reasons("bob"))
    assert {kind for kind, name, _ in made.wire.log if name == "bob"} == {"query.terms"}


def test_an_owner_who_changes_the_policy_is_asked_again(here: Ward) -> None:
    """And until then of half a minute only once, and the reason is said once."""
    here.policies["cy"] = OwnerPolicy()
    made = federation(here, BARE_RUN)
    served = made.served()

    def change(seconds: float) -> None:
        made.clock += seconds
        if made.clock > 100:
            here.nodes["cy"].policy = BARE

    served.sleep = change
    assert served.nodes() == [10, 11, 12]
    asked = [name for kind, name, _ in made.wire.log if kind == "query.terms"]
    assert (asked.count("ann"), asked.count("bob")) == (1, 1)
    assert 4 <= asked.count("cy") <= 6
    assert len(made.reasons("cy")) == 1
    assert "no privacy is promised" in made.reasons("cy")[0]


def test_a_key_in_another_form_is_no_node(here: Ward) -> None:
    made = federation(here, BARE_RUN)
    served = made.served()
    real = served.online
    served.online = lambda: {node: key.swapcase() for node, key in real().items()}
    served._begun, served.sleep = True, lambda _seconds: made.pass_time(50_000)
    with pytest.raises(FedtuneError, match="0 of 2 nodes"):
        served.nodes()
    assert made.wire.log == []


# What a node may send


def spoilt(change: Any) -> Any:
    name = min(tuned(BARE_RUN).start().adapter)

    def made(update: Update) -> Update:
        value = update.tensors[name].copy()
        return replace(update, tensors=update.tensors | {name: change(value)})

    return lambda reply: remade(reply, Update, made)


def _set(value: np.ndarray[Any, Any], number: float) -> np.ndarray[Any, Any]:
    value.flat[0] = number
    return value


def _raw(reply: Message, blob: bytes, **more: Any) -> Message:
    """Replace a reply's tensors by any bytes."""
    found = replaced(reply, tensors=None)
    array = Array("uint8", (len(blob),), "safetensors", blob)
    tensors = ArrayRecord({"blob": array})
    content = RecordDict({"fields": found.content["fields"], "tensors": tensors, **more})
    found.content.clear()
    found.content.update(content)
    return found


def _emptied(reply: Message) -> Message:
    found = replaced(reply)
    found.content.clear()
    return found


BAD: dict[str, Any] = {
    "nan": spoilt(lambda v: _set(v, np.nan)),
    "infinite": spoilt(lambda v: _set(v, np.inf)),
    "shape": spoilt(lambda v: v[:1]),
    "larger": spoilt(lambda v: np.zeros((4000, 500), v.dtype)),
    "whole numbers": spoilt(lambda v: v.astype(np.int32)),
    "double": spoilt(lambda v: v.astype(np.float64)),
    "another round": lambda reply: replaced(reply, round=2),
    "another attempt": lambda reply: replaced(reply, attempt=5),
    "no loss": lambda reply: replaced(reply, loss=float("nan")),
    "negative weight": lambda reply: replaced(reply, examples=-5),
    "a field too many": lambda reply: replaced(reply, extra=1),
    "a field too few": lambda reply: replaced(reply, steps=None),
    "a field of another type": lambda reply: replaced(reply, steps="13"),
    "no tensors": lambda reply: _raw(reply, b""),
    "half a header": lambda reply: _raw(reply, b"\xff\xff\xff\xff\xff\xff\xff\x7f{}"),
    "no json": lambda reply: _raw(reply, b"\x08\0\0\0\0\0\0\0notjson!"),
    "a record too many": lambda reply: _raw(reply, b"", more=ConfigRecord({"x": 1})),
    "nothing": _emptied,
}  # fmt: skip


def test_bad_updates_are_dropped_and_the_others_are_the_mean(here: Ward) -> None:
    """Every kind in a run of its own round; ann and cy alone make the model, each time."""
    config = experiment(
        privacy__example=None, federation__rounds=len(BAD), evaluation__every=99,
        federation__server={"nodes": 3}, federation__quorum=0.6,
    )  # fmt: skip
    made = federation(here, config)
    cases = list(BAD.values())
    made.wire.answering = lambda kind, name, reply: (
        cases[reply.content["fields"]["round"] - 1](reply)
        if (kind, name) == ("train", "bob") else reply
    )  # fmt: skip
    state = made.run()
    rows = [row for row in made.folder.client_rows() if row["client"] == "bob"]
    ends = dict(zip(BAD, (row["outcome"] for row in rows), strict=True))
    assert {case for case, end in ends.items() if end == "ok"} == set()
    assert all(row["reason"] and len(row["reason"]) <= 500 for row in rows)
    good = [row["outcome"] for row in made.folder.client_rows() if row["client"] != "bob"]
    assert good == ["ok"] * 2 * len(BAD)
    assert all(np.isfinite(value).all() for value in state.adapter.values())


# Secure sums, when a member or the server lies

MEMBERS: dict[str, tuple[str, Any]] = {
    "figures": ("train", lambda r: replaced(r, loss=0.5)),
    "its weight": ("train", lambda r: replaced(r, examples=12)),
    "too long": ("train", lambda r: _values(r, lambda v: np.append(v, v[:1]))),
    "floats": ("train", lambda r: _values(r, lambda v: v.astype("f4"))),
    "another signature": ("train", lambda r: remade(r, Update, lambda u: replace(
        u, tensors=u.tensors | {"signature": u.tensors["signature"] ^ 1}))),
    "another attempt": ("train", lambda r: replaced(r, attempt=9)),
    "a stranger's advert": ("query.advert", lambda r: replaced(r, attempt=9)),
    "no shares": ("query.deal", lambda r: replaced(r, round=7)),
}  # fmt: skip


def _values(reply: Message, change: Any) -> Message:
    def made(update: Update) -> Update:
        values = change(update.tensors["values"])
        return replace(update, tensors=update.tensors | {"values": values})

    return remade(reply, Update, made)


_PLAIN: list[State] = []


def without_bob(here: Ward) -> State:
    """Return what a plain round of ann and cy gives; text and seed are those of every test."""
    if not _PLAIN:
        plain = federation(here, BARE_RUN)
        plain.wire.asking = lambda asked, name, record: (
            None if (asked, name) == ("train", "bob") else record
        )
        _PLAIN.append(plain.run())
    return _PLAIN[0]


@pytest.mark.parametrize("case", MEMBERS)
def test_a_member_that_lies_is_out(here: Ward, case: str) -> None:
    """And the sum is that of the others, where they are enough; else there is none."""
    kind, change = MEMBERS[case]
    made = federation(here, SECURE_RUN)
    made.wire.answering = lambda asked, name, reply: (
        change(reply) if (asked, name) == (kind, "bob") else reply
    )
    if kind == "query.advert":  # a cohort of two is below the floor of three
        with pytest.raises(FedtuneError, match="bob: answers round") as caught:
            made.run()
        assert caught.value.code == ExitCode.QUORUM
        return
    state = made.run()
    assert outcomes(made) == {"ann": "ok", "bob": "dropped", "cy": "ok"}
    expected = without_bob(here)
    for name, value in expected.adapter.items():
        np.testing.assert_allclose(state.adapter[name], value, atol=2e-4)


def unchanged(state: State) -> None:
    """Check that a round is over without a sum: a second one of the same updates is refused."""
    assert state.round == 1
    for name, value in tuned(SECURE_RUN).start().adapter.items():
        assert np.array_equal(state.adapter[name], value)


def _refusals(made: Federation, kind: str) -> dict[str, str]:
    return {name: words_of(r) for asked, name, r in made.wire.log if asked == kind and r}


def test_members_who_are_shown_different_models_say_no(here: Ward) -> None:
    """A model made for one member would mark its update in the sum."""
    made = federation(here, SECURE_RUN)

    def other(kind: str, name: str, record: Any) -> Any:
        if (kind, name) != ("train", "ann"):
            return record
        weight = min(tuned(SECURE_RUN).start().adapter)
        return replace(record, tensors=record.tensors | {weight: record.tensors[weight] + 1e-6})

    made.wire.asking = other
    made.run()
    said = _refusals(made, "train")
    assert "not those that the cohort was told of" in said["ann"]
    assert (said["bob"], said["cy"]) == ("", "")
    assert outcomes(made)["ann"] == "failed"
    assert [line for line in here.sent("ann") if "masked update" in line["what"]] == []


def test_v36_two_survivor_sets_for_one_round_reveal_nothing(here: Ward) -> None:
    """ann is told of all three, the others of themselves alone: no set has its quorum."""
    made = federation(here, SECURE_RUN)
    kept: dict[str, Signed] = {}

    def split(kind: str, name: str, record: Any) -> Any:
        if kind != "query.sign":
            return record
        kept["whole"] = record
        if name == "ann":
            return record
        present = record.tensors["survivors"].copy()
        present[0] = 0
        tensors = record.tensors | {"survivors": present,
                                    "signature": record.tensors["signature"][1:]}  # fmt: skip
        return replace(record, tensors=tensors)

    made.wire.asking = split
    unchanged(made.run())
    shares = [r for kind, _, r in made.wire.log if kind == "query.reveal" and not r.has_error()]
    assert shares == []
    assert not (made.folder.path / "sum.safetensors").exists()


def test_v36_what_opens_a_sum_is_given_once_and_to_a_quorum_only(here: Ward) -> None:
    """One signature fewer: nothing. Twice: once. And never for a round that is over."""
    made = federation(here, SECURE_RUN)
    kept: dict[str, Any] = {}

    def fewer(kind: str, name: str, record: Any) -> Any:
        if kind == "query.reveal":
            kept["reveal"] = record
            one = record.tensors["signers"].copy()
            one[1:] = 0
            tensors = {"signers": one, "signature": record.tensors["signature"][:1]}
            return replace(record, tensors=tensors)
        if kind == "query.advert":
            kept["advert"] = replace(record, attempt=record.attempt + 5)
        if kind in {"query.sign", "train"}:
            kept[kind] = record
        return record

    made.wire.asking = fewer
    unchanged(made.run())
    said = _refusals(made, "query.reveal")
    assert all("1 signed, of whom 2 survivors are needed" in words for words in said.values())
    # The right signatures come too late: who refused has forgotten everything.
    for name in NAMES:
        for kind, record in (("query.reveal", kept["reveal"]), ("query.sign", kept["query.sign"]),
                             ("train", kept["train"])):  # fmt: skip
            assert here.send(kind, record, name).has_error()
    # The update was under masks once, and is in no second sum: also after a restart.
    for name in NAMES:
        here.restart(name)
        assert "left under masks once" in words_of(here.send("query.advert", kept["advert"], name))


def test_replayed_answers_of_another_attempt_are_dropped(here: Ward) -> None:
    """bob's masked update of round 1 comes again in round 2, under the number of round 2."""
    config = experiment(
        privacy__example=None, federation__rounds=2, federation__secure={"clip_norm": 5.0},
        federation__server={"nodes": 3},
    )  # fmt: skip
    made = federation(here, config)
    kept: dict[int, Update] = {}

    def replay(kind: str, name: str, reply: Message) -> Message:
        if (kind, name) != ("train", "bob"):
            return reply

        def old(update: Update) -> Update:
            kept[update.round] = update
            return replace(kept[1], round=update.round, attempt=update.attempt)

        return remade(reply, Update, old)

    made.wire.answering = replay
    made.run()
    ends = {(row["round"], row["client"]): row for row in made.folder.client_rows()}
    assert ends[1, "bob"]["outcome"] == "ok"
    assert ends[2, "bob"]["outcome"] == "dropped"
    assert ends[2, "ann"]["outcome"] == ends[2, "cy"]["outcome"] == "ok"


def test_a_member_that_leaves_after_its_update_is_in_the_sum(here: Ward) -> None:
    made = federation(here, SECURE_RUN)
    made.wire.asking = lambda kind, name, record: (
        None if (kind, name) == ("query.reveal", "bob") else record
    )
    state = made.run()
    assert outcomes(made) == dict.fromkeys(NAMES, "ok")
    assert state.round == 1
    sent = [line["what"] for line in here.sent("ann")]
    assert "round 1: a masked update, 2 tensors of 40,768 numbers" in sent


# Both ends count


@pytest.mark.parametrize("promise", ["example", "client"])
def test_the_servers_books_hold_what_the_nodes_hold_or_more(here: Ward, promise: str) -> None:
    """bob's answer is lost after it was charged, cy is never reached, and there are retries."""
    policy = OwnerPolicy(max_epsilon=50, max_epsilon_per_run=50)
    here.policies = dict.fromkeys(NAMES, policy)
    tables: dict[str, Any] = {"privacy__example": EXAMPLE} if promise == "example" else {
        "privacy__example": None, "privacy__client": CLIENTS,
        "federation__secure": {"threshold": 1.0},
    }  # fmt: skip
    config = experiment(
        **tables, federation__rounds=2, federation__retries=2, federation__quorum=0.9,
        federation__server={"nodes": 3},
    )  # fmt: skip
    made = federation(here, config)
    if promise == "example":
        made.wire.asking = lambda kind, name, record: (
            None if (kind, name) == ("train", "cy") and not record.attempt else record
        )
    made.wire.answering = lambda kind, name, reply: (
        None if (kind, name) == ("train", "bob")
        and reply.content["fields"]["attempt"] == (1 if promise == "example" else 99) else reply
    )  # fmt: skip
    made.run()
    job = made.folder.job()
    from fedtune.privacy.ledger import open_ledger

    if promise == "example":
        books = made.books()
        assert books is not None
        server = books.ledger
    else:
        server = open_ledger(here.folder / "server.db")
    held = {one.dataset: sum(server.groups(one, job).values()) for one in server.accounts()}
    for name in NAMES:
        ledger = here.node(name).ledger
        (account,) = ledger.accounts()
        mine = sum(ledger.groups(account, job).values())
        asked = sum(kind == "train" and who == name for kind, who, _ in made.wire.log)
        assert mine == asked > 0
        of_it = held[f"wards/{name}"] if promise == "example" else held["wards"]
        assert of_it >= mine
    if promise == "example":
        assert held["wards/cy"] > sum(
            sum(here.node("cy").ledger.groups(one, job).values())
            for one in here.node("cy").ledger.accounts()
        )
