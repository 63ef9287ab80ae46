"""Pictures of the RLDP benchmark: quality over epsilon, learning curves, one run's decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.simulations.benchmarks.rldp_arms import ARMS, NOT_PRIVATE
from fedtune.simulations.benchmarks.rldp_report import at, interval, places, tasks_of

__all__ = ["draw"]

Rows = Sequence[Mapping[str, Any]]

_COLOURS = {
    NOT_PRIVATE: "#444444", "fixed-flat": "#8c8c8c", "automatic": "#b8860b",
    "quantile-flat": "#1f5fa8", "quantile-per-adapter": "#6baed6", "closed-form": "#2a9d55",
    "ffa-lora": "#9467bd", "dp-lac": "#8c564b", "geoclip": "#17a2b8", "random": "#e0a0c0",
    "rldp-online": "#e06010", "rldp-meta": "#c01818", "rldp-paper": "#f0a060",
    "rldp-default": "#7a1f3d",
    "raw-sensing": "#000000", "constant": "#cc79a7",
}  # fmt: skip


def draw(rows: Rows, out: Path) -> None:
    """Write ``rldp-loss.png``, ``rldp-curves.png`` and ``rldp-shape.png``, of what there is."""
    tasks = tasks_of([row for row in rows if row["epsilon"] is not None])
    if tasks:
        _draw_losses(rows, tasks, out / "rldp-loss.png")
        _draw_curves(rows, tasks, out / "rldp-curves.png")
    for arm in ("rldp-meta", "rldp-online"):
        kept = [r for r in rows if r["arm"] == arm and len(r.get("decisions") or ()) > 1]
        if kept:
            _draw_shape(kept[0], out / "rldp-shape.png")
            return


def _figure(columns: int, width: float, rows: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, 3.3 * rows), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    found = figure.subplots(rows, columns, squeeze=False)
    for axes in found.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, found


def _legend(figure: Any, axes: Any) -> None:
    handles: dict[str, Any] = {}
    for one in axes.flat:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=5,
        frameon=False, fontsize=8,
    )  # fmt: skip


def _draw_losses(rows: Rows, tasks: Sequence[str], path: Path) -> None:
    """Draw each policy's loss with its interval at each epsilon, side by side."""
    figure, axes = _figure(2, 5.0, (len(tasks) + 1) // 2)
    for one, task in zip(axes.flat, tasks, strict=False):
        epsilons = [epsilon for name, epsilon in places(rows) if name == task]
        for number, arm in enumerate(_COLOURS):
            points = []
            for index, epsilon in enumerate(epsilons):
                mine = [r["loss"] for r in at(rows, task, epsilon) if r["arm"] == arm]
                if mine:
                    mean, low, high = interval(mine)
                    place = index + (number / (len(_COLOURS) - 1) - 0.5) * 0.7
                    points.append((place, mean, max(0.0, mean - low), max(0.0, high - mean)))
            if points:
                x, y, below, above = np.nan_to_num(np.array(points)).T
                one.errorbar(
                    x, y, yerr=(below, above), fmt="o", ms=3, lw=1, color=_COLOURS[arm],
                    label=ARMS[arm].label,
                )  # fmt: skip
        one.set_xticks(range(len(epsilons)), [f"{epsilon:g}" for epsilon in epsilons])
        one.set(title=task, xlabel="epsilon", ylabel="held-out loss")
    for one in axes.flat[len(tasks) :]:
        one.set_visible(False)
    _legend(figure, axes)
    figure.savefig(path)


def _draw_curves(rows: Rows, tasks: Sequence[str], path: Path) -> None:
    """Draw mean loss over steps, at the epsilon with most runs."""
    figure, axes = _figure(2, 5.0, (len(tasks) + 1) // 2)
    for one, task in zip(axes.flat, tasks, strict=False):
        epsilons = [epsilon for name, epsilon in places(rows) if name == task]
        epsilon = max(epsilons, key=lambda value: len(at(rows, task, value)))
        for arm, colour in _COLOURS.items():
            curves = [r["curve"] for r in at(rows, task, epsilon) if r["arm"] == arm]
            if curves:
                steps = [point[0] for point in curves[0]]
                mean = np.mean([[point[1] for point in curve] for curve in curves], axis=0)
                wide = 2.0 if arm.startswith("rldp") else 1.0
                one.plot(steps, mean, color=colour, lw=wide, label=ARMS[arm].label)
        one.set(title=f"{task}, epsilon {epsilon:g}", xlabel="step", ylabel="held-out loss")
    for one in axes.flat[len(tasks) :]:
        one.set_visible(False)
    _legend(figure, axes)
    figure.savefig(path)


def _draw_shape(row: Mapping[str, Any], path: Path) -> None:
    """Draw clip norms and shares of all adapters over the steps of one run."""
    figure, axes = _figure(2, 4.6)
    steps = [one["step"] for one in row["decisions"]]
    for place, (name, label) in enumerate((("norms", "clip norm"), ("shares", "share"))):
        values = np.array([one[name] for one in row["decisions"]])
        for column, line in enumerate(values.T):
            depth = column / max(1, values.shape[1] - 1)
            axes[0][place].plot(
                steps, line, color=(0.1 + 0.8 * depth, 0.3, 0.8 - 0.7 * depth), lw=1
            )
        axes[0][place].set(xlabel="step", ylabel=f"{label} of each adapter", yscale="log")
    figure.suptitle(
        f"{ARMS[row['arm']].label}, {row['task']}, epsilon {row['epsilon']:g}: blue is the first "
        "layer", fontsize=9,
    )  # fmt: skip
    figure.savefig(path)
