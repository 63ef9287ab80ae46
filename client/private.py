"""Example-level privacy at the client: DP-SGD, paid for before anything leaves.

The server need not be trusted with it: examples are drawn by the client's own
secret coins, gradients are clipped one by one, noise is added here, and the
client's own ledger admits the round before the first gradient is computed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedtune.adapters import trainable
from fedtune.config import Config
from fedtune.data import Encoded, batches
from fedtune.errors import ExitCode, FedtuneError
from fedtune.files import write_atomic
from fedtune.privacy.clipping import (
    Automatic,
    Clip,
    Flat,
    PerBlock,
    Quantile,
    adapter_blocks,
    clip_bits,
)
from fedtune.privacy.ledger import Account, Claim, Ledger, Reservation, open_ledger
from fedtune.privacy.noise import NoiseSource
from fedtune.privacy.per_example import PerExample, example_losses
from fedtune.privacy.plan import (
    BITS,
    Promise,
    client_promise,
    dataset_name,
    example_promise,
    ledger_place,
)
from fedtune.wire import BUDGET, Task

__all__ = [
    "Guard",
    "clip_after",
    "clip_before",
    "open_guard",
    "open_shared_guard",
    "require_job",
    "tune_privately",
]


@dataclass(frozen=True)
class Guard:
    """The owner's own ledger and caps; whatever the server asks, this decides."""

    promise: Promise
    ledger: Ledger
    dataset: str

    def account(self, client: str) -> Account:
        """Return the account of one client's examples, or of the client as a whole."""
        name = f"{self.dataset}/{client}"
        return self.ledger.account(name, self.promise.unit, self.promise.relation)

    def require_room(self, client: str, begun: int = 0) -> None:
        """Refuse a plan whose rounds after ``begun`` would pass the owner's cap.

        Raises
        ------
        FedtuneError
            ``ExitCode.BUDGET_EXHAUSTED``, with what is left.
        """
        charge, account = self.promise.charge, self.account(client)
        rounds = max(0, self.promise.rounds - begun)
        fit = self.ledger.would_fit(account, {charge.event: charge.count * rounds})
        if not fit.fits:
            raise FedtuneError(
                f"{BUDGET}: '{account.dataset}' allows epsilon {fit.cap:.4g}, "
                f"the plan of {rounds} rounds would bring it to {fit.epsilon:.4g}",
                hint="fewer rounds or more noise; or the owner decides: fedtune budget set",
                code=ExitCode.BUDGET_EXHAUSTED,
            )

    def reserve(self, client: str, task: Task, detail: Mapping[str, Any]) -> Reservation:
        """Charge one round before its first gradient; durable when it returns."""
        if not 1 <= task.round <= self.promise.rounds:
            raise FedtuneError(
                f"{BUDGET}: round {task.round} of a plan of {self.promise.rounds}",
                code=ExitCode.BUDGET_EXHAUSTED,
            )
        charge = self.promise.charge
        claim = Claim(
            job=task.job, round=task.round, attempt=task.attempt, event=charge.event,
            count=charge.count, purpose="train", detail=dict(detail),
            limit=self.promise.limit or _twice(self.promise),
        )  # fmt: skip
        try:
            return self.ledger.reserve(self.account(client), claim)
        except FedtuneError as error:
            if error.code != ExitCode.BUDGET_EXHAUSTED:
                raise
            raise FedtuneError(
                f"{BUDGET}: {error}", hint=error.hint, code=ExitCode.BUDGET_EXHAUSTED
            ) from error


def open_guard(config: Config) -> Guard | None:
    """Return what keeps ``[privacy.example]``, or None when nothing is promised there."""
    promise = example_promise(config)
    if promise is None:
        return None
    return Guard(promise, open_ledger(ledger_place(config)), dataset_name(config))


def open_shared_guard(config: Config) -> Guard | None:
    """Return what admits this client's share of the noise, where clients add it themselves."""
    promise, settings = client_promise(config), config.privacy.client
    if promise is None or settings is None or settings.noise_at != "clients":
        return None
    return Guard(promise, open_ledger(ledger_place(config)), dataset_name(config))


@lru_cache(maxsize=8)
def _twice(promise: Promise) -> tuple[float, float]:
    """Bound a run that sets itself none: the whole plan, and as much again for lost rounds."""
    return promise.spent(2 * promise.rounds).epsilon, promise.delta


def require_job(folder: Path, job: str) -> None:
    """Bind a client to the first job it hears of: another name would be another budget.

    Raises
    ------
    FedtuneError
        The server has changed the job's name.
    """
    file = folder / "job"
    if not file.exists():
        write_atomic(file, job.encode())
    elif (known := file.read_text(encoding="utf-8")) != job:
        raise FedtuneError(
            f"{BUDGET}: this client takes part in job '{known}', not in '{job}'",
            hint="a new run has a folder of its own",
            code=ExitCode.BUDGET_EXHAUSTED,
        )


def rule_of(promise: Promise, names: tuple[str, ...], clip_norm: float) -> Clip:
    """Return the clipping rule; its sensitivity is ``clip_norm`` whichever it is."""
    kind = promise.settings.clip
    if kind == "automatic":
        return Automatic(clip_norm)
    if kind == "per-adapter":
        blocks = adapter_blocks(names)
        return PerBlock(blocks, (clip_norm / len(blocks) ** 0.5,) * len(blocks))
    return Flat(clip_norm)


def tune_privately(
    model: nn.Module,
    engine: PerExample,
    encoded: Encoded,
    config: Config,
    promise: Promise,
    optim: torch.optim.Optimizer,
    source: NoiseSource,
    *,
    clip_norm: float,
    pad_id: int,
) -> float:
    """Run one round of DP-SGD or DP-AdamW in place (Abadi et al. 2016, algorithm 1).

    Always ``promise.releases`` steps, whatever the number of examples: a step for
    which nobody is drawn releases noise. Micro-batches change memory, not the result.

    Parameters
    ----------
    encoded : Encoded
        May be empty.
    source : NoiseSource
        Draws the coins and the noise.
    clip_norm : float
        Of the first step.

    Returns
    -------
    float
        Clip norm for the next step; another one with the quantile rule only.
    """
    parameters = trainable(model)
    device = next(iter(parameters.values())).device
    names, task = tuple(parameters), config.model.task
    # No dropout: its masks go by place in the batch, and would tie examples together.
    model.eval()
    for _ in range(promise.releases):
        rule = rule_of(promise, names, clip_norm)
        drawn = promise.mechanism.draw(len(encoded.ids), source).tolist()
        blocks = promise.blocks(names, clip_norm)
        sums = {name: np.zeros(tuple(p.shape)) for name, p in parameters.items()}
        bits = np.zeros(1)
        # By length, so that little is padding; a sum has no order.
        drawn = sorted(drawn, key=lambda i: len(encoded.ids[i]))
        for batch in batches(encoded, drawn, config.tuning.batch_size, pad_id, task):
            moved = {name: value.to(device) for name, value in batch.items()}
            part = engine.clipped_sum(lambda b: example_losses(model, b, task), moved, rule)
            for name, value in part.sums.items():
                sums[name] += value.cpu().numpy()
            if len(blocks) > 1:
                bits += clip_bits(part.norms, (clip_norm,)).numpy()
        given: dict[str, NDArray[Any]] = dict(sums)
        if len(blocks) > 1:
            given[BITS] = bits
        noisy = promise.mechanism.release(given, blocks, source)
        for name, parameter in parameters.items():
            parameter.grad = torch.from_numpy(noisy[name]).to(device)
        optim.step()
        clip_norm = _moved(promise, clip_norm, noisy)
    optim.zero_grad(set_to_none=True)
    return clip_norm


def _moved(promise: Promise, clip_norm: float, noisy: Mapping[str, NDArray[np.float32]]) -> float:
    if BITS not in noisy:
        return clip_norm
    settings, expected = promise.settings, promise.mechanism.denominator
    rule = Quantile(settings.quantile, settings.quantile_lr)
    return rule.updated(clip_norm, float(noisy[BITS][0]) * expected, expected)


def clip_before(folder: Path, number: int, default: float) -> float:
    """Return the clip norm that the newest round before ``number`` left."""
    known = {r: path for r, path in _clips(folder) if r < number}
    if not known:
        return default
    return float(json.loads(known[max(known)].read_text(encoding="utf-8"))["clip_norm"])


def clip_after(folder: Path, number: int, clip_norm: float, committed: int) -> None:
    """Save what round ``number`` left; older than the last durable round is not needed."""
    text = json.dumps({"clip_norm": clip_norm})
    write_atomic(folder / f"clip-{number:06d}.json", text.encode())
    durable = [path for r, path in _clips(folder) if r <= committed]
    for old in durable[:-1]:
        old.unlink(missing_ok=True)


def _clips(folder: Path) -> list[tuple[int, Path]]:
    found = ((re.fullmatch(r"clip-(\d+)\.json", p.name), p) for p in folder.glob("clip-*.json"))
    return sorted((int(match.group(1)), path) for match, path in found if match)
