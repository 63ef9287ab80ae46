"""The tables for real devices: ``[federation.server]`` and ``[federation.secure]``."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["SecureConfig", "ServerConfig", "threshold_of"]

_STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

Positive = Annotated[int, Field(ge=1)]
Address = Annotated[str, Field(pattern=r"^(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):\d{1,5}$")]


class ServerConfig(BaseModel):
    """Where ``fedtune serve`` listens, and when it begins. Simulations do not read it."""

    model_config = _STRICT

    address: Address = "0.0.0.0:9092"
    """``HOST:PORT`` that nodes reach: TLS and node keys. Nothing else listens outside."""
    keys: str = "keys"
    """Folder made by ``fedtune keys``: certificate, key, and who is enrolled."""
    state: str = "federation"
    """Folder of the server's own state: its database and its logs."""
    nodes: Positive = 2
    """So many nodes must have joined before the first round."""
    wait: float = Field(default=86_400.0, gt=0.0)
    """Seconds to wait for them."""
    status: str = Field(default="127.0.0.1:9190", pattern=r"^(|.+:\d{1,5})$")
    """``HOST:PORT`` of the read-only status page; empty: none."""
    status_token: str = ""
    """File with the token that the status page asks for; needed where it is not loopback."""
    message_mb: Positive = 256
    """Largest message from or to a node."""


def threshold_of(members: int, share: float = 2 / 3) -> int:
    """Return how many of so many must take part: ``share`` of them, and more than half.

    With ``t`` of ``n`` no two sets of survivors are both signed by enough unless
    ``2 t - n`` members sign twice; fewer than ``t`` members cannot open a secret.

    Examples
    --------
    >>> [threshold_of(n) for n in (2, 3, 5, 10, 50)]
    [2, 2, 4, 7, 34]
    """
    return max(members // 2 + 1, math.ceil(share * members - 1e-9))


class SecureConfig(BaseModel):
    """Secure aggregation: the server learns the sum of a cohort's updates, or nothing.

    Bonawitz et al. 2017, with signed cohorts and signed survivor sets.
    """

    model_config = _STRICT

    threshold: float = Field(default=2 / 3, gt=0.5, le=1.0)
    """Share of a cohort that must survive for the sum to come out."""
    colluding: int = Field(default=1, ge=0)
    """So many survivors may give their noise and their secrets to the server, or keep them to
    themselves and look at the model: with noise at the clients the others' noise alone keeps the
    promise. 0 promises nothing against another client, who knows its own noise."""
    min_cohort: int = Field(default=3, ge=2)
    """Smaller cohorts are refused, by the server and by every client."""
    clip_norm: float = Field(default=0.0, ge=0.0)
    """L2 norm of one client's update, where no ``[privacy.client]`` has one: sums are whole
    numbers of a fixed range."""

    @model_validator(mode="after")
    def _somebody_is_honest(self) -> SecureConfig:
        if self.honest(self.min_cohort) < 1:
            raise ValueError(
                f"colluding={self.colluding}: of the smallest cohort, {self.min_cohort}, nobody "
                "honest need survive; raise min_cohort or threshold"
            )
        return self

    def least(self, cohort: int) -> int:
        """Return how many of a cohort must survive: more than half of it.

        Examples
        --------
        >>> [SecureConfig().least(n) for n in (3, 10, 50)]
        [2, 7, 34]
        """
        return threshold_of(cohort, self.threshold)

    def tolerates(self, cohort: int) -> bool:
        """Say whether ``colluding`` members and a server that cheats learn nothing but a sum.

        Fewer than ``2 t - n``, or they get two survivor sets signed; above 50 members, where
        only neighbours hold shares, one in five (``privacy.secagg_graph``).

        Examples
        --------
        >>> [SecureConfig().tolerates(n) for n in (3, 4, 10)]
        [False, True, True]
        >>> SecureConfig(threshold=1.0).tolerates(3)
        True
        """
        if self.colluding >= 2 * self.least(cohort) - cohort:
            return False
        return cohort <= 50 or self.colluding <= cohort // 5

    def honest(self, cohort: int) -> int:
        """Return the smallest number of honest survivors that lets a sum out.

        Examples
        --------
        >>> SecureConfig().honest(10)
        6
        """
        return self.least(cohort) - self.colluding
