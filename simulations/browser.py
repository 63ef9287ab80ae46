"""A headless Chromium on a leash: looks at pages as phones and desks do, for pictures and tests.

It speaks the DevTools protocol over two pipes (``--remote-debugging-pipe``), so that no
port is open and nothing else has to be installed.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fedtune.errors import ExitCode, FedtuneError

__all__ = ["Browser", "chromium_path", "open_browser"]

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run", "--mute-audio",
    "--disable-extensions", "--disable-background-networking", "--disable-sync",
    "--disable-component-update", "--no-default-browser-check", "--force-color-profile=srgb",
)  # fmt: skip


def chromium_path() -> str | None:
    """Return where a Chromium is, or ``None``."""
    return next((found for name in _NAMES if (found := shutil.which(name))), None)


@dataclass
class Browser:
    """One page of one browser; see ``open_browser``.

    Attributes
    ----------
    complaints : list of str
        What the page wrote to the console as a warning or an error, and what was blocked.
    """

    to: int
    back: int
    patience: float
    complaints: list[str] = field(default_factory=list)
    session: str = ""
    _number: int = 0
    _rest: bytes = b""

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command of the DevTools protocol and return its result.

        Raises
        ------
        FedtuneError
            The browser says no, or nothing within ``patience`` seconds.
        """
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.to, data) :]
        until = time.monotonic() + self.patience
        while True:
            found = self._next(until)
            if found.get("id") != self._number:
                self._note(found)
            elif "error" in found:
                raise _error(f"{method}: {found['error'].get('message')}")
            else:
                return dict(found["result"])

    def show(
        self, url: str, width: int, height: int, *, dark: bool = False, sharp: float = 1.0
    ) -> None:
        """Open a page in a window of so many CSS pixels; ``sharp`` is device pixels for each."""
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height,
            deviceScaleFactor=sharp, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def value(self, script: str) -> Any:
        """Return what an expression is in the page; promises are awaited."""
        found = self.ask(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in found:
            raise _error(str(found["exceptionDetails"])[:500])
        return found["result"].get("value")

    def wait_for(self, script: str) -> None:
        """Wait until an expression is true in the page."""
        until = time.monotonic() + self.patience
        while not self.value(f"Boolean({script})"):
            if time.monotonic() > until:
                raise _error(f"waited {self.patience:g} s for: {script}")
            time.sleep(0.05)

    def picture(self, *, whole: bool = False) -> bytes:
        """Return a PNG of what is in the window, or of the whole page."""
        found = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(found["data"])

    def _next(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self.back], [], [], max(0.0, until - time.monotonic()))
            data = os.read(self.back, 1 << 20) if ready else b""
            if not data:
                raise _error("it does not answer")
            self._rest += data
        text, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(text))

    def _note(self, message: dict[str, Any]) -> None:
        method, given = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(str(given["exceptionDetails"].get("text")))
        elif method == "Runtime.consoleAPICalled" and given["type"] in ("warning", "error"):
            self.complaints.append(str([one.get("value") for one in given["args"]]))
        elif method == "Log.entryAdded" and given["entry"]["level"] in ("warning", "error"):
            self.complaints.append(f"{given['entry']['text']} {given['entry'].get('url', '')}")


@contextlib.contextmanager
def open_browser(patience: float = 30.0) -> Iterator[Browser]:
    """Start a Chromium with one empty page; it is gone afterwards, with all its processes.

    Raises
    ------
    FedtuneError
        ``ExitCode.ENGINE``: there is none here, or it does not answer.
    """
    path = chromium_path()
    if path is None:
        raise _error("there is none on this machine")
    with tempfile.TemporaryDirectory(prefix="fedtune-", ignore_cleanup_errors=True) as home:
        reads, to = os.pipe()
        back, writes = os.pipe()
        # The browser's ends become 3 and 4; ours must be neither, nor be inherited.
        moved = [os.dup(end) for end in (reads, writes)]
        quiet = os.open(os.devnull, os.O_RDWR)
        actions = [
            (os.POSIX_SPAWN_DUP2, quiet, 1), (os.POSIX_SPAWN_DUP2, quiet, 2),
            (os.POSIX_SPAWN_DUP2, moved[0], 3), (os.POSIX_SPAWN_DUP2, moved[1], 4),
        ]  # fmt: skip
        command = [path, *_FLAGS, f"--user-data-dir={home}", "about:blank"]
        try:
            process = os.posix_spawn(
                path, command, {**os.environ, "HOME": home}, file_actions=actions, setpgroup=0
            )
        finally:
            for end in (reads, writes, quiet, *moved):
                os.close(end)
        try:
            yield _attached(Browser(to, back, patience))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            os.close(to)
            os.close(back)


def _attached(browser: Browser) -> Browser:
    target = browser.ask("Target.createTarget", url="about:blank")["targetId"]
    found = browser.ask("Target.attachToTarget", targetId=target, flatten=True)
    browser.session = found["sessionId"]
    for domain in ("Page", "Runtime", "Log"):
        browser.ask(f"{domain}.enable")
    return browser


def _error(words: str) -> FedtuneError:
    return FedtuneError(
        f"Chromium: {words}",
        hint="install chromium; it is only needed for pictures and tests of pages",
        code=ExitCode.ENGINE,
    )
