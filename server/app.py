"""The server as a Flower ``ServerApp``; any engine or SuperLink can drive it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedtune.config import Config
from fedtune.errors import ExitCode, FedtuneError
from fedtune.server.books import Books
from fedtune.server.disclose import Ended, disclose
from fedtune.server.events import Watcher
from fedtune.server.link import GridLink, Link
from fedtune.server.picture import draw
from fedtune.server.private import open_central
from fedtune.server.result import save_result
from fedtune.server.rounds import run_rounds
from fedtune.server.run_folder import RunFolder
from fedtune.server.secure_round import Identities
from fedtune.server.tuned import Tuned, load_tuned

__all__ = ["Outcome", "concluding", "make_server_app", "work"]


@dataclass
class Outcome:
    """Where a ``ServerApp``, which returns nothing, leaves its failure or success."""

    finished: bool = False
    error: BaseException | None = None

    def check(self) -> None:
        """Raise what the server raised."""
        if self.error is not None:
            raise self.error


def make_server_app(
    config: Config, labels: tuple[str, ...], folder: RunFolder, watch: Watcher, outcome: Outcome,
    identities: Identities | None = None,
) -> ServerApp:  # fmt: skip
    """Return the ``ServerApp`` of one run.

    Parameters
    ----------
    labels : tuple of str
        Classification: the classes, in order.
    folder : RunFolder
        Holds the committed rounds; a run goes on from there.
    watch : callable
        Hears every event of the run.
    outcome : Outcome
        Is told how it ended: engines may run this in a thread of theirs.
    identities : callable or None
        Secure aggregation: returns everybody's public identity by name.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        with concluding(folder, outcome):
            work(GridLink(grid), config, labels, folder, watch, identities=identities)

    return app


@contextlib.contextmanager
def concluding(folder: RunFolder, outcome: Outcome) -> Iterator[None]:
    """Note how a run ends, in its folder and in ``outcome``; what is raised goes no further."""
    try:
        yield
        outcome.finished = True
    except BaseException as error:  # noqa: BLE001 - engines swallow what is raised here
        outcome.error = error
        code = error.code if isinstance(error, FedtuneError) else ExitCode.INTERNAL
        failed = isinstance(error, Exception) and code != ExitCode.INTERRUPTED
        # A disk that is full must not hide what failed first.
        with contextlib.suppress(FedtuneError):
            told = {"code": int(code), "hint": getattr(error, "hint", "")} if failed else {}
            status = "failed" if failed else "stopped"
            folder.update_status(status=status, reason=_why(error), **told)


def _why(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "stopped by Ctrl-C or a termination signal"
    return str(error) or type(error).__name__


def work(
    link: Link, config: Config, labels: tuple[str, ...], folder: RunFolder, watch: Watcher,
    *, tuned: Tuned | None = None, books: Books | None = None,
    identities: Identities | None = None,
) -> None:  # fmt: skip
    """Run a federation from its last committed round to its result.

    Parameters
    ----------
    link : Link
        Reaches the clients.
    tuned : Tuned or None
        The server's copy of the model, where it is loaded already.
    books, identities
        See ``run_rounds``.
    """
    folder.update_status(status="running", reason="", labels=list(labels))
    tuned = tuned or load_tuned(config, labels)
    central = open_central(config, folder.job())
    try:
        state = run_rounds(link, tuned, folder, watch, central, books, identities)
    except BaseException as error:
        # What was released until now needs its statement as much as a whole run.
        with contextlib.suppress(FedtuneError):
            disclose(tuned, folder, _ended(error))
        raise
    disclose(tuned, folder)
    difference = save_result(tuned, state, folder, clients=len(link.nodes()))
    draw(folder)
    folder.update_status(
        status="finished",
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        adapter_difference=difference,
        result=_result(folder),
    )


def _ended(error: BaseException) -> Ended:
    if isinstance(error, FedtuneError) and error.code != ExitCode.INTERRUPTED:
        exhausted = error.code == ExitCode.BUDGET_EXHAUSTED
        return "budget-exhausted" if exhausted else "failed"
    return "interrupted"


def _result(folder: RunFolder) -> dict[str, Any]:
    """Return the last row, with the first one's scores beside it."""
    rows = folder.metrics()
    kept = ("loss", "perplexity", "accuracy", "macro_f1")
    before = {f"base_{key}": rows[0][key] for key in kept if key in rows[0]}
    return {**before, **rows[-1]}
