"""The ``fedtune`` command."""

from __future__ import annotations

import os
import signal

__all__ = ["main"]


def main() -> None:
    """Run the command; the entry point of the console script."""
    # Flower and the hub call home unless told not to, and read this at import.
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # A service manager's stop is an interruption like Ctrl-C: committed rounds stay.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from fedtune.cli.app import run

    run()
