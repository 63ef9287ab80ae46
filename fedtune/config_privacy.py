"""The tables of the experiment file that promise something: ``[privacy]`` and below."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["ClientPrivacyConfig", "ExamplePrivacyConfig", "PrivacyConfig", "RldpConfig"]

_STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

Positive = Annotated[int, Field(ge=1)]
Clipping = Literal[
    "flat", "per-adapter", "automatic", "quantile", "quantile-per-adapter", "closed-form",
    "dp-lac", "geoclip", "random", "constant", "rldp",
]  # fmt: skip
Relation = Literal["add-or-remove-one", "replace-special"]


def _target(epsilon: float, noise_multiplier: float, delta: float, population: int) -> None:
    if not epsilon and not noise_multiplier:
        raise ValueError("give epsilon (the noise is found for it), or noise_multiplier, or both")
    if delta * population >= 1:
        raise ValueError(
            f"delta={delta:g} with population={population}: a delta of 1/population or more "
            f"allows to give whole units away; use less than {1 / population:.3g}"
        )


def _rldp_fits(clip: str, rldp: RldpConfig | None, constant: tuple[float, ...]) -> None:
    if rldp is not None and clip not in ("rldp", "random", "constant"):
        raise ValueError(f"clip='{clip}' with a table rldp: it is for clip='rldp'")
    if (clip == "constant") != bool(constant):
        raise ValueError(f"clip='{clip}' with constant={list(constant)}: they belong together")
    if not all(-1.0 <= one <= 1.0 for one in constant):
        raise ValueError(f"constant={list(constant)}: each number is from -1 to 1")
    if clip == "rldp" and rldp is not None and rldp.noise != "constant" and rldp.mode == "meta":
        raise ValueError(
            f"rldp.noise='{rldp.noise}' with rldp.mode='meta': that policy learnt with constant "
            "noise and would never move it; use rldp.mode='online', or rldp.noise='constant'"
        )


class RldpConfig(BaseModel):
    """``[privacy.example.rldp]``, ``[privacy.client.rldp]``: the learning controller.

    Whatever it does, epsilon is that of the noise multiplier: it chooses from what was
    released before (docs/rldp.md).
    """

    model_config = _STRICT

    mode: Literal["online", "meta", "federated"] = "meta"
    """``online``: from scratch, during the run, as published. ``meta``: trained beforehand on
    public text, and adapted. ``federated``: one policy for all clients, learnt at the server
    from what they released."""
    preset: Literal["", "paper"] = ""
    """``paper``: settings of the published code where they are known (decision every 112
    steps, minibatches of 4, 2 updates), and ``mode = "online"``."""
    sensing: float = Field(default=0.01, ge=0.0, lt=0.2)
    """Share of each release's privacy for clip bits and a loss; 1 % is 0.5 % more noise."""
    loss_clip: float = Field(default=8.0, ge=1e-3, le=1e3)
    """Losses are clamped to [0, this] nats before they are added up."""
    reward: Literal["loss", "public", "held-out"] = "loss"
    """What it learns from: the noisy training loss, ``public`` text, or the loss of a part of
    the rows that is kept out of training (parallel composition, no further epsilon)."""
    public: str = ""
    """``reward = "public"``: a file of public text in the format of ``[data]``."""
    held_out: float = Field(default=0.05, ge=1e-3, lt=0.5)
    """``reward = "held-out"``: share of the rows, chosen by a hash of each row."""
    interval: int = Field(default=0, ge=0)
    """Steps between decisions; 0: a fortieth of all steps."""
    warmup: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the steps at the quantile rule before the first decision."""
    factors: bool = False
    """Both factors of a low-rank pair have clip norms of their own."""
    noise: Literal["constant", "order", "filtered"] = "constant"
    """``constant``: the same in every release. ``order``: the controller orders a set of
    levels that was fixed beforehand. ``filtered``: it is free, within a Renyi filter. Both cost
    precision with sampling (docs/rldp.md)."""
    spread: float = Field(default=0.1, gt=0.0, lt=0.5)
    """``order``, ``filtered``: how far the noise moves, as a share of it."""
    order: float = Field(default=0.0, ge=0.0, le=1024.0)
    """``filtered``: order of the Renyi filter. 0: the best one is found, once, before anybody is
    asked; then it is written here, so that both ends keep the same filter."""

    @model_validator(mode="after")
    def _fits(self) -> RldpConfig:
        if (self.reward == "public") != bool(self.public):
            raise ValueError("rldp.reward='public' and rldp.public (a file) belong together")
        if self.preset == "paper" and self.mode != "online":
            raise ValueError("rldp.preset='paper' learns during the run: rldp.mode='online'")
        if 0.0 < self.sensing < 1e-6:
            raise ValueError(f"rldp.sensing={self.sensing:g}: use 0, or 1e-6 and more")
        if self.order and self.noise != "filtered":
            raise ValueError("rldp.order is that of a filter: rldp.noise='filtered'")
        if self.reward == "loss" and not self.sensing:
            raise ValueError("rldp.reward='loss' needs rldp.sensing above 0: the loss is a sensor")
        return self


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
    constant: tuple[float, ...] = ()
    """``constant``: the controller's action that is held all the time, from -1 to 1 each."""
    rldp: RldpConfig | None = None
    """``clip = "rldp"``: settings of the controller; its defaults without the table."""

    @model_validator(mode="after")
    def _possible(self) -> ExamplePrivacyConfig:
        _target(self.epsilon, self.noise_multiplier, self.delta, self.population)
        _rldp_fits(self.clip, self.rldp, self.constant)
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
    clip: Clipping = "flat"
    clip_norm: float = Field(default=1.0, gt=0.0)
    """L2 norm of one client's update."""
    quantile: float = Field(default=0.5, gt=0.0, lt=1.0)
    quantile_lr: float = Field(default=0.2, gt=0.0)
    quantile_noise: float = Field(default=0.0, ge=0.0)
    constant: tuple[float, ...] = ()
    rldp: RldpConfig | None = None

    @model_validator(mode="after")
    def _possible(self) -> ClientPrivacyConfig:
        _target(self.epsilon, self.noise_multiplier, self.delta, self.population)
        _rldp_fits(self.clip, self.rldp, self.constant)
        rldp = self.rldp or RldpConfig()
        if self.clip == "automatic":
            raise ValueError("clip='automatic' scales gradients; for updates use clip='flat'")
        if self.clip == "rldp" and rldp.mode == "federated":
            raise ValueError("rldp.mode='federated' is for [privacy.example]: here is one policy")
        if self.clip == "rldp" and rldp.reward != "public":
            raise ValueError(
                f"rldp.reward='{rldp.reward}' is for [privacy.example]: a server sees no losses; "
                "use rldp.reward='public' with rldp.public, a file of public text"
            )
        if rldp.noise != "constant":
            raise ValueError(
                f"rldp.noise='{rldp.noise}' is for [privacy.example]: here a round is one release, "
                "with nothing to order, and the ledger cannot hold a filter over rounds; use "
                "rldp.noise='constant'"
            )
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
