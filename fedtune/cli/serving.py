"""The server's terminal: a live view of the federation, plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedtune.errors import FedtuneError
from fedtune.privacy.words import above, power
from fedtune.server.snapshot import BudgetView, NodeView, Snapshot, Trouble
from fedtune.server.status_words import ago, clock, figure, size, span

__all__ = ["server_screen", "watching"]

_PAUSE = 1.0
_NODES_SHOWN, _ROUNDS_SHOWN, _TROUBLES_SHOWN = 12, 6, 3
_STYLES = {
    "running": "green", "finished": "green", "failed": "bold red", "killed": "bold red",
    "online": "green", "offline": "red", "revoked": "dim", "never": "dim",
}  # fmt: skip


@contextlib.contextmanager
def watching(source: Callable[[], Snapshot], console: Console) -> Iterator[None]:
    """Show how a federation stands while the block lasts.

    Parameters
    ----------
    source : callable
        Called about once a second, from another thread, and once at the end.
    console : Console
        A terminal gets a live view; anything else one line for everything that is new.
    """
    if console.is_terminal:
        with Live(get_renderable=lambda: _screen_of(source), console=console, refresh_per_second=1):
            yield
        return
    lines = _Lines(source, console)
    with repeating(lines.look, _PAUSE):
        yield


@contextlib.contextmanager
def repeating(act: Callable[[], None], pause: float) -> Iterator[None]:
    """Do something now and then in a thread of its own, and once more at the end."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(pause):
            act()

    thread = threading.Thread(target=repeat, name="fedtune-view", daemon=True)
    act()
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        act()


def server_screen(snapshot: Snapshot) -> RenderableType:
    """Return a terminal's view of a federation."""
    s = snapshot
    parts: list[RenderableType] = [_head(s), _progress(s)]
    if s.reason and s.status in ("failed", "stopped"):
        parts.append(Text(s.reason, style="red"))
    if s.budgets:
        parts += [Text(), *(_budget(budget) for budget in s.budgets)]
    if s.rows:
        parts += [Text(), _rounds(s)]
    if s.nodes:
        parts += [Text(), _nodes(s)]
    if s.troubles:
        shown = s.troubles[:_TROUBLES_SHOWN]
        parts += [Text(), *(Text(_trouble(one, s.made), style="yellow") for one in shown)]
    if s.queue:
        parts += [Text(), Text(f"waiting: {', '.join(s.queue)}", style="dim")]
    return Group(*parts)


def _screen_of(source: Callable[[], Snapshot]) -> RenderableType:
    try:
        return server_screen(source())
    except (FedtuneError, OSError) as error:
        return Text(f"how the run stands cannot be read: {error}", style="red")


def _head(s: Snapshot) -> Text:
    text = Text(s.experiment or s.federation or "fedtune", style="bold", no_wrap=True)
    rest = [s.run, f"nodes connect to {s.address}" if s.address else ""]
    text.append("".join(f"  {part}" for part in rest if part), style="dim")
    return text


def _progress(s: Snapshot) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    done = s.rounds if s.status == "finished" else s.round
    left = f"about {span(s.seconds_left)} left" if s.seconds_left is not None else ""
    grid.add_row(
        Text(s.status, style=_STYLES.get(s.status, "")),
        ProgressBar(
            total=max(1, s.rounds), completed=done, width=28, complete_style="blue",
            finished_style="green",
        ),
        f"{s.round}/{s.rounds}" if s.rounds else "", Text(s.phase), Text(left, style="dim"),
    )  # fmt: skip
    return grid


def _budget(budget: BudgetView) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    limit = f"of {budget.limit:g}" if budget.limit is not None else "no limit set"
    words = f"epsilon <= {above(budget.epsilon)} {limit}, delta {power(budget.delta)}"
    cells: list[RenderableType] = [Text("privacy", style="dim")]
    if budget.limit is not None:
        share = min(1.0, budget.epsilon / budget.limit)
        bad = budget.epsilon > budget.limit
        cells.append(
            ProgressBar(
                total=1.0, completed=share, width=28, complete_style="red" if bad else "blue",
                finished_style="red" if bad else "yellow",
            )
        )  # fmt: skip
    cells += [Text(words), Text(f"per {budget.unit}", style="dim")]
    grid.add_row(*cells)
    return grid


def _rounds(s: Snapshot) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    names = ["round"]
    counted = any("clients_ok" in row for row in s.rows)
    names += ["ok", "late", "failed"] if counted else []
    names += ["train loss"] if any("train_loss" in row for row in s.rows) else []
    names += ["held-out"] if any("loss" in row for row in s.rows) else []
    names += ["sent", "time"] if counted else ["time"]
    for name in names:
        table.add_column(name, justify="right")
    for row in s.rows[-_ROUNDS_SHOWN:]:
        cells = _cells(row)
        table.add_row(*(cells[name] for name in names))
    return table


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    failed = (row.get("clients_failed") or 0) + (row.get("clients_dropped") or 0)
    base = not row["round"]
    return {
        "round": "base" if base else str(row["round"]),
        "ok": "" if base else str(row.get("clients_ok", "")),
        "late": "" if base else str(row.get("clients_late", "")),
        "failed": "" if base else str(failed),
        "train loss": figure(row.get("train_loss")),
        "held-out": figure(row.get("accuracy") if "macro_f1" in row else row.get("loss")),
        "sent": "" if base else size(sum(row.get(f"bytes_{w}") or 0 for w in ("down", "up"))),
        "time": span(row.get("seconds")),
    }


def _nodes(s: Snapshot) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("node", "status", "seen", *(() if s.secret else ("answers",)), "note"):
        table.add_column(name, no_wrap=True)
    ranked = sorted(s.nodes, key=lambda n: (n.status != "online", n.status != "offline", n.name))
    for node in ranked[:_NODES_SHOWN]:
        cells: list[RenderableType] = [
            Text(node.name[:40]), Text(node.status, style=_STYLES.get(node.status, "")),
            Text(ago(node.last_seen, s.made) if node.last_seen is not None else "-"),
        ]  # fmt: skip
        cells += [] if s.secret else [Text(_answers(node))]
        table.add_row(*cells, Text(node.note[:60], style="yellow"))
    hidden = len(ranked) - _NODES_SHOWN
    return Group(table, Text(f"and {hidden} more", style="dim")) if hidden > 0 else table


def _answers(node: NodeView) -> str:
    parts = [f"{node.rounds_ok or 0} ok"]
    parts += [f"{node.late} late"] if node.late else []
    return ", ".join([*parts, f"{node.failed} failed"] if node.failed else parts)


def _trouble(one: Trouble, now: float) -> str:
    place = "" if one.round is None else f" round {one.round}"
    who = f" {one.who}:" if one.who else ""
    return f"{clock(one.when, now)}{place}{who} {one.words}"[:160]


@dataclass
class _Lines:
    """Says what is new, once."""

    source: Callable[[], Snapshot]
    console: Console
    run: str = ""
    round: int = -1
    status: str = ""
    phase: str = ""
    online: tuple[str, ...] = ()
    said: set[Trouble] = field(default_factory=set)
    refused: str = ""

    def look(self) -> None:
        try:
            self._tell(self.source())
            self.refused = ""
        except (FedtuneError, OSError) as error:
            if str(error) != self.refused:
                self.refused = str(error)
                self._say(f"how the run stands cannot be read: {error}")

    def _tell(self, s: Snapshot) -> None:
        if s.run != self.run:
            self.run, self.round = s.run, -1
            if s.run:
                self._say(f"run {s.run}: {s.rounds} rounds")
        self._nodes(s)
        for trouble in reversed(s.troubles):
            if trouble not in self.said:
                self._say(_trouble(trouble, s.made))
        self.said = set(s.troubles)
        for row in s.rows:
            if row["round"] > self.round:
                # What was spent is known as of now, so it is said with the newest round.
                self._say(_line(row, s.rounds, s.budgets if row is s.rows[-1] else ()))
                self.round = row["round"]
        # Answers that come in are news on a live view only.
        news = s.status if s.status == "running" else f"{s.status}: {s.phase}"
        if news != self.phase:
            self.phase = news
            reason = f" ({s.reason})" if s.reason and s.status in ("failed", "stopped") else ""
            self._say(news + reason)

    def _nodes(self, s: Snapshot) -> None:
        online = tuple(sorted(node.name for node in s.nodes if node.status == "online"))
        if online != self.online:
            came, went = set(online) - set(self.online), set(self.online) - set(online)
            self.online = online
            words = [f"{', '.join(sorted(came))} online"] if came else []
            words += [f"{', '.join(sorted(went))} offline"] if went else []
            self._say(f"{'; '.join(words)} ({len(online)} nodes online)")

    def _say(self, text: str) -> None:
        stamp = time.strftime("%H:%M:%S")
        self.console.print(f"{stamp} {text}", markup=False, soft_wrap=True, highlight=False)


def _line(row: Mapping[str, Any], rounds: int, budgets: Sequence[BudgetView]) -> str:
    cells = _cells(row)
    measured = cells["held-out"]
    name = "accuracy" if "macro_f1" in row else "loss"
    parts = [] if measured == "-" else [f"held-out {name} {measured}"]
    if not row["round"]:
        return ": ".join(["base model", *parts]) if parts else "base model: nothing measured"
    if "clients_ok" in row:
        parts.insert(0, f"{cells['ok']} ok, {cells['late']} late, {cells['failed']} failed")
        parts.append(f"{cells['sent']} sent")
    if cells["train loss"] != "-":
        parts.append(f"train loss {cells['train loss']}")
    for budget in budgets:
        limit = f" of {budget.limit:g}" if budget.limit is not None else ""
        parts.append(f"epsilon <= {above(budget.epsilon)}{limit} per {budget.unit}")
    return f"round {row['round']}/{rounds}: {'; '.join([*parts, cells['time']])}"
