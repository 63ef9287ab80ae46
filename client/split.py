"""Split tuning at the client: SFPrompt's three phases (Cao et al. 2024, section 3).

1. Local loss: head and tail are joined, the body is skipped, nothing travels.
2. Pruning: examples are scored by the same short path, and only some cross the cut.
3. Split training: backpropagation through the server's body on those.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedtune.adapters import Task
from fedtune.client.backprop import LocalRun, optimizer, tune
from fedtune.client.remote import remote_of
from fedtune.config import SplitConfig, TuningConfig
from fedtune.data import Encoded, batches
from fedtune.errors import ExitCode, FedtuneError
from fedtune.seeds import derive

__all__ = ["SplitRun", "bypassed", "el2n", "kept_of", "only", "tune_split"]


@dataclass(frozen=True)
class SplitRun:
    """What the three phases did.

    Attributes
    ----------
    run : LocalRun
        Phase 3, whose loss is that of the whole model.
    local : LocalRun or None
        Phase 1; its loss is that of the ends alone.
    kept : int
        Examples that crossed the cut.
    """

    run: LocalRun
    local: LocalRun | None
    kept: int


@contextlib.contextmanager
def bypassed(model: nn.Module) -> Iterator[None]:
    """Join head and tail directly: the body is skipped and nothing leaves."""
    remote = remote_of(model)
    if remote is None:
        raise FedtuneError("this model is whole: there is no body to skip", code=ExitCode.MODEL)
    remote.bypass = True
    try:
        yield
    finally:
        remote.bypass = False


def tune_split(
    model: nn.Module, encoded: Encoded, tuning: TuningConfig, task: Task,
    optim: torch.optim.Optimizer, *, lr: float, seed: int, pad_id: int,
) -> SplitRun:  # fmt: skip
    """Tune one client's prompts and tail in place, by the three phases.

    Parameters
    ----------
    model : nn.Module
        The client's part, connected to the body, with this round's parameters.
    optim : Optimizer
        Of phase 3, over ``trainable(model)``.
    lr : float
        Learning rate of this round.
    seed : int
        Orders the examples and decides random pruning.
    """
    split, local = tuning.split, None
    if split.local_epochs:
        short = tuning.model_copy(update={"epochs": split.local_epochs, "steps": 0})
        with bypassed(model):
            local = tune(
                model, encoded, short, task, optimizer(model, tuning, split.local_lr or lr),
                seed=derive(seed, "local"), pad_id=pad_id,
            )  # fmt: skip
    chosen = encoded
    if split.keep < 1 or split.threshold:
        chosen = only(encoded, kept_of(model, encoded, split, task, seed=seed, pad_id=pad_id))
    if not chosen.ids:
        return SplitRun(LocalRun(0, 0.0), local, 0)
    ran = tune(model, chosen, tuning, task, optim, seed=seed, pad_id=pad_id)
    return SplitRun(ran, local, len(chosen.ids))


def kept_of(
    model: nn.Module, encoded: Encoded, split: SplitConfig, task: Task, *, seed: int, pad_id: int
) -> NDArray[np.int64]:
    """Return which examples cross the cut, in their order.

    ``random`` keeps ``round(keep * n)`` of them, at least one. ``el2n`` keeps that share of
    every class, those of the highest score: of all together, half of a small client is
    often one class, and the model then says nothing else. With a threshold: whoever
    reaches it. A score that is not finite is never kept.
    """
    count = len(encoded.ids)
    wanted = max(1, round(split.keep * count))
    if split.prune == "random":
        rng = np.random.default_rng(derive(seed, "prune"))
        return np.sort(rng.choice(count, size=wanted, replace=False))
    with bypassed(model):
        scores = el2n(model, encoded, task, pad_id=pad_id)
    fine = np.isfinite(scores)
    if split.threshold:
        return np.flatnonzero(fine & (scores >= split.threshold))
    ranked = np.argsort(np.where(fine, -scores, np.inf), kind="stable")
    classes = np.array([row[0] for row in encoded.targets]) if task != "causal-lm" else None
    if classes is None:
        chosen = ranked[:wanted]
    else:
        of_class = [ranked[classes[ranked] == one] for one in np.unique(classes)]
        chosen = np.concatenate([one[: max(1, round(split.keep * len(one)))] for one in of_class])
    return np.sort(chosen[fine[chosen]])


def el2n(
    model: nn.Module, encoded: Encoded, task: Task, *, pad_id: int, batch_size: int = 32
) -> NDArray[np.float64]:
    """Return the EL2N score of each example, shape (n,): how wrong the model is about it.

    ``|softmax(z) - onehot(y)|`` (Paul et al. 2021, definition 2.4); of a text the mean
    over its predicted tokens. ``|p|^2 - 2 p_y + 1`` under the root needs one vector of
    the vocabulary per token and no matrix.
    """
    device = next(model.parameters()).device
    found = np.zeros(len(encoded.ids))
    order = sorted(range(len(encoded.ids)), key=lambda i: (-len(encoded.ids[i]), i))
    model.eval()
    at = 0
    with torch.inference_mode():
        for batch in batches(encoded, order, batch_size, pad_id, task):
            moved = {name: value.to(device) for name, value in batch.items()}
            scores = _scores(model, moved, task)
            for index, score in zip(order[at : at + len(scores)], scores.tolist(), strict=True):
                found[index] = score
            at += len(scores)
    return found


def _scores(model: nn.Module, batch: dict[str, torch.Tensor], task: Task) -> torch.Tensor:
    """Return EL2N of a batch, shape (B,)."""
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    logits, target = model(**given).logits, batch["labels"]
    if task != "causal-lm":
        return _distance(logits, target)
    length = target.shape[1]
    rows = []
    # One example at a time: a batch's probabilities are the largest tensor there is.
    for row, truth in zip(logits[:, -length:-1], target[:, 1:], strict=True):
        keep = truth != -100
        rows.append(_distance(row[keep], truth[keep]).mean() if keep.any() else row.new_zeros(()))
    return torch.stack(rows)


def _distance(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    chances = logits.float().softmax(-1)
    right = chances.gather(-1, target[..., None])[..., 0]
    return (chances.square().sum(-1) - 2 * right + 1).clamp(min=0).sqrt()


def only(encoded: Encoded, chosen: NDArray[np.int64]) -> Encoded:
    """Return some of the examples, in their order."""
    return replace(
        encoded,
        ids=tuple(encoded.ids[i] for i in chosen),
        targets=tuple(encoded.targets[i] for i in chosen),
    )
