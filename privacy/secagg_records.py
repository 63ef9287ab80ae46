"""What members and the server of a secure sum send each other, and how it is checked.

A record is a dict of arrays whose names, types and shapes follow from its kind and from
the number of members: any other is refused before anything in it is used, and nothing is
allocated that it did not bring along. What is signed begins with a fixed text, its kind,
and every part with its length, so that no signature can pass for another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from numpy.typing import NDArray

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.secagg_shamir import SHARE_BYTES

__all__ = [
    "MOST_LENGTH",
    "MOST_MEMBERS",
    "NAME_BYTES",
    "SEALED_BYTES",
    "Advert",
    "Cohort",
    "Context",
    "Record",
    "advert_of",
    "bits",
    "byte_rows",
    "check_signature",
    "cohort_of",
    "flags",
    "read",
    "require_new",
    "statement",
]

Record = dict[str, NDArray[Any]]
"""Names and uint8, uint32 or int64 arrays."""

MOST_MEMBERS = 1024
MOST_LENGTH = 1 << 28  # numbers: 1 GiB
NAME_BYTES = 64
SEALED_BYTES = 2 * SHARE_BYTES + 16  # two shares and the tag of AES-GCM
KEY, SIGNATURE = 32, 64

_ADVERT = {"mask_key": KEY, "seal_key": KEY, "pledge": KEY, "signature": SIGNATURE}


@dataclass(frozen=True)
class Context:
    """What all members of one attempt at a sum agree on, and this party's own floors.

    A new attempt takes a new context, new members and a new collector.

    Attributes
    ----------
    job : str
        The run, at most 200 bytes.
    round, attempt : int
        From 0.
    model : bytes
        SHA-256 of what was broadcast to this member, 32 bytes: whom the server showed
        another model, nobody sums with.
    length : int
        Numbers in a vector, 1 to 2^28.
    share : float
        Of the cohort that must take part to the end: above 1/2, at most 1.
    min_cohort : int
        Fewest members that this party takes part with, from 2. Not agreed upon.
    min_survivors : int
        Fewest vectors that this party's may be summed with, its own included, from 2. A
        member's floor is in its signed advert, and all honest members keep to it.

    Raises
    ------
    FedtuneError
        A value is not as above.

    Examples
    --------
    >>> Context("job", 3, 0, bytes(32), length=10).digest().hex()[:16]
    '75853ec2c6ffab70'
    """

    job: str
    round: int
    attempt: int
    model: bytes
    length: int
    share: float = 2 / 3
    min_cohort: int = 3
    min_survivors: int = 2

    def __post_init__(self) -> None:
        limits = {
            "job": 0 < len(self.job.encode(errors="ignore")) <= 200 and _is_text(self.job),
            "round": 0 <= self.round < 1 << 63,
            "attempt": 0 <= self.attempt < 1 << 63,
            "model": len(self.model) == 32,
            "length": 1 <= self.length <= MOST_LENGTH,
            "share": 0.5 < self.share <= 1.0,
            "min_cohort": 2 <= self.min_cohort <= MOST_MEMBERS,
            "min_survivors": 2 <= self.min_survivors <= MOST_MEMBERS,
        }
        for name, fine in limits.items():
            if not fine:
                raise FedtuneError(
                    f"secure sum: {name}={getattr(self, name)!r}",
                    hint=f"2 to {MOST_MEMBERS} members, a share above 1/2, a digest of 32 bytes,"
                    f" vectors of 1 to {MOST_LENGTH} numbers",
                    code=ExitCode.CONFIG,
                )

    def digest(self) -> bytes:
        """Return the hash of what is agreed upon: all but the two floors, 32 bytes."""
        return hashlib.sha256(
            statement(
                "context", self.place(), self.model, _int(self.length), float(self.share).hex()
            )
        ).digest()

    def place(self) -> bytes:
        """Return job, round and attempt as bytes that no other three share."""
        return statement("place", self.job, _int(self.round), _int(self.attempt))


@dataclass(frozen=True)
class Advert:
    """A member's fresh public keys, and what it pledged itself to.

    Attributes
    ----------
    mask_key, seal_key : bytes
        X25519 public keys. Only the secret of the first is ever shared out.
    pledge : bytes
        SHA-256 of the seed of its own mask: tells a wrong seed from the right one.
    least : int
        Fewest vectors that it lets its own be summed with.
    signature : bytes
        Ed25519, of all this, the context and its name.
    """

    mask_key: bytes
    seal_key: bytes
    pledge: bytes
    least: int
    signature: bytes

    def signed(self, digest: bytes, name: str) -> bytes:
        """Return what the signature is over; ``digest`` is the context's."""
        return statement(
            "advert", digest, name, self.mask_key, self.seal_key, self.pledge, _int(self.least)
        )

    def record(self) -> Record:
        """Return it as it travels."""
        record: Record = {name: byte_rows([getattr(self, name)])[0] for name in _ADVERT}
        return record | {"least": np.array([self.least], np.int64)}


@dataclass(frozen=True)
class Cohort:
    """All members of an attempt, sorted by name, with their adverts."""

    context: bytes
    names: tuple[str, ...]
    adverts: tuple[Advert, ...]

    @cached_property
    def digest(self) -> bytes:
        """Hash over the context, all names and all adverts without their signatures."""
        signed = (
            advert.signed(self.context, name)
            for name, advert in zip(self.names, self.adverts, strict=True)
        )
        return hashlib.sha256(statement("cohort", *signed)).digest()

    def member(self, at: int) -> tuple[str, Advert]:
        """Return the name and the advert of the member at a place."""
        return self.names[at], self.adverts[at]

    def record(self) -> Record:
        """Return it as it travels."""
        record: Record = {
            name: byte_rows([getattr(advert, name) for advert in self.adverts]) for name in _ADVERT
        }
        padded = [name.encode().ljust(NAME_BYTES, b"\0") for name in self.names]
        least = np.array([advert.least for advert in self.adverts], np.int64)
        return record | {"name": byte_rows(padded), "least": least}

    def check(self, roster: Mapping[str, Ed25519PublicKey]) -> None:
        """Raise unless all are enrolled, differ, and signed their adverts in this context."""
        for name, advert in zip(self.names, self.adverts, strict=True):
            check_signature(roster, name, advert.signature, advert.signed(self.context, name))
        known: set[bytes] = set()
        for name, advert in zip(self.names, self.adverts, strict=True):
            require_new(known, name, advert, roster[name])


def advert_of(record: Record) -> Advert:
    """Read an advert; its signature is not checked yet.

    Raises
    ------
    FedtuneError
        The record is malformed.
    """
    shapes = {name: ("uint8", (size,)) for name, size in _ADVERT.items()}
    found = read("advert", record, shapes | {"least": ("int64", (1,))})
    return _advert({name: found[name].tobytes() for name in _ADVERT}, int(found["least"][0]))


def cohort_of(record: Record, context: bytes) -> Cohort:
    """Read a cohort; its signatures are not checked yet.

    Raises
    ------
    FedtuneError
        The record is malformed, or names are not sorted, differ and read the same way
        back.
    """
    names = record.get("name") if isinstance(record, dict) else None
    rows = names.shape[0] if isinstance(names, np.ndarray) and names.ndim == 2 else 0
    if not 1 <= rows <= MOST_MEMBERS:
        raise _malformed(f"cohort of {rows} members, not 1 to {MOST_MEMBERS}")
    shapes: dict[str, tuple[str, tuple[int, ...]]]
    shapes = {name: ("uint8", (rows, size)) for name, size in _ADVERT.items()}
    shapes |= {"name": ("uint8", (rows, NAME_BYTES)), "least": ("int64", (rows,))}
    found = read("cohort", record, shapes)
    listed = tuple(_name(row.tobytes()) for row in found["name"])
    if any(one >= after for one, after in pairwise(listed)):
        raise _malformed("cohort: names are not sorted, or one is there twice")
    adverts = tuple(
        _advert({name: found[name][at].tobytes() for name in _ADVERT}, int(found["least"][at]))
        for at in range(rows)
    )
    return Cohort(context, listed, adverts)


def read(
    what: str, record: Record, shapes: Mapping[str, tuple[str, tuple[int, ...]]]
) -> dict[str, NDArray[Any]]:
    """Return the arrays of a record that has exactly these names, types and shapes.

    Raises
    ------
    FedtuneError
        It has not.
    """
    if not isinstance(record, dict) or record.keys() != shapes.keys():
        raise _malformed(f"{what}: fields are not {sorted(shapes)}")
    for name, (dtype, shape) in shapes.items():
        value = record[name]
        if type(value) is not np.ndarray or value.dtype != dtype or value.shape != shape:
            raise _malformed(f"{what}.{name} is not {dtype} of shape {shape}")
    return record


def flags(what: str, value: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return a vector of 0 and 1 as truth values; anything else is refused."""
    if value.size and value.max() > 1:
        raise _malformed(f"{what} holds more than 0 and 1")
    return value.astype(np.bool_)


def bits(present: NDArray[np.bool_]) -> bytes:
    """Return a set of members as bytes, one for each member."""
    return present.astype(np.uint8).tobytes()


def byte_rows(rows: Iterable[bytes]) -> NDArray[np.uint8]:
    """Return byte strings of one length as a uint8 array of shape (rows, length)."""
    listed = list(rows)
    width = len(listed[0]) if listed else 0
    return np.frombuffer(b"".join(listed), np.uint8).reshape(len(listed), width)


def statement(kind: str, *parts: bytes | str) -> bytes:
    """Return bytes that only this kind with these parts gives.

    Examples
    --------
    >>> statement("x", b"ab", "c") == statement("x", b"a", "bc")
    False
    """
    encoded = [part.encode() if isinstance(part, str) else part for part in (kind, *parts)]
    return b"fedtune/secagg/v1" + b"".join(len(part).to_bytes(8, "big") + part for part in encoded)


def check_signature(
    roster: Mapping[str, Ed25519PublicKey], name: str, signature: bytes, message: bytes
) -> None:
    """Raise unless ``name`` is enrolled and signed ``message``.

    Raises
    ------
    FedtuneError
        It is not, or did not.
    """
    public = roster.get(name)
    if public is None:
        raise _refused(f"'{name}' is not enrolled", "compare the rosters of server and owner")
    try:
        public.verify(signature, message)
    except InvalidSignature as error:
        raise _refused(
            f"the signature of '{name}' is not over what was received",
            "another key, another round, another model, or altered on the way",
        ) from error


def require_new(known: set[bytes], name: str, advert: Advert, identity: Ed25519PublicKey) -> None:
    """Put a member's keys among the known ones; raise where one of them is there already.

    Raises
    ------
    FedtuneError
        It has a key, or the pledge, of another member: one is the other's copy.
    """
    keys = {advert.mask_key, advert.seal_key, advert.pledge, identity.public_bytes_raw()}
    if len(keys) < 4 or keys & known:
        raise _refused(f"'{name}' has a key that another member has", "enrol each owner once")
    known |= keys


def _advert(found: Mapping[str, bytes], least: int) -> Advert:
    if not 2 <= least <= MOST_MEMBERS:
        raise _malformed(f"least={least} is not 2 to {MOST_MEMBERS}")
    return Advert(least=least, **found)


def _name(padded: bytes) -> str:
    plain = padded.rstrip(b"\0")
    try:
        name = plain.decode()
    except UnicodeDecodeError as error:
        raise _malformed("cohort: a name is not UTF-8") from error
    if not name or "\0" in name:
        raise _malformed("cohort: a name is empty or holds a zero")
    return name


def _is_text(value: str) -> bool:
    """Say whether it is Unicode without half characters."""
    return value.encode(errors="ignore").decode() == value


def _int(value: int) -> bytes:
    return value.to_bytes(8, "big")


def _malformed(message: str) -> FedtuneError:
    return FedtuneError(
        message, hint="do both sides run the same version of fedtune?", code=ExitCode.ENGINE
    )


def _refused(message: str, hint: str) -> FedtuneError:
    return FedtuneError(message, hint=hint, code=ExitCode.SIGNATURE)
