"""What an inversion audit found: the numbers, and what they mean in plain words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Finding", "Level", "Share", "lines", "share", "to_json"]

_Z95 = 1.959963984540054
LOST = 0.5
"""Share of the tokens from which on the text counts as readable in the words below."""


@dataclass(frozen=True)
class Share:
    """So many of so many, and the 95 % interval of the rate."""

    right: int
    of: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        """Return ``right / of``; 0 of nothing."""
        return self.right / self.of if self.of else 0.0


def share(right: Sequence[int], of: Sequence[int]) -> Share:
    """Add up rows, with the Wilson interval of the rate.

    Tokens of one row are not independent: the count is divided by the design effect,
    the rows' variance over that of independent tokens, where it is above 1.

    Parameters
    ----------
    right, of : sequence of int
        Per row.

    Examples
    --------
    >>> found = share([8, 9], [10, 10])
    >>> found.rate, round(found.low, 3), round(found.high, 3)
    (0.85, 0.64, 0.948)
    >>> round(share([32], [32]).low, 3)
    0.893
    """
    hits, total = sum(right), sum(of)
    if not total:
        return Share(0, 0, 0.0, 1.0)
    p = hits / total
    rows = len(of)
    effect = 1.0
    if 0 < p < 1 and rows > 1:
        spread = sum((r - p * n) ** 2 for r, n in zip(right, of, strict=True))
        effect = max(1.0, spread * rows / (rows - 1) / (total * p * (1 - p)))
    n = total / effect
    middle = (p + _Z95**2 / (2 * n)) / (1 + _Z95**2 / n)
    half = _Z95 / (1 + _Z95**2 / n) * math.sqrt(p * (1 - p) / n + _Z95**2 / (4 * n * n))
    # Rounding must not push the edges of none and of all inwards.
    low = 0.0 if hits == 0 else middle - half
    return Share(hits, total, low, 1.0 if hits == total else middle + half)


@dataclass(frozen=True)
class Level:
    """What one strength of noise gave.

    Attributes
    ----------
    z : float
        Noise multiplier: standard deviation over clip norm. 0 is neither noise nor clipping.
    epsilon_record : float or None
        Of one record taken alone: how much noise it is, and no promise. None: no noise.
    tokens : mapping of str to Share
        Tokens recovered, by attack.
    rows : Share
        Rows recovered without a fault, by the attack that recovers most tokens.
    labels : mapping of str to Share
        Labels recovered, by attack; empty where there are none or no gradient is returned.
    quality : mapping of str to float
        Of the model on held-out rows with this noise at the cut.
    """

    z: float
    epsilon_record: float | None
    tokens: Mapping[str, Share]
    rows: Share
    labels: Mapping[str, Share]
    quality: Mapping[str, float]

    @property
    def best(self) -> Share:
        """Return the tokens of the attack that recovers most."""
        return max(self.tokens.values(), key=lambda one: one.rate)

    @property
    def best_labels(self) -> Share | None:
        """Return the labels of the attack that recovers most."""
        return max(self.labels.values(), key=lambda one: one.rate, default=None)


@dataclass(frozen=True)
class Finding:
    """An inversion audit.

    Attributes
    ----------
    name, base, adapter : str
        Of the experiment.
    head, tail, blocks : int
        Where the model was cut.
    rows, tokens : int
        Attacked; ``tokens`` without padding and special tokens.
    clip, clip_gradient : float
        Largest L2 norm of an example's record, where there is noise.
    delta : float
    chance : float
        Share of the most frequent token among those attacked.
    chance_label : float or None
        Share of the most frequent label.
    best_guess : mapping of str to float
        Quality of a model that sees nothing: the most frequent class.
    levels : tuple of Level
        The first is without noise.
    notes : tuple of str
    """

    name: str
    base: str
    adapter: str
    head: int
    tail: int
    blocks: int
    rows: int
    tokens: int
    clip: float
    clip_gradient: float
    delta: float
    chance: float
    chance_label: float | None
    best_guess: Mapping[str, float]
    levels: tuple[Level, ...]
    notes: tuple[str, ...] = ()


def to_json(found: Finding) -> dict[str, Any]:
    """Return an audit as plain values; shares with their rate."""

    def plain(value: Any) -> Any:
        if isinstance(value, Share):
            return dataclasses.asdict(value) | {"rate": value.rate}
        if isinstance(value, Mapping):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, tuple):
            return [plain(inner) for inner in value]
        if dataclasses.is_dataclass(value):
            names = [field.name for field in dataclasses.fields(value)]
            return {name: plain(getattr(value, name)) for name in names}
        return value

    made: dict[str, Any] = {"schema": 1, "attack": "inversion"} | plain(found)
    return made | {"statement": _statement(found), "verdict": _verdict(found)}


def lines(found: Finding) -> list[str]:
    """Return an audit as lines for people: what is lost, the table, and what noise does."""
    said = [
        f"{found.name}: {found.base}, adapter {found.adapter}; the client has the first "
        f"{found.head} and the last {found.tail} of {found.blocks} blocks",
        "",
        *_statement(found),
        "",
        *_table(found),
        "",
        *_verdict(found),
    ]
    return said + [f"note: {note}" for note in found.notes]


def _percent(value: float) -> str:
    """Return a rate; what is not all of it does not read as 100 %."""
    text = f"{100 * value:.1f}"
    if text == "100.0":
        return "100 %" if value == 1 else "99.9 %"
    return f"{text} %"


def _of(one: Share) -> str:
    return f"{_percent(one.rate)} [{100 * one.low:.1f}, {100 * one.high:.1f}]"


def _statement(found: Finding) -> list[str]:
    """Say what the server reads where there is no noise."""
    plain = found.levels[0]
    best, rows = plain.best, plain.rows
    able = "can reconstruct the text" if best.rate >= LOST else "can reconstruct part of the text"
    if best.low <= found.chance:
        able = "could not reconstruct the text with these attacks, which proves nothing"
    said = [
        f"Without noise the server that runs the body {able}: {_percent(best.rate)} of the "
        f"{best.of:,} tokens of {rows.of} rows were recovered (95 % interval "
        f"{100 * best.low:.1f} to {100 * best.high:.1f}; always guessing the most frequent "
        f"token: {_percent(found.chance)}).",
        f"Of {rows.of} rows {rows.right} were recovered whole.",
    ]
    labels = plain.best_labels
    if labels is not None and found.chance_label is not None:
        said.append(
            f"From the gradients that come back it read the labels of {labels.right} of "
            f"{labels.of} examples (always the most frequent label: "
            f"{_percent(found.chance_label)})."
        )
    return said


def _verdict(found: Finding) -> list[str]:
    """Say whether some noise stopped the attacks and left the model of use."""
    key = "accuracy" if found.chance_label is not None else "loss"
    base = found.levels[0].quality.get(key)
    noisy = found.levels[1:]
    if not noisy or base is None:
        return ["No noise was tried."]
    stopped = [one for one in noisy if one.best.rate < LOST]
    good = [one for one in noisy if _useful(found, one, key, base)]
    both = [one for one in stopped if one in good]
    word = "accuracy" if key == "accuracy" else "loss"
    if both:
        first = both[0]
        said = [
            f"With noise z = {first.z:g} the attacks recovered {_percent(first.best.rate)} of the "
            f"tokens, and the {word} was {first.quality[key]:.3f} ({base:.3f} without noise).",
            "That is what these attacks could do; nothing is promised.",
        ]
    else:
        said = ["None of the noise that was tried both keeps the model useful and hides the text."]
        if good:
            most = good[-1]
            said.append(
                f"The most that left it useful, z = {most.z:g}, still gives away "
                f"{_percent(most.best.rate)} of the tokens."
            )
        if stopped:
            least = stopped[0]
            said.append(
                f"The least that hides half of them, z = {least.z:g}, takes the {word} from "
                f"{base:.3f} to {least.quality[key]:.3f}."
            )
    return said


def _useful(found: Finding, level: Level, key: str, base: float) -> bool:
    """Say whether nine tenths of what was learnt beyond guessing is left."""
    value = level.quality[key]
    guess = found.best_guess.get(key)
    if guess is None:
        return abs(value - base) <= 0.1 * abs(base)
    return (value - guess) / (base - guess) >= 0.9 if base != guess else False


def _epsilon(value: float | None) -> str:
    return "no bound" if value is None else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def _table(found: Finding) -> list[str]:
    """Return the attack that was best at each level, and below it all of them."""
    measured = list(found.levels[0].quality)
    labelled = any(one.labels for one in found.levels)
    head = ["noise z", "eps of one record", "tokens recovered"]
    head += ["whole rows", *(["labels recovered"] if labelled else []), *measured]
    body = []
    for one in found.levels:
        row = [f"{one.z:g}", _epsilon(one.epsilon_record)]
        row += [_of(one.best), f"{one.rows.right} of {one.rows.of}"]
        if labelled:
            row.append(_of(one.best_labels) if one.best_labels else "-")
        body.append(row + [f"{one.quality[name]:.3f}" for name in measured])
    return [*_aligned([head, *body]), "", "each attack:", *_each(found)]


def _each(found: Finding) -> list[str]:
    """Return the rate of each attack at each level."""
    texts = list(dict.fromkeys(name for one in found.levels for name in one.tokens))
    labels = list(dict.fromkeys(name for one in found.levels for name in one.labels))
    rows = [["noise z", *(f"{one.z:g}" for one in found.levels)]]
    for what, names in (("tokens", texts), ("labels", labels)):
        for name in names:
            shares = [getattr(one, what).get(name) for one in found.levels]
            cells = [_percent(one.rate) if one else "-" for one in shares]
            rows.append([f"{what}: {name}", *cells])
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
