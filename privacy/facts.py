"""What a run has to say about its privacy, as typed values: ``RUN/privacy_facts.json``.

Facts are what no ledger can know: who flipped the coins, what the clip was, which
model was tuned. What was spent is not here. It is read from the ledger's extract
(``RUN/ledger.json``), so that no number stands in two places.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedtune.config_privacy import Clipping
from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.events import Relation, Unit
from fedtune.privacy.rldp.shape import BITS, HELD, LOSS
from fedtune.privacy.server_view import Crossing

__all__ = [
    "Clip",
    "Data",
    "Deployment",
    "Facts",
    "Model",
    "Noise",
    "Omission",
    "Ran",
    "Sampling",
    "Steering",
    "Tuning",
    "ran_from",
    "read_facts",
    "read_model",
]

_STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

_SENSORS = (BITS, LOSS, HELD)

Positive = Annotated[float, Field(gt=0.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Whole = Annotated[int, Field(ge=1)]
Delta = Annotated[float, Field(gt=0.0, lt=1.0)]
Found = TypeVar("Found", bound=BaseModel)


class Sampling(BaseModel):
    """Which units took part in a release: the sampler that ran, not one that was planned."""

    model_config = _STRICT

    scheme: Literal["everyone", "poisson", "truncated-poisson"]
    probability: Share = 1.0
    """Of each coin; where clients differ, the largest."""
    population: Whole | None = None
    """Public number of units that coins are flipped for. Truncated Poisson needs it."""
    cap: Whole | None = None
    """Truncated Poisson: most units in one release."""
    flipped_by: Literal["client", "server"] = "client"
    source: str = ""
    """Name of the randomness, as its noise source says it."""
    secure: bool = True
    """Nobody can predict or repeat it."""

    @model_validator(mode="after")
    def _whole(self) -> Sampling:
        if self.scheme == "truncated-poisson" and (self.population is None or self.cap is None):
            raise ValueError("scheme='truncated-poisson' needs population and cap")
        if self.scheme == "everyone" and self.probability != 1.0:
            raise ValueError(f"scheme='everyone' has no probability={self.probability}")
        return self


class Steering(BaseModel):
    """How a clipping policy chose from what was released before."""

    model_config = _STRICT

    mode: str = ""
    """``rldp``: online, meta or federated."""
    reward: str = ""
    """``rldp``: what it learnt from."""
    bits: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Share of each release's privacy for clip bits, at the start."""
    loss: float = Field(default=0.0, ge=0.0, lt=0.5)
    """The same for the mean loss."""
    held_out: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Share of the units that trained nothing; their loss was released instead."""
    noise: Literal["constant", "order", "filtered"] = "constant"
    """How the noise moved over time."""

    @property
    def sensing(self) -> float:
        """Share of each release's privacy that was not the gradient's."""
        return self.bits + self.loss


class Clip(BaseModel):
    """What bounds one unit's influence."""

    model_config = _STRICT

    rule: Clipping
    norm: Positive
    """L2 norm of one unit's whole contribution, over all tensors; at the start, where it moves."""
    blocks: dict[str, float] = {}
    """Of several blocks: the norm of each, at the start."""
    policy: Steering | None = None
    """Where norms, shares or noise moved; None: they were fixed beforehand."""
    note: str = ""


class Noise(BaseModel):
    """What hides one unit's influence."""

    model_config = _STRICT

    multiplier: Positive
    """Standard deviation of the noise on the sum, over the L2 sensitivity of the sum; of
    Laplace noise its scale."""
    law: Literal["gaussian", "laplace"] = "gaussian"
    source: str
    """Name of the noise source."""
    secure: bool
    """Nobody can predict or repeat it."""
    grid: float | None = Field(default=None, gt=0.0)
    """Step of the lattice that sums and noise lie on."""
    margin: float | None = Field(default=None, ge=0.0)
    """What rounding to the lattice was allowed to add to the sensitivity, as a share of it."""


class Ran(BaseModel):
    """One mechanism as it ran. A run at example and at client level has two."""

    model_config = _STRICT

    unit: Unit
    relation: Relation
    noised_by: Literal["client", "server", "clients"]
    """``clients``: each adds a share, and only a secure sum of all comes out."""
    honest: Whole | None = None
    """``clients``: so many honest clients' shares are in every sum, at least."""
    colluding: int = Field(default=0, ge=0)
    """``clients``: so many more may be in it whose shares are known to who attacks."""
    sampling: Sampling
    clip: Clip
    noise: Noise
    denominator: Positive
    """Public constant that the noised sum is divided by."""
    rounds: int = Field(ge=0)
    """Rounds that released something."""
    steps_per_round: float = Field(default=1.0, gt=0.0)
    """Releases per round and account; where clients differ, the largest."""
    delta: Delta
    target_epsilon: float | None = Field(default=None, gt=0.0)
    units: Whole
    """Public nominal number of units that delta is compared with (delta < 1 / units)."""
    labels: dict[str, str] = {}
    """Names to show for data sets of the ledger."""


class Model(BaseModel):
    """What was tuned."""

    model_config = _STRICT

    base: str
    revision: str = ""
    fingerprint: str
    """SHA-256 over the base weights. A base model that somebody prepared can raise leakage."""
    adapter: str
    parameters: int = Field(ge=0)
    """Trained numbers; of seed pools ``adapter`` says how many are released."""


class Data(BaseModel):
    """What is public about the data."""

    model_config = _STRICT

    description: str
    clients: int = Field(ge=0)
    partition: str = ""
    """How rows became clients, and whether they are disjoint."""
    duplicates: str = "not removed: copies of one text count as several examples"


class Tuning(BaseModel):
    """How the settings of this run were found."""

    model_config = _STRICT

    how: str = "not stated"
    private: bool = False
    """Every run on this data that was tried is in the ledger."""


class Omission(BaseModel):
    """Something that no statement covers."""

    model_config = _STRICT

    what: str
    why: str


class Deployment(BaseModel):
    """Who does this and what for; registries ask for it. Empty is "not stated"."""

    model_config = _STRICT

    curator: str = ""
    product: str = ""
    purpose: str = ""
    contact: str = ""
    rationale: str = ""


class Facts(BaseModel):
    """Everything the report says that the ledger does not know.

    Examples
    --------
    >>> facts = Facts(name="demo", job="demo-1", finished="2026-11-21T12:00:00+00:00",
    ...     versions={"fedtune": "0.1.0"}, mechanisms=(),
    ...     model=Model(base="fedtune:tiny", fingerprint="", adapter="lora", parameters=10),
    ...     data=Data(description="stdlib", clients=3))
    >>> Facts.model_validate_json(facts.model_dump_json()) == facts
    True
    """

    model_config = _STRICT

    version: Literal[1] = 1
    name: str
    job: str
    """As in the ledger."""
    finished: str
    """ISO 8601 with a time zone; kept in UTC."""
    ended: Literal["finished", "budget-exhausted", "interrupted", "failed"] = "finished"
    versions: dict[str, str]
    mechanisms: tuple[Ran, ...]
    model: Model
    data: Data
    metrics: Literal["withheld", "noised", "not-private"] = "not-private"
    """``not-private``: exact measurements stay with the operator and nothing covers them."""
    tuning: Tuning = Tuning()
    per_person: Whole = 1
    """Most units (examples, or clients) that one person may stand behind."""
    covered: tuple[str, ...] = ("the model of every round, and what is computed from it",)
    not_covered: tuple[Omission, ...] = ()
    warnings: tuple[str, ...] = ()
    deployment: Deployment = Deployment()
    ledger: str = ""
    """Where the ledger is: a path, or a URL without a password. Never printed."""
    crossing: Crossing | None = None
    """What went through the cut of a split model; None: the model was not split."""

    @field_validator("finished")
    @classmethod
    def _utc(cls, value: str) -> str:
        found = datetime.fromisoformat(value)
        if found.tzinfo is None:
            raise ValueError(f"finished='{value}' has no time zone")
        return found.astimezone(UTC).isoformat(timespec="seconds")

    @model_validator(mode="after")
    def _one_each(self) -> Facts:
        units = [ran.unit for ran in self.mechanisms]
        if len(set(units)) != len(units):
            raise ValueError("two mechanisms for one unit: their charges belong in one account")
        return self


def ran_from(
    described: Mapping[str, Any],
    *,
    rule: str,
    rounds: int,
    delta: float,
    units: int,
    steps_per_round: float = 1.0,
    target_epsilon: float | None = None,
    labels: Mapping[str, str] | None = None,
    note: str = "",
) -> Ran:
    """Return the facts of a mechanism that ran, from its own description.

    Parameters
    ----------
    described : mapping
        ``Mechanism.describe(blocks, sizes, source)`` of the mechanism that ran.
    rule : str
        Clipping rule, by the name that ``clip`` has in the settings.
    rounds, delta, units, steps_per_round, target_epsilon, labels, note
        As in ``Ran`` and ``Clip``.

    Raises
    ------
    FedtuneError
        The rule has no privacy, or is not known.
    """
    if rule not in get_args(Clipping):
        raise FedtuneError(
            f"no statement can be made of rule='{rule}'",
            hint=f"one of {', '.join(get_args(Clipping))}; what looks at private values is NOT "
            "differentially private",
            code=ExitCode.PRIVACY,
        )
    at = "client" if described["unit"] == Unit.EXAMPLE.value else "server"
    scheme = {"Everyone": "everyone", "Poisson": "poisson", "TruncatedPoisson": "truncated-poisson"}
    blocks = [block for block in described["blocks"] if block["names"][0] not in _SENSORS]
    several = len(blocks) > 1
    clips = [block["clip"] for block in blocks]
    return Ran.model_validate(
        {
            "unit": described["unit"], "relation": described["relation"], "noised_by": at,
            "sampling": {
                "scheme": scheme.get(described["sampler"], described["sampler"]),
                "probability": described["sampling_probability"],
                "population": described["population"], "cap": described["cap"],
                "flipped_by": at, "source": described["noise"],
                "secure": described["noise_secure"],
            },
            "clip": {
                "rule": rule, "norm": math.hypot(*clips) if several else clips[0], "note": note,
                "blocks": {b["names"][0]: b["clip"] for b in blocks} if several else {},
            },
            "noise": {
                "multiplier": described["noise_multiplier"], "law": described["law"],
                "source": described["noise"],
                "secure": described["noise_secure"], "grid": min(b["grid"] for b in blocks),
                # Sums of whole numbers, as the server makes them, round nothing.
                "margin": described["margin_of_float_sums"] if at == "client" else None,
            },
            "denominator": described["denominator"], "rounds": rounds,
            "steps_per_round": steps_per_round, "delta": delta,
            "target_epsilon": target_epsilon, "units": units, "labels": dict(labels or {}),
        }
    )  # fmt: skip


def read_facts(path: Path) -> Facts:
    """Read ``privacy_facts.json``.

    Raises
    ------
    FedtuneError
        ``ExitCode.RUN_FOLDER`` when it is not there or not understood.
    """
    return read_model(path, Facts)


def read_model(path: Path, kind: type[Found]) -> Found:
    """Read a JSON file as a typed value, or say what is wrong with it."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise FedtuneError(
            f"'{path}' cannot be read: {error.strerror or error}",
            hint="runs with a [privacy] table leave it; the others promise nothing",
            code=ExitCode.RUN_FOLDER,
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise FedtuneError(
            f"'{path}': {where}: {first['msg']}",
            hint="the file was changed, or is of another version of fedtune",
            code=ExitCode.RUN_FOLDER,
        ) from error
