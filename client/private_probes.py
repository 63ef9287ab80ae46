"""Example-level privacy of coefficients: slopes or projections, clipped for each example.

Directions are public, and what depends on an example is one vector of n numbers: its
slope along each direction. That vector is clipped and summed, the sum gets the noise of
the promise, and the walk along the directions is post-processing (DP-AggZO, USENIX
Security 2025; DPZero, arXiv 2310.09639, is n = 1). Every random number here is drawn from
the source of the promise; nothing here knows the key of the pool. In DPZero's code the
noise comes from a generator that was just seeded with the public seed of the direction,
and so can be taken away.

Every example is scored alone. Two losses differ by little, and their rounding is divided
by eps: in a batch, one row more moved the other rows' slopes by 3e-5 of their size
(stories260K, eps 1e-3), which no margin covers. Alone, the sensitivity is exactly the clip
norm.

Steps are plain. A deviation or a curvature of the examples' losses would be a release of
its own, and that of the noisy slopes is mostly that of the noise: it says what is known
before, so that a smaller or larger ``tuning.lr`` does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedtune.client.projection import Projects, projecting
from fedtune.config import Config
from fedtune.data import Encoded, batches
from fedtune.errors import ExitCode, FedtuneError
from fedtune.pool.layout import Layout
from fedtune.privacy.clipping import Quantile
from fedtune.privacy.events import Unit
from fedtune.privacy.noise import NoiseSource
from fedtune.privacy.plan import BITS, Promise

__all__ = [
    "SLOPES",
    "Projector",
    "ScoreExamples",
    "Walks",
    "tune_by_probes_privately",
    "tune_projected_privately",
]

SLOPES = "slopes"
"""Name of the vector in a release."""

Batch = Mapping[str, torch.Tensor]
ScoreExamples = Callable[[Batch], torch.Tensor]
"""Takes a batch of B examples and returns what is made small for each of them, (B,), at the
weights as they are now; an example's own, whoever else is in the batch. Without dropout."""

Vectors = NDArray[np.float64]


class Walks(Protocol):
    """What is needed of a ``Walker``."""

    def move(self, k: int, alpha: float) -> None:
        """Add ``alpha z_k`` to the weights, at the next ``settle``."""

    def settle(self) -> None:
        """Bring the weights to where all moves so far lead."""


@dataclass(frozen=True)
class Projector:
    """The gradient of one loss along every direction of a pool, by one backward pass.

    A tensor's gradient is projected and dropped as soon as it is there: the whole gradient
    never exists.

    Attributes
    ----------
    pool : Projects
    layout : Layout
        Of the tuned weights.
    parameters : mapping of name to Parameter
        The tuned parameters of the model, at least those of ``layout``.

    Raises
    ------
    FedtuneError
        A parameter is not there, has another shape, or does not train.

    Examples
    --------
    >>> from fedtune.pool.hadamard import HadamardPool
    >>> layer = nn.Linear(3, 1)
    >>> named = dict(layer.named_parameters())
    >>> pool = HadamardPool(key=7, size=3)
    >>> projector = Projector(pool, Layout.of(named.items()), named)
    >>> found = projector(lambda: layer(torch.ones(3)).sum())
    >>> bool(np.allclose(found, pool.project(torch.ones(4))))
    True
    """

    pool: Projects
    layout: Layout
    parameters: Mapping[str, nn.Parameter]

    def __post_init__(self) -> None:
        for span in self.layout.spans:
            found = self.parameters.get(span.name)
            if found is None or tuple(found.shape) != span.shape or not found.requires_grad:
                raise FedtuneError(
                    f"parameter '{span.name}' of the layout is "
                    f"{'missing' if found is None else f'{tuple(found.shape)}, or frozen'}",
                    hint="make the layout from the trainable parameters of this model",
                    code=ExitCode.MODEL,
                )

    def __call__(self, loss: Callable[[], torch.Tensor]) -> Vectors:
        """Return <z_k, gradient of the loss> for every k, shape (K,); NaN if not finite."""
        device = self.parameters[self.layout.spans[0].name].device
        into = torch.zeros(self.pool.size, device=device)
        with (
            projecting(self.pool, self.layout, self.parameters, into) as broken,
            torch.enable_grad(),
        ):
            loss().backward()  # type: ignore[no-untyped-call]
        found = into.double().cpu().numpy()
        return np.full_like(found, np.nan) if broken else found


def tune_by_probes_privately(
    walker: Walks,
    score_examples: ScoreExamples,
    encoded: Encoded,
    config: Config,
    promise: Promise,
    source: NoiseSource,
    directions: Sequence[Sequence[int]],
    *,
    lr: float,
    clip_norm: float,
    pad_id: int,
    device: torch.device | str = "cpu",
) -> float:
    """Run one round by forward passes alone, in place.

    Always ``promise.releases`` steps, whatever the number of examples, and the same moves
    of the weights in each, whatever is in them: a step for which nobody is drawn walks
    along its directions too, and releases noise.

    Parameters
    ----------
    walker : Walks
        A ``Walker`` over the tuned weights. They are settled at the end, also after an error.
    score_examples : callable
        Is asked for one example at a time, without gradients. A model is in ``eval()``.
    encoded : Encoded
        May be empty.
    promise : Promise
        Of ``[privacy.example]``, clipping ``flat`` or ``quantile``. The clip norm is for
        slopes / n: for directions of +-1, about |gradient| / sqrt(n).
    source : NoiseSource
        Draws the coins and the noise.
    directions : sequence of sequences of int
        For each step the numbers of its n directions. Public, and not chosen by looking at
        examples or at slopes without noise.
    lr : float
        A step moves direction k by ``-lr`` times the noisy mean of slope_k / n.
    clip_norm : float
        Of the first step.
    pad_id : int
    device : torch.device or str
        Where batches go.

    Returns
    -------
    float
        Clip norm for the next step; another one with the quantile rule only.

    Raises
    ------
    FedtuneError
        Before anything is drawn: settings that do not fit, or not one set of directions
        for each release.
    """
    settings = config.tuning.probe
    _require_promise(config, promise, directions)
    if settings.step != "plain":
        raise _refused(
            f"tuning.probe.step='{settings.step}' under [privacy.example]",
            "use 'plain': the losses of examples have no budget of their own",
        )
    if settings.objective == "f1":
        raise _refused(
            "tuning.probe.objective='f1' under [privacy.example]",
            "use 'loss', 'accuracy' or 'exact-match': one example has no F1",
        )
    offsets = (settings.eps, -settings.eps) if settings.sides == "two" else (settings.eps, 0.0)

    def vectors(alone: Sequence[Batch], chosen: Sequence[int]) -> Vectors:
        return _slopes(walker, lambda: _scores(score_examples, alone), chosen, offsets)

    return _tune(
        walker, vectors, encoded, config, promise, source, directions,
        lr=lr, clip_norm=clip_norm, pad_id=pad_id, device=device,
    )  # fmt: skip


def tune_projected_privately(
    walker: Walks,
    projector: Projector,
    score_examples: ScoreExamples,
    encoded: Encoded,
    config: Config,
    promise: Promise,
    source: NoiseSource,
    directions: Sequence[Sequence[int]],
    *,
    lr: float,
    clip_norm: float,
    pad_id: int,
    device: torch.device | str = "cpu",
) -> float:
    """Run one round by projected backpropagation, in place: the same release, by other means.

    An example's vector is its gradient along each direction, exactly: one backward pass
    for each example, whatever the number of directions. Neither gradients of weights nor
    their norms are kept. The step is plain SGD along the directions.

    Parameters
    ----------
    projector : Projector
        Of the weights that ``walker`` moves.
    walker, score_examples, encoded, config, promise, source, directions, lr, clip_norm, pad_id
        As in `tune_by_probes_privately`.
    device : torch.device or str

    Returns
    -------
    float
        Clip norm for the next step.

    Raises
    ------
    FedtuneError
        As `tune_by_probes_privately`; and with an optimiser that has a state, an objective
        without a gradient, or a direction that the pool lacks.
    """
    tuning, size = config.tuning, projector.pool.size
    _require_promise(config, promise, directions)
    if tuning.probe.objective != "loss":
        raise _refused(
            f"tuning.probe.objective='{tuning.probe.objective}' with engine='projected'",
            "use engine='probes': only the loss has a gradient",
        )
    if tuning.optimizer != "sgd":
        raise _refused(
            f"tuning.optimizer='{tuning.optimizer}' with projected examples under privacy",
            "use 'sgd': the step is plain",
        )
    if odd := sorted({k for chosen in directions for k in chosen if not 0 <= k < size}):
        raise _refused(f"direction {odd[0]} of {size}", "count from 0")

    def vectors(alone: Sequence[Batch], chosen: Sequence[int]) -> Vectors:
        walker.settle()
        found = np.empty((len(alone), len(chosen)))
        for row, batch in zip(found, alone, strict=True):
            row[:] = projector(partial(_loss, score_examples, batch))[list(chosen)]
        return found

    return _tune(
        walker, vectors, encoded, config, promise, source, directions,
        lr=lr, clip_norm=clip_norm, pad_id=pad_id, device=device,
    )  # fmt: skip


def _tune(
    walker: Walks,
    vectors: Callable[[Sequence[Batch], Sequence[int]], Vectors],
    encoded: Encoded,
    config: Config,
    promise: Promise,
    source: NoiseSource,
    directions: Sequence[Sequence[int]],
    *,
    lr: float,
    clip_norm: float,
    pad_id: int,
    device: torch.device | str,
) -> float:
    """Draw, look, release, walk; as often as the promise says."""
    try:
        for chosen in directions:
            drawn = promise.mechanism.draw(len(encoded.ids), source).tolist()
            alone = [
                {name: value.to(device) for name, value in batch.items()}
                for batch in batches(encoded, drawn, 1, pad_id, config.model.task)
            ]
            seen = vectors(alone, chosen) / len(chosen)
            noisy, clip_norm = _release(seen, promise, source, clip_norm)
            for k, slope in zip(chosen, noisy.tolist(), strict=True):
                walker.move(k, -lr * slope)
    finally:
        walker.settle()
    return clip_norm


def _slopes(
    walker: Walks,
    scores: Callable[[], NDArray[np.float64]],
    chosen: Sequence[int],
    offsets: tuple[float, float],
) -> Vectors:
    """Return the slope of every example along every direction, shape (B, n).

    The last move back waits, to be one pass with what comes next.
    """
    first, second = offsets
    clean = None
    if second == 0.0:
        walker.settle()
        clean = scores()
    columns = []
    for k in chosen:
        at = 0.0
        seen = []
        try:
            for offset in (first,) if clean is not None else offsets:
                walker.move(k, offset - at)
                at = offset
                walker.settle()
                seen.append(scores())
        finally:
            walker.move(k, -at)
        other = seen[1] if clean is None else clean
        # What is not finite becomes a contribution of zero, silently: a warning would tell.
        with np.errstate(all="ignore"):
            columns.append((seen[0] - other) / (first - second))
    return np.stack(columns, axis=1)


def _scores(score_examples: ScoreExamples, alone: Sequence[Batch]) -> NDArray[np.float64]:
    with torch.no_grad():
        return np.array([float(_one(score_examples(batch))) for batch in alone], np.float64)


def _loss(score_examples: ScoreExamples, batch: Batch) -> torch.Tensor:
    return _one(score_examples(batch))


def _one(score: torch.Tensor) -> torch.Tensor:
    if score.numel() != 1:
        raise FedtuneError(
            f"scores of shape {tuple(score.shape)} for one example",
            hint="return one number for each example of the batch",
            code=ExitCode.INTERNAL,
        )
    return score.reshape(())


def _release(
    seen: Vectors, promise: Promise, source: NoiseSource, clip_norm: float
) -> tuple[NDArray[np.float32], float]:
    """Return the noisy mean of the clipped vectors, shape (n,), and the next clip norm.

    Sums are of whole numbers: exact, in any order, and moved by one example by at most the
    clip norm. A vector with a number that is not finite adds zero.
    """
    mechanism, blocks = promise.mechanism, promise.blocks((SLOPES,), clip_norm)
    total, bits = np.zeros(seen.shape[1], np.int64), 0.0
    for vector in seen:
        total += mechanism.clip_update({SLOPES: vector}, blocks[:1])[SLOPES]
        with np.errstate(all="ignore"):
            bits += 0.5 if float(np.sqrt(vector @ vector)) <= clip_norm else -0.5
    given: dict[str, NDArray[np.int64] | NDArray[np.float64]] = {SLOPES: total}
    if len(blocks) > 1:
        given[BITS] = np.array([bits])
    noisy = mechanism.release(given, blocks, source)
    if BITS in noisy:
        settings, expected = promise.settings, mechanism.denominator
        rule = Quantile(settings.quantile, settings.quantile_lr)
        clip_norm = rule.updated(clip_norm, float(noisy[BITS][0]) * expected, expected)
    return noisy[SLOPES], clip_norm


def _require_promise(config: Config, promise: Promise, directions: Sequence[Sequence[int]]) -> None:
    tuning, clip = config.tuning, promise.settings.clip
    if promise.unit is not Unit.EXAMPLE:
        raise _refused(f"a promise about each {promise.unit.value}", "use [privacy.example]")
    if clip not in ("flat", "quantile"):
        raise _refused(
            f"privacy.example.clip='{clip}' with tuning.method='{tuning.method}'",
            "use 'flat' or 'quantile': coefficients are one vector",
        )
    if tuning.weight_decay or tuning.momentum:
        raise _refused(
            f"tuning.weight_decay={tuning.weight_decay:g}, tuning.momentum={tuning.momentum:g} "
            f"with tuning.method='{tuning.method}' under [privacy.example]",
            "set both to 0: the step is plain",
        )
    if promise.mechanism.law == "laplace" and any(len(chosen) != 1 for chosen in directions):
        raise _refused(
            f"privacy.example.noise='laplace' with {max(map(len, directions))} directions a step",
            "use tuning.probe.count=1: Laplace noise is for one number",
        )
    if len(directions) != promise.releases or not all(len(chosen) for chosen in directions):
        raise FedtuneError(
            f"{len(directions)} sets of directions for {promise.releases} releases",
            hint="one set for each release, with at least one direction",
            code=ExitCode.PRIVACY,
        )


def _refused(message: str, hint: str) -> FedtuneError:
    return FedtuneError(message, hint=hint, code=ExitCode.CONFIG)
