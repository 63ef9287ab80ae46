"""A node's terminal: what it does for whom, what left it, and what is left of its budget."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedtune.cli.serving import repeating
from fedtune.privacy.words import above, below, shown
from fedtune.server.status_words import ago, size

__all__ = ["NodeState", "following_node", "node_screen"]

_PAUSE = 1.0
_TROUBLES_SHOWN = 3


@dataclass(frozen=True)
class NodeState:
    """How one node stands.

    Attributes
    ----------
    name, server : str
    connected : bool
    since : float
        Unix time of the last change of ``connected``.
    job, experiment : str
        What it works for; empty: nothing yet.
    round, rounds : int
        0: none yet; not known.
    doing : str
        What happens now, in words.
    epsilon, cap : float or None
        Spent of the owner's budget by all jobs on this data; ``None``: no promise, no cap.
    sent_bytes, received_bytes : int
        Since the process began.
    last : str
        The last thing that happened, one line.
    troubles : tuple of str
        Oldest first.
    """

    name: str
    server: str
    connected: bool
    since: float
    job: str = ""
    experiment: str = ""
    round: int = 0
    rounds: int = 0
    doing: str = ""
    epsilon: float | None = None
    cap: float | None = None
    sent_bytes: int = 0
    received_bytes: int = 0
    last: str = ""
    troubles: tuple[str, ...] = ()


@contextlib.contextmanager
def following_node(source: Callable[[], NodeState], console: Console) -> Iterator[None]:
    """Show what a node does while the block lasts.

    Parameters
    ----------
    source : callable
        Called about twice a second, from another thread, and once at the end.
    console : Console
        A terminal gets a live view; anything else one line for everything that is new.
    """
    if console.is_terminal:
        with Live(
            get_renderable=lambda: node_screen(source()), console=console, refresh_per_second=2
        ):
            yield
        return
    lines = _Lines(source, console)
    with repeating(lines.look, _PAUSE):
        yield


def node_screen(state: NodeState) -> RenderableType:
    """Return a terminal's view of one node."""
    now = time.time()
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column()
    link = Text("connected" if state.connected else "not connected",
                style="green" if state.connected else "bold red")  # fmt: skip
    since = ago(state.since, now).removesuffix(" ago")
    link.append(f" to {_one_line(state.server)}, for {since}", style="default")
    grid.add_row("server", link)
    if state.experiment or state.job:
        grid.add_row("run", _run(state))
    grid.add_row("now", _one_line(state.doing or "waiting for work"))
    if state.epsilon is not None:
        grid.add_row("privacy", _budget(state.epsilon, state.cap))
    grid.add_row("traffic", f"{size(state.sent_bytes)} sent, {size(state.received_bytes)} received")
    if state.last:
        grid.add_row("last", _one_line(state.last))
    for words in state.troubles[-_TROUBLES_SHOWN:]:
        grid.add_row("trouble", Text(_one_line(words), style="yellow"))
    return Group(Text(_one_line(state.name), style="bold"), grid)


def _run(state: NodeState) -> Text:
    text = Text(_one_line(state.experiment or state.job))
    if state.round:
        of = f" of {state.rounds}" if state.rounds else ""
        text.append(f", round {state.round}{of}")
    if state.experiment and state.job:
        text.append(f"  {_one_line(state.job)}", style="dim")
    return text


def _budget(epsilon: float, cap: float | None) -> RenderableType:
    spent = f"epsilon <= {above(epsilon)} spent"
    if cap is None:
        return Text(f"{spent}, no cap set")
    grid = Table.grid(padding=(0, 2))
    over = epsilon > cap
    bar = ProgressBar(
        total=1.0, completed=min(1.0, epsilon / cap) if cap else 1.0, width=24,
        complete_style="blue", finished_style="red" if over else "yellow",
    )  # fmt: skip
    grid.add_row(bar, Text(f"{spent} of {cap:g}, {below(cap - epsilon)} left"))
    return grid


def _one_line(text: str) -> str:
    """Return a text from elsewhere so that it can move no cursor."""
    return shown(text, 120)


def _added(before: tuple[str, ...], now: tuple[str, ...]) -> tuple[str, ...]:
    """Return what came to the end of a list that may have lost its beginning.

    >>> _added(("a", "b", "b"), ("b", "b", "b", "c"))
    ('b', 'c')
    """
    for start in range(len(before) + 1):
        kept = before[start:]
        if now[: len(kept)] == kept:
            return now[len(kept) :]
    return now


@dataclass
class _Lines:
    """Says what is new, once."""

    source: Callable[[], NodeState]
    console: Console
    before: NodeState | None = None

    def look(self) -> None:
        state, before = self.source(), self.before
        self.before = state
        if before is None or state.connected != before.connected:
            words = "connected to" if state.connected else "not connected to"
            self._say(f"{state.name}: {words} {state.server}")
        if state.job and (before is None or state.job != before.job):
            self._say(f"run {state.job} ({state.experiment})" if state.experiment else state.job)
        for words in _added(before.troubles if before else (), state.troubles):
            self._say(f"trouble: {words}")
        said = (before.last, before.round) if before else ("", 0)
        if state.last and (state.last, state.round) != said:
            self._say(state.last)
        if state.epsilon is not None and (before is None or state.epsilon != before.epsilon):
            of = f" of {state.cap:g}" if state.cap is not None else ""
            self._say(f"epsilon <= {above(state.epsilon)}{of} spent")

    def _say(self, text: str) -> None:
        stamp = time.strftime("%H:%M:%S")
        line = shown(f"{stamp} {text}", 400)
        self.console.print(line, markup=False, soft_wrap=True, highlight=False)
