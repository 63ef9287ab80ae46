"""What clipping policies chose in a run, as a report shows it.

All of it was released or is public: choices depend on releases that the bound covers, so to
print them costs nothing further.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.events import Unit
from fedtune.privacy.facts import Facts, Ran
from fedtune.privacy.report_fields import SEARCHING
from fedtune.privacy.words import joined, plural, shown, tidy

__all__ = ["ACTIONS", "LINES", "Choices", "Course", "Decided", "choices_of", "told"]

LINES = 6
"""Most clients that have lines of their own; of more the medians are shown."""

ACTIONS = (
    "all norms", "norms by depth", "A against B", "shares by size", "shares by norm",
    "shares by depth", "residual 1", "residual 2", "noise",
)  # fmt: skip
"""What the numbers of an action move (``rldp.actions``)."""

_MOST_NUMBERS = 400_000
_MOST_STEPS = 80
_FROZEN = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)
_FACTOR = re.compile(r"\.lora_(?:embedding_)?([AB])(?:\..*)?$")

Rows = Sequence[Mapping[str, Any]]


class Decided(BaseModel):
    """The shape and the noise of one release, and the decision that it came from, if any."""

    model_config = _FROZEN

    step: int = Field(ge=0)
    """Of the run, from 0; at client level a round less 1."""
    noise: float = Field(gt=0.0)
    """Noise multiplier."""
    norms: tuple[float, ...] = Field(min_length=1)
    shares: tuple[float, ...] = Field(min_length=1)
    decision: int | None = None
    action: tuple[float, ...] = ()
    reward: float | None = None
    utility: float | None = None
    fault: bool = False
    """The controller had to begin with a new actor."""


class Course(BaseModel):
    """The choices of one policy, oldest first."""

    model_config = _FROZEN

    client: str
    """As it is shown; empty for the server's own."""
    rows: tuple[Decided, ...]
    refused: tuple[int, ...] = ()
    """Steps that a filter refused, before anybody was drawn."""


class Choices(BaseModel):
    """The choices of all policies of one mechanism.

    Attributes
    ----------
    sensing : float
        Share of a release's privacy that was not the gradient's, after the start.
    blocks : tuple of str
    clients : int
        0: the server's own policy.
    courses : tuple of Course
        Every decision; empty where they are too many for a report.
    middle : Course or None
        Medians over more than ``LINES`` clients.
    """

    model_config = _FROZEN

    sensing: float
    blocks: tuple[str, ...]
    clients: int
    courses: tuple[Course, ...]
    middle: Course | None = None

    @property
    def drawn(self) -> tuple[Course, ...]:
        """What a picture has lines of."""
        return (self.middle,) if self.middle else self.courses

    @property
    def last(self) -> tuple[tuple[str, float, float, float], ...]:
        """Block, clip norm, share and noise of each number of the sum, at the end; medians."""
        ends = [course.rows[-1] for course in self.drawn]
        norms, shares = (np.median([getattr(e, n) for e in ends], 0) for n in ("norms", "shares"))
        noises = np.median([self.deviations(end) for end in ends], 0)
        found = zip(self.blocks, norms.tolist(), shares.tolist(), noises.tolist(), strict=True)
        return tuple(found)

    def deviations(self, row: Decided) -> tuple[float, ...]:
        """Return the noise on each number of the sum, for each block: z_g C / sqrt(w).

        Examples
        --------
        >>> row = Decided(step=0, noise=2.0, norms=(3.0,), shares=(0.25,))
        >>> Choices(sensing=0.19, blocks=("all",), clients=1, courses=()).deviations(row)
        (13.333333333333334,)
        """
        z = row.noise / (1.0 - self.sensing) ** 0.5
        return tuple(
            z * norm / share**0.5 for norm, share in zip(row.norms, row.shares, strict=True)
        )


def choices_of(decisions: Mapping[str, Rows], facts: Facts, ran: Ran) -> Choices | None:
    """Return what the policies of one mechanism chose, from the run's own logs.

    Parameters
    ----------
    decisions : mapping of str to rows
        By client; under ``""`` the server's own.
    facts : Facts
    ran : Ran
        The mechanism.

    Returns
    -------
    Choices or None
        None: nothing was logged, nothing could move, or it stays with the clients. That is so
        where clients as a whole are hidden: what one of them chose is released to it alone.

    Raises
    ------
    FedtuneError
        ``ExitCode.RUN_FOLDER``: a log is not of this run.
    """
    if ran.clip.policy is None:
        return None
    hidden = ran.unit is Unit.EXAMPLE and any(r.unit is Unit.CLIENT for r in facts.mechanisms)
    wanted = {
        name: rows
        for name, rows in decisions.items()
        if rows and not hidden and bool(name) == (ran.unit is Unit.EXAMPLE)
    }
    blocks = _short(tuple(ran.clip.blocks)) or ("all parameters",)
    courses = [_course(name, rows, len(blocks)) for name, rows in wanted.items()]
    courses = [course for course in courses if course.rows]
    if not courses:
        return None
    numbers = sum(2 * len(course.rows) * len(blocks) for course in courses)
    return Choices(
        # Of these only the first releases have sensors.
        sensing=0.0 if ran.clip.rule in SEARCHING else ran.clip.policy.sensing, blocks=blocks,
        clients=len(courses) if ran.unit is Unit.EXAMPLE else 0,
        courses=tuple(courses) if numbers <= _MOST_NUMBERS else (),
        middle=_middle(courses) if len(courses) > LINES or numbers > _MOST_NUMBERS else None,
    )  # fmt: skip


def told(choices: Choices, often: str) -> list[str]:
    """Return in words what was chosen, and when for the last time.

    Parameters
    ----------
    choices : Choices
    often : str
        "step" or "round".
    """
    courses = choices.courses or choices.drawn
    decided = [row for course in courses for row in course.rows if row.decision is not None]
    found = []
    if decided:
        end = max(decided, key=lambda row: row.step)
        each = " of all clients" if len(courses) > 1 else ""
        text = f"{plural(len(decided), 'decision')}{each}, the last one before {often} {end.step}"
        if end.reward is not None:
            text += f", after a reward of {tidy(end.reward, 2)}"
        found.append(f"{text}.")
        if len(courses) == 1 and len(end.action) == len(ACTIONS):
            parts = [f"{n} {a:+.2f}" for n, a in zip(ACTIONS, end.action, strict=True)]
            found.append(f"Its action, from -1 to 1: {joined(parts)}.")
    if refused := sum(len(course.refused) for course in courses):
        found.append(
            f"{plural(refused, often)} were refused by the filter, before anybody was drawn."
        )
    if any(row.fault for row in decided):
        found.append("The controller had no usable action once or more, and began again.")
    if not choices.courses:
        found.append("Medians: the choices of each client are in its own decisions.jsonl.")
    elif choices.middle:
        found.append(
            f"Picture and table have medians over {plural(choices.clients, 'client')}; "
            "every decision is in the JSON of this report."
        )
    return found


def _course(name: str, rows: Rows, blocks: int) -> Course:
    found, refused = [], []
    for row in rows:
        try:
            if row.get("refused"):
                refused.append(int(row["step"]))
                continue
            one = Decided.model_validate({**row, "noise": row["noise_multiplier"]})
        except (KeyError, ValidationError) as error:
            raise _foreign(name, f"row {row.get('step')}") from error
        if not len(one.norms) == len(one.shares) == blocks:
            raise _foreign(name, f"row {one.step} of {len(one.norms)} blocks, not {blocks}")
        found.append(one.model_copy(update={k: _six(getattr(one, k)) for k in ("norms", "shares")}))
    client = f"client {int(name)}" if name.isdecimal() else shown(name, 40)
    return Course(client=client, rows=tuple(found), refused=tuple(refused))


def _six(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in values)


def _middle(courses: Sequence[Course]) -> Course:
    """Return medians over clients; who was not asked for a while stays where it was."""
    steps = sorted({row.step for course in courses for row in course.rows})
    kept = sorted({round(i) for i in np.linspace(0, len(steps) - 1, min(len(steps), _MOST_STEPS))})
    rows = []
    for step in (steps[i] for i in kept):
        now = [
            max((r for r in course.rows if r.step <= step), key=lambda r: r.step, default=None)
            for course in courses
        ]
        here = [row for row in now if row is not None]
        medians = {
            name: _six(np.median([getattr(row, name) for row in here], 0).tolist())
            for name in ("norms", "shares")
        }
        noise = float(np.median([row.noise for row in here]))
        rows.append(Decided(step=step, noise=noise, **medians))
    return Course(client=f"median of {plural(len(courses), 'client')}", rows=tuple(rows))


def _short(blocks: tuple[str, ...]) -> tuple[str, ...]:
    """Return names of blocks without what they have in common.

    Examples
    --------
    >>> _short(("m.layers.0.q.lora_A.weight, m.layers.0.q.lora_B.weight",
    ...         "m.layers.1.v.lora_A.weight, m.layers.1.v.lora_B.weight"))
    ('0.q', '1.v')
    >>> _short(("m.0.q.lora_A.weight", "m.0.q.lora_B.weight"))
    ('q A', 'q B')
    """
    found = []
    for block in blocks:
        names = block.split(", ")
        sides = sorted({m.group(1) for name in names if (m := _FACTOR.search(name))})
        stem = _FACTOR.sub("", names[0])
        found.append((stem.split("."), f" {sides[0]}" if len(names) == len(sides) == 1 else ""))
    common = 0
    least = min((len(stem) for stem, _ in found), default=1) - 1
    while common < least and len({stem[common] for stem, _ in found}) == 1:
        common += 1
    marks = len({side for _, side in found}) > 1
    short = [".".join(stem[common:]) + (side if marks else "") for stem, side in found]
    return tuple(short) if len(set(short)) == len(short) else blocks


def _foreign(name: str, what: str) -> FedtuneError:
    return FedtuneError(
        f"decisions.jsonl of {f'client {name}' if name else 'the server'}: {what}",
        hint="it was changed, or is of another run; the privacy statement does not depend on it: "
        "move it away for a report without it",
        code=ExitCode.RUN_FOLDER,
    )
