"""The log of what left says what it was, one line for each message."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from fedtune.client.sent import SentLog, words_of
from fedtune.errors import ExitCode, FedtuneError
from fedtune.wire import WITHHELD, Record, Update, to_record
from tests.client.node_kit import task_identity


@pytest.fixture(autouse=True, scope="module")
def _identity() -> Iterator[None]:
    with task_identity():
        yield


def reply(value: Record | RecordDict | Error, kind: str = "train") -> Message:
    asked = Message(RecordDict(), 7, kind, ttl=100.0)
    asked.metadata.__dict__["_message_id"] = "ab" * 32
    if isinstance(value, Error):
        return Message(value, reply_to=asked)
    content = value if isinstance(value, RecordDict) else to_record(value)
    return Message(content, reply_to=asked)


def update(loss: float = 2.5, **tensors: Any) -> Update:
    given = tensors or {"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float32)}
    return Update(3, 0, 100, 13, 0, loss, given)


WORDS = {
    "bare": (update(), "round 3: an update, 2 tensors of 10 numbers; loss 2.5, 100 examples, "
                       "13 steps"),
    "private": (update(WITHHELD), "round 3: an update, 2 tensors of 10 numbers"),
    "masked": (
        update(WITHHELD, values=np.zeros(1200, np.uint32), signature=np.zeros(64, np.uint8)),
        "round 3: a masked update, 2 tensors of 1,264 numbers",
    ),
    "one": (update(WITHHELD, a=np.zeros(1, np.float32)), "round 3: an update, 1 tensor of 1 "
                                                         "numbers"),
    "error": (Error(2, "no power"), "a refusal: no power"),
    "other": (RecordDict({"fields": ConfigRecord({"x": 1})}), "an answer"),
}  # fmt: skip


@pytest.mark.parametrize("case", WORDS)
def test_what_left_is_said_in_words(case: str) -> None:
    value, words = WORDS[case]
    assert words_of("train", reply(value)) == words


def test_lines_are_added_durable_and_the_owners_alone(tmp_path: Path) -> None:
    log = SentLog(tmp_path / "sent.jsonl")
    old = os.umask(0)
    try:
        for number in range(3):
            log.write("train", reply(update()), 10 + number, "job")
            assert len((tmp_path / "sent.jsonl").read_text().splitlines()) == number + 1
    finally:
        os.umask(old)
    assert (tmp_path / "sent.jsonl").stat().st_mode & 0o777 == 0o600
    assert [line["bytes"] for line in log.read()] == [10, 11, 12]
    with (tmp_path / "sent.jsonl").open("a") as file:
        file.write('{"half": ')  # the power went
    assert len(list(log.read())) == 3


def test_no_word_of_a_server_makes_a_second_line(tmp_path: Path) -> None:
    log = SentLog(tmp_path / "sent.jsonl")
    log.write("query.\n{}", reply(Error(2, "x\n{}\r\n\x1b[2J\u2028"), "query.x"), 1, "a\nb")
    text = (tmp_path / "sent.jsonl").read_text()
    assert text.count("\n") == 1
    assert "\x1b" not in text
    assert json.loads(text)["job"] == "a\nb"


def test_a_disk_that_refuses_is_an_error(tmp_path: Path) -> None:
    log = SentLog(tmp_path / "no-folder" / "sent.jsonl")
    with pytest.raises(FedtuneError) as caught:
        log.write("train", reply(update()), 1, "job")
    assert caught.value.code == ExitCode.STORAGE
    assert list(log.read()) == []
