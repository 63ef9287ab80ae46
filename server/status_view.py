"""The status page's HTML from a snapshot; every name is escaped, for names come from others."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from fedtune.privacy.words import above, joined, power
from fedtune.server.snapshot import BudgetView, Snapshot
from fedtune.server.status_chart import chart_of
from fedtune.server.status_words import ago, clock, days, figure, size, span

__all__ = ["page_of"]

_ROUNDS_SHOWN, _NODES_SHOWN, _TROUBLES_SHOWN = 10, 200, 8
_ORDER = {"online": 0, "offline": 1, "never": 2, "revoked": 3}
_TONES = {"running": "good", "finished": "good", "waiting": "calm", "stopped": "calm"}


@dataclass(frozen=True)
class _Row:
    """One line of the table of rounds, in words; ``None``: the run does not have it."""

    number: str
    answers: str | None
    training: str | None
    held_out: str | None
    worst: str | None
    sent: str | None
    seconds: str


def page_of(snapshot: Snapshot, nonce: str) -> str:
    """Return the whole page.

    Parameters
    ----------
    snapshot : Snapshot
    nonce : str
        Of this answer; only the page's own style and script carry it.
    """
    return _template().render(_context(snapshot), nonce=nonce)


@functools.cache
def _template() -> Template:
    text = (files("fedtune") / "assets" / "templates" / "status.html.j2").read_text("utf-8")
    return Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(text)


def _context(s: Snapshot) -> dict[str, Any]:
    nodes = sorted(s.nodes, key=lambda node: (_ORDER[node.status], node.name))
    rows = [_row(row) for row in s.rows[::-1][:_ROUNDS_SHOWN]]
    return {
        "s": s, "rows": rows, "has": _has(rows),
        "tone": _TONES.get(s.status, "bad"),
        "share": 1.0 if s.status == "finished" else s.round / s.rounds if s.rounds else 0.0,
        "scores": _scores(s),
        "budgets": [_bar(budget, s.status == "finished") for budget in s.budgets],
        "wide": chart_of(s.rows, s.rounds, 720, 230),
        "narrow": chart_of(s.rows, s.rounds, 340, 210),
        "nodes": nodes[:_NODES_SHOWN], "nodes_hidden": max(0, len(nodes) - _NODES_SHOWN),
        "troubles": s.troubles[:_TROUBLES_SHOWN],
        "troubles_hidden": max(0, len(s.troubles) - _TROUBLES_SHOWN),
        "ago": ago, "clock": clock, "size": size, "span": span, "days": days,
    }  # fmt: skip


def _row(row: Mapping[str, Any]) -> _Row:
    sent = [row[f"bytes_{way}"] for way in ("down", "up", "cut") if row.get(f"bytes_{way}")]
    main = row.get("accuracy") if "macro_f1" in row else row.get("loss")
    return _Row(
        number=str(row["round"]) if row["round"] else "base",
        answers=_answers(row),
        training=_maybe(row, "train_loss"),
        held_out=None if main is None else figure(main),
        worst=_maybe(row, "client_worst"),
        sent=size(sum(sent)) if sent else None,
        seconds=span(row.get("seconds")),
    )


def _has(rows: list[_Row]) -> dict[str, bool]:
    names = ("answers", "training", "held_out", "worst", "sent")
    return {name: any(getattr(row, name) is not None for row in rows) for name in names}


def _answers(row: Mapping[str, Any]) -> str | None:
    if "clients_ok" not in row:
        return None
    failed = (row.get("clients_failed") or 0) + (row.get("clients_dropped") or 0)
    parts = [f"{row['clients_ok']} ok"]
    parts += [f"{row['clients_late']} late"] if row.get("clients_late") else []
    return ", ".join([*parts, f"{failed} failed"] if failed else parts)


def _maybe(row: Mapping[str, Any], key: str) -> str | None:
    return figure(row[key]) if row.get(key) is not None else None


def _scores(s: Snapshot) -> list[tuple[str, str, str]]:
    """Return the cards: a title, a value, and what is beside it."""
    found = [("Round", f"{s.round} of {s.rounds}" if s.rounds else "-", _pace(s))]
    for title, key in (("Held-out accuracy", "accuracy"), ("Held-out loss", "loss")):
        measured = [row[key] for row in s.rows if row.get(key) is not None]
        if measured and (key == "loss" or "macro_f1" in s.rows[0]):
            found.append((title, figure(measured[-1]), f"base model {figure(measured[0])}"))
            break
    online = sum(node.status == "online" for node in s.nodes)
    able = sum(node.status != "revoked" for node in s.nodes)
    if s.nodes:
        gone = _missing(s)
        found.append(("Nodes online", f"{online} of {able}", gone or "all are here"))
    if s.bytes_down is not None and s.bytes_up is not None:
        both = f"{size(s.bytes_down)} out, {size(s.bytes_up)} back"
        found.append(("Sent", size(s.bytes_down + s.bytes_up), both if s.bytes_down else ""))
    return found


def _pace(s: Snapshot) -> str:
    last = s.rows[-1].get("seconds") if s.rows and s.rows[-1]["round"] else None
    return f"last round {span(last)}" if last is not None else ""


def _bar(budget: BudgetView, ended: bool) -> dict[str, Any]:
    limit, epsilon = budget.limit, budget.epsilon
    share = min(1.0, epsilon / limit) if limit else 1.0 if math.isinf(epsilon) else 0.0
    spent = "no bound" if math.isinf(epsilon) else f"ε ≤ {above(epsilon)}"
    of = f"of {limit:g}" if limit is not None else "no limit set"
    return {
        "title": f"Privacy spent, per {budget.unit}", "spent": spent, "of": of,
        "at": f"at δ = {power(budget.delta)}", "share": share, "words": budget.words,
        "limited": limit is not None,
        # A run that ends at its own bound is what was planned.
        "tone": "bad" if limit and epsilon > limit else "near" if share > 0.9 and not ended else "",
    }  # fmt: skip


def _missing(s: Snapshot) -> str:
    counts = Counter(str(node.status) for node in s.nodes)
    said = {"offline": "offline", "never": "never seen", "revoked": "revoked"}
    return joined([f"{counts[name]} {words}" for name, words in said.items() if counts[name]])
