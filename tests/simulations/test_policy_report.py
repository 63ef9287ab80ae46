"""A private run from its plan to its report: what the clipping policy chose is in all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedtune.privacy.report import build
from fedtune.privacy.report_model import Report
from fedtune.privacy.statement import read_extract, read_facts
from fedtune.server.run_folder import RunFolder
from fedtune.simulations.plan import describe, plan
from tests.simulations.apps import run_here
from tests.simulations.private_runs import CLIENT, EXAMPLE, client_run, example_run, privacy_json


def report_of(folder: RunFolder) -> Report:
    facts = read_facts(folder.path / "privacy_facts.json")
    extract = read_extract(folder.path / "ledger.json")
    return build(facts, extract, details=False, decisions=folder.decisions())


@pytest.fixture(scope="module")
def example(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    # The first runs of a controller are its warm-up; here it decides from the second step on.
    rldp = {"mode": "online", "warmup": 0.0, "interval": 1, "reward": "held-out", "held_out": 0.4}
    changes = {"clip": "rldp", "rldp": rldp}
    folder = tmp_path_factory.mktemp("example")
    return run_here(example_run(folder, shared, privacy__example=EXAMPLE | changes))


@pytest.fixture(scope="module")
def central(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("client")
    changes = {"clip": "quantile-per-adapter"}
    return run_here(client_run(folder, shared, privacy__client=CLIENT | changes))


def test_the_report_has_what_every_client_logged(example: RunFolder) -> None:
    (chapter,) = report_of(example).chapters
    logged = example.decisions()
    choices = chapter.choices
    assert choices is not None
    assert choices.clients == len(choices.courses) == len(logged) == 4
    decided = 0
    for course, rows in zip(choices.courses, logged.values(), strict=True):
        assert [row.step for row in course.rows] == [row["step"] for row in rows]
        for one, row in zip(course.rows, rows, strict=True):
            assert one.norms == pytest.approx(row["norms"], rel=1e-5)
            decided += one.decision is not None
            assert list(one.action) == row.get("action", [])
    (planned,) = plan(example.config())["privacy"]
    assert decided == 4 * planned["policy"]["decisions"] > 0
    assert len(choices.blocks) == planned["policy"]["blocks"]


def test_facts_say_what_the_sensors_took(example: RunFolder) -> None:
    facts = read_facts(example.path / "privacy_facts.json")
    (ran,) = facts.mechanisms
    assert any(text.startswith("what the clipping policy chose") for text in facts.covered)
    policy = ran.clip.policy
    assert policy is not None
    assert (policy.mode, policy.reward, policy.noise) == ("online", "held-out", "constant")
    assert (policy.bits, policy.loss, policy.held_out) == (0.01, 0.0, 0.4)
    assert sum(norm**2 for norm in ran.clip.blocks.values()) == pytest.approx(1.0)
    (statement,) = privacy_json(example)["statements"]
    assert statement["clip"]["rule"] == "rldp"
    assert statement["clip"]["policy"]["bits"] == 0.01


def test_at_client_level_the_servers_own_choices_are_there(central: RunFolder) -> None:
    (chapter,) = report_of(central).chapters
    (rows,) = (rows for client, rows in central.decisions().items() if not client)
    choices = chapter.choices
    assert choices is not None
    assert choices.clients == 0
    (course,) = choices.courses
    assert len(course.rows) == len(rows) == central.config().federation.rounds
    assert len({row.norms for row in course.rows}) > 1, "the quantile rule moved them"
    assert len(choices.blocks) == len(rows[0]["norms"]) > 1


def test_the_plan_of_the_run_names_policy_and_price(example: RunFolder) -> None:
    text = describe(plan(example.config()))
    assert "rldp (online, reward held-out)" in text
    assert "1% of the privacy of each step: 0.50% more gradient noise" in text
    assert "the loss of 40% of the rows, which train nothing" in text


def test_a_torn_log_is_no_lost_report(example: RunFolder, tmp_path: Path) -> None:
    copied = RunFolder(tmp_path)
    for name in ("privacy_facts.json", "ledger.json"):
        (tmp_path / name).write_bytes((example.path / name).read_bytes())
    home = tmp_path / "clients" / "000000"
    home.mkdir(parents=True)
    (row, *_) = example.decisions()["000000"]
    (home / "decisions.jsonl").write_text(f"{json.dumps(row)}\n" + '{"round": 2, "st')
    (chapter,) = report_of(copied).chapters
    assert chapter.choices is not None
    assert [len(course.rows) for course in chapter.choices.courses] == [1]
