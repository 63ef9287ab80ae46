"""What a recording and its replay are checked for. Every check has a name.

``audit`` runs all of them. Statistical checks call a sound program faulty with a
probability below one in a million each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fedtune.privacy.events import (
    Event,
    Gaussian,
    Laplace,
    PoissonGaussian,
    PoissonLaplace,
    TruncatedPoissonGaussian,
)
from fedtune.privacy.replay import Draw, Left, Program, Release, Trace, record, replay

__all__ = [
    "CHECKS",
    "Finding",
    "Pair",
    "audit",
    "books",
    "compare",
    "extremes",
    "neighbours",
    "noise",
    "sampler",
]

CHECKS = {
    "control-flow": "the same calls, in the same order, with the same outcome",
    "declared": "clip, noise, denominator, shapes and event do not depend on the data, and add up",
    "messages": "everything that left is the same to the byte",
    "logs": "log lines, warnings and prints are the same",
    "sensitivity": "two sums differ by no more than the clip norm",
    "noise-size": "the noise that was added has the declared size",
    "noise-repeated": "no two releases share noise, in one run or in two",
    "sampler": "batch sizes follow the law of the event",
    "totals": "the books hold every release, and their total never falls",
}

CHANCE = 1e-9
ENOUGH = 16  # coordinates in a release before its noise is compared with another's
ENOUGH_DRAWS = 20
ENOUGH_VARIANCE = 5.0  # of a batch size, for the chi-square law of its dispersion


@dataclass(frozen=True)
class Finding:
    """One failed check: its name, the neighbour it failed on, and what was seen."""

    check: str
    where: str
    detail: str


@dataclass(frozen=True)
class Pair:
    """A data set, and a neighbour with one unit more at its end."""

    name: str
    data: Any
    neighbour: Any


def audit(run: Program, pairs: Iterable[Pair]) -> list[Finding]:
    """Run every check on a program; an empty list when it passes.

    The first data set is also recorded twice, for the noise, the sampler and the books:
    give it many draws, and batches of more than a handful.

    Parameters
    ----------
    run : callable
        ``run(stage, data)``. What it does by chance, other than by its mechanisms, is seeded.
    pairs : iterable of Pair
        For example from ``neighbours``.

    Examples
    --------
    >>> from fedtune.privacy.events import Relation, Unit
    >>> from fedtune.privacy.mechanism import Mechanism
    >>> from fedtune.privacy.noise import SecureNoise
    >>> from fedtune.privacy.sampling import Everyone
    >>> public = Mechanism(Unit.EXAMPLE, Relation.ADD_OR_REMOVE_ONE, Everyone(), 1.0, 10.0)
    >>> def mean(stage, data, bound=1.0):
    ...     mechanism, source = stage.watch(public), SecureNoise()
    ...     values = np.array(data)[mechanism.draw(len(data), source)]
    ...     sums = {"x": np.array([values.clip(-bound, bound).sum()])}
    ...     blocks = mechanism.blocks_flat(["x"], clip=1.0)
    ...     stage.emit("mean", mechanism.release(sums, blocks, source))
    >>> pairs = [Pair("a large one", [0.3, -0.4], [0.3, -0.4, 50.0])]
    >>> audit(mean, pairs)
    []
    >>> [finding.check for finding in audit(lambda stage, data: mean(stage, data, 2.0), pairs)]
    ['sensitivity', 'sensitivity']
    """
    given = list(pairs)
    first, second = record(run, given[0].data), record(run, given[0].data)
    found = [
        *noise([first, second]),
        *sampler([first, second]),
        *(finding for trace in (first, second) for finding in books(trace)),
    ]
    if not first.releases:
        found.append(Finding("control-flow", given[0].name, f"no release at all: {first.outcome}"))
    tapes = {id(given[0].data): second}  # a data set that stands in many pairs is recorded once
    for pair in given:
        if id(pair.data) not in tapes:
            tapes[id(pair.data)] = record(run, pair.data)
        tape = tapes[id(pair.data)]
        found += compare(tape, replay(run, pair.neighbour, tape), pair.name)
    return found


def neighbours(data: Sequence[Any], units: dict[str, Any]) -> list[Pair]:
    """Return pairs: the data against itself, against each unit more, and nobody against each."""
    base: list[Any] = list(data)
    nobody: list[Any] = []
    return [
        Pair("same", base, base),
        *(Pair(name, base, [*base, unit]) for name, unit in units.items()),
        *(Pair(f"nobody, {name}", nobody, [unit]) for name, unit in units.items()),
    ]


def extremes(like: NDArray[np.floating[Any]]) -> dict[str, NDArray[np.float32]]:
    """Return vectors that implementations trip over, in the shape of ``like``.

    Examples
    --------
    >>> sorted(extremes(np.ones(3)))
    ['aligned', 'huge', 'inf', 'nan', 'opposed', 'overflow', 'tiny', 'zero']
    """
    plain = np.asarray(like, np.float32)

    def spoilt(value: float) -> NDArray[np.float32]:
        other = plain.copy()
        other.reshape(-1)[0] = value
        return other

    return {
        "huge": plain * np.float32(1e6),
        "zero": np.zeros_like(plain),
        "nan": spoilt(math.nan),
        "inf": spoilt(math.inf),
        "overflow": np.full_like(plain, 3e38),
        "aligned": plain * np.float32(30.0),
        "opposed": plain * np.float32(-30.0),
        "tiny": np.full_like(plain, 1e-38),
    }


def compare(tape: Trace, again: Trace, where: str = "") -> list[Finding]:
    """Return how a replay on a neighbour differs from its recording where it must not."""
    found: list[Finding] = []

    def fail(check: str, detail: str) -> None:
        found.append(Finding(check, where, detail))

    kinds = [[_kind(call) for call in trace.calls] for trace in (tape, again)]
    if kinds[0] != kinds[1]:
        fail("control-flow", f"{len(kinds[0])} calls of mechanisms, {len(kinds[1])} on replay")
    if tape.outcome != again.outcome:
        fail("control-flow", f"ended with '{tape.outcome}', '{again.outcome}' on replay")
    for index, (one, two) in enumerate(zip(tape.calls, again.calls, strict=False)):
        if _kind(one) == _kind(two) and _declared(one) != _declared(two):
            fail("declared", f"call {index}: {_declared(one)} and {_declared(two)}")
        if isinstance(one, Release) and isinstance(two, Release):
            for detail in _too_far(one, two):
                fail("sensitivity", f"call {index}: {detail}")
    if found and found[0].check == "control-flow":
        return found  # another path has other messages
    for check, logs in (("messages", False), ("logs", True)):
        one_left, two_left = (
            [left for left in trace.left if (left.channel == "log") is logs]
            for trace in (tape, again)
        )
        if detail := _differs(one_left, two_left):
            fail(check, detail)
    return found


def noise(traces: Sequence[Trace]) -> list[Finding]:
    """Return where recorded noise is too small for what was declared, or was used before."""
    found = []
    pieces: dict[int, list[NDArray[np.float64]]] = {}
    total, coordinates = 0.0, 0
    for trace in traces:
        for index, release in enumerate(trace.releases):
            if detail := _too_little_declared(release):
                found.append(Finding("declared", f"release {index}", detail))
            for piece in _residuals(release):
                total += float(piece @ piece)
                coordinates += piece.size
                if piece.size >= ENOUGH:
                    pieces.setdefault(piece.size, []).append(piece)
    if coordinates and stats.chi2.cdf(total, coordinates) < CHANCE:
        size = math.sqrt(total / coordinates)
        found.append(
            Finding("noise-size", "recording", f"{size:.4f} of what was declared is there")
        )
    alike = [_alike(np.stack(same_size)) for same_size in pieces.values()]
    return found + [Finding("noise-repeated", "recording", detail) for detail in alike if detail]


def sampler(traces: Sequence[Trace]) -> list[Finding]:
    """Return where batch sizes do not follow the law of the declared event.

    Mean and dispersion of independent coins; too few draws are not judged.
    """
    sizes: dict[tuple[Event, int], list[int]] = {}
    for trace in traces:
        for draw in trace.draws:
            sizes.setdefault((draw.event, draw.n), []).append(len(draw.drawn))
    found = []
    for (event, n), seen in sizes.items():
        if detail := _unlike(event, n, np.array(seen)):
            found.append(Finding("sampler", "recording", detail))
    return found


def books(trace: Trace) -> list[Finding]:
    """Return where the books showed less than was released, or less than before."""
    found, before = [], 0
    for releases, total in trace.spent:
        if total < releases or total < before:
            detail = f"{total} in the books after {releases} releases; they had shown {before}"
            found.append(Finding("totals", "recording", detail))
        before = max(before, total)
    return found


def _kind(call: Draw | Release) -> str:
    return "draw" if isinstance(call, Draw) else f"release {[name for name, *_ in call.shapes]}"


def _declared(call: Draw | Release) -> tuple[Any, ...]:
    if isinstance(call, Draw):
        return (call.event,)
    return (call.event, call.blocks, call.denominator, call.shapes)


def _too_far(one: Release, two: Release) -> list[str]:
    """Return the blocks in which two sums differ by more than their clip norm."""
    if one.shapes != two.shapes:
        return []  # is a finding already, and there is no distance
    details, cost = [], 0.0
    for block in one.blocks:
        gaps = [two.sums[name] - one.sums[name] for name in block.names]
        squares = sum(float(np.sum(np.square(gap))) for gap in gaps)
        norm = math.sqrt(squares) if math.isfinite(squares) else math.inf
        if norm > block.clip * (1.0 + one.margin + CHANCE):
            details.append(f"sums of '{block.names[0]}' are {norm:.6g} apart, clip {block.clip:g}")
        cost += (norm / block.sigma) ** 2
    z = _multiplier(one.event)
    if math.sqrt(cost) * z > 1.0 + one.margin + CHANCE:
        details.append(f"together {math.sqrt(cost) * z:.6g} times the declared sensitivity")
    return details


def _too_little_declared(release: Release) -> str:
    first = len(release.blocks) - release.apart
    parts = (release.blocks[:first], release.blocks[first:])  # nobody contributes to both
    cost = max(sum((block.clip / block.sigma) ** 2 for block in part) for part in parts)
    z = _multiplier(release.event)
    if cost * z * z <= 1.0 + CHANCE:
        return ""
    return f"the blocks declare noise for multiplier {cost**-0.5:.6g}, the event {z:.6g}"


def _residuals(release: Release) -> list[NDArray[np.float64]]:
    """Return the noise of each tensor in units of its declared standard deviation."""
    found = []
    for block in release.blocks:
        for name in block.names:
            out = release.output[name].astype(np.float64) * release.denominator
            found.append(((out - release.sums[name]) / block.sigma).reshape(-1))
    return found


def _alike(rows: NDArray[np.float64]) -> str:
    """Return which two rows of noise (m, d) are correlated beyond chance."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    scaled = rows / np.where(norms > 0, norms, 1.0)
    found = np.abs(np.triu(scaled @ scaled.T, 1))
    worst = np.unravel_index(int(np.argmax(found)), found.shape)
    r, freedom = min(float(found[worst]), 1.0 - 1e-12), rows.shape[1] - 1
    # r sqrt(d - 1) / sqrt(1 - r^2) of two independent rows has Student's law
    if stats.t.sf(r * math.sqrt(freedom / (1.0 - r * r)), freedom) * len(rows) ** 2 >= CHANCE:
        return ""
    return f"noise {worst[0]} and {worst[1]} of {rows.shape[1]}: correlation {found[worst]:.3f}"


def _unlike(event: Event, n: int, sizes: NDArray[np.int64]) -> str:
    rounds = len(sizes)
    match event:
        case Gaussian() | Laplace():
            return "" if bool((sizes == n).all()) else f"not all {n} units in every batch"
        case PoissonGaussian(q, _) | PoissonLaplace(q, _):
            pass
        case TruncatedPoissonGaussian(q, _, population, cap):
            if n != population or sizes.max(initial=0) > cap:
                return f"{sizes.max(initial=0)} of {n} units; declared {cap} of {population}"
            if cap < n:
                return ""
        case _:
            return ""
    variance = n * q * (1.0 - q)
    if rounds < ENOUGH_DRAWS or variance < ENOUGH_VARIANCE:
        return ""
    mean = 2 * stats.norm.sf(abs(sizes.mean() - n * q) / math.sqrt(variance / rounds))
    ratio = float(np.var(sizes, ddof=1)) / variance
    below = float(stats.chi2.cdf(ratio * (rounds - 1), rounds - 1))
    if min(mean, 2 * below, 2 * (1 - below)) >= CHANCE:
        return ""
    return f"mean {sizes.mean():.2f} of {n * q:.2f}, variance {ratio:.3f} of {variance:.2f}"


def _differs(one: Sequence[Left], two: Sequence[Left]) -> str:
    for index, (first, second) in enumerate(zip(one, two, strict=False)):
        if first != second:
            return (
                f"{index}: {first.channel} '{first.text[:80]}', "
                f"{second.channel} '{second.text[:80]}' on replay"
            )
    return "" if len(one) == len(two) else f"{len(one)} things left, {len(two)} on replay"


def _multiplier(event: Event) -> float:
    return float(getattr(event, "noise_multiplier", 0.0))
