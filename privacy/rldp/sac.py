"""Soft actor-critic, small and exact to the bit, for a controller that decides a few dozen times.

Haarnoja et al. 2018, arXiv:1812.05905: algorithm 1 with the automatic temperature of its
section 5, twin critics with their minimum, target critics, and a tanh-squashed Gaussian.
It runs beside a training run: it costs next to nothing, touches no random numbers but its
own, and goes on after a restart with the same bits (on the same machine, version of torch
and number of threads).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.rldp import sac_nets as nets
from fedtune.privacy.rldp.sac_memory import Memory, Transition, check_state, foreign, row

__all__ = ["Sac", "SacLosses", "SacSettings", "Transition"]

Array = NDArray[Any]

EDGE = 1 - 1e-6  # tanh reaches 1 in float32: an action never does
TOGETHER = 16  # gradient steps whose batches are drawn in one go


@dataclass(frozen=True)
class SacSettings:
    """What a soft actor-critic is told before it starts.

    Attributes
    ----------
    hidden : tuple of int
        Units of the hidden layers, of the actor and of each critic.
    gamma, tau : float
        Discount; share of the critics that their targets take on per step. In (0, 1].
    lr : float
        Learning rate of the actor, the critics and the temperature (Adam).
    batch_size, buffer : int
        Transitions per gradient step, drawn with replacement; transitions kept, the
        oldest make room.
    start, updates : int
        Learning starts with so many transitions, and then takes so many gradient steps
        for each.
    target_entropy : float, optional
        In nats; ``None``: minus the number of actions.
    first_temperature : float
        Weight of the entropy at the start; it adapts.
    normalise : bool
        Centre and scale states by what was seen so far.
    """

    hidden: tuple[int, ...] = (64, 64)
    gamma: float = 0.99
    tau: float = 0.005
    lr: float = 3e-4
    batch_size: int = 64
    buffer: int = 2048
    start: int = 8
    updates: int = 8
    target_entropy: float | None = None
    first_temperature: float = 1.0
    normalise: bool = True


@dataclass(frozen=True)
class SacLosses:
    """What learning looked like: means over the gradient steps of one call.

    Attributes
    ----------
    critic, actor : float
    temperature, entropy : float
        The weight of the entropy, and the policy's entropy in nats.
    """

    critic: float
    actor: float
    temperature: float
    entropy: float


class Sac:
    """A soft actor-critic with its replay buffer and its own random numbers.

    Parameters
    ----------
    states, actions : int
        Numbers in a state and in an action.
    settings : SacSettings, optional
    seed : int

    Raises
    ------
    FedtuneError
        For a setting out of its range.

    Examples
    --------
    >>> sac = Sac(3, 2, seed=1)
    >>> action = sac.act(np.zeros(3))
    >>> action.shape, bool(abs(action).max() < 1), sac.transitions
    ((2,), True, 0)
    >>> sac.learn(Transition(np.zeros(3), action, 0.5, np.ones(3), False)) is None
    True
    """

    def __init__(
        self, states: int, actions: int, settings: SacSettings | None = None, seed: int = 0
    ) -> None:
        settings = SacSettings() if settings is None else settings
        _check(states, actions, settings, seed)
        self.states, self.actions, self.settings = states, actions, settings
        wanted = settings.target_entropy
        self.target_entropy = float(-actions if wanted is None else wanted)
        self._generator = torch.Generator(device="cpu").manual_seed(seed)
        to_action = (states, *settings.hidden, 2 * actions)
        to_value = (states + actions, *settings.hidden, 1)
        self._actor, self._actor_gradient = nets.net(1, to_action), nets.net(1, to_action)
        self._critic, self._critic_gradient = nets.net(2, to_value), nets.net(2, to_value)
        self._target = nets.net(2, to_value)
        nets.fill(self._actor, self._generator)
        nets.fill(self._critic, self._generator)
        self._target.flat.copy_(self._critic.flat)
        self._moments = {"actor": nets.adam(self._actor), "critic": nets.adam(self._critic)}
        self._log_temperature = math.log(settings.first_temperature)
        self._temperature_moments = np.zeros(2)
        self._steps = 0
        self._memory = Memory(states, actions, settings.buffer, settings.normalise)

    @property
    def temperature(self) -> float:
        """The weight of the entropy now."""
        return math.exp(self._log_temperature)

    @property
    def transitions(self) -> int:
        """Transitions in the buffer."""
        return self._memory.kept

    def act(self, state: Array, *, mean: bool = False) -> NDArray[np.float32]:
        """Return an action in (-1, 1): a draw, or the squashed mean, which draws nothing.

        Parameters
        ----------
        state : ndarray, (states,)
        mean : bool

        Raises
        ------
        FedtuneError
            For a state of another shape, or with NaN or infinity.
        """
        seen = self._memory.normalised(row("state", state, self.states))
        out = nets.forward(self._actor, torch.from_numpy(seen)[None, None])[-1]
        action, log_std = out.chunk(2, -1)
        if not mean:
            noise = self._noise(1, 1, self.actions)
            action, _ = nets.squashed(action, log_std.clamp(*nets.LOG_STD), noise)
        return cast(NDArray[np.float32], action.tanh().clamp(-EDGE, EDGE).numpy()[0, 0])

    def learn(self, transition: Transition) -> SacLosses | None:
        """Keep a transition, and learn from those kept.

        Returns
        -------
        SacLosses or None
            None while fewer than ``settings.start`` were kept.

        Raises
        ------
        FedtuneError
            For a transition of another shape, with NaN or infinity, or with an action
            outside [-1, 1], of which nothing is kept; or when learning ran away.
        """
        self._memory.keep(transition)
        if self._memory.seen < self.settings.start:
            return None
        return self._learn(self.settings.updates)

    def pretrain(self, transitions: Iterable[Transition], updates: int) -> SacLosses | None:
        """Keep all transitions, then take so many gradient steps: learning off policy.

        Returns
        -------
        SacLosses or None
            None without a gradient step.

        Raises
        ------
        FedtuneError
            As `learn`, and when there is nothing to learn from.
        """
        for transition in transitions:
            self._memory.keep(transition)
        if updates < 1:
            return None
        if not self.transitions:
            raise FedtuneError(f"{updates} updates from 0 transitions", hint="give at least one")
        return self._learn(updates)

    def state(self) -> dict[str, Array]:
        """Return copies of everything: networks, moments, temperature, buffer, generator."""
        found = self.actor_state() | self._memory.buffer_state()
        for name, moments in self._moments.items():
            found[f"{name}.moment1"] = moments.moment1.numpy().copy()
            found[f"{name}.moment2"] = moments.moment2.numpy().copy()
        found["temperature.moment1"], found["temperature.moment2"] = (
            self._temperature_moments[at : at + 1].copy() for at in range(2)
        )
        found["steps"] = np.array([self._steps], np.int64)
        found["generator"] = self._generator.get_state().numpy().copy()
        return found

    def actor_state(self) -> dict[str, Array]:
        """Return copies of what was learnt: actor, critics, temperature, mean of states."""
        found: dict[str, Array] = {}
        for name, net in self._nets().items():
            found |= nets.write(net, name)
        found["temperature"] = np.array([self._log_temperature])
        return found | self._memory.seen_state()

    def restore(self, state: Mapping[str, Array]) -> None:
        """Become the one whose `state` this is, to the bit; it had the same settings.

        Raises
        ------
        FedtuneError
            For names, shapes or types that do not belong, and for NaN; nothing has
            changed then.
        """
        refused = ExitCode.RESUME_REFUSED
        check_state(state, self.state(), self.settings.buffer, refused)
        generator = torch.Generator(device="cpu")
        try:
            generator.set_state(torch.from_numpy(state["generator"].copy()))
        except RuntimeError as error:
            raise foreign("generator", str(error), refused) from error
        self._generator = generator
        self._take(state)
        for name, moments in self._moments.items():
            moments.moment1.numpy()[:] = state[f"{name}.moment1"]
            moments.moment2.numpy()[:] = state[f"{name}.moment2"]
        self._temperature_moments[:1] = state["temperature.moment1"]
        self._temperature_moments[1:] = state["temperature.moment2"]
        self._steps = int(state["steps"][0])
        self._memory.set_buffer(state)

    def load_actor(self, state: Mapping[str, Array]) -> None:
        """Take over what another learnt, its `actor_state`; buffer and generator stay.

        Raises
        ------
        FedtuneError
            As `restore`.
        """
        check_state(state, self.actor_state(), self.settings.buffer, ExitCode.MODEL)
        self._take(state)
        for moments in self._moments.values():
            moments.moment1.zero_()
            moments.moment2.zero_()
        self._temperature_moments[:] = 0
        self._steps = 0

    def _nets(self) -> dict[str, nets.Net]:
        return {"actor": self._actor, "critic": self._critic, "target": self._target}

    def _take(self, state: Mapping[str, Array]) -> None:
        for name, net in self._nets().items():
            nets.read(net, name, state)
        self._log_temperature = float(state["temperature"][0])
        self._memory.set_seen(state)

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu")

    def _learn(self, updates: int) -> SacLosses:
        size, total = self.settings.batch_size, np.zeros(4)
        for first in range(0, updates, TOGETHER):
            count = min(TOGETHER, updates - first)
            picked = torch.randint(
                self.transitions, (count, size), generator=self._generator, device="cpu"
            ).numpy()
            noise = self._noise(count, 1, 2 * size, self.actions)
            rows = {name: kept[picked] for name, kept in self._memory.rows.items()}
            states = np.concatenate([rows["state"], rows["next_state"]], axis=1)[:, None]
            batches = (
                torch.from_numpy(self._memory.normalised(states)),
                *(torch.from_numpy(rows[name]) for name in ("action", "reward", "going")),
                noise,
            )
            for batch in zip(*batches, strict=True):
                total += self._step(*batch)
        if not np.isfinite(total).all():
            raise FedtuneError(
                f"losses={total / updates}", hint="the learning ran away: lower lr, scale rewards"
            )
        return SacLosses(*(float(value) for value in total / updates))

    def _step(
        self, states: Tensor, actions: Tensor, rewards: Tensor, going: Tensor, noise: Tensor
    ) -> tuple[float, float, float, float]:
        """Take one gradient step.

        ``states`` (1, 2 batch, states): these, then the next ones; ``noise`` likewise;
        ``actions`` (batch, actions); ``rewards`` and ``going`` (batch, 1).
        """
        settings, size, temperature = self.settings, len(rewards), self.temperature
        self._steps += 1
        layers = nets.forward(self._actor, states)
        middle, wide = layers[-1].chunk(2, -1)
        log_std = wide.clamp(*nets.LOG_STD)
        before, log_probability = nets.squashed(middle, log_std, noise)
        drawn = before.tanh()
        entropy = -float(log_probability[0, :size].mean())

        # the critics, towards the lesser target at the next state (equations 5 and 6)
        after = nets.forward(self._target, _pair(states[:, size:], drawn[:, size:]))[-1].amin(0)
        worth = after - temperature * log_probability[0, size:]
        goal = rewards + settings.gamma * going * worth
        asked = nets.forward(self._critic, _pair(states[:, :size], actions[None]))
        error = asked[-1] - goal
        critic_loss = 0.5 * float(error.square().sum()) / size
        nets.gradients(self._critic, asked, error / size, self._critic_gradient)
        moments = self._moments["critic"]
        nets.step(self._critic, self._critic_gradient, moments, settings.lr, self._steps)

        # the actor, by way of its action, through the lesser critic (equations 9 and 10)
        drawn, moved = drawn[:, :size], before[:, :size] - middle[:, :size]
        asked = nets.forward(self._critic, _pair(states[:, :size], drawn))
        first = (asked[-1][0] <= asked[-1][1]).to(torch.float32)
        by_value = torch.stack([first, 1 - first]).mul_(-1 / size)
        by_input = nets.input_gradient(self._critic, asked, by_value)
        by_drawn = by_input[..., self.states :].sum(0, keepdim=True)
        share = temperature / size
        by_mean = 2 * share * drawn + by_drawn * (1 - drawn * drawn)
        by_log_std = (by_mean * moved - share) * (wide == log_std)[:, :size]
        by_out = torch.cat([by_mean, by_log_std], -1)
        kept = [layer[:, :size] for layer in layers]
        nets.gradients(self._actor, kept, by_out, self._actor_gradient)
        moments = self._moments["actor"]
        nets.step(self._actor, self._actor_gradient, moments, settings.lr, self._steps)
        actor_loss = -temperature * entropy - float(asked[-1].amin(0).mean())

        # the temperature, on its logarithm (equation 18), and the targets
        self._log_temperature = nets.step_number(
            self._log_temperature, entropy - self.target_entropy, self._temperature_moments,
            settings.lr, self._steps,
        )  # fmt: skip
        self._target.flat.lerp_(self._critic.flat, settings.tau)
        return critic_loss, actor_loss, temperature, entropy


def _pair(states: Tensor, actions: Tensor) -> Tensor:
    """Return what both critics are asked, (2, batch, states + actions)."""
    return torch.cat([states, actions], -1).expand(2, -1, -1)


def _check(states: int, actions: int, settings: SacSettings, seed: int) -> None:
    counts = {
        "states": states, "actions": actions, "hidden": min(settings.hidden, default=1),
        "batch_size": settings.batch_size, "buffer": settings.buffer, "start": settings.start,
        "updates": settings.updates,
    }  # fmt: skip
    shares = {"gamma": settings.gamma, "tau": settings.tau}
    sizes = {"lr": settings.lr, "first_temperature": settings.first_temperature}
    for name, value in counts.items():
        if value < 1:
            raise _wrong(name, value, "use at least 1")
    for name, share in shares.items():
        if not 0 < share <= 1:
            raise _wrong(name, share, "use more than 0 and at most 1")
    for name, size in sizes.items():
        if not 0 < size < math.inf:
            raise _wrong(name, size, "use more than 0")
    if settings.target_entropy is not None and not math.isfinite(settings.target_entropy):
        raise _wrong("target_entropy", settings.target_entropy, "use a number of nats, or none")
    if not 0 <= seed < 1 << 63:
        raise _wrong("seed", seed, "use 0 to 2^63 - 1")


def _wrong(name: str, value: float, hint: str) -> FedtuneError:
    return FedtuneError(f"{name}={value}", hint=hint, code=ExitCode.CONFIG)
