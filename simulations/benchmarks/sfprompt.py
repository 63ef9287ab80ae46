"""SFPrompt beside its own parts and beside whole models: quality, bytes, arithmetic, memory.

Every run is kept in the output folder at once, and not run again. ``--grpc`` puts the body
in a process of its own; no result may change by that. Run it with::

    python -m fedtune.simulations.benchmarks.sfprompt [--set sst2] [--seeds 5] [--quick] [--out DIR]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedtune.configfile import dumps
from fedtune.simulations.benchmarks.dp_utility import interval
from fedtune.simulations.benchmarks.sfprompt_arms import ARMS, SETS, Arm, run, settings
from fedtune.simulations.benchmarks.sfprompt_cost import client_cost
from fedtune.simulations.body_process import start_body

__all__ = ["main"]

_PAIRS = (("sfprompt", "random"), ("no-local", "random-no-local"), ("sfprompt", "whole-prompt"))


def kept(file: Path) -> list[dict[str, Any]]:
    """Return the lines that an earlier call left."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def runs_of(
    arms: list[Arm], data: str, seeds: range, out: Path, body: str, say: Console, rounds: int
) -> list[dict[str, Any]]:
    """Run what is missing, one by one, and return all runs."""
    file, found = out / f"runs-{body}.jsonl", []
    for seed in seeds:
        for arm in arms:
            config = settings(arm, data, seed, out, body, rounds)
            mine = {"set": data, "arm": arm.name, "seed": seed, "lr": config.tuning.lr,
                    "rounds": config.federation.rounds}  # fmt: skip
            same = [row for row in kept(file) if mine.items() <= row.items()]
            row = same[-1] if same else run(arm, data, seed, out, body, rounds)
            found.append(row)
            if not same:
                with file.open("a") as into:
                    into.write(json.dumps(row) + "\n")
                say.print(f"{data} {arm.name} seed {seed}: loss {row['before']:.4f} -> "
                          f"{row['loss']:.4f}, accuracy {row['accuracy']:.4f}, "
                          f"{row['seconds']} s", markup=False)  # fmt: skip
    return found


def costs_of(arms: list[Arm], data: str, out: Path) -> dict[str, dict[str, float]]:
    """Measure a client's round of each arm, in processes of its own."""
    file = out / f"cost-{data}.json"
    found: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}
    for arm in arms:
        if arm.name in found:
            continue
        config = settings(arm, data, 0, out)
        place = out / f"{data}-{arm.name}.toml"
        place.write_text(dumps(config), encoding="utf-8")
        with contextlib.ExitStack() as stack:
            address = stack.enter_context(start_body(place)).address if config.tuning.cut else ""
            found[arm.name] = client_cost(place, address)
        file.write_text(json.dumps(found), encoding="utf-8")
    return found


def table(rows: list[dict[str, Any]], costs: dict[str, dict[str, float]], data: str) -> Table:
    """Return one line for each arm."""
    made = Table(title=SETS[data])
    for name in ("arm", "seeds", "loss", "+-", "accuracy", "+-", "MB a client and round",
                 "GFLOPs of a client's round", "client MB"):  # fmt: skip
        made.add_column(name, justify="left" if name == "arm" else "right")
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm.name]
        if not mine:
            continue
        cells = [arm.label, str(len(mine))]
        for key in ("loss", "accuracy"):
            mean, half = interval([row[key] for row in mine])
            cells += [f"{mean:.4f}", f"{half:.4f}"]
        cost = costs.get(arm.name, {})
        made.add_row(*cells, f"{megabytes(mine):.3f}", f"{cost.get('flops', 0) / 1e9:,.2f}",
                     f"{cost.get('memory_mb', 0):,.0f}")  # fmt: skip
    return made


def megabytes(rows: list[dict[str, Any]]) -> float:
    """Return megabytes on the wire per client and round, both ways, the cut included."""
    sent = sum(row["bytes"] + row["bytes_cut"] for row in rows)
    return float(sent / sum(row["client_rounds"] for row in rows) / 1e6)


def figures(
    rows: list[dict[str, Any]], costs: dict[str, dict[str, float]], data: str
) -> dict[str, float]:
    """Return the figures for machines: differences of paired seeds with their interval."""
    by = {(row["arm"], row["seed"]): row for row in rows}
    found: dict[str, float] = {}
    for one, other in _PAIRS:
        seeds = [seed for arm, seed in by if arm == one and (other, seed) in by]
        for key in ("loss", "accuracy"):
            gaps = [by[one, s][key] - by[other, s][key] for s in seeds]
            if gaps:
                name = f"{data}_{key}_{one}_minus_{other}"
                found[name], half = interval(gaps)
                if len(gaps) > 1:
                    found[f"{name}_half"] = half
    names = {row["arm"] for row in rows}
    for other in ("whole-full", "whole-lora", "whole-prompt"):
        if {"sfprompt", other} <= names:
            parts = [[r for r in rows if r["arm"] == name] for name in ("sfprompt", other)]
            found[f"{data}_bytes_over_{other}"] = megabytes(parts[0]) / megabytes(parts[1])
        if {"sfprompt", other} <= costs.keys():
            for key in ("flops", "memory_mb"):
                found[f"{data}_{key}_over_{other}"] = (
                    costs["sfprompt"][key] / costs[other][key]
                )  # fmt: skip
    return found


def draw(rows: list[dict[str, Any]], data: str, path: Path) -> None:
    """Draw quality over bytes, every arm a point with its interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    key = "accuracy" if data == "sst2" else "loss"
    for arm in ARMS:
        if mine := [row for row in rows if row["arm"] == arm.name]:
            mean, half = interval([row[key] for row in mine])
            error = half if len(mine) > 1 else 0.0
            shape = "s" if arm.name.startswith("whole") else "o"
            axes.errorbar(megabytes(mine), mean, yerr=error, fmt=shape, label=arm.label, capsize=3)
    axes.set(xscale="log", xlabel="MB a client and round, both ways", ylabel=f"held-out {key}",
             title=SETS[data])  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    FigureCanvasAgg(figure)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    """Run, print tables, draw, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, prog="sfprompt")
    parser.add_argument("--set", choices=sorted(SETS), action="append")
    parser.add_argument("--arm", action="append", help="only arms of this name")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--grpc", action="store_true", help="the body in another process")
    parser.add_argument("--no-cost", action="store_true", help="no arithmetic, no memory")
    parser.add_argument("--quick", action="store_true", help="one seed, two arms, two rounds")
    parser.add_argument("--out", type=Path, help="where results are kept")
    given = parser.parse_args(arguments)
    out: Path = given.out or Path(tempfile.mkdtemp(prefix="sfprompt"))
    out.mkdir(parents=True, exist_ok=True)
    names = given.arm or (["sfprompt", "whole-prompt"] if given.quick else [a.name for a in ARMS])
    arms = [arm for arm in ARMS if arm.name in names]
    seeds = range(given.first, given.first + (1 if given.quick else given.seeds))
    summary: dict[str, float] = {}
    for data in given.set or (["shakespeare"] if given.quick else list(SETS)):
        body = "process" if given.grpc else "local"
        rows = runs_of(arms, data, seeds, out, body, Console(stderr=True), 2 if given.quick else 0)
        costs = {} if given.no_cost or given.quick else costs_of(arms, data, out)
        Console(width=160).print(table(rows, costs, data))
        draw(rows, data, out / f"sfprompt_{data}.png")
        summary |= figures(rows, costs, data)
    sys.stdout.write(f"results and pictures: {out}\n{json.dumps(summary)}\n")


if __name__ == "__main__":
    main()
