"""Clip norms, shares and noise over the steps of a run, as one SVG for desks and one for phones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.privacy.events import Unit
from fedtune.privacy.report_choices import Choices, Course, Decided, told
from fedtune.privacy.report_model import Chapter
from fedtune.privacy.report_picture import ACCENT, INK, QUIET, as_svg
from fedtune.privacy.words import plural, shown, tidy

__all__ = ["choices_in_words", "draw_choices", "shown_choices"]

_COLOURS = (ACCENT, "#b3572a", "#3d7a3d", "#7a4a8c", "#8a6414", "#4d8a99")
_WIDTH = {"wide": 7.2, "narrow": 3.6}
_HEIGHT = 1.45  # of one panel, inches
_LOG_FROM = 8.0
_BAND = (10.0, 90.0)
_ROWS = 24

Values = Callable[[Decided], Sequence[float]]


@dataclass(frozen=True)
class _Panel:
    """One quantity of every block over the run."""

    title: str
    short: str
    values: Values


def draw_choices(choices: Choices, often: str, shape: str) -> str:
    """Return an SVG element, text as outlines.

    Parameters
    ----------
    choices : Choices
    often : str
        "step" or "round".
    shape : str
        ``"wide"`` (7.2 inches) or ``"narrow"`` (3.6), for a phone.
    """
    panels = _panels(choices)
    legend = 0.25 * math.ceil(len(choices.drawn) / 3) if len(choices.drawn) > 1 else 0.0
    size = (_WIDTH[shape], _HEIGHT * len(panels) + 0.4 + legend)

    def fill(figure: Any) -> None:
        rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, panel in zip(rows, panels, strict=True):
            _fill(axes, panel, choices)
        rows[-1].set_xlabel(often)
        rows[-1].xaxis.get_major_locator().set_params(integer=True)
        if legend:
            handles, labels = rows[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False,
                          fontsize=8.5, handlelength=1.4)  # fmt: skip

    return as_svg(fill, size, f"choices-{often}-{shape}")


def shown_choices(chapter: Chapter) -> dict[str, Any]:
    """Return what a report says of a chapter's choices, but for the picture; empty without any.

    Returns
    -------
    dict
        ``often``; ``words``, the picture in words; ``told``, sentences; ``rows`` of the last
        choice: block, clip norm, share, noise; ``rest``, how many more blocks there are;
        ``medians``, over how many clients.
    """
    choices = chapter.choices
    if choices is None:
        return {}
    often = "step" if chapter.statement.unit is Unit.EXAMPLE else "round"
    rows = choices.last
    return {
        "often": often,
        "words": choices_in_words(choices, often),
        "told": told(choices, often),
        "rows": [
            (shown(name, 80), _three(norm), f"{share:.2%}", _three(noise))
            for name, norm, share, noise in rows[:_ROWS]
        ],
        "rest": max(0, len(rows) - _ROWS),
        "medians": choices.clients if choices.clients > 1 else 0,
    }


def _three(value: float) -> str:
    """Return a number with three digits, so that columns can be compared."""
    return f"{value:#.3g}".rstrip(".") if 1e-3 <= value < 1e4 else f"{value:.2e}"


def choices_in_words(choices: Choices, often: str) -> str:
    """Return the picture in words, for who cannot see it."""
    parts = [_in_words(panel, choices) for panel in _panels(choices)]
    steps = [row.step for course in choices.drawn for row in course.rows]
    first, last = _number(min(steps), often), _number(max(steps), often)
    each = f" (medians of {plural(len(choices.drawn), 'client')})" if len(choices.drawn) > 1 else ""
    return f"From {often} {first} to {often} {last}{each}: {'; '.join(parts)}."


def _panels(choices: Choices) -> list[_Panel]:
    """Return what moves: shares say nothing of one block, nor a constant noise multiplier."""
    found = [_Panel("clip norm" + _of(choices), "clip norm", lambda row: row.norms)]
    if len(choices.blocks) > 1:
        found.append(_Panel("share of the privacy", "share of the privacy", lambda r: r.shares))
    title = "noise on each number of the sum"
    found.append(_Panel(title, title, choices.deviations))
    if len({row.noise for course in choices.drawn for row in course.rows}) > 1:
        found.append(_Panel("noise multiplier", "noise multiplier", lambda row: (row.noise,)))
    return found


def _of(choices: Choices) -> str:
    if len(choices.blocks) < 2:
        return ""
    return f", median of {len(choices.blocks)} blocks and where 8 of 10 are"


def _number(step: int, often: str) -> int:
    """Return the number that people know: rounds count from 1."""
    return step + (often == "round")


def _fill(axes: Any, panel: _Panel, choices: Choices) -> None:
    drawn = choices.drawn
    alone = len(drawn) == 1
    tables = [_table(course, panel.values) for course in drawn]
    steps = [_steps(course, choices) for course in drawn]
    for number, (at, table) in enumerate(zip(steps, tables, strict=True)):
        colour = _COLOURS[number % len(_COLOURS)]
        if table.shape[1] > 1:
            low, high = np.percentile(table, _BAND, axis=1)
            axes.fill_between(at, low, high, step="post", color=colour, linewidth=0,
                              alpha=0.18 if alone else 0.07)  # fmt: skip
        axes.plot(at, np.median(table, 1), drawstyle="steps-post", color=colour, zorder=3,
                  linewidth=2.0 if alone else 1.5, label=drawn[number].client or "the server",
                  solid_capstyle="butt")  # fmt: skip
    every = np.concatenate([np.percentile(table, _BAND, axis=1).ravel() for table in tables])
    low, high = float(every.min()), float(every.max())
    if low > 0.0 and high / low > _LOG_FROM:
        axes.set_yscale("log", subs=[])
        decades = math.log10(high / low)
        given = (1.0, 2.0, 5.0) if decades < 1.6 else (1.0, 3.0) if decades < 2.4 else (1.0,)
        axes.yaxis.get_major_locator().set_params(subs=given, numticks=7)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda *_: "")
        axes.set_ylim(low / 1.3, high * 1.3)
    else:
        axes.set_ylim(0.0, high * 1.12)
        axes.yaxis.get_major_locator().set_params(nbins=4)
    axes.set_xlim(min(at[0] for at in steps), max(at[-1] for at in steps))
    # What does not fit a phone's width is in the words below the picture.
    narrow = axes.figure.get_size_inches()[0] < 5.0
    axes.set_title(panel.short if narrow else panel.title, loc="left", fontsize=9.5, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.18, color=QUIET)


def _steps(course: Course, choices: Choices) -> list[float]:
    """Return where each row begins, and where the last one ends."""
    at = [float(_number(row.step, "step" if choices.clients else "round")) for row in course.rows]
    return [*at, at[-1] + 1.0]


def _table(course: Course, values: Values) -> NDArray[np.float64]:
    """Return one row per release that was logged, the last one twice; columns are blocks."""
    rows = [values(row) for row in course.rows]
    return np.array([*rows, rows[-1]], np.float64)


def _in_words(panel: _Panel, choices: Choices) -> str:
    tables = [_table(course, panel.values) for course in choices.drawn]
    firsts, lasts = ([float(np.median(table[i])) for table in tables] for i in (0, -1))
    first, last = _range(firsts), _range(lasts)
    moved = f"{first} and then {last}" if first != last else f"{last} all along"
    if len(tables) > 1:
        return f"{panel.short} {moved}"
    spread = _range(np.percentile(tables[0][-1], _BAND).tolist())
    return f"{panel.short} {moved}" + (f" ({spread})" if " to " in spread else "")


def _range(values: Sequence[float]) -> str:
    low, high = tidy(min(values), 3), tidy(max(values), 3)
    return low if low == high else f"{low} to {high}"
