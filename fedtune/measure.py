"""Loss and metrics of a model on encoded examples, as sums that add up over clients."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedtune.adapters import Task
from fedtune.data import Encoded, batches

__all__ = ["Counts", "add", "forward_loss", "measure", "scores"]


@dataclass(frozen=True)
class Counts:
    """What one evaluation saw. Counts of two clients add up to those of both.

    Attributes
    ----------
    loss : float
        Sum of losses in nats, over ``units``.
    units : int
        Predicted tokens (causal LM) or examples (classification).
    correct : int
        Units predicted right.
    examples : int
    confusion : ndarray of int64, shape (labels, labels)
        Row is the true class, column the predicted; shape (0, 0) for causal LM.
    """

    loss: float
    units: int
    correct: int
    examples: int
    confusion: NDArray[np.int64]


def forward_loss(
    model: nn.Module, batch: dict[str, torch.Tensor], task: Task
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run one batch forward.

    Returns
    -------
    losses : Tensor, shape (N,)
        Cross-entropy in nats of each predicted unit: tokens with a target, or examples.
    predicted, target : Tensor, shape (N,), int64
        Arg-max and truth of the same units.
    """
    given: dict[str, torch.Tensor | bool] = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
    }
    if task == "causal-lm":
        # Nothing is generated: a cache of keys and values would only cost time.
        given["use_cache"] = False
    logits = model(**given).logits
    target = batch["labels"]
    if task == "causal-lm":
        # Prompt methods put virtual tokens in front; the text is at the end.
        length = target.shape[1]
        logits, target = logits[:, -length:-1], target[:, 1:]
        keep = target != -100
        logits, target = logits[keep], target[keep]
    losses = nn.functional.cross_entropy(logits.float(), target, reduction="none")
    return losses, logits.argmax(-1), target


def measure(
    model: nn.Module, encoded: Encoded, task: Task, *, batch_size: int, pad_id: int, labels: int = 0
) -> Counts:
    """Evaluate on all examples, longest first so that batches need little padding."""
    device = next(model.parameters()).device
    order = sorted(range(len(encoded.ids)), key=lambda i: (-len(encoded.ids[i]), i))
    loss, units, correct = 0.0, 0, 0
    confusion = np.zeros((labels, labels), dtype=np.int64)
    model.eval()
    with torch.inference_mode():
        for batch in batches(encoded, order, batch_size, pad_id, task):
            moved = {name: value.to(device) for name, value in batch.items()}
            losses, predicted, target = forward_loss(model, moved, task)
            loss += float(losses.double().sum())
            units += int(losses.numel())
            correct += int((predicted == target).sum())
            if labels:
                np.add.at(confusion, (target.cpu().numpy(), predicted.cpu().numpy()), 1)
    return Counts(loss, units, correct, len(order), confusion)


def add(parts: Iterable[Counts]) -> Counts:
    """Add counts; the order of ``parts`` is the order of the sum."""
    loss, units, correct, examples = 0.0, 0, 0, 0
    confusion = np.zeros((0, 0), dtype=np.int64)
    for part in parts:
        loss += part.loss
        units += part.units
        correct += part.correct
        examples += part.examples
        confusion = part.confusion + confusion if confusion.size else part.confusion
    return Counts(loss, units, correct, examples, confusion)


def scores(counts: Counts) -> dict[str, float]:
    """Turn counts into loss, perplexity, accuracy and (classification) macro-F1.

    Examples
    --------
    >>> seen = Counts(2.0, 4, 3, 4, confusion=np.array([[2, 0], [1, 1]]))
    >>> {name: round(value, 3) for name, value in scores(seen).items()}
    {'loss': 0.5, 'accuracy': 0.75, 'macro_f1': 0.733}
    """
    if counts.units == 0:
        return {}
    loss = counts.loss / counts.units
    found = {"loss": loss, "accuracy": counts.correct / counts.units}
    if not counts.confusion.size:
        return found | {"perplexity": math.exp(min(loss, 700.0))}
    from sklearn.metrics import f1_score

    truth, guess = np.nonzero(counts.confusion)
    weight = counts.confusion[truth, guess]
    f1 = f1_score(truth, guess, sample_weight=weight, average="macro", zero_division=0.0)
    return found | {"macro_f1": float(f1)}
