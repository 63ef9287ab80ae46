"""The loss picture of a run."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from fedtune.files import write_atomic
from fedtune.server.run_folder import RunFolder

__all__ = ["draw"]

Rows = Sequence[Mapping[str, Any]]


def draw(folder: RunFolder) -> None:
    """Draw held-out and training loss, and the clients' spread, into ``loss.png``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, config = folder.metrics(), folder.config()
    classify = config.model.task == "classification"
    figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _line(left, rows, "loss", "held-out", "#1f5fa8", marker="o")
    _line(left, rows, "train_loss", "training (clients' mean)", "#9aa5b1", linestyle="--")
    left.set(title=f"{config.name}: loss", xlabel="round", ylabel="nats")
    worst = "accuracy" if classify else "loss"
    _line(right, rows, "client_mean", "mean of clients", "#1f5fa8", marker="o")
    _line(right, rows, "client_p10", "one in ten is worse", "#d98c21", linestyle="--")
    _line(right, rows, "client_worst", "worst client", "#b3382c", linestyle=":")
    right.set(title=f"clients' own held-out {worst}", xlabel="round", ylabel=worst)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomic(folder.path / "loss.png", buffer.getvalue())


def _line(axes: Any, rows: Rows, key: str, label: str, color: str, **style: Any) -> None:
    points = [(row["round"], row[key]) for row in rows if row.get(key) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, color=color, **style)
