"""Arms of the RLDP benchmark, and one run of one of them.

A run is the product's own loop (``client/private_steps.py``) on one pooled data set. Same
seed, same adapter, same coins and same noise: step by step both are drawn anew from the
seed (``Paired``), so that differences of policies are paired. That noise is **insecure**.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedtune.adapters import attach, trainable
from fedtune.client.backprop import optimizer
from fedtune.client.private_steps import Steps, train_steps
from fedtune.config_privacy import RldpConfig
from fedtune.data import Encoded, batches
from fedtune.measure import Counts, measure, scores
from fedtune.privacy.accounting import noise_multiplier
from fedtune.privacy.events import Relation, Unit
from fedtune.privacy.mechanism import Mechanism
from fedtune.privacy.noise import InsecureSeededNoise
from fedtune.privacy.per_example import PerExample, example_losses
from fedtune.privacy.rldp.controller import raw_sensing
from fedtune.privacy.rldp.joint import Seen
from fedtune.privacy.rldp.named import make_policy
from fedtune.privacy.rldp.policy import Job, Policy, State
from fedtune.privacy.rldp.shape import Sensing, Shape
from fedtune.privacy.rldp.sight import Public
from fedtune.privacy.sampling import Poisson
from fedtune.seeds import derive
from fedtune.simulations.benchmarks.rldp_tasks import Loaded

__all__ = ["ARMS", "BASELINES", "CONTROLLED", "SHARES", "Arm", "Run", "adapted", "run", "trained"]

NOT_PRIVATE = "non-private"


@dataclass(frozen=True)
class Arm:
    """A policy with its settings.

    Attributes
    ----------
    name, label : str
    policy : str
        Name for ``make_policy``; "raw": sees private values; "": no privacy at all.
    rldp : RldpConfig or None
    adapter : str
    tuned : bool
        Whether its clip norm is tuned too.
    """

    name: str
    label: str
    policy: str
    rldp: RldpConfig | None = None
    adapter: str = "lora"
    tuned: bool = False


def _rldp(**named: Any) -> RldpConfig:
    """Return settings of a controller that is rewarded on 32 public texts of the same kind."""
    settings: dict[str, Any] = {"reward": "public", "public": "a sample", "mode": "online"}
    return RldpConfig(**(settings | named))


SHARES = (0.001, 0.01, 0.02, 0.05, 0.1)
"""Shares for the sensors, of the ablation."""

_ALL = (
    Arm(NOT_PRIVATE, "not private", ""),
    Arm("fixed-flat", "fixed flat, C tuned", "flat", tuned=True),
    Arm("automatic", "automatic (AUTO-S)", "automatic"),
    Arm("quantile-flat", "quantile, flat", "quantile"),
    Arm("quantile-per-adapter", "quantile, per adapter", "quantile-per-adapter"),
    Arm("closed-form", "closed form", "closed-form"),
    Arm("ffa-lora", "FFA-LoRA", "quantile", adapter="lora-frozen-a"),
    Arm("dp-lac", "DP-LAC", "dp-lac"),
    Arm("geoclip", "GeoClip, diagonal", "geoclip"),
    Arm("random", "random controller", "random", _rldp()),
    Arm("rldp-online", "RLDP online", "rldp", _rldp()),
    Arm("rldp-meta", "RLDP meta", "rldp", _rldp(mode="meta")),
    Arm("rldp-default", "RLDP meta, noisy loss", "rldp", RldpConfig()),
    Arm("rldp-paper", "RLDP, paper's settings", "rldp", _rldp(preset="paper", interval=2)),
    Arm("raw-sensing", "RLDP, raw sensing (NOT DP)", "raw", _rldp()),
    Arm("constant", "best constant action", "constant", _rldp()),
    *(
        Arm(f"sensing-{share:g}", f"RLDP online, sensors {share:.1%}", "rldp",
            RldpConfig(mode="online", reward="loss", sensing=share))
        for share in SHARES
    ),
)  # fmt: skip

ARMS = {arm.name: arm for arm in _ALL}
"""In the order in which they are run."""

BASELINES = (
    "fixed-flat", "automatic", "quantile-flat", "quantile-per-adapter", "closed-form",
    "ffa-lora", "dp-lac", "geoclip",
)  # fmt: skip
"""What a learnt policy has to beat."""

CONTROLLED = ("rldp-online", "rldp-meta", "rldp-default", "rldp-paper")
"""Learnt policies that are private."""


@dataclass(frozen=True)
class Run:
    """What is asked for.

    Attributes
    ----------
    arm : Arm
    epsilon : float
        Infinity: no privacy.
    seed : int
    lr, clip_norm : float
    constant : tuple of float
        Action that "constant" holds.
    choosing : bool
        Measured on the texts that settings are chosen on, and not on the test texts.
    """

    arm: Arm
    epsilon: float
    seed: int
    lr: float
    clip_norm: float = 1.0
    constant: tuple[float, ...] = ()
    choosing: bool = False


@dataclass
class Paired:
    """**Insecure** coins and noise that two policies with the same seed share, step by step.

    Every draw of coins begins a step; its noise is that of the step's number, and how much
    noise earlier steps have used changes nothing.
    """

    seed: int
    name: str = field(default="insecure-paired", init=False)
    secure: bool = field(default=False, init=False)
    _step: int = field(default=-1, init=False)

    def __post_init__(self) -> None:
        self._noise = InsecureSeededNoise(derive(self.seed, "noise", -1))

    def _begin(self) -> InsecureSeededNoise:
        self._step += 1
        self._noise = InsecureSeededNoise(derive(self.seed, "noise", self._step))
        return InsecureSeededNoise(derive(self.seed, "coins", self._step))

    def normal(self, n: int) -> NDArray[np.float64]:
        """Return standard normal numbers of this step."""
        return self._noise.normal(n)

    def uniform(self, n: int) -> NDArray[np.float64]:
        """Begin a step, and return its coins."""
        return self._begin().uniform(n)

    def integers(self, n: int, below: int) -> NDArray[np.int64]:
        """Begin a step, and return its coins."""
        return self._begin().integers(n, below)


@dataclass
class Timed:
    """A policy, and the seconds that it takes to choose and to take note."""

    inner: Policy
    choosing: float = 0.0
    noting: float = 0.0

    @property
    def honest(self) -> bool:
        """See `Policy`."""
        return self.inner.honest

    @property
    def sensing(self) -> Sensing:
        """See `Policy`."""
        return self.inner.sensing

    def shape(self) -> Shape:
        """See `Policy`."""
        began = time.process_time()
        found = self.inner.shape()
        self.choosing += time.process_time() - began
        return found

    def wanted_noise(self) -> float | None:
        """See `Policy`."""
        return self.inner.wanted_noise()

    def observe(self, seen: Seen) -> None:
        """See `Policy`."""
        began = time.process_time()
        self.inner.observe(seen)
        self.noting += time.process_time() - began

    def decisions(self) -> list[dict[str, Any]]:
        """See `Policy`."""
        return self.inner.decisions()

    def state(self) -> State:
        """See `Policy`."""
        return self.inner.state()

    def restore(self, state: State) -> None:
        """See `Policy`."""
        self.inner.restore(state)


def mechanism_of(task: Loaded, epsilon: float, steps: int) -> Mechanism:
    """Return the mechanism of one step; delta is the task's."""
    spec = task.spec
    sampler = Poisson(spec.batch / len(task.train.ids))
    z = 1.0
    if math.isfinite(epsilon):
        z = _noise(epsilon, spec.delta, sampler.rate, steps, task.folder)
    return Mechanism(
        Unit.EXAMPLE, Relation.ADD_OR_REMOVE_ONE, sampler, z, float(spec.batch),
        micro_batch=spec.micro,
    )  # fmt: skip


@lru_cache(maxsize=256)
def _noise(epsilon: float, delta: float, rate: float, steps: int, kept: Path) -> float:
    """Return z; found once, then kept beside the hidden states: it takes seconds."""
    key = f"{epsilon:g} {delta:g} {rate!r} {steps}"
    file = kept / "noise.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    for known, value in map(json.loads, lines):
        if known == key:
            return float(value)
    event = Poisson(rate).event
    found = noise_multiplier(epsilon, delta, Relation.ADD_OR_REMOVE_ONE, steps, event)
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps([key, found]) + "\n")
    return found


def loss_on(model: nn.Module, task: Loaded, texts: Encoded, most: int = 10**9) -> dict[str, float]:
    """Return loss in nats and accuracy on the first ``most`` texts."""
    part = Encoded(texts.ids[:most], texts.targets[:most], most, 0, 0)
    counts: Counts = measure(
        model, part, task.spec.task, batch_size=64, pad_id=task.base.pad_id,
        labels=2 if task.spec.task == "classification" else 0,
    )  # fmt: skip
    return scores(counts)


def run(task: Loaded, asked: Run, *, steps: int = 0, curve: int = 96) -> dict[str, Any]:
    """Train once and return what is kept of it.

    Parameters
    ----------
    task : Loaded
    asked : Run
    steps : int
        T; 0: the task's.
    curve : int
        Test texts of the learning curve, measured at eight steps.

    Returns
    -------
    dict
        ``loss`` in nats and ``accuracy``; ``curve``: pairs of step and loss; seconds of
        processor time: ``seconds`` of all steps, and in them ``controller`` of the policy,
        in that ``noting`` of releases, and ``utility`` of evaluations on public text;
        ``state_bytes``; ``decisions``.
    """
    total = steps or task.spec.steps
    marks = {round(total * part / 8) for part in range(1, 9)}
    points: list[tuple[int, float]] = []
    measuring = 0.0

    def after(model: nn.Module, number: int) -> None:
        nonlocal measuring
        if number in marks or not number:
            began = time.process_time()
            points.append((number, loss_on(model, task, task.test, curve)["loss"]))
            measuring += time.process_time() - began

    model, found = trained(task, asked, total, after)
    result = loss_on(model, task, task.valid if asked.choosing else task.test)
    found["seconds"] -= measuring
    return {
        "loss": result["loss"], "accuracy": result["accuracy"], "curve": points, "steps": total,
        "examples": len(task.train.ids), **found,
    }  # fmt: skip


def trained(
    task: Loaded, asked: Run, total: int, after: Callable[[nn.Module, int], None] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model after ``total`` steps, and what `run` says of the steps.

    Parameters
    ----------
    after : callable, optional
        Told the model and how many steps are done, from 0; its time counts.
    """
    tuning = task.spec.tuning(asked.arm.adapter, asked.lr)
    model = attach(task.base, tuning, task.spec.task, derive(asked.seed, "adapter"))
    optim = optimizer(model, tuning, asked.lr)
    mechanism = mechanism_of(task, asked.epsilon, total)
    source = Paired(derive(asked.seed, "steps"))
    began = time.process_time()

    def told(number: int) -> None:
        if after is not None:
            after(model, number + 1)

    told(-1)
    found: dict[str, Any] = {"z": None}
    if asked.arm.policy:
        found = _privately(task, asked, model, optim, mechanism, source, total, told)
        found["z"] = mechanism.noise_multiplier
    else:
        _plainly(task, model, optim, mechanism, source, total, told)
    return model, found | {"seconds": time.process_time() - began}


def _privately(
    task: Loaded, asked: Run, model: nn.Module, optim: torch.optim.Optimizer,
    mechanism: Mechanism, source: Paired, total: int, after: Callable[[int], None],
) -> dict[str, Any]:  # fmt: skip
    spent = [0.0]

    def utility() -> Public[float]:
        began = time.process_time()
        found = -loss_on(model, task, task.public)["loss"]
        spent[0] += time.process_time() - began
        return Public(found)

    options: dict[str, Any] = {"quantile": 0.5, "quantile_lr": 0.2, "quantile_noise": 0.0}
    options |= {"rldp": asked.arm.rldp, "constant": asked.constant}
    job = Job(
        sizes={name: p.numel() for name, p in trainable(model).items()}, steps=total,
        noise_multiplier=mechanism.noise_multiplier, denominator=mechanism.denominator,
        clip_norm=asked.clip_norm, seed=derive(asked.seed, "policy"), utility=utility,
        options={name: value for name, value in options.items() if value is not None},
    )  # fmt: skip
    raw = asked.arm.policy == "raw"
    timed = Timed(raw_sensing(job) if raw else make_policy(asked.arm.policy, job))
    steps = Steps(
        model, PerExample(model), task.train, mechanism, optim, source,
        timed.inner if raw else timed, task.spec.task, task.spec.micro, task.base.pad_id,
    )  # fmt: skip
    rows = train_steps(steps, total, after=after)
    actions = [row["action"] for row in rows if row.get("action") is not None]
    state = timed.inner.state()
    return {
        "controller": None if raw else timed.choosing + timed.noting - spent[0],
        "noting": timed.noting, "utility": spent[0],
        "state_bytes": sum(value.nbytes for value in state.values()),
        "blocks": len(rows[-1]["norms"]), "decided": len(actions),
        "mean_action": np.mean(actions, axis=0).round(4).tolist() if actions else [],
        "decisions": [_short(row) for row in rows[:: max(1, total // 15)]],
    }  # fmt: skip


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """Return what is drawn of a step, in few digits."""
    kept = {name: [float(f"{x:.3g}") for x in row[name]] for name in ("norms", "shares")}
    return {"step": row["step"], **kept}


def _plainly(
    task: Loaded, model: nn.Module, optim: torch.optim.Optimizer, mechanism: Mechanism,
    source: Paired, total: int, after: Callable[[int], None],
) -> None:  # fmt: skip
    """The same steps with the same coins, without clipping and noise."""
    spec = task.spec
    model.eval()
    for number in range(total):
        drawn: Sequence[int] = mechanism.draw(len(task.train.ids), source).tolist()
        optim.zero_grad(set_to_none=False)
        for batch in batches(task.train, drawn, spec.micro, task.base.pad_id, spec.task):
            losses = example_losses(model, batch, spec.task)
            (losses.sum() / spec.batch).backward()  # type: ignore[no-untyped-call]
        optim.step()
        after(number)


def adapted(rows: Sequence[dict[str, Any]], seed: int) -> tuple[float, ...]:
    """Return the mean action of a controller's runs with **other** seeds.

    Examples
    --------
    >>> rows = [{"seed": 0, "mean_action": [1.0]}, {"seed": 1, "mean_action": [0.5]}]
    >>> adapted(rows, 0)
    (0.5,)
    """
    others = [row["mean_action"] for row in rows if row["seed"] != seed and row["mean_action"]]
    if not others:
        return ()
    return tuple(float(x) for x in np.mean(others, axis=0))


def line(row: dict[str, Any]) -> str:
    """Return a row as one line of JSON."""
    return json.dumps(row, separators=(",", ":")) + "\n"
