"""What a person sees on a terminal: live views, and plain lines where there is none."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from fedtune.cli.joining import NodeState, following_node, node_screen
from fedtune.cli.serving import server_screen, watching
from fedtune.errors import FedtuneError
from fedtune.server.snapshot import NodeView, Snapshot, Trouble, snapshot_of
from tests.server.standing import CLIENT, EXAMPLE, HOSTILE, Run

NODE = NodeState("ward-a", "example.org:9092", True, 1_700_000_000.0)


def terminal(width: int = 100, height: int = 50) -> Console:
    return Console(file=StringIO(), force_terminal=True, width=width, height=height)


def paper() -> Console:
    return Console(file=StringIO(), force_terminal=False, width=80)


def text_of(console: Console) -> str:
    """All that was written, without colours and cursor movements."""
    assert isinstance(console.file, StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def lines_of(console: Console) -> list[str]:
    """Lines without the time of day."""
    lines = text_of(console).splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines), lines
    return [line[9:] for line in lines]


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def drawn(screen: object, width: int = 100) -> str:
    console = terminal(width)
    console.print(screen)
    return text_of(console)


# ---------------------------------------------------------------- the server's


def test_the_server_screen(tmp_path: Path) -> None:
    run = Run(tmp_path, example=EXAMPLE)
    with run.folder.lock():
        run.base()
        run.begin(1, 2)
        run.done(1, "ward-b", "failed", "out of memory")
        run.commit(1, {"ward-a": "ok", "ward-b": "failed:out of memory"})
        run.begin(2, 2)
        nodes = [NodeView("ward-a", "online", time.time() - 5), NodeView("ward-b", "offline", 1.0),
                 NodeView("ward-c", "never")]  # fmt: skip
        found = snapshot_of(run.folder, nodes, address="example.org:9092", queue=["next"])
    text = drawn(server_screen(found))
    for words in (
        "ward-notes", "nodes connect to example.org:9092", "running", "1/4",
        "round 2: 0 of 2 answered", "about 6.0 s left", "epsilon <=", "of 8, delta 10⁻⁵",
        "per example", "held-out", "4.25", "5.00 MB", "5 s ago", "1 ok", "0 ok, 1 failed",
        "ward-b: failed: out of memory", "waiting: next",
    ):  # fmt: skip
        assert words in text, words


def test_the_server_screen_of_every_state(tmp_path: Path) -> None:
    assert "no run yet" in drawn(server_screen(snapshot_of(None)))
    run = Run(tmp_path)
    run.folder.update_status(status="failed", reason="all are asleep")
    text = drawn(server_screen(run.look()))
    assert "after round 0 of 4" in text
    assert "all are asleep" in text
    run.folder.update_status(status="finished")
    assert "finished" in drawn(server_screen(run.look()))


def test_the_server_screen_keeps_a_cohort_secret(tmp_path: Path) -> None:
    run = Run(tmp_path, client=CLIENT)
    with run.folder.lock():
        run.base()
        run.begin(1, 2)
        run.done(1, "ward-a", "failed", "out of memory")
        text = drawn(server_screen(run.look("ward-a", "ward-b")))
    assert "round 1 is under way" in text
    assert "out of memory" not in text
    assert "answers" not in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_names_of_others_move_no_cursor(width: int, tmp_path: Path) -> None:
    evil = "a\x1b[2J\x1b]0;owned\x07\u202eb[red]x[/red]\r\n" + "w" * 500
    run = Run(tmp_path)
    with run.folder.lock():
        run.base()
        run.begin(1)
        run.done(1, evil, "failed", evil)
        found = run.look(evil, troubles=[Trouble(time.time(), 1, evil, evil)], federation=evil)
    console = terminal(width)
    console.print(server_screen(found))
    console.print(node_screen(replace(NODE, name=evil, doing=evil, last=evil, troubles=(evil,),
                                      server=evil, job=evil, experiment=evil)))  # fmt: skip
    assert isinstance(console.file, StringIO)
    raw = console.file.getvalue()
    assert "\x1b[2J" not in raw
    assert "\x1b]0" not in raw
    assert "\u202e" not in raw
    assert "\r" not in raw
    assert width == 40 or "[red]x" in raw
    assert max(len(line) for line in text_of(console).splitlines()) <= width


def test_plain_lines_of_a_server_say_each_thing_once(tmp_path: Path) -> None:
    run = Run(tmp_path, rounds=2, example=EXAMPLE)
    online = [NodeView("ward-a", "online")]
    trouble: list[Trouble] = []
    console = paper()
    with (
        run.folder.lock(),
        watching(lambda: snapshot_of(run.folder, online, troubles=trouble), console),
    ):
        run.base()
        until(lambda: "base model" in text_of(console))
        online.append(NodeView(HOSTILE, "online"))
        run.round(1, "ward-a", "ward-b")
        until(lambda: "round 1/2" in text_of(console))
        online.pop(0)
        trouble.append(Trouble(time.time(), None, "the server", "was started again"))
        run.begin(2, 2)
        run.done(2, "ward-b", "late", "no answer within 5 s")
        until(lambda: "no answer" in text_of(console))
        run.commit(2, {"ward-a": "ok", "ward-b": "late:no answer within 5 s"})
        run.folder.update_status(status="finished")
    lines = lines_of(console)
    assert lines[0] == f"run {run.folder.path.name}: 2 rounds"
    assert lines[1] == "ward-a online (1 nodes online)"
    rest = [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in lines[2:]]
    rest = [re.sub(r"epsilon <= [\d.]+", "epsilon <= E", line) for line in rest]
    assert sorted(rest) == sorted([
        "running",
        "base model: held-out loss 4.500",
        f"{HOSTILE} online (2 nodes online)",
        "round 1/2: 2 ok, 0 late, 0 failed; held-out loss 4.250; 5.00 MB sent; train loss 4.150; "
        "epsilon <= E of 8 per example; 2.0 s",
        "ward-a offline (1 nodes online)",
        "the server: was started again",
        "round 2 ward-b: late: no answer within 5 s",
        "round 2/2: 1 ok, 1 late, 0 failed; held-out loss 4.000; 5.00 MB sent; train loss 3.900; "
        "epsilon <= E of 8 per example; 2.0 s",
        "finished: 2 rounds done",
    ])  # fmt: skip


def test_plain_lines_of_a_secret_cohort(tmp_path: Path) -> None:
    run = Run(tmp_path, rounds=1, client=CLIENT)
    console = paper()
    with run.folder.lock(), watching(run.look, console):
        run.folder.append({"round": 0, "loss": 2.0}, [])
        run.begin(1, 2)
        run.done(1, "ward-a")
        run.folder.append({"round": 1, "loss": 1.5, "seconds": 3.0, "epsilon_client": 1.0}, [])
    text = text_of(console)
    line = r"round 1/1: held-out loss 1.500; epsilon <= [\d.]+ of 8 per client; 3.0 s"
    assert re.search(line, text)
    assert "ward-a" not in text


def test_a_folder_that_cannot_be_read_is_said_once() -> None:
    console, calls = paper(), []

    def broken() -> Snapshot:
        calls.append(1)
        raise FedtuneError("no run here")

    with watching(broken, console):
        until(lambda: len(calls) >= 3)
    assert lines_of(console) == ["how the run stands cannot be read: no run here"]
    live = terminal()
    with watching(broken, live):
        pass
    assert "cannot be read: no run here" in text_of(live)


def test_a_live_view_follows(tmp_path: Path) -> None:
    run = Run(tmp_path)
    console = terminal()
    with run.folder.lock(), watching(run.look, console):
        run.base()
        run.begin(1)
        until(lambda: "round 1: 0 of 3 answered" in text_of(console))
        console.print("a line of somebody else")
    assert "a line of somebody else" in text_of(console)
    assert not any("view" in thread.name for thread in threading.enumerate())


def test_a_failure_inside_the_block_is_not_hidden(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for console in (paper(), terminal()):
        with pytest.raises(FedtuneError, match="inside"), watching(run.look, console):
            raise FedtuneError("inside")
    assert not any(thread.name == "fedtune-view" for thread in threading.enumerate())


# ---------------------------------------------------------------- a node's


def test_the_node_screen() -> None:
    state = replace(
        NODE, since=time.time() - 300, job="demo-1", experiment="demo", round=3, rounds=8,
        doing="tuning", epsilon=2.5, cap=4.0, sent_bytes=1_500_000, received_bytes=2_000_000,
        last="sent the update of round 2", troubles=("lost the server",),
    )  # fmt: skip
    text = drawn(node_screen(state))
    for words in (
        "ward-a", "connected to example.org:9092, for 5 min", "demo, round 3 of 8  demo-1",
        "tuning", "epsilon <= 2.50 spent of 4, 1.50 left", "1.50 MB sent, 2.00 MB received",
        "sent the update of round 2", "lost the server",
    ):  # fmt: skip
        assert words in text, words


def test_the_node_screen_without_much_to_say() -> None:
    text = drawn(node_screen(replace(NODE, connected=False)))
    assert "not connected to example.org:9092" in text
    assert "waiting for work" in text
    assert "privacy" not in text
    assert "no cap set" in drawn(node_screen(replace(NODE, epsilon=1.0)))
    assert "0 left" in drawn(node_screen(replace(NODE, epsilon=5.0, cap=4.0)))


def test_plain_lines_of_a_node_say_each_thing_once() -> None:
    console = paper()
    works = replace(NODE, last="connected", job="demo-1", experiment="demo", round=1)
    spent = replace(works, last="sent 3 kB", epsilon=1.0, cap=4.0)
    lost = replace(spent, troubles=("lost the server",))
    again = replace(lost, round=2, epsilon=1.5, troubles=("lost the server",) * 2)
    now = [replace(NODE, connected=False)]
    with following_node(lambda: now[0], console):
        for state, words, times in (
            (NODE, "ward-a: connected", 1), (works, "run demo-1", 1), (spent, "sent 3 kB", 1),
            (lost, "trouble: lost", 1), (again, "trouble: lost", 2),
            (replace(again, connected=False), "not connected", 2),
        ):  # fmt: skip
            now[0] = state
            until(lambda words=words, times=times: text_of(console).count(words) >= times)
    assert lines_of(console) == [
        "ward-a: not connected to example.org:9092",
        "ward-a: connected to example.org:9092",
        "run demo-1 (demo)",
        "connected",
        "sent 3 kB",
        "epsilon <= 1.00 of 4 spent",
        "trouble: lost the server",
        "trouble: lost the server",
        "sent 3 kB",
        "epsilon <= 1.50 of 4 spent",
        "ward-a: not connected to example.org:9092",
    ]


def test_a_live_view_of_a_node_follows() -> None:
    console = terminal()
    now = [replace(NODE, connected=False, doing="connecting")]
    with following_node(lambda: now[0], console):
        until(lambda: "connecting" in text_of(console))
        now[0] = replace(NODE, doing="tuning")
        until(lambda: "tuning" in text_of(console))
