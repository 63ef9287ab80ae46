"""One private step beside one plain step: time, processor time and peak memory.

A Llama with random weights is tuned by LoRA, in full, and by a prompt. The private
step finds, clips and adds the gradient of each example, adds noise of AES-256-CTR on
a lattice, and takes the same AdamW step. Opacus is given the same model, batch, loss
and optimiser. Run it with::

    python -m fedtune.simulations.benchmarks.dp_step [--quick]

Time: steps of all variants take turns in one process, and the ratios are medians of
the ratios within a turn, so that a busy machine disturbs them little. Memory: a process
for each variant, its peak during steps over what it held before the first of them.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import logging
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fedtune.simulations.benchmarks.dp_step_variants import (
    METHODS,
    VARIANTS,
    Size,
    batch_of,
    norms_of,
    step_of,
)

__all__ = ["Figures", "main"]

THREADS = 2
MMAP_THRESHOLD = -3  # of mallopt(3)
QUICK = Size(layers=2, vocabulary=2048, batch=8, micro=4)
LIBRARIES = [
    "fedtune.simulations.benchmarks.dp_step_variants",
    "opacus",
    "peft",
    "transformers.models.llama.modeling_llama",
]
"""Loaded once for all the processes whose memory is measured."""
SUFFIX = {"lora": "", "full": "_full", "prompt": "_prompt"}


@dataclass
class Figures:
    """What one variant took: seconds of each step, and peak memory in MB."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    memory: float = 0.0


def time_steps(method: str, size: Size, turns: int) -> dict[str, Figures]:
    """Let all variants take turns, the first in each turn another one every time."""
    batch = batch_of(size)
    steps = {variant: step_of(method, variant, size)[1] for variant in _variants(method)}
    for step in steps.values():
        step(batch)
    found = {variant: Figures() for variant in steps}
    order = list(steps)
    for turn in range(turns):
        for variant in order[turn % len(order) :] + order[: turn % len(order)]:
            wall, cpu = time.perf_counter(), time.process_time()
            steps[variant](batch)
            found[variant].seconds.append(time.perf_counter() - wall)
            found[variant].cpu.append(time.process_time() - cpu)
    return found


def peak_memory(method: str, size: Size, variants: Sequence[str]) -> dict[str, float]:
    """Return the MB that steps add, at their highest, to a process of their own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        return {
            variant: pool.submit(measure_memory, method, variant, size).result()
            for variant in variants
        }


def measure_memory(method: str, variant: str, size: Size, steps: int = 2) -> float:
    """Measure this process: a small step first, so that libraries and states are there."""
    _prepare()
    # Large tensors go back to the system at once: what is left is what is in use.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 16)
    _, step = step_of(method, variant, size)
    step(batch_of(size, rows=2, length=8))
    before = _status("VmRSS")
    # The peak starts again from here; where that is not allowed, it is the peak of all.
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        sys.stderr.write("the peak includes the start\n")
    batch = batch_of(size)
    for _ in range(steps):
        step(batch)
    return _status("VmHWM") - before


def ratio(upper: Sequence[float], lower: Sequence[float]) -> float:
    """Return the median over turns of the ratio within a turn."""
    return statistics.median(a / b for a, b in zip(upper, lower, strict=True))


def measure(method: str, size: Size, turns: int, console: Console) -> dict[str, float]:
    """Measure one way of tuning, print its table and return its figures."""
    figures = time_steps(method, size, turns)
    for variant, peak in peak_memory(method, size, list(figures)).items():
        figures[variant].memory = peak
    plain = figures["plain"]
    table = Table(title=_title(method, size, turns))
    for name in ("step", "ms", "/ plain", "CPU ms", "/ plain", "peak MB", "/ plain"):
        table.add_column(name, justify="left" if name == "step" else "right")
    for variant, found in figures.items():
        table.add_row(
            variant,
            f"{1e3 * statistics.median(found.seconds):,.0f}",
            f"{ratio(found.seconds, plain.seconds):.3f}",
            f"{1e3 * statistics.median(found.cpu):,.0f}",
            f"{ratio(found.cpu, plain.cpu):.3f}",
            f"{found.memory:,.0f}",
            f"{found.memory / plain.memory:.3f}",
        )
    console.print(table)
    return _result(method, size, figures)


def _result(method: str, size: Size, figures: dict[str, Figures]) -> dict[str, float]:
    plain, ours = figures["plain"], figures["ours"]
    others = {name: found for name, found in figures.items() if name.startswith("opacus")}
    best = min(others.values(), key=lambda found: ratio(found.seconds, ours.seconds))
    lean = min(found.memory for found in others.values())
    small = batch_of(size, rows=4)
    mine, theirs = (norms_of(method, name, size, small) for name in ("ours", "opacus-hooks"))
    end = SUFFIX[method]
    found = {
        f"dp_over_plain_time{end}": ratio(ours.seconds, plain.seconds),
        f"dp_over_plain_cpu{end}": ratio(ours.cpu, plain.cpu),
        f"dp_over_plain_memory{end}": ours.memory / plain.memory,
        f"opacus_over_ours_time{end}": ratio(best.seconds, ours.seconds),
        f"opacus_over_ours_cpu{end}": min(ratio(o.cpu, ours.cpu) for o in others.values()),
        f"opacus_over_ours_memory{end}": lean / ours.memory,
        f"opacus_norms_differ{end}": float(((theirs - mine) / mine).abs().max()),
    }
    if method == "prompt":
        as_is = norms_of(method, "opacus-as-is", size, small)
        found["opacus_examples_seen_prompt"] = float(len(as_is)) / len(small["input_ids"])
    return found


def _variants(method: str) -> tuple[str, ...]:
    return tuple(v for v in VARIANTS if not (v == "ours-adapter" and method == "prompt"))


def _title(method: str, size: Size, turns: int) -> str:
    extra = {
        "lora": f"LoRA r={size.rank} on all linear layers",
        "full": f"all parameters (ours: {size.micro} examples at a time)",
        "prompt": f"a prompt of {size.tokens} tokens",
    }[method]
    return f"{extra}; batch {size.batch} x {size.length}, {THREADS} threads, {turns} turns"


def _prepare() -> None:
    torch.set_num_threads(THREADS)
    logging.getLogger("opacus").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and print its tables and its JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model: within a minute")
    parser.add_argument("--turns", type=int, default=0, help="steps of each variant")
    parser.add_argument("--only", choices=METHODS, action="append", help="some tables only")
    options = parser.parse_args(arguments)
    _prepare()
    size = QUICK if options.quick else Size()
    console = Console()
    result: dict[str, float] = {}
    for method in options.only or METHODS:
        turns = options.turns or (3 if options.quick else 7)
        result |= measure(method, size, turns, console)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
