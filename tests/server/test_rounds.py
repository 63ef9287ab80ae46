from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from fedtune.client.worker import Worker
from fedtune.config import Config, TuningConfig
from fedtune.errors import ExitCode, FedtuneError
from fedtune.server.asking import Member
from fedtune.server.checkpoint import State, latest
from fedtune.server.events import ClientDone, Event, RoundDone, RoundStarted
from fedtune.server.link import Answer
from fedtune.server.members import cohort_of, gather
from fedtune.server.rounds import learning_rate, run_rounds
from fedtune.server.run_folder import RunFolder, create
from fedtune.server.tuned import Tuned, load_tuned
from fedtune.wire import Evaluation, Hello, Task, Update
from tests.tiny import jsonl, settings

_Reply = TypeVar("_Reply", Hello, Update, Evaluation)
Spoil = Callable[[int, Task, Update], Update | str | None]
"""Node, task and true update to another update, the text of a failure, or None: no answer."""


@dataclass
class Network:
    """In place of the network only: real workers behind it, answers spoilt as told."""

    worker: Worker
    spoil: Spoil = lambda _node, _task, update: update
    backwards: bool = False
    twice: bool = False
    asked: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list)

    def nodes(self) -> list[int]:
        return [10 + n for n in range(len(self.worker.federation.shards))]

    def ask(
        self, reply: type[_Reply], nodes: Iterable[int], task: Task | None, seconds: float
    ) -> tuple[int, Iterator[Answer[_Reply]]]:
        order = list(nodes)
        if reply is Update and task is not None:
            self.asked.append((task.round, task.attempt, tuple(order)))
        found = [a for n in order for a in self._one(reply, n, task)]
        return 100, iter(found[::-1] if self.backwards else found)

    def ask_each(
        self, reply: type[_Reply], tasks: Mapping[int, Task | None], seconds: float
    ) -> tuple[dict[int, int], Iterator[Answer[_Reply]]]:
        _, answers = self.ask(reply, tasks, next(iter(tasks.values()), None), seconds)
        return dict.fromkeys(tasks, 100), answers

    def _one(self, reply: type[_Reply], node: int, task: Task | None) -> list[Answer[_Reply]]:
        value: Any
        if reply is Hello or task is None:
            value = self.worker.hello(node - 10)
        elif reply is Evaluation:
            value = self.worker.evaluate(node - 10, task)
        else:
            value = self.spoil(node, task, self.worker.train(node - 10, task))
        if value is None:
            return []
        if isinstance(value, str):
            return [Answer(node, None, value, 7)]
        return [Answer(node, value, "", 50)] * (2 if self.twice else 1)


@dataclass
class Bench:
    config: Config
    tuned: Tuned
    worker: Worker
    folder: RunFolder
    events: list[Event] = field(default_factory=list)

    def run(self, **changes: Any) -> State:
        return run_rounds(
            Network(self.worker, **changes), self.tuned, self.folder, self.events.append
        )


def bench(shared: Path, root: Path, **tables: dict[str, Any]) -> Bench:
    root.mkdir(exist_ok=True)
    source = jsonl(root / "rows.jsonl")
    output = {"folder": str(root / "runs")} | tables.pop("output", {})
    config = settings(source, shared / "models" / "stories260K", output=output, **tables)
    worker = Worker(config, root / "clients")
    return Bench(config, load_tuned(config, ()), worker, create(config, "x"))


def bytes_of(state: State) -> bytes:
    parts = [state.tensors(), state.moments.first, state.moments.second]
    return b"".join(t[n].tobytes() for t in parts for n in sorted(t))


def poisoned(update: Update, value: float) -> Update:
    name = min(update.tensors)
    spoilt = update.tensors[name].copy()
    spoilt.flat[0] = value
    return replace(update, tensors=update.tensors | {name: spoilt})


def reshaped(update: Update) -> Update:
    name = min(update.tensors)
    return replace(update, tensors=update.tensors | {name: update.tensors[name][:1]})


def test_rounds_lower_the_loss_and_are_recorded(shared: Path, tmp_path: Path) -> None:
    made = bench(shared, tmp_path, federation={"rounds": 3})
    state = made.run()
    rows = made.folder.metrics()
    assert state.round == 3
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[1]["clients_ok"] == 3
    assert (rows[1]["bytes_down"], rows[1]["bytes_up"]) == (300, 150)
    assert 0 < rows[2]["aggregation_error"] < 1
    assert rows[1]["clients_evaluated"] == 3
    kinds = [type(event) for event in made.events]
    assert kinds == [RoundDone] + [RoundStarted, ClientDone, ClientDone, ClientDone, RoundDone] * 3
    stored = latest(made.folder, made.tuned.fingerprint)
    assert stored is not None
    assert bytes_of(stored) == bytes_of(state)


SPOILT: dict[str, tuple[Callable[[Update], Update | str | None], str, str]] = {
    "nan": (lambda u: poisoned(u, float("nan")), "dropped", "holds NaN or infinity"),
    "infinite": (lambda u: poisoned(u, float("inf")), "dropped", "holds NaN or infinity"),
    "shape": (reshaped, "dropped", "has shape"),
    "stale": (lambda u: replace(u, round=0), "dropped", "answers round 0.0"),
    "failing": (lambda u: "it broke", "failed", "it broke"),
    "late": (lambda u: None, "late", "no answer within 3600 s"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_bad_client_is_named_and_the_round_goes_on(
    shared: Path, tmp_path: Path, case: str
) -> None:
    change, outcome, reason = SPOILT[case]
    made = bench(shared, tmp_path, federation={"rounds": 1}, evaluation={"clients": 0})
    state = made.run(spoil=lambda node, _, update: change(update) if node == 11 else update)
    row = made.folder.metrics()[-1]
    assert (row["clients_ok"], row[f"clients_{outcome}"]) == (2, 1)
    clients = made.folder.client_rows()
    assert [entry["outcome"] for entry in clients] == ["ok", outcome, "ok"]
    assert reason in clients[1]["reason"]
    assert clients[1]["client"] == "c1"
    # The two others alone are the mean.
    task = Task(1, 0, 0, row["lr"], made.tuned.start().tensors())
    ups = [made.worker.train(n, task) for n in (0, 2)]
    weights = [up.examples for up in ups]
    for name, value in state.adapter.items():
        mean = np.average([up.tensors[name] for up in ups], axis=0, weights=weights)
        np.testing.assert_allclose(value, made.tuned.start().adapter[name] + mean, atol=1e-6)


def test_a_huge_finite_update_does_not_poison_the_run(shared: Path, tmp_path: Path) -> None:
    """Values that are finite, but whose weighted sum in float32 would not be."""
    made = bench(shared, tmp_path, federation={"rounds": 1})
    state = made.run(spoil=lambda n, _t, u: poisoned(u, 3e38) if n == 11 else u)
    assert all(np.isfinite(value).all() for value in state.adapter.values())
    row = made.folder.metrics()[-1]
    assert (row["clients_ok"], row["clients_dropped"]) == (2, 1)
    assert row["loss"] < 10


def test_order_and_repetition_do_not_change_a_bit(shared: Path, tmp_path: Path) -> None:
    found = set()
    for number, change in enumerate(({}, {"backwards": True}, {"twice": True})):
        made = bench(
            shared, tmp_path / str(number), federation={"aggregation": "fedex"},
            evaluation={"clients": 0},
        )  # fmt: skip
        found.add(bytes_of(made.run(**change)))
        assert [row["clients_ok"] for row in made.folder.metrics()[1:]] == [3, 3]
    assert len(found) == 1


def test_a_round_below_quorum_is_tried_again_with_others(shared: Path, tmp_path: Path) -> None:
    federation = {"rounds": 1, "cohort": 1.0, "quorum": 1.0, "retries": 2}
    made = bench(shared, tmp_path, federation=federation, evaluation={"clients": 0})
    link = Network(made.worker, lambda n, t, u: "it broke" if t.attempt == 0 and n == 10 else u)
    state = run_rounds(link, made.tuned, made.folder, made.events.append)
    assert state.round == 1
    assert [attempt for _, attempt, _ in link.asked] == [0, 1]
    assert made.folder.metrics()[-1]["attempt"] == 1


def test_without_quorum_the_run_ends_and_says_why(shared: Path, tmp_path: Path) -> None:
    federation = {"rounds": 2, "cohort": 2.0, "quorum": 1.0, "retries": 3}
    made = bench(shared, tmp_path, federation=federation, evaluation={"clients": 0})
    link = Network(made.worker, lambda n, t, u: u if t.round == 1 else f"no power at {n}")
    with pytest.raises(FedtuneError, match="round 2: 0 of 2 clients answered well, 2") as caught:
        run_rounds(link, made.tuned, made.folder, made.events.append)
    assert caught.value.code == ExitCode.QUORUM
    assert "no power at 1" in str(caught.value)
    assert "--resume" in caught.value.hint
    cohorts = [nodes for number, _, nodes in link.asked if number == 2]
    assert len(cohorts) == 4
    assert len(set(cohorts)) > 1
    assert all(len(nodes) == 2 for nodes in cohorts)
    kept = latest(made.folder, made.tuned.fingerprint)
    assert kept is not None
    assert kept.round == 1


@pytest.mark.parametrize(
    "tables",
    [
        {"federation": {"rounds": 3, "server_optimizer": {"name": "adam", "lr": 0.01}}},
        {
            "federation": {"rounds": 3, "aggregation": "fedex", "cohort": 2.0},
            "tuning": {"keep_optimizer": True},
            "output": {"checkpoint_every": 2},
        },
    ],
)
def test_a_resumed_run_has_the_same_bytes(
    shared: Path, tmp_path: Path, tables: dict[str, dict[str, Any]]
) -> None:
    tables = tables | {"evaluation": {"clients": 1}}
    whole = bench(shared, tmp_path / "whole", **tables)
    wanted = whole.run()
    made = bench(shared, tmp_path / "cut", **tables)

    def lost(event: Event) -> None:
        if isinstance(event, RoundStarted) and event.round == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_rounds(Network(made.worker), made.tuned, made.folder, lost)
    again = Worker(made.config, tmp_path / "cut" / "clients")
    tuned = load_tuned(made.config, ())
    state = run_rounds(Network(again), tuned, made.folder, made.events.append)
    assert bytes_of(state) == bytes_of(wanted)
    own = {"seconds", "memory_mb"}
    rows = [
        [{k: v for k, v in row.items() if k not in own} for row in run.folder.metrics()]
        for run in (made, whole)
    ]
    assert rows[0] == rows[1]
    clients = [
        [{k: v for k, v in row.items() if k not in own} for row in run.folder.client_rows()]
        for run in (made, whole)
    ]
    assert clients[0] == clients[1]


def test_who_takes_part(shared: Path, tmp_path: Path) -> None:
    made = bench(shared, tmp_path)
    watch = made.events.append
    members = gather(Network(made.worker, backwards=True), made.tuned, watch)
    assert [(m.client, m.node) for m in members] == [("c0", 10), ("c1", 11), ("c2", 12)]
    assert made.events == []
    made.worker.fingerprint = "other"
    with pytest.raises(FedtuneError, match="c0: holds another base model") as caught:
        gather(Network(made.worker), made.tuned, watch)
    assert caught.value.code == ExitCode.QUORUM
    assert len(made.events) == 3


@pytest.mark.parametrize(
    ("cohort", "size"), [(1.0, 10), (0.5, 5), (0.01, 1), (3.0, 3), (50.0, 10), (0.26, 3)]
)
def test_a_cohort_is_drawn_from_the_seed(cohort: float, size: int) -> None:
    members = tuple(Member(f"c{n}", 100 - n, 5) for n in range(10))
    config = settings("x", "y", federation={"cohort": cohort})
    drawn = [cohort_of(members, config, number, 0) for number in range(1, 9)]
    for chosen in drawn:
        assert len({m.client for m in chosen}) == len(chosen) == size
        assert [m.client for m in chosen] == sorted(m.client for m in chosen)
    assert drawn == [cohort_of(members, config, number, 0) for number in range(1, 9)]
    if size < 10:
        other = config.model_copy(update={"seed": 8})
        assert drawn != [cohort_of(members, other, number, 0) for number in range(1, 9)]
        assert drawn != [cohort_of(members, config, number, 1) for number in range(1, 9)]


@pytest.mark.parametrize(
    ("schedule", "warmup", "wanted"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("cosine", 0, [1, 0.853553, 0.5, 0.146447]),
        ("constant", 3, [0.25, 0.5, 0.75, 1]),
        ("linear", 2, [1 / 3, 2 / 3, 1, 0.5]),
        ("linear", 9, [0.1, 0.2, 0.3, 0.4]),
    ],
)
def test_learning_rates(schedule: str, warmup: int, wanted: list[float]) -> None:
    tuning = TuningConfig.model_validate({"lr": 2, "schedule": schedule, "warmup_rounds": warmup})
    found = [learning_rate(tuning, number, 4) for number in (1, 2, 3, 4)]
    assert found == pytest.approx([2 * value for value in wanted], rel=1e-5)
