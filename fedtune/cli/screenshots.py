"""Take the pictures of the documentation: a real short private run, seen as people see it.

python -m fedtune.cli.screenshots [--out docs/pictures] [--rounds 8]

The clients of a simulation stand in for nodes: who answered last is online. The run
is held in the middle of a round while the first pictures are taken.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from rich.console import Console, RenderableType
from rich.terminal_theme import TerminalTheme

from fedtune.cli.joining import NodeState, node_screen
from fedtune.cli.serving import server_screen
from fedtune.config import Config
from fedtune.configfile import load
from fedtune.data.stdlib import read_half
from fedtune.privacy.plan import resolve
from fedtune.server.event_log import EVENTS, EventLog
from fedtune.server.events import ClientDone, Event
from fedtune.server.run_folder import RunFolder, create
from fedtune.server.snapshot import NodeView, Seen, Snapshot, snapshot_of
from fedtune.server.status_page import start_status
from fedtune.simulations.browser import Browser, open_browser
from fedtune.simulations.simulate import simulate

__all__ = ["main"]

_DESK, _PHONE = (1280, 800), (390, 844)
_THEME = TerminalTheme(
    (27, 31, 37), (230, 227, 220),
    [(27, 31, 37), (241, 145, 139), (124, 194, 149), (220, 181, 97), (134, 182, 230),
     (190, 160, 220), (120, 190, 200), (163, 172, 182)],
    [(100, 108, 118), (241, 145, 139), (124, 194, 149), (220, 181, 97), (134, 182, 230),
     (190, 160, 220), (120, 190, 200), (230, 227, 220)],
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Run the experiment and write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    parser.add_argument("--rounds", type=int, default=8)
    chosen = parser.parse_args(arguments)
    chosen.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fedtune-") as place, open_browser(60.0) as browser:
        config = _experiment(Path(place), chosen.rounds)
        folder = create(config)
        seen = Seen()

        def source() -> Snapshot:
            return snapshot_of(folder, _nodes(folder), federation="example federation", seen=seen)

        status = start_status(source)
        try:
            middle = max(1, chosen.rounds - 2)
            watch = _holding(config, folder, middle, lambda: _running(
                browser, status.url, source, folder, chosen.out))  # fmt: skip
            simulate(config, folder, watch)
            time.sleep(1)
            _page(browser, status.url, chosen.out, "finished")
        finally:
            status.close()


def _experiment(place: Path, rounds: int) -> Config:
    """Return the private demo, measured on packages that no client has: there is a curve."""
    public = place / "public.jsonl"
    rows = read_half(["json", "html", "wsgiref"])[:40]
    public.write_text(
        "".join(json.dumps({"client": "public", "text": row["text"]}) + "\n" for row in rows),
        encoding="utf-8",
    )
    demo = files("fedtune.simulations") / "experiments" / "demo_private.toml"
    changes = (
        f"federation.rounds={rounds}", f"data.eval={public}", f"output.folder={place / 'runs'}",
        f"privacy.ledger={place / 'ledger.db'}", "engine.executor=threads", "engine.workers=1",
        "tuning.steps=6", "tuning.lr=8e-3",
    )  # fmt: skip
    return resolve(load(Path(str(demo)), changes))


def _holding(
    config: Config, folder: RunFolder, middle: int, act: Callable[[], None]
) -> Callable[[Event], None]:
    """Return a watcher that writes events down, and acts once in the middle of a round."""
    log = EventLog(folder.path / EVENTS)
    answers: list[str] = []

    def hear(event: Event) -> None:
        log.hear(event)
        if isinstance(event, ClientDone) and event.round == middle:
            answers.append(event.client)
            if len(answers) == max(2, config.data.partition.clients // 2):
                act()

    return hear


def _nodes(folder: RunFolder) -> list[NodeView]:
    last: dict[str, float] = {}
    file = folder.path / EVENTS
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for line in map(json.loads, lines):
        if line["event"] == "client_done":
            last[line["client"]] = line["time"]
    return [NodeView(name, "online", when) for name, when in sorted(last.items())]


def _running(
    browser: Browser, url: str, source: Callable[[], Snapshot], folder: RunFolder, out: Path
) -> None:
    time.sleep(1)
    _page(browser, url, out, "running")
    _terminal(browser, server_screen(source()), out / "terminal-serve.png", 100)
    _terminal(browser, node_screen(_as_node(folder, source())), out / "terminal-join.png", 76)


def _page(browser: Browser, url: str, out: Path, name: str) -> None:
    browser.show(url, *_DESK)
    (out / f"status-{name}-desktop.png").write_bytes(_small(browser.picture(whole=True)))
    browser.show(url, *_PHONE, sharp=2, dark=name == "finished")
    (out / f"status-{name}-phone.png").write_bytes(_small(browser.picture()))


def _as_node(folder: RunFolder, now: Snapshot) -> NodeState:
    """Return what one client of the run would show at its own terminal."""
    name = now.nodes[0].name
    rows = [row for row in folder.client_rows() if row["client"] == name]
    (budget,) = now.budgets
    return NodeState(
        name=name, server="example.org:9092", connected=True, since=now.started or now.made,
        job=now.run, experiment=now.experiment, round=now.round + 1, rounds=now.rounds,
        doing="waiting for work", epsilon=budget.epsilon, cap=budget.limit,
        sent_bytes=sum(row["bytes_up"] for row in rows),
        received_bytes=sum(row["bytes_down"] for row in rows),
        last=f"sent the update of round {now.round + 1}",
    )  # fmt: skip


def _terminal(browser: Browser, screen: RenderableType, file: Path, width: int) -> None:
    console = Console(
        record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    console.print(screen)
    page = console.export_html(theme=_THEME, inline_styles=True, code_format=_FRAME)
    with tempfile.TemporaryDirectory(prefix="fedtune-") as place:
        written = Path(place) / "terminal.html"
        written.write_text(page, encoding="utf-8")
        browser.show(written.as_uri(), 1400, 400)
        size = browser.value("(({width, height}) => [width, height])("
                             "document.querySelector('pre').getBoundingClientRect())")  # fmt: skip
        browser.show(written.as_uri(), int(size[0]) + 1, int(size[1]) + 1, sharp=1.5)
        file.write_bytes(_small(browser.picture()))


_FRAME = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0; background: {background}; }}
pre {{ display: inline-block; margin: 0; padding: 18px 22px; background: {background};
color: {foreground}; font: 14px/1.35 "DejaVu Sans Mono", Menlo, Consolas, monospace; }}
</style><pre>{code}</pre>"""


def _small(png: bytes) -> bytes:
    """Return the same picture in a palette, a fraction of the bytes."""
    from PIL import Image

    found = Image.open(io.BytesIO(png)).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    found.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
