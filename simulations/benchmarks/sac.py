"""The soft actor-critic against the one of stable-baselines3, on a pendulum to be swung up.

Gymnasium's ``Pendulum-v1``, the same settings, seeds, steps and process for both: networks
of 2 x 256, batches of 256, learning rate 1e-3 (``--quick``: 2 x 64, 64 and 3e-3, as wide as
a controller's), one gradient step per step after 100 random ones, episodes of 200 steps
whose end is a time limit. Told are the mean return of the last
20 episodes of the training and of 10 episodes by the mean action afterwards (0 is the best
there can be, a random policy gets about -1,200, the pendulum upright from the first
seconds on is about -150), with t-intervals over the seeds, and the CPU seconds, which say
the same on a busy machine: both run in one thread.

Ours centres and scales states by default; the comparison has that off, as it is in
stable-baselines3, and without ``--quick`` one more column has it on. A second table times
what runs beside a training run: one decision, and the eight gradient steps after it, with
the networks that a controller has. Run it with::

    python -m fedtune.simulations.benchmarks.sac [--quick] [--seeds N] [--steps N]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student
from stable_baselines3 import SAC

from fedtune.privacy.rldp.sac import Sac, SacSettings, Transition

__all__ = ["Played", "controller_milliseconds", "interval", "main", "play_ours", "play_sb3"]

TASK, STRONGEST, EPISODE = "Pendulum-v1", 2.0, 200
RANDOM, LAST, EVALUATED = 100, 20, 10
SETTINGS = SacSettings(
    hidden=(256, 256), lr=1e-3, batch_size=256, start=RANDOM, updates=1, normalise=False
)
SMALL = replace(SETTINGS, hidden=(64, 64), lr=3e-3, batch_size=64)

Act = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True)
class Played:
    """One training.

    Attributes
    ----------
    last : float
        Mean return of its last episodes (`LAST`, or as many as there are).
    evaluated : float
        Mean return by the mean action afterwards, over `EVALUATED` episodes.
    seconds : float
        Of CPU time: what the training took.
    """

    last: float
    evaluated: float
    seconds: float


def play_ours(seed: int, steps: int, settings: SacSettings) -> Played:
    """Train ours for so many steps, all of which it keeps."""
    settings = replace(settings, buffer=steps)
    world = gymnasium.make(TASK)
    started = time.process_time()
    sac = Sac(3, 1, settings, seed)
    first = np.random.default_rng(seed)
    state, _ = world.reset(seed=seed)
    returns, total = [], 0.0
    for step in range(steps):
        action = first.uniform(-1, 1, 1).astype(np.float32) if step < RANDOM else sac.act(state)
        after, reward, ended, late, _ = world.step(STRONGEST * action)
        sac.learn(Transition(state, action, float(reward), after, ended))
        state, total = after, total + float(reward)
        if ended or late:
            returns.append(total)
            (state, _), total = world.reset(), 0.0
    seconds = time.process_time() - started
    evaluated = _evaluate(lambda seen: STRONGEST * sac.act(seen, mean=True), seed)
    return Played(_mean(returns[-LAST:]), evaluated, seconds)


def play_sb3(seed: int, steps: int, settings: SacSettings) -> Played:
    """Train the one of stable-baselines3 for so many steps, all of which it keeps."""
    world = gymnasium.make(TASK)
    started = time.process_time()
    model = SAC(
        "MlpPolicy", world, learning_rate=settings.lr, buffer_size=steps, learning_starts=RANDOM,
        batch_size=settings.batch_size, tau=settings.tau, gamma=settings.gamma, train_freq=1,
        gradient_steps=1, policy_kwargs={"net_arch": list(settings.hidden)}, seed=seed,
        device="cpu", stats_window_size=LAST,
    )  # fmt: skip
    model.learn(steps)
    seconds = time.process_time() - started
    last = _mean([float(episode["r"]) for episode in model.ep_info_buffer or ()])

    def act(seen: NDArray[np.float32]) -> NDArray[np.float32]:
        action: NDArray[np.float32] = model.predict(seen, deterministic=True)[0]
        return action

    return Played(last, _evaluate(act, seed), seconds)


def interval(values: list[float]) -> tuple[float, float]:
    """Return mean and half width of its 95 % interval by Student's t; NaN for one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(student.ppf(0.975, len(values) - 1)) * error


def controller_milliseconds(
    states: int = 30, actions: int = 10, turns: int = 60
) -> tuple[float, float]:
    """Return CPU milliseconds, the median, of one decision and of what is learnt from it."""
    random = np.random.default_rng(0)
    sac = Sac(states, actions)
    deciding, learning = [], []
    for _ in range(turns):
        state, after = random.normal(size=(2, states))
        started = time.process_time()
        action = sac.act(state)
        decided = time.process_time()
        learnt = sac.learn(Transition(state, action, float(random.normal()), after, False))
        if learnt is not None:
            deciding.append(1e3 * (decided - started))
            learning.append(1e3 * (time.process_time() - decided))
    return statistics.median(deciding), statistics.median(learning)


def _evaluate(act: Act, seed: int) -> float:
    world = gymnasium.make(TASK)
    returns = []
    for episode in range(EVALUATED):
        state, _ = world.reset(seed=100_000 + 1_000 * seed + episode)
        total, over = 0.0, False
        while not over:
            state, reward, ended, late, _ = world.step(act(state))
            total, over = total + float(reward), ended or late
        returns.append(total)
    return _mean(returns)


def _mean(values: list[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _shown(values: list[float], digits: int = 0) -> str:
    mean, half = interval(values)
    return f"{mean:,.{digits}f} ± {half:,.{digits}f}"


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and print its tables and its JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer seeds and steps: a minute")
    parser.add_argument("--seeds", type=int, help="trainings of each")
    parser.add_argument("--steps", type=int, help="steps of a training")
    options = parser.parse_args(arguments)
    seeds = options.seeds or (2 if options.quick else 10)
    steps = options.steps or (2_500 if options.quick else 5_000)
    settings = SMALL if options.quick else SETTINGS
    if seeds < 1 or steps < EPISODE:
        parser.error(f"at least one seed and {EPISODE} steps, which is one episode")
    torch.set_num_threads(1)
    arms: dict[str, Callable[[int], Played]] = {
        "ours": lambda seed: play_ours(seed, steps, settings),
        "sb3": lambda seed: play_sb3(seed, steps, settings),
    }
    if not options.quick:
        scaled = replace(settings, normalise=True)
        arms["normalised"] = lambda seed: play_ours(seed, steps, scaled)
    played: dict[str, list[Played]] = {name: [] for name in arms}
    for seed in range(seeds):
        turn = list(arms) if seed % 2 else list(reversed(arms))  # nobody always goes first
        for name in turn:
            played[name].append(arms[name](seed))
            print(f"seed {seed}, {name}: {played[name][-1]}", file=sys.stderr, flush=True)
    table = Table(title=f"{TASK}, {steps:,} steps, {seeds} seeds")
    for column in ("", f"last {LAST} episodes", f"{EVALUATED} episodes after", "CPU seconds"):
        table.add_column(column, justify="right")
    for name, runs in played.items():
        table.add_row(
            {"ours": "ours", "sb3": "stable-baselines3", "normalised": "ours, states scaled"}[name],
            _shown([run.last for run in runs]),
            _shown([run.evaluated for run in runs]),
            _shown([run.seconds for run in runs], 1),
        )
    pairs = list(zip(played["ours"], played["sb3"], strict=True))
    difference, half = interval([ours.evaluated - theirs.evaluated for ours, theirs in pairs])
    late, late_half = interval([ours.last - theirs.last for ours, theirs in pairs])
    deciding, learning = controller_milliseconds()
    console = Console(stderr=False)
    console.print(table)
    console.print(f"ours less stable-baselines3: {difference:.0f} ± {half:.0f} after the training")
    console.print(
        f"a controller's decision: {deciding:.2f} ms; learning from it: {learning:.2f} ms"
    )
    result = {
        "units": settings.hidden[0],
        "steps": steps,
        "seeds": seeds,
        **{
            f"{name}_return": _mean([run.evaluated for run in runs])
            for name, runs in played.items()
        },
        **{f"{name}_last": _mean([run.last for run in runs]) for name, runs in played.items()},
        "difference": difference,
        "difference_half": half,
        "difference_last": late,
        "difference_last_half": late_half,
        "ours_over_sb3_time": statistics.median(ours.seconds / sb3.seconds for ours, sb3 in pairs),
        "decide_ms": deciding,
        "learn_ms": learning,
    }
    whole = {key: None if math.isnan(value) else value for key, value in result.items()}
    sys.stdout.write(json.dumps(whole) + "\n")


if __name__ == "__main__":
    main()
