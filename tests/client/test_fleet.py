from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.superlink.grid import HttpGrid

from fedtune.client.fleet import Door, serve_messages
from fedtune.errors import ExitCode, FedtuneError
from fedtune.simulations.benchmarks.node_server import SuperLink, superlink
from tests.client.fleet_kit import ask, echo, joined, new_key, serverapp, start

Setting = tuple[SuperLink, HttpGrid, Door, int]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    """One SuperLink with TLS, node keys and a database; one enrolled node; one run."""
    with superlink(tmp_path_factory.mktemp("link")) as link:
        key = new_key()
        (node,) = link.enrol([key.public_key()])
        with serverapp(link) as grid:
            yield link, grid, Door(link.fleet, link.root, key), node


def words(**fields: object) -> RecordDict:
    return RecordDict({"fields": ConfigRecord(fields)})  # type: ignore[arg-type]


def test_a_message_comes_back_as_it_was_sent(setting: Setting) -> None:
    _, grid, door, node = setting
    blob = np.random.default_rng(0).bytes(12_000_000)
    content = RecordDict(
        {
            "fields": ConfigRecord({"round": 3, "job": "a job", "key": b"\0\1"}),
            "tensors": ArrayRecord({"blob": Array("uint8", (len(blob),), "safetensors", blob)}),
        }
    )
    with joined(door, echo) as owner:
        small = ask(grid, node, words(round=1))
        large = ask(grid, node, content)
        assert owner.kinds() == ["connected", "asked", "answered", "asked", "answered"]
        assert owner.events[3].bytes > len(blob)
        assert owner.events[4].bytes > len(blob) or owner.events[4].bytes > 0
    assert small.content["fields"] == ConfigRecord({"round": 1})
    assert large.content["fields"] == content["fields"]
    assert large.content.array_records["tensors"]["blob"].data == blob
    assert large.metadata.src_node_id == node


def test_what_fails_is_said_without_quoting_data(setting: Setting) -> None:
    _, grid, door, node = setting
    failures = iter(
        [FedtuneError("budget of 'notes' is spent"), ValueError("patient 17 has"), SystemExit(3)]
    )

    def answer(message: Message) -> Message:
        raise next(failures)

    with joined(door, answer):
        reasons = [ask(grid, node, words(round=n)).error.reason for n in range(3)]
    assert reasons == ["budget of 'notes' is spent", "ValueError", "SystemExit"]


def test_an_answer_to_something_else_is_an_error(setting: Setting) -> None:
    _, grid, door, node = setting
    with joined(door, lambda message: message):
        assert "not one to this message" in str(ask(grid, node, words(round=1)).error.reason)


@pytest.mark.parametrize("size", [70_000, 9_000_000])
def test_too_large_a_message_is_refused_and_the_node_stays(setting: Setting, size: int) -> None:
    _, grid, door, node = setting
    array = Array("uint8", (size,), "x", np.random.default_rng(size).bytes(size))
    with joined(door, echo, most_bytes=50_000) as owner:
        reply = ask(grid, node, RecordDict({"a": ArrayRecord({"x": array})}))
        assert "larger than 50,000 bytes" in str(reply.error.reason)
        assert ask(grid, node, words(round=1)).has_content()
        assert owner.wait_for("dropped").words == reply.error.reason


def test_too_large_an_answer_is_not_sent(setting: Setting) -> None:
    _, grid, door, node = setting
    array = Array("uint8", (60_000,), "x", b"1" * 60_000)

    def answer(message: Message) -> Message:
        return Message(RecordDict({"a": ArrayRecord({"x": array})}), reply_to=message)

    with joined(door, answer, most_bytes=50_000) as owner:
        assert "50,000 are allowed" in str(ask(grid, node, words(round=1)).error.reason)
        assert owner.wait_for("answered").bytes < 2_000


def test_an_object_larger_than_is_received_is_refused(setting: Setting) -> None:
    _, grid, door, node = setting
    with joined(door, echo):
        reply = ask(grid, node, words(blob=b"x" * 7_000_000))
        assert "larger than is received" in str(reply.error.reason)
        assert ask(grid, node, words(round=1)).has_content()


def test_heartbeats_go_on_while_an_answer_takes_long(setting: Setting) -> None:
    _, grid, door, node = setting

    def slow(message: Message) -> Message:
        time.sleep(3)
        return echo(message)

    with joined(door, slow):
        began = time.monotonic()
        assert ask(grid, node, words(round=1)).has_content()
        assert time.monotonic() - began < 5
        assert node in grid.get_node_ids()


def test_an_answer_that_comes_too_late_is_not_sent(setting: Setting) -> None:
    _, grid, door, node = setting
    release = threading.Event()

    def slow(message: Message) -> Message:
        release.wait(10)
        return echo(message)

    with joined(door, slow) as owner:
        grid.push_messages([Message(words(round=9), node, "train", ttl=1.0)])
        owner.wait_for("asked")
        time.sleep(1.1)
        release.set()
        assert "too late" in owner.wait_for("late").words
        assert "answered" not in owner.kinds()
        assert ask(grid, node, words(round=1)).has_content()


def test_stopping_waits_for_the_message_at_work(setting: Setting) -> None:
    _, grid, door, node = setting
    begun = threading.Event()

    def slow(message: Message) -> Message:
        begun.set()
        time.sleep(1)
        return echo(message)

    with joined(door, slow) as owner, ThreadPoolExecutor(1) as server:
        reply = server.submit(ask, grid, node, words(round=1))
        assert begun.wait(10)
        owner.stop.set()
        assert reply.result(20).has_content()
        owner.join()
    assert node not in grid.get_node_ids()


def test_stopping_with_little_grace_gives_the_message_up(setting: Setting) -> None:
    _, grid, door, node = setting
    begun, release = threading.Event(), threading.Event()

    def stuck(message: Message) -> Message:
        begun.set()
        release.wait(30)
        return echo(message)

    with joined(door, stuck, grace=0.3) as owner, ThreadPoolExecutor(1) as server:
        reply = server.submit(ask, grid, node, words(round=1))
        assert begun.wait(10)
        began = time.monotonic()
        owner.stop.set()
        assert "stopped before" in str(reply.result(20).error.reason)
        owner.join(5)
        assert time.monotonic() - began < 6
    release.set()


def test_a_node_outlives_a_killed_server(setting: Setting) -> None:
    link, grid, door, node = setting
    kept: list[int] = []

    def answer(message: Message) -> Message:
        kept.append(int(message.content.config_records["fields"]["round"]))  # type: ignore[arg-type]
        if kept[-1] == 2:
            link.kill()
            link.start()
        return echo(message)

    with joined(door, answer, most_wait=0.5) as owner:
        assert ask(grid, node, words(round=1)).has_content()
        # The server dies while the node works on round 2, and has the answer afterwards.
        assert ask(grid, node, words(round=2)).has_content()
        link.kill()
        owner.wait_for("lost")
        link.start()
        owner.wait_for("connected", owner.kinds().count("connected") + 1)
        assert ask(grid, node, words(round=3)).has_content()
    assert kept == [1, 2, 3]


def test_a_killed_node_comes_back_and_says_what_it_lost(setting: Setting, tmp_path: Path) -> None:
    """The memo of a process that died at work: its successor answers for it, at once."""
    _, grid, door, node = setting
    memo = tmp_path / "state" / "node.json"
    begun, release = threading.Event(), threading.Event()

    def stuck(message: Message) -> Message:
        begun.set()
        release.wait(30)
        return echo(message)

    with joined(door, stuck, grace=0.0, memo=memo) as owner:
        (name,) = grid.push_messages([Message(words(round=1), node, "train", ttl=30)])
        assert begun.wait(10)
        with pytest.raises(FedtuneError, match="another process on this machine"):
            serve_messages(
                Door(door.address, door.root, door.login, memo=memo),
                echo, owner.events.append, threading.Event(),
            )  # fmt: skip
        dead = memo.read_bytes()
    release.set()
    list(grid.pull_messages([name]))
    # The same again, but the process is dead before it could say anything.
    (name,) = grid.push_messages([Message(words(round=2), node, "train", ttl=30)])
    begun.clear()
    release.clear()
    with joined(door, stuck, memo=memo) as owner:
        assert begun.wait(10)
        dead = memo.read_bytes()
        copy = tmp_path / "copy.json"
        copy.write_bytes(dead)
        with joined(door, echo, memo=copy) as heir:
            assert heir.wait_for("answered").message == name
            (reply,) = grid.pull_messages([name])
            assert "died while it worked" in str(reply.error.reason)
            release.set()
            owner.wait_for("dropped")


def test_an_unknown_key_is_refused_in_words(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtune.client.fleet_seat._STRANGE_PATIENCE", 1.0)
    link, _, _, _ = setting
    node = start(Door(link.fleet, link.root, new_key()), echo)
    node.join(20)
    assert isinstance(node.error, FedtuneError)
    assert node.error.code is ExitCode.SIGNATURE
    assert "does not know this key" in str(node.error)
    assert "fedtune keys enrol" in node.error.hint
    assert node.kinds() == ["lost", "refused"]


def test_a_node_whose_key_is_enrolled_in_time_gets_in(setting: Setting) -> None:
    link, grid, _, _ = setting
    key = new_key()
    node = start(Door(link.fleet, link.root, key), echo)
    node.wait_for("lost")
    (number,) = link.enrol([key.public_key()])
    node.wait_for("connected")
    assert ask(grid, number, words(round=1)).has_content()
    node.stop.set()
    node.join()


def test_one_key_is_one_node(setting: Setting) -> None:
    _, _, door, _ = setting
    with joined(door, echo):
        second = start(door, echo)
        lost = second.wait_for("lost")
        assert "connected already" in lost.words
        second.stop.set()
        second.join()
