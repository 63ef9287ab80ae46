"""Runs with a privacy promise, end to end: what is charged, what leaves, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from safetensors.numpy import load_file

from fedtune.client.app import make_client_app
from fedtune.client.worker import Worker
from fedtune.errors import ExitCode, FedtuneError
from fedtune.files import read_tensors
from fedtune.privacy.accounting import spent
from fedtune.privacy.events import Charge, Gaussian, PoissonGaussian, Relation, Unit
from fedtune.privacy.ledger import open_ledger
from fedtune.privacy.plan import client_promise, example_promise, ledger_place
from fedtune.server.private import open_central
from fedtune.server.run_folder import RunFolder, create
from fedtune.server.tuned import load_tuned
from fedtune.simulations.simulate import simulate
from fedtune.wire import WITHHELD, Task, Update, from_record, to_record
from tests.simulations.apps import adapter_bytes, run_here, texts, write_rows
from tests.simulations.private_runs import CLIENT, EXAMPLE, client_run, example_run

ADD = Relation.ADD_OR_REMOVE_ONE


@pytest.fixture(scope="module")
def example(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_here(example_run(tmp_path_factory.mktemp("example"), shared))


@pytest.fixture(scope="module")
def central(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_here(client_run(tmp_path_factory.mktemp("client"), shared))


def extract_of(folder: RunFolder) -> dict[str, Any]:
    return dict(json.loads((folder.path / "ledger.json").read_text()))


def test_every_step_of_every_client_is_charged_to_its_own_account(example: RunFolder) -> None:
    config = example.config()
    ledger = open_ledger(ledger_place(config))
    event = PoissonGaussian(4 / 12, 1.0)
    for client in range(4):
        account = ledger.account(f"stories/owner-{client}", Unit.EXAMPLE, ADD)
        assert ledger.groups(account) == {event: 2 * 2}
    assert len(extract_of(example)["accounts"]) == 4
    ledger.verify()


def test_every_round_of_a_client_level_run_is_charged_once(central: RunFolder) -> None:
    config = central.config()
    ledger = open_ledger(ledger_place(config))
    account = ledger.account("stories", Unit.CLIENT, ADD)
    assert ledger.groups(account) == {PoissonGaussian(0.5, 1.0): 2}


def test_a_promise_without_sampling_is_the_plain_gaussian(shared: Path, tmp_path: Path) -> None:
    config = client_run(
        tmp_path, shared, privacy__client=CLIENT | {"sampler": "everyone"}, federation__cohort=1.0
    )
    folder = run_here(config)
    account = open_ledger(ledger_place(config)).account("stories", Unit.CLIENT, ADD)
    assert open_ledger(ledger_place(config)).groups(account) == {Gaussian(1.0): 2}
    promise = client_promise(config)
    assert promise is not None
    assert promise.spent().epsilon == spent([Charge(Gaussian(1.0), 2)], 1e-3, ADD).epsilon
    assert len(folder.client_rows()) == 2 * 4


def test_both_units_at_once_are_two_statements(shared: Path, tmp_path: Path) -> None:
    folder = run_here(example_run(tmp_path, shared, privacy__client=CLIENT, federation__cohort=0.5))
    units = {account["unit"] for account in extract_of(folder)["accounts"]}
    assert units == {"example", "client"}


def test_the_same_insecure_seed_gives_the_same_bytes_on_another_engine(
    example: RunFolder, shared: Path, tmp_path: Path
) -> None:
    engine: dict[str, Any] = {"executor": "processes", "workers": 2}
    again = run_here(example_run(tmp_path, shared, engine=engine))
    assert again.job() != example.job()
    assert adapter_bytes(again) == adapter_bytes(example)


@pytest.mark.parametrize("clip", ["per-adapter", "automatic", "quantile"])
def test_every_clipping_rule_runs_and_costs_the_same(
    clip: str, shared: Path, tmp_path: Path
) -> None:
    config = example_run(
        tmp_path, shared, privacy__example=EXAMPLE | {"clip": clip}, federation__rounds=2
    )
    folder = run_here(config)
    ledger = open_ledger(ledger_place(config))
    account = ledger.account("stories/owner-0", Unit.EXAMPLE, ADD)
    assert ledger.groups(account) == {PoissonGaussian(4 / 12, 1.0): 4}
    norms = [row["norms"] for row in folder.decisions()["000000"]]
    assert len(norms) == 4
    assert any(one != norms[0] for one in norms) == (clip == "quantile")
    home = folder.clients / "000000"
    left, _ = read_tensors(max(home.glob("policy-*.safetensors")))
    assert bool(left) == (clip == "quantile")


def test_the_quantile_rule_moves_the_norm_of_client_updates(shared: Path, tmp_path: Path) -> None:
    settings = CLIENT | {"clip": "quantile", "clip_norm": 0.05, "noise_multiplier": 0.3}
    folder = run_here(client_run(tmp_path, shared, privacy__client=settings, federation__rounds=3))
    state, _ = read_tensors(max(folder.checkpoints.glob("*.safetensors")))
    told = [row["norms"] for row in folder.decisions()[""]]
    assert told[0] == [0.05]
    assert len({norm for (norm,) in told}) == 3
    (norm,) = (value for name, value in state.items() if name.startswith("policy:"))
    assert float(norm.reshape(())) not in {norm for (norm,) in told}


def test_v14_a_cohort_of_nobody_is_a_round_of_pure_noise(shared: Path, tmp_path: Path) -> None:
    config = client_run(tmp_path, shared, federation__cohort=1e-6, federation__rounds=3)
    folder = run_here(config)
    rows = folder.metrics()[1:]
    assert not folder.client_rows()
    assert all(row["update_norm"] > 0 for row in rows)


def test_a_client_without_rows_still_releases_noise(shared: Path, tmp_path: Path) -> None:
    rows = [{"client": f"owner-{c}", "text": text} for c in range(3) for text in texts(c, 12)]
    rows += [{"client": "owner-3", "text": ""} for _ in range(3)]
    write_rows(tmp_path / "rows.jsonl", rows)
    folder = run_here(example_run(tmp_path, shared, federation__rounds=1))
    assert folder.metrics()[1]["clients_ok"] == 4


def test_v22_only_released_tensors_change(example: RunFolder) -> None:
    first, last = (
        load_file(path) for path in sorted(example.checkpoints.glob("*.safetensors"))[-2:]
    )
    assert first.keys() == last.keys()
    assert all(name.startswith("model:") and ".lora_" in name for name in last)


def test_v23_checkpoints_hold_the_released_model_and_nothing_else(central: RunFolder) -> None:
    for path in central.checkpoints.glob("*.safetensors"):
        assert {name.partition(":")[0] for name in load_file(path)} == {"model"}


def test_v24_no_figure_on_private_rows_is_written_or_sent(
    example: RunFolder, central: RunFolder
) -> None:
    figures = {"train_loss", "loss", "accuracy", "perplexity", "client_worst", "client_mean",
               "aggregation_error", "examples", "truncated", "steps"}  # fmt: skip
    drawn = {"clients_ok", "clients_failed", "clients_late", "bytes_down", "bytes_up"}
    assert not any(drawn & row.keys() for row in central.metrics())
    for folder in (example, central):
        rows = [row for row in folder.metrics() if row["round"]]
        told = {name for row in [*rows, *folder.client_rows()] for name in row}
        # The product of factors is post-processing of what example-level clients released.
        allowed = {"aggregation_error"} if folder is example else set()
        assert not (told & figures) - allowed
        card = (folder.adapter / "README.md").read_text()
        assert "perplexity" not in card


def test_v24_a_client_sends_no_figures_and_refuses_to_evaluate(
    shared: Path, tmp_path: Path
) -> None:
    config = example_run(tmp_path, shared)
    app = make_client_app(config, tmp_path / "home")
    context = Context(1, 1, {"partition-id": 0}, RecordDict(), {})
    start = load_tuned(config, ()).start().tensors()
    asked = Message(to_record(Task(1, 0, 0, 0.01, start, "job")), 1, "train")
    update = from_record(Update, app(asked, context).content)
    told = (update.examples, update.steps, update.truncated, update.loss)
    assert told == (1, 0, 0, WITHHELD)
    with pytest.raises(FedtuneError):
        app(Message(to_record(Task(1, 0, 0, 0.0, start, "job")), 1, "evaluate"), context)
    replayed = Message(to_record(Task(1, 0, 0, 0.01, start, "job")), 1, "train")
    with pytest.raises(FedtuneError) as refused:
        app(replayed, context)
    assert "stays there" in str(refused.value) or "attempt" in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"federation__weighting": "examples"}, "weighting"),
        ({"evaluation__clients": -1}, "evaluation.clients"),
        ({"data__holdout": 0.1}, "holdout"),
        ({"data__pack": True}, "pack"),
        ({"data__max_rows": 5}, "max_rows"),
        ({"tuning__dropout": 0.1}, "dropout"),
        ({"data__eval": "rows.jsonl"}, "data.eval"),
        ({"data__eval": "./rows.jsonl"}, "data.eval"),
        ({"privacy__example": EXAMPLE | {"delta": 0.2}}, "delta"),
        ({"privacy__example": {k: v for k, v in EXAMPLE.items() if k != "relation"}}, "relation"),
        ({"privacy__example": EXAMPLE | {"relation": "replace-one"}}, "relation"),
        ({"privacy__example": EXAMPLE | {"noise_multiplier": 0.0}}, "epsilon"),
        ({"privacy__example": EXAMPLE | {"epsilon": 0.1}}, "costs epsilon"),
        ({"privacy__example": EXAMPLE | {"epsilo": 1}}, "did you mean"),
    ],
)
def test_v25_v32_settings_that_break_a_promise_are_refused(
    changes: dict[str, Any], word: str, shared: Path, tmp_path: Path
) -> None:
    from fedtune.privacy.plan import resolve

    with pytest.raises(FedtuneError) as refused:
        resolve(example_run(tmp_path, shared, **changes))
    assert word in str(refused.value)
    assert refused.value.code in {ExitCode.CONFIG, ExitCode.PRIVACY}


def test_v26_who_does_not_answer_changes_neither_noise_nor_denominator(
    shared: Path, tmp_path: Path
) -> None:
    config = client_run(tmp_path, shared)
    keeper = open_central(config, "job")
    assert keeper is not None
    adapter = {"w": np.zeros(3, np.float32)}
    update = {"w": np.array([0.3, 0.0, 0.0], np.float32)}
    policy = keeper.policy(adapter, {}, None)
    quiet = [keeper.sum(adapter, policy, 1) for _ in range(2)]
    for _ in range(2):
        quiet[0].add(1.0, update)
    quiet[1].add(1.0, update)
    sums = [one._collected.sums["w"][0] for one in quiet]
    assert sums[0] == 2 * sums[1] > 0
    assert keeper.promise.mechanism.denominator == 0.5 * 4
    blocks = keeper.promise.blocks(("w",), 1.0)
    assert blocks[0].sigma == 1.0


def test_a_client_refuses_a_plan_beyond_its_owners_cap(shared: Path, tmp_path: Path) -> None:
    config = example_run(tmp_path, shared)
    ledger = open_ledger(ledger_place(config))
    for client in range(4):
        account = ledger.account(f"stories/owner-{client}", Unit.EXAMPLE, ADD)
        ledger.set_budget(account, 0.5, 1e-3, actor="owner", note="little")
    with pytest.raises(FedtuneError) as refused:
        run_here(config)
    assert refused.value.code == ExitCode.BUDGET_EXHAUSTED
    assert all(not ledger.groups(account) for account in ledger.accounts())


def test_an_exhausted_client_level_budget_stops_before_the_round(
    shared: Path, tmp_path: Path
) -> None:
    config = client_run(tmp_path, shared, federation__rounds=6)
    promise = client_promise(config)
    assert promise is not None
    ledger = open_ledger(ledger_place(config))
    account = ledger.account("stories", Unit.CLIENT, ADD)
    ledger.set_budget(account, promise.spent(3).epsilon + 1e-6, 1e-3, actor="owner", note="small")
    with pytest.raises(FedtuneError) as refused:
        run_here(config)
    assert refused.value.code == ExitCode.BUDGET_EXHAUSTED
    assert sum(ledger.groups(account).values()) == 3


def test_a_second_job_goes_on_where_the_first_one_stopped(shared: Path, tmp_path: Path) -> None:
    config = client_run(tmp_path, shared)
    for _ in range(2):
        run_here(config)
    ledger = open_ledger(ledger_place(config))
    account = ledger.account("stories", Unit.CLIENT, ADD)
    assert sum(ledger.groups(account).values()) == 4
    assert len(ledger.jobs(account)) == 2


def test_v29_a_run_goes_on_with_its_own_ledger_or_not_at_all(shared: Path, tmp_path: Path) -> None:
    config = client_run(tmp_path, shared)
    folder = run_here(config)
    elsewhere = config.privacy.model_copy(update={"ledger": str(tmp_path / "other.db")})
    simulate(config.model_copy(update={"privacy": elsewhere}), folder, lambda _: None)
    assert not (tmp_path / "other.db").exists()
    Path(ledger_place(config)).unlink()
    with pytest.raises(FedtuneError) as refused:
        simulate(config, folder, lambda _: None)
    assert refused.value.code == ExitCode.LEDGER


def test_v29_a_server_that_renames_its_job_gets_no_second_budget(
    shared: Path, tmp_path: Path
) -> None:
    config = example_run(tmp_path, shared)
    worker = Worker(config, tmp_path / "clients")
    start = load_tuned(config, ()).start().tensors()
    worker.train(0, Task(1, 0, 0, 0.01, start, "job"))
    for task in (Task(1, 0, 0, 0.01, start, "other"), Task(99, 0, 0, 0.01, start, "job")):
        with pytest.raises(FedtuneError) as refused:
            worker.train(0, task)
        assert refused.value.code == ExitCode.BUDGET_EXHAUSTED


def test_who_fails_changes_no_client_level_round(shared: Path, tmp_path: Path) -> None:
    rows_ = [{"client": f"owner-{c}", "text": text} for c in range(3) for text in texts(c, 12)]
    write_rows(tmp_path / "rows.jsonl", rows_)
    config = client_run(tmp_path, shared, tuning__lr=1e30, federation__quorum=1.0)
    folder = run_here(config)
    assert [row["round"] for row in folder.metrics()] == [0, 1, 2]
    account = open_ledger(ledger_place(config)).account("stories", Unit.CLIENT, ADD)
    assert sum(open_ledger(ledger_place(config)).groups(account).values()) == 2


def test_a_run_that_its_budget_stops_leaves_a_statement(shared: Path, tmp_path: Path) -> None:
    config = client_run(tmp_path, shared, federation__rounds=6)
    promise = client_promise(config)
    assert promise is not None
    ledger = open_ledger(ledger_place(config))
    account = ledger.account("stories", Unit.CLIENT, ADD)
    ledger.set_budget(account, promise.spent(2).epsilon + 1e-6, 1e-3, actor="owner", note="small")
    folder = create(config)
    with pytest.raises(FedtuneError):
        simulate(config, folder, lambda _: None)
    facts = json.loads((folder.path / "privacy_facts.json").read_text())
    assert (facts["ended"], facts["mechanisms"][0]["rounds"]) == ("budget-exhausted", 2)


def test_v40_the_words_of_a_failure_stay_with_the_client(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "the patient is called Rumpelstiltskin"
    write_rows(tmp_path / "rows.jsonl", [{"client": "a", "text": secret} for _ in range(8)])
    config = example_run(tmp_path, shared)

    def broken(*_: Any, **__: Any) -> None:
        raise ValueError(f"cannot tokenise {secret!r}")

    monkeypatch.setattr("fedtune.client.worker.encode", broken)
    heard: list[Any] = []
    folder = create(config)
    with pytest.raises(FedtuneError) as failed:
        simulate(config, folder, heard.append)
    everything = f"{failed.value} {failed.value.hint} {heard} {folder.client_rows()}"
    assert "what happened stays there" in everything
    assert "Rumpelstiltskin" not in everything
    assert "Rumpelstiltskin" in (folder.clients / "000000" / "errors.log").read_text()


def test_the_printed_epsilon_is_that_of_stock_dp_accounting(example: RunFolder) -> None:
    import dp_accounting as dp
    from dp_accounting import pld, rdp

    found = math.inf
    account = extract_of(example)["accounts"][0]
    for kind in (pld.PLDAccountant, rdp.RdpAccountant):
        accountant = kind()
        for group in account["groups"]:
            event = dp.PoissonSampledDpEvent(
                group["event"]["sampling_probability"],
                dp.GaussianDpEvent(group["event"]["noise_multiplier"]),
            )
            accountant.compose(event, group["count"])
        found = min(found, accountant.get_epsilon(1e-3))
    promise = example_promise(example.config())
    assert promise is not None
    assert promise.spent().epsilon == pytest.approx(found, rel=1e-4)


def test_planning_says_noise_curve_and_rounds(shared: Path, tmp_path: Path) -> None:
    from fedtune.simulations.plan import describe, plan

    made = plan(
        example_run(
            tmp_path, shared, privacy__example=EXAMPLE | {"noise_multiplier": 0.0, "epsilon": 4.0}
        )
    )  # fmt: skip
    (one,) = made["privacy"]
    assert one["epsilon"] <= 4.0 < one["epsilon_without_amplification"]
    assert one["rounds_that_fit"] >= made["rounds"]
    epsilons = [epsilon for _, epsilon in one["curve"]]
    assert epsilons == sorted(epsilons)
    assert epsilons[-1] == pytest.approx(one["epsilon"])
    assert "epsilon" in describe(made)
