"""Local tuning by forward passes alone (MeZO, Malladi et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fedtune.adapters import Task, trainable
from fedtune.client.backprop import LocalRun, groups, steps_of
from fedtune.client.probes import (
    Copies,
    Probed,
    Score,
    ScoreMany,
    Seen,
    probe,
    rate,
    require_steps,
    see,
    step_sizes,
)
from fedtune.client.walker import Stream, Walker
from fedtune.config import ProbeConfig, TuningConfig
from fedtune.data import Encoded
from fedtune.pool.layout import Arena, Layout
from fedtune.pool.pool import make_pool
from fedtune.seeds import derive

__all__ = ["Scorer", "arena_of", "fresh", "tune", "walker_of"]

POOL = 4096
"""Directions of one pool of the stream; the next pool has a key of its own."""

_arenas: WeakKeyDictionary[nn.Module, Arena] = WeakKeyDictionary()


def arena_of(model: nn.Module) -> Arena:
    """Return the one vector that a model's trainable parameters are views of.

    Made at the first call and kept as long as the model.
    """
    found = _arenas.get(model)
    if found is None or not _holds(found, model):
        found = _arenas[model] = Arena.of(trainable(model).items())
    return found


def _holds(arena: Arena, model: nn.Module) -> bool:
    tuned = trainable(model)
    start, size = arena.flat.data_ptr(), arena.flat.element_size()
    return tuned.keys() == {span.name for span in arena.layout.spans} and all(
        tuned[span.name].data_ptr() == start + size * span.start for span in arena.layout.spans
    )


@dataclass
class Scorer:
    """Scores groups of micro-batches, and counts what that took.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode: the probes of a step must see one network.
    walker : Walker
        Over the model's trainable parameters, in their order by name.
    task : {"causal-lm", "classification"}
    settings : ProbeConfig

    Attributes
    ----------
    passes : int
        Forward passes over a micro-batch; a moved copy counts as one.
    loss, units : float, int
        Sum of cross-entropy over all passes that were finite, and of units in it.
    """

    model: nn.Module
    walker: Walker
    task: Task
    settings: ProbeConfig
    passes: int = field(default=0, init=False)
    loss: float = field(default=0.0, init=False)
    units: int = field(default=0, init=False)
    _finite: bool = field(default=False, init=False)
    _copies: Copies = field(init=False)
    _group: Sequence[dict[str, torch.Tensor]] = field(default=(), init=False)

    def __post_init__(self) -> None:
        layout = Layout.of(trainable(self.model).items())
        self._copies = Copies(self.model, layout, self.task, self.settings.batched)

    def take(self, group: Sequence[dict[str, torch.Tensor]]) -> tuple[Score, ScoreMany | None]:
        """Score this group from now on: both callables of ``probe``."""
        device = self.walker.weights.device
        self._group = [{name: x.to(device) for name, x in batch.items()} for batch in group]
        count = self.settings.count * (2 if self.settings.sides == "two" else 1)
        several = all(self._copies.usable(self.walker, batch, count) for batch in self._group)
        return self._one, self._many if several else None

    def _one(self) -> float:
        return self._count([see(self.model, batch, self.task) for batch in self._group])

    def _many(self, moves: Sequence[tuple[int, float]]) -> list[float]:
        seen = [self._copies.see(self.walker, batch, moves) for batch in self._group]
        return [self._count(own) for own in zip(*seen, strict=True)]

    def step(
        self, group: Sequence[dict[str, torch.Tensor]], directions: Sequence[int], lr: float
    ) -> Probed:
        """Probe ``directions`` on this group and walk along them; return what was seen."""
        score, many = self.take(group)
        probed = probe(self.walker, directions, score, self.settings, many)
        for k, alpha in zip(directions, step_sizes(probed, self.settings, lr), strict=True):
            self.walker.move(k, float(alpha))
        return probed

    def mean(self) -> float:
        """Return the mean loss in nats, NaN where no pass was finite."""
        return self.loss / max(self.units, 1) if self._finite else math.nan

    def _count(self, seen: Sequence[Seen]) -> float:
        self.passes += len(seen)
        loss = sum(float(one.losses.double().sum()) for one in seen)
        if math.isfinite(loss):
            self._finite = True
            self.loss += loss
            self.units += sum(len(one.target) for one in seen)
        return rate(seen, self.settings.objective)


def walker_of(model: nn.Module, seed: int, threads: int) -> Walker:
    """Return what walks a model's trainable parameters along directions without end.

    Parameters
    ----------
    seed : int
        Gives the key of the directions.
    """
    arena = arena_of(model)
    key = b"".join(derive(seed, "directions", part).to_bytes(8, "big") for part in (0, 1))
    stream = Stream(lambda epoch: make_pool("hadamard", key, epoch, POOL, arena.layout, threads))
    return Walker(stream, arena.flat)


def fresh(step: int, count: int) -> range:
    """Return the directions of one step; none is used twice.

    Examples
    --------
    >>> list(fresh(2, 3))
    [6, 7, 8]
    """
    return range(step * count, (step + 1) * count)


def tune(
    model: nn.Module,
    encoded: Encoded,
    tuning: TuningConfig,
    task: Task,
    *,
    lr: float,
    seed: int,
    pad_id: int,
    threads: int = 1,
) -> LocalRun:
    """Train the adapter in place on one client's examples, without a gradient.

    A step probes ``tuning.probe.count`` fresh directions of signs and walks along them.
    Its batches are those that backpropagation would see, in that order.

    Parameters
    ----------
    model : nn.Module
        With the adapter of this round written into it; trainable parameters in float32.
    encoded : Encoded
        At least one example.
    tuning : TuningConfig
        ``probe`` says how; ``weight_decay`` is decoupled, as in AdamW.
    lr : float
    seed : int
        Orders the examples and gives the key of the directions.
    pad_id : int
        Token that fills short examples.
    threads : int
        Of the walk; the result does not depend on it.

    Returns
    -------
    LocalRun
        Its loss is the mean over all probes that were finite, NaN if none was.

    Raises
    ------
    FedtuneError
        Settings of ``tuning.probe`` that do not fit each other.
    """
    settings = tuning.probe
    require_steps(settings)
    model.eval()
    walker = walker_of(model, seed, threads)
    scorer = Scorer(model, walker, task, settings)
    total = steps_of(len(encoded.ids), tuning)
    try:
        for step, group in enumerate(groups(encoded, tuning, task, total, seed, pad_id)):
            scorer.step(group, fresh(step, settings.count), lr)
            if tuning.weight_decay:
                walker.settle()
                walker.weights.mul_(1.0 - lr * tuning.weight_decay)
    finally:
        walker.settle()
    return LocalRun(total, scorer.mean(), scorer.passes)
