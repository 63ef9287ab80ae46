"""``[tuning.split]``: which part of the model is the client's, and what crosses the cut."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["SplitConfig"]

_STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


_NEEDS = {
    "keep": "a threshold keeps whoever reaches it; set keep=1",
    "rank": "it is for codec='lowrank'",
    "clip": "it is for noise above 0",
    "local_lr": "it is for local_epochs above 0",
}


class SplitConfig(BaseModel):
    """Split tuning (SFPrompt, Cao et al. 2024): the client has both ends, the server the body."""

    model_config = _STRICT

    head: int = Field(default=1, ge=0)
    """Blocks at the client before the body; 0: the embeddings alone."""
    tail: int = Field(default=1, ge=0)
    """Blocks at the client after the body, besides the final norm and the output layer."""
    adapt: Literal["tail", "ends"] = "tail"
    """Where the LoRA of ``lora`` and ``sfprompt`` goes: the tail's blocks, or the head's too."""
    local_epochs: float = Field(default=1.0, ge=0.0)
    """Phase 1: passes over the client's data with the body skipped; no traffic. 0: none."""
    local_lr: float = Field(default=0.0, ge=0.0)
    """Learning rate of phase 1; 0: that of the round."""
    prune: Literal["el2n", "random"] = "el2n"
    """Phase 2: which examples cross the cut: those that both ends alone get most wrong, or any."""
    keep: float = Field(default=0.5, gt=0.0, le=1.0)
    """Phase 2: share of the examples that is kept; 1: no pruning."""
    threshold: float = Field(default=0.0, ge=0.0)
    """Above 0: keep the examples whose own score is at least this, however many they are.
    The only pruning by score that a promise about examples allows."""
    codec: Literal["none", "bf16", "int8", "lowrank"] = "none"
    """How hidden states and their gradients are rounded on the wire."""
    rank: int = Field(default=8, ge=1)
    """``lowrank``: singular vectors kept of each example."""
    release: Literal["each", "once"] = "each"
    """``once``: an example's hidden states are sent once in a run, and held encrypted."""
    noise: float = Field(default=0.0, ge=0.0)
    """Standard deviation of noise at the cut, in units of ``clip``; 0: none."""
    clip: float = Field(default=1.0, gt=0.0)
    """Largest L2 norm of what one example sends at once, where there is noise."""
    memory_mb: float = Field(default=0.0, ge=0.0)
    """For the plan: what a client can hold; 0 is unknown."""
    bandwidth_mbit: float = Field(default=0.0, ge=0.0)
    """For the plan: a client's link in megabits a second; 0 is unknown."""

    @model_validator(mode="after")
    def _fits(self) -> SplitConfig:
        if self.threshold and self.prune != "el2n":
            raise ValueError("tuning.split.threshold is a score: it needs prune='el2n'")
        default = SplitConfig.model_fields
        ignored = {
            "keep": self.threshold > 0 and self.keep != 1,
            "rank": self.codec != "lowrank" and self.rank != default["rank"].default,
            "clip": not self.noise and self.clip != default["clip"].default,
            "local_lr": not self.local_epochs and self.local_lr > 0,
        }
        if wrong := [name for name, nothing in ignored.items() if nothing]:
            raise ValueError(
                f"tuning.split.{wrong[0]}={getattr(self, wrong[0]):g} would do nothing: "
                f"{_NEEDS[wrong[0]]}"
            )
        if self.release == "once" and self.noise:
            raise ValueError(
                "tuning.split.noise with release='once': an example that is sent again, after a "
                "restart or when the server lost it, would have other noise; set release='each'"
            )
        if self.release == "once" and self.adapt == "ends":
            raise ValueError(
                "tuning.split.release='once' needs a head that stays as it is: set adapt='tail'"
            )
        return self
