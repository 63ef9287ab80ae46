"""Whether a learnt policy leaks more than a fixed clip norm at the same epsilon.

Few examples are passed over many times, so that there is something to find; a run without
privacy shows that the attacks find it. Two of them, with no shadow models:

* Membership by loss ratio: the loss after training over the loss before, of members and of
  others from the same text. Area under the curve, and true positives at 1 % false ones.
* Exposure of canaries (Carlini et al. 2019, 1802.08232, section 4): sequences of random
  tokens are put among the examples; exposure is log2 of how many candidates there are, less
  log2 of the canary's rank among them by loss. Some are there once, which the promise is
  about, and some eight times, which it is not.

Run it with::

    python -m fedtune.simulations.benchmarks.rldp_leak [--quick] [--seeds 10] [--out DIR]
        [--epsilons 2,8] [--arms rldp-meta] [--budget MINUTES]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from scipy.stats import rankdata
from torch import nn

from fedtune.data import Encoded, batches
from fedtune.privacy.per_example import example_losses
from fedtune.seeds import derive
from fedtune.simulations.benchmarks.rldp_arms import ARMS, NOT_PRIVATE, Run, line, trained
from fedtune.simulations.benchmarks.rldp_report import interval, paired, table
from fedtune.simulations.benchmarks.rldp_tasks import TASKS, Loaded, load_task, specs

__all__ = ["Scene", "auc", "exposure", "main", "scene", "true_positives"]

FIXED = "fixed-flat"
MEASURES = {
    "auc": "membership, area", "tpr": "true positives at 1 %", "once": "exposure, once",
    "often": "exposure, eight times",
}  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """Who is in, who is not, and what was planted.

    Attributes
    ----------
    task : Loaded
        Trains on members and canaries.
    members, others : Encoded
    once, often : Encoded
        Canaries that are among the examples once, and eight times.
    candidates : Encoded
        Sequences that might have been canaries.
    """

    task: Loaded
    members: Encoded
    others: Encoded
    once: Encoded
    often: Encoded
    candidates: Encoded


def scene(
    task: Loaded, seed: int, *, members: int = 300, others: int = 600, canaries: int = 8,
    candidates: int = 2048,
) -> Scene:  # fmt: skip
    """Deal the texts of a task, and plant canaries.

    Parameters
    ----------
    members, others : int
        Texts, without replacement.
    canaries : int
        Of each of the two sorts.
    candidates : int
    """
    random = np.random.default_rng(derive(seed, "leak"))
    order = random.permutation(len(task.train.ids))
    inside = _some(task.train, order[:members])
    words = len(task.base.tokenizer)
    length = task.spec.length
    lines = random.integers(3, words, (2 * canaries + candidates, length), dtype=np.int32)
    once, often = _texts(lines[:canaries]), _texts(lines[canaries : 2 * canaries])
    train = _texts((*inside.ids, *once.ids, *(often.ids * 8)))
    return Scene(
        replace(task, train=train), inside, _some(task.train, order[members : members + others]),
        once, often, _texts(lines[2 * canaries :]),
    )  # fmt: skip


def _some(texts: Encoded, chosen: NDArray[np.int64]) -> Encoded:
    return _texts([texts.ids[int(i)] for i in chosen])


def _texts(ids: Sequence[NDArray[np.int32]] | NDArray[np.int32]) -> Encoded:
    given = tuple(ids)
    return Encoded(given, given, len(given), 0, 0)


def losses_of(model: nn.Module, task: Loaded, texts: Encoded) -> NDArray[np.float64]:
    """Return the loss of each text, in nats a token."""
    order = sorted(range(len(texts.ids)), key=lambda i: len(texts.ids[i]))
    found = np.empty(len(order))
    with torch.inference_mode():
        parts = [
            example_losses(model, batch, task.spec.task)
            for batch in batches(texts, order, 128, task.base.pad_id, task.spec.task)
        ]
    found[order] = torch.cat(parts).double().numpy()
    return found


def auc(members: NDArray[np.float64], others: NDArray[np.float64]) -> float:
    """Return how often a member's score is above another's; ties count half.

    Examples
    --------
    >>> auc(np.array([2.0, 3.0]), np.array([1.0, 2.0]))
    0.875
    """
    ranks = rankdata(np.concatenate([members, others]))[: len(members)]
    count = len(members) * len(others)
    return float((ranks.sum() - len(members) * (len(members) + 1) / 2) / count)


def true_positives(
    members: NDArray[np.float64], others: NDArray[np.float64], false: float = 0.01
) -> float:
    """Return the share of members above the score that ``false`` of the others exceed.

    Examples
    --------
    >>> true_positives(np.array([5.0, 5.0, 50.0, 200.0]), np.arange(101.0))
    0.25
    """
    limit = np.sort(others)[len(others) - 1 - int(false * len(others))]
    return float((members > limit).mean())


def exposure(canary: float, candidates: NDArray[np.float64]) -> float:
    """Return log2 of the candidates, the canary among them, less log2 of its rank by loss.

    Examples
    --------
    >>> exposure(1.0, np.arange(2.0, 9.0)), exposure(9.0, np.arange(2.0, 9.0))
    (3.0, 0.0)
    """
    rank = 1 + int((candidates < canary).sum())
    return math.log2(len(candidates) + 1) - math.log2(rank)


def attack(there: Scene, asked: Run, steps: int) -> dict[str, float]:
    """Train once and attack the result."""
    before: list[NDArray[np.float64]] = []

    def first(model: nn.Module, number: int) -> None:
        if number == 0:
            before.extend(losses_of(model, there.task, t) for t in (there.members, there.others))

    model, _ = trained(there.task, asked, steps, first)
    inside = 1.0 - losses_of(model, there.task, there.members) / before[0]
    outside = 1.0 - losses_of(model, there.task, there.others) / before[1]
    rivals = losses_of(model, there.task, there.candidates)
    found = {"auc": auc(inside, outside), "tpr": true_positives(inside, outside)}
    for name, canaries in (("once", there.once), ("often", there.often)):
        each = [exposure(float(c), rivals) for c in losses_of(model, there.task, canaries)]
        found[name] = float(np.mean(each))
    return found


def report(rows: Sequence[Mapping[str, Any]]) -> tuple[str, dict[str, float]]:
    """Return tables of the attacks and of the differences to fixed clipping, and figures."""
    body: list[list[str]] = []
    figures: dict[str, float] = {}
    for epsilon in dict.fromkeys(row["epsilon"] for row in rows):
        mine = [row for row in rows if row["epsilon"] == epsilon]
        for arm in dict.fromkeys(row["arm"] for row in mine):
            cells = [ARMS[arm].label, "none" if epsilon is None else f"{epsilon:g}",
                     str(sum(row["arm"] == arm for row in mine))]  # fmt: skip
            cells += [_text(interval(r[n] for r in mine if r["arm"] == arm)) for n in MEASURES]
            body.append(cells)
            if arm in (FIXED, NOT_PRIVATE):
                continue
            cells = [f"{ARMS[arm].label} less fixed", f"{epsilon:g}", ""]
            for name in MEASURES:
                gap = paired(mine, arm, FIXED, name)
                cells.append(_text(gap, sign="+"))
                if math.isfinite(gap[0]):
                    figures[f"{arm}_minus_fixed_{name}_{epsilon:g}"] = round(gap[0], 5)
                if math.isfinite(gap[1]):
                    figures[f"{arm}_minus_fixed_{name}_{epsilon:g}_low"] = round(gap[1], 5)
                    figures[f"{arm}_minus_fixed_{name}_{epsilon:g}_high"] = round(gap[2], 5)
            body.append(cells)
    head = ["policy", "epsilon", "seeds", *MEASURES.values()]
    title = "**Leakage**: mean and 95 % interval; chance is 0.5, 0.01, and 1.44 bits\n\n"
    return title + table(head, body) + "\n", figures


def _text(found: tuple[float, float, float], sign: str = "") -> str:
    mean, low, high = found
    if not math.isfinite(mean):
        return ""
    if not math.isfinite(low):
        return f"{mean:{sign}.3f}"
    return f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, print a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, prog="rldp_leak")
    parser.add_argument("--quick", action="store_true", help="one seed, few steps")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epsilons", default="2,8")
    parser.add_argument("--arms", default="rldp-meta", help="beside the fixed clip norm")
    parser.add_argument("--lr", type=float, default=5e-3, help="of all of them")
    parser.add_argument("--budget", type=float, default=math.inf, help="minutes")
    parser.add_argument("--out", type=Path, default=Path("runs/rldp"))
    given = parser.parse_args(arguments)
    until = time.monotonic() + 60.0 * given.budget
    with contextlib.suppress(OSError):
        os.nice(10)
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / ("leak-q.jsonl" if given.quick else "leak.jsonl")
    rows = [json.loads(one) for one in file.read_text().splitlines()] if file.exists() else []
    wanted: list[tuple[int, str, float | None]] = []
    for seed in range(1 if given.quick else given.seeds):
        wanted.append((seed, NOT_PRIVATE, None))
        for number in map(float, given.epsilons.split(",")):
            wanted += [(seed, arm, number) for arm in (FIXED, *given.arms.split(","))]
    steps, say = 10 if given.quick else 120, Console(stderr=True)
    task = load_task(specs()[TASKS[0]], given.out)
    for seed, arm, epsilon in wanted:
        known = [(r["seed"], r["arm"], r["epsilon"]) for r in rows]
        if (seed, arm, epsilon) in known or time.monotonic() > until:
            continue
        there = scene(task, seed, candidates=256) if given.quick else scene(task, seed)
        asked = Run(ARMS[arm], math.inf if epsilon is None else epsilon, seed, given.lr)
        row = {"seed": seed, "arm": arm, "epsilon": epsilon, **attack(there, asked, steps)}
        rows.append(row)
        with file.open("a", encoding="utf-8") as into:
            into.write(line(row))
        say.print(" ".join(f"{k} {v}" for k, v in row.items()), markup=False)
    text, figures = report(rows)
    (given.out / "rldp-leak.md").write_text(text, encoding="utf-8")
    Console(width=180).print(text, markup=False, highlight=False)
    sys.stdout.write(f"tables: {given.out}\n{json.dumps(figures)}\n")


if __name__ == "__main__":
    main()
