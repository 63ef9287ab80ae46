"""The owner's policy: what may be learnt from this data, whatever a server asks.

A TOML file of the owner's, strict like the experiment file. Everything in it limits;
nothing in it can widen what fedtune does by itself.
"""

from __future__ import annotations

import math
import re
import tomllib
from datetime import datetime, time
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fedtune.config import Config
from fedtune.errors import ExitCode, FedtuneError
from fedtune.model_files import weights_digest
from fedtune.privacy.events import Unit
from fedtune.privacy.plan import Promise, honest_survivors, least_survivors, promises

__all__ = ["OwnerPolicy", "asleep", "judge", "judge_model", "read_policy", "within"]

_STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)
_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")
_COLUMNS = frozenset(
    "format split text prompt completion label separator pattern encoding max_rows public".split()
)

Positive = Annotated[int, Field(ge=1)]


class OwnerPolicy(BaseModel):
    """What an owner allows. The defaults ask for a promise, and for nothing exotic."""

    model_config = _STRICT

    dataset: str = Field(default="", max_length=200)
    """Name of the text in the owner's ledger: all text about the same people has one name.
    Empty: the name of the file."""
    max_epsilon: float = Field(default=8.0, gt=0.0)
    """Over all runs on this data set, for ever. The ledger refuses what would pass it."""
    max_epsilon_per_run: float = Field(default=8.0, gt=0.0)
    """Planned bound of one run."""
    max_delta: float = Field(default=1e-5, gt=0.0, lt=1.0)
    promises: tuple[Literal["example", "client", "client-by-server", "none"], ...] = (
        "example", "client",
    )  # fmt: skip
    """Which promises are good enough. ``example``: noise at this node. ``client``: noise at
    all nodes and secure aggregation. ``client-by-server``: the server adds the noise, and is
    trusted with updates. ``none``: updates leave bare."""
    methods: tuple[str, ...] = ("backprop", "mezo", "fedkseed", "fedkseed-pro", "seedpool")
    """``sfprompt`` sends hidden states to the body's server, and is allowed by name only."""
    adapters: tuple[str, ...] = (
        "lora", "lora-frozen-a", "ia3", "layernorm", "bias", "prompt", "p-tuning-v2", "prefix",
        "full",
    )  # fmt: skip
    options: tuple[str, ...] = ()
    """Names that ``tuning.options`` may set: they go to peft as they are."""
    models: tuple[str, ...] = ()
    """Base models by the SHA-256 of their weights, as ``sha256sum model.safetensors`` prints it,
    or ``fedtune:tiny`` and the like. Empty: what the owner put on this disk, and those that
    come with fedtune."""
    min_cohort: Positive = 2
    """Fewest nodes of a secure aggregation."""
    max_honest_share: float = Field(default=1.0, gt=0.0, le=1.0)
    """``client``: refuse noise that counts on more than this share of survivors being honest."""
    min_colluding: int = Field(default=1, ge=0)
    """``client``: refuse noise that counts on all but fewer survivors than this being honest."""
    secure: bool = False
    """Refuse runs without secure aggregation."""
    hours: tuple[str, ...] = ()
    """Local times such as ``19:00-07:00`` in which this node works; empty: always."""
    rounds: int = Field(default=0, ge=0)
    """Most rounds of one run; 0: no limit."""
    rows_at_most: int = Field(default=0, ge=0)
    """Public bound on the number of rows, where their order of magnitude is a secret too. 0: the
    number rounded up to a power of two. A file with more rows is refused at the start."""
    message_mb: Positive = 256
    """Largest message, both ways."""
    insecure_noise: bool = False
    """Tests only: allow noise that anybody can take away."""
    data: dict[str, Any] = {}
    """The owner's own column names and format, such as ``text = "note"``. ``public``: a file of
    public text in the same format, for runs whose clipping policy is rewarded by such text."""

    @field_validator("hours")
    @classmethod
    def _are_hours(cls, hours: tuple[str, ...]) -> tuple[str, ...]:
        for one in hours:
            if not _HOURS.fullmatch(one):
                raise ValueError(f"'{one}' is not HH:MM-HH:MM")
        return hours

    @field_validator("data")
    @classmethod
    def _are_columns(cls, data: dict[str, Any]) -> dict[str, Any]:
        if odd := sorted(data.keys() - _COLUMNS):
            raise ValueError(f"unknown key '{odd[0]}' (known: {', '.join(sorted(_COLUMNS))})")
        if not isinstance(data.get("public", ""), str):
            raise ValueError("public is the name of a file")
        return data


def read_policy(path: Path | None, **given: Any) -> OwnerPolicy:
    """Read a policy file; what is ``given``, and not None, comes from the command line.

    Raises
    ------
    FedtuneError
        The file is missing, not TOML, or has a wrong or unknown key.
    """
    table: dict[str, Any] = {}
    if path is not None:
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise FedtuneError(
                f"policy '{path}' cannot be read: {error}", hint="it is a TOML file, docs/join.md",
                code=ExitCode.CONFIG,
            ) from error  # fmt: skip
    table |= {key: value for key, value in given.items() if value is not None}
    try:
        return OwnerPolicy.model_validate(table)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"])) or "the file"
        if problem["type"] == "extra_forbidden":
            known = ", ".join(OwnerPolicy.model_fields)
            words = f"unknown key '{place}' (known: {known})"
        else:
            words = f"{place}: {problem['msg'].removeprefix('Value error, ')}"
        raise FedtuneError(
            f"policy '{path or 'of the command line'}': {words}",
            hint="the keys are described in docs/join.md", code=ExitCode.CONFIG,
        ) from error  # fmt: skip


def judge(policy: OwnerPolicy, config: Config) -> tuple[str, ...]:
    """Return what in an experiment the owner does not allow, in plain words; empty: nothing.

    Examples
    --------
    >>> judge(OwnerPolicy(), Config())
    ("no privacy is promised (allowed: 'example', 'client')",)
    >>> judge(OwnerPolicy(promises=("none",), methods=("mezo",)), Config())
    ("tuning.method='backprop' (allowed: 'mezo')",)
    """
    tuning, secure = config.tuning, config.federation.secure
    found = [
        _outside("tuning.method", tuning.method, policy.methods),
        _outside("tuning.adapter", tuning.adapter, policy.adapters),
        *(_outside("tuning.options", name, policy.options) for name in sorted(tuning.options)),
        *_promised(policy, config),
    ]
    found += _too_much(config)
    if policy.rounds and config.federation.rounds > policy.rounds:
        found.append(f"{config.federation.rounds} rounds (at most {policy.rounds})")
    if config.privacy.insecure_seeded_noise and not policy.insecure_noise:
        found.append("noise from the seed of the experiment, which anybody can take away")
    if policy.secure and secure is None:
        found.append("no secure aggregation")
    if secure is not None and secure.min_cohort < policy.min_cohort:
        found.append(
            f"federation.secure.min_cohort={secure.min_cohort} (at least {policy.min_cohort})"
        )
    return tuple(words for words in found if words)


def judge_model(policy: OwnerPolicy, base: str) -> str:
    """Return why a base model is not allowed, or nothing; its weights are read for that."""
    if not policy.models or base in policy.models:
        return ""
    digest = weights_digest(base)
    if digest in policy.models:
        return ""
    return f"a base model with SHA-256 {digest} (it is not among the owner's models)"


def within(policy: OwnerPolicy, config: Config) -> Config:
    """Return an experiment whose own bound is not above the owner's for one run.

    Rounds that are tried again cost more than was planned; this is where they end.

    Examples
    --------
    >>> table = {"relation": "replace-special", "population": 9, "delta": 1e-3}
    >>> asked = Config.model_validate({
    ...     "data": {"pack": False, "holdout": 0.0}, "federation": {"weighting": "uniform"},
    ...     "evaluation": {"clients": 0},
    ...     "privacy": {"example": {**table, "noise_multiplier": 3.0}},
    ... })
    >>> found = within(OwnerPolicy(max_epsilon_per_run=2.0), asked).privacy.example
    >>> found.epsilon, found.noise_multiplier
    (2.0, 3.0)
    """
    update = {}
    for name in ("example", "client"):
        settings = getattr(config.privacy, name)
        if settings is not None:
            epsilon = min(settings.epsilon or math.inf, policy.max_epsilon_per_run)
            update[name] = settings.model_copy(update={"epsilon": epsilon})
    return config.model_copy(update={"privacy": config.privacy.model_copy(update=update)})


def asleep(policy: OwnerPolicy, now: datetime) -> str:
    """Return why nothing is done now, or nothing.

    Examples
    --------
    >>> night = OwnerPolicy(hours=("19:00-07:00",))
    >>> asleep(night, datetime(2026, 1, 1, 23)), asleep(night, datetime(2026, 1, 1, 12))
    ('', "outside the owner's hours (19:00-07:00)")
    """
    if not policy.hours or any(_within(one, now.time()) for one in policy.hours):
        return ""
    return f"outside the owner's hours ({', '.join(policy.hours)})"


def _within(hours: str, now: time) -> bool:
    first, last = (time.fromisoformat(part) for part in hours.split("-"))
    return first <= now < last if first <= last else now >= first or now < last


_LIMITS = {
    "rank": 1024, "tokens": 4096, "batch_size": 4096, "accumulate": 4096, "steps": 100_000,
}  # fmt: skip


def _too_much(config: Config) -> list[str]:
    """Return settings that would only exhaust this machine."""
    tuning = config.tuning
    found = [
        f"tuning.{name}={getattr(tuning, name)} (at most {most})"
        for name, most in _LIMITS.items() if getattr(tuning, name) > most
    ]  # fmt: skip
    if tuning.probe.count > 4096:
        found.append(f"tuning.probe.count={tuning.probe.count} (at most 4096)")
    if config.data.max_length > 1 << 17 or config.evaluation.batch_size > 4096:
        found.append("data.max_length or evaluation.batch_size beyond any machine")
    return found


def _outside(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value in allowed:
        return ""
    listed = ", ".join(f"'{one}'" for one in allowed) or "none"
    return f"{name}='{value}' (allowed: {listed})"


def _promised(policy: OwnerPolicy, config: Config) -> list[str]:
    """Return what is wrong with the promises: one that the owner accepts must be among them."""
    made = promises(config)
    kinds: dict[str, Promise | None] = {_kind(config, one.unit): one for one in made}
    kinds = kinds or {"none": None}
    listed = ", ".join(f"'{one}'" for one in policy.promises)
    if not set(kinds) & set(policy.promises):
        words = {
            "none": "no privacy is promised",
            "client-by-server": "the server adds the noise, and sees updates before it",
        }
        given = next(iter(kinds))
        return [f"{words.get(given, f'a promise about each {given}')} (allowed: {listed})"]
    found = []
    for kind, promise in kinds.items():
        if promise is None or kind not in policy.promises:
            continue
        if promise.delta > policy.max_delta:
            found.append(f"delta={promise.delta:g} (at most {policy.max_delta:g})")
            continue
        epsilon = promise.spent().epsilon
        if not epsilon <= policy.max_epsilon_per_run:
            found.append(
                f"epsilon {epsilon:.4g} for each {promise.unit.value} over the whole run "
                f"(at most {policy.max_epsilon_per_run:g})"
            )
        secure = config.federation.secure
        if kind == "client" and secure and secure.colluding < policy.min_colluding:
            found.append(
                f"federation.secure.colluding={secure.colluding} (at least {policy.min_colluding})"
            )
        most = policy.max_honest_share
        if kind == "client" and config.federation.secure and most < 1.0:
            trusted = honest_survivors(config) / least_survivors(config)
            if trusted > most:
                found.append(
                    f"federation.secure.colluding={config.federation.secure.colluding}: the "
                    f"promise counts on {trusted:.0%} honest survivors (at most {most:.0%})"
                )
    return found


def _kind(config: Config, unit: Unit) -> str:
    client = config.privacy.client
    if unit is Unit.EXAMPLE or client is None:
        return unit.value
    return "client" if client.noise_at == "clients" else "client-by-server"
