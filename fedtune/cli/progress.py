"""The live view of a run on a terminal, and plain lines where there is none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fedtune.config import Config
from fedtune.server.events import ClientDone, Event, RoundDone, RoundStarted, Watcher

__all__ = ["following"]

_ROWS_SHOWN = 12
_BOUNDS = (("example", "epsilon_example"), ("client", "epsilon_client"))


@contextmanager
def following(config: Config, console: Console) -> Iterator[Watcher]:
    """Show a run while it lasts; yields the watcher to give to the run."""
    if not console.is_terminal:
        yield _Lines(config, console).hear
        return
    view = _View(config)
    with Live(view, console=console, refresh_per_second=6):
        yield view.hear


class _Lines:
    """One line per round, and one per client that did not make it."""

    def __init__(self, config: Config, console: Console) -> None:
        self._rounds, self._console = config.federation.rounds, console

    def hear(self, event: Event) -> None:
        if isinstance(event, ClientDone) and event.outcome != "ok":
            text = f"  round {event.round}: client '{event.client}' {event.outcome}: {event.reason}"
            self._console.print(text, markup=False, soft_wrap=True)
        elif isinstance(event, RoundStarted) and event.attempt:
            self._console.print(f"  round {event.round}: too few answers, attempt {event.attempt}")
        elif isinstance(event, RoundDone):
            self._console.print(_line(event.row, self._rounds), markup=False, soft_wrap=True)


class _View:
    """Two progress bars over a table of the last rounds."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._rows: list[Mapping[str, Any]] = []
        self._troubles: list[str] = []
        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=32), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        self._bars = Progress(*columns)
        total = config.federation.rounds
        self._all = self._bars.add_task("rounds ", total=total, note="")
        self._one = self._bars.add_task("clients", total=None, note="measuring the base model")
        self._tally: dict[str, int] = {}

    def hear(self, event: Event) -> None:
        if isinstance(event, RoundStarted):
            self._tally = {}
            again = f" (attempt {event.attempt + 1})" if event.attempt else ""
            note = f"round {event.round}{again}"
            self._bars.reset(self._one, total=event.cohort, note=note)
        elif isinstance(event, ClientDone):
            self._tally[event.outcome] = self._tally.get(event.outcome, 0) + 1
            counts = ", ".join(f"{count} {kind}" for kind, count in sorted(self._tally.items()))
            self._bars.update(self._one, advance=1, note=f"round {event.round}: {counts}")
            if event.outcome != "ok":
                self._troubles.append(f"{event.client} {event.outcome}: {event.reason}")
        else:
            self._rows.append(event.row)
            self._bars.update(self._all, completed=event.round)

    def __rich__(self) -> Group:
        table = Table(title=self._config.name, title_justify="left", box=None, pad_edge=False)
        for name in (
            "round",
            "ok",
            "late",
            "failed",
            "epsilon <=" if self._config.privacy.on else "train loss",
            "held-out",
            "worst client",
            "MB",
        ):
            table.add_column(name, justify="right")
        for row in self._rows[-_ROWS_SHOWN:]:
            table.add_row(*_cells(row))
        troubles = Text("\n".join(text[:110] for text in self._troubles[-3:]))
        return Group(table, self._bars, troubles)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    main = row.get("accuracy") if "macro_f1" in row else row.get("loss")
    failed = row.get("clients_failed", 0) + row.get("clients_dropped", 0)
    sent = sum(row.get(f"bytes_{way}", 0) for way in ("down", "up", "cut"))
    return (
        str(row["round"]), str(row.get("clients_ok", "")), str(row.get("clients_late", "")),
        str(failed), _figure(row.get("train_loss", _worst_bound(row))), _figure(main),
        _figure(row.get("client_worst")), f"{sent / 1e6:.2f}",
    )  # fmt: skip


def _line(row: Mapping[str, Any], rounds: int) -> str:
    number, ok, late, failed, train, main, worst, sent = _cells(row)
    if row["round"] == 0:
        return f"base model: held-out {main}, worst client {worst}"
    name = "accuracy" if "macro_f1" in row else "loss"
    # By the accountant that takes no time; the report's bound is smaller.
    if bounds := [f"each {unit}: epsilon at most {row[key]:.3f} (by RDP)" for unit, key in _BOUNDS
                  if key in row]:  # fmt: skip
        # How many were drawn is a secret where clients are hidden.
        counts = f"{ok} ok, {late} late, {failed} failed; " if ok else ""
        moved = f"{sent} MB in " if ok else ""
        return (
            f"round {number}/{rounds}: {counts}{', '.join(bounds)}; held-out {name} {main}; "
            f"{moved}{row.get('seconds', 0):.1f} s"
        )
    return (
        f"round {number}/{rounds}: {ok} ok, {late} late, {failed} failed; train loss {train}, "
        f"held-out {name} {main}, worst client {worst}; {sent} MB in {row.get('seconds', 0):.1f} s"
    )


def _worst_bound(row: Mapping[str, Any]) -> float | None:
    return max((row[key] for _, key in _BOUNDS if key in row), default=None)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
