"""``rldp.mode = "federated"``: one clipping policy for all clients, learnt from what they released.

What it learns from is post-processing of the clients' own releases, each paid for in its
client's ledger (``fedtune.privacy.rldp.travel``): it may be kept, sent and published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedtune.adapters import Tensors
from fedtune.config import Config
from fedtune.config_privacy import RldpConfig
from fedtune.errors import FedtuneError
from fedtune.privacy.rldp.controller import ACTIONS, STATES, settings_of
from fedtune.privacy.rldp.sac import Sac, Transition
from fedtune.privacy.rldp.travel import ACTOR, actor_of, most_transitions, shared_policy, with_mark
from fedtune.seeds import derive

__all__ = ["Learner", "open_learner"]

_MOST_UPDATES = 256
"""Gradient steps in a round, about a millisecond each."""


@dataclass(frozen=True)
class Learner:
    """Makes the next policy out of a round's transitions. It keeps nothing: a state does.

    Parameters
    ----------
    settings : RldpConfig
    seed : int
        Of its own random numbers, which are no secret.
    most : int
        Transitions of one client in one round, at most.
    """

    settings: RldpConfig
    seed: int
    most: int

    def start(self) -> Tensors:
        """Return the state before the first round."""
        return self._sac().state()

    def told(self, state: Tensors) -> Tensors:
        """Return the tensors that a task carries beside the parameters."""
        return with_mark(ACTOR, actor_of(self._sac(state).actor_state()))

    def learn(self, state: Tensors, made: Sequence[Sequence[Transition]]) -> Tensors:
        """Return the state after a round.

        Parameters
        ----------
        state : Tensors
        made : sequence of transitions by client
            In the order of the clients, so that it is the same whoever was quick.
        """
        sac = self._sac(state)
        new = [one for each in made for one in each]
        kept = sac.transitions + len(new)
        updates = min(_MOST_UPDATES, sac.settings.updates * len(new))
        try:
            sac.pretrain(new, updates if kept >= sac.settings.start else 0)
        except FedtuneError:
            # It ran away: weights like these could be neither sent nor saved.
            return self.start()
        return sac.state()

    def _sac(self, state: Tensors | None = None) -> Sac:
        sac = Sac(STATES, ACTIONS, settings_of(self.settings), self.seed)
        if state is not None:
            sac.restore(state)
        return sac


def open_learner(config: Config) -> Learner | None:
    """Return what learns the clients' policy, or None where each has its own or none."""
    settings = shared_policy(config)
    if settings is None:
        return None
    return Learner(settings, derive(config.seed, "policy", "shared"), most_transitions(config))
