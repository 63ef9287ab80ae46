"""The status page in a real browser: how it looks, and that it follows."""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from fedtune.server.snapshot import NodeView, Snapshot, Trouble, snapshot_of
from fedtune.server.status_page import Status
from fedtune.simulations.browser import Browser, chromium_path, open_browser
from tests.server.standing import EXAMPLE, HOSTILE, Run
from tests.server.status_kit import TOKEN, port_of, standing


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if chromium_path() is None:
        if os.environ.get("CI") and Path("/usr/bin/chromium").exists():
            pytest.fail("/usr/bin/chromium is there, and is not found")
        pytest.skip("no Chromium on this machine")
    with open_browser(patience=60.0) as found:
        yield found


@pytest.fixture
def quiet(browser: Browser, serve: Callable[..., Status]) -> Iterator[Browser]:
    """The browser; the page must have nothing to complain about while it is served."""
    browser.complaints.clear()
    yield browser
    browser.show("about:blank", 400, 400)
    assert browser.complaints == []


def crowded(tmp_path: Path) -> Snapshot:
    """Everything at once, with the worst names."""
    found = standing(tmp_path)
    nodes = tuple(
        NodeView(name, "offline", 1.0, 10, 20, 30, "round 2: " + "w" * 290)
        for name in ("N" * 80, HOSTILE, "ш" * 80, "שלום שלום")
    )
    troubles = tuple(Trouble(1e9 + n, n, "W" * 80, "x" * 300) for n in range(12))
    return replace(
        found, nodes=(*found.nodes, *nodes), troubles=troubles, run="r" * 80, federation="F" * 80,
        experiment="e" * 64, address="a" * 80, reason="q" * 300, status="failed",
        queue=("z" * 80,) * 5,
    )  # fmt: skip


@pytest.mark.parametrize("width", [320, 390, 700, 1280])
def test_nothing_sticks_out(
    width: int, quiet: Browser, tmp_path: Path, serve: Callable[..., Status]
) -> None:
    for found in (standing(tmp_path), crowded(tmp_path), snapshot_of(None)):
        quiet.show(serve(found).url, width, 844)
        assert quiet.value("innerWidth") == width
        assert quiet.value("document.documentElement.scrollWidth") <= width
        outside = quiet.value(
            "[...document.querySelectorAll('main *')].filter(e => !e.closest('[hidden]') && "
            f"e.getBoundingClientRect().right > {width} + .5).map(e => e.outerHTML.slice(0, 80))"
        )
        assert outside == []


def test_it_can_be_read(quiet: Browser, tmp_path: Path, serve: Callable[..., Status]) -> None:
    found = standing(tmp_path)
    url = serve(found).url
    quiet.show(url, 390, 844)
    seen = quiet.value("document.body.innerText")
    for words in ("round 3: 1 of 2 answered", "ε ≤", "of 8", "out of memory", "Loss by round"):
        assert words in seen
    bars = quiet.value(
        "[...document.querySelectorAll('[role=progressbar]')].map(e => "
        "[e.getAttribute('aria-label'), e.getAttribute('aria-valuenow'), "
        "e.getBoundingClientRect().width > 200])"
    )
    share = round(100 * found.budgets[0].epsilon / 8.0)
    assert bars == [["Rounds done", "50", True], ["Privacy spent, per example", str(share), True]]
    filled = quiet.value(
        "(e => e.firstElementChild.getBoundingClientRect().width / e.getBoundingClientRect().width)"
        "(document.querySelector('[role=progressbar]'))"
    )
    assert filled == pytest.approx(0.5, abs=0.01)
    assert quiet.value("document.querySelector('figure').getAttribute('aria-label')").startswith(
        "held-out loss from 4.5 (round 0) to 4 (round 2)"
    )
    small = quiet.value(
        "Math.min(...[...document.querySelectorAll('main *:not(svg *)')].filter(e => "
        "e.innerText).map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert small >= 12


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_colours_have_contrast(
    dark: bool, quiet: Browser, tmp_path: Path, serve: Callable[..., Status]
) -> None:
    """WCAG 2.1, 1.4.3: at least 4.5 to 1 for every text, on what is behind it."""
    quiet.show(serve(crowded(tmp_path)).url, 1280, 800, dark=dark)
    worst = quiet.value(_CONTRAST)
    assert worst["ratio"] >= 4.5, worst
    back = quiet.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", back))) < 3 * 60) == dark


_CONTRAST = """
(() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (c) => c.slice(0, 3).map((v) => (v /= 255) <= .04045 ? v / 12.92 :
    ((v + .055) / 1.055) ** 2.4).reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
  const behind = (e) => { for (; e; e = e.parentElement) {
    const c = rgb(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c; }
    return [255, 255, 255]; };
  let worst = { ratio: 99 };
  for (const e of document.querySelectorAll('main *')) {
    if (e.closest('[hidden]') || ![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
      continue;
    const style = getComputedStyle(e), svg = e.namespaceURI.endsWith('svg');
    const a = light(rgb(svg ? style.fill : style.color)), b = light(behind(e));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < worst.ratio) worst = { ratio, text: e.textContent.slice(0, 40) };
  }
  return worst;
})()
"""


def test_it_follows_the_run_without_jumps(
    quiet: Browser, tmp_path: Path, serve: Callable[..., Status]
) -> None:
    run = Run(tmp_path, example=EXAMPLE)
    with run.folder.lock():
        run.base()
        run.round(1, "a")
        quiet.show(serve(lambda: run.look("a")).url, 1280, 800)
        quiet.value("window.kept = document.getElementById('nodes'), window.first = "
                    "document.querySelector('h1'), 1")  # fmt: skip
        quiet.value("window.shift = 0, new PerformanceObserver(l => l.getEntries().forEach(e => "
                    "{ window.shift += e.value })).observe({type: 'layout-shift'}), 1")  # fmt: skip
        run.begin(2, 1)
        quiet.wait_for("document.body.innerText.includes('round 2: 0 of 1 answered')")
        run.done(2, "a")
        run.commit(2, {"a": "ok"})
        quiet.wait_for("document.getElementById('cards').innerText.includes('2 of 4')")
        assert quiet.value("document.title") == "running 2/4: ward-notes"
        assert quiet.value("window.first === document.querySelector('h1')"), "head has no news"
        assert quiet.value("window.shift") < 0.1
        run.begin(3, 1)
        run.done(3, HOSTILE, "failed", HOSTILE)
        quiet.wait_for("document.getElementById('troubles').innerText.includes('<script>')")
    assert quiet.value("document.scripts.length") == 1


def test_a_server_that_is_gone_is_said_and_one_that_is_back_too(
    browser: Browser, tmp_path: Path, serve: Callable[..., Status]
) -> None:
    found = standing(tmp_path)
    status = serve(found)
    browser.show(status.url, 390, 844)
    assert browser.value("document.getElementById('gone').hidden")
    status.close()
    browser.wait_for("!document.getElementById('gone').hidden")
    assert browser.value("document.getElementById('gone').innerText").startswith(
        "The server does not answer."
    )
    assert browser.value("document.documentElement.scrollWidth") <= 390
    serve(replace(found, phase="back again"), port=port_of(status))
    browser.wait_for("document.getElementById('gone').hidden")
    browser.wait_for("document.body.innerText.includes('back again')")


def test_a_token_once_and_then_the_cookie(
    quiet: Browser, tmp_path: Path, serve: Callable[..., Status]
) -> None:
    status = serve(standing(tmp_path), token=TOKEN)
    quiet.show(f"{status.url}?token={TOKEN}", 390, 844)
    assert quiet.value("location.href") == status.url
    assert "round 3" in quiet.value("document.body.innerText")
    assert quiet.value("document.cookie") == ""
    assert quiet.value("fetch('/state.json').then(a => a.status)") == 200


def test_without_scripts_it_is_loaded_again(
    quiet: Browser, tmp_path: Path, serve: Callable[..., Status]
) -> None:
    looks: list[int] = []
    found = standing(tmp_path)

    def look() -> Snapshot:
        looks.append(1)
        return found

    quiet.ask("Emulation.setScriptExecutionDisabled", value=True)
    try:
        quiet.ask("Page.navigate", url=serve(look).url)
        until = time.monotonic() + 20
        while len(looks) < 2 and time.monotonic() < until:
            time.sleep(0.2)
    finally:
        quiet.ask("Emulation.setScriptExecutionDisabled", value=False)
    assert len(looks) >= 2


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 800)])
def test_pictures_show_something(
    width: int, height: int, quiet: Browser, tmp_path: Path, serve: Callable[..., Status]
) -> None:
    quiet.show(serve(standing(tmp_path)).url, width, height)
    picture = Image.open(io.BytesIO(quiet.picture()))
    assert picture.size == (width, height)
    colours = picture.convert("RGB").getcolors(maxcolors=1 << 20)
    assert colours is not None
    assert len(colours) > 50
    assert max(count for count, _ in colours) < 0.95 * width * height
