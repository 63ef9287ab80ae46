"""A federation of split clients: the same bits wherever the body runs, and what is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import Config
from fedtune.errors import FedtuneError
from fedtune.server.run_folder import RunFolder
from fedtune.server.tuned import load_tuned
from tests.simulations.apps import run_here, settings
from tests.tiny import bert

pytestmark = pytest.mark.slow


def split(folder: Path, shared: Path, **changes: Any) -> Config:
    given = {
        "tuning__adapter": "sfprompt", "tuning__method": "sfprompt", "tuning__tokens": 3,
        "tuning__split__keep": 0.5, "data__partition__clients": 2,
    }  # fmt: skip
    return settings(folder, shared, **(given | changes))


def whole(folder: Path, shared: Path, **changes: Any) -> Config:
    """The same parameters tuned at clients that hold the whole model."""
    config = split(folder, shared, **changes)
    tuning = config.tuning.model_copy(update={"method": "backprop"})
    return config.model_copy(update={"tuning": tuning})


def bits(folder: RunFolder) -> list[bytes]:
    places = (folder.adapter, folder.adapter / "prompt", folder.adapter / "tail")
    return [
        (one / "adapter_model.safetensors").read_bytes()
        for one in places
        if (one / "adapter_model.safetensors").is_file()
    ]


def cut_bytes(folder: RunFolder) -> int:
    return sum(row.get("bytes_cut", 0) for row in folder.metrics())


PLAIN: dict[str, Any] = {"tuning__split__keep": 1.0, "tuning__split__local_epochs": 0.0}


def test_a_split_run_is_the_whole_run_to_the_bit(tmp_path: Path, shared: Path) -> None:
    ours = run_here(split(tmp_path / "a", shared, **PLAIN))
    theirs = run_here(whole(tmp_path / "b", shared, **PLAIN))
    assert len(bits(ours)) == 2
    assert bits(ours) == bits(theirs)
    assert cut_bytes(ours) > 100_000
    assert cut_bytes(theirs) == 0
    assert ours.metrics()[-1]["loss"] == theirs.metrics()[-1]["loss"]


def test_where_the_body_runs_changes_nothing(tmp_path: Path, shared: Path) -> None:
    here = run_here(split(tmp_path / "a", shared))
    there = run_here(split(tmp_path / "b", shared, engine__body="process"))
    assert bits(here) == bits(there)
    assert cut_bytes(here) == cut_bytes(there) > 0


def test_a_client_loads_its_part_alone(tmp_path: Path, shared: Path) -> None:
    from fedtune.client.across import open_across

    config = split(tmp_path, shared, engine__body="localhost:9")
    across = open_across(config, (), None)
    names = {name.split("layers.")[1][0] for name, _ in across.base.model.named_parameters()
             if "layers." in name}  # fmt: skip
    assert names == {"0", "4"}
    found = load_tuned(config, ())
    from fedtune.adapters import attach, trainable
    from fedtune.models import fingerprint

    mine = attach(across.base, config.tuning, "causal-lm", config.seed)
    assert trainable(mine).keys() == trainable(found.model).keys()
    assert fingerprint(mine) == found.fingerprint


def test_without_a_body_it_says_where_one_is_to_be_named(tmp_path: Path, shared: Path) -> None:
    from fedtune.client.across import open_across

    with pytest.raises(FedtuneError, match=r"engine\.body"):
        open_across(split(tmp_path, shared), (), None)


@pytest.mark.parametrize("codec", ["bf16", "int8", "lowrank"])
def test_codecs_send_less_and_still_learn(tmp_path: Path, shared: Path, codec: str) -> None:
    raw = run_here(split(tmp_path / "a", shared, **PLAIN))
    rank = {"tuning__split__rank": 24} if codec == "lowrank" else {}
    packed = run_here(split(tmp_path / "b", shared, **PLAIN, tuning__split__codec=codec, **rank))
    assert cut_bytes(packed) < 0.7 * cut_bytes(raw)
    first, last = raw.metrics()[0]["loss"], raw.metrics()[-1]["loss"]
    gain = first - packed.metrics()[-1]["loss"]
    assert gain > 0.8 * (first - last) > 0


def test_what_stays_is_sent_once(tmp_path: Path, shared: Path) -> None:
    """Head of embeddings alone: only prompts change, and they are few."""
    common = PLAIN | {"tuning__split__head": 0, "federation__rounds": 3, "tuning__steps": 8}
    each = run_here(split(tmp_path / "a", shared, **common))
    once = run_here(split(tmp_path / "b", shared, **common, tuning__split__release="once"))
    last = [run.metrics()[-1] for run in (each, once)]
    assert last[1]["bytes_cut"] < 0.8 * last[0]["bytes_cut"]
    assert last[1]["loss"] == pytest.approx(last[0]["loss"], rel=1e-4)
    keys = sorted((once.clients).glob("*/cut.key"))
    assert len({key.read_bytes() for key in keys}) == len(keys) == 2


def test_a_tail_alone_asks_for_no_gradient(tmp_path: Path, shared: Path) -> None:
    tail = run_here(split(tmp_path / "a", shared, **PLAIN, tuning__adapter="lora"))
    both = run_here(split(tmp_path / "b", shared, **PLAIN))
    assert cut_bytes(tail) < 0.6 * cut_bytes(both)


def test_a_resumed_split_run_is_the_undisturbed_one(tmp_path: Path, shared: Path) -> None:
    from fedtune.server.events import RoundStarted
    from fedtune.simulations.simulate import simulate

    config = split(tmp_path / "a", shared, federation__rounds=3)
    calm = run_here(config)

    class Pulled(Exception):  # noqa: N818 - a plug
        pass

    def pull(event: Any) -> None:
        if isinstance(event, RoundStarted) and event.round == 3:
            raise Pulled

    from fedtune.server.run_folder import create

    folder = create(split(tmp_path / "b", shared, federation__rounds=3))
    with pytest.raises(Pulled):
        simulate(config, folder, pull)
    simulate(config, folder, lambda _: None)
    assert bits(folder) == bits(calm)


PRIVATE: dict[str, Any] = {
    "data__pack": False, "data__holdout": 0.0, "data__max_rows": 0, "evaluation__clients": 0,
    "federation__weighting": "uniform",
}  # fmt: skip
EXAMPLE: dict[str, Any] = PRIVATE | {
    "privacy__example": {"epsilon": 8.0, "delta": 1e-3, "population": 8,
                         "relation": "add-or-remove-one"},
    "privacy__insecure_seeded_noise": True,
}  # fmt: skip


def test_noise_is_on_what_leaves(tmp_path: Path, shared: Path) -> None:
    """The client's real path, recorded where the body receives it."""
    from fedtune.client.app import worker_for
    from fedtune.server.body import Body
    from fedtune.simulations.body import local_service
    from fedtune.wire import Task

    seen: list[float] = []
    forward = Body.forward

    def record(self: Body, hidden: Any, rows: Any, deep: Any = None) -> Any:
        seen.append(float(hidden.detach().norm()))
        return forward(self, hidden, rows, deep)

    patch = pytest.MonkeyPatch()
    patch.setattr(Body, "forward", record)
    try:
        for noise in (0.0, 50.0):
            config = split(tmp_path, shared, **PLAIN, tuning__split__noise=noise,
                           privacy__insecure_seeded_noise=True)  # fmt: skip
            worker = worker_for(config, None, local_service)
            worker.train(0, Task(1, 0, 0, 0.01, load_tuned(config, ()).start().adapter, "job"))
            seen.append(-1.0)
    finally:
        patch.undo()
    plain, noisy = seen[: seen.index(-1.0)], seen[seen.index(-1.0) + 1 : -1]
    assert len(plain) == len(noisy) > 0
    # 4 x 35 positions of 64 numbers, each with a deviation of 50.
    assert min(noisy) > 50 * (4 * 20 * 64) ** 0.5 > 10 * max(plain)


@pytest.mark.parametrize("threshold", [0.0, 0.95])
def test_examples_are_hidden_in_what_is_released(
    tmp_path: Path, shared: Path, threshold: float
) -> None:
    given = PLAIN | EXAMPLE | {"tuning__split__threshold": threshold, "federation__rounds": 1}
    given |= {"privacy__ledger": str(tmp_path / "ledger.db"),
              "privacy__insecure_seeded_noise": False}  # fmt: skip
    run = run_here(split(tmp_path, shared, **given))
    said = json.loads((run.adapter / "privacy.json").read_text())
    assert said["differential_privacy"]
    assert cut_bytes(run) == 0  # how many examples there are stays with the client


def test_split_runs_of_hidden_examples_equal_whole_ones(tmp_path: Path, shared: Path) -> None:
    given = PLAIN | EXAMPLE | {"federation__rounds": 1}
    runs = [
        run_here(make(tmp_path / name, shared, **given,
                      privacy__ledger=str(tmp_path / f"{name}.db")))
        for name, make in (("a", split), ("b", whole))
    ]  # fmt: skip
    assert bits(runs[0]) == bits(runs[1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tuning__split__local_epochs": 1.0}, "local_epochs=0"),
        ({"tuning__split__keep": 0.5}, "keep=1"),
    ],
)
def test_phases_that_no_budget_covers_are_refused(
    tmp_path: Path, shared: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(FedtuneError, match=words):
        split(tmp_path, shared, **(PLAIN | EXAMPLE | change))


def test_clients_are_hidden_with_all_three_phases(tmp_path: Path, shared: Path) -> None:
    given = PRIVATE | {
        "privacy__client": {"epsilon": 8.0, "delta": 1e-3, "population": 100, "clip_norm": 0.1,
                            "relation": "add-or-remove-one"},
        "federation__cohort": 50,
        "privacy__ledger": str(tmp_path / "ledger.db"), "federation__rounds": 1,
    }  # fmt: skip
    run = run_here(split(tmp_path, shared, **given))
    said = json.loads((run.adapter / "privacy.json").read_text())
    assert said["differential_privacy"]


def test_what_is_promised_counts_every_parameter(tmp_path: Path, shared: Path) -> None:
    """Coefficients of probes are few; gradients through a cut are as many as parameters."""
    from fedtune.pool.groups import released
    from fedtune.privacy.events import Unit

    config = split(tmp_path, shared, **(PLAIN | EXAMPLE))
    assert released(config, 1000, Unit.EXAMPLE) == 1000


def test_checking_the_result_leaves_the_base_as_it_is(tmp_path: Path, shared: Path) -> None:
    """A second run in the same process must not find the first one's head in its base."""
    from fedtune.models import load_base

    rows = [
        {"client": f"owner-{n % 2}", "text": f"Tom saw {n} birds.", "label": "ab"[n % 2]}
        for n in range(16)
    ]
    tmp_path.joinpath("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = split(
        tmp_path, shared, model__base=str(bert(tmp_path / "bert", shared, layers=3)),
        model__task="classification", model__pooling="mean", data__kind="classification",
        data__labels=["a", "b"], data__pack=True, tuning__rank=2,
    )  # fmt: skip
    given = (config.model, ("a", "b"), config.seed, config.data.template)
    before = {name: value.clone() for name, value in load_base(*given).model.named_parameters()}
    run = run_here(config)
    assert run.status()["adapter_difference"] < 1e-4
    for name, value in load_base(*given).model.named_parameters():
        assert value.equal(before[name]), name
