"""The second ledger: what is promised against the server that runs the body, and what is not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli.out import Out
from fedtune.cli.report import make
from fedtune.config import Config
from fedtune.privacy.cut_noise import server_view_epsilon
from fedtune.privacy.events import Unit
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
from tests.split.test_noise import exact

OPEN = "The server that runs the body can reconstruct the text, and labels from gradients"
SENT = {"forwards": 3, "gradients": 3, "records": 600, "examples": 100, "delta": 1e-5}


def crossing(**changes: Any) -> Crossing:
    return Crossing(**(SENT | {"noise": 40.0} | changes))


# ---------------------------------------------------------------- the bound


def test_without_noise_nothing_is_promised_in_plain_words() -> None:
    view = server_view(crossing(noise=0.0))
    assert not view.differential_privacy
    assert (view.unit, view.epsilon) == (None, None)
    assert view.statement == f"{OPEN}; nothing is promised against it."
    assert any("fedtune audit --attack inversion" in text for text in view.remember)


def test_exact_steps_carry_an_example_into_all_records() -> None:
    """Prompts and tail learnt from x shape every other record: the whole client is the unit."""
    view = server_view(crossing())
    assert (view.unit, view.releases) == (Unit.CLIENT, 600)
    assert view.epsilon == pytest.approx(exact(40.0, 600, 1e-5), rel=1e-3)
    assert view.epsilon > 3 * server_view_epsilon(40.0, 6, 1e-5)  # not that of its own records


def test_private_steps_bound_one_example_together_with_its_own_records() -> None:
    view = server_view(crossing(private_steps=50, step_noise=30.0))
    assert (view.unit, view.releases) == (Unit.EXAMPLE, 6)
    # Gaussians compose by the squares of 2 / z.
    mu = math.sqrt(6 * (2 / 40) ** 2 + 50 * (2 / 30) ** 2)
    assert view.epsilon == pytest.approx(exact(2 / mu, 1, 1e-5), rel=1e-3)


def test_prefixes_of_private_steps_may_be_seen() -> None:
    view = server_view(crossing(bare=True, private_steps=50, step_noise=30.0))
    assert view.unit is Unit.EXAMPLE


def test_equal_noise_in_steps_and_records_is_added_up() -> None:
    view = server_view(crossing(noise=30.0, private_steps=50, step_noise=30.0))
    assert view.epsilon == pytest.approx(exact(30.0, 56, 1e-5), rel=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"secure": False},
        {"chosen": "threshold"},
        {"chosen": "threshold", "private_steps": 50, "step_noise": 30.0},
        {"chosen": "top", "release": "once"},
        {"bare": True},
        {"chosen": "top", "release": "once", "private_steps": 50, "step_noise": 30.0},
    ],
)
def test_what_can_be_seen_or_taken_away_leaves_no_bound(changes: dict[str, Any]) -> None:
    view = server_view(crossing(**changes))
    assert not view.differential_privacy
    assert view.epsilon is None
    assert OPEN in view.statement
    assert view.statement != server_view(crossing(noise=0.0)).statement  # and it says why


@pytest.mark.parametrize("chosen", ["all", "random"])
def test_with_nothing_trained_before_the_cut_an_example_shows_in_its_own_records(
    chosen: str,
) -> None:
    given = {"learnt": False, "gradients": 0, "forwards": 1, "release": "once", "chosen": chosen}
    view = server_view(crossing(**given))
    assert (view.unit, view.releases) == (Unit.EXAMPLE, 1)
    assert view.epsilon == pytest.approx(exact(40.0, 1, 1e-5), rel=1e-3)
    steps = server_view(crossing(private_steps=50, step_noise=30.0, **given))
    assert steps.epsilon == view.epsilon  # what the tail learns never crosses


@pytest.mark.parametrize(
    "changes", [{}, {"learnt": False}, {"private_steps": 50, "step_noise": 30.0}]
)
def test_a_fixed_number_of_the_hardest_is_bounded_for_clients_only(changes: dict[str, Any]) -> None:
    view = server_view(crossing(chosen="top", **changes))
    assert view.unit is Unit.CLIENT
    assert any("hardest" in text for text in view.remember)


def test_a_large_epsilon_is_called_one() -> None:
    assert "says little" in server_view(crossing(noise=1.38)).statement
    assert "says little" not in server_view(crossing(noise=400.0)).statement


def test_noise_is_never_said_to_stop_reconstruction() -> None:
    for noise in (1.38, 40.0, 400.0):
        view = server_view(crossing(noise=noise))
        assert any("does not stop reconstruction" in text for text in view.remember)
        assert any("not added" in text for text in view.remember)


# ---------------------------------------------------------------- the counts


def config(split: dict[str, Any] | None = None, **changes: Any) -> Config:
    tuning = {"method": "sfprompt", "adapter": "sfprompt", "batch_size": 4, "epochs": 2.0}
    tuning |= {"split": {"head": 0} | (split or {})} | changes.pop("tuning", {})
    return Config.model_validate(
        {
            "name": "cut", "model": {"base": "fedtune:tiny"},
            "data": {"source": "fedtune:stdlib", "text": "text", "max_length": 32},
            "federation": {"rounds": 5}, "tuning": tuning,
        } | changes
    )  # fmt: skip


@pytest.mark.parametrize(
    ("split", "forwards", "gradients", "records", "chosen"),
    [
        ({"keep": 1.0}, 10, 10, 10 * 7 * 2, "all"),
        ({"keep": 0.5, "prune": "random"}, 10, 10, 10 * 4 * 2, "random"),
        ({"keep": 0.5}, 10, 10, 10 * 4 * 2, "top"),
        ({"threshold": 0.7}, 10, 10, 10 * 7 * 2, "threshold"),
        ({"keep": 1.0, "release": "once"}, 10, 10, 10 * 7 * 2, "all"),  # prompts change
    ],
)
def test_the_most_that_is_sent(
    split: dict[str, Any], forwards: int, gradients: int, records: int, chosen: str
) -> None:
    found = crossing_of(config(split), rounds=5, examples=7)
    assert (found.forwards, found.gradients, found.records) == (forwards, gradients, records)
    assert (found.chosen, found.private_steps, found.step_noise) == (chosen, 0, 0.0)
    assert found.delta * found.examples < 1


def test_what_stays_is_sent_once() -> None:
    split = {"release": "once", "keep": 0.5, "prune": "random"}
    found = crossing_of(config(split, tuning={"adapter": "lora"}), rounds=5, examples=7)
    # Each round keeps others: in the end all seven may have been sent.
    assert (found.forwards, found.gradients, found.records) == (1, 0, 7)


@pytest.mark.parametrize(
    ("changes", "learnt"),
    [({"adapter": "lora"}, False), ({"adapter": "prompt"}, True), ({"adapter": "prefix"}, True),
     ({"adapter": "lora", "split": {"head": 1, "adapt": "ends"}}, True)],
)  # fmt: skip
def test_gradients_cross_only_to_what_is_trained_before_the_cut(
    changes: dict[str, Any], learnt: bool
) -> None:
    found = crossing_of(config(tuning=changes), rounds=5, examples=8)
    assert found.learnt is learnt
    assert found.bare is (changes["adapter"] == "prefix")
    assert found.gradients == (10 if learnt else 0)
    assert found.records == 10 * 4 * (2 if learnt else 1)


def test_a_fixed_number_of_steps_is_as_many_passes_as_it_takes() -> None:
    found = crossing_of(config({"keep": 1.0}, tuning={"steps": 9}), rounds=2, examples=10)
    assert found.forwards == 2 * math.ceil(9 * 4 / 10)


def test_a_run_that_ended_before_its_first_round_sent_nothing() -> None:
    found = crossing_of(config({"noise": 1.0}), rounds=0, examples=0)
    assert (found.forwards, found.gradients, found.records) == (0, 0, 0)
    assert server_view(found).epsilon == 0.0


# ---------------------------------------------------------------- the report


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
    facts = runs.facts("cut", crossing=crossing(noise=noise))
    report = build(facts, empty(facts), details=False)
    view = server_view(crossing(noise=noise))
    assert report.server_view == view
    envelope = sealed(report, signer)
    page, text = as_html(envelope, signer).decode(), as_markdown(envelope).decode()
    for made in (page, text):
        assert "What the server of the body sees" in made
    first = view.statement.split(";")[0].split(":")[0].replace("'", "&#39;")
    assert page.count(first) >= 2  # the red note at the top, or the small one, and the section
    assert as_pdf(envelope).startswith(b"%PDF")
    level = next(note.level for note in report.notes if note.text == view.statement)
    assert level == ("danger" if noise == 0.0 else "caution")
    machine = json.loads(json.dumps(summary(report)))
    assert machine["server_view"]["differential_privacy"] is (noise > 0)
    assert machine["server_view"]["epsilon"] == view.epsilon
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
    cut_facts = run.facts.model_copy(update={"crossing": crossing()})
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
    assert facts.crossing == crossing_of(
        settings, 1, 7, source="secret-key-aes256-ctr", secure=True
    )
    assert facts.metrics == "not-private"
    machine, told = statement_of(folder)
    assert machine["differential_privacy"] is False
    assert machine["server_view"]["statement"].startswith(OPEN)
    assert told == []
    make(Out("report", True), folder.path, "md", None, None)
    assert OPEN in (folder.path / "report.md").read_text().replace("\\'", "'")
