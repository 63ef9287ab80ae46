"""The inversion audit: attack the user's own experiment as the server of the body could.

The client's path is the real one: a model without its body sends hidden states and
gradients through a link, and the attacks get what arrived there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from fedtune.client.remote import connect
from fedtune.config import Config
from fedtune.errors import ExitCode, FedtuneError
from fedtune.measure import measure, scores
from fedtune.privacy.cut_noise import record_epsilon
from fedtune.privacy.inversion_words import Finding, Level, Share
from fedtune.privacy.inversion_words import share as share_of
from fedtune.simulations.audit_attack import STRONG, labels_of, texts
from fedtune.simulations.audit_scene import (
    Caught,
    Say,
    Scene,
    disturb,
    median_norm,
    moved,
    observe,
    open_scene,
)
from fedtune.simulations.audit_view import PublicHead, Wire

__all__ = ["LEVELS", "audit"]

LEVELS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.38)
"""Noise multipliers of the table; 1.38 is epsilon 6.8 for one release at delta 1e-5."""


def audit(
    config: Config, *, rows: int = 16, length: int = 0, noise: Sequence[float] = LEVELS,
    steps: int = 100, head: int | None = None, tail: int | None = None, clip: float = 0.0,
    held: int = 256, delta: float = 1e-5, say: Say = lambda _text: None,
) -> Finding:  # fmt: skip
    """Attack rows of an experiment, without noise and with it, and measure the model as well.

    Parameters
    ----------
    config : Config
        Any experiment; where it does not cut its model, ``head`` and ``tail`` say where.
    rows : int
        Rows attacked, drawn from all clients.
    length : int
        Tokens of each that are attacked at most (language models); 0: all.
    noise : sequence of float
        Noise multipliers z; 0 is always among them.
    steps : int
        The model is tuned for so many steps first, on other rows: quality is measured on
        it, and the server knows what it hands out.
    head, tail : int or None
        Blocks of the client, instead of the experiment's.
    clip : float
        Largest L2 norm of an example's record where there is noise; 0: the experiment's if
        it has noise, otherwise the median of the attacked rows.
    held : int
        Held-out examples for the quality, at most.
    delta : float
    say : callable
        Told what is going on.

    Returns
    -------
    Finding

    Raises
    ------
    FedtuneError
        Nothing to attack, a negative multiplier, or a model that cannot be cut.
    """
    levels = sorted({0.0, *noise})
    if levels[0] < 0 or not all(map(math.isfinite, levels)) or rows < 1 or length < 0:
        raise FedtuneError(
            f"noise={list(noise)}, rows={rows}, length={length}",
            hint="use multipliers of 0 or more, and at least one row",
            code=ExitCode.USAGE,
        )
    scene = open_scene(config, rows, length, steps, head, tail, held, say)
    plain = observe(scene)
    record = median_norm(plain.wire.sent[0], plain.wire.rows[0])
    back = median_norm(plain.wire.back[0], plain.wire.rows[0]) if plain.wire.back else 0.0
    split = config.tuning.split
    fixed = clip or (split.clip if split.noise else 0.0)
    clips = (fixed or record, fixed or back)
    made = tuple(_level(scene, plain, z, clips, delta, say) for z in levels)
    truth = scene.batch["labels"].numpy() if scene.labels else None
    kept = [int(t) for row in scene.rows.ids for t in row if int(t) not in scene.special]
    chance = Counter(kept).most_common(1)[0][1] / len(kept)
    guess: Mapping[str, float] = {}
    if truth is not None:
        answers = Counter(int(one[0]) for one in scene.held.targets)
        guess = {"accuracy": max(answers.values()) / sum(answers.values())}
    return Finding(
        name=config.name, base=config.model.base, adapter=config.tuning.adapter,
        head=scene.cut.head, tail=scene.cut.tail, blocks=scene.cut.count,
        rows=len(scene.rows.ids), tokens=len(kept), clip=clips[0], clip_gradient=clips[1],
        delta=delta, chance=chance,
        chance_label=None if truth is None else float(np.bincount(truth).max() / len(truth)),
        best_guess=guess, levels=made, notes=_notes(scene, plain, clips, bool(fixed), steps),
    )  # fmt: skip


def _level(
    scene: Scene, plain: Caught, z: float, clips: tuple[float, float], delta: float, say: Say
) -> Level:  # fmt: skip
    """Attack and measure at one strength of noise."""
    say(f"attacking with noise z = {z:g} ..." if z else "attacking without noise ...")
    caught = observe(scene, z, clips) if z else plain
    deviation = z * clips[0]
    found = texts(scene, PublicHead(scene.current, scene.cut), caught, deviation)
    if not z and moved(scene):
        name = "search, not told what was tuned"
        blind = texts(scene, PublicHead(scene.public, scene.cut), caught, 0.0)
        found[name] = blind[STRONG]
    shares = {name: _score(scene, tokens) for name, tokens in found.items()}
    strongest = max(shares, key=lambda name: shares[name][0].rate)
    return Level(
        z=z,
        epsilon_record=record_epsilon(z, delta) if z else None,
        tokens={name: one for name, (one, _) in shares.items()},
        rows=shares[strongest][1],
        labels=labels_of(scene, caught) if scene.labels and caught.wire.back else {},
        quality=_quality(scene, z, clips),
    )


def _score(scene: Scene, found: torch.Tensor) -> tuple[Share, Share]:
    """Count tokens and whole rows; special tokens are known beforehand and do not count."""
    right, of = [], []
    for truth, tokens in zip(scene.rows.ids, found.numpy(), strict=True):
        counted = np.array([int(one) not in scene.special for one in truth])
        right.append(int((truth == tokens[: len(truth)])[counted].sum()))
        of.append(int(counted.sum()))
    whole = [int(r == n) for r, n in zip(right, of, strict=True)]
    return share_of(right, of), share_of(whole, [1] * len(whole))


def _quality(scene: Scene, z: float, clips: tuple[float, float]) -> dict[str, float]:
    """Return loss and accuracy on held-out rows, through the cut and its noise."""
    noise = disturb(scene, z, clips[0], "quality")
    connect(scene.client, Wire(scene.body, noise, keep=False))
    counts = measure(
        scene.client, scene.held, scene.config.model.task,
        batch_size=scene.config.evaluation.batch_size, pad_id=scene.base.pad_id,
        labels=len(scene.labels),
    )  # fmt: skip
    return scores(counts)


def _notes(
    scene: Scene, plain: Caught, clips: tuple[float, float], fixed: bool, steps: int
) -> tuple[str, ...]:
    found = [
        f"attacked rows were not among those of the {steps} tuning steps; z counts in units of "
        f"the clip norm, {clips[0]:.3g} for hidden states"
        + (f" and {clips[1]:.3g} for gradients" if plain.wire.back else "")
        + ("" if fixed else " (medians of these rows: not private, for this audit alone)"),
        "epsilon is of one record taken alone, which no run sends: it says how much noise that "
        "is, and promises nothing",
        "what an attack here fails to recover is not safe: there may be better ones",
    ]
    if not plain.wire.back:
        found.append("nothing before the body is tuned: no gradient is returned")
    return tuple(found)
