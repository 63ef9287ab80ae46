"""Tables of the RLDP benchmark: intervals, paired differences, speed, price, overhead."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from scipy import stats

from fedtune.simulations.benchmarks.rldp_arms import (
    ARMS,
    BASELINES,
    CONTROLLED,
    NOT_PRIVATE,
    SHARES,
)
from fedtune.simulations.benchmarks.rldp_tasks import TASKS

__all__ = ["Interval", "interval", "markdown", "paired", "share_of_steps", "summary"]

Rows = Sequence[Mapping[str, Any]]
Interval = tuple[float, float, float]
"""Mean, and the ends of its 95 % interval; the ends are NaN for fewer than 3 values."""


def interval(values: Iterable[float]) -> Interval:
    """Return the mean with its bootstrap interval (BCa, 2,000 resamples, fixed seed).

    Examples
    --------
    >>> [round(x, 3) for x in interval([0.70, 0.72, 0.71, 0.69, 0.73])]
    [0.71, 0.698, 0.722]
    """
    return _interval(tuple(values))


@cache
def _interval(given: tuple[float, ...]) -> Interval:
    mean = float(np.mean(given)) if given else math.nan
    if len(given) < 3 or not all(map(math.isfinite, given)):
        return mean, math.nan, math.nan
    if len(set(given)) == 1:
        return mean, mean, mean
    found = stats.bootstrap(
        (np.array(given),), np.mean, n_resamples=2000, rng=np.random.default_rng(0)
    ).confidence_interval
    return mean, float(found.low), float(found.high)


def paired(rows: Rows, one: str, other: str, field: str = "loss") -> Interval:
    """Return the difference of two arms over the seeds that both have.

    Examples
    --------
    >>> rows = [{"arm": a, "seed": s, "loss": s + (a == "b") * (1.0 + s / 8)}
    ...         for a in "ab" for s in range(4)]
    >>> paired(rows, "b", "a")[0]
    1.1875
    """
    first, second = _by_seed(rows, one, field), _by_seed(rows, other, field)
    return interval(first[seed] - second[seed] for seed in sorted(first.keys() & second.keys()))


def _by_seed(rows: Rows, arm: str, field: str) -> dict[int, float]:
    return {row["seed"]: row[field] for row in rows if row["arm"] == arm}


def share_of_steps(curve: Sequence[Sequence[float]], goal: float) -> float:
    """Return after which share of the steps a learning curve is at ``goal``; infinity: never.

    Examples
    --------
    >>> share_of_steps([[0, 4.0], [10, 3.0], [20, 2.5]], 3.5)
    0.25
    """
    last = curve[-1][0]
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if y0 <= goal:
            return x0 / last
        if y1 <= goal:
            return (x0 + (x1 - x0) * (y0 - goal) / (y0 - y1)) / last
    return math.inf


def summary(rows: Rows) -> dict[str, Any]:
    """Return the figures for machines: per data set and epsilon, each policy's loss."""
    found: dict[str, Any] = {}
    for task, epsilon in places(rows):
        mine = at(rows, task, epsilon)
        for arm in arms_of(mine):
            values = _by_seed(mine, arm, "loss").values()
            mean, low, high = interval(values)
            cell: dict[str, Any] = {"loss": round(mean, 5), "seeds": len(values)}
            if math.isfinite(low):
                cell |= {"low": round(low, 5), "high": round(high, 5)}
            found[f"{task}_{epsilon:g}_{arm}"] = cell
    found.update(_headlines(rows))
    return found


def _headlines(rows: Rows) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for arm in CONTROLLED:
        gains = [g for g in (gain(at(rows, *place), arm) for place in places(rows)) if g]
        if gains:
            found[f"perplexity_reduction_mean_of_baselines_{arm}"] = round(
                float(np.mean([g[0][0] for g in gains])), 3
            )
            found[f"perplexity_reduction_best_baseline_{arm}"] = round(
                float(np.mean([g[1][0] for g in gains])), 3
            )
    return found


def places(rows: Rows) -> list[tuple[str, float]]:
    """Return the data sets and epsilons of which there are private runs, in order."""
    there = {(row["task"], row["epsilon"]) for row in rows if row["epsilon"] is not None}
    tasks = tasks_of(rows)
    return sorted(there, key=lambda place: (tasks.index(place[0]), place[1]))


def tasks_of(rows: Rows) -> list[str]:
    """Return the data sets, those of the grid in its order."""
    there = dict.fromkeys(row["task"] for row in rows)
    return [*(task for task in TASKS if task in there), *(t for t in there if t not in TASKS)]


def at(rows: Rows, task: str, epsilon: float) -> list[Mapping[str, Any]]:
    """Return the rows of one data set and epsilon, and those without privacy."""
    return [row for row in rows if row["task"] == task and row["epsilon"] in (epsilon, None)]


def arms_of(rows: Rows) -> list[str]:
    """Return the arms that are there, in order."""
    there = {row["arm"] for row in rows}
    return [name for name in ARMS if name in there]


def gain(rows: Rows, arm: str) -> tuple[Interval, Interval, str] | None:
    """Return by how many percent perplexity is lower than the baselines' mean, and the best's.

    For a classifier it is the exponential of its loss. The best baseline is the one with
    the lowest mean loss in the same runs: it is chosen with the result in view, which
    favours it. Returned with its name.
    """
    mine = _by_seed(rows, arm, "loss")
    others = {name: _by_seed(rows, name, "loss") for name in BASELINES}
    others = {name: values for name, values in others.items() if values}
    seeds = sorted(set(mine).intersection(*others.values())) if others else []
    if not seeds:
        return None
    best = min(others, key=lambda name: np.mean([others[name][seed] for seed in seeds]))
    against_mean = (
        100.0 * (1.0 - math.exp(mine[s]) / np.mean([math.exp(o[s]) for o in others.values()]))
        for s in seeds
    )
    against_best = (100.0 * (1.0 - math.exp(mine[s] - others[best][s])) for s in seeds)
    return interval(map(float, against_mean)), interval(against_best), best


def markdown(rows: Rows, tuned: Rows = ()) -> str:
    """Return everything as tables."""
    parts = [_losses(rows), _accuracies(rows), _wins(rows), _gains(rows)]
    for task, epsilon in places(rows):
        parts.append(_differences(at(rows, task, epsilon), task, epsilon))
    parts += [_steps(rows), _honesty(rows), _ablation(rows), _overhead(rows)]
    parts.append(_settings(rows, tuned))
    return "\n\n".join(part for part in parts if part) + "\n"


def _losses(rows: Rows, field: str = "loss", title: str = "Held-out loss (nats)") -> str:
    parts = []
    for task in dict.fromkeys(place[0] for place in places(rows)):
        epsilons = [epsilon for name, epsilon in places(rows) if name == task]
        body = []
        for arm in arms_of([row for row in rows if row["task"] == task]):
            if arm.startswith("sensing-"):
                continue
            cells = []
            for epsilon in epsilons:
                values = _by_seed(at(rows, task, epsilon), arm, field).values()
                cells.append(_cell(interval(values), len(values)))
            body.append([ARMS[arm].label, *cells])
        head = [task, *(f"epsilon {epsilon:g}" for epsilon in epsilons)]
        parts.append(f"**{title}, {task}**: mean, 95 % interval, (seeds)\n\n" + table(head, body))
    return "\n\n".join(parts)


def _accuracies(rows: Rows) -> str:
    classified = [row for row in rows if row["task"].startswith("sst2")]
    return _losses(classified, "accuracy", "Held-out accuracy") if classified else ""


def _differences(rows: Rows, task: str, epsilon: float) -> str:
    """Return every policy's loss less every baseline's; what is clear of zero is bold."""
    there = arms_of(rows)
    others = [name for name in BASELINES if name in there]
    body = []
    for arm in there:
        if arm == NOT_PRIVATE or arm.startswith("sensing-") or not others:
            continue
        cells = ["" if arm == other else _signed(paired(rows, arm, other)) for other in others]
        body.append([ARMS[arm].label, *cells])
    if not body:
        return ""
    title = f"**Paired difference of loss, {task}, epsilon {epsilon:g}**: row less column; "
    head = ["", *(ARMS[name].label for name in others)]
    return title + "bold: the interval is clear of zero\n\n" + table(head, body)


def _wins(rows: Rows) -> str:
    """Return on how many data sets each honest policy is clearly better, or worse, than each."""
    parts = []
    for epsilon in dict.fromkeys(place[1] for place in places(rows)):
        sets = [at(rows, task, epsilon) for task, at_ in places(rows) if at_ == epsilon]
        there = [
            arm for arm in arms_of([row for one in sets for row in one])
            if arm not in (NOT_PRIVATE, "raw-sensing") and not arm.startswith("sensing-")
        ]  # fmt: skip
        body = []
        for arm in there:
            gaps = {other: [paired(one, arm, other) for one in sets] for other in there}
            body.append(
                [ARMS[arm].label, *("" if o == arm else _count(g) for o, g in gaps.items())]
            )
        title = (
            f"**Clear differences at epsilon {epsilon:g}**: data sets of {len(sets)} on which the "
            "row's loss is lower, or higher, than the column's with its interval clear of zero\n\n"
        )
        parts.append(title + table(["", *(ARMS[arm].label for arm in there)], body))
    return "\n\n".join(parts)


def _count(gaps: Sequence[Interval]) -> str:
    lower, higher = sum(gap[2] < 0 for gap in gaps), sum(gap[1] > 0 for gap in gaps)
    return f"{lower} / {higher}" if lower or higher else "-"


def _gains(rows: Rows) -> str:
    body = []
    for task, epsilon in places(rows):
        for arm in CONTROLLED:
            found = gain(at(rows, task, epsilon), arm)
            if found:
                cells = [_percent(found[0]), f"{_percent(found[1])} ({ARMS[found[2]].label})"]
                body.append([task, f"{epsilon:g}", ARMS[arm].label, *cells])
    if not body:
        return ""
    head = ["data", "epsilon", "policy", "less than mean of baselines", "less than the best"]
    return (
        "**Perplexity reduction, per cent** (paper: 5.4 on average, against its own baselines)"
        "\n\n" + table(head, body)
    )


def _steps(rows: Rows) -> str:
    """Return in which share of the steps each policy reaches each baseline's last loss."""
    body = []
    for task, epsilon in places(rows):
        mine = at(rows, task, epsilon)
        curves = {(row["arm"], row["seed"]): row["curve"] for row in mine}
        others = [name for name in BASELINES if any(arm == name for arm, _ in curves)]
        for arm in CONTROLLED:
            cells = []
            for other in others:
                shares = [
                    share_of_steps(curve, curves[other, seed][-1][1])
                    for (name, seed), curve in curves.items()
                    if name == arm and (other, seed) in curves
                ]
                cells.append(_reached(shares))
            if any(cells):
                found = dict(zip(others, cells, strict=True))
                body.append([task, f"{epsilon:g}", ARMS[arm].label,
                             *(found.get(name, "") for name in BASELINES)])  # fmt: skip
    if not body:
        return ""
    head = ["data", "epsilon", "policy", *(ARMS[name].label for name in BASELINES)]
    title = (
        "**Share of the steps needed to reach each baseline's last loss**: median over seeds, "
        "(seeds that reach it at all) (paper: 13 to 43 %)\n\n"
    )
    return title + table(head, body)


def _reached(shares: Sequence[float]) -> str:
    if not shares:
        return ""
    reached = sum(map(math.isfinite, shares))
    middle = float(np.median(shares))
    text = f"{middle:.0%}" if math.isfinite(middle) else "never"
    return f"{text} ({reached}/{len(shares)})"


def _honesty(rows: Rows) -> str:
    body = []
    for task, epsilon in places(rows):
        found = paired(at(rows, task, epsilon), "raw-sensing", "rldp-online")
        if math.isfinite(found[0]):
            body.append([task, f"{epsilon:g}", _signed(found)])
    if not body:
        return ""
    title = "**Price of honesty**: loss with raw sensing (NOT DP) less loss of RLDP online\n\n"
    return title + table(["data", "epsilon", "difference"], body)


def _ablation(rows: Rows) -> str:
    body = []
    for share in SHARES:
        mine = [row for row in rows if row["arm"] == f"sensing-{share:g}"]
        if mine:
            values = [row["loss"] for row in mine]
            first = f"sensing-{SHARES[0]:g}"
            gap = paired([r for r in rows if r["arm"].startswith("sensing-")],
                         f"sensing-{share:g}", first)  # fmt: skip
            noise = 100.0 * ((1.0 - share) ** -0.5 - 1.0)
            body.append([f"{share:.1%}", f"{noise:.2f} %", _cell(interval(values), len(values)),
                         "" if share == SHARES[0] else _signed(gap)])  # fmt: skip
    if not body:
        return ""
    head = ["share of the sensors", "more gradient noise", "loss", f"less that at {SHARES[0]:.1%}"]
    return f"**Share of the sensors** (RLDP online, reward from the noisy loss, {TASKS[0]}, " \
           "epsilon 2)\n\n" + table(head, body)  # fmt: skip


def _overhead(rows: Rows) -> str:
    """Return the policies' own time: as measured here, and with a decision every 25 steps."""
    body = []
    for arm in arms_of(rows):
        mine = [row for row in rows if row["arm"] == arm and "noting" in row]
        if not mine or mine[0]["controller"] is None:
            continue
        here, rare, each = [], [], []
        for row in mine:
            rest = row["seconds"] - row["controller"] - row["utility"]
            choosing = row["controller"] - row["noting"]
            here.append(100.0 * row["controller"] / rest)
            often = 25.0 * row["decided"] / row["steps"] if row["decided"] else 1.0
            rare.append(100.0 * (row["noting"] + choosing / max(1.0, often)) / rest)
            if row["decided"]:
                each.append(1e3 * choosing / row["decided"])
        body.append([
            ARMS[arm].label, f"{1e3 * np.mean([r['seconds'] / r['steps'] for r in mine]):.1f}",
            f"{np.mean(here):.2f}", f"{np.mean(rare):.2f}", f"{np.mean(each):.1f}" if each else "",
            f"{1e3 * np.mean([r['utility'] / r['steps'] for r in mine]):.1f}",
            f"{max(r['state_bytes'] for r in mine) / 1e6:.3f}",
        ])  # fmt: skip
    if not body:
        return ""
    head = ["policy", "step, ms", "policy, % of the step", "% if it decided every 25 steps",
            "ms a decision", "public text, ms a step", "state, MB"]  # fmt: skip
    return (
        "**Overhead** (processor time; runs are so short that the controller decides at every "
        "step or second step; of 1,000 steps it would at every 25th)\n\n" + table(head, body)
    )


def _settings(rows: Rows, tuned: Rows) -> str:
    found = {(row["task"], row["arm"]): (row["lr"], row["clip_norm"]) for row in rows}
    tasks = tasks_of(rows)
    body = [
        [ARMS[arm].label, *(_setting(found.get((task, arm)), arm) for task in tasks)]
        for arm in arms_of(rows) if not arm.startswith("sensing-")
    ]  # fmt: skip
    seconds = math.fsum(row["seconds"] for row in tuned)
    title = (
        f"**Settings that were chosen** (learning rate; fixed flat: and clip norm), by "
        f"{len(tuned)} further runs of {seconds / 60:.0f} minutes together\n\n"
    )
    return title + table(["", *tasks], body)


def _setting(found: tuple[float, float] | None, arm: str) -> str:
    if found is None:
        return ""
    return f"{found[0]:g}, C = {found[1]:g}" if ARMS[arm].tuned else f"{found[0]:g}"


def _cell(found: Interval, count: int) -> str:
    if not count:
        return ""
    mean, low, high = found
    return f"{mean:.4f} [{low:.4f}, {high:.4f}] ({count})" if math.isfinite(low) else (
        f"{mean:.4f} ({count})"
    )  # fmt: skip


def _signed(found: Interval) -> str:
    mean, low, high = found
    if not math.isfinite(mean):
        return ""
    if not math.isfinite(low):
        return f"{mean:+.4f}"
    text = f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def _percent(found: Interval) -> str:
    mean, low, high = found
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]" if math.isfinite(low) else f"{mean:+.2f}"


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown.

    Examples
    --------
    >>> print(table(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [list(head), ["---"] * len(head), *map(list, body)]
    rows = ["| " + " | ".join(one) + " |" for one in lines]
    rows[1] = "|" + "---|" * len(head)
    return "\n".join(rows)
