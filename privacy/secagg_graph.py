"""Who shares a mask and shares of secrets with whom.

Up to 50 members everybody does with everybody (Bonawitz et al. 2017). Above, members stand
in a ring in an order that the hash of all their adverts decides, and each has the next
``reach`` on either side for neighbours: the Harary graph of Bell et al. 2020 (CCS,
eprint 2020/704). Nobody picks the order: every advert holds fresh keys of its member.

Masks hide a group of honest members only while the ring of honest members in the sum
holds together. It comes apart where ``reach`` neighbouring places hold none of them.
Every member therefore refuses a set in which more than ``gap`` of any ``reach``
neighbouring places are missing: the other ``reach - gap`` must then collude. The same
rule leaves every member at least ``threshold`` of the holders of its shares.

``degree_of`` is the least at which, over the random order, both hold: with one in five
members colluding some ring comes apart, or some neighbourhood has enough colluders to
open it, with a chance of at most 2^-60 (so at most 2^-30 for a server that tries 2^30
cohorts); with one in ten missing at random a set is refused with at most 2^-20.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedtune.config_server import threshold_of
from fedtune.errors import ExitCode, FedtuneError

__all__ = ["COMPLETE", "Graph", "broken_log2", "degree_of", "graph_of", "threshold_of"]

COMPLETE = 50  # members up to which all are neighbours
COLLUDING, MISSING = 0.2, 0.1  # shares of the cohort that the two bounds are for
BROKEN_LOG2, REFUSED_LOG2 = -60.0, -20.0


@dataclass(frozen=True)
class Graph:
    """The neighbours of every member, members by their place in the sorted cohort.

    Attributes
    ----------
    ring : tuple of int
        Members in the order of the ring; empty where all are neighbours.
    reach : int
        Neighbours on either side.
    gap : int
        How many of any ``reach`` neighbouring places may be missing.
    threshold : int
        Shares that give a secret back.
    quorum : int
        Members of the whole cohort without whom nothing is signed or revealed.
    """

    members: int
    ring: tuple[int, ...]
    reach: int
    gap: int
    threshold: int
    quorum: int

    def around(self, member: int) -> list[int]:
        """Return a member and its neighbours, sorted: the holders of its shares."""
        if not self.ring:
            return list(range(self.members))
        place = self.ring.index(member)
        span = range(place - self.reach, place + self.reach + 1)
        return sorted(self.ring[at % self.members] for at in span)

    def holds(self, present: NDArray[np.bool_]) -> bool:
        """Say whether so many are present, shape (members,), that masks protect them."""
        if int(present.sum()) < self.quorum:
            return False
        if not self.ring:
            return True
        missing = ~present[list(self.ring)]
        so_far = np.cumsum(np.concatenate([[0], missing, missing[: self.reach - 1]]))
        return bool((so_far[self.reach :] - so_far[: -self.reach]).max() <= self.gap)


@lru_cache(maxsize=256)
def degree_of(members: int, share: float = 2 / 3) -> int:
    """Return how many neighbours each member has: all others up to 50, fewer above.

    Examples
    --------
    >>> [degree_of(n) for n in (50, 60, 100, 1000)]
    [49, 38, 62, 160]
    """
    if members <= COMPLETE:
        return members - 1
    for reach in range(2, (members - 1) // 2):
        if (
            broken_log2(members, reach, share) <= BROKEN_LOG2
            and _refused_log2(members, reach, share) <= REFUSED_LOG2
        ):
            return 2 * reach
    return members - 1


def broken_log2(members: int, reach: int, share: float = 2 / 3) -> float:
    """Return the binary logarithm of a bound on the chance that one ring is not safe.

    The order is random, ``COLLUDING`` of the members collude, and the server leaves out
    whom it likes, as far as the others let it. The bound adds up, over all members, the
    chance that ``reach - gap`` of the next ``reach`` collude (needed, twice, to part the
    ring), and that ``threshold`` of all neighbours do (needed to open its secrets): tails
    of the hypergeometric distribution, in whole numbers.

    Examples
    --------
    >>> round(broken_log2(1000, 80), 1)
    -61.5
    """
    threshold, gap = _local(reach, share)
    colluding = int(COLLUDING * members)
    parted = _tail(members - 1, colluding, reach, reach - gap)
    opened = _tail(members - 1, colluding, 2 * reach, threshold)
    return math.log2(members) + _log2(parted + opened)


def graph_of(digest: bytes, members: int, share: float = 2 / 3) -> Graph:
    """Return the graph of a cohort from the hash of all its adverts.

    Parameters
    ----------
    digest : bytes
        SHA-256 over the cohort: decides the order of the ring.
    members : int
    share : float
        Of those who must take part, above 1/2 and at most 1.

    Raises
    ------
    FedtuneError
        There are fewer than two members.

    Examples
    --------
    >>> graph = graph_of(bytes(32), 60)
    >>> graph.reach, graph.gap, graph.threshold, graph.quorum, len(graph.around(7))
    (19, 6, 26, 40, 39)
    """
    if members < 2:
        raise FedtuneError(
            f"a cohort of {members}", hint="a sum hides nobody below 2", code=ExitCode.PRIVACY
        )
    quorum = threshold_of(members, share)
    degree = degree_of(members, share)
    if degree == members - 1:
        return Graph(members, (), members - 1, 0, quorum, quorum)
    keys = [hashlib.sha256(digest + at.to_bytes(4, "big")).digest() for at in range(members)]
    ring = tuple(sorted(range(members), key=keys.__getitem__))
    threshold, gap = _local(degree // 2, share)
    return Graph(members, ring, degree // 2, gap, threshold, quorum)


def _local(reach: int, share: float) -> tuple[int, int]:
    """Return threshold and gap: with ``gap`` missing on either side the threshold is met."""
    threshold = threshold_of(2 * reach + 1, share)
    return threshold, (2 * reach - threshold) // 2  # met also when the member itself is missing


def _refused_log2(members: int, reach: int, share: float) -> float:
    """Bound the chance that ``MISSING`` of the members, at random, leave too wide a gap."""
    _, gap = _local(reach, share)
    return math.log2(members) + _log2(_tail(members, int(MISSING * members), reach, gap + 1))


def _tail(members: int, marked: int, drawn: int, least: int) -> float:
    """Return P(at least ``least`` of ``drawn`` members are among the ``marked``)."""
    ways = sum(
        math.comb(marked, hit) * math.comb(members - marked, drawn - hit)
        for hit in range(least, min(marked, drawn) + 1)
    )
    return ways / math.comb(members, drawn)  # whole numbers: no rounding but this one


def _log2(chance: float) -> float:
    return math.log2(chance) if chance > 0.0 else -math.inf
