"""Who may call: ECDSA P-384 keys in OpenSSH format, as Flower's nodes have them.

A call carries a signature over a fixed text, the method, the run, the client's and the
server's name, the time, a number used once, the model's digest and the SHA-256 of the
call's header, which itself names the SHA-256 of every tensor.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.files import Fresh
from fedtune.keys.node import Login, LoginPublic, read_enrolled
from fedtune.split.calls import Refused, Status

__all__ = [
    "WINDOW",
    "Claim",
    "Gate",
    "admit",
    "knock",
    "metadata_of",
]

WINDOW = 300
"""Seconds that two clocks may differ."""

_CONTEXT = "fedtune body call, version 1"
_FIELDS = ("fedtune-client", "fedtune-time", "fedtune-nonce", "fedtune-signature-bin")
_NONCES = 1 << 17
"""Calls of one client that are remembered: 218 a second, all through two windows."""


@dataclass(frozen=True)
class Claim:
    """What a signature is about; ``digest`` is the SHA-256 of the call's header."""

    method: str
    run: str
    client: str
    server: str
    model: str
    digest: bytes

    def message(self, when: str, nonce: str) -> bytes:
        """Return the bytes that are signed: every field with its length before it."""
        words = (
            _CONTEXT, self.method, self.run, self.client, self.server, self.model, when, nonce,
            self.digest.hex(),
        )  # fmt: skip
        return b"".join(len(w.encode()).to_bytes(4, "big") + w.encode() for w in words)


@dataclass(frozen=True)
class Gate:
    """A server's door.

    Attributes
    ----------
    enrolled : Path
        File with a line for each client (see :func:`fedtune.keys.node.read_enrolled`);
        read again when it changes.
    server : str
        The name that clients must have signed for.
    """

    enrolled: Path
    server: str
    _keys: Fresh[dict[str, LoginPublic]]
    _nonces: OrderedDict[tuple[str, str], float]
    _counts: Counter[str]
    _lock: threading.Lock

    @classmethod
    def at(cls, enrolled: Path, server: str) -> Gate:
        """Return the door for an enrolment file, which must be readable now."""
        file = Fresh(enrolled, lambda: read_enrolled(enrolled))
        gate = cls(enrolled, server, file, OrderedDict(), Counter(), threading.Lock())
        gate.keys()
        return gate

    def keys(self) -> dict[str, LoginPublic]:
        """Return the enrolled clients, as the file says now."""
        with self._lock:
            return self._keys.now()

    def first_time(self, client: str, nonce: str, now: float) -> bool:
        """Say whether a client's number was not used within the window; remember it.

        Raises
        ------
        Refused
            RESOURCE_EXHAUSTED for a client that called too often; others still may.
        """
        with self._lock:
            while self._nonces and next(iter(self._nonces.values())) < now - 2 * WINDOW:
                (gone, _), _ = self._nonces.popitem(last=False)
                self._counts[gone] -= 1
                if not self._counts[gone]:
                    del self._counts[gone]
            if (client, nonce) in self._nonces:
                return False
            if self._counts[client] >= _NONCES:
                # To forget one that still counts would let it be used again.
                raise Refused(
                    Status.RESOURCE_EXHAUSTED,
                    f"client '{client}' made too many calls to remember", wait=1.0,
                )  # fmt: skip
            self._nonces[client, nonce] = now
            self._counts[client] += 1
            return True


def metadata_of(key: Login, claim: Claim) -> tuple[tuple[str, str | bytes], ...]:
    """Return what is sent with a call to prove who calls; each time it is another one."""
    when, nonce = str(int(time.time())), secrets.token_hex(16)
    signature = key.sign(claim.message(when, nonce), ec.ECDSA(hashes.SHA384()))
    return tuple(zip(_FIELDS, (claim.client, when, nonce, signature), strict=True))


def knock(
    gate: Gate, metadata: Iterable[tuple[str, str | bytes]]
) -> tuple[str, str, str, bytes, LoginPublic]:
    """Check what can be checked before a call is read: form, name and clock.

    Returns
    -------
    name, when, nonce : str
    signature : bytes
        Not verified yet.
    key : Public
        The one that the name is enrolled with.

    Raises
    ------
    Refused
        UNAUTHENTICATED without a signature; PERMISSION_DENIED for a client that is not
        enrolled, or a clock that is off.
    """
    given = dict(metadata)
    values = [given.get(field) for field in _FIELDS]
    name, when, nonce, signature = values
    if not (
        isinstance(name, str) and isinstance(when, str) and isinstance(nonce, str)
        and isinstance(signature, bytes) and when.isascii() and when.isdigit()
        and len(when) < 20 and len(nonce) <= 64
    ):  # fmt: skip
        raise Refused(Status.UNAUTHENTICATED, "this call is not signed", "give the client its key")
    key = gate.keys().get(name)
    if key is None:
        raise Refused(
            Status.PERMISSION_DENIED, f"client '{name[:80]}' is not enrolled here",
            "add its line to the enrolment file",
        )  # fmt: skip
    apart = abs(time.time() - int(when))
    if apart > WINDOW:
        raise Refused(
            Status.PERMISSION_DENIED, f"the clocks are {apart:.0f} s apart",
            f"set them: at most {WINDOW} s",
        )  # fmt: skip
    return name, when, nonce, signature, key


def admit(gate: Gate, metadata: Iterable[tuple[str, str | bytes]], claim: Claim) -> None:
    """Let a call in, or refuse it.

    Parameters
    ----------
    gate : Gate
    metadata : pairs of name and value
        As they came with the call.
    claim : Claim
        What the call itself says; ``server`` is this server's name.

    Raises
    ------
    Refused
        UNAUTHENTICATED without a good signature; PERMISSION_DENIED for a client that is
        not enrolled, another name, a clock that is off, a call that was made before.
    """
    name, when, nonce, signature, key = knock(gate, metadata)
    if name != claim.client:
        raise Refused(Status.PERMISSION_DENIED, f"client '{claim.client}' called as '{name}'")
    try:
        key.verify(signature, claim.message(when, nonce), ec.ECDSA(hashes.SHA384()))
    except InvalidSignature as error:
        raise Refused(
            Status.UNAUTHENTICATED, f"the signature of '{name}' is not over this call",
            "its key is another one, or it was meant for another server",
        ) from error  # fmt: skip
    if not gate.first_time(name, nonce, time.time()):
        raise Refused(Status.PERMISSION_DENIED, f"this call of '{name}' was made before")
