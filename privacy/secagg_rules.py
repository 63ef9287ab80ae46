"""What members and collector of a secure sum must judge alike: who is enough, what is signed."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.secagg_graph import Graph
from fedtune.privacy.secagg_records import Cohort, Context, bits, statement

__all__ = [
    "dealers_text",
    "pledge_of",
    "require_enough",
    "require_floor",
    "salt_of",
    "survivors_text",
]


def salt_of(context: Context, cohort: Cohort) -> bytes:
    """Return the salt of every key of an attempt: job, round, attempt and cohort."""
    return context.place() + cohort.digest


def pledge_of(seed: bytes) -> bytes:
    """Return what stands in the advert for the seed of a member's own mask."""
    return hashlib.sha256(statement("pledge", seed)).digest()


def dealers_text(cohort: Cohort, dealers: NDArray[np.bool_]) -> bytes:
    """Return what a member signs with its masked vector: whose shares it saw."""
    return statement("dealers", cohort.digest, bits(dealers))


def survivors_text(
    cohort: Cohort, dealers: NDArray[np.bool_], survivors: NDArray[np.bool_]
) -> bytes:
    """Return what a survivor signs before it reveals: who dealt, and who is in the sum."""
    return statement("survivors", cohort.digest, bits(dealers), bits(survivors))


def require_floor(context: Context, cohort: Cohort, code: ExitCode) -> None:
    """Raise when the cohort is smaller than this party takes part with.

    Raises
    ------
    FedtuneError
        Fewer members than ``min_cohort``; with ``code``.
    """
    if len(cohort.names) < context.min_cohort:
        raise FedtuneError(
            f"a cohort of {len(cohort.names)}, smaller than min_cohort={context.min_cohort}",
            hint="wait for more members, or lower the floor where its owner agrees",
            code=code,
        )


def require_enough(
    cohort: Cohort, graph: Graph, present: NDArray[np.bool_], what: str, floor: int = 2
) -> None:
    """Raise unless so many are left that their masks protect them and can be taken off.

    Parameters
    ----------
    present : bool array
        Shape (members,).
    what : str
        Of whom this is asked, for the message.
    floor : int
        Fewest, besides the floors that the present themselves have signed.

    Raises
    ------
    FedtuneError
        Fewer than the quorum or somebody's floor, or too many missing side by side.
    """
    count = int(present.sum())
    least = max([floor, *(cohort.adverts[at].least for at in np.flatnonzero(present))])
    if count < least:
        raise FedtuneError(
            f"{count} {what}: somebody asks for at least {least}",
            hint="a larger cohort, or fewer that drop out",
            code=ExitCode.QUORUM,
        )
    if not graph.holds(present):
        raise FedtuneError(
            f"{count} {what} of {len(cohort.names)}: at least {graph.quorum} are needed"
            + (f", and at most {graph.gap} missing side by side" if graph.ring else ""),
            hint="nothing was revealed; try again with whom can be reached",
            code=ExitCode.QUORUM,
        )
