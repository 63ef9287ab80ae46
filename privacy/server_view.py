"""What the server that runs the body of a split model sees: a second reader, with no bound.

The statements on the released model are about who reads that model. The body's server reads
hidden states of every token and gradients made from labels; what is said about it is never
added to the other ledger, and it is never a number. Noise at the cut (``cut_noise.py``) would
give one record an epsilon. It is not claimed for a run, because none of these is bounded:

* prompts and tail that were learnt exactly carry an example into the records of all others;
* an example's records repeat over epochs, rounds, attempts and jobs, and which ones were sent
  is known to no ledger;
* lengths, equal texts, and the choice of examples by their scores are in the open.

And noise that leaves something to learn from does not stop reconstruction
(``research/split_peft.md`` C; docs/split_privacy.md).
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from fedtune.config import Config

__all__ = ["Crossing", "ServerView", "crossing_of", "server_view"]

_STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
_AUDIT = "`fedtune audit --attack inversion` shows what comes back of the text."


class Crossing(BaseModel):
    """How a run crossed the cut.

    Attributes
    ----------
    noise : float
        Standard deviation on each coordinate, over ``clip``; 0: none.
    clip : float
        L2 norm of what one example sends at once, where there is noise.
    held_out : bool
        Clients sent held-out text through the cut as well.
    """

    model_config = _STRICT

    noise: float = Field(default=0.0, ge=0.0)
    clip: float = Field(default=1.0, gt=0.0)
    held_out: bool = False


class ServerView(BaseModel):
    """What is said about the server that runs the body.

    Attributes
    ----------
    differential_privacy : False
        Nothing is promised against it, whatever the settings.
    statement : str
        In one or two sentences.
    remember : tuple of str
        What goes with it.
    """

    model_config = _STRICT

    differential_privacy: Literal[False] = False
    statement: str
    remember: tuple[str, ...]


def crossing_of(config: Config) -> Crossing:
    """Return how a run of these settings crosses the cut."""
    split = config.tuning.split
    return Crossing(
        noise=split.noise, clip=split.clip,
        held_out=bool(config.evaluation.clients),
    )  # fmt: skip


def server_view(crossing: Crossing) -> ServerView:
    """Return the words about the server that runs the body.

    Examples
    --------
    >>> print(server_view(Crossing()).statement)
    The server that runs the body can reconstruct the text, and labels from gradients; nothing \
is promised against it.
    >>> server_view(Crossing(noise=1.38)).differential_privacy
    False
    """
    if not crossing.noise:
        statement = (
            "The server that runs the body can reconstruct the text, and labels from gradients; "
            "nothing is promised against it."
        )
    else:
        statement = (
            f"Noise of {crossing.noise:g} times the clip norm {crossing.clip:g} was added to what "
            "crossed the cut. No bound is claimed for it: the server that runs the body may "
            "still reconstruct text and labels, and nothing is promised against it."
        )
    remember = [_AUDIT, "Transport encryption, codecs and labels that stay with the client do not "
                "change what this server can read."]  # fmt: skip
    if crossing.held_out:
        remember.append("Held-out text that clients evaluated went through the cut too.")
    return ServerView(statement=statement, remember=tuple(remember))
