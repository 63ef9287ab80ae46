"""The loss curve of the status page, as the points of a drawing; the template draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Chart", "chart_of", "ticks_of"]

_MOST_POINTS = 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 14.0, 12.0, 36.0
_KINDS = (("held-out", "loss"), ("training", "train_loss"))


@dataclass(frozen=True)
class Line:
    """One curve: its name, the ``points`` of a polyline, its last point, and its last value."""

    name: str
    points: str
    x: float
    y: float
    last: float


@dataclass(frozen=True)
class Chart:
    """A drawing of ``width`` by ``height`` units; ticks are places with their labels."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    words: str


def chart_of(
    rows: Sequence[Mapping[str, Any]], rounds: int, width: float, height: float
) -> Chart | None:
    """Return the curves of held-out and training loss; ``None`` when nothing was measured.

    Parameters
    ----------
    rows : sequence of mapping
        ``metrics.jsonl``. A value that is no number leaves its round out.
    rounds : int
        The x axis goes from 0 to here from the start: a curve that grows moves nothing.
    width, height : float
        In units of the drawing.
    """
    found = [(name, _points(rows, key)) for name, key in _KINDS]
    curves = [(name, points) for name, points in found if points]
    if not curves:
        return None
    values = [y for _, points in curves for _, y in points]
    ticks = ticks_of(min(values), max(values))
    low, high = ticks[0], ticks[-1]
    last_x = max(rounds, *(x for _, points in curves for x, _ in points), 1)
    across, down = width - _LEFT - _RIGHT, height - _TOP - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            round(_LEFT + across * x / last_x, 1),
            round(_TOP + down * (high - y) / (high - low), 1),
        )

    lines = []
    for name, points in curves:
        spots = [place(x, y) for x, y in points]
        text = " ".join(f"{x:g},{y:g}" for x, y in spots)
        lines.append(Line(name, text, *spots[-1], points[-1][1]))
    return Chart(
        width, height, _LEFT, width - _RIGHT, _TOP, height - _BOTTOM, tuple(lines),
        tuple((place(x, low)[0], f"{x:g}") for x in _whole(last_x, int(across // 70))),
        tuple((place(0, y)[1], label) for y, label in zip(ticks, _labels(ticks), strict=True)),
        _words(curves),
    )  # fmt: skip


def ticks_of(low: float, high: float) -> list[float]:
    """Return round numbers from below ``low`` to above ``high``, at least two.

    Examples
    --------
    >>> ticks_of(3.91, 4.52), ticks_of(2.0, 2.0), ticks_of(0.0, 900.0)
    ([3.8, 4.0, 4.2, 4.4, 4.6], [1.96, 1.98, 2.0, 2.02, 2.04], [0.0, 500.0, 1000.0])
    """
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - max(abs(low), 1.0) * 0.02, high + max(abs(high), 1.0) * 0.02
    rough = (high - low) / 4
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(m * scale for m in (1.0, 2.0, 5.0, 10.0) if m * scale >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    places = max(0, 1 - math.floor(math.log10(step)))
    return [round(n * step, places) for n in range(first, last + 1)]


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    found = [
        (float(row["round"]), float(row[key]))
        for row in rows
        if row.get(key) is not None and math.isfinite(row[key])
    ]
    if len(found) <= _MOST_POINTS:
        return found
    stride = math.ceil(len(found) / _MOST_POINTS)
    # Counted from the end: the newest value is always drawn.
    return found[::-1][::stride][::-1]


def _whole(last: float, most: int) -> list[int]:
    """Return whole numbers from 0 to ``last``, so many at most."""
    most = max(2, most)
    step = 1
    sizes = iter(m * 10**e for e in range(12) for m in (1, 2, 5))
    while last / step > most:
        step = next(sizes)
    return list(range(0, int(last) + 1, step))


def _labels(ticks: Sequence[float]) -> list[str]:
    """Return numbers with the same number of places."""
    if max(map(abs, ticks)) >= 1e5:
        return [f"{y:g}" for y in ticks]
    places = max(len(f"{y:g}".partition(".")[2]) for y in ticks)
    return [f"{y:.{places}f}" for y in ticks]


def _words(curves: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> str:
    return "; ".join(
        f"{name} loss from {points[0][1]:.4g} (round {points[0][0]:g}) to {points[-1][1]:.4g} "
        f"(round {points[-1][0]:g})"
        for name, points in curves
    )
