"""The loss of each example of a batch, which nothing else in the batch can change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fedtune.adapters import Task
from fedtune.data.encode import IGNORED
from fedtune.models import settings_of

__all__ = ["Batch", "example_losses", "public_batch", "rows", "single"]

Batch = Mapping[str, torch.Tensor]


def example_losses(model: nn.Module, batch: Batch, task: Task) -> torch.Tensor:
    """Return the loss of each example, in nats.

    Causal LM: the mean over the example's own predicted tokens, so that its
    gradient does not depend on how long its neighbours are; 0 where it has none.
    Classification: its cross-entropy.

    Parameters
    ----------
    model : nn.Module
    batch : mapping
        As from ``fedtune.data.batches``: ``input_ids`` (B, T), ``attention_mask``
        (B, T), ``labels`` (B, T) with -100 where there is no loss, or (B,).
    task : {"causal-lm", "classification"}

    Returns
    -------
    Tensor, shape (B,), float32
    """
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    target = batch["labels"]
    if task == "classification":
        return F.cross_entropy(logits.float(), target, reduction="none")
    # Prompt methods put virtual tokens in front; the text is at the end.
    logits = logits[:, -target.shape[1] :]
    # The targets are moved and not the logits, which are large.
    target = F.pad(target[:, 1:], (0, 1), value=IGNORED)
    each = F.cross_entropy(
        logits.float().flatten(0, 1), target.flatten(), reduction="none", ignore_index=IGNORED
    )
    own = (target != IGNORED).sum(1).clamp(min=1)
    return each.view(target.shape).sum(1) / own


def rows(batch: Batch) -> int:
    """Return the number of examples, B: the first dimension of every tensor.

    Examples
    --------
    >>> rows({"input_ids": torch.zeros(0, 7), "labels": torch.zeros(0)})
    0
    """
    return len(next(iter(batch.values())))


def single(batch: Batch, index: int) -> dict[str, torch.Tensor]:
    """Return one example as a batch, without the padding that its neighbours brought.

    Examples
    --------
    >>> mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    >>> single({"attention_mask": mask, "input_ids": mask, "labels": mask[:, 0]}, 0)
    {'attention_mask': tensor([[1, 1]]), 'input_ids': tensor([[1, 1]]), 'labels': tensor([1])}
    """
    found = {name: value[index : index + 1] for name, value in batch.items()}
    mask = found.get("attention_mask")
    if mask is None or mask.dim() != 2 or not bool(mask.any()):
        return found
    length = int(mask[0].nonzero().max()) + 1
    return {
        name: value[:, :length] if value.shape == mask.shape else value
        for name, value in found.items()
    }


def public_batch(
    model: nn.Module, task: Task, lengths: Sequence[int] = (12, 7, 3), seed: int = 0
) -> dict[str, torch.Tensor]:
    """Return examples of random tokens, padded to the longest; they are nobody's data.

    Parameters
    ----------
    model : nn.Module
        Its settings say how many tokens and labels there are.
    task : {"causal-lm", "classification"}
    lengths : sequence of int
        Tokens of each example, at least 2.
    seed : int
    """
    settings: Any = settings_of(model)
    pad = getattr(settings, "pad_token_id", None) or 0
    words = getattr(settings, "vocab_size", 0) or _table(model).num_embeddings
    random = torch.Generator().manual_seed(seed)
    size = (len(lengths), max(lengths))
    ids = torch.randint(0, words - 1, size, generator=random)
    ids += (ids >= pad).long()  # never the padding token
    mask = (torch.arange(size[1]) < torch.tensor(lengths).unsqueeze(1)).long()
    ids = ids.masked_fill(mask == 0, pad)
    if task == "classification":
        labels = torch.randint(0, settings.num_labels, size[:1], generator=random)
    else:
        labels = ids.masked_fill(mask == 0, IGNORED)
        labels[0, : size[1] // 2] = IGNORED  # as after an instruction
    device = next(model.parameters()).device
    return {
        "input_ids": ids.to(device),
        "attention_mask": mask.to(device),
        "labels": labels.to(device),
    }


def _table(model: Any) -> nn.Embedding:
    found: nn.Embedding = model.get_input_embeddings()
    return found
