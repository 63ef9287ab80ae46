"""Every clipping policy at equal epsilon and equal steps: quality, speed and overhead.

All policies run in the product's own loop on one pooled data set for each task. Every one
chooses its learning rate from the same few values, at epsilon 2, with seeds and on texts
of their own; the fixed clip norm is tuned too. Policies that differ from ``rldp-online``
in the controller alone take over its learning rate. Results are kept, one line of JSON for
each run, and not computed twice: stop it and go on at will. Run it with::

    python -m fedtune.simulations.benchmarks.rldp [--quick] [--budget MINUTES] [--workers 2]
        [--only TASK] [--arms a,b] [--epsilons 2,8] [--seeds 10] [--out DIR] [--report]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fedtune.simulations.benchmarks.rldp_arms import (
    ARMS,
    NOT_PRIVATE,
    SHARES,
    Run,
    adapted,
    line,
    run,
)
from fedtune.simulations.benchmarks.rldp_pictures import draw
from fedtune.simulations.benchmarks.rldp_report import markdown, summary
from fedtune.simulations.benchmarks.rldp_tasks import TASKS, Loaded, load_task, specs

__all__ = ["Cell", "Results", "chosen", "main", "plan"]

EPSILONS = (2.0, 8.0, 0.5, 4.0, 1.0)
"""In the order in which they are run: what is cut off is needed least."""

TUNED_AT, TUNING_SEED = 2.0, 1000
LENDER = "rldp-online"
_BORROWERS = {"random", "rldp-paper", "raw-sensing", "constant"}
_ABLATION = tuple(f"sensing-{share:g}" for share in SHARES)


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes
    ----------
    kind : {"tune", "run"}
    task, arm : str
    epsilon : float or None
    seed : int
    lr, clip_norm : float
        Of "tune"; 0: what was chosen.
    """

    kind: str
    task: str
    arm: str
    epsilon: float | None
    seed: int
    lr: float = 0.0
    clip_norm: float = 0.0

    @property
    def key(self) -> tuple[Any, ...]:
        """What a row of the results is known by."""
        return (self.kind, self.task, self.arm, self.epsilon, self.seed, self.lr, self.clip_norm)


@dataclass
class Results:
    """The lines of a file, of which others may append more."""

    file: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    _read: int = 0

    def update(self) -> None:
        """Read what is new; a last line that is not yet whole stays."""
        if not self.file.exists():
            return
        with self.file.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        self.rows += [json.loads(one) for one in whole.splitlines()]

    def done(self) -> set[tuple[Any, ...]]:
        """Return the keys of all rows."""
        return {tuple(row["key"]) for row in self.rows}

    def of(self, kind: str, task: str, arm: str, epsilon: float | None) -> list[dict[str, Any]]:
        """Return the rows of a policy."""
        wanted = [kind, task, arm, epsilon]
        return [row for row in self.rows if row["key"][:4] == wanted]


def lender(arm: str) -> str:
    """Return whose learning rate an arm uses.

    Examples
    --------
    >>> lender("random"), lender("sensing-0.1"), lender("geoclip")
    ('rldp-online', 'rldp-online', 'geoclip')
    """
    return LENDER if arm in _BORROWERS or arm in _ABLATION else arm


def tuning(task: str, arm: str) -> list[Cell]:
    """Return the runs that choose the settings of an arm."""
    spec, name = specs()[task], lender(arm)
    norms = spec.norms if ARMS[name].tuned else (1.0,)
    epsilon = None if name == NOT_PRIVATE else TUNED_AT
    return [
        Cell("tune", task, name, epsilon, TUNING_SEED + number, lr, norm)
        for number, norm, lr in itertools.product(range(spec.choosers), norms, spec.lrs)
    ]


def plan(
    tasks: Sequence[str], arms: Sequence[str], epsilons: Sequence[float], seeds: int
) -> list[Cell]:
    """Return all runs in their order: epsilons, then seeds, then tasks.

    "constant" comes last at each epsilon: it holds what the controller did with other
    seeds. The ablation of the sensors is for the first task, at the first epsilon.
    """
    found: dict[tuple[Any, ...], Cell] = {}
    ablated = [arm for arm in arms if arm in _ABLATION]
    late = [arm for arm in arms if arm == "constant"]
    early = [arm for arm in arms if arm not in (*ablated, *late)]
    for epsilon in epsilons:
        for part, where in ((early, tasks), (late, tasks), (ablated, tasks[:1])):
            if part is ablated and epsilon != epsilons[0]:
                continue
            for seed, task, arm in itertools.product(range(seeds), where, part):
                at = None if arm == NOT_PRIVATE else epsilon
                for cell in (*tuning(task, arm), Cell("run", task, arm, at, seed)):
                    found.setdefault(cell.key, cell)
    return list(found.values())


def chosen(results: Results, task: str, arm: str) -> tuple[float, float] | None:
    """Return learning rate and clip norm of an arm; None while it is not tuned."""
    cells = tuning(task, arm)
    keys = {cell.key for cell in cells}
    rows = [row for row in results.rows if tuple(row["key"]) in keys]
    if len(rows) < len(cells):
        return None
    losses: dict[tuple[float, float], list[float]] = {}
    for row in rows:
        fine = row["loss"] if math.isfinite(row["loss"]) else math.inf
        losses.setdefault((row["lr"], row["clip_norm"]), []).append(fine)
    return min(losses, key=lambda settings: math.fsum(losses[settings]))


def asked_of(cell: Cell, results: Results) -> Run | None:
    """Return what a cell needs to run, or None while other cells have to come first."""
    epsilon = math.inf if cell.epsilon is None else cell.epsilon
    arm, constant = ARMS[cell.arm], tuple[float, ...]()
    if cell.kind == "tune":
        return Run(arm, epsilon, cell.seed, cell.lr, cell.clip_norm, choosing=True)
    settings = chosen(results, cell.task, cell.arm)
    if settings is None:
        return None
    if arm.policy == "constant":
        constant = adapted(results.of("run", cell.task, LENDER, cell.epsilon), cell.seed)
        if not constant:
            return None
    return Run(arm, epsilon, cell.seed, *settings, constant=constant)


def work(
    cells: Sequence[Cell], out: Path, file: Path, claims: Path | None, until: float, steps: int
) -> None:
    """Run what is missing until it is done or time is up.

    Parameters
    ----------
    claims : Path or None
        Folder in which several workers say what they do.
    until : float
        Of ``time.monotonic``.
    steps : int
        T; 0: each task's.
    """
    results, tasks, say = Results(file), dict[str, Loaded](), Console(stderr=True, width=160)
    while time.monotonic() < until:
        results.update()
        done = results.done()
        missing = [cell for cell in cells if cell.key not in done]
        for cell in missing:
            asked = asked_of(cell, results)
            if asked is not None and _claimed(claims, cell):
                break
        else:
            if not missing or claims is None or not any(_busy(claims, cell) for cell in missing):
                return
            time.sleep(1.0)
            continue
        if cell.task not in tasks:
            tasks[cell.task] = load_task(specs()[cell.task], out)
        row = {"key": list(cell.key), "task": cell.task, "arm": cell.arm, "seed": cell.seed,
               "epsilon": cell.epsilon, "lr": asked.lr, "clip_norm": asked.clip_norm,
               **run(tasks[cell.task], asked, steps=steps)}  # fmt: skip
        if cell.seed or cell.kind == "tune":
            row.pop("decisions", None)  # one run's are drawn
        with file.open("a", encoding="utf-8") as into:
            into.write(line(row))
        say.print(f"{len(done) + 1}/{len(cells)} {cell.kind} {cell.task} {cell.arm} "
                  f"epsilon {cell.epsilon} seed {cell.seed} lr {asked.lr:g}: "
                  f"loss {row['loss']:.4f}, {row['seconds']:.1f} s", markup=False)  # fmt: skip


def _name(cell: Cell) -> str:
    return "_".join(str(part) for part in cell.key)


def _claimed(claims: Path | None, cell: Cell) -> bool:
    if claims is None:
        return True
    try:
        (claims / _name(cell)).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _busy(claims: Path, cell: Cell) -> bool:
    return (claims / _name(cell)).exists()


@contextlib.contextmanager
def _others(count: int, arguments: Sequence[str], claims: Path) -> Iterator[None]:
    """Run further workers beside this one; stop them if it is stopped."""
    command = [sys.executable, "-m", __spec__.name, *arguments, "--claims", str(claims)]
    started = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(count)]
    try:
        yield
        for process in started:
            process.wait()
    finally:
        for process in started:
            process.terminate()
            process.wait()


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, write tables and pictures, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, prog="rldp")
    parser.add_argument("--quick", action="store_true", help="a tiny part: under a minute")
    parser.add_argument("--only", action="append", choices=TASKS)
    parser.add_argument("--arms", help="names with commas; all if not given")
    parser.add_argument("--epsilons", help="with commas, in their order")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--budget", type=float, default=math.inf, help="minutes")
    parser.add_argument("--out", type=Path, default=Path("runs/rldp"))
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--claims", type=Path, help=argparse.SUPPRESS)
    told = sys.argv[1:] if arguments is None else arguments
    given = parser.parse_args(told)
    until = time.monotonic() + 60.0 * given.budget
    with contextlib.suppress(OSError):
        os.nice(10)
    torch.set_num_threads(1)
    arms = given.arms.split(",") if given.arms else list(ARMS)
    if wrong := sorted(set(arms) - set(ARMS)):
        parser.error(f"no arm {', '.join(wrong)}: choose from {', '.join(ARMS)}")
    epsilons = tuple(map(float, given.epsilons.split(","))) if given.epsilons else EPSILONS
    cells, steps = plan(given.only or TASKS, arms, epsilons, given.seeds), 0
    file = given.out / "results.jsonl"
    given.out.mkdir(parents=True, exist_ok=True)
    if given.quick:
        cells, steps, file = quick(given.only or TASKS[:1], given.arms), 10, given.out / "q.jsonl"
    if given.claims:
        work(cells, given.out, file, given.claims, until, steps)
        return
    if not given.report:
        with tempfile.TemporaryDirectory() as folder:
            claims = Path(folder) if given.workers > 1 else None
            with _others(given.workers - 1, told, Path(folder)):
                work(cells, given.out, file, claims, until, steps)
    finish(file, given.out)


def quick(tasks: Sequence[str], arms: str | None) -> list[Cell]:
    """Return a few short runs with one learning rate."""
    names = arms.split(",") if arms else ["fixed-flat", "quantile-flat", "rldp-online"]
    return [
        Cell("tune", task, name, TUNED_AT, TUNING_SEED, specs()[task].lrs[1], 1.0)
        for task in tasks for name in names
    ]  # fmt: skip


def finish(file: Path, out: Path) -> None:
    """Write tables and pictures of what there is."""
    results = Results(file)
    results.update()
    rows = [row for row in results.rows if row["key"][0] == "run"]
    if not rows:  # quick
        rows = results.rows
    text = markdown(rows, [row for row in results.rows if row["key"][0] == "tune"])
    (out / "rldp.md").write_text(text, encoding="utf-8")
    draw(rows, out)
    Console(width=200).print(text, markup=False, highlight=False)
    sys.stdout.write(f"tables and pictures: {out}\n{json.dumps(summary(rows))}\n")


if __name__ == "__main__":
    main()
