"""The tables of the experiment file that promise something: ``[privacy]`` and below."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["ClientPrivacyConfig", "ExamplePrivacyConfig", "PrivacyConfig"]

_STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

Positive = Annotated[int, Field(ge=1)]
Clipping = Literal["flat", "per-adapter", "automatic", "quantile"]
Relation = Literal["add-or-remove-one", "replace-special"]


def _target(epsilon: float, noise_multiplier: float, delta: float, population: int) -> None:
    if not epsilon and not noise_multiplier:
        raise ValueError("give epsilon (the noise is found for it), or noise_multiplier, or both")
    if delta * population >= 1:
        raise ValueError(
            f"delta={delta:g} with population={population}: a delta of 1/population or more "
            f"allows to give whole units away; use less than {1 / population:.3g}"
        )


class ExamplePrivacyConfig(BaseModel):
    """Each training example of each client is hidden: DP-SGD at the client.

    ``relation``, ``population`` and ``delta`` have no defaults on purpose: a bound
    without them says nothing.
    """

    model_config = _STRICT

    relation: Relation
    """``add-or-remove-one``: the number of examples is private. ``replace-special``: public."""
    population: Positive
    """Public nominal number of examples per client. The true number is never used:
    one example takes part in a step with probability batch / population."""
    delta: float = Field(gt=0.0, lt=1.0)
    epsilon: float = Field(default=0.0, ge=0.0)
    """Bound for a client that takes part in every round. 0: none, noise_multiplier rules."""
    noise_multiplier: float = Field(default=0.0, ge=0.0)
    """Noise over sensitivity. 0: the smallest that keeps ``epsilon``."""
    noise: Literal["gaussian", "laplace"] = "gaussian"
    """``laplace``: epsilon holds at delta 0 too. For one number per step: a method of forward
    passes with one direction in each."""
    sampler: Literal["poisson", "everyone"] = "poisson"
    clip: Clipping = "flat"
    clip_norm: float = Field(default=1.0, gt=0.0)
    """L2 norm of one example's gradient (``per-adapter``: of all blocks together); of its
    coefficients over their number, where those are released."""
    quantile: float = Field(default=0.5, gt=0.0, lt=1.0)
    """``quantile``: share of examples that should not be clipped (Andrew et al. 2021)."""
    quantile_lr: float = Field(default=0.2, gt=0.0)
    quantile_noise: float = Field(default=0.0, ge=0.0)
    """``quantile``: noise on the count of bits; 0: a twentieth of the expected batch."""

    @model_validator(mode="after")
    def _possible(self) -> ExamplePrivacyConfig:
        _target(self.epsilon, self.noise_multiplier, self.delta, self.population)
        if self.noise == "laplace" and self.clip != "flat":
            raise ValueError(
                f"noise='laplace' with clip='{self.clip}': it is for one number, use clip='flat'"
            )
        return self


class ClientPrivacyConfig(BaseModel):
    """Everything that one client contributes is hidden from who gets the model.

    With ``noise_at = "server"`` the server is trusted: it sees updates before the noise.
    """

    model_config = _STRICT

    relation: Relation
    population: Positive
    """Public nominal number of clients: ``federation.cohort`` of them is the denominator."""
    delta: float = Field(gt=0.0, lt=1.0)
    epsilon: float = Field(default=0.0, ge=0.0)
    """Bound of the whole run. 0: none, noise_multiplier rules."""
    noise_multiplier: float = Field(default=0.0, ge=0.0)
    noise_at: Literal["server", "clients"] = "server"
    """``clients``: each adds a share of the noise, and the server, which needs
    ``[federation.secure]``, sees the noisy sum alone: it need not be trusted."""
    sampler: Literal["poisson", "truncated-poisson", "everyone"] = "poisson"
    """Who takes part in a round: an independent secret coin per client, or everybody."""
    cap: int = Field(default=0, ge=0)
    """``truncated-poisson``: largest cohort."""
    clip: Literal["flat", "quantile"] = "flat"
    clip_norm: float = Field(default=1.0, gt=0.0)
    """L2 norm of one client's update."""
    quantile: float = Field(default=0.5, gt=0.0, lt=1.0)
    quantile_lr: float = Field(default=0.2, gt=0.0)
    quantile_noise: float = Field(default=0.0, ge=0.0)

    @model_validator(mode="after")
    def _possible(self) -> ClientPrivacyConfig:
        _target(self.epsilon, self.noise_multiplier, self.delta, self.population)
        if (self.sampler == "truncated-poisson") != bool(self.cap):
            raise ValueError("sampler='truncated-poisson' and cap belong together")
        if self.noise_at == "clients" and (self.sampler != "everyone" or self.clip != "flat"):
            raise ValueError(
                f"noise_at='clients' with sampler='{self.sampler}', clip='{self.clip}': the server "
                "knows who takes part, so no sampling counts; use sampler='everyone', clip='flat'"
            )
        if self.noise_at == "clients" and self.relation != "replace-special":
            raise ValueError(
                "noise_at='clients' is accounted with a public cohort: relation='replace-special'"
            )
        if self.cap and self.relation != "replace-special":
            raise ValueError(
                "sampler='truncated-poisson' is accounted with a public number of clients only: "
                "relation='replace-special'"
            )
        return self


class PrivacyConfig(BaseModel):
    """What is promised, to whom, and where the budget is kept. No table, no promise."""

    model_config = _STRICT

    example: ExamplePrivacyConfig | None = None
    client: ClientPrivacyConfig | None = None
    ledger: str = ""
    """File or database URL of the ledger. Empty: ``ledger.db`` in ``output.folder``."""
    dataset: str = Field(default="", max_length=200)
    """Name of the data in the ledger: a budget belongs to people, not to a job, so all
    runs on the same people must use the same name. Empty: the name of ``data.source``."""
    records_per_person: Positive = 1
    """Most units (examples, or clients) that one person may stand behind; for the report."""
    insecure_seeded_noise: bool = False
    """Tests only: noise and coins from ``seed``, so anybody can take the noise away."""

    @property
    def on(self) -> bool:
        """Whether anything is promised."""
        return self.example is not None or self.client is not None
