"""RLDP: a soft actor-critic that moves clip norms, shares and noise, and sees releases alone.

Every K releases it decides. Between decisions norms follow the quantile rule (Andrew et al.
2021) block by block, as they do in the warm-up: an action of zeros goes on with it, with
shares in closed form. Others push norms and the rule's targets up or down, so that what is
learnt is learnt on top of the best simple rule. What the controller sees went through the
mechanism (``features.py``), so the guarantee covers it: research note, sections D and E.
``preset = "paper"`` has the published settings (arXiv 2507.22565) where they are known, and
no rule after the warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.resources import as_file, files
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from fedtune.config_privacy import RldpConfig
from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.rldp.actions import ACTIONS, ActionSpace, interval_of, noise_of
from fedtune.privacy.rldp.features import STATES, Context, Interval, Reading, features, read
from fedtune.privacy.rldp.joint import Seen
from fedtune.privacy.rldp.policy import Job, State
from fedtune.privacy.rldp.quantiles import norms_of, quantile_of
from fedtune.privacy.rldp.raw import RawController
from fedtune.privacy.rldp.reward import Yardstick, over_pacing, reward
from fedtune.privacy.rldp.sac import Sac, SacSettings, Transition
from fedtune.privacy.rldp.shape import Sensing, Shape
from fedtune.privacy.rldp.sight import require_sight
from fedtune.privacy.rldp.transitions import PARTS, packed, transitions_of

__all__ = [
    "ACTIONS",
    "POLICY_FILE",
    "STATES",
    "Controller",
    "RawController",
    "raw_sensing",
    "rldp",
    "settings_of",
    "transitions_of",
]

POLICY_FILE = "assets/rldp/policy.safetensors"
"""What was learnt on public text, in the package: ``simulations/meta_rldp.py`` makes it."""

_HIDDEN = (64, 64)


def settings_of(config: RldpConfig) -> SacSettings:
    """Return the settings of the soft actor-critic for a mode.

    Examples
    --------
    >>> paper = settings_of(RldpConfig(mode="online", preset="paper"))
    >>> paper.batch_size, paper.updates
    (4, 2)
    """
    if config.preset == "paper":
        return SacSettings(hidden=_HIDDEN, batch_size=4, updates=2, start=4)
    if config.mode == "meta":
        # Adapted, not learnt anew: a few dozen noisy decisions say little.
        return SacSettings(hidden=_HIDDEN, lr=3e-5, updates=1)
    # A few dozen decisions: entropy must not be worth more than what can be learnt in them.
    return SacSettings(hidden=_HIDDEN, lr=1e-3, updates=8, gamma=0.9, first_temperature=0.1)


def rldp(job: Job) -> Controller:
    """Return the controller of a job; ``job.options["rldp"]`` has its settings.

    Raises
    ------
    FedtuneError
        It would have nothing to learn from, or the shipped policy cannot be read.
    """
    return Controller(job, _sensing(job))


def raw_sensing(job: Job) -> RawController:
    """Return the same controller with private norms and losses: NOT differentially private.

    For comparison alone: nothing that it touched may be given a privacy statement.
    """
    return RawController(Controller(job, Sensing()))


class Controller:
    """The policy ``rldp``; see `Policy`.

    Parameters
    ----------
    job : Job
    sensing : Sensing

    Attributes
    ----------
    config : RldpConfig
    mean : bool
        It does what it thinks best, and does not explore.
    faults : int
        How often its network gave no numbers, and was replaced.
    """

    honest = True

    def __init__(self, job: Job, sensing: Sensing) -> None:
        self.config = config = _config(job)
        self._job, self._sensing = job, sensing
        self._space = ActionSpace(job.sizes, job.clip_norm, config.factors)
        self._quantile = quantile_of(job)
        self._warmup = math.ceil(config.warmup * job.steps)
        self._rewarded = config.reward != "loss" or job.losses
        if config.reward == "public" and job.utility is None:
            raise _refused("reward='public' without public text", "set rldp.public")
        if not self._rewarded and config.mode != "meta":
            raise _refused(
                f"mode='{config.mode}' with reward='loss', where units have no loss",
                "use rldp.reward='public', or rldp.mode='meta'",
            )
        self.mean = config.mode == "meta"
        self._make = _maker(config, job.seed)
        self._sac = self._make()
        self._shape = self._space.start()
        self._interval = Interval(len(self._space.blocks))
        self._yard = Yardstick()
        self._action = np.zeros(ACTIONS)
        self._state = np.zeros(STATES, np.float32)
        self._step = self._decided = self.faults = 0
        self._due = self._begun = False
        self._spent = self._utility = self._variance = 0.0
        self._new: list[Transition] = []
        self._said: list[dict[str, Any]] = []

    @property
    def sensing(self) -> Sensing:
        """See `Policy`."""
        return self._sensing

    @property
    def interval(self) -> int:
        """K: releases between decisions."""
        return interval_of(self.config, self._job.steps)

    def shape(self) -> Shape:
        """See `Policy`. Decides here, when weights have taken the last release in."""
        if self._due:
            self._due = False
            self._decide()
        return self._shape

    def wanted_noise(self) -> float | None:
        """See `Policy`. None with constant noise, and for a policy that learnt with it."""
        if self.config.noise == "constant" or self.config.mode == "meta":
            return None
        self.shape()
        return noise_of(self._action, self._job.noise_multiplier, self.config.spread)

    def observe(self, seen: Seen) -> None:
        """See `Policy`."""
        self.take(read(seen))

    def take(self, reading: Reading) -> None:
        """Take note of a release as plain numbers."""
        self._step = reading.step + 1
        self._spent += reading.noise_multiplier**-2
        self._interval.add(reading)
        if reading.inside is not None and not (self._decided and self.config.preset):
            self._shape = self._space.followed(
                self._shape, self._quantile, reading.inside, self._action
            )
        self._due = self._interval.count >= self.interval

    def decisions(self) -> list[dict[str, Any]]:
        """Return step, action, reward and utility of each decision since the last call."""
        said, self._said = self._said, []
        return said

    def transitions(self) -> State:
        """Return what the server learns from, since the last call (``mode = "federated"``).

        Made of released and public values alone: ``state``, ``next_state`` (n, 30),
        ``action`` (n, 9), ``reward``, ``done`` (n,), all float32.
        """
        new, self._new = self._new, []
        return packed(new)

    def load_actor(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take over what the server learnt (`Sac.actor_state`).

        Raises
        ------
        FedtuneError
            ``ExitCode.MODEL``: it is not of this controller's sizes, or has NaN.
        """
        self._sac.load_actor(state)

    def state(self) -> State:
        """See `Policy`. What `decisions` has not returned yet is not in it."""
        flags = (self._step, self._decided, self.faults, int(self._due), int(self._begun))
        numbers = (
            self._spent, self._utility, self._variance, self._yard.squares, self._yard.count
        )  # fmt: skip
        return {
            "counts": np.array(flags, np.int64),
            "numbers": np.array(numbers),
            "norms": np.array(self._shape.norms), "shares": np.array(self._shape.shares),
            "action": self._action.copy(), "seen": self._state.copy(),
            **{f"interval.{k}": v for k, v in self._interval.state().items()},
            **{f"new.{k}": v for k, v in packed(self._new).items()},
            **{f"sac.{k}": v for k, v in self._sac.state().items()},
        }  # fmt: skip

    def restore(self, state: State) -> None:
        """See `Policy`. Nothing has changed when it raises."""
        own = {k: v for k, v in self.state().items() if not k.startswith("sac.")}
        rest = {k: v for k, v in state.items() if not k.startswith("sac.")}
        _require_like(rest, own, self._interval_sizes())
        starts = self._space.start().norms
        norms = norms_of({"norms": rest["norms"]}, starts, "rldp")
        shape = Shape(self._space.blocks, norms, tuple(rest["shares"].tolist()))
        new = transitions_of({k[4:]: v for k, v in rest.items() if k.startswith("new.")})
        sac = self._make()
        sac.restore({k[4:]: v for k, v in state.items() if k.startswith("sac.")})
        self._sac, self._shape = sac, shape
        self._step, self._decided, self.faults, due, begun = rest["counts"].tolist()
        self._due, self._begun = bool(due), bool(begun)
        numbers = rest["numbers"].tolist()
        self._spent, self._utility, self._variance = numbers[:3]
        self._yard = Yardstick(*numbers[3:])
        self._action, self._state = rest["action"].copy(), rest["seen"].copy()
        self._interval.restore({k[9:]: v for k, v in rest.items() if k.startswith("interval.")})
        self._new, self._said = new, []

    def _interval_sizes(self) -> tuple[int, int]:
        whole = int(self._space.numbers.sum())
        return 0, Interval.kept(whole)

    def _measured(self) -> tuple[float, float] | None:
        """Return the utility now and the variance of its noise."""
        if self.config.reward == "public":
            measure = self._job.utility
            value = None if measure is None else require_sight(measure())
            return None if value is None else (float(value), 0.0)
        found = self._interval.mean("held" if self.config.reward == "held-out" else "loss")
        return None if found is None else (-found[0], found[1])

    def _decide(self) -> None:
        """Close the interval: see what came of the last action, learn, and act."""
        measured = self._measured() if self._rewarded else None
        utility, variance = (self._utility, self._variance) if measured is None else measured
        change, deviation, gained = 0.0, 1.0, 0.0
        if measured is not None and self._begun:
            change = utility - self._utility
            noise = math.sqrt(variance + self._variance)
            deviation = noise or self._yard.take(change)
            over = over_pacing(self._spent, self._step, self._job.noise_multiplier)
            gained = reward(change, deviation, over if self.config.noise != "constant" else 0.0)
        context = Context(
            done=min(1.0, self._step / self._job.steps),
            noise_multiplier=self._job.noise_multiplier, denominator=self._job.denominator,
            level=utility, gain=change / deviation, action=self._action,
        )  # fmt: skip
        state = features(self._interval, self._shape, self._space, context)
        self._interval = self._interval.next()
        self._begun = self._begun or measured is not None
        self._utility, self._variance = utility, variance
        if self._step < self._warmup:
            return
        fine = self._learnt(state, gained)
        fine = self._acted(state) and fine
        self._state = state
        self._decided += 1
        said = {"decision": self._decided, "action": [round(float(a), 6) for a in self._action]}
        if measured is not None:
            said |= {"reward": gained, "utility": utility}
        self._said.append(said if fine else said | {"fault": True})

    def _learnt(self, state: NDArray[np.float32], gained: float) -> bool:
        """Learn from the last action, or keep it for the server; say whether all is well."""
        if not (self._decided and self._rewarded):
            return True
        action = self._action.astype(np.float32)
        made = Transition(self._state, action, gained, state, False)
        if self.config.mode == "federated":
            self._new.append(made)
            return True
        try:
            losses = self._sac.learn(made)
        except FedtuneError:
            return self._failed()
        if losses is not None and not math.isfinite(losses.critic + losses.actor):
            return self._failed()
        return True

    def _acted(self, state: NDArray[np.float32]) -> bool:
        """Act; the last shape stays when the action is no action."""
        try:
            action = np.asarray(self._sac.act(state, mean=self.mean), np.float64)
            self._shape = self._space.apply(self._shape, action)
        except FedtuneError:
            return self._failed()
        self._action = action
        return True

    def _failed(self) -> bool:
        """Begin with a new actor: one with NaN could be neither used nor saved."""
        self.faults += 1
        self._sac = self._make()
        return False


def _config(job: Job) -> RldpConfig:
    given = job.options.get("rldp")
    return given if isinstance(given, RldpConfig) else RldpConfig()


def _sensing(job: Job) -> Sensing:
    config = _config(job)
    share, losses = config.sensing, config.reward == "loss" and job.losses
    return Sensing(
        bits=share / 2.0 if losses else share, loss=share / 2.0 if losses else 0.0,
        loss_clip=config.loss_clip, held=config.reward == "held-out",
    )  # fmt: skip


def _maker(config: RldpConfig, seed: int) -> Callable[[], Sac]:
    settings = settings_of(config)
    shipped = _shipped() if config.mode == "meta" else None

    def make() -> Sac:
        sac = Sac(STATES, ACTIONS, settings, seed)
        if shipped is not None:
            sac.load_actor(shipped)
        return sac

    return make


@lru_cache(maxsize=1)
def _shipped() -> dict[str, NDArray[Any]]:
    with as_file(files("fedtune").joinpath(POLICY_FILE)) as path:
        if not path.is_file():
            raise _refused(
                f"{POLICY_FILE} is not in this installation",
                "install fedtune again, or use rldp.mode='online'",
            )
        return load_file(path)


def _require_like(state: State, own: State, gradient: tuple[int, int]) -> None:
    """Raise unless names, types and sizes are as they should be, and all numbers finite."""
    free = {f"new.{name}" for name in PARTS}  # checked by transitions_of
    sized = {"interval.direction", "interval.before"}
    fine = set(state) == set(own)
    for name in own if fine else ():
        value = state[name]
        shape = value.shape if name in free else own[name].shape
        if name in sized:
            shape = (len(value),) if value.ndim == 1 and len(value) in gradient else (-1,)
        fine = fine and value.shape == shape and value.dtype == own[name].dtype
        fine = fine and bool(np.isfinite(value).all())
    if not fine:
        raise FedtuneError(
            "the controller's state is not of this run: names, sizes or numbers differ",
            hint="resume with the settings the run began with", code=ExitCode.RESUME_REFUSED,
        )  # fmt: skip


def _refused(message: str, hint: str) -> FedtuneError:
    return FedtuneError(f"rldp: {message}", hint=hint, code=ExitCode.CONFIG)
