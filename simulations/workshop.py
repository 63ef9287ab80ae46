"""Where worker processes come from: one that has imported all, and computed nothing, forks them.

A process that computes could not be forked, for torch's threads may run in it. Imports
take seconds; here they are made once, whatever the number of workers, and again for none
that takes a dead one's place.
"""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing import forkserver
from typing import TYPE_CHECKING

from fedtune.config import Config

if TYPE_CHECKING:  # not on every system
    from multiprocessing.context import ForkServerContext, SpawnContext

__all__ = ["in_processes", "open_early", "workshop"]

_IMPORTED = ["fedtune.client.app", "peft"]


def workshop() -> ForkServerContext | SpawnContext:
    """Return what starts workers."""
    if not _can_fork():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    return context


def in_processes(config: Config) -> bool:
    """Say whether clients run in worker processes of ours.

    Masks of a secure sum live in memory from one message to the next, so that one process
    must have them all.
    """
    engine = config.engine
    one = config.federation.secure is not None
    return engine.kind == "local" and engine.executor == "processes" and not one


def open_early(config: Config) -> None:
    """Begin with the imports of workers now, beside those of this process.

    For its main thread. Nothing is begun where there will be no workers.
    """
    if not (in_processes(config) and _can_fork()):
        return
    workshop()
    # A Ctrl-C meanwhile is this process's to answer.
    own = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, own)


def _can_fork() -> bool:
    return "forkserver" in multiprocessing.get_all_start_methods()
