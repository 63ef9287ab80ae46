"""What leaves a node and what does not; and that no server's code comes in."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

import fedtune
from fedtune.config import Config
from fedtune.errors import ExitCode, FedtuneError
from fedtune.terms import propose
from fedtune.wire import Task, Update, to_record
from tests.client.node_kit import (
    BARE,
    BY_SERVER,
    EXAMPLE,
    PLAIN,
    SECRET,
    Ward,
    changed,
    experiment,
    read,
    task,
    told,
    tuned,
    words_of,
)

pytestmark = pytest.mark.usefixtures("identity")


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
