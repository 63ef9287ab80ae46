"""How a run stands: from what is on disk, while it grows, and no more than may be shown."""

from __future__ import annotations

import json
import math
import resource
import threading
import time
from pathlib import Path

import pytest

from fedtune.errors import FedtuneError
from fedtune.privacy.accounting import epsilon_of_rdp, rdp
from fedtune.privacy.events import Unit
from fedtune.privacy.ledger import Claim, open_ledger
from fedtune.privacy.plan import promises
from fedtune.server.event_log import EVENTS, EventLog
from fedtune.server.events import ClientDone, RoundDone, RoundStarted
from fedtune.server.run_folder import RunFolder
from fedtune.server.snapshot import NodeView, Seen, Trouble, as_json, snapshot_of
from fedtune.server.snapshot_budget import Known, budgets_of
from tests.server.standing import CLIENT, EXAMPLE, HOSTILE, Run, working
from tests.simulations.apps import settings
from tests.simulations.private_runs import client_run

# ---------------------------------------------------------------- the log of events


def test_events_are_lines_with_a_time(tmp_path: Path) -> None:
    log = EventLog(tmp_path / EVENTS)
    before = time.time()
    log.hear(RoundStarted(3, 1, 5))
    log.hear(ClientDone(3, HOSTILE, "failed", "two\nlines", 12))
    log.hear(RoundDone(3, {"round": 3, "loss": 1.0}))
    lines = [json.loads(line) for line in (tmp_path / EVENTS).read_text().splitlines()]
    assert [line["event"] for line in lines] == ["round_started", "client_done", "round_done"]
    assert all(before - 1 < line.pop("time") < time.time() + 1 for line in lines)
    assert lines[0] == {"event": "round_started", "round": 3, "attempt": 1, "cohort": 5}
    assert lines[1]["client"] == HOSTILE
    assert (tmp_path / EVENTS).stat().st_mode & 0o777 == 0o600


def test_a_full_disk_ends_no_run_and_is_told_later(tmp_path: Path) -> None:
    path = tmp_path / EVENTS
    path.symlink_to("/dev/full")
    log = EventLog(path)
    for number in (1, 2):
        log.hear(RoundStarted(number, 0, 3))
    path.unlink()
    log.hear(RoundStarted(3, 0, 3))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["lost", "round_started"]
    assert lines[0]["lines"] == 2
    assert lines[1]["round"] == 3


def test_half_a_line_spoils_no_other(tmp_path: Path) -> None:
    """The disk takes the first 30 bytes of a line and refuses the rest."""
    run = Run(tmp_path)
    run.base()
    path = run.folder.path / EVENTS
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 30, hard))
    try:
        run.begin(1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not path.read_bytes().endswith(b"\n")
    with working(run):
        run.begin(1)
        run.done(1, "a")
        found = run.look()
    assert found.phase == "round 1: 1 of 3 answered"
    assert "1 events could not be written" in found.troubles[0].words


def test_a_folder_that_is_gone_ends_no_run(tmp_path: Path) -> None:
    EventLog(tmp_path / "nowhere" / EVENTS).hear(RoundStarted(1, 0, 3))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- phases


def test_nothing_there_yet() -> None:
    found = snapshot_of(None, [NodeView("a", "never")], federation="wards", queue=["next"])
    assert (found.status, found.phase, found.rounds) == ("waiting", "no run yet", 0)
    assert (found.federation, found.queue) == ("wards", ("next",))
    assert found.budgets == ()


def test_a_run_whose_process_is_still_starting_waits_for_nodes(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.folder.update_status(status="starting")
    found = run.look("a", address="x:9092")
    assert (found.status, found.phase) == ("waiting", "waiting for 1 more node")
    found = run.look("a", "b", address="x:9092")
    assert (found.status, found.phase) == ("waiting", "starting")
    run.folder.update_status(status="stopped")
    assert run.look("a", address="x:9092").status == "stopped"


def test_phases_of_a_run(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.look().status == "killed"
    with working(run):
        assert run.look().phase == "asking nodes who they are, and measuring the base model"
        assert run.look(address="x:9092").status == "waiting"
        assert run.look(address="x:9092").phase == "waiting for 2 more nodes"
        assert run.look("a", address="x:9092").phase == "waiting for 1 more node"
        run.base()
        assert run.look("a", address="x:9092").phase == "about to begin round 1"
        run.begin(1)
        assert run.look().phase == "round 1: 0 of 3 answered"
        run.done(1, "a")
        run.done(1, "b", "failed", "out of memory")
        assert run.look().phase == "round 1: 2 of 3 answered, 1 failed"
        run.done(1, "c", "late", "no answer within 5 s")
        assert run.look().phase == (
            "round 1: all 3 nodes accounted for, 1 failed, 1 late; adding up and measuring"
        )
        run.commit(1, {"a": "ok", "b": "failed:out of memory", "c": "late:no answer within 5 s"})
        found = run.look("a", "b", "c")
        assert (found.round, found.phase) == (1, "about to begin round 2")
        assert [(n.rounds_ok, n.failed, n.late) for n in found.nodes] == [
            (1, 0, 0), (0, 1, 0), (0, 0, 1),
        ]  # fmt: skip
        assert found.nodes[1].note == "round 1: out of memory"
        assert [(t.who, t.round, t.words) for t in found.troubles] == [
            ("c", 1, "late: no answer within 5 s"), ("b", 1, "failed: out of memory"),
        ]  # fmt: skip
        for number in (2, 3, 4):
            run.round(number, "a", "b", "c")
        assert run.look().phase == "saving the result"
    run.folder.update_status(status="finished")
    found = run.look()
    assert (found.status, found.phase) == ("finished", "4 rounds done")
    assert (found.bytes_down, found.bytes_up) == (12_000_000, 8_000_000)


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.base()
    run.folder.update_status(status="failed", reason="round 1: 0 of 3 answered\x1b[2J well")
    found = run.look()
    assert (found.status, found.phase) == ("failed", "after round 0 of 4")
    assert found.reason == "round 1: 0 of 3 answered\ufffd[2J well"
    assert found.seconds_left is None


def test_time_left_comes_from_the_last_rounds(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with working(run):
        run.base()
        assert run.look().seconds_left is None
        run.round(1, "a")
        assert run.look().seconds_left == pytest.approx(3 * 2.0)
        run.begin(2)
        begun = time.time()
        assert run.look(now=begun + 0.5).seconds_left == pytest.approx(5.5, abs=0.2)
        assert run.look(now=begun + 900.0).seconds_left == pytest.approx(4.0)


def test_an_attempt_of_a_dead_session_is_not_shown_as_progress(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with working(run):
        run.base()
        run.begin(1)
        run.done(1, "a")
        assert run.look().phase == "round 1: 1 of 3 answered"
    time.sleep(0.1)
    with working(run):
        assert run.look().phase == "about to begin round 1"
        run.begin(1, attempt=3)
        assert run.look().phase == "round 1: 0 of 3 answered"
        assert run.look().troubles[0].words == "the round was interrupted: begun again"


def test_too_few_answers_are_a_trouble(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with working(run):
        run.base()
        run.begin(1, 1)
        run.done(1, "a", "failed", "no")
        run.begin(1, 1, attempt=1)
        assert run.look().troubles[0].words == "too few good answers: asked again"


def test_a_node_that_comes_late_does_not_count_as_an_answer(tmp_path: Path) -> None:
    """A newcomer is refused between rounds: that is about the next one, and no answer."""
    run = Run(tmp_path)
    with working(run):
        run.base()
        run.round(1, "a", "b")
        run.done(2, "new", "failed", "holds another base model")
        run.begin(2, 2)
        run.done(2, "a")
        found = run.look()
    assert found.phase == "round 2: 1 of 2 answered"
    assert found.troubles[0].who == "new"


# ---------------------------------------------------------------- reading files that grow


def test_one_reader_sees_what_a_fresh_one_sees(tmp_path: Path) -> None:
    run, seen = Run(tmp_path, rounds=9), Seen()
    with working(run):
        run.base()
        for number in range(1, 5):
            run.round(number, "a", "b")
            run.begin(number + 1, 2)
            run.done(number + 1, "a", "failed", "no")
            now = time.time()
            assert run.look("a", seen=seen, now=now) == run.look("a", now=now)
        # A resumed run drops what never counted: files are replaced, and shorter.
        run.folder.forget_after(2)
        now = time.time()
        kept = run.look("a", seen=seen, now=now)
        assert kept == run.look("a", now=now)
        assert (kept.round, kept.nodes[0].rounds_ok) == (2, 2)


def test_a_line_is_read_once(tmp_path: Path) -> None:
    """Old lines are overwritten in place: a reader that reads them again would fail."""
    run, seen = Run(tmp_path), Seen()
    run.base()
    run.look(seen=seen)
    run.round(1, "a", "b", "c")
    assert run.look(seen=seen).round == 1
    path = run.folder.path / "metrics.jsonl"
    data = path.read_bytes()
    path.write_bytes(b"#" * 20 + data[20:])
    run.round(2, "a")
    assert [row["round"] for row in run.look(seen=seen).rows] == [0, 1, 2]


def test_another_run_begins_anew(tmp_path: Path) -> None:
    first, second, seen = Run(tmp_path), Run(tmp_path), Seen()
    first.base()
    first.round(1, "a")
    assert first.look("a", seen=seen).nodes[0].rounds_ok == 1
    found = second.look("a", seen=seen)
    assert (found.rows, found.nodes[0].rounds_ok, found.troubles) == ((), 0, ())


def test_half_a_row_is_left_for_later(tmp_path: Path) -> None:
    run, seen = Run(tmp_path), Seen()
    run.base()
    path = run.folder.path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"round": 1, "lo')
        file.flush()
        assert run.look(seen=seen).round == 0
        file.write('ss": 1.0}\n')
    assert run.look(seen=seen).rows[-1] == {"round": 1, "loss": 1.0}


def test_a_long_log_of_events_is_read_from_near_its_end(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with working(run):
        run.base()
        line = json.dumps({"time": 1.0, "event": "client_done", "round": 1, "client": "x" * 500})
        with (run.folder.path / EVENTS).open("a") as file:
            file.writelines(line + "\n" for _ in range(20_000))
        run.begin(1)
        run.done(1, "a")
        started = time.monotonic()
        assert run.look().phase == "round 1: 1 of 3 answered"
    assert time.monotonic() - started < 2.0


def test_readers_do_not_disturb_each_other_or_the_run(tmp_path: Path) -> None:
    run, seen = Run(tmp_path, rounds=500), Seen()
    run.base()
    problems: list[BaseException] = []
    ended = threading.Event()

    def read() -> None:
        last = -1
        try:
            while not ended.is_set():
                found = run.look("a", seen=seen)
                assert found.round >= last
                assert [row["round"] for row in found.rows] == list(range(found.round + 1))
                last = found.round
        except BaseException as error:  # noqa: BLE001
            problems.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(1, 60):
        run.round(number, "a")
    ended.set()
    for thread in threads:
        thread.join()
    assert problems == []
    with run.folder.lock():
        pass


def test_no_run_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(FedtuneError, match="is no run folder"):
        snapshot_of(RunFolder(tmp_path))
    run = Run(tmp_path)
    (run.folder.path / "run.json").write_text("{")
    with pytest.raises(FedtuneError, match="cannot be read"):
        run.look()


# ---------------------------------------------------------------- names and numbers of others


def test_names_and_reasons_cannot_move_a_cursor_or_turn_a_line(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with working(run):
        run.base()
        run.begin(1)
        run.done(1, "evil\u202e\x1b[2J" + "x" * 1000, "failed", "a\r\n\u2066" + "y" * 5000)
        name = "evil\u202e\x1b[2J" + "x" * 1000
        found = run.look(name, troubles=[Trouble(time.time(), None, name, name)])
    text = json.dumps(as_json(found), ensure_ascii=False)
    assert not any(mark in text for mark in "\u202e\x1b\u2066\r")
    assert "evil\ufffd\ufffd[2J" in text
    assert max(len(t.who) for t in found.troubles) <= 80
    assert max(len(t.words) for t in found.troubles) <= 300


def test_json_has_no_infinity_and_a_bounded_number_of_rows(tmp_path: Path) -> None:
    run = Run(tmp_path, rounds=400)
    run.base(loss=math.inf)
    for number in range(1, 301):
        run.folder.append({"round": number, "loss": math.nan}, [])
    found = as_json(run.look())
    json.dumps(found, allow_nan=False)
    assert (len(found["rows"]), found["rows_in_all"]) == (200, 301)
    assert found["rows"][-1]["round"] == 300


# ---------------------------------------------------------------- privacy


def test_what_was_spent_is_the_runs_own_bound_and_never_less(tmp_path: Path) -> None:
    run = Run(tmp_path, rounds=3, example=EXAMPLE)
    (promise,) = promises(run.config)
    assert run.look().budgets[0].epsilon == 0.0
    run.base()
    seen = Seen()
    for number in (1, 2, 3):
        run.round(number, "a")
        (found,) = run.look(seen=seen).budgets
        assert found.epsilon == pytest.approx(promise.spent(number).epsilon)
    assert (found.unit, found.limit, found.delta) == ("example", 8.0, 1e-5)
    assert found.epsilon < 8.0
    assert "without attempts that failed" in found.words


def test_a_ledger_that_knows_of_more_counts(tmp_path: Path) -> None:
    """Attempts that failed are charged, and a round that is under way is reserved."""
    run = Run(tmp_path, rounds=3, example=EXAMPLE, dataset="notes")
    (promise,) = promises(run.config)
    run.base()
    run.round(1, "a")
    ledger = open_ledger(run.folder.books)
    for client, times in (("a", 2), ("b", 1)):
        account = ledger.account(f"notes/{client}", Unit.EXAMPLE, promise.relation)
        for attempt in range(times):
            charge = promise.charge
            ledger.reserve(
                account, Claim(run.folder.job(), 1, attempt, charge.event, charge.count, "train")
            )
    (found,) = run.look().budgets
    assert found.epsilon == pytest.approx(promise.spent(2).epsilon)
    assert "asked most often" in found.words


def test_between_two_stops_the_bound_holds(tmp_path: Path) -> None:
    """Of 100 rounds the exact accountant is asked for every fifth."""
    run = Run(tmp_path, rounds=100, example=EXAMPLE | {"epsilon": 0.0})
    (promise,) = promises(run.config)
    known = Known()
    for number in (1, 4, 5, 7, 100):
        rows = [{"round": number}]
        (found,) = budgets_of(run.folder, run.config, {}, rows, 0.0, known)
        exact = promise.spent(number).epsilon
        loose = epsilon_of_rdp(
            number * promise.releases * rdp(promise.mechanism.event, promise.relation), 1e-5
        )[0]
        assert exact * (1 - 1e-9) <= found.epsilon <= loose
        assert found.limit is None
    assert len(known.costs) <= 4


def test_no_promise_no_budget(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.base()
    assert run.look().budgets == ()
    assert not run.look().secret


def test_a_secret_cohort_stays_secret(tmp_path: Path) -> None:
    """Neither names, nor counts, nor bytes of whom a round asked."""
    run = Run(tmp_path, client=CLIENT)
    with working(run):
        run.base()
        run.done(0, "outsider", "failed", "holds another base model")
        run.begin(1, 2)
        run.done(1, "drawn-one", "failed", "glasses lost")
        found = run.look("drawn-one", "other")
        assert found.phase == "round 1 is under way"
        text = json.dumps(as_json(found))
    assert found.secret
    assert "glasses" not in text
    assert [t.who for t in found.troubles] == ["outsider"]
    assert {(n.rounds_ok, n.failed, n.late, n.note) for n in found.nodes} == {
        (None, None, None, "")
    }
    assert found.bytes_down is None


@pytest.mark.slow
def test_a_real_run_with_secret_cohorts_shows_what_its_metrics_show(
    tmp_path: Path, shared: Path
) -> None:
    from fedtune.server.run_folder import create
    from fedtune.simulations.simulate import simulate

    config = client_run(tmp_path, shared)
    folder = create(config)
    log, texts = EventLog(folder.path / EVENTS), []
    names = [f"owner-{n}" for n in range(4)]

    def hear(event: object) -> None:
        log.hear(event)  # type: ignore[arg-type]
        found = snapshot_of(folder, [NodeView(name, "online") for name in names])
        texts.append(found)

    simulate(config, folder, hear)
    asked = {row["client"] for row in folder.client_rows()}
    assert asked, "nobody was drawn: choose another seed for this test"
    for found in texts:
        assert {(n.rounds_ok, n.failed, n.late) for n in found.nodes} == {(None, None, None)}
        assert not any(key.startswith(("clients_o", "bytes_")) for r in found.rows for key in r)
        rest = json.dumps(as_json(found) | {"nodes": []})
        assert not any(name in rest for name in names)
    (budget,) = texts[-1].budgets
    (promise,) = promises(config)
    assert budget.unit == "client"
    assert budget.epsilon == pytest.approx(promise.spent(2).epsilon)


def test_a_real_run_as_it_goes(tmp_path: Path, shared: Path) -> None:
    """Every event of a real run can be followed from the files alone."""
    from fedtune.server.run_folder import create
    from fedtune.simulations.simulate import simulate

    config = settings(tmp_path, shared, federation__rounds=2)
    folder = create(config)
    log, seen, phases = EventLog(folder.path / EVENTS), Seen(), []

    def hear(event: object) -> None:
        log.hear(event)  # type: ignore[arg-type]
        phases.append(snapshot_of(folder, seen=seen).phase)

    simulate(config, folder, hear)
    each = [[f"round {n}: {k} of 4 answered" for k in range(4)] for n in (1, 2)]
    full = [f"round {n}: all 4 nodes accounted for; adding up and measuring" for n in (1, 2)]
    assert phases == [
        "about to begin round 1", *each[0], full[0], "about to begin round 2", *each[1], full[1],
        "saving the result",
    ]  # fmt: skip
    found = snapshot_of(folder, [NodeView("owner-0", "online")], seen=seen)
    assert (found.status, found.round, found.nodes[0].rounds_ok) == ("finished", 2, 2)
    assert found.bytes_up == sum(row["bytes_up"] for row in folder.client_rows())
