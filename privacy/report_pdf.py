"""A signed report on paper: typeset by Typst, with the signed JSON attached."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.report_choices_picture import draw_choices, shown_choices
from fedtune.privacy.report_model import Chapter, Report
from fedtune.privacy.report_picture import alternative, draw
from fedtune.privacy.report_render import as_json, context
from fedtune.privacy.words import above, below, joined, plural, power, shown

__all__ = ["as_pdf"]

_LONG = re.compile(r"\S{25,}")
"""Typst breaks no word: names and hashes of this length may break between any two letters."""


def as_pdf(envelope: Mapping[str, Any]) -> bytes:
    """Return the report as PDF.

    Raises
    ------
    FedtuneError
        When Typst is not installed, or refuses.
    """
    try:
        import typst
    except ImportError as error:
        raise FedtuneError(
            "a PDF needs the package 'typst'",
            hint="pip install 'fedtune[pdf]', or print the HTML page",
            code=ExitCode.USAGE,
        ) from error
    template = files("fedtune") / "assets" / "templates" / "report.typ"
    data = _data(Report.model_validate(envelope["report"]), envelope)
    with tempfile.TemporaryDirectory() as room:
        source = Path(room) / "report.typ"
        source.write_bytes(template.read_bytes())
        (Path(room) / "data.json").write_text(json.dumps(data, allow_nan=False))
        try:
            made = typst.compile(source, root=Path(room), format="pdf")
        except RuntimeError as error:
            raise FedtuneError(
                f"Typst cannot set the report: {error}",
                hint="report this; HTML, Markdown and JSON do not need Typst",
            ) from error
    return made


def _data(report: Report, envelope: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the template prints: text only, no markup in it has a meaning."""
    facts, words = report.facts, context(report, envelope)
    model, signature = facts.model, envelope["signature"]
    data = {
        "name": facts.name, "job": facts.job, "by": report.by, "ended": facts.finished[:10],
        "model": f"{model.adapter} on {model.base}", "answer": report.answer,
        "notes": [note.model_dump() for note in report.notes],
        "chapters": [_chapter(chapter) for chapter in report.chapters],
        "trust": [
            [f"{c.statement.title}. {c.model}", joined(c.bounded_for), joined(c.unbounded_for),
             " ".join(c.beyond)]
            for c in report.chapters
        ],
        "server_view": [report.server_view.statement, *report.server_view.remember]
        if report.server_view else [],
        "model_rows": [
            ["Base model", f"{model.base} {model.revision}".strip()],
            ["SHA-256", model.fingerprint or "not recorded"],
            ["Trained", f"{model.adapter}, {model.parameters:,} numbers"],
            ["Data", f"{facts.data.description}; {plural(facts.data.clients, 'client')}"
             + (f"; {facts.data.partition}" if facts.data.partition else "")],
            ["Duplicates", facts.data.duplicates],
            ["Software", joined([f"{k} {v}" for k, v in sorted(facts.versions.items())])],
        ],
        "as_of": report.as_of[:16].replace("T", " "),
        "covered": list(facts.covered),
        "not_covered": [[one.what, one.why] for one in report.not_covered],
        "tuning": f"{facts.tuning.how}. " + (
            "Every run that was tried on this data is in the ledger, above."
            if facts.tuning.private else
            "Runs outside the ledger are not covered: whoever chose settings by looking at this "
            "data spent privacy that nobody counted."),
        "guides": list(words["guides"]),
        "fields": [[f.value, f.dp_fy or "-", f.nist or "-", f.opendp or "-"]
                   for f in report.fields],
        "library_pin": words["library_pin"],
        "extract": [
            [f"{index}. {name}",
             "; ".join(words["words_of"](group) for group in account.groups) or "nothing",
             account.head]
            for index, name, account in words["extract"]
        ],
        "sha_short": signature["sha256"][:16],
        "signature_rows": [
            ["Made", f"{report.made[:16].replace('T', ' ')} UTC by {report.by}"],
            ["Key fingerprint", words["fingerprint"]],
            ["Public key", signature["public_key"]],
            ["SHA-256 of the report", signature["sha256"]],
            [f"{signature['algorithm']} signature", signature["value"]],
        ],
    }  # fmt: skip
    cleaned: dict[str, Any] = _cleaned(data)
    for made, chapter in zip(cleaned["chapters"], report.chapters, strict=True):
        made |= {"picture": draw(chapter, "wide"), "recompute": chapter.statement.recompute}
        made["courses"] = ""
        if chapter.choices is not None:
            made["courses"] = draw_choices(chapter.choices, made["choices"]["often"], "wide")
    return cleaned | {"envelope": as_json(envelope).decode()}


def _chapter(chapter: Chapter) -> dict[str, Any]:
    s = chapter.statement
    finite = s.epsilon != float("inf")
    place = "client" if s.unit.value == "example" else "data set"
    beside = []
    if not s.holds:
        beside.append("This sentence does not hold for this run.")
    if s.mu is not None and finite:
        fitted = (
            ", exact at every δ"
            if s.accountant == "analytic"
            else f", fitted from above for every δ down to {power(s.delta)}"
        )
        beside.append(f"As Gaussian differential privacy: μ = {above(s.mu)}{fitted}.")
    if s.condition:
        bound = f" That bound is ε = {above(s.unsampled)} at the same δ."
        beside.append(s.condition + (bound if math.isfinite(s.unsampled) else ""))
    spread = bool(chapter.people) and chapter.people[0].several_places is not None
    lines = []
    if s.accounts > len(chapter.budgets):
        more = s.accounts - len(chapter.budgets)
        lines.append(f"{more:,} more data sets, each at ε ≤ {above(s.epsilon)} in this run.")
    if chapter.budgets and chapter.budgets[0].more is not None:
        lines.append(
            f"{plural(chapter.budgets[0].more, 'more release')} like this run's fit into the "
            f"budget of {chapter.budgets[0].name}."
        )
    return {
        "title": s.title, "holds": s.holds, "formal": s.formal, "beside": beside,
        "bound": f"ε ≤ {above(s.epsilon)}" if finite else "no bound",
        "delta": f"at δ = {power(s.delta)}",
        "answers": [[a.question, a.text, a.strong] for a in chapter.answers],
        "ran": [list(row) for row in chapter.ran],
        "at_worst": f", at the worst {place}" if s.accounts > 1 else "",
        "picture_words": alternative(chapter),
        "choices": _choices(chapter),
        "people_head": ["Examples", "ε, all at one client", "ε, the same one at so many clients"]
        if spread else ["Clients", "ε"],
        "people": [
            [str(p.units), above(p.one_place)]
            + ([above(p.several_places)] if p.several_places is not None else [])
            for p in chapter.people
        ],
        "budgets": [
            [b.name, above(b.run), above(b.spent), f"{b.budget:g}" if b.budget else "none set",
             below(b.left) if b.left is not None else "-"]
            for b in chapter.budgets
        ],
        "budget_lines": lines,
        "jobs": [
            [j.job, j.first[:10], j.last[:10], f"{j.datasets:,}", f"{j.releases:,}",
             above(j.epsilon)]
            for j in chapter.jobs
        ],
        "prints": f"{s.epsilon:.6g}",
        "at_account": f": {s.worst}" if s.accounts > 1 else "",
    }  # fmt: skip


def _choices(chapter: Chapter) -> dict[str, Any]:
    found = shown_choices(chapter)
    if found:
        over = f", medians over {plural(found['medians'], 'client')}" if found["medians"] else ""
        found["at_end"] = f"At the end{over}"
    return found


def _cleaned(value: Any) -> Any:
    """Return data whose every text is safe to print, and can be broken into lines."""
    if isinstance(value, str):
        return _LONG.sub(lambda run: "\u200b".join(run.group()), shown(value))
    if isinstance(value, Mapping):
        return {key: _cleaned(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(one) for one in value]
    return value
