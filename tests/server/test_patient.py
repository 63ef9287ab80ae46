"""Answers whose upload is cut off or never comes, over a real SuperLink."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.superlink.grid import HttpGrid

from fedtune.client import fleet
from fedtune.client.fleet_door import Door
from fedtune.client.fleet_line import Line, Signer
from fedtune.client.fleet_objects import Parcel
from fedtune.server.link import GridLink
from fedtune.server.patient import Patient
from fedtune.simulations.benchmarks.node_server import superlink
from fedtune.wire import Accepted, Terms, to_record
from tests.client.fleet_kit import echo, joined, new_key, serverapp

Setting = tuple[HttpGrid, Door, Door, list[int]]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    with superlink(tmp_path_factory.mktemp("link")) as link:
        keys = [new_key(), new_key()]
        nodes = link.enrol([key.public_key() for key in keys])
        doors = [Door(link.fleet, link.root, key) for key in keys]
        with serverapp(link) as grid:
            yield grid, doors[0], doors[1], nodes


def accepts(message: Message) -> Message:
    return Message(to_record(Accepted("ward", "digest")), reply_to=message)


def never_sent(line: Line, parcel: Parcel, **_: object) -> int:
    """Announce an answer, and send nothing of it."""
    parcel.request.node.node_id = line.node
    line.push(parcel.request)
    return 0


def test_an_answer_that_never_comes_holds_nobody_up(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, bad, good, nodes = setting
    link = GridLink(Patient(grid))
    mine, theirs = Signer(bad.login).public, fleet.send
    monkeypatch.setattr(
        fleet, "send",
        lambda line, *given, **more: (never_sent if line.signer.public == mine else theirs)(
            line, *given, **more
        ),
    )  # fmt: skip
    with joined(bad, accepts), joined(good, accepts):
        begun = time.monotonic()
        _, answers = link.ask(Accepted, nodes, Terms("job", "", "", {}), 10.0)
        first = next(answers)
        assert time.monotonic() - begun < 10
        assert (first.node, first.problem) == (nodes[1], "")
        assert not list(answers)
        assert 10 <= time.monotonic() - begun < 20


def test_an_upload_that_is_cut_goes_on_over_the_next_line(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ServerApp has claimed the answer by then: Flower would not take it a second time."""
    grid, door, _, nodes = setting
    real: Callable[..., Any] = Line.push_object_soon
    claimed: list[str] = []

    def cut(line: Line, *given: Any) -> Any:
        if not claimed:
            deadline = time.monotonic() + 20
            while not patient._coming:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            claimed.extend(patient._coming)
            raise grpc.RpcError
        return real(line, *given)

    monkeypatch.setattr(Line, "push_object_soon", cut)
    patient = Patient(grid)
    content = RecordDict({"fields": ConfigRecord({"round": 1})})
    with joined(replace(door, poll=0.05), echo) as owner:
        (name,) = grid.push_messages([Message(content, nodes[0], "train", ttl=60, group_id="1")])
        deadline, found = time.monotonic() + 40, list[Message]()
        while not found:
            assert time.monotonic() < deadline, owner.kinds()
            found = list(patient.pull_messages([name]))
            time.sleep(0.02)
    assert claimed == [name]
    assert found[0].content["fields"] == content["fields"]
    assert "lost" in owner.kinds()


def test_what_is_begun_of_others_is_given_up(setting: Setting) -> None:
    grid, door, _, nodes = setting
    patient = Patient(grid)
    content = RecordDict({"fields": ConfigRecord({"round": 2})})
    with pytest.MonkeyPatch.context() as patch, joined(door, echo):
        patch.setattr(fleet, "send", never_sent)
        (name,) = grid.push_messages([Message(content, nodes[0], "train", ttl=60, group_id="1")])
        deadline = time.monotonic() + 20
        while not patient._coming:
            assert time.monotonic() < deadline
            assert not list(patient.pull_messages([name]))
            time.sleep(0.02)
    assert not list(patient.pull_messages([]))
    assert not patient._coming
