"""The privacy report of a run, as one value: what is rendered, signed and checked.

It is made from what the run left, ``privacy_facts.json`` and ``ledger.json``, and
needs no ledger; where the ledger can be asked, budgets and other jobs are as of now.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from fedtune.privacy.costs import events_of
from fedtune.privacy.events import Unit
from fedtune.privacy.facts import Facts, Ran
from fedtune.privacy.report_choices import choices_of
from fedtune.privacy.report_fields import fields_of, policy_words, ran_rows
from fedtune.privacy.report_ledger import Extract
from fedtune.privacy.report_model import Answer, Chapter, Note, Report
from fedtune.privacy.report_parts import Latest, budgets, curve, key, other_jobs, people
from fedtune.privacy.server_view import ServerView, server_view
from fedtune.privacy.statement import Statement, states
from fedtune.privacy.trust import Trust, omissions, trust_of
from fedtune.privacy.words import above, joined, markdown, percent, plural, power, shown

__all__ = ["Report", "build", "card_lines", "summary"]

_ENDS = {
    "budget-exhausted": "The run ended because its budget was spent.",
    "interrupted": "The run was interrupted; this report covers what was released until then.",
    "failed": "The run failed; this report covers what was released until then.",
}


def build(
    facts: Facts,
    extract: Extract,
    *,
    live: Extract | None = None,
    details: bool = True,
    decisions: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> Report:
    """Return the report of a run.

    Parameters
    ----------
    facts : Facts
    extract : Extract
        Of the ledger when the run ended.
    live : Extract, optional
        Of the ledger now: budgets and other jobs are then as of now.
    details : bool
        Curves, groups, budgets and other jobs; seconds. The statements are the same
        without them, and so is ``summary``.
    decisions : mapping, optional
        What clipping policies chose, by client: ``RunFolder.decisions``.

    Raises
    ------
    FedtuneError
        When facts and ledger contradict each other, or an accountant fails.
    """
    statements = states(facts, extract)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    latest = {key(account): account for account in (live or extract).accounts}
    chapters = tuple(
        _chapter(facts, ran, statement, extract, latest, details).model_copy(
            update={"choices": choices_of(decisions or {}, facts, ran)}
        )
        for ran, statement in zip(facts.mechanisms, statements, strict=True)
    )
    private = bool(statements) and all(statement.holds for statement in statements)
    view = server_view(facts.crossing) if facts.crossing else None
    return Report(
        made=now,
        by=f"fedtune {version('fedtune')}",
        as_of=now if live else facts.finished,
        private=private,
        answer=_answer(facts, chapters, private),
        notes=tuple(_notes(facts, chapters, view)),
        facts=facts.model_copy(update={"ledger": ""}),
        chapters=chapters,
        not_covered=omissions(facts),
        server_view=view,
        fields=fields_of(facts, statements),
        ledger=extract,
    )


def summary(report: Report) -> dict[str, Any]:
    """Return ``privacy.json``: what goes with the adapter, to everybody.

    No client is named. ``differential_privacy`` is true only when every statement holds. Of a
    split run ``server_view`` says what the server of the body may learn: another reader, and
    never added to the statements.
    """
    view = report.server_view
    return {
        "schema": 2,
        "differential_privacy": report.private,
        "statement": report.answer,
        "statements": [
            {
                "unit": s.unit.value,
                "relation": s.relation.value,
                "holds": s.holds,
                "epsilon": s.epsilon if math.isfinite(s.epsilon) else "inf",
                "delta": s.delta,
                "mu": s.mu,
                "epsilon_without_sampling": (
                    s.unsampled if math.isfinite(s.unsampled) else "inf"
                ),
                "condition": s.condition,
                "accountant": f"{s.accountant}, {s.library}",
                "releases": s.releases,
                "clip": ran.clip.model_dump(mode="json", include={"rule", "policy"}),
                "formal": s.formal,
                "trust": chapter.model,
                "not_bounded_for": list(chapter.unbounded_for),
            }
            for ran, chapter in zip(report.facts.mechanisms, report.chapters, strict=True)
            for s in [chapter.statement]
        ],
        **({"server_view": view.model_dump(mode="json")} if view else {}),
        "not_covered": [omission.what for omission in report.not_covered],
        "warnings": [note.text for note in report.notes],
        "job": report.facts.job,
        "base_model": {
            "name": report.facts.model.base, "fingerprint": report.facts.model.fingerprint,
        },
    }  # fmt: skip


def card_lines(report: Report) -> list[str]:
    """Return the privacy section of a model card: one Markdown line each, no heading."""
    found = [f"**{markdown(report.answer)}**"]
    for ran, chapter in zip(report.facts.mechanisms, report.chapters, strict=True):
        statement = chapter.statement
        found += ["", markdown(f"{statement.title}. {statement.formal} {chapter.model}")]
        if words := policy_words(ran):
            found.append(markdown(f"Clipping by {words}."))
        if statement.condition:
            found.append(
                markdown(f"Without credit for sampling: {_plain(statement)}. {statement.condition}")
            )
        found.append(f"No bound for: {'; '.join(chapter.unbounded_for)}.")
    if report.notes:
        found += ["", *(f"- {markdown(note.text)}" for note in report.notes)]
    return [*found, "", "`privacy.json` says the same for machines; the run's report has the rest."]


def _chapter(
    facts: Facts,
    ran: Ran,
    statement: Statement,
    extract: Extract,
    latest: Latest,
    details: bool,
) -> Chapter:
    trust = trust_of(ran, split=facts.crossing is not None)
    worst = extract.accounts[statement.rows[0].index]
    groups = events_of(worst.groups)
    chapter = Chapter(
        statement=statement,
        answers=_answers(trust, statement),
        model=trust.model,
        bounded_for=trust.bounded_for,
        unbounded_for=trust.unbounded_for,
        beyond=trust.beyond,
        ran=ran_rows(ran, statement, groups),
        target=ran.target_epsilon,
    )
    if not details:
        return chapter
    return chapter.model_copy(
        update={
            "curve": curve(groups, ran),
            "people": people(groups, ran, facts.per_person),
            "budgets": tuple(budgets(statement, ran, extract, latest)),
            "jobs": tuple(other_jobs(facts.job, ran, extract, latest)),
        }
    )


def _answer(facts: Facts, chapters: Sequence[Chapter], private: bool) -> str:
    """Return the whole report in one or two sentences."""
    if not chapters:
        return "Trained without differential privacy. No bound on what it reveals."
    bounds = " and ".join(
        f"epsilon {above(c.statement.epsilon)} at delta {power(c.statement.delta)} for "
        f"{'one example' if c.statement.unit is Unit.EXAMPLE else 'one client'}"
        for c in chapters
    )
    if private:
        return f"Differentially private: {bounds}."
    seeded = any(not (r.noise.secure and r.sampling.secure) for r in facts.mechanisms)
    if seeded and all(math.isfinite(c.statement.epsilon) for c in chapters):
        return f"Not private: noise or coins came from a seed. With real noise: {bounds}."
    return "Not private: something was released that nothing bounds."


def _plain(statement: Statement) -> str:
    """Return the bound against somebody who learns who was drawn."""
    found = above(statement.unsampled)
    return f"epsilon {found}" if math.isfinite(statement.unsampled) else found


def _answers(trust: Trust, statement: Statement) -> tuple[Answer, ...]:
    """Return what a person asks first: what can leak, to whom, with what bound."""
    questions = ("What can leak", "To whom", "With what bound")
    units = "examples" if statement.unit is Unit.EXAMPLE else "clients"
    shared = f"What {units} have in common is learnt; that is the purpose."
    if not statement.holds:
        return (
            Answer(question=questions[0], text=shared, strong=f"{trust.leaks}: nothing hides it."),
            Answer(question=questions[1], text="", strong="Everybody who gets the model or "
                   "reads messages, and can tell how the noise was made."),
            Answer(question=questions[2], text="", strong="None."),
        )  # fmt: skip
    many = "clients" if statement.unit is Unit.EXAMPLE else "data sets"
    where = "" if statement.accounts == 1 else f", at the worst of {statement.accounts:,} {many}"
    plain = _plain(statement).replace("epsilon", "ε ≤")
    return (
        Answer(question=questions[0], text=f"{trust.leaks}: no more than the bound. {shared}",
               strong=""),
        Answer(question=questions[1], text=f"Bounded for {joined(trust.bounded_for)}.",
               strong=f"No bound for {joined(trust.unbounded_for, 'or')}."),
        Answer(question=questions[2], text="Was it there or not, at even odds: the best guess is "
               f"right at most {percent(statement.guess)} of the time{where}.",
               strong=f"Without secret sampling: {plain}." if statement.condition else ""),
    )  # fmt: skip


def _notes(facts: Facts, chapters: Sequence[Chapter], view: ServerView | None) -> list[Note]:
    dangers: list[str] = []
    cautions: list[str] = []
    if view is not None:
        dangers.append(view.statement)
    if any(not (ran.noise.secure and ran.sampling.secure) for ran in facts.mechanisms):
        dangers.append(
            "Noise or coins of this run came from a seed. Whoever knows or guesses the seed can "
            "take the noise away: nothing is private. Do not release the model."
        )
    for chapter in chapters:
        title, spent = chapter.statement.title, chapter.statement.epsilon
        if not math.isfinite(spent):
            dangers.append(f"{title}: epsilon is infinite. No bound.")
        elif spent > 10:
            cautions.append(
                f"{title}: epsilon {above(spent)} is above 10, where the formal bound says little "
                "(Ponomareva et al. 2023)."
            )
        if chapter.target is not None and spent > chapter.target * (1 + 1e-9):
            dangers.append(f"{title}: {above(spent)} is above the target of {chapter.target:g}.")
        over = [one for one in chapter.budgets if one.budget and one.spent > one.budget]
        if over:
            dangers.append(
                f"{title}: {plural(len(over), 'data set')} spent more than the owner allows, "
                f"first '{over[0].name}'."
            )
    if facts.per_person > 1:
        cautions.append(
            f"One person may stand behind {facts.per_person} units here: for them the bound is "
            "that of the group table."
        )
    if facts.metrics == "not-private":
        cautions.append(
            "Measurements on clients' text are exact. No bound covers them: keep metrics, logs "
            "and the choice of a best round with the operator."
        )
    if facts.ended in _ENDS:
        cautions.append(_ENDS[facts.ended])
    cautions += [shown(text) for text in facts.warnings]
    return [
        *(Note(level="danger", text=text) for text in dangers),
        *(Note(level="caution", text=text) for text in cautions),
    ]
