"""What a clipping policy will do and cost, before anything runs: asked of the policy itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedtune.config_privacy import RldpConfig
from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.accounting import Spent, noise_multiplier
from fedtune.privacy.events import Levels, Unit
from fedtune.privacy.plan import Promise
from fedtune.privacy.rldp.actions import interval_of
from fedtune.privacy.rldp.named import policy_of
from fedtune.privacy.rldp.policy import Policy
from fedtune.privacy.rldp.shape import BITS, HELD, LOSS, mechanism_blocks
from fedtune.privacy.rldp.sight import Public
from fedtune.privacy.words import joined, plural, tidy

__all__ = ["FIXED", "begin", "moving_noise", "outline", "policy_lines"]

FIXED = ("flat", "per-adapter", "automatic")
"""Policies that never change anything: nothing is to be said of their course."""

STEERED = ("rldp", "random", "constant")
"""Policies that decide now and then, as ``[privacy.*.rldp]`` says."""

_LOUD = 0.5
"""Noise of a reward, in nats per decision, that hides what a decision can gain."""


def begin(promise: Promise, sizes: Mapping[str, int]) -> Policy:
    """Return the policy of a promise before its first release, to be asked and never shown.

    Raises
    ------
    FedtuneError
        There can be no such policy, or it would see private values.
    """
    return policy_of(promise, sizes, 0, _unmeasured)


def _unmeasured() -> Public[float]:
    raise FedtuneError("a plan measures nothing", code=ExitCode.INTERNAL)


def outline(promise: Promise, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return blocks, sensors, decisions and noise over time of a promise's policy.

    Parameters
    ----------
    promise : Promise
    sizes : mapping of str to int
        Numbers in each parameter.

    Returns
    -------
    dict
        ``bits``, ``loss``: shares of a release's privacy for its sensors, at the start of the
        run; ``held_out``: share of the rows that train nothing. ``extra_noise``: relative
        addition to the gradient's noise. ``bits_noise``: standard deviation of the share of
        units inside, for one block; ``loss_noise``, ``held_noise``: of a mean loss, in
        nats. ``interval`` and ``warmup`` in releases. ``over_time``: see `moving_noise`.

    Examples
    --------
    >>> from fedtune.config import Config
    >>> from fedtune.privacy.plan import example_promise
    >>> told = {"relation": "add-or-remove-one", "population": 5120, "delta": 1e-5,
    ...         "noise_multiplier": 1.0, "clip": "rldp", "rldp": {"mode": "online"}}
    >>> promise = example_promise(Config.model_validate({
    ...     "data": {"pack": False, "holdout": 0.0}, "evaluation": {"clients": 0},
    ...     "federation": {"weighting": "uniform", "rounds": 40},
    ...     "tuning": {"batch_size": 64, "accumulate": 8}, "privacy": {"example": told}}))
    >>> found = outline(promise, {f"layers.{i}.lora_B.weight": 64 for i in range(12)})
    >>> [round(found[name], 4) for name in ("extra_noise", "bits_noise", "loss_noise")]
    [0.005, 0.0478, 0.1105]
    >>> found["blocks"], found["interval"], found["decisions"]
    (12, 10, 36)
    """
    settings, mechanism = promise.settings, promise.mechanism
    policy = begin(promise, sizes)
    sensing, shape = policy.sensing, policy.shape()
    rldp = settings.rldp or RldpConfig()
    held_out = rldp.held_out if sensing.held else 0.0
    blocks, held = mechanism_blocks(mechanism, shape, sensing)
    spread = {block.names[0]: block.sigma / mechanism.denominator for block in (*blocks, *held)}
    training = 1.0 - held_out
    steered = settings.clip in STEERED
    steps = promise.rounds * promise.releases
    found: dict[str, Any] = {
        "name": settings.clip,
        "mode": rldp.mode if settings.clip == "rldp" else "",
        "reward": rldp.reward if settings.clip == "rldp" else "",
        "blocks": len(shape.names),
        "bits": sensing.bits,
        "loss": sensing.loss,
        "held_out": held_out,
        "extra_noise": sensing.extra_noise,
        "bits_noise": spread[BITS] / training if sensing.bits else None,
        "loss_noise": spread[LOSS] / training if sensing.loss else None,
        "held_noise": spread[HELD] / held_out if sensing.held else None,
        "warmup": math.ceil(rldp.warmup * steps) if steered else 0,
        "interval": 0,
        "decisions": 0,
    }
    if steered:
        every = interval_of(rldp, steps)
        found |= {"interval": every, "decisions": _decisions(settings.clip, found, steps, every)}
    return found


def _decisions(name: str, found: Mapping[str, Any], steps: int, every: int) -> int:
    """Return how often it decides: the controller when an interval is full, others at once."""
    warmup = int(found["warmup"])
    if name != "rldp":
        return math.ceil((steps - warmup) / every)
    return sum(number >= warmup for number in range(every, steps, every))


def moving_noise(promise: Promise, total: Spent) -> dict[str, Any]:
    """Return between which ends the noise moves, and what that costs in noise.

    Returns
    -------
    dict
        ``kind``, ``low``, ``high``, ``order`` of a Renyi filter or 0, ``levels`` with
        their counts; ``constant``: the noise multiplier of constant noise of the same
        epsilon; ``price``: by which share the noise, as precision has it, is above that.
    """
    settings, moving = promise.settings, promise.moving
    planned = promise.mechanism.noise_multiplier
    kind = settings.rldp.noise if settings.rldp else "constant"
    found: dict[str, Any] = {
        "kind": kind, "low": moving.low, "high": moving.high, "order": moving.order,
        "levels": [], "constant": planned, "price": 0.0,
    }  # fmt: skip
    if kind == "constant" or not math.isfinite(total.epsilon):
        return found
    if isinstance(moving.event, Levels):
        levels = list(zip(moving.event.noise_multipliers, moving.event.counts, strict=True))
        found["levels"] = levels
        precision = sum(count / z**2 for z, count in levels) / promise.releases
        planned = precision**-0.5
    constant = noise_multiplier(
        total.epsilon, promise.delta, promise.relation, promise.rounds * promise.releases,
        promise.mechanism.sampler.event,
    )  # fmt: skip
    return found | {"constant": constant, "price": planned / constant - 1.0}


def policy_lines(made: Mapping[str, Any], unit: Unit) -> list[str]:
    """Return an outline as lines for people; none of a policy that changes nothing."""
    if made["name"] in FIXED:
        return []
    often = "step" if unit is Unit.EXAMPLE else "round"
    told = [word for word in (made["mode"], made["reward"] and f"reward {made['reward']}") if word]
    name = made["name"] + (f" ({', '.join(told)})" if told else "")
    text = f"{name}, {plural(made['blocks'], 'block')} of parameters"
    if made["interval"]:
        text += (
            f"; {plural(made['decisions'], 'decision')}, one in {plural(made['interval'], often)}"
            f" after {plural(made['warmup'], often)} at the quantile rule"
        )
    found = [f"    policy     {text}", f"    sensing    {_sensing(made, often)}"]
    found += _rewards(made, often)
    found += _over_time(made["over_time"], often)
    return [
        *found, "    guarantee  it sees what was released and nothing else: epsilon stays as above"
    ]  # fmt: skip


def _sensing(made: Mapping[str, Any], often: str) -> str:
    share = made["bits"] + made["loss"]
    if not share:
        return "none: it goes by released gradients alone"
    parts = []
    if made["bits"]:
        parts.append(f"of one clip bit's share {made['bits_noise']:.2g}")
    if made["loss"]:
        parts.append(f"of the mean loss {made['loss_noise']:.2g} nats")
    start = ", at the start" if made["name"] == "dp-lac" else ""
    return (
        f"{100.0 * share:.3g}% of the privacy of each {often}{start}: {made['extra_noise']:.2%} "
        f"more gradient noise; noise {joined(parts)}"
    )


def _rewards(made: Mapping[str, Any], often: str) -> list[str]:
    """Say how noisy what it learns from is, where it learns from private text."""
    noise = made["loss_noise"] if made["reward"] == "loss" else made["held_noise"]
    if made["name"] != "rldp" or noise is None:
        return []
    mean = noise / math.sqrt(made["interval"])
    where = "the training loss"
    if made["held_out"]:
        where = f"the loss of {100.0 * made['held_out']:.3g}% of the rows, which train nothing"
    text = f"    reward     {where}: noise {noise:.2g} nats in a {often}, {mean:.2g} in a decision"
    loud = "; gains will be smaller than that: rldp.reward = 'public' has no noise"
    return [text + (loud if mean > _LOUD else "")]


def _over_time(moving: Mapping[str, Any], often: str) -> list[str]:
    if moving["kind"] == "constant":
        return []
    if moving["levels"]:
        levels = joined([f"{count} of {tidy(z)}" for z, count in moving["levels"]])
        text = f"in each round {levels} in any order"
    else:
        text = f"{tidy(moving['low'])} to {tidy(moving['high'])}"
        if moving["order"]:
            text += f" behind a Renyi filter of order {moving['order']:g}"
        else:
            text += " behind a filter of the sum of 1 / z^2"
        text += f", which refuses a {often} before anybody is drawn"
    price = (
        f"{moving['price']:.1%} more noise than constant noise of the same epsilon, "
        f"{tidy(moving['constant'])}"
        if moving["price"] > 5e-4
        else "no more noise than constant noise of the same epsilon"
    )
    return [f"    over time  {text}", f"               {price}"]
