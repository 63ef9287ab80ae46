"""Two small private programs, right as they are, and bugs to plant in them.

``train`` is DP-SGD on a real model with the real per-example gradients, mechanism and
ledger; ``serve`` is one server that averages clients. Every bug replaces one piece.
"""

import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from fedtune.privacy.clipping import Clip, Flat, PerBlock
from fedtune.privacy.events import Event, Relation, Unit
from fedtune.privacy.ledger import Claim, open_ledger
from fedtune.privacy.mechanism import Mechanism
from fedtune.privacy.noise import InsecureSeededNoise, NoiseSource, SecureNoise
from fedtune.privacy.per_example import PerExample
from fedtune.privacy.replay import Stage
from fedtune.privacy.sampling import Everyone, Poisson, Sampler

FEATURES, STEPS, CLIP, BATCH, PEOPLE = 16, 10, 0.5, 12.0, 120
MICRO_BATCH = 40
Arrays = dict[str, NDArray[Any]]
Gradients = dict[str, torch.Tensor]
log = logging.getLogger("fedtune.tests.planted")


# ---------------------------------------------------------------- data: units with their own size


def people(seed: int, n: int = PEOPLE) -> list[NDArray[np.float32]]:
    """Return ``n`` vectors of features; the last number is the label."""
    rng = np.random.default_rng(seed)
    found = rng.normal(size=(n, FEATURES + 1)).astype(np.float32)
    found[:, -1] = found[:, 0] + found[:, 1] > 0
    return list(found)


def clients(seed: int, n: int = 8) -> list[tuple[NDArray[np.float32], int]]:
    """Return ``n`` updates, each with the number of examples behind it."""
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=40).astype(np.float32), int(rng.integers(5, 50))) for _ in range(n)]


# ---------------------------------------------------------------- DP-SGD


def _losses(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def _model(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 2))


def _batch(rows: Sequence[NDArray[np.float32]]) -> dict[str, torch.Tensor]:
    table = torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, FEATURES + 1)
    labels = table[:, -1].nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)
    return {"x": table[:, :-1], "y": labels.long()}


def clipped_one_by_one(engine: PerExample, model: nn.Module, rows: Any, rule: Clip) -> Arrays:
    """Clip each example's gradient and add: the right way."""
    return in_micro_batches(engine, model, rows, rule, MICRO_BATCH)


def in_fives(engine: PerExample, model: nn.Module, rows: Any, rule: Clip) -> Arrays:
    """Do the same, five at a time."""
    return in_micro_batches(engine, model, rows, rule, 5)


def in_micro_batches(
    engine: PerExample, model: nn.Module, rows: Any, rule: Clip, size: int
) -> Arrays:
    """Add clipped gradients, ``size`` examples at a time."""
    sums: Arrays = {name: np.zeros(tuple(p.shape)) for name, p in model.named_parameters()}
    for start in range(0, len(rows), size):
        part = engine.clipped_sum(
            lambda b: _losses(model, b), _batch(rows[start : start + size]), rule
        )
        for name, value in part.sums.items():
            sums[name] += value.numpy()
    return sums


def nothing(stage: Stage, model: nn.Module, rows: Any) -> None:
    """Let nothing out."""


@dataclass(frozen=True)
class Pieces:
    """What ``train`` is made of."""

    sampler: Sampler = field(default_factory=lambda: Poisson(BATCH / PEOPLE))
    source: Callable[[], NoiseSource] = SecureNoise  # one for each step
    draws: Callable[[], NoiseSource] = SecureNoise
    sums: Callable[[PerExample, nn.Module, Any, Clip], Arrays] = clipped_one_by_one
    rule: Callable[[Sequence[str]], Clip] = lambda names: Flat(CLIP)
    denominator: Callable[[int], float] = lambda drawn: BATCH
    clip: Callable[[Any], float] = lambda rows: CLIP
    before: Callable[[int], bool] = lambda drawn: True
    metric: Callable[[Stage, nn.Module, Any], None] = nothing
    books: Callable[[Path, int], Path] | None = None  # the file of the ledger in each part


def train(stage: Stage, rows: Sequence[NDArray[np.float32]], pieces: Pieces, seed: int) -> Any:
    """Run DP-SGD in two parts, as a run that is killed in between and resumed."""
    model = _model(seed)
    engine = PerExample(model)
    with tempfile.TemporaryDirectory() as folder:
        for part in range(2):
            if pieces.books is not None:
                stage.spent(_charged(pieces.books(Path(folder), part), part, pieces.sampler))
            for _ in range(STEPS // 2):
                _step(stage, model, engine, rows, pieces)
            if pieces.books is not None:
                stage.spent(_total(pieces.books(Path(folder), part)))
    stage.emit("update", model.state_dict())
    return "trained"


def _charged(path: Path, part: int, sampler: Sampler) -> int:
    """Charge a part's releases in the real ledger before the first of them."""
    ledger = open_ledger(path)
    account = ledger.account("rows", Unit.EXAMPLE, Relation.ADD_OR_REMOVE_ONE)
    ledger.release(ledger.reserve(account, Claim("job", part, 0, sampler.event(0.8), STEPS // 2)))
    return _total(path)


def _total(path: Path) -> int:
    ledger = open_ledger(path)
    account = ledger.account("rows", Unit.EXAMPLE, Relation.ADD_OR_REMOVE_ONE)
    return sum(ledger.groups(account).values())


def _step(
    stage: Stage,
    model: nn.Module,
    engine: PerExample,
    rows: Sequence[NDArray[np.float32]],
    pieces: Pieces,
) -> None:
    plain = Mechanism(
        Unit.EXAMPLE, Relation.ADD_OR_REMOVE_ONE, pieces.sampler, 0.8, BATCH, MICRO_BATCH
    )
    drawn = stage.watch(plain).draw(len(rows), pieces.draws())
    if not pieces.before(len(drawn)):
        return
    batch = [rows[i] for i in drawn]
    mechanism = stage.watch(replace(plain, denominator=pieces.denominator(len(drawn))))
    names = tuple(dict(model.named_parameters()))
    blocks = mechanism.blocks_flat(names, pieces.clip(batch))
    sums = pieces.sums(engine, model, batch, pieces.rule(names))
    noisy = mechanism.release(sums, blocks, pieces.source())
    pieces.metric(stage, model, batch)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter -= 0.1 * torch.from_numpy(noisy[name])


# ---------------------------------------------------------------- averaging clients


@dataclass(frozen=True)
class Server:
    """What ``serve`` is made of."""

    weight: Callable[[int], int] = lambda examples: 1
    tell: bool = False
    clip: Callable[[Mechanism, Arrays, Any], Arrays] = lambda mechanism, update, blocks: (
        mechanism.clip_update(update, blocks)
    )


def serve(stage: Stage, given: Sequence[tuple[NDArray[np.float32], int]], pieces: Server) -> Any:
    """Add clipped updates of everybody, release their noisy mean, three rounds."""
    mechanism = stage.watch(
        Mechanism(Unit.CLIENT, Relation.ADD_OR_REMOVE_ONE, Everyone(), 1.0, 8.0)
    )
    blocks = mechanism.blocks_flat(("w", "b"), 1.0)
    for _ in range(3):
        total: Arrays = {"w": np.zeros((6, 6), np.int64), "b": np.zeros(4, np.int64)}
        for i in mechanism.draw(len(given), SecureNoise()):
            update, examples = given[i]
            steps = pieces.clip(
                mechanism, {"w": update[:36].reshape(6, 6), "b": update[36:]}, blocks
            )
            for name, value in steps.items():
                total[name] += pieces.weight(examples) * value
        stage.emit("model", mechanism.release(total, blocks, SecureNoise()))
        if pieces.tell:
            stage.emit("num-examples", sum(examples for _, examples in given))


# ---------------------------------------------------------------- the pieces that are wrong


@dataclass(frozen=True)
class Scaled:
    """Noise of another size than was asked for."""

    factor: float
    name: str = "scaled"
    secure: bool = True

    def normal(self, n: int) -> NDArray[np.float64]:
        return SecureNoise().normal(n) * self.factor

    def uniform(self, n: int) -> NDArray[np.float64]:
        return SecureNoise().uniform(n)

    def integers(self, n: int, below: int) -> NDArray[np.int64]:
        return SecureNoise().integers(n, below)


@dataclass(frozen=True)
class Shuffled:
    """Batches of one size from a shuffled epoch, called Poisson."""

    rate: float

    def draw(self, n: int, source: NoiseSource) -> NDArray[np.int64]:
        order = np.argsort(source.uniform(n))
        return np.sort(order[: round(n * self.rate)]).astype(np.int64)

    def event(self, noise_multiplier: float) -> Event:
        return Poisson(self.rate).event(noise_multiplier)


@dataclass(frozen=True)
class Busier:
    """Coins that fall more often than is declared."""

    rate: float
    real: float

    def draw(self, n: int, source: NoiseSource) -> NDArray[np.int64]:
        return Poisson(self.real).draw(n, source)

    def event(self, noise_multiplier: float) -> Event:
        return Poisson(self.rate).event(noise_multiplier)


def clipped_mean(engine: PerExample, model: nn.Module, rows: Any, rule: Clip) -> Arrays:
    """Clip the mean gradient once, instead of each example's."""
    each = _gradients(engine, model, rows)
    mean = {name: value.nan_to_num(0, 0, 0).double().mean(0) for name, value in each.items()}
    norm = math.sqrt(sum(float(value.square().sum()) for value in mean.values()))
    factor = BATCH * min(1.0, CLIP / norm) if norm else 0.0
    return {name: (value * factor).numpy() for name, value in mean.items()}


def clipped_by_min(engine: PerExample, model: nn.Module, rows: Any, rule: Clip) -> Arrays:
    """Scale by Python's min(1, C / norm), which is 1 when the norm is NaN."""
    each = _gradients(engine, model, rows)
    sums: Arrays = {name: np.zeros(tuple(p.shape)) for name, p in model.named_parameters()}
    for i in range(len(rows)):
        one = {name: value[i].double().numpy() for name, value in each.items()}
        norm = math.sqrt(sum(float(np.square(value).sum()) for value in one.values()))
        factor = min(1.0, CLIP / norm if norm else 1.0)
        for name, value in one.items():
            sums[name] += value * factor
    return sums


def crash_on_nan(engine: PerExample, model: nn.Module, rows: Any, rule: Clip) -> Arrays:
    """Stop the run, and say why, when an example is not finite."""
    for row in rows:
        if not np.isfinite(row).all():
            raise ValueError(f"bad example {row[:3]}")
    return clipped_one_by_one(engine, model, rows, rule)


def _gradients(engine: PerExample, model: nn.Module, rows: Any) -> Gradients:
    if not rows:
        return {name: torch.zeros(1, *p.shape) for name, p in model.named_parameters()}
    return engine.gradients(lambda b: _losses(model, b), _batch(rows))


def _loss(stage: Stage, model: nn.Module, rows: Any) -> None:
    stage.emit("loss", float(_losses(model, _batch(rows)).mean()) if rows else 0.0)


def _logged(stage: Stage, model: nn.Module, rows: Any) -> None:
    log.debug("a step on %d examples", len(rows))


def _printed(stage: Stage, model: nn.Module, rows: Any) -> None:
    print(len(rows))


def _filed(stage: Stage, model: nn.Module, rows: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sizes.csv"
        path.write_text(f"{len(rows)}\n", encoding="utf-8")
        stage.emit("file", path)


def _largest(rows: Any) -> float:
    return CLIP * (1.0 + min(1.0, max((float(np.nan_to_num(r).max()) for r in rows), default=0.0)))


RIGHT = Pieces()
RIGHT_FIVES = replace(RIGHT, sums=in_fives)
RIGHT_BOOKS = replace(RIGHT, books=lambda folder, part: folder / "ledger.db")

# The twelve, and then others of their kinds: name -> (check that must catch it, pieces).
TRAIN: dict[str, tuple[str, Pieces]] = {
    "missing-noise": ("noise-size", replace(RIGHT, source=lambda: Scaled(0.0))),
    "noise-over-2": ("noise-size", replace(RIGHT, source=lambda: Scaled(0.5))),
    "clip-of-the-mean": ("sensitivity", replace(RIGHT, sums=clipped_mean)),
    "shuffling-for-poisson": ("sampler", replace(RIGHT, sampler=Shuffled(BATCH / PEOPLE))),
    "seed-reuse": ("noise-repeated", replace(RIGHT, source=lambda: InsecureSeededNoise(1))),
    "per-layer-clip-at-global-norm": (
        "sensitivity",
        replace(
            RIGHT, rule=lambda names: PerBlock(tuple((n,) for n in names), (CLIP,) * len(names))
        ),
    ),
    "nan": ("sensitivity", replace(RIGHT, sums=clipped_by_min)),
    "data-dependent-denominator": (
        "declared",
        replace(RIGHT, denominator=lambda drawn: float(max(drawn, 1))),
    ),
    "empty-batch-skipped": ("control-flow", replace(RIGHT, before=lambda drawn: drawn > 0)),
    "un-noised-metric": ("messages", replace(RIGHT, metric=_loss)),
    "reset-on-resume": (
        "totals",
        replace(RIGHT, books=lambda folder, part: folder / f"ledger{part}.db"),
    ),
    "noise-over-1.2": ("noise-size", replace(RIGHT, source=lambda: Scaled(1 / 1.2))),
    "batches-twice-as-large": ("sampler", replace(RIGHT, sampler=Busier(0.1, 0.2))),
    "data-dependent-clip": ("declared", replace(RIGHT, clip=_largest)),
    "clip-norm-twice-the-declared": ("sensitivity", replace(RIGHT, rule=lambda n: Flat(2 * CLIP))),
    "crash-on-nan": ("control-flow", replace(RIGHT, sums=crash_on_nan)),
    "batch-size-in-the-log": ("logs", replace(RIGHT, metric=_logged)),
    "batch-size-printed": ("logs", replace(RIGHT, metric=_printed)),
    "batch-size-in-a-file": ("messages", replace(RIGHT, metric=_filed)),
}

SERVE: dict[str, tuple[str, Server]] = {
    "weights-by-example-count": ("sensitivity", Server(weight=lambda examples: examples)),
    "example-counts-told": ("messages", Server(tell=True)),
}
