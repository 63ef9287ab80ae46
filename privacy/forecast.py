"""What a promise will cost and how loud its noise will be, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fedtune.privacy.accounting import curve
from fedtune.privacy.events import Charge, Unit
from fedtune.privacy.forecast_policy import moving_noise, outline, policy_lines
from fedtune.privacy.plan import Promise, rounds_that_fit
from fedtune.privacy.schedule import Schedule
from fedtune.privacy.schedule import lines as schedule_lines

__all__ = ["forecast", "lines"]

_POINTS = 11
_BAR = 24


def forecast(
    promise: Promise,
    parameters: int,
    voices: int = 1,
    schedule: Schedule | None = None,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return noise, curve and expected signal-to-noise of one promise.

    Parameters
    ----------
    promise : Promise
    parameters : int
        Coordinates of a release, d; with a seed pool the coefficients that are released.
    voices : int
        Independent noisy releases that are averaged: clients at example level.
    schedule : Schedule, optional
        Groups of a seed pool: `fedtune.privacy.schedule.schedule_of`.
    sizes : mapping of str to int, optional
        Numbers in each parameter, where a clipping policy shapes the releases.

    Returns
    -------
    dict
        ``signal_to_noise`` is an upper bound for one round: when all clipped
        contributions point the same way, their mean is ``clip`` long, and the noise
        ``z clip sqrt(d) / denominator``; steps and voices average the noise.
        ``curve`` has (rounds, epsilon). ``rounds_that_fit`` is there with a target,
        ``schedule`` with a schedule, ``policy`` with sizes.
    """
    total = promise.spent()
    mechanism = promise.mechanism
    # The standard deviation of Laplace noise is sqrt(2) times its scale.
    spread = math.sqrt(2.0) if mechanism.law == "laplace" else 1.0
    one = mechanism.denominator / (spread * mechanism.noise_multiplier * math.sqrt(parameters))
    each = promise.charge
    event = Charge(each.event, promise.rounds * each.count)
    points = curve([event], promise.delta, promise.relation, min(_POINTS, promise.rounds))
    found: dict[str, Any] = {
        "unit": promise.unit.value,
        "relation": promise.relation.value,
        "sampler": promise.settings.sampler,
        "sampling_probability": mechanism.sampler.rate,
        "noise": mechanism.law,
        "noise_multiplier": mechanism.noise_multiplier,
        "clip": promise.settings.clip,
        "clip_norm": promise.settings.clip_norm,
        "denominator": mechanism.denominator,
        "population": promise.settings.population,
        "releases_per_round": promise.releases,
        "delta": promise.delta,
        "epsilon": total.epsilon,
        "epsilon_at_delta_0": total.pure,
        "epsilon_without_amplification": promise.plain_spent().epsilon,
        "mu": total.mu,
        "accountant": total.accountant,
        "library": total.library,
        "curve": [(math.ceil(n / each.count), epsilon) for n, epsilon in points],
        "signal_to_noise": one * math.sqrt(promise.releases * voices),
    }
    if promise.limit is not None:
        found["epsilon_target"] = promise.limit[0]
        found["rounds_that_fit"] = rounds_that_fit(promise, promise.limit[0])
    if schedule is not None:
        found["schedule"] = asdict(schedule) | {
            "predicted_error": schedule.error,
            "useful_directions": schedule.useful,
        }
    if sizes:
        found["policy"] = outline(promise, sizes) | {"over_time": moving_noise(promise, total)}
    return found


def lines(made: Mapping[str, Any]) -> list[str]:
    """Return a forecast as lines for people."""
    what = {"example": "each example", "client": "each client"}[made["unit"]]
    found = [
        f"  privacy      {what}: epsilon {made['epsilon']:.4g} at delta {made['delta']:g} "
        f"({made['relation']}, {made['accountant']}, {made['library']})",
        f"    sampling   {made['sampler']}, probability {made['sampling_probability']:.4g}; "
        f"without it epsilon {made['epsilon_without_amplification']:.4g}",
        f"    noise      {made['noise']}, {made['noise_multiplier']:.4g} times the clip norm "
        f"{made['clip_norm']:g} ({made['clip']}), over {made['denominator']:g}, "
        f"{made['releases_per_round']:,} a round",
        f"    signal     at most {made['signal_to_noise']:.2g} times the noise, in one round",
    ]
    if made["epsilon_at_delta_0"] is not None:
        found.append(f"    pure       epsilon {made['epsilon_at_delta_0']:.4g} at delta 0")
    if "rounds_that_fit" in made:
        found.append(
            f"    rounds     {made['rounds_that_fit']:,} keep epsilon {made['epsilon_target']:g}"
        )
    if "policy" in made:
        found += policy_lines(made["policy"], Unit(made["unit"]))
    if "schedule" in made:
        found += schedule_lines(made["schedule"])
    return [*found, *_drawn(made["curve"])]


def _drawn(points: Sequence[tuple[int, float]]) -> list[str]:
    """Draw the curve with blocks, one line for each point."""
    most = max(epsilon for _, epsilon in points)
    if not math.isfinite(most) or most <= 0:
        return []
    found = []
    for number, epsilon in points:
        bar = "#" * max(1, round(_BAR * epsilon / most))
        found.append(f"    round {number:>5}  {epsilon:>8.3f} {bar}")
    return found
