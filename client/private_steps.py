"""The steps of DP-SGD: draw, clip, sense, release, move, and show the policy what came out.

Abadi et al. 2016, algorithm 1, with a policy (``fedtune.privacy.rldp``) in place of a
fixed clip norm. The policy is asked before units are drawn and sees releases alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedtune.adapters import Task, trainable
from fedtune.config import Config
from fedtune.data import Encoded, batches
from fedtune.privacy.mechanism import Mechanism
from fedtune.privacy.noise import NoiseSource
from fedtune.privacy.per_example import PerExample, example_losses
from fedtune.privacy.plan import Promise
from fedtune.privacy.rldp.dense import scaled_sum
from fedtune.privacy.rldp.joint import Collected, Seen
from fedtune.privacy.rldp.levels import noise_book
from fedtune.privacy.rldp.policy import Peeking, Policy

__all__ = ["Steps", "held_part", "train_steps", "tune_privately"]


@dataclass
class Steps:
    """What every step of a run needs, and what does not change from one to the next.

    Attributes
    ----------
    model : nn.Module
        Its trainable parameters are moved in place.
    engine : PerExample
        Over that model.
    encoded : Encoded
        May be empty: then all steps are noise.
    mechanism : Mechanism
    optim : Optimizer
    source : NoiseSource
        Draws the coins and the noise.
    policy : Policy
    task : {"causal-lm", "classification"}
    batch_size : int
        Micro-batch: changes memory, not the result.
    pad_id : int
    held : array of bool, shape (examples,), or None
        Examples of the held-out part: see `held_part`.
    held_share : float
        Share that the public coin puts there.
    """

    model: nn.Module
    engine: PerExample
    encoded: Encoded
    mechanism: Mechanism
    optim: torch.optim.Optimizer
    source: NoiseSource
    policy: Policy
    task: Task
    batch_size: int
    pad_id: int
    held: NDArray[np.bool_] | None = None
    held_share: float = 0.0
    _parameters: dict[str, nn.Parameter] = field(init=False)
    _device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self._parameters = trainable(self.model)
        self._device = next(iter(self._parameters.values())).device

    def take(self, number: int, mechanism: Mechanism) -> Seen:
        """Take one step, with noise that was booked before: `Promise.at`."""
        collected = self._collect()
        seen = collected.release(mechanism, self.source, number)
        for name, parameter in self._parameters.items():
            parameter.grad = torch.from_numpy(seen.means.value[name]).to(self._device)
        self.optim.step()
        self.optim.zero_grad(set_to_none=True)
        self.policy.observe(seen)
        return seen

    def _collect(self) -> Collected:
        """Draw and add up; private."""
        shape, sensing = self.policy.shape(), self.policy.sensing
        zeros = {name: np.zeros(tuple(p.shape)) for name, p in self._parameters.items()}
        collected = Collected(shape, sensing, zeros, self.held_share if sensing.held else 0.0)
        # Not by the copy with another noise multiplier: whoever watches, watches this one.
        drawn = self.mechanism.draw(len(self.encoded.ids), self.source).tolist()
        apart: list[int] = []
        if sensing.held and self.held is not None:
            apart = [i for i in drawn if self.held[i]]
            drawn = [i for i in drawn if not self.held[i]]
        for batch in self._batches(drawn):
            if shape.scales is None:
                part = self.engine.clipped_sum(self._losses, batch, shape.rule)
            else:
                part = scaled_sum(self.engine, self._losses, batch, shape)
            collected.add({name: value.cpu().numpy() for name, value in part.sums.items()})
            collected.sense(part.norms, part.losses)
            if isinstance(self.policy, Peeking):
                self.policy.peek(part.norms, part.losses)
        with torch.no_grad():
            for batch in self._batches(apart):
                collected.sense_held(self._losses(batch))
        return collected

    def _losses(self, batch: Any) -> torch.Tensor:
        return example_losses(self.model, batch, self.task)

    def _batches(self, drawn: list[int]) -> Any:
        # By length, so that little is padding; a sum has no order.
        ordered = sorted(drawn, key=lambda i: len(self.encoded.ids[i]))
        for batch in batches(self.encoded, ordered, self.batch_size, self.pad_id, self.task):
            yield {name: value.to(self._device) for name, value in batch.items()}


def train_steps(
    steps: Steps, count: int, *, first: int = 0, promise: Promise | None = None,
    log_every: int = 1, after: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Take so many steps, or fewer when the book refuses one.

    Parameters
    ----------
    count : int
        Steps: never depends on the number of examples. A step for which nobody is drawn
        releases noise.
    first : int
        Number of the first step in the whole run.
    promise : Promise, optional
        Its noise book says how loud each release is, and refuses before anybody is drawn.
        Without it all have the mechanism's noise.
    log_every : int
        Steps between two rows of the log.
    after : callable, optional
        Told the number of each step that was taken.

    Returns
    -------
    list of dict
        Shape and noise by step, and what the policy says of its decisions; all of it is
        public once the releases are.
    """
    # No dropout: its masks go by place in the batch, and would tie examples together.
    steps.model.eval()
    book = noise_book(promise) if promise is not None else None
    mechanism = steps.mechanism
    rows: list[dict[str, Any]] = []
    for number in range(first, first + count):
        if promise is not None and book is not None:
            taken = book.take(steps.policy.wanted_noise())
            if taken is None:
                rows.append({"step": number, "refused": True})
                break
            mechanism = promise.at(taken)
        seen = steps.take(number, mechanism)
        said = steps.policy.decisions()
        if said or number % log_every == 0:
            last = said[-1] if said else {}
            row = {
                "step": number,
                "noise_multiplier": mechanism.noise_multiplier,
                **seen.shape.facts(),
            }
            rows.append(last | row)
        if after is not None:
            after(number)
    return rows


def tune_privately(
    model: nn.Module,
    engine: PerExample,
    encoded: Encoded,
    config: Config,
    promise: Promise,
    optim: torch.optim.Optimizer,
    source: NoiseSource,
    *,
    policy: Policy,
    pad_id: int,
    first: int = 0,
) -> list[dict[str, Any]]:
    """Run one round of DP-SGD or DP-AdamW in place: ``promise.releases`` steps, or fewer.

    Parameters
    ----------
    encoded : Encoded
        May be empty.
    policy : Policy
        Goes on from what it remembers.
    first : int
        Number of the round's first step in the whole run.

    Returns
    -------
    list of dict
        For the log: see `train_steps`.
    """
    rldp, held, share = promise.settings.rldp, None, 0.0
    if rldp is not None and policy.sensing.held:
        share = rldp.held_out
        held = held_part(encoded, share, config.seed)
    steps = Steps(
        model, engine, encoded, promise.mechanism, optim, source, policy, config.model.task,
        config.tuning.batch_size, pad_id, held, share,
    )  # fmt: skip
    total = promise.rounds * promise.releases
    return train_steps(
        steps, promise.releases, first=first, promise=promise,
        log_every=max(1, total // 40),
    )  # fmt: skip


def held_part(encoded: Encoded, share: float, seed: int) -> NDArray[np.bool_]:
    """Return which examples are held out: by a hash of each one alone.

    So one example more moves no other, and equal examples go the same way.
    """
    limit = int(share * 2**64)
    key = seed.to_bytes(16, "little", signed=True)
    return np.array(
        [
            int.from_bytes(hashlib.blake2b(_bytes(encoded, i), digest_size=8, key=key).digest())
            < limit
            for i in range(len(encoded.ids))
        ],
        dtype=bool,
    )


def _bytes(encoded: Encoded, index: int) -> bytes:
    ids, targets = encoded.ids[index], encoded.targets[index]
    return np.asarray(ids).tobytes() + b"|" + np.asarray(targets).tobytes()
