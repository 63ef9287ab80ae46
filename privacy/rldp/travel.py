"""``rldp.mode = "federated"``: what of the shared policy travels, and what it may look like.

Down goes the actor, beside the parameters of a task. Up go the transitions of a round,
beside the update. They are made of nothing but what the client's own mechanism released
in that round, of settings, and of public text (``features.py``): post-processing of a
release that the client's ledger had admitted before, so they cost no further epsilon.
That the server chooses the actor costs none either: whatever it sends depends on what was
released, and the noise follows the clip norms that come of it (``shape.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from fedtune.config import Config
from fedtune.config_privacy import RldpConfig
from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.plan import Promise, example_promise
from fedtune.privacy.rldp.actions import interval_of
from fedtune.privacy.rldp.controller import ACTIONS, STATES, settings_of
from fedtune.privacy.rldp.policy import State
from fedtune.privacy.rldp.sac import Sac, Transition
from fedtune.privacy.rldp.transitions import transitions_of

__all__ = [
    "ACTOR",
    "MADE",
    "actor_of",
    "cut_off",
    "most_transitions",
    "require_actor",
    "require_transitions",
    "shared_policy",
    "whole_actor",
    "with_mark",
]

ACTOR = "policy/"
"""Begins the names of the tensors in a task that are the actor's."""

MADE = "transitions/"
"""Begins the names of the tensors in an update that are transitions."""

_LARGEST = 1e6
"""No weight of an actor that learnt from rewards within [-1, 1] comes near it."""

_USED = ("actor.", "seen.")
"""What acting needs; critics and temperature stay where learning is."""


def shared_policy(config: Config) -> RldpConfig | None:
    """Return the settings of a policy that is learnt at the server for all clients, if it is."""
    example = config.privacy.example
    if example is None or example.clip != "rldp":
        return None
    settings = example.rldp or RldpConfig()
    return settings if settings.mode == "federated" else None


def most_transitions(config: Config) -> int:
    """Return how many transitions one client can make in one round; 0: none are asked for.

    A decision needs K releases, of which fewer than K + 1 may be left of the round before.
    """
    settings, promise = shared_policy(config), example_promise(config)
    if settings is None or promise is None:
        return 0
    return _most(promise, settings)


def _most(promise: Promise, settings: RldpConfig) -> int:
    every = interval_of(settings, promise.rounds * promise.releases)
    return -(-promise.releases // every)


def with_mark(mark: str, tensors: Mapping[str, NDArray[Any]]) -> State:
    """Return tensors under the names that they travel by.

    Examples
    --------
    >>> import numpy as np
    >>> sorted(with_mark(MADE, {"reward": np.zeros(2)}))
    ['transitions/reward']
    """
    return {f"{mark}{name}": value for name, value in tensors.items()}


def cut_off(mark: str, tensors: Mapping[str, NDArray[Any]]) -> tuple[State, State]:
    """Undo `with_mark`: return all other tensors, and those of the mark by their own names.

    Examples
    --------
    >>> import numpy as np
    >>> rest, found = cut_off(MADE, {"w": np.zeros(2), "transitions/reward": np.zeros(3)})
    >>> sorted(rest), sorted(found)
    (['w'], ['reward'])
    """
    rest = {name: value for name, value in tensors.items() if not name.startswith(mark)}
    marked = {
        name[len(mark) :]: value for name, value in tensors.items() if name.startswith(mark)
    }  # fmt: skip
    return rest, marked


def actor_of(learnt: Mapping[str, NDArray[Any]]) -> State:
    """Return what a client needs of `Sac.actor_state` to act."""
    return {name: value for name, value in learnt.items() if name.startswith(_USED)}


def whole_actor(actor: Mapping[str, NDArray[Any]], settings: RldpConfig) -> State:
    """Return what `Sac.load_actor` takes; critics are fresh, for nothing is learnt with them."""
    return Sac(STATES, ACTIONS, settings_of(settings)).actor_state() | dict(actor)


def require_actor(actor: Mapping[str, NDArray[Any]], settings: RldpConfig) -> None:
    """Refuse what could not be this policy's actor.

    Raises
    ------
    FedtuneError
        ``ExitCode.PRIVACY``: another name, shape or type; a number that is not finite, or
        beyond any that is learnt.
    """
    own = actor_of(Sac(STATES, ACTIONS, settings_of(settings)).actor_state())
    if actor.keys() != own.keys():
        odd = sorted(actor.keys() ^ own.keys())
        raise _refused(f"the policy has other tensors: {odd[:3]}")
    for name, like in own.items():
        value = actor[name]
        if value.shape != like.shape or value.dtype != like.dtype:
            raise _refused(
                f"the policy's '{name}' is {value.dtype}{list(value.shape)}, not "
                f"{like.dtype}{list(like.shape)}"
            )
        # Those two grow with every state that was ever seen.
        sums = {"seen.squares": (0.0, 1e15), "seen.count": (1.0, 1e15)}
        least, most = sums.get(name, (-_LARGEST, _LARGEST))
        if not bool(((value >= least) & (value <= most)).all()):
            raise _refused(f"the policy's '{name}' is not from {least:g} to {most:g}")


def require_transitions(made: Mapping[str, NDArray[Any]], most: int) -> list[Transition]:
    """Return a client's transitions of one round, or refuse what no controller makes.

    Parameters
    ----------
    most : int
        See `most_transitions`.

    Raises
    ------
    FedtuneError
        Other names, shapes or types, numbers outside [-1, 1], or too many of them.
    """
    rows = {value.shape[0] if value.ndim else -1 for value in made.values()}
    if len(rows) == 1 and max(rows) > most:
        raise _refused(f"{max(rows)} transitions in a round that makes {most} at most")
    if rows and min(rows) < 0:
        raise _refused("transitions without rows")
    found = transitions_of(made)
    if any(made["done"]):
        raise _refused("a transition after which nothing comes: no run ends a client's text")
    return found


def _refused(message: str) -> FedtuneError:
    return FedtuneError(
        message, hint="who sent it is broken, of another version, or lies", code=ExitCode.PRIVACY
    )
