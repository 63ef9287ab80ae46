"""``fedtune budget``: what was spent on whose data, and what its owner allows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from fedtune.cli.out import Out, reporting
from fedtune.errors import ExitCode, FedtuneError

if TYPE_CHECKING:
    from fedtune.privacy.accounting import Spent
    from fedtune.privacy.ledger import Account, Entry, Ledger

__all__ = ["budget"]

DELTA = 1e-5
"""At which an account without a budget is shown."""

_Known: TypeAlias = "dict[tuple[frozenset[Any], str, float], Spent]"

budget = typer.Typer(help="What was spent on whose data, and the caps.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="One JSON envelope on stdout.")]
Place = Annotated[
    str,
    typer.Option("--ledger", envvar="FEDTUNE_LEDGER", help="A file, or postgresql://..."),
]
OnlySet = Annotated[str | None, typer.Argument(metavar="DATASET", help="One data set only.")]
DEFAULT = ""
"""This machine's own."""


@budget.command("show")
def show(
    dataset: OnlySet = None,
    ledger: Place = DEFAULT,
    delta: Annotated[
        float | None, typer.Option("--delta", help="By default the budget's, or 1e-5.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what was spent of each budget, over all jobs."""
    with reporting(Out("budget show", as_json)) as out:
        book = _open(ledger)
        known: _Known = {}
        rows = [_account(book, account, delta, known) for account in _chosen(book, dataset)]
        names = ("dataset", "unit", "spent", "budget", "left", "delta", "releases", "in_flight")
        text = _table(names, ([row[name] for name in names] for row in rows))
        out.result({"accounts": rows}, text if rows else "nothing was spent")


@budget.command("history")
def history(
    dataset: OnlySet = None,
    ledger: Place = DEFAULT,
    job: Annotated[str | None, typer.Option("--job", help="One job only.")] = None,
    last: Annotated[int, typer.Option("--last", min=1, help="The last so many entries.")] = 20,
    as_json: Json = False,
) -> None:
    """List the entries: who reserved, released, aborted, or set a budget, and when."""
    with reporting(Out("budget history", as_json)) as out:
        book = _open(ledger)
        found: list[Entry] = []
        for account in _chosen(book, dataset):
            found += book.entries(account, job)
        found.sort(key=lambda entry: entry.time)
        shown = found[-last:]
        names = ("time", "actor", "dataset", "seq", "kind", "job", "round", "what")
        text = _table(names, (_line(entry) for entry in shown))
        out.result(
            {"entries": [entry.to_json() for entry in shown]}, text if shown else "no entries"
        )
        if len(shown) < len(found):
            out.say(f"the last {len(shown)} of {len(found)} entries; more with --last")


@budget.command("verify")
def verify(ledger: Place = DEFAULT, as_json: Json = False) -> None:
    """Check every hash and every total; exit 32 at the first that is wrong."""
    with reporting(Out("budget verify", as_json)) as out:
        checked = [
            {
                "dataset": one.account.dataset, "unit": one.account.unit.value,
                "relation": one.account.relation.value, "entries": one.entries, "head": one.head,
            }
            for one in _open(ledger).verify()
        ]  # fmt: skip
        names = ("dataset", "unit", "entries", "head")
        text = _table(names, ([row[name] for name in names] for row in checked))
        out.result({"accounts": checked}, text if checked else "no accounts")
        out.say("whole: compare the heads with those in reports")


@budget.command("set")
def set_cap(
    dataset: Annotated[str, typer.Argument(metavar="DATASET")],
    note: Annotated[str, typer.Option("--note", help="Why; kept in the ledger.")],
    epsilon: Annotated[float | None, typer.Option("--epsilon", help="Over all jobs.")] = None,
    delta: Annotated[float | None, typer.Option("--delta", help="Below 1 / units.")] = None,
    no_cap: Annotated[bool, typer.Option("--no-cap", help="Take the cap away.")] = False,
    unit: Annotated[str, typer.Option("--unit", help="example, or client.")] = "example",
    relation: Annotated[
        str, typer.Option("--relation", help="add-or-remove-one, or replace-special.")
    ] = "add-or-remove-one",
    actor: Annotated[
        str | None, typer.Option("--actor", help="Who decides; by default the user.")
    ] = None,
    ledger: Place = DEFAULT,
    as_json: Json = False,
) -> None:
    """Set the owner's cap on a data set; a new ledger is made when there is none."""
    with reporting(Out("budget set", as_json)) as out:
        from fedtune.privacy.events import Relation, Unit
        from fedtune.privacy.ledger import open_ledger
        from fedtune.privacy.plan import default_ledger

        if no_cap == (epsilon is not None) or (epsilon is None) != (delta is None):
            raise FedtuneError(
                f"--epsilon {epsilon}, --delta {delta}, --no-cap {no_cap}",
                hint="give --epsilon with --delta, or --no-cap alone",
                code=ExitCode.USAGE,
            )
        key = (_one_of(Unit, "--unit", unit), _one_of(Relation, "--relation", relation))
        book = open_ledger(ledger or default_ledger(), actor=actor)
        account = book.account(dataset, *key)
        before = account.epsilon, account.delta
        account = book.set_budget(account, epsilon, delta, book.actor, note)
        row = _account(book, account, None, {})
        out.result(row | {"before": {"epsilon": before[0], "delta": before[1]}}, _set(row))
        if row["left"] is not None and row["left"] <= 0:
            out.say("note: more than that is spent already; nothing more will be admitted")


def _open(place: str) -> Ledger:
    from fedtune.privacy.ledger import open_ledger
    from fedtune.privacy.plan import default_ledger

    return open_ledger(place or default_ledger(), create=False)


def _chosen(book: Ledger, dataset: str | None) -> list[Account]:
    found = book.accounts()
    if dataset is None:
        return found
    chosen = [account for account in found if account.dataset == dataset]
    if not chosen:
        names = sorted({account.dataset for account in found})
        raise FedtuneError(
            f"no data set '{dataset}' in the ledger",
            hint=f"it has: {', '.join(names[:10]) or 'none'}",
            code=ExitCode.LEDGER,
        )
    return chosen


def _account(book: Ledger, account: Account, delta: float | None, known: _Known) -> dict[str, Any]:
    """Return one row; epsilon is ``None`` where nothing bounds it, and ``unbounded`` says so."""
    at = delta if delta is not None else account.delta or DELTA
    # Hundreds of clients have often spent the same.
    same = (frozenset(book.groups(account).items()), account.relation.value, at)
    if same not in known:
        known[same] = book.spent(account, at)
    spent = known[same]
    bounded = math.isfinite(spent.epsilon)
    # A cap is of its own delta; at another the two cannot be compared.
    comparable = account.epsilon is not None and at == account.delta and bounded
    left = account.epsilon - spent.epsilon if comparable and account.epsilon else None
    return {
        "dataset": account.dataset, "unit": account.unit.value, "relation": account.relation.value,
        "spent": spent.epsilon if bounded else None, "unbounded": not bounded, "delta": at,
        "budget": account.epsilon, "budget_delta": account.delta, "left": left,
        "accountant": spent.accountant, "library": spent.library, "releases": spent.releases,
        "in_flight": book.in_flight(account), "jobs": book.jobs(account),
    }  # fmt: skip


def _line(entry: Entry) -> list[Any]:
    what = f"{entry.count} x {_event(entry)}" if entry.event else ""
    if entry.kind == "budget":
        cap = entry.detail.get("epsilon")
        at = f"epsilon {cap:g} at {entry.detail.get('delta'):g}" if cap else "no cap"
        what = f"{at}: {entry.detail.get('note', '')}"
    if entry.detail.get("reason"):
        what += f" ({entry.detail['reason']})"
    return [entry.time, entry.actor, entry.dataset, entry.seq, entry.kind, entry.job,
            entry.round, what]  # fmt: skip


def _event(entry: Entry) -> str:
    values = dict(entry.event or {})
    values.pop("schema", None)
    return " ".join([str(values.pop("kind", "?")), *(f"{k}={v}" for k, v in values.items())])


def _set(row: dict[str, Any]) -> str:
    if row["budget"] is None:
        return f"{row['dataset']} ({row['unit']}): no cap"
    spent = "unbounded" if row["unbounded"] else f"{row['spent']:.4f}"
    return (
        f"{row['dataset']} ({row['unit']}): epsilon {row['budget']:g} at delta "
        f"{row['budget_delta']:g}; spent {spent}"
    )


def _table(names: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [[name.replace("_", " ") for name in names]]
    lines += [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:g}" if value < 0.001 and value >= 0 else f"{value:.4f}"
    return str(value)


def _one_of(kind: Any, option: str, value: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise FedtuneError(
            f"{option} {value}",
            hint=f"one of {', '.join(one.value for one in kind)}",
            code=ExitCode.USAGE,
        ) from None
