"""The server's part in one secure sum: it learns the sum of the survivors, or nothing."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.secagg_graph import Graph, graph_of
from fedtune.privacy.secagg_mask import add_masks, mask_key, self_key
from fedtune.privacy.secagg_records import (
    MOST_MEMBERS,
    SEALED_BYTES,
    Advert,
    Cohort,
    Context,
    Record,
    advert_of,
    byte_rows,
    check_signature,
    read,
    require_new,
)
from fedtune.privacy.secagg_rules import (
    dealers_text,
    pledge_of,
    require_enough,
    require_floor,
    salt_of,
    survivors_text,
)
from fedtune.privacy.secagg_shamir import SHARE_BYTES, combine

__all__ = ["Collector"]


class Collector:
    """Collects one attempt at a secure sum. Not for several threads.

    Each ``take_*`` and ``add`` is for one member, once; what is refused changes nothing,
    and the member counts as one that dropped out. What goes out to the members ends the
    taking before it, if enough was taken, and may be asked for again.

    Parameters
    ----------
    context : Context
    roster : mapping of name to Ed25519PublicKey
        All who are enrolled.

    Attributes
    ----------
    step : str
        What is being taken: ``adverts``, ``deals``, ``vectors``, ``signatures``,
        ``shares``; or ``done``.
    """

    def __init__(self, context: Context, roster: Mapping[str, Ed25519PublicKey]) -> None:
        self.step = "adverts"
        self._context = context
        self._digest = context.digest()
        self._roster = dict(roster)
        self._adverts: dict[str, Advert] = {}
        self._keys: set[bytes] = set()
        self._cohort: Cohort | None = None
        self._graph: Graph | None = None
        self._deals: dict[int, dict[int, bytes]] = {}
        self._dealers = self._present = np.zeros(0, np.bool_)
        self._sum = np.zeros(0, np.uint32)
        self._seen: dict[int, bytes] = {}
        self._signatures: dict[int, bytes] = {}
        self._shares: dict[int, dict[int, bytes]] = {}

    def __repr__(self) -> str:
        return f"Collector(taking {self.step}, {len(self._adverts)} members)"

    def members(self) -> list[str]:
        """Return the names of the cohort, sorted; after ``cohort``."""
        return list(self._joined()[0].names)

    def dealers(self) -> list[str]:
        """Return who has dealt, sorted."""
        names = self._joined()[0].names
        return [names[at] for at in sorted(self._deals)]

    def summed(self) -> list[str]:
        """Return whose vectors are in the sum, sorted."""
        names = self._joined()[0].names
        return [names[at] for at in sorted(self._seen)]

    def take_advert(self, name: str, record: Record) -> None:
        """Take a member in.

        Raises
        ------
        FedtuneError
            Malformed, not enrolled, there already, or signed for another context.
        """
        self._taking("adverts")
        if name in self._adverts or len(self._adverts) >= MOST_MEMBERS:
            raise _twice(name, f"an advert, or is beyond {MOST_MEMBERS} members")
        advert = advert_of(record)
        check_signature(self._roster, name, advert.signature, advert.signed(self._digest, name))
        require_new(self._keys, name, advert, self._roster[name])
        self._adverts[name] = advert

    def cohort(self) -> Record:
        """Return all adverts, for every member; no more are taken.

        Raises
        ------
        FedtuneError
            Fewer members than ``min_cohort``; more can still come then.
        """
        if self.step == "adverts":
            cohort = self._cohort_of(self._adverts)
            require_floor(self._context, cohort, ExitCode.QUORUM)
            self._cohort = cohort
            members = len(cohort.names)
            self._graph = graph_of(cohort.digest, members, self._context.share)
            self._dealers = np.zeros(members, np.bool_)
            self.step = "deals"
        return self._joined()[0].record()

    def take_deal(self, name: str, record: Record) -> None:
        """Take a member's sealed shares.

        Raises
        ------
        FedtuneError
            Malformed, not of a member, or there already.
        """
        at, graph = self._member("deals", name)
        if at in self._deals:
            raise _twice(name, "dealt")
        others = [other for other in graph.around(at) if other != at]
        found = read("deal", record, {"sealed": ("uint8", (len(others), SEALED_BYTES))})
        self._deals[at] = {
            other: row.tobytes() for other, row in zip(others, found["sealed"], strict=True)
        }

    def dealt_for(self, name: str) -> Record:
        """Return who dealt, and what was sealed for this member; no more deals are taken.

        Raises
        ------
        FedtuneError
            Too few have dealt, or this member has not.
        """
        self._end_deals()
        at, _ = self._member("vectors", name)
        if not self._dealers[at]:
            raise _stranger(name, "has not dealt")
        graph = self._joined()[1]
        senders = [other for other in graph.around(at) if other != at and self._dealers[other]]
        return {
            "dealers": self._dealers.astype(np.uint8),
            "sealed": byte_rows([self._deals[sender][at] for sender in senders]),
        }

    def add(self, name: str, masked: Record) -> None:
        """Add a masked vector to the one sum that is kept.

        Raises
        ------
        FedtuneError
            Malformed, not of one who dealt, added already, or made for other dealers.
        """
        at, _ = self._member("vectors", name)
        if not self._dealers[at]:
            raise _stranger(name, "has not dealt")
        if at in self._seen:
            raise _twice(name, "sent a vector")
        shapes = {"values": ("uint32", (self._context.length,)), "signature": ("uint8", (64,))}
        found = read("masked", masked, shapes)
        signature = found["signature"].tobytes()
        text = dealers_text(self._joined()[0], self._dealers)
        check_signature(self._roster, name, signature, text)
        np.add(self._sum, found["values"], out=self._sum)
        self._seen[at] = signature

    def survivors(self) -> Record:
        """Return whose vectors are in the sum, for each of them; no more are added.

        Raises
        ------
        FedtuneError
            Too few; more can still come then.
        """
        self._end_deals()
        cohort, graph = self._joined()
        if self.step == "vectors":
            present = np.zeros(len(cohort.names), np.bool_)
            present[list(self._seen)] = True
            require_enough(cohort, graph, present, "survivors", self._context.min_survivors)
            self._present = present
            self._deals = {at: {} for at in self._deals}
            self.step = "signatures"
        return {
            "survivors": self._present.astype(np.uint8),
            "dealers": self._dealers.astype(np.uint8),
            "signature": byte_rows([self._seen[at] for at in sorted(self._seen)]),
        }

    def take_signature(self, name: str, record: Record) -> None:
        """Take a survivor's signature of the set of survivors.

        Raises
        ------
        FedtuneError
            Malformed, not of a survivor, there already, or not over this set.
        """
        at, _ = self._survivor("signatures", name)
        if at in self._signatures:
            raise _twice(name, "signed")
        signature = read("signature", record, {"signature": ("uint8", (64,))})["signature"]
        text = survivors_text(self._joined()[0], self._dealers, self._present)
        check_signature(self._roster, name, signature.tobytes(), text)
        self._signatures[at] = signature.tobytes()

    def signed(self) -> Record:
        """Return all signatures, for every survivor; no more are taken.

        Raises
        ------
        FedtuneError
            Fewer than the quorum; more can still come then.
        """
        self.survivors()
        cohort, graph = self._joined()
        if self.step == "signatures":
            if len(self._signatures) < graph.quorum:
                raise _too_few(f"{len(self._signatures)} signed", graph.quorum)
            self.step = "shares"
        signers = np.zeros(len(cohort.names), np.uint8)
        signers[list(self._signatures)] = 1
        rows = [self._signatures[at] for at in sorted(self._signatures)]
        return {"signers": signers, "signature": byte_rows(rows)}

    def take_reveal(self, name: str, record: Record) -> None:
        """Take a survivor's shares.

        Raises
        ------
        FedtuneError
            Malformed, not of a survivor, or there already.
        """
        at, graph = self._survivor("shares", name)
        if at in self._shares:
            raise _twice(name, "revealed")
        owners = [other for other in graph.around(at) if self._dealers[other]]
        found = read("reveal", record, {"share": ("uint8", (len(owners), SHARE_BYTES))})
        self._shares[at] = {
            owner: row.tobytes() for owner, row in zip(owners, found["share"], strict=True)
        }

    def total(self) -> NDArray[np.uint32]:
        """Take off all masks and return the sum of the survivors' values modulo 2^32.

        Returns
        -------
        uint32 array
            Shape (length,). See ``from_field``.

        Raises
        ------
        FedtuneError
            Too few shares of some secret came back (more can still come then), or they
            give another secret than its owner pledged.
        """
        self.signed()
        self._taking("shares")
        cohort, graph = self._joined()
        owners = [int(owner) for owner in np.flatnonzero(self._dealers)]
        gathered = {owner: self._gathered(owner) for owner in owners}
        fewest = min(owners, key=lambda owner: len(gathered[owner]))
        if len(gathered[fewest]) < graph.threshold:
            raise _too_few(
                f"{len(gathered[fewest])} shares for '{cohort.names[fewest]}'", graph.threshold
            )
        streams: list[tuple[bytes, bool]] = []
        for owner in owners:
            streams += self._streams(owner, self._opened(owner, gathered[owner]))
        self.step = "done"
        add_masks(self._sum, streams)
        self._shares.clear()
        return self._sum

    def _end_deals(self) -> None:
        """Take no more deals, if they are enough."""
        cohort, graph = self._joined()
        if self.step == "deals":
            dealers = np.zeros(len(cohort.names), np.bool_)
            dealers[list(self._deals)] = True
            require_enough(cohort, graph, dealers, "have dealt", self._context.min_survivors)
            self._dealers = dealers
            self._sum = np.zeros(self._context.length, np.uint32)
            self.step = "vectors"

    def _opened(self, owner: int, shares: Mapping[int, bytes]) -> bytes:
        """Return a dealer's secret, though one of more shares than needed be wrong."""
        cohort, graph = self._joined()
        for left_out in (0, *sorted(shares)):
            points = [point for point in sorted(shares) if point != left_out]
            if len(points) < graph.threshold:
                continue
            try:
                secret = combine({at: shares[at] for at in points[: graph.threshold]})
            except FedtuneError:
                continue
            if self._fits(owner, secret):
                return secret
        raise FedtuneError(
            f"the shares of '{cohort.names[owner]}' give another secret than it pledged",
            hint="it, or one who holds its shares, does not follow the protocol",
            code=ExitCode.PRIVACY,
        )

    def _fits(self, owner: int, secret: bytes) -> bool:
        """Say whether it is what the dealer's advert stands for."""
        _, advert = self._joined()[0].member(owner)
        if self._present[owner]:
            return pledge_of(secret) == advert.pledge
        private = X25519PrivateKey.from_private_bytes(secret)
        return private.public_key().public_bytes_raw() == advert.mask_key

    def _streams(self, owner: int, secret: bytes) -> list[tuple[bytes, bool]]:
        """Return the masks to take off for a dealer, of whom one secret is known."""
        cohort, graph = self._joined()
        salt, name = salt_of(self._context, cohort), cohort.names[owner]
        if self._present[owner]:
            return [(self_key(secret, salt, name), True)]
        private = X25519PrivateKey.from_private_bytes(secret)
        streams = []
        for other in graph.around(owner):
            if self._present[other]:
                survivor, public = cohort.member(other)
                key = mask_key(private, public.mask_key, salt, (name, survivor))
                # a survivor subtracts the mask of one that stands before it
                streams.append((key, owner > other))
        return streams

    def _gathered(self, owner: int) -> dict[int, bytes]:
        """Return the shares of a dealer's secret that came back, by their points."""
        holders = self._joined()[1].around(owner)
        return {at + 1: self._shares[at][owner] for at in holders if at in self._shares}

    def _cohort_of(self, adverts: Mapping[str, Advert]) -> Cohort:
        names = sorted(adverts)
        return Cohort(self._digest, tuple(names), tuple(adverts[name] for name in names))

    def _joined(self) -> tuple[Cohort, Graph]:
        if self._cohort is None or self._graph is None:
            raise _early("cohort", self.step)
        return self._cohort, self._graph

    def _taking(self, step: str) -> None:
        if self.step != step:
            raise _early(step, self.step)

    def _at(self, name: str) -> int:
        names = self._joined()[0].names
        if name not in names:
            raise _stranger(name, "is not in the cohort")
        return names.index(name)

    def _member(self, step: str, name: str) -> tuple[int, Graph]:
        self._taking(step)
        return self._at(name), self._joined()[1]

    def _survivor(self, step: str, name: str) -> tuple[int, Graph]:
        at, graph = self._member(step, name)
        if not self._present[at]:
            raise _stranger(name, "is not among the survivors")
        return at, graph


def _early(wanted: str, step: str) -> FedtuneError:
    return FedtuneError(
        f"{wanted}: the collector takes {step}" if step != "done" else f"{wanted}: it is done",
        hint="adverts, deals, vectors, signatures, shares: each step in its order",
        code=ExitCode.ENGINE,
    )


def _twice(name: str, what: str) -> FedtuneError:
    return FedtuneError(
        f"'{name}' already {what}", hint="each once in an attempt", code=ExitCode.ENGINE
    )


def _stranger(name: str, why: str) -> FedtuneError:
    return FedtuneError(f"'{name}' {why}", hint="too late for this attempt", code=ExitCode.QUORUM)


def _too_few(what: str, needed: int) -> FedtuneError:
    return FedtuneError(
        f"{what}: {needed} are needed", hint="nothing was revealed; try again",
        code=ExitCode.QUORUM,
    )  # fmt: skip
