"""V29: ``kill -9`` anywhere; nothing that left is ever missing from the ledger.

A child process works through rounds as a real one does: reserve, release, and then
let the output leave (a line in a file, on the disk). It is killed before a chosen
statement of the database, between any two of its steps, or at a random time. What
the parent then finds is compared with what left.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from fedtune.errors import FedtuneError
from fedtune.privacy.ledger import Ledger, open_ledger
from tests.privacy.ledgers import STEP, claim, notes, together

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

KILLED = -signal.SIGKILL
STEPS = ("before", "reserved", "released", "left")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Diary:
    """What a process did, on the disk before it goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def note(self, word: str, number: int, attempt: int) -> None:
        handle = os.open(self.path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.write(handle, f"{word} {number} {attempt}\n".encode())
        os.fsync(handle)
        os.close(handle)

    def read(self, word: str) -> list[tuple[int, int]]:
        if not self.path.exists():
            return []
        lines = [line.split() for line in self.path.read_text().splitlines()]
        return [(int(line[1]), int(line[2])) for line in lines if line[0] == word]


def run(
    place: str,
    diary: Diary,
    rounds: range,
    at: tuple[str, int] | None = None,
    statement: int | None = None,
) -> None:
    """Go through rounds; die at a step of a round, or before the n-th statement (or commit)."""
    ledger = open_ledger(place)
    account, count = notes(ledger), 0

    def hear(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == statement:
            die()

    event.listen(ledger.store.engine, "before_cursor_execute", hear)
    event.listen(ledger.store.engine, "commit", hear)
    for number in rounds:
        attempt = ledger.next_attempt(account, "job", number)
        for step in STEPS:
            if at == (step, number):
                die()
            if step == "before":
                held = ledger.reserve(account, claim(number, attempt))
                diary.note("reserved", number, attempt)
            elif step == "reserved":
                ledger.release(held)
            elif step == "released":
                diary.note("left", number, attempt)


def check(place: str, diary: Diary, before: int) -> int:
    """Return the total after a crash, checked against the diary."""
    ledger = open_ledger(place)
    ledger.verify()
    account = notes(ledger)
    total = ledger.groups(account).get(STEP, 0)
    entries = ledger.entries(account)
    reserved = {(e.round, e.attempt) for e in entries if e.kind == "reserve"}
    released = {(e.round, e.attempt) for e in entries if e.kind == "release"}
    left = diary.read("left")
    assert len(set(left)) == len(left), "one charge, two outputs"
    assert set(diary.read("reserved")) <= reserved, "a reservation was lost"
    assert set(left) <= released, "something left that the ledger does not know"
    assert total == len(reserved) >= max(before, len(left))
    # Higher by exactly what was lost in flight.
    assert total - len(released) == ledger.in_flight(account)
    return total


def test_v29_killed_before_every_statement(place: str, tmp_path: Path) -> None:
    notes(open_ledger(place))
    diary, total, number, ends = Diary(tmp_path / "diary"), 0, 0, []
    stride = 1 if place.endswith(".db") else 3  # a server's connections take their time
    while True:
        number += stride
        ends += together(lambda n=number: run(place, diary, range(n * 10, n * 10 + 1), statement=n))
        total = check(place, diary, total)
        if ends[-1] == 0:
            break
    # Every statement of next_attempt, reserve and release, and their commits, was one to die at.
    assert 15 < stride * len(ends) < 60
    assert set(ends[:-1]) == {KILLED}
    assert 1 < total < len(ends)


@pytest.mark.parametrize("step", STEPS)
def test_v29_killed_between_the_steps_and_resumed(place: str, tmp_path: Path, step: str) -> None:
    notes(open_ledger(place))
    diary = Diary(tmp_path / "diary")
    assert together(lambda: run(place, diary, range(1, 5), at=(step, 3))) == [KILLED]
    total = check(place, diary, 0)
    assert total == (2 if step == "before" else 3)
    # Round 3 is done again, whatever became of it: one attempt more, once.
    assert together(lambda: run(place, diary, range(3, 5))) == [0]
    lost = step != "before"
    assert check(place, diary, total) == 4 + lost
    again = [attempt for number, attempt in diary.read("left") if number == 3]
    assert again == {"before": [0], "left": [0, 1]}.get(step, [1])


def test_v29_killed_at_random_times(tmp_path: Path) -> None:
    place, diary, total = str(tmp_path / "ledger.db"), Diary(tmp_path / "diary"), 0
    notes(open_ledger(place))
    chance, seen = random.Random(3), 0
    for turn in range(12):
        pid = os.fork()
        if pid == 0:
            try:
                run(place, diary, range(turn * 1000, turn * 1000 + 999))
            finally:
                os._exit(1)
        while len(diary.read("reserved")) <= seen:
            time.sleep(0.005)
        time.sleep(chance.uniform(0.0, 0.1))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == KILLED
        seen = len(diary.read("reserved"))
        total = check(place, diary, total)
    assert total >= 12


def test_v29_two_holders_of_one_reservation_let_out_one_output(tmp_path: Path) -> None:
    """A process that was thought dead comes back: the claim is one, and so is its output."""
    place = str(tmp_path / "ledger.db")
    notes(open_ledger(place))

    def work() -> int:
        ledger = open_ledger(place)
        held = ledger.reserve(notes(ledger), claim(1))
        try:
            ledger.release(held)
        except FedtuneError:
            return 3
        return 0

    first: Ledger = open_ledger(place)
    held = first.reserve(notes(first), claim(1))
    assert together(work) == [0]
    with pytest.raises(FedtuneError, match="ended already"):
        first.release(held)
    assert first.groups(notes(first)) == {STEP: 1}
