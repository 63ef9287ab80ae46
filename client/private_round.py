"""One client's round under a promise about its examples, once it is paid for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedtune.adapters import Tensors, change, read, trainable
from fedtune.client.private_steps import tune_privately
from fedtune.client.private_zo import mezo_privately
from fedtune.config import Config
from fedtune.data import Encoded
from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.noise import NoiseSource
from fedtune.privacy.per_example import PerExample
from fedtune.privacy.plan import Promise
from fedtune.privacy.rldp.controller import Controller
from fedtune.privacy.rldp.named import policy_of
from fedtune.privacy.rldp.policy import Policy, State, Utility
from fedtune.privacy.rldp.travel import MADE, whole_actor, with_mark
from fedtune.seeds import derive
from fedtune.wire import Task

__all__ = ["PrivateRound", "by_gradients", "by_probes", "learnt_from", "norm_of", "open_policy"]


@dataclass(frozen=True)
class PrivateRound:
    """What one client's round depends on."""

    config: Config
    promise: Promise
    client: str
    task: Task
    encoded: Encoded
    source: NoiseSource
    pad_id: int

    @property
    def seed(self) -> int:
        """Of what is public in the round: directions, and a policy has its own."""
        return derive(self.config.seed, "train", self.client, self.task.round)


def open_policy(
    config: Config, promise: Promise, client: str, model: nn.Module, state: State,
    utility: Utility | None = None, actor: State | None = None,
) -> Policy:  # fmt: skip
    """Return a client's policy as its last round left it.

    Parameters
    ----------
    client : str
        Seeds the policy's random numbers, which are no secret.
    state : State
        What it remembered; empty before the first round.
    utility : callable, optional
        Measures on public text.
    actor : State, optional
        Of the server's own learning, for this round: ``rldp.mode = "federated"``.

    Raises
    ------
    FedtuneError
        It sees private values, or the state is not its own.
    """
    sizes = {name: p.numel() for name, p in trainable(model).items()}
    policy = policy_of(promise, sizes, derive(config.seed, "policy", client), utility)
    if state:
        policy.restore(state)
    if actor and isinstance(policy, Controller):
        policy.load_actor(whole_actor(actor, policy.config))
    return policy


def learnt_from(policy: Policy | None, actor: State) -> Tensors:
    """Return what leaves beside the update where the server learns the policy: transitions.

    They are made of what this client's mechanism has released, and cost nothing more.
    """
    if not actor or not isinstance(policy, Controller):
        return {}
    return with_mark(MADE, policy.transitions())


def by_gradients(
    given: PrivateRound, model: nn.Module, engine: PerExample, optim: torch.optim.Optimizer,
    policy: Policy,
) -> tuple[Tensors, list[dict[str, Any]]]:  # fmt: skip
    """Tune the adapter by gradients; return its difference and the log of the policy."""
    before = read(model)
    rows = tune_privately(
        model, engine, given.encoded, given.config, given.promise, optim, given.source,
        policy=policy, first=(given.task.round - 1) * given.promise.releases, pad_id=given.pad_id,
    )  # fmt: skip
    return change(model, before), rows


def by_probes(given: PrivateRound, model: nn.Module, clip_norm: float) -> tuple[Tensors, float]:
    """Tune the adapter by forward passes; return its difference and the next clip norm."""
    before = read(model)
    norm = mezo_privately(
        model, given.encoded, given.config, given.promise, given.source, lr=given.task.lr,
        seed=given.seed, clip_norm=clip_norm, pad_id=given.pad_id,
    )  # fmt: skip
    return change(model, before), norm


def norm_of(state: State, promise: Promise) -> float:
    """Return the clip norm that the last round by forward passes left, or that of the settings.

    Raises
    ------
    FedtuneError
        ``ExitCode.RESUME_REFUSED``: what was left is no clip norm.
    """
    if "clip_norm" not in state:
        return promise.settings.clip_norm
    left = state["clip_norm"].ravel()  # a file knows no number without a place
    if left.size != 1 or not 0.0 < float(left[0]) < math.inf:
        raise FedtuneError(
            f"clip_norm={left.tolist()!s:.80} in the state of this client",
            hint="restore it from a backup, or begin a new run", code=ExitCode.RESUME_REFUSED,
        )  # fmt: skip
    return float(left[0])
