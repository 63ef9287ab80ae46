"""The local grid and its two executors, with client apps that misbehave."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import psutil
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedtune.simulations.executors import Executor, ProcessExecutor, ThreadExecutor
from fedtune.simulations.grid import LocalGrid
from tests.simulations.apps import ask, make_app

Make = Callable[[], Executor]


def threads(workers: int = 2) -> ThreadExecutor:
    return ThreadExecutor(make_app(), workers)


def processes(workers: int = 1) -> ProcessExecutor:
    return ProcessExecutor(make_app, workers)


@contextmanager
def open_grid(executor: Executor, nodes: int = 4, backlog: int = 8) -> Iterator[LocalGrid]:
    grid = LocalGrid(executor, nodes, backlog)
    try:
        yield grid
    finally:
        grid.close()


@pytest.fixture(scope="module")
def crowd() -> Iterator[tuple[LocalGrid, ProcessExecutor]]:
    """One grid over one worker process, for all tests that leave it able to work."""
    executor = processes()
    with open_grid(executor) as grid:
        yield grid, executor


def sources(replies: Any) -> list[int]:
    return sorted(reply.metadata.src_node_id for reply in replies)


def errors(replies: Any) -> dict[int, str]:
    return {r.metadata.src_node_id: r.error.reason for r in replies if r.has_error()}


def alive_worker(executor: ProcessExecutor) -> psutil.Process:
    return psutil.Process(executor._processes[0].pid)


def wait_until(true: Callable[[], bool], seconds: float = 15.0) -> bool:
    end = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def test_all_nodes_answer_with_what_they_were_sent() -> None:
    with open_grid(threads()) as grid:
        assert list(grid.get_node_ids()) == [1, 2, 3, 4]
        questions = ask(range(1, 5), "echo")
        blob = Array("uint8", (3,), "raw", b"abc")
        for question in questions:
            question.content["x"] = ArrayRecord({"blob": blob})
        replies = list(grid.send_and_receive(questions, timeout=20))
    assert sources(replies) == [1, 2, 3, 4]
    assert errors(replies) == {}
    assert [r.content.array_records["x"]["blob"].data for r in replies] == [b"abc"] * 4
    asked = {q.metadata.message_id: q.metadata.dst_node_id for q in questions}
    assert {r.metadata.reply_to_message_id: r.metadata.src_node_id for r in replies} == asked


def test_a_thousand_nodes_answer() -> None:
    with open_grid(threads(), 1000) as grid:
        replies = list(grid.send_and_receive(ask(range(1, 1001), "echo"), timeout=60))
        assert sources(replies) == list(range(1, 1001))
        assert errors(replies) == {}
        assert (grid._asked, grid._replies) == ({}, {})


def test_processes_answer_and_carry_the_content(
    crowd: tuple[LocalGrid, ProcessExecutor],
) -> None:
    grid, executor = crowd
    for number in (1, 2):
        content = RecordDict({"x": ArrayRecord([np.full(1000, number, dtype=np.float32)])})
        questions = [Message(content, node, "query", ttl=60.0) for node in range(1, 5)]
        replies = list(grid.send_and_receive(questions, timeout=60))
        assert sources(replies) == [1, 2, 3, 4]
        for reply in replies:
            (value,) = reply.content.array_records["x"].to_numpy_ndarrays()
            assert value.dtype == np.float32
            assert (value == number).all()
    assert len(executor._processes) == 1


def test_a_raising_thread_client_is_an_error_in_its_own_words() -> None:
    with open_grid(threads()) as grid:
        replies = list(grid.send_and_receive(ask(range(1, 5), "raise:2"), timeout=20))
    assert sources(replies) == [1, 2, 3, 4]
    assert list(errors(replies)) == [2]
    assert "client 2 has lost its glasses" in errors(replies)[2]


def test_a_raising_process_client_is_an_error_in_its_own_words(
    crowd: tuple[LocalGrid, ProcessExecutor],
) -> None:
    grid, executor = crowd
    list(grid.send_and_receive(ask(range(1, 2), "echo"), timeout=60))
    before = alive_worker(executor).pid
    replies = list(grid.send_and_receive(ask(range(1, 5), "raise:2"), timeout=60))
    assert sources(replies) == [1, 2, 3, 4]
    assert list(errors(replies)) == [2]
    assert "client 2 has lost its glasses" in errors(replies)[2]
    assert alive_worker(executor).pid == before


def test_a_stuck_thread_is_left_behind_and_the_next_round_works() -> None:
    with open_grid(threads(1)) as grid:
        started = time.monotonic()
        questions = ask(range(1, 4), "sleep:2", ttl=1.0)
        assert sources(grid.send_and_receive(questions, timeout=1.0)) == [1]
        assert time.monotonic() - started < 3.0
        replies = list(grid.send_and_receive(ask(range(1, 5), "echo"), timeout=20))
        assert sources(replies) == [1, 2, 3, 4]
        assert errors(replies) == {}


def test_a_stuck_worker_is_killed_and_replaced(crowd: tuple[LocalGrid, ProcessExecutor]) -> None:
    grid, executor = crowd
    list(grid.send_and_receive(ask(range(1, 2), "echo"), timeout=60))
    stuck = alive_worker(executor)
    started = time.monotonic()
    questions = ask(range(1, 4), "sleep:2", ttl=1.0)
    assert sources(grid.send_and_receive(questions, timeout=1.0)) == [1]
    assert time.monotonic() - started < 3.0
    replies = list(grid.send_and_receive(ask(range(1, 5), "echo"), timeout=60))
    assert sources(replies) == [1, 2, 3, 4]
    assert errors(replies) == {}
    assert wait_until(lambda: not stuck.is_running() or stuck.status() == psutil.STATUS_ZOMBIE)
    assert alive_worker(executor).pid != stuck.pid


def test_a_worker_that_dies_is_named_and_replaced(
    crowd: tuple[LocalGrid, ProcessExecutor],
) -> None:
    grid, executor = crowd
    for _ in range(2):
        replies = list(grid.send_and_receive(ask(range(1, 4), "die:2"), timeout=60))
        assert sources(replies) == [1, 2, 3]
        assert errors(replies) == {2: "the worker process died (exit code 9)"}
    dead = alive_worker(executor)
    dead.kill()
    # One that dies between two messages takes the next one with it, and is named too.
    replies = list(grid.send_and_receive(ask(range(1, 3), "echo"), timeout=60))
    assert errors(replies) == {1: "the worker process died (exit code -9)"}
    assert sources(replies) == [1, 2]


def test_late_replies_are_forgotten() -> None:
    with open_grid(threads(2)) as grid:
        late = ask(range(1, 3), "late", ttl=0.5)
        assert list(grid.send_and_receive(late, timeout=0.5)) == []
        names = {message.metadata.message_id for message in late}
        replies = list(grid.send_and_receive(ask(range(1, 5), "echo"), timeout=20))
        assert sources(replies) == [1, 2, 3, 4]
        assert not names & {reply.metadata.reply_to_message_id for reply in replies}
        time.sleep(1.5)  # the late answers are ready by now
        assert grid._replies == {}
        assert grid._asked == {}
        assert list(grid.pull_messages(names)) == []


def test_replies_that_expire_unpulled_make_room() -> None:
    with open_grid(threads(2), 20, backlog=2) as grid:
        list(grid.push_messages(ask(range(1, 21), "echo", ttl=0.5)))
        assert wait_until(lambda: len(grid._replies) == 2)
        time.sleep(0.6)
        replies = list(grid.send_and_receive(ask(range(1, 21), "echo"), timeout=20))
        assert sources(replies) == list(range(1, 21))


def test_unpulled_replies_never_exceed_the_backlog() -> None:
    blob = Array("uint8", (10**6,), "raw", b"\0" * 10**6)
    most, done = 0, threading.Event()
    with open_grid(threads(4), 200, backlog=5) as grid:

        def look() -> None:
            nonlocal most
            while not done.wait(0.0005):
                most = max(most, len(grid._replies))

        watcher = threading.Thread(target=look)
        watcher.start()
        questions = ask(range(1, 201), "echo")
        questions[0].content["x"] = ArrayRecord({"blob": blob})
        waiting = set(grid.push_messages(questions))
        heard = 0
        while waiting:
            time.sleep(0.005)  # a slow puller
            replies = list(grid.pull_messages(waiting))
            most = max(most, len(replies))
            heard += len(replies)
            waiting -= {reply.metadata.reply_to_message_id for reply in replies}
        done.set()
        watcher.join()
    assert heard == 200
    assert 2 <= most <= 5


@pytest.mark.parametrize("make", [threads, processes])
def test_closing_does_not_wait_for_stuck_clients(make: Make) -> None:
    executor = make()
    grid = LocalGrid(executor, 3)
    if isinstance(executor, ProcessExecutor):
        list(grid.send_and_receive(ask(range(1, 2), "echo"), timeout=60))
    list(grid.push_messages(ask(range(1, 4), "sleep")))
    time.sleep(0.3)
    started = time.monotonic()
    grid.close()
    assert time.monotonic() - started < 3.0
    if isinstance(executor, ProcessExecutor):
        assert [p.exitcode is not None for p in executor._processes.values()] == [True]


def test_closing_lets_clients_go_that_wait_for_room() -> None:
    executor = threads(3)
    before = threading.active_count()
    grid = LocalGrid(executor, 30, backlog=2)
    list(grid.push_messages(ask(range(1, 31), "echo")))
    assert wait_until(lambda: len(grid._replies) == 2)
    grid.close()
    assert wait_until(lambda: threading.active_count() <= before)
