"""A signed report as a page, as Markdown and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fedtune.privacy.events import Unit, from_json
from fedtune.privacy.report_choices_picture import draw_choices, shown_choices
from fedtune.privacy.report_fields import GUIDES, event_words
from fedtune.privacy.report_ledger import Group
from fedtune.privacy.report_model import Chapter, Report
from fedtune.privacy.report_picture import alternative, draw
from fedtune.privacy.signing import Signer, embedded, fingerprint, readable, seal, seal_page
from fedtune.privacy.statement import ROWS, Statement
from fedtune.privacy.words import above, below, joined, markdown, plural, power, shown, tidy

__all__ = ["as_html", "as_json", "as_markdown", "context", "sealed"]


def sealed(report: Report, signer: Signer) -> dict[str, Any]:
    """Return the signed envelope that every format is made from."""
    return seal(report.model_dump(mode="json", by_alias=True), signer)


def as_json(envelope: Mapping[str, Any]) -> bytes:
    """Return the file that is checked with ``--verify`` and read by the printed lines."""
    return readable(envelope)


def as_html(envelope: Mapping[str, Any], signer: Signer) -> bytes:
    """Return one page with everything in it: no scripts, no fonts, nothing fetched."""
    report = Report.model_validate(envelope["report"])
    pictures = [
        {
            "wide": Markup(draw(chapter, "wide")),  # noqa: S704 - drawn by us, no text in it
            "narrow": Markup(draw(chapter, "narrow")),  # noqa: S704
            "words": alternative(chapter),
        }
        for chapter in report.chapters
    ]
    courses = [
        {shape: Markup(_courses(chapter, shape)) for shape in ("wide", "narrow")}  # noqa: S704
        for chapter in report.chapters
    ]
    page = _environment(escape=True).from_string(_template("report.html.j2")).render(
        context(report, envelope),
        pictures=pictures, courses=courses,
        embedded=Markup(embedded(envelope)),  # noqa: S704 - has no < or & left
    )  # fmt: skip
    return seal_page(f"{page.rstrip()}\n", signer)


def as_markdown(envelope: Mapping[str, Any]) -> bytes:
    """Return the report as Markdown, for reviews and repositories."""
    report = Report.model_validate(envelope["report"])
    text = _environment(escape=False).from_string(_template("report.md.j2")).render(
        context(report, envelope)
    )  # fmt: skip
    return f"{text.rstrip()}\n".encode()


def context(report: Report, envelope: Mapping[str, Any]) -> dict[str, Any]:
    """Return what templates speak of."""
    indices: list[int] = []
    names = {}
    for chapter in report.chapters:
        for row in chapter.statement.rows:
            indices.append(row.index)
            names[row.index] = row.name
    extract = [(i, names[i], report.ledger.accounts[i]) for i in indices[: 2 * ROWS]]
    library = next((c.statement.library for c in report.chapters), "dp-accounting")
    return {
        "r": report, "signature": envelope["signature"], "guides": GUIDES, "extract": extract,
        "fingerprint": fingerprint(envelope["signature"]["public_key"]),
        "library_pin": library.replace(" ", "=="),
        "above": above, "below": below, "power": power, "tidy": tidy, "plural": plural,
        "joined": joined, "finite": math.isfinite, "place": _place,
        "words_of": _words_of, "choices": [shown_choices(c) for c in report.chapters],
    }  # fmt: skip


def _courses(chapter: Chapter, shape: str) -> str:
    """Return the picture of a chapter's choices: no text in it, but for names of clients."""
    found = shown_choices(chapter)
    if chapter.choices is None:
        return ""
    return draw_choices(chapter.choices, found["often"], shape)


def _place(statement: Statement) -> str:
    return "client" if statement.unit is Unit.EXAMPLE else "data set"


def _words_of(group: Group) -> str:
    return event_words(from_json(group.event), group.count)


def _template(name: str) -> str:
    return (files("fedtune") / "assets" / "templates" / name).read_text(encoding="utf-8")


def _environment(escape: bool) -> Environment:
    """Return an environment whose every value is cleaned; autoescape is on for pages."""
    found = Environment(
        autoescape=escape,  # noqa: S701 - Markdown has its own escapes
        undefined=StrictUndefined,
        finalize=_clean if escape else _plain,
        keep_trailing_newline=True,
    )
    found.filters["code"] = Markup  # lines of Python and names of packages, made by us
    return found


def _clean(value: Any) -> Any:
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    # An equation is not torn apart at the end of a line.
    return shown(value).replace(" = ", "\u00a0=\u00a0").replace(" ≤ ", "\u00a0≤\u00a0")


def _plain(value: Any) -> Any:
    return markdown(value) if isinstance(value, str) and not isinstance(value, Markup) else value
