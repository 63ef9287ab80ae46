"""Epsilon over the rounds of a run, as one SVG for wide pages and one for phones."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from typing import Any

from fedtune.privacy.report_model import Chapter
from fedtune.privacy.words import above, tidy

__all__ = ["ACCENT", "INK", "LIMIT", "QUIET", "alternative", "as_svg", "draw"]

INK, QUIET, ACCENT, LIMIT = "#20262e", "#5b6570", "#1f4e79", "#a3201d"
_PLAIN = "#8a6414"
_SIZES = {"wide": (7.2, 2.9), "narrow": (3.6, 3.1)}
_LOG_FROM = 6.0
"""Ratio of the two curves from which on a logarithmic axis shows both."""


def draw(chapter: Chapter, shape: str) -> str:
    """Return an SVG element, text as outlines; empty when there is no bound to draw.

    Parameters
    ----------
    chapter : Chapter
    shape : str
        ``"wide"`` (7.2 x 2.9 inches) or ``"narrow"`` (3.6 x 3.1), for a phone.
    """
    points = [p for p in chapter.curve if math.isfinite(p.epsilon)]
    if not points:
        return ""

    def fill(figure: Any) -> None:
        _fill(figure.subplots(), chapter, points, shape == "narrow")

    return as_svg(fill, _SIZES[shape], f"{chapter.statement.unit.value}-{shape}")


def as_svg(fill: Callable[[Any], None], size: tuple[float, float], mark: str) -> str:
    """Return an SVG element of a figure: text as outlines, the same for the same figure.

    Parameters
    ----------
    fill : callable
        Draws into an empty figure.
    size : tuple of float
        Width and height in inches.
    mark : str
        Begins every name inside: those of two pictures on one page must differ.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "path", "svg.hashsalt": f"fedtune-{mark}", "font.size": 9.5,
        "font.family": "DejaVu Sans", "axes.edgecolor": QUIET, "axes.labelcolor": INK,
        "xtick.color": QUIET, "ytick.color": QUIET, "text.color": INK,
        "text.parse_math": False,  # names of clients are text
    }  # fmt: skip
    with mpl.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        fill(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None},
                       transparent=True)  # fmt: skip
    text = buffer.getvalue()
    text = re.sub(r'(id="|xlink:href="#|url\(#)', rf"\g<1>{mark}-", text[text.index("<svg") :])
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL).strip()


def alternative(chapter: Chapter) -> str:
    """Return the picture in words, for who cannot see it."""
    points = [p for p in chapter.curve if math.isfinite(p.epsilon)]
    if not points:
        return ""
    last = points[-1]
    text = (
        f"Epsilon over rounds: {above(points[0].epsilon)} after round "
        f"{tidy(points[0].round)}, {above(last.epsilon)} after round {tidy(last.round)}"
    )
    if chapter.statement.condition:
        text += f"; without credit for sampling {above(last.unsampled)} at the end"
    if limit := _limit(chapter):
        text += f"; {limit[1]} {limit[0]:g}"
    return f"{text}."


def _limit(chapter: Chapter) -> tuple[float, str] | None:
    """Return the line not to cross: the owner's budget, else the run's own target."""
    budgets = [one.budget for one in chapter.budgets[:1] if one.budget is not None]
    if budgets:
        return budgets[0], "budget"
    return (chapter.target, "target") if chapter.target is not None else None


def _fill(axes: Any, chapter: Chapter, points: list[Any], narrow: bool) -> None:
    rounds = [p.round for p in points]
    spent = [p.epsilon for p in points]
    plain = [p.unsampled for p in points]
    sampled = bool(chapter.statement.condition) and all(map(math.isfinite, plain))
    limit = _limit(chapter)
    top = max([*spent, *(plain if sampled else []), *([limit[0]] if limit else [])])
    axes.plot(rounds, spent, color=ACCENT, linewidth=2.2, marker="o", markersize=3.5, zorder=3)
    if sampled:
        axes.plot(rounds, plain, color=_PLAIN, linewidth=1.6, linestyle=(0, (5, 2)), zorder=2)
    lowest = max(spent[-1], 1e-9)
    if sampled and plain[-1] / lowest > _LOG_FROM and min(spent) > 0:
        axes.set_yscale("log")
        axes.set_ylim(min(spent) * 0.6, top * 2.2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda *_: "")
    else:
        axes.set_ylim(0, top * 1.22)
    axes.set_xlim(min(0, rounds[0]), rounds[-1] * 1.015)
    if limit:
        axes.axhline(limit[0], color=LIMIT, linewidth=1.2, linestyle=(0, (1.5, 1.5)))
    _labels(axes, rounds[-1], spent[-1], plain[-1] if sampled else None, limit, narrow)
    axes.set_xlabel("round")
    axes.set_ylabel("ε (epsilon)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.18, color=QUIET)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _labels(
    axes: Any,
    end: float,
    spent: float,
    plain: float | None,
    limit: tuple[float, str] | None,
    narrow: bool,
) -> None:
    """Name the lines where they end; lines that end together are named above each other."""
    wanted = [(spent, f"this run: {above(spent)}", ACCENT)]
    if plain is not None:
        words = "no secret sampling" if narrow else "if sampling were no secret"
        wanted.append((plain, f"{words}: {above(plain)}", _PLAIN))
    scale = axes.transData.transform
    placed: list[float] = []
    height = 17.0  # of a line of text, in points at 72 dpi
    if limit:
        wanted.append((limit[0], f"{limit[1]} {limit[0]:g}", LIMIT))
    for value, text, color in sorted(wanted):
        here = scale((end, value))[1] * 72.0 / axes.figure.dpi
        y = max([here, *(p + height for p in placed)])
        placed.append(y)
        axes.annotate(
            text, (end, value), xytext=(-3, 4 + y - here), textcoords="offset points",
            ha="right", va="bottom", color=color, fontweight="bold", fontsize=9.5, zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8},
        )  # fmt: skip
