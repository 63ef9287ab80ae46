"""What a report shows of a clipping policy: every decision, a picture, and nothing private."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.events import Unit
from fedtune.privacy.facts import Clip, Facts, Steering, ran_from
from fedtune.privacy.forecast_policy import begin, outline
from fedtune.privacy.plan import Promise
from fedtune.privacy.report import build, card_lines, summary
from fedtune.privacy.report_choices import ACTIONS, choices_of
from fedtune.privacy.report_choices_picture import choices_in_words, draw_choices, shown_choices
from fedtune.privacy.report_model import Report
from fedtune.privacy.report_pdf import as_pdf
from fedtune.privacy.report_render import as_html, as_json, as_markdown, sealed
from fedtune.privacy.rldp.actions import ACTIONS as NUMBERS
from fedtune.privacy.signing import Signer, read_signer, unseal
from tests.privacy import chosen
from tests.privacy import report_runs as runs
from tests.privacy.test_report import plain

ONLINE: dict[str, Any] = {"clip": "rldp", "rldp": {"mode": "online", "sensing": 0.04}}
Decisions = dict[str, list[dict[str, Any]]]


def clip_of(promise: Promise) -> Clip:
    """Return what the server writes into the facts of such a run."""
    shape, made = begin(promise, chosen.SIZES).shape(), outline(promise, chosen.SIZES)
    shares = {name: made[name] for name in ("mode", "reward", "bits", "loss", "held_out")}
    blocks = {", ".join(n): c for n, c in zip(shape.names, shape.norms, strict=True)}
    return Clip(
        rule=promise.settings.clip, norm=1.0, policy=Steering(**shares),
        blocks=blocks if len(blocks) > 1 else {},
    )  # fmt: skip


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("key")))
    patch.delenv("FEDTUNE_SIGNING_KEY", raising=False)
    found = read_signer(None, lambda _: None)
    patch.undo()
    return found


@pytest.fixture(scope="module")
def clip() -> Clip:
    return clip_of(chosen.example_of(**ONLINE))


@pytest.fixture(scope="module")
def logged() -> Decisions:
    """Two clients' own logs, of the controller itself."""
    promise = chosen.example_of(**ONLINE)
    return {f"{i:06d}": chosen.rows_of(promise, seed=i) for i in range(2)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, clip: Clip) -> runs.Run:
    found = runs.example_run(tmp_path_factory.mktemp("ledger"))
    return runs.Run(changed(found.facts, clip), found.extract, found.ledger)


@pytest.fixture(scope="module")
def report(run: runs.Run, logged: Decisions) -> Report:
    return build(run.facts, run.extract, details=False, decisions=logged)


def changed(facts: Facts, clip: Clip) -> Facts:
    first, *rest = facts.mechanisms
    return facts.model_copy(update={"mechanisms": (first.model_copy(update={"clip": clip}), *rest)})


# ---------------------------------------------------------------- what it says


def test_every_decision_is_in_the_signed_json(
    report: Report, logged: Decisions, signer: Signer
) -> None:
    signed = unseal(as_json(sealed(report, signer)), signer.public).report
    (chapter,) = signed["chapters"]
    for course, rows in zip(chapter["choices"]["courses"], logged.values(), strict=True):
        assert len(course["rows"]) == len(rows)
        for one, row in zip(course["rows"], rows, strict=True):
            assert one["step"] == row["step"]
            assert one["norms"] == pytest.approx(row["norms"], rel=1e-5)
            assert one["shares"] == pytest.approx(row["shares"], rel=1e-5)
            assert one["noise"] == row["noise_multiplier"]
            assert one["action"] == row.get("action", [])
            assert one["reward"] == row.get("reward")
    assert sum(row["decision"] is not None for row in chapter["choices"]["courses"][0]["rows"]) > 20
    assert Report.model_validate(signed) == report


def test_the_page_shows_picture_words_and_the_last_choice(
    report: Report, logged: Decisions, signer: Signer
) -> None:
    page = as_html(sealed(report, signer), signer)
    text = plain(page)
    assert "What the clipping policy chose" in text
    assert "It saw what was released and nothing else" in text
    (chapter,) = report.chapters
    assert chapter.choices is not None
    words = choices_in_words(chapter.choices, "step")
    assert f'aria-label="{words}"' in page.decode()
    ends = [rows[-1] for rows in logged.values()]
    for block in range(3):
        norm = float(np.median([end["norms"][block] for end in ends]))
        noise = np.median([
            end["noise_multiplier"] / 0.96**0.5 * end["norms"][block] / end["shares"][block] ** 0.5
            for end in ends
        ])  # fmt: skip
        name = re.escape(f"{block}.q_proj")
        norm_words, noise_words = (f"{v:#.3g}".rstrip(".") for v in (norm, float(noise)))
        assert re.search(rf"{name} {norm_words} [0-9.]+% {noise_words}(?![0-9])", text), block
    low, high = sorted(float(np.median(end["norms"])) for end in ends)
    assert "(medians of 2 clients): clip norm 0.577 and then" in words
    assert f"and then {low:.3g} to {high:.3g};" in words
    decided = sum("decision" in row for rows in logged.values() for row in rows)
    assert f"{decided} decisions of all clients" in text


def test_the_mechanism_says_what_the_policy_saw_and_what_its_sensors_took(
    report: Report, signer: Signer
) -> None:
    text = plain(as_html(sealed(report, signer), signer))
    assert "norms and shares of the noise chosen by a learning controller, 1 at the start" in text
    assert "rldp (online): it saw nothing but released values and public settings" in text
    assert "epsilon is that of the mechanism, whatever it chose" in text
    assert "4% of the privacy of each release (clip bits 2% and a clamped mean loss 2%)" in text
    assert "the gradient had 2.06% more noise" in text
    assert pytest.approx(1.0206, abs=1e-4) == (1.0 - 0.04) ** -0.5


def test_markdown_and_paper_say_the_same(report: Report, signer: Signer) -> None:
    envelope = sealed(report, signer)
    text = as_markdown(envelope).decode()
    (chapter,) = report.chapters
    made = shown_choices(chapter)
    assert "## What the clipping policy chose" in text
    for name, norm, share, noise in made["rows"]:
        cells = (name.replace("_", "\\_"), norm, share, noise)
        assert f"| {' | '.join(cells)} |" in text
    pypdf = pytest.importorskip("pypdf")
    pages = pypdf.PdfReader(BytesIO(as_pdf(envelope))).pages
    paper = " ".join(" ".join(page.extract_text() for page in pages).replace("\u200b", "").split())
    assert "What the clipping policy chose" in paper
    for _, norm, share, noise in made["rows"]:
        assert f"{norm} {share} {noise}" in paper


def test_privacy_json_and_card_name_policy_and_sensors(report: Report) -> None:
    (statement,) = summary(report)["statements"]
    assert statement["clip"]["rule"] == "rldp"
    assert statement["clip"]["policy"] == {
        "mode": "online", "reward": "loss", "bits": 0.02, "loss": 0.02, "held_out": 0.0,
        "noise": "constant",
    }  # fmt: skip
    assert any("saw nothing but released values" in line for line in card_lines(report))


def test_a_fixed_rule_has_nothing_to_tell(run: runs.Run, logged: Decisions, signer: Signer) -> None:
    fixed = changed(run.facts, Clip(rule="flat", norm=0.5))
    made = build(fixed, run.extract, details=False, decisions=logged)
    assert made.chapters[0].choices is None
    text = plain(as_html(sealed(made, signer), signer))
    assert "clipping policy" not in text
    assert "Sensors" not in text


# ---------------------------------------------------------------- many clients, one block


def test_more_than_six_clients_are_medians(run: runs.Run, logged: Decisions) -> None:
    (rows, others) = logged.values()
    many: Decisions = {f"{i:06d}": rows if i < 5 else others for i in range(7)}
    # One came late and missed the end: its norms stay where they were.
    many["000006"] = others[10:20]
    (ran,) = run.facts.mechanisms
    made = choices_of(many, run.facts, ran)
    assert made is not None
    assert made.middle is not None
    assert len(made.courses) == 7
    assert len(made.drawn) == 1
    last = made.middle.rows[-1]
    assert last.norms == pytest.approx(rows[-1]["norms"], rel=1e-5), "five of seven have these"
    (chapter,) = build(run.facts, run.extract, details=False, decisions=many).chapters
    shown = shown_choices(chapter)
    assert shown["medians"] == 7
    assert any("medians over 7 clients" in text for text in shown["told"])
    first = made.middle.rows[0].norms
    want = np.median([r[0]["norms"] for n, r in many.items() if n != "000006"], 0)
    assert first == pytest.approx(want, rel=1e-5)


def test_six_clients_have_a_line_each(run: runs.Run, logged: Decisions) -> None:
    rows = next(iter(logged.values()))
    many = {f"{i:06d}": rows for i in range(6)}
    (ran,) = run.facts.mechanisms
    made = choices_of(many, run.facts, ran)
    assert made is not None
    assert made.middle is None
    assert [course.client for course in made.drawn] == [f"client {i}" for i in range(6)]
    assert "(medians of 6 clients)" in choices_in_words(made, "step")


def test_too_many_numbers_for_a_report_stay_with_the_clients(
    run: runs.Run, logged: Decisions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtune.privacy.report_choices._MOST_NUMBERS", 500)
    (chapter,) = build(run.facts, run.extract, details=False, decisions=logged).chapters
    assert chapter.choices is not None
    assert chapter.choices.courses == ()
    assert len(chapter.choices.drawn) == 1
    assert any("its own decisions.jsonl" in text for text in shown_choices(chapter)["told"])


def test_one_block_has_no_shares_to_draw(run: runs.Run) -> None:
    promise = chosen.example_of(clip="quantile")
    (ran,) = changed(run.facts, clip_of(promise)).mechanisms
    rows = chosen.rows_of(promise)
    made = choices_of({"000000": rows}, run.facts, ran)
    assert made is not None
    assert made.blocks == ("all parameters",)
    words = choices_in_words(made, "step")
    assert "share of the privacy" not in words
    assert f"clip norm {rows[0]['norms'][0]:.3g} and then {rows[-1]['norms'][0]:.3g}" in words


def test_noise_that_moved_has_a_panel_and_what_was_refused_is_counted(run: runs.Run) -> None:
    promise = chosen.example_of(
        clip="constant", constant=[0.0] * 8 + [-1.0],
        rldp={"mode": "online", "noise": "filtered", "interval": 5},
    )  # fmt: skip
    rows = chosen.rows_of(promise)
    refused = sum("refused" in row for row in rows)
    assert refused == chosen.ROUNDS, "always less noise than planned ends every round early"
    facts = changed(run.facts, clip_of(promise))
    (ran,) = facts.mechanisms
    made = choices_of({"000000": rows}, facts, ran)
    assert made is not None
    assert "noise multiplier 1 and then 0.9" in choices_in_words(made, "step")
    (chapter,) = build(facts, run.extract, details=False, decisions={"000000": rows}).chapters
    assert any(f"{refused} steps were refused" in text for text in shown_choices(chapter)["told"])


def test_the_action_is_told_where_one_policy_acted(run: runs.Run, logged: Decisions) -> None:
    assert len(ACTIONS) == NUMBERS
    name, rows = next(iter(logged.items()))
    (chapter,) = build(run.facts, run.extract, details=False, decisions={name: rows}).chapters
    last = [row for row in rows if "action" in row][-1]
    text = " ".join(shown_choices(chapter)["told"])
    assert f"the last one before step {last['step']}" in text
    for word, number in zip(ACTIONS, last["action"], strict=True):
        assert f"{word} {number:+.2f}" in text


# ---------------------------------------------------------------- the server's own policy


def test_rounds_of_the_server_count_from_one(tmp_path: Path, signer: Signer) -> None:
    promise = chosen.client_of(clip="closed-form")
    found = runs.client_run(tmp_path)
    facts = changed(found.facts, clip_of(promise))
    rows = chosen.rows_of(promise)
    made = build(facts, found.extract, details=False, decisions={"": rows, "000000": rows})
    (chapter,) = made.chapters
    assert chapter.choices is not None
    assert len(chapter.choices.courses) == 1, "what a client's own log has is not the server's"
    assert "From round 1 to round 40" in choices_in_words(chapter.choices, "round")
    assert "From round 1 to round 40" in plain(as_html(sealed(made, signer), signer))


def test_clients_choices_stay_with_them_where_clients_are_hidden(
    tmp_path: Path, clip: Clip, logged: Decisions
) -> None:
    found = runs.both_runs(tmp_path)
    facts = changed(found.facts, clip)
    example, central = facts.mechanisms
    assert (example.unit, central.unit) == (Unit.EXAMPLE, Unit.CLIENT)
    assert choices_of(logged, facts, example) is None, "who took part would be seen"
    alone = facts.model_copy(update={"mechanisms": (example,)})
    assert choices_of(logged, alone, example) is not None


# ---------------------------------------------------------------- pictures and refusals


@pytest.mark.parametrize("shape", ["wide", "narrow"])
def test_pictures_are_outlines_and_the_same_each_time(report: Report, shape: str) -> None:
    (chapter,) = report.chapters
    assert chapter.choices is not None
    picture = draw_choices(chapter.choices, "step", shape)
    root = ET.fromstring(picture)
    assert root.tag.endswith("svg")
    assert not any(element.tag.endswith("}text") for element in root.iter())
    assert picture == draw_choices(chapter.choices, "step", shape)
    other = draw_choices(chapter.choices, "step", "wide" if shape == "narrow" else "narrow")
    names = [set(re.findall(r'id="([^"]+)"', one)) for one in (picture, other)]
    assert not names[0] & names[1], "pictures must not share inner names"


def test_a_name_in_a_log_is_text(run: runs.Run, logged: Decisions, signer: Signer) -> None:
    rows = next(iter(logged.values()))
    hostile = "$x^$<script>alert(1)</script>\x1b[2J"
    made = build(run.facts, run.extract, details=False, decisions={hostile: rows, "1": rows})
    page = as_html(sealed(made, signer), signer).decode()
    assert page.count("<script") == 1
    assert "\x1b" not in page


@pytest.mark.parametrize(
    ("key", "value"),
    [("norms", [1.0]), ("shares", [0.5, None, 0.5]), ("noise_multiplier", -1.0), ("step", "x")],
)
def test_a_log_of_another_run_is_refused(
    run: runs.Run, logged: Decisions, key: str, value: Any
) -> None:
    rows = [dict(row) for row in next(iter(logged.values()))]
    rows[3][key] = value
    with pytest.raises(FedtuneError, match=r"decisions\.jsonl of client 000000") as refused:
        build(run.facts, run.extract, details=False, decisions={"000000": rows})
    assert refused.value.code == ExitCode.RUN_FOLDER


def test_raw_sensing_is_no_rule_that_facts_may_name() -> None:
    with pytest.raises(ValidationError):
        Clip(rule="raw-sensing", norm=1.0)  # type: ignore[arg-type]
    with pytest.raises(FedtuneError, match="no statement can be made") as refused:
        ran_from({}, rule="raw-sensing", rounds=1, delta=1e-5, units=9)
    assert refused.value.code == ExitCode.PRIVACY
    assert "NOT differentially private" in (refused.value.hint or "")


def test_facts_of_before_are_still_read() -> None:
    old = {"rule": "quantile", "norm": 0.3, "blocks": {}, "note": "target 0.5"}
    assert Clip.model_validate(old).policy is None
