"""The second reader: the server that runs the body, against whom nothing is ever promised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli.out import Out
from fedtune.cli.report import make
from fedtune.config import Config
from fedtune.privacy.facts import Facts
from fedtune.privacy.report import build, card_lines, summary
from fedtune.privacy.report_ledger import Extract
from fedtune.privacy.report_pdf import as_pdf
from fedtune.privacy.report_render import as_html, as_markdown, sealed
from fedtune.privacy.server_view import Crossing, crossing_of, server_view
from fedtune.privacy.signing import Signer, read_signer
from fedtune.server.disclose import disclose, statement_of
from fedtune.server.run_folder import create
from fedtune.server.tuned import load_tuned
from tests.privacy import report_runs as runs

OPEN = "The server that runs the body can reconstruct the text, and labels from gradients"


def config(split: dict[str, Any] | None = None, **tables: dict[str, Any]) -> Config:
    tuning = {
        "adapter": "prompt", "method": "sfprompt", "tokens": 3, "batch_size": 4,
        "split": {"keep": 1.0} | (split or {}),
    }  # fmt: skip
    return Config.model_validate({"tuning": tuning} | tables)


@pytest.mark.parametrize("noise", [0.0, 0.01, 1.38, 1e6])
def test_nothing_is_promised_whatever_the_noise(noise: float) -> None:
    """Records repeat and carry others; no ledger counts them (docs/split.md)."""
    view = server_view(crossing_of(config({"noise": noise})))
    assert view.differential_privacy is False
    assert "nothing is promised" in view.statement
    assert "\u03b5" not in view.statement + " ".join(view.remember)
    assert not any("epsilon" in text for text in (view.statement, *view.remember))
    assert "audit --attack inversion" in view.remember[0]


def test_noise_is_named_and_never_said_to_stop_reconstruction() -> None:
    view = server_view(crossing_of(config({"noise": 2.5, "clip": 3.0})))
    assert "2.5 times the clip norm 3" in view.statement
    assert "may still reconstruct" in view.statement


def test_held_out_text_that_crosses_is_said() -> None:
    told = server_view(crossing_of(config())).remember
    quiet = server_view(crossing_of(config(evaluation={"clients": 0}))).remember
    assert len(told) == len(quiet) + 1


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("key")))
    patch.delenv("FEDTUNE_SIGNING_KEY", raising=False)
    found = read_signer(None, lambda _: None)
    patch.undo()
    return found


def empty(facts: Facts) -> Extract:
    return Extract.model_validate({"schema": 1, "job": facts.job, "accounts": []})


@pytest.mark.parametrize("noise", [0.0, 40.0])
def test_every_format_says_what_the_server_of_the_body_sees(signer: Signer, noise: float) -> None:
    facts = runs.facts("cut", crossing=Crossing(noise=noise))
    report = build(facts, empty(facts), details=False)
    view = server_view(Crossing(noise=noise))
    assert report.server_view == view
    envelope = sealed(report, signer)
    page, text = as_html(envelope, signer).decode(), as_markdown(envelope).decode()
    for made in (page, text):
        assert "What the server of the body sees" in made
    first = view.statement.split(";")[0].split(":")[0]
    assert page.count(first) >= 2  # the red note at the top, and the section
    assert as_pdf(envelope).startswith(b"%PDF")
    level = next(note.level for note in report.notes if note.text == view.statement)
    assert level == "danger"
    machine = json.loads(json.dumps(summary(report)))
    assert machine["server_view"]["differential_privacy"] is False
    assert "epsilon" not in machine["server_view"]
    assert machine["differential_privacy"] is False  # the two ledgers are never mixed
    told = [line for line in card_lines(report) if "server that runs the body" in line]
    assert len(told) == 1


def test_a_whole_model_has_no_such_section(signer: Signer) -> None:
    facts = runs.facts("whole")
    report = build(facts, empty(facts), details=False)
    assert report.server_view is None
    assert "server_view" not in summary(report)
    envelope = sealed(report, signer)
    assert b"server of the body" not in as_html(envelope, signer) + as_markdown(envelope)


def test_the_statement_on_examples_leaves_out_the_server_of_the_body(tmp_path: Path) -> None:
    run = runs.example_run(tmp_path)
    whole = build(run.facts, run.extract, details=False)
    cut_facts = run.facts.model_copy(update={"crossing": Crossing()})
    cut = build(cut_facts, run.extract, details=False)
    before, after = whole.chapters[0], cut.chapters[0]
    assert "the server" in before.bounded_for
    assert "the server" not in after.bounded_for
    assert not any(who.startswith("whoever reads messages") for who in after.bounded_for)
    assert any("runs the body" in who for who in after.unbounded_for)
    assert "what leaves any one client in" in before.statement.formal
    assert "what leaves any one client to be aggregated in" in after.statement.formal
    assert "the one that runs the body must be" in after.model
    assert before.statement.epsilon == after.statement.epsilon


def test_a_split_run_without_a_promise_still_has_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "key"))
    settings = config(output={"folder": str(tmp_path)})
    tuned, folder = load_tuned(settings, ()), create(settings)
    folder.append({"round": 1}, [{"round": 1, "client": "a", "examples": 7}])
    disclose(tuned, folder)
    facts = Facts.model_validate_json((folder.path / "privacy_facts.json").read_bytes())
    assert facts.crossing == crossing_of(settings)
    assert facts.metrics == "not-private"
    machine, told = statement_of(folder)
    assert machine["differential_privacy"] is False
    assert machine["server_view"]["statement"].startswith(OPEN)
    assert told == []
    make(Out("report", True), folder.path, "md", None, None)
    assert OPEN in (folder.path / "report.md").read_text().replace("\\'", "'")
