"""The second ledger of a split run: what the server of the body sees, and what bounds it.

It is about another reader than the statements on the released model, and the two are never
added. Without noise at the cut nothing is promised. With it there are three cases:

* Nothing before the cut is trained: a record is a function of its example alone, no gradient
  crosses, and what is bounded is what one example says.
* Every step at the client is itself private for examples (``[privacy.example]``). Then one
  example shows in its own records and in those steps, and both compose to such a bound.
* Otherwise prompts and tail carry an example into the records of all others: each of these may
  move by 2 C. What is bounded is then all training text of a client together, over all its
  records.

No bound at all where the server sees which examples were chosen by what they say. All coins
count as seen, so that nothing is amplified.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedtune.config import Config
from fedtune.privacy import accounting
from fedtune.privacy.cut_noise import cut_event
from fedtune.privacy.events import Event, Gaussian, Relation, Unit
from fedtune.privacy.plan import example_promise
from fedtune.privacy.words import above, plural, power

__all__ = ["Crossing", "ServerView", "crossing_of", "server_view"]

_STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
_OPEN = (
    "The server that runs the body can reconstruct the text, and labels from gradients; "
    "nothing is promised against it."
)
_AUDIT = "'fedtune audit --attack inversion' shows what comes back of the text."
_USEFUL = f"Noise that leaves something to learn from does not stop reconstruction: {_AUDIT}"

Count = Annotated[int, Field(ge=0)]


class Crossing(BaseModel):
    """What a run sent through the cut, in numbers that its text does not change.

    A record is one example's hidden state, or the gradient returned for it.
    """

    model_config = _STRICT

    noise: float = Field(default=0.0, ge=0.0)
    """Standard deviation on each coordinate, over ``clip``; 0: none."""
    clip: float = Field(default=1.0, gt=0.0)
    """L2 norm of a record."""
    source: str = ""
    """Name of the noise source."""
    secure: bool = True
    """Nobody can predict or repeat the noise."""
    forwards: Count
    """Most hidden states sent of one example."""
    gradients: Count
    """Most gradients returned for one example."""
    records: Count
    """Most records sent by one client, of all its training examples."""
    examples: Annotated[int, Field(ge=1)]
    """Most examples of one client, nominal where their number is private."""
    chosen: Literal["all", "random", "top", "threshold"] = "all"
    """How the examples were chosen: ``top`` and ``threshold`` by their own scores."""
    release: Literal["each", "once"] = "each"
    private_steps: Count = 0
    """Most steps that one example takes part in, where each is differentially private."""
    step_noise: float = Field(default=0.0, ge=0.0)
    """Noise multiplier of those steps; 0: the steps are exact."""
    learnt: bool = True
    """Something before the cut is trained: prompts, prefixes, or LoRA on the head."""
    bare: bool = False
    """Learnt prefixes cross as they are, beside the records and without noise."""
    held_out: bool = False
    """Clients evaluate held-out text through the cut."""
    delta: float = Field(gt=0.0, lt=1.0)


class ServerView(BaseModel):
    """What is promised against the server that runs the body.

    Attributes
    ----------
    differential_privacy : bool
        There is a finite bound, and the noise was not predictable.
    unit : Unit or None
        Whose text is bounded; None: nobody's.
    epsilon : float or None
        Replace-one, at ``delta``, of the whole run; None: no bound.
    delta : float
    releases : int
        Records of the unit that compose.
    statement : str
        In one or two sentences.
    remember : tuple of str
        What the statement is not about.
    """

    model_config = _STRICT

    differential_privacy: bool
    unit: Unit | None
    epsilon: float | None
    delta: float
    releases: int
    statement: str
    remember: tuple[str, ...]


def crossing_of(
    config: Config, rounds: int, examples: int, *, source: str = "", secure: bool = True
) -> Crossing:
    """Return the most that a split run of so many rounds sends of one example and one client.

    Parameters
    ----------
    config : Config
        With ``tuning.method = "sfprompt"``.
    rounds : int
        Rounds that ran; a client counts as asked in each.
    examples : int
        Most training examples of one client. With ``[privacy.example]`` its public population
        is taken instead.
    source, secure
        Of the noise.
    """
    tuning, split = config.tuning, config.tuning.split
    promise = example_promise(config)
    if promise is None:
        kept = max(1, math.ceil(split.keep * examples))
        passes = math.ceil(tuning.epochs)
        if tuning.steps:
            batch = tuning.batch_size * tuning.accumulate
            passes = math.ceil(tuning.steps * batch / kept)
        private, noise, delta = 0, 0.0, min(1e-5, 0.1 / max(examples, 1))
    else:
        examples = kept = promise.settings.population
        # A coin may come up in every step.
        passes = promise.releases
        private, noise = passes * rounds, promise.mechanism.noise_multiplier
        delta = promise.delta
    each = rounds * passes
    # Prompts and prefixes stand before the body; a gradient crosses only to reach them.
    learnt = split.adapt == "ends" or tuning.adapter not in ("lora", "lora-frozen-a")
    back = each if learnt else 0
    # Sent once is what stays as it is; prompts in front change, and cross in every step.
    held = split.release == "once" and not learnt
    forwards = min(each, 1) if held else each
    chosen: Literal["all", "random", "top", "threshold"] = "top"
    if split.threshold:
        chosen, kept = "threshold", examples
    elif split.keep == 1.0:
        chosen = "all"
    elif split.prune == "random":
        chosen = "random"
    # Sent once each, all of a client's examples may be sent in the end.
    sent = examples if held else kept
    return Crossing(
        noise=split.noise, clip=split.clip, source=source, secure=secure,
        forwards=forwards, gradients=back, records=sent * forwards + kept * back,
        examples=max(examples, 1), chosen=chosen, release=split.release,
        private_steps=private, step_noise=noise, learnt=learnt,
        bare=tuning.adapter in ("prefix", "p-tuning-v2"),
        held_out=bool(config.evaluation.clients), delta=delta,
    )  # fmt: skip


def server_view(crossing: Crossing) -> ServerView:
    """Return what bounds the view of the server that runs the body, and the words for it.

    Parameters
    ----------
    crossing : Crossing

    Examples
    --------
    >>> sent = {"forwards": 1, "gradients": 1, "records": 200, "examples": 100, "delta": 1e-5}
    >>> print(server_view(Crossing(**sent)).statement)
    The server that runs the body can reconstruct the text, and labels from gradients; nothing \
is promised against it.
    >>> view = server_view(Crossing(noise=30.0, **sent))
    >>> view.unit.value, view.releases, round(view.epsilon, 2)
    ('client', 200, 4.09)
    >>> private = server_view(Crossing(noise=30.0, private_steps=40, step_noise=20.0, **sent))
    >>> private.unit.value, private.releases, round(private.epsilon, 2)
    ('example', 2, 2.63)
    """
    if not crossing.noise:
        return _view(crossing, _OPEN, (_AUDIT,))
    if not crossing.secure:
        why = "came from a seed, and whoever knows it can take the noise away"
        return _view(crossing, f"The noise at the cut {why}. {_OPEN}", (_AUDIT,))
    if why := _in_sight(crossing):
        return _view(crossing, f"{why} {_OPEN}", (_USEFUL,))
    charges: dict[Event, int] = {}
    # Among the hardest an example displaces others: no example has a bound of its own.
    alone = crossing.chosen in ("all", "random")
    if alone and (crossing.step_noise or not crossing.learnt):
        unit, whose = Unit.EXAMPLE, "what one example says"
        releases = crossing.forwards + crossing.gradients
        # Replacing an example moves the sum of a step by twice the clip norm too.
        if crossing.learnt and crossing.private_steps:
            charges[Gaussian(crossing.step_noise / 2)] = crossing.private_steps
    else:
        unit, whose = Unit.CLIENT, "what all training text of one client says"
        releases = crossing.records
    if releases:
        event = cut_event(crossing.noise)
        charges[event] = charges.get(event, 0) + releases
    epsilon = accounting.spent(charges, crossing.delta, Relation.REPLACE_SPECIAL).epsilon
    if not math.isfinite(epsilon):
        return _view(crossing, _OPEN, (_AUDIT,))
    statement = (
        f"Against the server that runs the body: ε ≤ {above(epsilon)} at δ = "
        f"{power(crossing.delta)} for {whose}, over {plural(releases, 'noisy record')} of the run."
    )
    if epsilon > 10:
        statement += " That is above 10, where a bound says little."
    remember = (_USEFUL, *_remember(unit, crossing))
    return ServerView(
        differential_privacy=True, unit=unit, epsilon=epsilon, delta=crossing.delta,
        releases=releases, statement=statement, remember=remember,
    )  # fmt: skip


def _in_sight(crossing: Crossing) -> str:
    """Say what the server sees that no noise was added to; empty where there is nothing."""
    if crossing.bare and not crossing.step_noise:
        return "Prefixes cross as they were learnt, without noise."
    if crossing.chosen == "threshold":
        return "How many examples pass the threshold depends on what they say, and is seen."
    if crossing.chosen == "top" and crossing.release == "once":
        return "Which examples are sent again depends on what they say, and is seen."
    return ""


def _remember(unit: Unit, crossing: Crossing) -> tuple[str, ...]:
    found = ["Lengths, the number of examples, and when they are sent are in the open."]
    if unit is Unit.CLIENT and crossing.chosen == "top":
        found.append("Which examples are the hardest depends on all of them, so that single ones "
                     "have no bound of their own.")  # fmt: skip
    elif unit is Unit.CLIENT:
        found.append("Prompts and tail are learnt from exact gradients and carry an example into "
                     "the records of others: single ones have no bound of their own.")  # fmt: skip
    if crossing.held_out:
        found.append("Held-out text that clients evaluate goes through the cut too, and is not "
                     "counted.")  # fmt: skip
    found.append("It is of this run: other runs on the same text add to it, and are not counted.")
    found.append("The bound of the released model is for other readers; the two are not added. A "
                 "server that also collects the clients' updates sees these too.")  # fmt: skip
    return tuple(found)


def _view(crossing: Crossing, statement: str, remember: tuple[str, ...]) -> ServerView:
    releases = crossing.forwards + crossing.gradients
    return ServerView(
        differential_privacy=False, unit=None, epsilon=None, delta=crossing.delta,
        releases=releases, statement=statement, remember=remember,
    )  # fmt: skip
