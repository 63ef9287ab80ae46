"""An inversion audit as a picture: what is recovered, and what the model is still worth."""

from __future__ import annotations

import io
from typing import Any

from fedtune.privacy.inversion_words import Finding, Share

__all__ = ["draw"]

INK, QUIET, TEXT, LABELS, GOOD = "#20262e", "#5b6570", "#a3201d", "#8a6414", "#1f4e79"


def draw(found: Finding) -> bytes:
    """Return a PNG: recovery (left) and quality (right) against the noise multiplier.

    Parameters
    ----------
    found : Finding
        Level 0 is drawn at the left edge.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "font.size": 9.5, "font.family": "DejaVu Sans", "axes.edgecolor": QUIET,
        "axes.labelcolor": INK, "xtick.color": QUIET, "ytick.color": QUIET, "text.color": INK,
    }  # fmt: skip
    with mpl.rc_context(settings):
        figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=130)
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        _recovered(left, found)
        _quality(right, found)
        for axes in (left, right):
            axes.set_xticks(range(len(found.levels)), [f"{one.z:g}" for one in found.levels])
            axes.set_xlabel("noise z (standard deviation / clip norm); 0: none")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", alpha=0.18, color=QUIET)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _recovered(axes: Any, found: Finding) -> None:
    _band(axes, [one.best for one in found.levels], TEXT, "tokens of the text", "o")
    labels = [one.best_labels for one in found.levels]
    if any(labels):
        _band(axes, [one for one in labels if one], LABELS, "labels", "s")
    axes.axhline(100 * found.chance, color=TEXT, linewidth=1, linestyle=(0, (1.5, 1.5)))
    if found.chance_label is not None and any(labels):
        axes.axhline(100 * found.chance_label, color=LABELS, linewidth=1, linestyle=(0, (1.5, 1.5)))
    axes.set_ylim(0, 104)
    axes.set_ylabel("recovered by the server, %")
    axes.set_title(f"{found.name}: what the server reads (dotted: guessing)", fontsize=10)
    axes.legend(frameon=False, fontsize=8.5)


def _band(axes: Any, shares: list[Share], color: str, label: str, marker: str) -> None:
    places = range(len(shares))
    axes.plot(places, [100 * one.rate for one in shares], color=color, marker=marker,
              linewidth=2, markersize=4, label=label)  # fmt: skip
    axes.fill_between(places, [100 * one.low for one in shares],
                      [100 * one.high for one in shares], color=color, alpha=0.15)  # fmt: skip


def _quality(axes: Any, found: Finding) -> None:
    key = "accuracy" if found.chance_label is not None else "loss"
    values = [one.quality[key] for one in found.levels]
    axes.plot(range(len(values)), values, color=GOOD, marker="o", linewidth=2, markersize=4)
    if key in found.best_guess:
        axes.axhline(found.best_guess[key], color=QUIET, linewidth=1, linestyle=(0, (1.5, 1.5)))
    axes.set_ylabel(f"held-out {key}" + (" (nats)" if key == "loss" else ""))
    axes.set_title(f"{found.name}: what the model is worth", fontsize=10)
