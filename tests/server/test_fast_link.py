from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.superlink.grid import HttpGrid

from fedtune.client.fleet import Door
from fedtune.client.fleet_line import Line, Signer, open_line
from fedtune.server.fast_link import _Bells
from fedtune.simulations.benchmarks.node_server import SuperLink, superlink
from tests.client.fleet_kit import ask, echo, joined, new_key, serverapp

Setting = tuple[SuperLink, HttpGrid, Door, int]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    with superlink(tmp_path_factory.mktemp("link"), quick=True) as link:
        key = new_key()
        (node,) = link.enrol([key.public_key()])
        with serverapp(link) as grid:
            yield link, grid, Door(link.fleet, link.root, key), node


def words(number: int) -> RecordDict:
    return RecordDict({"fields": ConfigRecord({"round": number})})


@pytest.fixture
def line(setting: Setting) -> Iterator[Line]:
    door = setting[2]
    line = open_line(door, Signer(door.login))
    line.activate()
    yield line
    line.deactivate()
    line.close()


def test_a_node_that_asks_seldom_is_answered_at_once(setting: Setting) -> None:
    _, grid, door, node = setting
    with joined(door, echo, poll=15.0, most_poll=15.0):
        time.sleep(1)
        began = time.monotonic()
        assert ask(grid, node, words(1)).has_content()
        assert time.monotonic() - began < 5


def test_a_held_question_ends_when_the_node_stops(setting: Setting) -> None:
    _, _, door, _ = setting
    with joined(door, echo) as owner:
        time.sleep(1)
        began = time.monotonic()
        owner.stop.set()
        owner.join(5)
        assert time.monotonic() - began < 3


def test_a_question_is_held_for_a_while_and_says_so(setting: Setting, line: Line) -> None:
    began = time.monotonic()
    response = line.pull(threading.Event())
    assert response is not None
    assert response.HasField("reconnect")
    assert not response.messages_list
    assert 7 < time.monotonic() - began < 12


def test_what_was_not_confirmed_is_given_again(setting: Setting, line: Line) -> None:
    """The node's process died with the message in its hands; its successor gets it."""
    _, grid, _, node = setting
    (name,) = grid.push_messages([Message(words(2), node, "train", ttl=60)])
    first = line.pull(threading.Event())
    second = line.pull(threading.Event())
    assert first is not None
    assert second is not None
    assert first.messages_list[0].metadata.message_id == name
    assert first == second
    line.confirm(first.messages_list[0].metadata.run_id, name)
    third = line.pull(threading.Event())
    assert third is not None
    assert not third.messages_list


def test_a_message_goes_to_the_newest_question(setting: Setting, line: Line) -> None:
    """The older one may be of a process that is gone: it must not swallow the message."""
    _, grid, door, node = setting
    older = open_line(door, Signer(door.login))
    older.node = line.node
    heard: list[object] = []
    thread = threading.Thread(target=lambda: heard.append(older.pull(threading.Event())))
    thread.start()
    time.sleep(0.5)
    newest: list[object] = []
    other = threading.Thread(target=lambda: newest.append(line.pull(threading.Event())))
    other.start()
    thread.join(3)
    assert not thread.is_alive()
    assert not heard[0].messages_list  # type: ignore[attr-defined]
    (name,) = grid.push_messages([Message(words(3), node, "train", ttl=60)])
    other.join(3)
    assert newest[0].messages_list[0].metadata.message_id == name  # type: ignore[attr-defined]
    older.close()


def test_no_more_questions_are_held_than_there_are_threads_for() -> None:
    bells = _Bells(most=1)
    with bells.waiting(1) as first, bells.waiting(2) as second:
        assert first is not None
        assert second is None
        with bells.waiting(1) as newer:
            assert newer is not None
            assert first.is_set()
    with bells.waiting(2) as second:
        assert second is not None
