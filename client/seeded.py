"""Local tuning of which only coefficients of a seed pool leave: FedKSeed, Pro, and ours.

Two engines give the same kind of upload, and the server cannot tell them apart: forward
passes along directions of the pool, or backpropagation projected on the pool.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedtune.adapters import Task, trainable
from fedtune.client.backprop import LocalRun, groups, optimizer_over, steps_of, units_of
from fedtune.client.mezo import Scorer
from fedtune.client.probes import require_steps
from fedtune.client.projection import projecting
from fedtune.client.walker import Walker
from fedtune.config import TuningConfig
from fedtune.data import Encoded
from fedtune.measure import forward_loss
from fedtune.pool.codec import MOST_SLOPE, pack, to_wire
from fedtune.pool.groups import Groups, projected
from fedtune.pool.weights import PoolWeights

__all__ = ["Local", "Schedule", "distinct", "nothing_of", "schedule_of", "tune_seeded", "upload"]


@dataclass(frozen=True)
class Schedule:
    """Which directions a client may use in a round, and how it chooses.

    Attributes
    ----------
    columns : ndarray of int64
        Directions of the pool.
    odds : ndarray of float64 or None
        How likely each is drawn; None: in turn where ``drawn`` is False, else alike.
    drawn : bool
        Drawn at random for each step, as published, or taken in turn.
    """

    columns: NDArray[np.int64]
    odds: NDArray[np.float64] | None
    drawn: bool

    def order(self, rng: np.random.Generator) -> Iterator[int]:
        """Yield directions without end."""
        while True:
            if self.drawn:
                yield int(rng.choice(self.columns, p=self.odds))
            else:
                yield from self.columns.tolist()


@dataclass(frozen=True)
class Local:
    """What one client's round gave.

    Attributes
    ----------
    coefficients : ndarray of float32, shape (K,)
        How far it went along each direction; the learning rate is in them.
    sizes, counts : ndarray, shape (K,)
        FedKSeed-Pro: mean magnitude of each seed's slopes (float16) and how many (uint16).
    """

    coefficients: NDArray[np.float32]
    run: LocalRun
    sizes: NDArray[np.float16] = field(default_factory=lambda: np.zeros(0, np.float16))
    counts: NDArray[np.uint16] = field(default_factory=lambda: np.zeros(0, np.uint16))


def schedule_of(
    tuning: TuningConfig, client: str, key: bytes, number: int, shared: Groups | None,
    odds: NDArray[np.float16] | None,
) -> Schedule:  # fmt: skip
    """Return a client's directions for round ``number``: no data is in them.

    Parameters
    ----------
    shared : Groups or None
        None: every client draws its own, as published.
    odds : ndarray of float16 or None
        FedKSeed-Pro: what the server sent.
    """
    size, wanted = tuning.pool.size, tuning.pool.directions
    if tuning.method != "seedpool":
        likely = None
        if odds is not None:
            likely = np.clip(odds.astype(np.float64), 1e-12, None)
            likely /= likely.sum()
        return Schedule(np.arange(size), likely, drawn=True)
    if shared is not None:
        return Schedule(shared.columns(shared.of(client, key), number), None, drawn=False)
    said = hashlib.sha256(key + number.to_bytes(8, "big") + client.encode()).digest()
    order = np.random.default_rng(int.from_bytes(said[:8], "big")).permutation(size)
    return Schedule(order[: wanted or size].astype(np.int64), None, drawn=False)


def distinct(order: Iterator[int], count: int) -> list[int]:
    """Return the next ``count`` directions of an order, each once."""
    return list(dict.fromkeys(islice(order, count)))


def tune_seeded(
    weights: PoolWeights,
    encoded: Encoded,
    tuning: TuningConfig,
    task: Task,
    schedule: Schedule,
    start: NDArray[np.float32],
    *,
    lr: float,
    seed: int,
    pad_id: int,
) -> Local:
    """Tune one client's copy in place for a round, and return its coefficients.

    Parameters
    ----------
    weights : PoolWeights
        With this round's chain put.
    encoded : Encoded
        At least one example.
    start : ndarray of float32, shape (K,)
        The chain's running coefficients: what the weights have over ``weights.base``.
    lr : float
        Folded into the coefficients, so that any schedule is legal.
    """
    parameters = sum(p.numel() for p in weights.model.parameters())
    if projected(tuning, parameters, weights.arena.flat.device):
        return _by_backprop(
            weights, encoded, tuning, task, schedule, start, lr=lr, seed=seed, pad_id=pad_id
        )
    return _by_probes(
        weights, encoded, tuning, task, schedule, start, lr=lr, seed=seed, pad_id=pad_id
    )


def _by_probes(
    weights: PoolWeights, encoded: Encoded, tuning: TuningConfig, task: Task, schedule: Schedule,
    start: NDArray[np.float32], *, lr: float, seed: int, pad_id: int,
) -> Local:  # fmt: skip
    """Qin et al. 2024, algorithm 1: tau steps, each along directions of the pool."""
    require_steps(tuning.probe)
    walker = Walker(weights.pool, weights.arena.flat, weights.base, start)
    steps = steps_of(len(encoded.ids), tuning)
    order = schedule.order(np.random.default_rng(seed))
    sums, counts = np.zeros(weights.pool.size), np.zeros(weights.pool.size, np.int64)
    scorer = Scorer(weights.model, walker, task, tuning.probe)
    weights.model.eval()
    try:
        for group in groups(encoded, tuning, task, steps, seed, pad_id):
            chosen = distinct(order, tuning.probe.count)
            seen = scorer.step(group, chosen, lr)
            sums[chosen] += np.minimum(np.abs(seen.slopes), MOST_SLOPE)
            counts[chosen] += 1
    finally:
        walker.settle()
    run = LocalRun(steps, scorer.mean(), scorer.passes)
    mean = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
    return Local(
        walker.coefficients, run, mean.astype(np.float16), np.minimum(counts, 65535).astype("u2")
    )


def _by_backprop(
    weights: PoolWeights, encoded: Encoded, tuning: TuningConfig, task: Task, schedule: Schedule,
    start: NDArray[np.float32], *, lr: float, seed: int, pad_id: int,
) -> Local:  # fmt: skip
    """Train the coefficients themselves: each gradient is projected as soon as it is there.

    The gradient with respect to ``a_k`` is ``<z_k, g>``. With ``sgd``, and always where the
    engine is chosen by memory, a step is that of probes along all n directions at once:
    ``-lr <z_k, g> / n``. With ``adamw`` directions are scaled to length 1, so that ``lr`` means
    what it does for parameters.
    """
    size, flat, parameters = weights.pool.size, weights.arena.flat, trainable(weights.model)
    adaptive = tuning.optimizer == "adamw" and tuning.pool.engine == "projected"
    inside = torch.zeros(size)
    inside[torch.from_numpy(schedule.columns)] = 1.0 / math.sqrt(
        flat.numel() if adaptive else len(schedule.columns)
    )
    if not adaptive:
        tuning = tuning.model_copy(update={"optimizer": "sgd"})
    moved = torch.nn.Parameter(torch.zeros(size))
    optim = optimizer_over([moved], tuning, lr)
    steps = steps_of(len(encoded.ids), tuning)
    begun = torch.from_numpy(start)
    loss, units, passes = 0.0, 0, 0
    weights.model.eval()
    for group in groups(encoded, tuning, task, steps, seed, pad_id):
        count = max(1, sum(units_of(batch, task) for batch in group))
        total = torch.zeros(size, device=flat.device)
        with projecting(weights.pool, weights.arena.layout, parameters, total) as broken:
            for batch in group:
                on = {name: value.to(flat.device) for name, value in batch.items()}
                summed = forward_loss(weights.model, on, task)[0].sum()
                (summed / count).backward()  # type: ignore[no-untyped-call]
                if math.isfinite(seen := float(summed.detach())):
                    loss, units = loss + seen, units + units_of(batch, task)
        gradient = total.cpu() * inside
        usable = not broken and bool(torch.isfinite(gradient).all())
        moved.grad = gradient if usable else torch.zeros(size)
        if tuning.max_grad_norm:
            nn.utils.clip_grad_norm_([moved], tuning.max_grad_norm)
        optim.step()
        weights.pool.rebuild(weights.base, flat, begun + moved.detach() * inside)
        passes += len(group)
    found: NDArray[np.float32] = (moved.detach() * inside).numpy()
    return Local(found, LocalRun(steps, loss / units if units else math.nan, passes))


def upload(
    local: Local, bits: int, rng: np.random.Generator, *, history: bool
) -> dict[str, NDArray[Any]]:
    """Return a client's coefficients as they travel, and with Pro its seeds' history."""
    packed = pack(local.coefficients, bits, rng)
    if not history:
        return to_wire(packed)
    # By what was drawn: a seed whose coefficient rounds to zero has a history too.
    drawn = np.flatnonzero((local.counts > 0) | (packed.values != 0)).astype(np.uint16)
    scale = np.array([packed.scale], np.float32)
    return {
        "a": packed.values[drawn], "scale": scale, "at": drawn,
        "sizes": local.sizes[drawn], "draws": local.counts[drawn],
    }  # fmt: skip


def nothing_of(
    tuning: TuningConfig, tensors: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """Return the update of a client that has nothing to say, in the shape of the others'."""
    if tuning.seeded:
        return to_wire(pack(np.zeros(tuning.pool.size), tuning.pool.bits))
    return {name: np.zeros_like(value) for name, value in tensors.items()}
