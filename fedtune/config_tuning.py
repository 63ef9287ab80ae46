"""``[tuning]`` and its tables for probes and pools: what is tuned, and how."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedtune.config_split import SplitConfig

__all__ = ["PoolConfig", "ProbeConfig", "SplitConfig", "TuningConfig"]

_STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

Positive = Annotated[int, Field(ge=1)]

_NO_POOL = (
    "[tuning.pool] does nothing with method='{}': remove it, or set tuning.method to seedpool, "
    "fedkseed or fedkseed-pro"
)

SEED_METHODS = ("fedkseed", "fedkseed-pro", "seedpool")
"""Methods of which only coefficients of a seed pool travel."""

_ACROSS = ("sfprompt", "prompt", "lora", "lora-frozen-a", "p-tuning-v2", "prefix")
"""Adapters whose parameters are all the client's when the model is cut."""

_PLACES = frozenset(
    {"target_modules", "exclude_modules", "modules_to_save", "layers_to_transform",
     "layers_pattern", "layer_replication", "trainable_token_indices", "target_parameters",
     "rank_pattern", "alpha_pattern"}
)  # fmt: skip
"""Options of peft that say where an adapter goes."""


class ProbeConfig(BaseModel):
    """How forward passes estimate a gradient (``mezo`` and the seed methods)."""

    model_config = _STRICT

    eps: float = Field(default=1e-3, gt=0.0)
    """Length of a probe: parameters move by ``eps`` times +1 or -1 (Gaussian: a normal number)."""
    count: Positive = 1
    """Directions probed in one step; their estimates are averaged."""
    sides: Literal["two", "one"] = "two"
    """``two``: both signs. ``one``: one sign each, and the unmoved point once for all."""
    step: Literal["plain", "normalised", "curvature"] = "plain"
    """``normalised``: divided by the standard deviation of the probes' losses (FZOO).
    ``curvature``: each probe weighted down where the loss is curved (1.5-SPSA)."""
    objective: Literal["loss", "accuracy", "f1", "exact-match"] = "loss"
    """What is improved; all but the loss have no gradient."""
    batched: int = Field(default=0, ge=0)
    """Adapters only: at most so many moved copies in one forward pass; 0 is chosen by memory."""


class PoolConfig(BaseModel):
    """The seed pool: ``w = w0 + sum_k a_k z_k``, and only the ``a_k`` travel."""

    model_config = _STRICT

    kind: Literal["auto", "hadamard", "gaussian"] = "auto"
    """``gaussian``: independent seeds as FedKSeed published it. ``auto``: by the method."""
    size: int = Field(default=4096, ge=2, le=65536)
    """K: directions in the pool, and numbers on the wire."""
    refresh: int = Field(default=0, ge=0)
    """Rounds after which the pool is folded into the weights and drawn anew; 0 is never."""
    engine: Literal["auto", "probes", "projected"] = "auto"
    """``probes``: forward passes alone. ``projected``: backpropagation, projected on the pool.
    ``auto``: projected where the memory allows it, with plain steps, so that ``tuning.lr``
    means the same for both; the server cannot tell."""
    groups: int = Field(default=0, ge=0)
    """Schedule groups: clients of a group probe the same directions. 0: under client-level
    privacy ``m / (sigma sqrt(S))``, otherwise every client draws its own."""
    directions: int = Field(default=0, ge=0)
    """S: directions that one client uses in a round; 0 is all of its group's."""
    bits: Literal[8, 16, 32] = 16
    """Width of a coefficient on the wire; rounded at random, without bias."""
    entropy: Literal["seed", "os"] = "seed"
    """``seed``: repeatable. ``os``: nobody can choose it."""


class TuningConfig(BaseModel):
    """What is tuned (the adapter) and how (the method)."""

    model_config = _STRICT

    adapter: str = Field(default="lora", pattern=r"^[a-z0-9_-]+$")
    """``lora``, ``lora-frozen-a``, ``prompt``, ``prefix``, ``p-tuning-v2``, ``ia3``,
    ``layernorm``, ``bias``, ``sfprompt`` (prompts, and LoRA on the last blocks), or the name of
    any other method of the installed peft; ``full``: no adapter, all parameters of the model."""
    rank: Positive = 8
    """LoRA family: rank of the update."""
    alpha: float = Field(default=16.0, gt=0.0)
    """LoRA family: the update is scaled by ``alpha / rank``."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    targets: tuple[str, ...] = ("all-linear",)
    """Module names to adapt; ``all-linear`` is every linear layer but the head."""
    tokens: Positive = 16
    """Prompt family: number of virtual tokens."""
    options: dict[str, Any] = {}
    """Further arguments of the peft config class, as they are."""
    method: Literal["backprop", "mezo", "fedkseed", "fedkseed-pro", "seedpool", "sfprompt"] = (
        "backprop"
    )
    """``mezo``: forward passes, the adapter travels. ``fedkseed``, ``fedkseed-pro``: as
    published, only coefficients travel. ``seedpool``: the same on a pool that rebuilds in one
    pass and is refreshed. ``sfprompt``: backpropagation through a model whose body is the
    server's (``[tuning.split]``)."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Of ``backprop``, and of the projected engine."""
    lr: float = Field(default=1e-3, gt=0.0)
    weight_decay: float = Field(default=0.0, ge=0.0)
    momentum: float = Field(default=0.0, ge=0.0, lt=1.0)
    """``sgd`` only."""
    max_grad_norm: float = Field(default=0.0, ge=0.0)
    """Gradient clipping for stability; 0 is off. Not a privacy mechanism."""
    batch_size: Positive = 8
    accumulate: Positive = 1
    """Micro-batches per optimiser step."""
    epochs: float = Field(default=1.0, gt=0.0)
    """Passes over the client's data per round; may be a fraction."""
    steps: int = Field(default=0, ge=0)
    """Optimiser steps per round; overrides ``epochs`` when not 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate over the rounds of the whole run."""
    warmup_rounds: int = Field(default=0, ge=0)
    keep_optimizer: bool = False
    """Keep each client's optimiser state between its rounds."""
    probe: ProbeConfig = ProbeConfig()
    pool: PoolConfig = PoolConfig()
    split: SplitConfig = SplitConfig()

    @property
    def by_gradient(self) -> bool:
        """Whether parameters are tuned by backpropagation, through the whole model or a cut."""
        return self.method in ("backprop", "sfprompt")

    @property
    def cut(self) -> bool:
        """Whether the model is cut, and its body is the server's."""
        return self.method == "sfprompt"

    @property
    def seeded(self) -> bool:
        """Whether coefficients of a seed pool travel, and not parameters."""
        return self.method in SEED_METHODS

    @model_validator(mode="after")
    def _probes_fit(self) -> TuningConfig:
        probe = self.probe
        losses = probe.count * (2 if probe.sides == "two" else 1)
        if probe.step == "normalised" and losses < 2:
            raise ValueError(
                "tuning.probe.step='normalised' needs a deviation: set tuning.probe.count to 2 or "
                "more (8 is usual)"
            )
        if probe.step == "curvature" and probe.sides == "one":
            raise ValueError("tuning.probe.step='curvature' needs tuning.probe.sides='two'")
        return self

    @model_validator(mode="after")
    def _method_fits(self) -> TuningConfig:
        if self.by_gradient:
            if self.probe != ProbeConfig():
                raise ValueError(
                    f"[tuning.probe] does nothing with method='{self.method}': remove it, or set "
                    "tuning.method to mezo or seedpool"
                )
            if self.pool != PoolConfig():
                raise ValueError(_NO_POOL.format(self.method))
            return self
        if self.method == "mezo" and self.pool != PoolConfig():
            raise ValueError(_NO_POOL.format("mezo"))
        if self.keep_optimizer:
            raise ValueError(f"tuning.keep_optimizer: method='{self.method}' has no such state")
        if self.dropout:
            raise ValueError("tuning.dropout must be 0: two probes would see two other networks")
        if max(self.pool.groups, 1) * max(self.pool.directions, 1) > self.pool.size:
            raise ValueError(
                f"tuning.pool: {self.pool.groups} groups of {self.pool.directions} directions are "
                f"more than size={self.pool.size}"
            )
        self._nothing_ignored()
        by_gradient = self.method == "seedpool" and self.pool.engine != "probes"
        if by_gradient and self.probe.objective != "loss":
            raise ValueError(
                f"tuning.probe.objective='{self.probe.objective}' has no gradient: set "
                "tuning.pool.engine='probes'"
            )
        if self.method in ("fedkseed", "fedkseed-pro"):
            self._as_published()
        return self

    @model_validator(mode="after")
    def _split_fits(self) -> TuningConfig:
        split = self.split
        if not self.cut:
            if split != SplitConfig() and self.adapter != "sfprompt":
                raise ValueError(
                    f"[tuning.split] does nothing with method='{self.method}': remove it, or set "
                    "tuning.method='sfprompt'"
                )
            return self
        if self.adapter not in _ACROSS:
            raise ValueError(
                f"tuning.adapter='{self.adapter}' has parameters in the server's part: with "
                f"method='sfprompt' use one of {', '.join(_ACROSS)}"
            )
        if outside := sorted(_PLACES & self.options.keys()):
            raise ValueError(
                f"tuning.options.{outside[0]} could reach the server's part: with "
                "method='sfprompt' the place of an adapter is tuning.split.adapt, and "
                "tuning.targets within it"
            )
        if split.adapt == "ends" and self.adapter not in ("lora", "lora-frozen-a", "sfprompt"):
            raise ValueError(
                f"tuning.split.adapt='ends' does nothing with tuning.adapter='{self.adapter}'"
            )
        if split.release == "once" and self.adapter in ("p-tuning-v2", "prefix"):
            raise ValueError("tuning.split.release='once' cannot hold what prefixes change")
        if split.release == "once" and split.head and self.adapter in ("sfprompt", "prompt"):
            raise ValueError(
                "tuning.split.release='once' needs hidden states that stay: prompts change them in "
                "every block of the head; set tuning.split.head=0, or tuning.adapter='lora'"
            )
        return self

    def _nothing_ignored(self) -> None:
        """Refuse what no step would look at."""
        probes = self.method != "seedpool" or self.pool.engine != "projected"
        ignored = {
            "weight_decay": self.weight_decay, "momentum": probes and self.momentum,
            "max_grad_norm": probes and self.max_grad_norm,
        }  # fmt: skip
        if self.method == "mezo":
            del ignored["weight_decay"]
        if wrong := [name for name, value in ignored.items() if value]:
            raise ValueError(
                f"tuning.{wrong[0]}={ignored[wrong[0]]:g} would do nothing with "
                f"method='{self.method}' and engine='{self.pool.engine}'"
            )

    def _as_published(self) -> None:
        """Refuse what the published FedKSeed does not have, so that its name stays true."""
        pool, probe = self.pool, self.probe
        ours = {
            "tuning.pool.refresh": pool.refresh != 0,
            "tuning.pool.engine": pool.engine == "projected",
            "tuning.pool.groups": pool.groups != 0,
            "tuning.pool.directions": pool.directions != 0,
            "tuning.probe.count": probe.count != 1,
            "tuning.probe.sides": probe.sides != "two",
            "tuning.probe.step": probe.step != "plain",
        }
        if wrong := [name for name, differs in ours.items() if differs]:
            raise ValueError(
                f"method='{self.method}' is as published, without {', '.join(wrong)}: remove it, "
                "or set tuning.method='seedpool'"
            )
