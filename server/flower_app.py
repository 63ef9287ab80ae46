"""The ``ServerApp`` that the bundle of a real run refers to."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

__all__ = ["app"]

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Work on the run folder that the run's own settings name."""
    from fedtune.server import serving

    serving.run(grid, Path(str(context.run_config["folder"])))
