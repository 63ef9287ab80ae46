"""The RLDP benchmark compares like with like, and goes on where it stopped."""

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.config import DataConfig, ModelConfig
from fedtune.data import batches, encode
from fedtune.data.row import Row
from fedtune.models import load_base
from fedtune.privacy.accounting import spent
from fedtune.privacy.events import Charge, Relation
from fedtune.privacy.per_example import example_losses
from fedtune.simulations.benchmarks import rldp, rldp_leak, rldp_report
from fedtune.simulations.benchmarks.rldp_arms import ARMS, Paired, Run, mechanism_of, run
from fedtune.simulations.benchmarks.rldp_tasks import Loaded, Spec, load_task

WORDS = ("def", "return", "value", "name", "for", "in", "range", "self", "import", "os", "list")


def _rows() -> tuple[list[Row], list[Row], list[Row], list[Row]]:
    random = np.random.default_rng(0)
    rows = [{"text": " ".join(random.choice(WORDS, 8))} for _ in range(60)]
    return rows[:40], rows[40:46], rows[46:54], rows[54:]


SPEC = Spec(
    "small", ModelConfig(base="fedtune:tiny"), _rows, 10, ("q_proj", "v_proj"), 1, 8, 8, 3,
    (1e-3, 1e-2),
)  # fmt: skip


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("rldp")
    (folder / "noise.jsonl").write_text(json.dumps(["8 1e-05 0.2 3", 0.9]) + "\n")
    yield load_task(SPEC, folder)
    torch.set_num_threads(before)


def test_stored_states_give_the_losses_of_the_whole_model(task: Loaded) -> None:
    base = load_base(SPEC.model)
    data = DataConfig(pack=False, holdout=0.0, max_length=SPEC.length)
    whole = encode(_rows()[2], base.tokenizer, data)
    one = next(batches(whole, [3, 0, 7], 4, base.pad_id, "causal-lm"))
    other = next(batches(task.test, [3, 0, 7], 4, task.base.pad_id, "causal-lm"))
    with torch.no_grad():
        expected = example_losses(base.model, one, "causal-lm")
        found = example_losses(task.base.model, other, "causal-lm")
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def test_the_same_seed_has_the_same_coins_and_noise_whatever_a_policy_used() -> None:
    one, other, third = Paired(5), Paired(5), Paired(6)
    assert (one.uniform(20) == other.uniform(20)).all()
    assert (one.normal(4) == other.normal(4)).all()
    one.normal(100)
    one.normal(1)
    assert (one.uniform(20) == other.uniform(20)).all()
    assert (one.normal(4) == other.normal(4)).all()
    third.uniform(20)
    assert (third.uniform(20) != Paired(5).uniform(20)).all()
    assert (one.normal(4) != other.uniform(4)).all()


def test_noise_keeps_epsilon_and_is_kept(task: Loaded) -> None:
    mechanism = mechanism_of(task, 4.0, 5)
    bound = spent([Charge(mechanism.event, 5)], SPEC.delta, Relation.ADD_OR_REMOVE_ONE)
    assert 3.9 < bound.epsilon <= 4.0
    assert "4 1e-05 0.2 5" in (task.folder / "noise.jsonl").read_text()


def test_a_run_repeats_itself_and_policies_differ(task: Loaded) -> None:
    asked = Run(ARMS["fixed-flat"], 8.0, 1, 1e-2)
    first, again = run(task, asked, curve=4), run(task, asked, curve=4)
    for row in (first, again):
        del row["seconds"], row["controller"], row["noting"]
    assert first == again
    assert first["z"] == 0.9
    assert [point[0] for point in first["curve"]] == [0, 1, 2, 3]
    tight = run(task, replace(asked, clip_norm=1e-3), curve=4)
    assert tight["decisions"][0]["norms"] == [1e-3]
    assert run(task, replace(asked, seed=2), curve=4)["loss"] != first["loss"]


@pytest.mark.parametrize("arm", [a for a in ARMS if a not in ("constant", "non-private")])
def test_every_policy_runs(task: Loaded, arm: str) -> None:
    row = run(task, Run(ARMS[arm], 8.0, 0, 1e-2), curve=2)
    assert math.isfinite(row["loss"])
    assert row["curve"][0][1] != row["curve"][-1][1]
    assert row["state_bytes"] < 5e6


def test_a_constant_action_is_that_of_other_seeds(tmp_path: Path) -> None:
    cell = rldp.Cell("run", "e2e-stories", "constant", 2.0, 0)
    results = rldp.Results(tmp_path / "none")
    tuned = rldp.tuning("e2e-stories", "rldp-online")
    results.rows = [_row(c, loss=2.0 + c.lr, lr=c.lr, clip_norm=1.0) for c in tuned]
    assert rldp.asked_of(cell, results) is None
    for seed, action in ((0, 9.0), (1, 0.5), (2, 0.1)):
        other = rldp.Cell("run", "e2e-stories", "rldp-online", 2.0, seed)
        results.rows.append(_row(other, seed=seed, mean_action=[action]))
    asked = rldp.asked_of(cell, results)
    assert asked is not None
    assert asked.constant == (0.3,)
    assert asked.lr == min(c.lr for c in tuned)


def test_what_is_needed_least_comes_last() -> None:
    cells = rldp.plan(["e2e-stories", "sst2-minilm"], list(ARMS), (2.0, 8.0), 2)
    assert len({cell.key for cell in cells}) == len(cells)
    runs = [cell for cell in cells if cell.kind == "run"]
    assert [c.epsilon for c in runs if c.epsilon] == sorted(c.epsilon for c in runs if c.epsilon)
    early = [c.seed for c in runs if c.epsilon == 2.0 and c.arm == "geoclip"]
    assert early == [0, 0, 1, 1]
    places = {arm: [i for i, c in enumerate(runs) if c.arm == arm and c.epsilon == 2.0]
              for arm in ("rldp-online", "constant", "sensing-0.1")}  # fmt: skip
    for one, other in itertools.pairwise(places.values()):
        assert max(one) < min(other)
    assert {c.task for c in runs if c.arm == "sensing-0.1"} == {"e2e-stories"}
    assert sum(c.arm == "non-private" for c in runs) == 4
    for cell in runs:
        before = cells[: cells.index(cell)]
        assert {c.key for c in rldp.tuning(cell.task, cell.arm)} <= {c.key for c in before}


def test_settings_are_chosen_when_all_are_there_and_a_lost_run_never_is(tmp_path: Path) -> None:
    cells = rldp.tuning("e2e-stories", "fixed-flat")
    assert len({(c.lr, c.clip_norm) for c in cells}) == 12
    losses = [3.0, math.nan, 2.5, *([4.0] * 9)]
    rows = [_row(c, loss=loss, lr=c.lr, clip_norm=c.clip_norm)
            for c, loss in zip(cells, losses, strict=True)]  # fmt: skip
    results = rldp.Results(tmp_path / "none")
    results.rows = rows[:-1]
    assert rldp.chosen(results, "e2e-stories", "fixed-flat") is None
    results.rows = rows
    assert rldp.chosen(results, "e2e-stories", "fixed-flat") == (cells[2].lr, cells[2].clip_norm)


def test_a_stopped_grid_goes_on(
    task: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rldp, "specs", lambda: {"small": SPEC})
    monkeypatch.setattr(rldp, "TUNED_AT", 8.0)
    (tmp_path / "noise.jsonl").write_text((task.folder / "noise.jsonl").read_text())
    cells = rldp.plan(["small"], ["quantile-flat", "non-private"], (8.0,), 1)
    assert len(cells) == 6
    file = tmp_path / "results.jsonl"
    rldp.work(cells[:3], tmp_path, file, None, math.inf, 0)
    before = file.read_text()
    assert before.count("\n") == 3
    file.write_text(before + '{"key": ["half')  # as a killed process leaves it
    results = rldp.Results(file)
    results.update()
    assert len(results.rows) == 3
    file.write_text(before)
    rldp.work(cells, tmp_path, file, None, math.inf, 0)
    after = file.read_text()
    assert after.startswith(before)
    assert after.count("\n") == 6
    rldp.work(cells, tmp_path, file, None, math.inf, 0)
    assert file.read_text() == after
    rldp.finish(file, tmp_path)
    assert "quantile, flat" in (tmp_path / "rldp.md").read_text()
    assert (tmp_path / "rldp-loss.png").stat().st_size > 1000


def _row(cell: rldp.Cell, **named: Any) -> dict[str, Any]:
    return {"key": list(cell.key), "task": cell.task, "arm": cell.arm, **named}


def _runs(losses: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [
        {"task": "e2e-stories", "epsilon": 2.0, "arm": arm, "seed": seed, "loss": loss,
         "lr": 0.1, "clip_norm": 1.0, "curve": [[0, 4.0], [10, loss]]}
        for arm, values in losses.items() for seed, loss in enumerate(values)
    ]  # fmt: skip


def test_differences_are_of_pairs_and_bold_when_clear_of_zero() -> None:
    common = [3.0, 3.5, 2.8, 3.2, 3.1]
    near = [c + d for c, d in zip(common, (0.01, -0.01, 0.012, -0.012, 0.001), strict=True)]
    rows = _runs({
        "fixed-flat": common, "geoclip": near,
        "rldp-meta": [c - 0.1 - 0.001 * i for i, c in enumerate(common)],
    })  # fmt: skip
    mean, low, high = rldp_report.paired(rows, "rldp-meta", "fixed-flat")
    assert mean == pytest.approx(-0.102)
    assert -0.104 <= low < mean < high <= -0.1
    text = rldp_report.markdown(rows)
    assert "**-0.1020 [" in text
    (line,) = [one for one in text.splitlines() if one.startswith("| GeoClip") and "+0." in one]
    assert "**" not in line
    found = rldp_report.gain(rows, "rldp-meta")
    assert found is not None
    assert found[1][0] == pytest.approx(100 * (1 - math.exp(-0.102)), rel=0.02)
    assert found[2] == "fixed-flat" or found[2] == "geoclip"
    json.dumps(rldp_report.summary(rows), allow_nan=False)


def test_attacks_find_what_a_run_without_privacy_learnt_by_heart(tmp_path: Path) -> None:
    spec = replace(SPEC, blocks=0, lrs=(2e-2,), steps=40)
    there = rldp_leak.scene(
        load_task(spec, tmp_path), 0, members=12, others=20, canaries=2, candidates=60
    )
    assert len(there.task.train.ids) == 12 + 2 + 16
    found = rldp_leak.attack(there, Run(ARMS["non-private"], math.inf, 0, 2e-2), 40)
    assert found["auc"] > 0.7
    assert found["often"] > 4.0
    nothing = rldp_leak.attack(there, Run(ARMS["non-private"], math.inf, 0, 1e-9), 2)
    assert 0.2 < nothing["auc"] < 0.8
    assert nothing["often"] < found["often"]
