"""Who is a member: nodes that say who they are, each under one name, with the server's model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from fedtune.config import Config
from fedtune.errors import ExitCode, FedtuneError
from fedtune.server.asking import Epochs, Member
from fedtune.server.events import ClientDone, Event
from fedtune.server.link import Answer
from fedtune.server.members import Roll, cohort_of, gather
from fedtune.wire import BUDGET, Hello, Task
from tests.client.node_kit import experiment, tuned

HERE = tuned(experiment())
PRINT = HERE.fingerprint
BEGUN = Task(0, 0, 0, 0.0, {}, "job")


@dataclass
class Words:
    """Nodes that say what they are told to; only the network and the nodes are replaced."""

    said: dict[int, Hello | str]
    asked: list[int]

    def nodes(self) -> list[int]:
        return sorted(self.said)

    def ask(
        self, _reply: Any, nodes: Any, _task: Any, _seconds: float
    ) -> tuple[int, Iterator[Answer[Any]]]:
        answers = []
        for node in nodes:
            self.asked.append(node)
            found = self.said[node]
            known = isinstance(found, Hello)
            answers.append(Answer(node, found if known else None, "" if known else str(found), 10))
        return 1, iter(reversed(answers))

    def ask_each(self, *_given: Any) -> Any:
        raise AssertionError("nobody is asked one by one here")


def hello(name: str, fingerprint: str = PRINT) -> Hello:
    return Hello(name, 3, fingerprint)


def gathered(said: dict[int, Hello | str]) -> tuple[tuple[Member, ...], dict[str, str]]:
    events: list[Event] = []
    members = gather(Words(said, []), HERE, events.append, BEGUN)
    reasons = {e.client: e.reason for e in events if isinstance(e, ClientDone)}
    return members, reasons


BAD: dict[str, tuple[Hello | str, str, str]] = {
    "another model": (hello("eve", "0" * 64), "eve", "another base model"),
    "a name that is taken": (hello("ann"), "ann", "takes a name that is taken"),
    "no name": (hello(""), "node 9", "cannot be shown"),
    "a name that moves the cursor": (hello("a\x1b[2J"), "node 9", "cannot be shown"),
    "a name without an end": (hello("a" * 501), "node 9", "cannot be shown"),
    "two lines": (hello("a\nb"), "node 9", "cannot be shown"),
    "a failure": ("no power", "node 9", "no power"),
}


@pytest.mark.parametrize("case", BAD)
def test_who_is_no_member_is_named_and_left_out(case: str) -> None:
    said, client, reason = BAD[case]
    members, reasons = gathered({5: hello("cy"), 3: hello("ann"), 9: said})
    assert [(one.client, one.node) for one in members] == [("ann", 3), ("cy", 5)]
    assert reason in reasons[client]
    assert all(letter.isprintable() for letter in reasons[client])


def test_of_two_with_one_name_the_first_node_stays_whoever_answers_first() -> None:
    for _ in range(3):
        members, _ = gathered({4: hello("ann"), 8: hello("ann"), 6: hello("ann")})
        assert [(one.client, one.node) for one in members] == [("ann", 4)]


def test_without_members_there_is_no_run() -> None:
    with pytest.raises(FedtuneError, match="no power") as caught:
        gathered({1: "no power", 2: f"{BUDGET}: no"})
    assert caught.value.code == ExitCode.QUORUM
    with pytest.raises(FedtuneError, match="no client's budget") as caught:
        gathered({1: f"{BUDGET}: no", 2: f"{BUDGET}: nor here"})
    assert caught.value.code == ExitCode.BUDGET_EXHAUSTED
    with pytest.raises(FedtuneError, match="no node answered"):
        gathered({})


def test_who_comes_later_is_welcome_and_who_went_is_not_asked() -> None:
    events: list[Event] = []
    members, _ = gathered({1: hello("ann"), 2: hello("bob")})
    roll, epochs = Roll.of(members), Epochs.at(members, None)
    words = Words({2: hello("bob"), 3: hello("cy"), 4: hello("ann", "0" * 64)}, [])
    here = roll.present(words, HERE, events.append, BEGUN, epochs)
    assert [one.client for one in here] == ["bob", "cy"]
    assert words.asked == [3, 4]
    assert epochs.known["cy"] == 0
    # Back again, it is asked nothing: the server knows it.
    words = Words({1: hello("ann"), 2: hello("bob"), 3: hello("cy")}, [])
    here = roll.present(words, HERE, events.append, BEGUN, epochs)
    assert [one.client for one in here] == ["ann", "bob", "cy"]
    assert words.asked == []


@pytest.mark.parametrize(("share", "size"), [(1.0, 10), (0.5, 5), (0.01, 1), (3.0, 3), (99.0, 10)])
def test_a_cohort_is_drawn_without_replacement_by_the_seed(share: float, size: int) -> None:
    members = tuple(Member(f"c{n}", n, 3) for n in range(10))
    table = {"federation": {"cohort": share, "rounds": 3}, "seed": 5}
    config = Config.model_validate(table)
    drawn = [[one.node for one in cohort_of(members, config, n, 0)] for n in range(30)]
    assert all(len(set(one)) == size for one in drawn)
    assert drawn == [[one.node for one in cohort_of(members, config, n, 0)] for n in range(30)]
    if size < 10:
        assert len({tuple(one) for one in drawn}) > 5
