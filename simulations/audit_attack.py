"""The attacks of an audit on what arrived: texts from hidden states, labels from gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedtune.client.remote import connect, keep_ends
from fedtune.measure import forward_loss
from fedtune.models import share
from fedtune.privacy.inversion import (
    invert_by_gradient,
    invert_causal,
    invert_lookup,
    refine,
    scales,
)
from fedtune.privacy.inversion_labels import labels_by_direction, labels_by_tail, matched
from fedtune.privacy.inversion_linear import fit_forward, fit_inverse, likeliest, nearest
from fedtune.privacy.inversion_words import Share
from fedtune.privacy.inversion_words import share as share_of
from fedtune.simulations.audit_scene import Caught, Scene, moved
from fedtune.simulations.audit_view import PublicHead, Wire
from fedtune.split.rows import Rows

__all__ = ["STRONG", "labels_of", "texts"]

_ALL = 4096
"""Vocabularies up to this size are tried whole; of larger ones the likeliest so many."""
_SHORT = 512
_NEAR = 16
STRONG = "search"
_GUESSED = "search with language model"


def texts(
    scene: Scene, head: PublicHead, caught: Caught, deviation: float
) -> dict[str, torch.Tensor]:
    """Return the tokens that each attack finds, (B, T)."""
    seen, mask = caught.seen, scene.batch["attention_mask"].bool()
    batch, length = mask.shape
    made_up = _made_up(scene, head, length)
    made = head.states(made_up)
    causal, clipped = head.causal(), deviation > 0
    front = _front(head, caught) if causal and head.front else None
    scale = _first_scale(seen, mask, made, front, deviation) if clipped else torch.ones(batch)
    inverse = fit_inverse(made, head.table[made_up], deviation=deviation)
    guess = inverse(seen, scale)
    ranked = likeliest(
        fit_forward(made, head.table[made_up]), head.table, seen, scale,
        deviation=deviation, count=_SHORT,
    )  # fmt: skip
    found = {"nearest": ranked[..., 0]}
    if clipped and not causal:
        scale = scales(seen, head.states(found["nearest"] * mask), mask)
    embedded = invert_by_gradient(lambda x: head.states_of(x, mask), guess, seen, mask, scale)
    found["gradient"] = nearest(embedded, head.table)[..., 0]
    if not scene.cut.head:
        found[STRONG] = invert_lookup(head.states, seen, mask, head.vocabulary, scale)
        return found
    if not causal:
        found[STRONG] = refine(
            head.states, found["nearest"], seen, mask, ranked[..., 1:_NEAR], scale,
            deviation=deviation, sweeps=1 if clipped else 3,
        )  # fmt: skip
        return found
    short = None if head.vocabulary <= _ALL else ranked
    given: dict[str, Any] = {"candidates": short, "clipped": clipped, "front": front}
    found[STRONG] = invert_causal(head.after, seen, mask, head.vocabulary, **given)
    if clipped and scene.config.model.task == "causal-lm":
        found[_GUESSED] = invert_causal(
            head.after, seen, mask, head.vocabulary, deviation=deviation, prior=head.expect, **given
        )
    return found


def _made_up(scene: Scene, head: PublicHead, length: int) -> torch.Tensor:
    """Return rows of random tokens, begun as the tokenizer begins every text."""
    source = torch.Generator().manual_seed(scene.seed % 2**31)
    count = max(64, 8 * max(1024, head.table.shape[1]) // length)
    tokens = torch.randint(head.vocabulary, (count, length), generator=source)
    if scene.start is not None:
        tokens[:, 0] = scene.start
    return tokens


def _front(head: PublicHead, caught: Caught) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the places before the text as they came, and as they must be."""
    with torch.no_grad():
        known = head.states_of(head.table[:1][None], whole=True)[0, : head.front]
    return caught.front, known


def _first_scale(
    seen: torch.Tensor, mask: torch.Tensor, made: torch.Tensor,
    front: tuple[torch.Tensor, torch.Tensor] | None, deviation: float,
) -> torch.Tensor:  # fmt: skip
    """Estimate by how much each row was clipped: from known places, else from its size."""
    if front is not None:
        every = torch.ones(front[0].shape[:2], dtype=torch.bool)
        return scales(front[0], front[1].expand_as(front[0]), every)
    count = mask.sum(1) * seen.shape[2]
    size = (seen * mask[..., None]).square().sum((1, 2)) / count - deviation**2
    return (size.clamp(min=0) / made.square().mean()).sqrt().clamp(1e-3, 1.0)


def labels_of(scene: Scene, caught: Caught) -> dict[str, Share]:
    """Return what the returned gradients say about the labels, by attack."""
    truth = scene.batch["labels"].numpy()
    back = caught.wire.back[0]
    clusters = labels_by_direction(back, len(scene.labels), scene.seed % 2**31)
    found = {"by direction": matched(clusters, truth)}
    for name, model in (("tail known", scene.current), ("tail not told", scene.public)):
        if name == "tail known" or moved(scene):
            found[name] = labels_by_tail(back, _through_tail(scene, model, caught)) == truth
    return {
        name: share_of(right.astype(int).tolist(), [1] * len(right))
        for name, right in found.items()
    }


def _through_tail(scene: Scene, model: nn.Module, caught: Caught) -> torch.Tensor:
    """Return the gradients at the body's output for each class, (K, B, T, d), by the server."""
    own = share(model)
    keep_ends(own, scene.cut)
    made = []
    for label in range(len(scene.labels)):
        wire = Wire(_Given(caught.wire.given[0]))
        connect(own, wire)
        # The server has no tokens; what its head makes of others is thrown away.
        batch = scene.batch
        asked = batch | {
            "input_ids": torch.zeros_like(batch["input_ids"]),
            "labels": torch.full_like(batch["labels"], label),
        }
        forward_loss(own, asked, scene.config.model.task)[0].mean().backward()  # type: ignore[no-untyped-call]
        made.append(wire.back[0])
    return torch.stack(made)


@dataclass(frozen=True)
class _Given:
    """A body whose output is known already."""

    out: torch.Tensor

    def forward(
        self, hidden: torch.Tensor, rows: Rows, deep: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.out

    def gradients(
        self, hidden: torch.Tensor, rows: Rows, deep: torch.Tensor | None, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return torch.zeros_like(hidden), None if deep is None else torch.zeros_like(deep)
