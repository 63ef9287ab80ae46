"""The report: what it says, in four formats, and that nothing in it can do harm."""

from __future__ import annotations

import html
import json
import math
import re
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy import accounting
from fedtune.privacy.events import Gaussian, Relation, Unit
from fedtune.privacy.facts import Facts
from fedtune.privacy.report import build, card_lines, summary
from fedtune.privacy.report_ledger import Extract
from fedtune.privacy.report_model import Report
from fedtune.privacy.report_pdf import as_pdf
from fedtune.privacy.report_picture import alternative, draw
from fedtune.privacy.report_render import as_html, as_json, as_markdown, sealed
from fedtune.privacy.signing import Signer, read_signer, unseal, unseal_page
from fedtune.privacy.words import above, below, percent, power, shown
from tests.privacy import report_runs as runs
from tests.privacy.test_statement import recomputed

ADD = Relation.ADD_OR_REMOVE_ONE
HOSTILE = "<script>alert(1)</script>\x1b[2J\u202e|`[x](javascript:y)\n# \x9b31m&amp;" + "W" * 200


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    folder = tmp_path_factory.mktemp("key")
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CONFIG_HOME", str(folder))
    patch.delenv("FEDTUNE_SIGNING_KEY", raising=False)
    found = read_signer(None, lambda _: None)
    patch.undo()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def example(folder: Path) -> runs.Run:
    return runs.example_run(folder)


@pytest.fixture(scope="module")
def both(folder: Path) -> runs.Run:
    return runs.both_runs(folder)


@pytest.fixture(scope="module")
def example_report(example: runs.Run) -> Report:
    return build(example.facts, example.extract)


@pytest.fixture(scope="module")
def both_report(both: runs.Run) -> Report:
    return build(both.facts, both.extract)


@pytest.fixture(scope="module")
def seeded_report(folder: Path) -> Report:
    run = runs.seeded_run(folder)
    return build(run.facts, run.extract, details=False)


def hostile(example: runs.Run) -> Report:
    """A run whose every name was chosen by somebody unfriendly."""
    facts = example.facts.model_dump()
    (ran,) = facts["mechanisms"]
    ran["labels"] = {name: f"{number}{HOSTILE}" for number, name in enumerate(ran["labels"])}
    ran["noise"]["source"] = ran["sampling"]["source"] = ran["clip"]["note"] = HOSTILE
    for key in ("base", "revision", "fingerprint", "adapter"):
        facts["model"][key] = HOSTILE
    for key in ("description", "partition", "duplicates"):
        facts["data"][key] = HOSTILE
    for key in facts["deployment"]:
        facts["deployment"][key] = HOSTILE
    facts |= {
        "name": HOSTILE, "job": HOSTILE, "warnings": [HOSTILE], "covered": [HOSTILE],
        "not_covered": [{"what": HOSTILE, "why": HOSTILE}], "versions": {HOSTILE: HOSTILE},
        "tuning": {"how": HOSTILE},
    }  # fmt: skip
    extract = example.extract.model_dump(mode="json", by_alias=True)
    extract["job"] = HOSTILE
    for account in extract["accounts"]:
        account["head"] = HOSTILE
        for use in account["all_jobs"]:
            use |= {"job": HOSTILE, "first": HOSTILE, "last": HOSTILE}
    return build(Facts.model_validate(facts), Extract.model_validate(extract))


def plain(page: bytes) -> str:
    """Return what a reader of a page sees, without the report inside it."""
    seen = re.sub(r"<(style|script|svg).*?</\1>", " ", page.decode(), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", seen)).replace("\u00a0", " ").split())


# ---------------------------------------------------------------- what it says


def test_the_three_questions_are_answered_first(example_report: Report, signer: Signer) -> None:
    text = plain(as_html(sealed(example_report, signer), signer))
    (chapter,) = example_report.chapters
    start = text[: text.index("The guarantee")]
    for words in ("What can leak", "To whom", "With what bound", "No bound for the client itself",
                  "Bounded for the server", f"ε ≤ {above(chapter.statement.epsilon)}",
                  "at δ = 10⁻⁵", "at the worst of 9 clients",
                  "Without secret sampling", f"ε ≤ {above(chapter.statement.unsampled)}",
                  ):  # fmt: skip
        assert words in start


def test_two_mechanisms_are_two_statements(both_report: Report, signer: Signer) -> None:
    local, central = both_report.chapters
    assert (local.statement.unit, central.statement.unit) == (Unit.EXAMPLE, Unit.CLIENT)
    text = plain(as_html(sealed(both_report, signer), signer))
    for chapter in (local, central):
        assert chapter.statement.formal in text
        assert chapter.model in text
    assert "No bound for the server" in text
    assert central.statement.epsilon == accounting.spent(
        {Gaussian(6.0): 60}, 1e-4, Relation.REPLACE_SPECIAL
    ).epsilon  # fmt: skip


def test_everything_asked_for_is_there(example_report: Report, signer: Signer) -> None:
    text = plain(as_html(sealed(example_report, signer), signer))
    (chapter,) = example_report.chapters
    statement = chapter.statement
    assert statement.mu is not None
    wanted = [
        "Poisson: each example in each step by its own coin of probability 0.05",
        "coins flipped by the client", "add or remove one",
        "one L2 norm over a whole contribution, 0.5",
        "2.2 times the sensitivity", "20, a public constant", "whole multiples of 2.4e-06",
        "60 times Poisson 0.05 with noise 2.2", "dp-accounting 0.6.0", "below 1/400",
        f"μ = {above(statement.mu)}", runs.BASE.fingerprint, "pilot-20261102-090000",
        "E2E NLG", "How many rows each client holds", "Time, size and number of messages",
        "The base model and the text it was pretrained on", "Held-out text",
        "DP setting", "Unit of privacy", "Side channels", "Unprotected quantities",
        "Data collection exposure", "Folio Archive", "pip install dp-accounting==0.6.0",
        "Reviewed by", signer.public,
    ]  # fmt: skip
    wanted += runs.ROLES
    wanted += [account.head for account in example_report.ledger.accounts]
    wanted += [above(person.one_place) for person in chapter.people]
    assert [words for words in wanted if words not in text] == []


def test_v33_somebody_behind_several_units_has_another_bound(both_report: Report) -> None:
    for chapter in both_report.chapters:
        by_size = {person.units: person.one_place for person in chapter.people}
        assert set(by_size) == {1, 2, 3, 4}, "3 is what the facts say one person may have"
        assert by_size[1] == pytest.approx(chapter.statement.epsilon)
        assert all(by_size[k] > k * by_size[1] for k in (2, 3, 4))
    several = {p.units: p.several_places for p in both_report.chapters[0].people}
    assert several[2] == accounting.spent({runs.STEP: 120}, 1e-5, ADD).epsilon
    assert "One person may stand behind 3 units" in " ".join(n.text for n in both_report.notes)


def test_v28_budgets_count_every_job_on_the_data(example_report: Report) -> None:
    (chapter,) = example_report.chapters
    first = chapter.budgets[0]
    every = accounting.spent({runs.STEP: 70}, 1e-5, ADD).epsilon
    assert (first.spent, first.budget, first.delta) == (every, 8.0, 1e-5)
    assert first.left == 8.0 - every
    assert first.more is not None
    fits, too_many = (
        accounting.spent({runs.STEP: 70 + first.more + extra}, 1e-5, ADD).epsilon
        for extra in (0, 1)
    )
    assert fits <= 8.0 < too_many
    (job,) = chapter.jobs
    assert (job.job, job.datasets, job.releases) == ("pilot-20261102-090000", 9, 90)
    assert [row.name for row in chapter.budgets][-2:] == ["PETRUCHIO", "ROMEO"]


def test_the_ledger_of_now_brings_what_came_since(both: runs.Run, both_report: Report) -> None:
    more = {"shakespeare": (Gaussian(9.0), 2, 20)}
    runs.spend(both.ledger, "afterwards", Unit.CLIENT, more, Relation.REPLACE_SPECIAL)
    live = Extract.model_validate(both.ledger.extract(both.facts.job))
    after = build(both.facts, both.extract, live=live)
    then, now = both_report.chapters[1], after.chapters[1]
    assert [job.job for job in then.jobs] == []
    assert [job.job for job in now.jobs] == ["afterwards"]
    every = {Gaussian(6.0): 60, Gaussian(9.0): 40}
    spent = accounting.spent(every, 1e-4, Relation.REPLACE_SPECIAL).epsilon
    assert now.budgets[0].spent == spent > then.budgets[0].spent
    assert now.statement == then.statement
    assert both_report.as_of == both.facts.finished != after.as_of
    assert after.ledger == both.extract


def test_the_curve_ends_at_the_bound(example_report: Report) -> None:
    (chapter,) = example_report.chapters
    last = chapter.curve[-1]
    assert last.round == 4
    assert last.epsilon == pytest.approx(chapter.statement.epsilon)
    assert last.unsampled == pytest.approx(chapter.statement.unsampled)
    epsilons = [point.epsilon for point in chapter.curve]
    assert epsilons == sorted(epsilons)


def test_a_seeded_run_is_not_private_and_says_so_in_red(
    seeded_report: Report, signer: Signer
) -> None:
    assert not seeded_report.private
    page = as_html(sealed(seeded_report, signer), signer).decode()
    assert 'class="note danger" role="alert"' in page
    text = plain(page.encode())
    assert "nothing is private. Do not release the model" in text
    assert "does not hold" in text
    assert "Bounded for the server" not in text[: text.index("The guarantee")]
    assert "nothing hides it" in text
    machine = summary(seeded_report)
    assert machine["differential_privacy"] is False
    assert machine["statements"][0]["holds"] is False
    assert card_lines(seeded_report)[0].startswith("**Not private")


def test_v24_exact_measurements_are_named(folder: Path) -> None:
    run = runs.client_run(folder)
    report = build(run.facts, run.extract, details=False)
    what = [one.why for one in report.not_covered if one.what.startswith("Loss, accuracy")]
    assert len(what) == 1
    assert "not private" in what[0]
    assert any("Measurements on clients' text are exact" in note.text for note in report.notes)


def test_no_statement_is_no_promise(signer: Signer) -> None:
    facts = runs.facts("plain")
    extract = Extract.model_validate({"schema": 1, "job": facts.job, "accounts": []})
    report = build(facts, extract)
    assert not report.private
    assert summary(report)["differential_privacy"] is False
    assert "without differential privacy" in card_lines(report)[0]
    text = plain(as_html(sealed(report, signer), signer))
    assert "Trained without differential privacy" in text[: text.index("The mechanism that ran")]
    # Nothing stands there that reads as if something were bounded or covered.
    markdown = as_markdown(sealed(report, signer)).decode()
    for heading in ("The guarantee", "Epsilon over rounds", "Covered:", "Recompute it"):
        assert heading not in markdown
        assert heading not in text
    as_pdf(sealed(report, signer))


def test_the_summary_names_no_client(example_report: Report) -> None:
    machine = summary(example_report)
    assert (machine["schema"], machine["differential_privacy"]) == (2, True)
    (statement,) = machine["statements"]
    assert statement["epsilon"] == example_report.chapters[0].statement.epsilon
    assert statement["epsilon_without_sampling"] > statement["epsilon"]
    text = json.dumps(machine, allow_nan=False) + "\n".join(card_lines(example_report))
    assert not any(role in text for role in runs.ROLES)
    assert str(above(statement["epsilon"])) in card_lines(example_report)[0]


def test_without_details_the_statements_are_the_same(
    example: runs.Run, example_report: Report
) -> None:
    short = build(example.facts, example.extract, details=False)
    assert summary(short) == summary(example_report)
    assert short.chapters[0].curve == ()


# ---------------------------------------------------------------- signed JSON


def test_the_report_survives_json_both_ways(both_report: Report, signer: Signer) -> None:
    signed = unseal(as_json(sealed(both_report, signer)), signer.public)
    assert Report.model_validate(signed.report) == both_report
    assert signed.report["schema"] == 1


def test_the_page_holds_the_same_report(both_report: Report, signer: Signer) -> None:
    envelope = sealed(both_report, signer)
    signed = unseal_page(as_html(envelope, signer), signer.public)
    assert signed.report == envelope["report"]
    assert signed.sha256 == envelope["signature"]["sha256"]


def test_where_the_ledger_is_stays_at_home(example: runs.Run, example_report: Report) -> None:
    assert example.facts.ledger
    assert example.facts.ledger not in example_report.model_dump_json()


def test_the_lines_of_the_report_give_its_epsilon(
    both_report: Report, signer: Signer, tmp_path: Path
) -> None:
    (tmp_path / "report.json").write_bytes(as_json(sealed(both_report, signer)))
    page = as_html(sealed(both_report, signer), signer).decode()
    blocks = re.findall(r"<pre>(<i>import.*?)</pre>", page)
    texts = [
        "\n".join(html.unescape(line).replace("\u00a0", " ")
                  for line in re.findall(r"<i>(.*?)</i>", block))
        for block in blocks
    ]  # fmt: skip
    printed = [float(value) for value in re.findall(r"prints ([0-9.e-]+)", page)]
    found = recomputed([{"folder": str(tmp_path), "lines": text} for text in texts])
    assert len(found) == 2
    assert found == pytest.approx(printed, rel=5e-5)
    assert printed == pytest.approx(
        [c.statement.epsilon for c in both_report.chapters], rel=1e-5
    )  # fmt: skip


# ---------------------------------------------------------------- pages that do no harm


class Tags(HTMLParser):
    """Every tag of a page, its attributes, and what is in scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, Any]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_a_page_fetches_and_runs_nothing(both_report: Report, signer: Signer) -> None:
    page = as_html(sealed(both_report, signer), signer).decode()
    tags = Tags()
    tags.feed(page)
    scripts = [attributes for tag, attributes in tags.found if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "report"}]
    assert not {tag for tag, _ in tags.found} & {"link", "img", "iframe", "object", "embed"}
    for _, attributes in tags.found:
        assert "src" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []
    policy = [a["content"] for tag, a in tags.found if a.get("http-equiv")]
    assert policy[0].startswith("default-src 'none'")
    ids = [attributes["id"] for _, attributes in tags.found if attributes.get("id")]
    assert len(ids) == len(set(ids)), "pictures must not share inner names"
    assert [a["lang"] for tag, a in tags.found if tag == "html"] == ["en"]
    labels = [a["aria-label"] for tag, a in tags.found if tag == "figure"]
    assert len(labels) == 2
    assert all(label.startswith("Epsilon over rounds") for label in labels)


def test_hostile_names_are_text_everywhere(example: runs.Run, signer: Signer) -> None:
    report = hostile(example)
    envelope = sealed(report, signer)
    page, text = as_html(envelope, signer), as_markdown(envelope).decode()
    tags = Tags()
    tags.feed(page.decode())
    assert [tag for tag, _ in tags.found].count("script") == 1
    assert "alert(1)" in plain(page)
    assert unseal_page(page, signer.public).report["facts"]["name"] == HOSTILE
    assert as_json(envelope).isascii()
    for made in (page.decode(), text):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", made)
    assert "<script>" not in text.replace("\\<script\\>", "")
    assert "[x](javascript" not in text
    assert as_pdf(envelope).startswith(b"%PDF")
    for line in card_lines(report):
        assert "<script>" not in line
        assert "\n" not in line
        assert "\x1b" not in line


@pytest.mark.parametrize("shape", ["wide", "narrow"])
def test_pictures_are_outlines_with_words_beside(example_report: Report, shape: str) -> None:
    (chapter,) = example_report.chapters
    picture = draw(chapter, shape)
    root = ET.fromstring(picture)
    assert root.tag.endswith("svg")
    assert not any(element.tag.endswith("}text") for element in root.iter())
    assert picture == draw(chapter, shape), "the same report gives the same picture"
    words = alternative(chapter)
    assert above(chapter.statement.epsilon) in words
    assert above(chapter.statement.unsampled) in words
    assert "budget 8" in words


def test_markdown_says_the_same(both_report: Report, signer: Signer) -> None:
    text = as_markdown(sealed(both_report, signer)).decode()
    for chapter in both_report.chapters:
        assert chapter.statement.recompute in text
        assert f"ε ≤ {above(chapter.statement.epsilon)}" in text
    assert "\\_" not in text.split("```")[1], "code is not escaped"
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows
    assert all(line.endswith("|") for line in rows)


# ---------------------------------------------------------------- on paper


def test_the_pdf_says_the_same_and_holds_the_signed_report(
    both_report: Report, signer: Signer
) -> None:
    pypdf = pytest.importorskip("pypdf")
    envelope = sealed(both_report, signer)
    reader = pypdf.PdfReader(BytesIO(as_pdf(envelope)))
    text = " ".join(page.extract_text() for page in reader.pages)
    joined = " ".join(text.split())
    for chapter in both_report.chapters:
        assert f"ε ≤ {above(chapter.statement.epsilon)}" in joined
    assert "What can leak" in reader.pages[0].extract_text()
    assert all(role in joined for role in runs.ROLES)
    (attached,) = reader.attachments["report.json"]
    assert attached == as_json(envelope)
    assert unseal(attached, signer.public).report == envelope["report"]


def test_without_typst_the_pdf_says_what_to_install(
    both_report: Report, signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "typst", None)
    with pytest.raises(FedtuneError) as caught:
        as_pdf(sealed(both_report, signer))
    assert "fedtune[pdf]" in caught.value.hint
    assert caught.value.code is ExitCode.USAGE


# ---------------------------------------------------------------- numbers


def test_bounds_are_never_rounded_down() -> None:
    for value in (0.0123456, 0.99999, 1.0, 1.0051, 9.999, 10.01, 123.4, 5432.1):
        printed = float(above(value).replace(",", ""))
        assert value * (1 - 1e-9) <= printed <= value * 1.011
        assert float(below(value).replace(",", "")) <= value
        assert float(percent(min(value, 1.0)).rstrip("%")) >= 100 * min(value, 1.0) - 1e-9
    assert above(math.nan) == above(math.inf) == "no bound"
    assert power(1e-5) == "10⁻⁵"
    assert shown("a\u200b\u2028\x07") == "a" + "\ufffd" * 3
