"""What privacy costs in quality: the same schedule at several epsilons and without noise.

SST-2 (accuracy) and Shakespeare's roles (loss), every example hidden by DP-SGD at its
client. Results are kept in the output folder and not computed twice, so that a long
benchmark may be stopped. Run it with::

    python -m fedtune.simulations.benchmarks.dp_utility [--quick] [--seeds 5] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from scipy import stats

from fedtune.config import Config
from fedtune.configfile import load
from fedtune.privacy.plan import example_promise
from fedtune.server.run_folder import RunFolder, create
from fedtune.simulations.simulate import simulate

__all__ = ["Cell", "interval", "main", "without_privacy"]

SUBJECTS = {"sst2": ("sst2_private", "accuracy"), "shakespeare": ("shakespeare_private", "loss")}
EPSILONS = (1.0, 2.0, 4.0, 8.0)
NON_PRIVATE = math.inf


@dataclass(frozen=True)
class Cell:
    """All seeds of one data set at one epsilon (infinity: no privacy)."""

    subject: str
    metric: str
    epsilon: float
    values: tuple[float, ...]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the half width of its 95 % t-interval.

    Examples
    --------
    >>> mean, half = interval([0.70, 0.72, 0.71, 0.69, 0.73])
    >>> round(mean, 3), round(half, 4)
    (0.71, 0.0196)
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.inf
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(stats.t.ppf(0.975, len(values) - 1)) * error


def without_privacy(config: Config) -> Config:
    """Return the same schedule, steps and weights, with no clipping, coins or noise."""
    promise = example_promise(config)
    if promise is None:
        return config
    tuning = config.tuning.model_copy(update={"steps": promise.releases})
    privacy = config.privacy.model_copy(update={"example": None})
    return config.model_copy(update={"tuning": tuning, "privacy": privacy})


def other_roles(config: Config, folder: Path) -> Path:
    """Write the speeches of all roles that are not clients: held out, and nobody's secret."""
    from fedtune.data import load as load_data

    path = folder / "other_roles.txt"
    if not path.exists():
        everybody = config.data.partition.model_copy(update={"clients": 0, "min_rows": 1})
        clients = {shard.name for shard in load_data(config.data, 0).shards}
        whole = load_data(config.data.model_copy(update={"partition": everybody}), 0)
        rows = [row for shard in whole.shards if shard.name not in clients for row in shard.train]
        spoken = [f"{row['role']}:\n{row['text']}" for row in rows[:: len(rows) // 300]]
        path.write_text("\n\n".join(spoken), encoding="utf-8")
    return path


def settings(subject: str, epsilon: float, seed: int, folder: Path, *, quick: bool) -> Config:
    """Return one run's settings."""
    name, _ = SUBJECTS[subject]
    overrides = [f"seed={seed}", f"name='{subject}-{epsilon:g}-{seed}'"]
    overrides += [f"output.folder='{folder / 'runs'}'"]
    # One engine in this process: nothing is loaded twice, and an engine changes no result.
    overrides += ["engine.executor=threads", "engine.workers=1"]
    overrides += ["data.max_length=16", "tuning.epochs=0.1"] if quick else []
    if math.isfinite(epsilon):
        overrides.append(f"privacy.example.epsilon={epsilon}")
    source = files("fedtune.simulations") / "experiments" / f"{name}.toml"
    with as_file(source) as path:
        config = load(path, overrides)
    if subject == "shakespeare":
        data = config.data.model_copy(update={"eval": str(other_roles(config, folder))})
        config = config.model_copy(update={"data": data})
    return config if math.isfinite(epsilon) else without_privacy(config)


def run(subject: str, epsilon: float, seed: int, folder: Path, *, quick: bool) -> dict[str, Any]:
    """Run one experiment and return what is kept of it."""
    started = time.monotonic()
    config = settings(subject, epsilon, seed, folder, quick=quick)
    run_folder: RunFolder = create(config)
    simulate(config, run_folder, lambda _: None)
    rows = run_folder.metrics()
    metric = SUBJECTS[subject][1]
    return {
        "subject": subject, "epsilon": None if math.isinf(epsilon) else epsilon, "seed": seed,
        "metric": metric, "before": rows[0][metric], "value": rows[-1][metric],
        "seconds": round(time.monotonic() - started, 1), "quick": quick,
    }  # fmt: skip


def draw(cells: Sequence[Cell], before: dict[str, float], path: Path) -> None:
    """Draw each data set's quality over epsilon, with intervals and the non-private band."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    subjects = list(dict.fromkeys(cell.subject for cell in cells))
    figure = Figure(figsize=(4.6 * len(subjects), 3.4), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    for axes, subject in zip(figure.subplots(1, len(subjects), squeeze=False)[0], subjects,
                             strict=True):  # fmt: skip
        mine = [cell for cell in cells if cell.subject == subject]
        noisy = [cell for cell in mine if math.isfinite(cell.epsilon)]
        points = [(cell.epsilon, *interval(cell.values)) for cell in noisy]
        x, y, half = (list(part) for part in zip(*points, strict=True))
        axes.errorbar(x, y, yerr=half, marker="o", capsize=3, color="#1f5fa8", label="private")
        for cell in mine:
            if math.isinf(cell.epsilon):
                mean, width = interval(cell.values)
                axes.axhline(mean, color="#444", label="not private, same schedule")
                axes.axhspan(mean - width, mean + width, color="#444", alpha=0.15)
        axes.axhline(before[subject], color="#999", linestyle=":", label="before tuning")
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.set(title=subject, xlabel="epsilon", ylabel=f"held-out {mine[0].metric}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, print a table, draw, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, prog="dp_utility")
    parser.add_argument("--quick", action="store_true", help="one seed, tiny runs: under a minute")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", choices=sorted(SUBJECTS), action="append")
    parser.add_argument("--folder", type=Path, default=Path("runs/dp_utility"))
    given = parser.parse_args(arguments)
    seeds, epsilons = (1, (8.0,)) if given.quick else (given.seeds, EPSILONS)
    subjects = given.only or (["shakespeare"] if given.quick else list(SUBJECTS))
    given.folder.mkdir(parents=True, exist_ok=True)
    file = given.folder / ("quick.jsonl" if given.quick else "results.jsonl")
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    console = Console(stderr=True)
    wanted = [(subject, epsilon, seed) for seed in range(seeds) for subject in subjects
              for epsilon in (NON_PRIVATE, *epsilons)]  # fmt: skip
    for subject, epsilon, seed in wanted:
        key = (subject, None if math.isinf(epsilon) else epsilon, seed)
        if any((row["subject"], row["epsilon"], row["seed"]) == key for row in known):
            continue
        row = run(subject, epsilon, seed, given.folder, quick=given.quick)
        known.append(row)
        with file.open("a") as out:
            out.write(json.dumps(row) + "\n")
        console.print(f"{subject} epsilon {epsilon:g} seed {seed}: {row['metric']} "
                      f"{row['before']:.4f} -> {row['value']:.4f} in {row['seconds']} s",
                      markup=False)  # fmt: skip
    cells = _cells(known, subjects, epsilons)
    before = {subject: next(r["before"] for r in known if r["subject"] == subject)
              for subject in subjects}  # fmt: skip
    picture = given.folder / "dp_utility.png"
    draw(cells, before, picture)
    Console().print(_table(cells))
    sys.stdout.write(f"picture: {picture}\n{json.dumps(_summary(cells))}\n")


def _cells(
    known: Sequence[dict[str, Any]], subjects: Sequence[str], epsilons: Sequence[float]
) -> list[Cell]:
    found = []
    for subject in subjects:
        for epsilon in (NON_PRIVATE, *reversed(epsilons)):
            wanted = None if math.isinf(epsilon) else epsilon
            values = tuple(
                row["value"] for row in known
                if row["subject"] == subject and row["epsilon"] == wanted
            )  # fmt: skip
            found.append(Cell(subject, SUBJECTS[subject][1], epsilon, values))
    return found


def _table(cells: Sequence[Cell]) -> Table:
    table = Table(title="Quality at delta 1e-5: mean of seeds, 95 % interval")
    for name in ("data", "metric", "epsilon", "mean", "+-", "seeds", "loss to non-private"):
        table.add_column(name, justify="right")
    for cell in cells:
        mean, half = interval(cell.values)
        reference, _ = interval(_reference(cells, cell.subject).values)
        worse = reference - mean if cell.metric == "accuracy" else mean - reference
        epsilon = "none" if math.isinf(cell.epsilon) else f"{cell.epsilon:g}"
        table.add_row(cell.subject, cell.metric, epsilon, f"{mean:.4f}", f"{half:.4f}",
                      str(len(cell.values)), f"{worse:+.4f}")  # fmt: skip
    return table


def _reference(cells: Sequence[Cell], subject: str) -> Cell:
    return next(c for c in cells if c.subject == subject and math.isinf(c.epsilon))


def _summary(cells: Sequence[Cell]) -> dict[str, float]:
    found = {}
    for cell in cells:
        name = "none" if math.isinf(cell.epsilon) else f"{cell.epsilon:g}"
        mean, half = interval(cell.values)
        found[f"{cell.subject}_{name}"] = round(mean, 4)
        if math.isfinite(half):
            found[f"{cell.subject}_{name}_half"] = round(half, 4)
    return found


if __name__ == "__main__":
    main()
