"""The body of a split simulation: in the worker's own process."""

from __future__ import annotations

from fedtune.models import Base, share
from fedtune.server.body import Body
from fedtune.server.body_service import BodyService
from fedtune.split.blocks import Cut
from fedtune.split.parts import ends_digest

__all__ = ["local_service"]


def local_service(base: Base, cut: Cut) -> BodyService:
    """Return a body over the same frozen tensors; messages are made, packed and counted."""
    return BodyService(Body(share(base.model), cut), ends_digest(base.model, cut))
