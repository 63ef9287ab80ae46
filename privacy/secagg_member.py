"""One member's part in one secure sum: five answers, each given once and in order."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeGuard

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.secagg_graph import Graph, graph_of
from fedtune.privacy.secagg_mask import add_masks, mask_key, seal_key, self_key
from fedtune.privacy.secagg_records import (
    NAME_BYTES,
    SEALED_BYTES,
    Advert,
    Cohort,
    Context,
    Record,
    byte_rows,
    check_signature,
    cohort_of,
    flags,
    read,
)
from fedtune.privacy.secagg_rules import (
    dealers_text,
    pledge_of,
    require_enough,
    require_floor,
    salt_of,
    survivors_text,
)
from fedtune.privacy.secagg_shamir import SECRET_BYTES, SHARE_BYTES, split

__all__ = ["Member"]

NONCE = bytes(12)  # a key seals one message


@dataclass(frozen=True)
class _Secrets:
    """Drawn for this attempt; none of it is written anywhere."""

    mask_seed: bytes = field(repr=False)
    self_seed: bytes = field(repr=False)
    seal: X25519PrivateKey = field(repr=False)

    def mask(self) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(self.mask_seed)


class Member:
    """A member of one attempt at a secure sum.

    Its steps are ``advert``, ``deal``, ``mask``, ``sign`` and ``reveal``. A step out of
    order is refused and changes nothing. What the server sent and is refused closes the
    member for good: its secrets are forgotten, and others take off its masks if they can.
    Not for several threads.

    Parameters
    ----------
    context : Context
    name : str
        At most 64 bytes of UTF-8, enrolled in ``roster`` with the key of ``signer``.
    signer : Ed25519PrivateKey
        The long-term identity.
    roster : mapping of name to Ed25519PublicKey
        All who are enrolled, as this member knows it.

    Attributes
    ----------
    step : str
        ``new``, ``advertised``, ``dealt``, ``masked``, ``signed``, ``revealed`` or ``closed``.
    exposed : bool
        From ``mask`` on: the server may come to know a sum with these values, whatever
        it says. The same values must not go into another attempt: the difference of two
        sums is what one of them lacks.

    Raises
    ------
    FedtuneError
        The name is not enrolled with this key, or is too long.
    """

    _secrets: _Secrets | None
    _advert: Advert | None
    _cohort: Cohort | None
    _graph: Graph | None
    _openers: dict[int, bytes]
    _held: dict[int, tuple[bytes, bytes]]

    def __init__(
        self,
        context: Context,
        name: str,
        signer: Ed25519PrivateKey,
        roster: Mapping[str, Ed25519PublicKey],
    ) -> None:
        known = roster.get(name)
        own = signer.public_key().public_bytes_raw()
        if known is None or known.public_bytes_raw() != own:
            raise FedtuneError(
                f"'{name}' is not enrolled with this key",
                hint="enrol its .pub file at the server, or use the key that is enrolled",
                code=ExitCode.SIGNATURE,
            )
        if not 0 < len(name.encode()) <= NAME_BYTES or "\0" in name:
            raise FedtuneError(
                f"name '{name[:80]}'", hint=f"1 to {NAME_BYTES} bytes", code=ExitCode.CONFIG
            )
        self.step = "new"
        self.exposed = False
        self._context = context
        self._name = name
        self._signer = signer
        self._roster = dict(roster)
        self._forget()

    def __repr__(self) -> str:
        return f"Member({self._name!r}, step={self.step!r})"

    @property
    def members(self) -> int:
        """How many are in the cohort, this one too; 0 before it was dealt to."""
        return len(self._cohort.names) if self._cohort else 0

    def close(self) -> None:
        """Forget every secret; no step can follow."""
        self.step = "closed"
        self._forget()

    def advert(self) -> Record:
        """Draw this attempt's secrets and return the public keys, signed."""
        return self._once("new", "advertised", self._advertise)

    def deal(self, cohort: Record) -> Record:
        """Check the whole cohort and return shares of the secrets, sealed for each neighbour.

        Returns
        -------
        Record
            ``sealed``: uint8 of shape (neighbours, 148), neighbours sorted by name.

        Raises
        ------
        FedtuneError
            The cohort is malformed, smaller than this member's floor, lacks this member,
            or holds somebody who is not enrolled, is there twice or did not sign.
        """
        return self._once("advertised", "dealt", lambda: self._deal_to(cohort))

    def mask(self, values: NDArray[np.uint32], dealt: Record) -> Record:
        """Return the values under this member's masks; the values themselves stay as they are.

        Parameters
        ----------
        values : uint32 array
            Shape (length,), as ``to_field`` gives it.
        dealt : Record
            From ``Collector.dealt_for``.

        Returns
        -------
        Record
            ``values``: uint32 of shape (length,). ``signature``: whose shares were seen.

        Raises
        ------
        FedtuneError
            The values have another type or shape (nothing is changed then); too few have
            dealt, or a sealed share was altered.
        """
        if values.dtype != np.uint32 or values.shape != (self._context.length,):
            raise FedtuneError(
                f"values are {values.dtype} of shape {values.shape}",
                hint=f"uint32 of shape ({self._context.length},): see to_field",
                code=ExitCode.PRIVACY,
            )
        return self._once("dealt", "masked", lambda: self._put_on(values, dealt))

    def sign(self, survivors: Record) -> Record:
        """Check who is in the sum, and sign it: once in an attempt.

        Raises
        ------
        FedtuneError
            This member is not in it; too few are; somebody is in it who did not deal, or
            who saw other dealers than this member.
        """
        return self._once("masked", "signed", lambda: self._agree(survivors))

    def reveal(self, signed: Record) -> Record:
        """Return one share for each neighbour that dealt, and forget everything.

        For one that is in the sum, the share of the seed of its own mask; for one that is
        not, the share of its private key. Never both.

        Returns
        -------
        Record
            ``share``: uint8 of shape (dealers among itself and its neighbours, 66).

        Raises
        ------
        FedtuneError
            Fewer than the quorum signed the very set that this member signed.
        """
        record = self._once("signed", "revealed", lambda: self._give_back(signed))
        self._forget()
        return record

    def _advertise(self) -> Record:
        seal = X25519PrivateKey.generate()
        self._secrets = _Secrets(os.urandom(SECRET_BYTES), os.urandom(SECRET_BYTES), seal)
        advert = Advert(
            self._secrets.mask().public_key().public_bytes_raw(),
            seal.public_key().public_bytes_raw(),
            pledge_of(self._secrets.self_seed),
            self._context.min_survivors,
            b"",
        )
        text = advert.signed(self._context.digest(), self._name)
        signature = self._signer.sign(text)
        self._advert = Advert(
            advert.mask_key, advert.seal_key, advert.pledge, advert.least, signature
        )
        return self._advert.record()

    def _deal_to(self, cohort: Record) -> Record:
        found = cohort_of(cohort, self._context.digest())
        require_floor(self._context, found, ExitCode.PRIVACY)
        if self._name not in found.names:
            raise _left_out(self._name, "the cohort")
        self._at = found.names.index(self._name)
        if found.adverts[self._at] != self._advert:
            raise FedtuneError(
                f"the cohort holds another advert of '{self._name}'",
                hint="the server altered it, or two run under one name",
                code=ExitCode.SIGNATURE,
            )
        found.check(self._roster)
        self._cohort = found
        self._graph = graph_of(found.digest, len(found.names), self._context.share)
        return {"sealed": byte_rows(self._sealed())}

    def _put_on(self, values: NDArray[np.uint32], dealt: Record) -> Record:
        cohort, graph = self._joined()
        self._dealers = self._read_dealt(dealt)
        salt, secrets = salt_of(self._context, cohort), self._drawn()
        private = secrets.mask()
        streams = [(self_key(secrets.self_seed, salt, self._name), False)]
        for other in graph.around(self._at):
            if other != self._at and self._dealers[other]:
                names = self._name, cohort.names[other]
                key = mask_key(private, cohort.adverts[other].mask_key, salt, names)
                streams.append((key, other < self._at))
        masked = np.array(values, np.uint32, order="C")
        add_masks(masked, streams)
        self.exposed = True
        self._secrets = None  # from here on only what others entrusted is needed
        signature = self._signer.sign(dealers_text(cohort, self._dealers))
        return {"values": masked, "signature": np.frombuffer(signature, np.uint8)}

    def _agree(self, survivors: Record) -> Record:
        cohort, graph = self._joined()
        members = len(cohort.names)
        listed = survivors.get("survivors") if isinstance(survivors, dict) else None
        count = int(np.count_nonzero(listed)) if _is_bytes(listed, members) else 0
        shapes = {
            "survivors": ("uint8", (members,)),
            "dealers": ("uint8", (members,)),
            "signature": ("uint8", (count, 64)),
        }
        found = read("survivors", survivors, shapes)
        present = flags("survivors", found["survivors"])
        if not np.array_equal(flags("dealers", found["dealers"]), self._dealers):
            raise FedtuneError(
                f"other dealers are named than '{self._name}' was shown",
                hint="the server shows its members different sets",
                code=ExitCode.PRIVACY,
            )
        if bool((present & ~self._dealers).any()):
            raise FedtuneError(
                "a survivor has not dealt", hint="its masks could not be taken off",
                code=ExitCode.PRIVACY,
            )  # fmt: skip
        if not present[self._at]:
            raise _left_out(self._name, "the survivors")
        require_enough(cohort, graph, present, "survivors", self._context.min_survivors)
        text = dealers_text(cohort, self._dealers)
        for at, signature in zip(np.flatnonzero(present), found["signature"], strict=True):
            check_signature(self._roster, cohort.names[at], signature.tobytes(), text)
        self._survivors = present
        signature = self._signer.sign(survivors_text(cohort, self._dealers, present))
        return {"signature": np.frombuffer(signature, np.uint8)}

    def _give_back(self, signed: Record) -> Record:
        cohort, graph = self._joined()
        members = len(cohort.names)
        listed = signed.get("signers") if isinstance(signed, dict) else None
        count = int(np.count_nonzero(listed)) if _is_bytes(listed, members) else 0
        shapes = {"signers": ("uint8", (members,)), "signature": ("uint8", (count, 64))}
        found = read("signed", signed, shapes)
        signers = flags("signers", found["signers"])
        if bool((signers & ~self._survivors).any()) or count < graph.quorum:
            raise FedtuneError(
                f"{count} signed, of whom {graph.quorum} survivors are needed",
                hint="nothing is revealed",
                code=ExitCode.QUORUM,
            )
        text = survivors_text(cohort, self._dealers, self._survivors)
        for at, signature in zip(np.flatnonzero(signers), found["signature"], strict=True):
            check_signature(self._roster, cohort.names[at], signature.tobytes(), text)
        shares = [
            held[0] if self._survivors[other] else held[1]
            for other, held in sorted(self._held.items())
        ]
        return {"share": byte_rows(shares)}

    def _sealed(self) -> list[bytes]:
        """Split both secrets; keep the own shares, and the keys that open what comes back."""
        cohort, graph = self._joined()
        secrets, salt = self._drawn(), salt_of(self._context, cohort)
        holders = graph.around(self._at)
        points = [holder + 1 for holder in holders]
        of_self = split(secrets.self_seed, graph.threshold, points)
        of_key = split(secrets.mask_seed, graph.threshold, points)
        sealed = []
        for holder, *shares in zip(holders, of_self, of_key, strict=True):
            if holder == self._at:
                self._held[holder] = shares[0], shares[1]
                continue
            name, public = cohort.names[holder], cohort.adverts[holder].seal_key
            key = seal_key(secrets.seal, public, salt, self._name, name)
            self._openers[holder] = seal_key(secrets.seal, public, salt, name, self._name)
            sealed.append(AESGCM(key).encrypt(NONCE, b"".join(shares), cohort.digest))
        return sealed

    def _read_dealt(self, dealt: Record) -> NDArray[np.bool_]:
        """Open the shares that neighbours dealt; return who dealt at all."""
        cohort, graph = self._joined()
        members = len(cohort.names)
        listed = dealt.get("dealers") if isinstance(dealt, dict) else None
        senders = []
        if _is_bytes(listed, members):
            senders = [at for at in graph.around(self._at) if listed[at] and at != self._at]
        shapes = {
            "dealers": ("uint8", (members,)),
            "sealed": ("uint8", (len(senders), SEALED_BYTES)),
        }
        found = read("dealt", dealt, shapes)
        dealers = flags("dealers", found["dealers"])
        if not dealers[self._at]:
            raise _left_out(self._name, "those who dealt")
        require_enough(cohort, graph, dealers, "have dealt", self._context.min_survivors)
        for sender, sealed in zip(senders, found["sealed"], strict=True):
            try:
                opened = AESGCM(self._openers[sender]).decrypt(
                    NONCE, sealed.tobytes(), cohort.digest
                )
            except InvalidTag as error:
                raise FedtuneError(
                    f"what '{cohort.names[sender]}' sealed was altered",
                    hint="on the way, or by one who does not follow the protocol",
                    code=ExitCode.SIGNATURE,
                ) from error
            self._held[sender] = opened[:SHARE_BYTES], opened[SHARE_BYTES:]
        self._openers.clear()
        return dealers

    def _joined(self) -> tuple[Cohort, Graph]:
        if self._cohort is None or self._graph is None:
            raise _gone()
        return self._cohort, self._graph

    def _drawn(self) -> _Secrets:
        if self._secrets is None:
            raise _gone()
        return self._secrets

    def _forget(self) -> None:
        self._secrets = self._advert = self._cohort = self._graph = None
        self._at, self._openers, self._held = -1, {}, {}
        self._dealers = self._survivors = np.zeros(0, np.bool_)

    def _once(self, before: str, after: str, do: Callable[[], Record]) -> Record:
        """Do a step that comes after ``before`` only; close on whatever goes wrong in it."""
        if self.step != before:
            raise FedtuneError(
                f"'{self._name}' is {self.step}: this step comes after {before}",
                hint="each step once and in order; a new attempt takes new members",
                code=ExitCode.ENGINE,
            )
        try:
            record = do()
        except BaseException:
            self.close()
            raise
        self.step = after
        return record


def _is_bytes(value: object, members: int) -> TypeGuard[NDArray[np.uint8]]:
    return isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.shape == (members,)


def _left_out(name: str, of: str) -> FedtuneError:
    return FedtuneError(
        f"'{name}' is not among {of}",
        hint="it answered too late for this attempt; nothing of it is in the sum",
        code=ExitCode.QUORUM,
    )


def _gone() -> FedtuneError:
    return FedtuneError("this member was closed", hint="start anew", code=ExitCode.ENGINE)
