"""The ``fedtune`` command."""

from __future__ import annotations

import os
import signal

__all__ = ["main"]


def main() -> None:
    """Run the command; the entry point of the console script."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # A service manager's stop is an interruption like Ctrl-C: committed rounds stay.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from fedtune.cli.app import run

    run()
