"""Who may call: ECDSA P-384 keys in OpenSSH format, as Flower's nodes have them.

A call carries a signature over a fixed text, the method, the run, the client's and the
server's name, the time, a number used once, the model's digest and the SHA-256 of the
call's header, which itself names the SHA-256 of every tensor.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.errors import ExitCode, FedtuneError
from fedtune.split.calls import Refused, Status

__all__ = [
    "WINDOW",
    "Claim",
    "Gate",
    "admit",
    "knock",
    "metadata_of",
    "new_key",
    "public_line",
    "read_enrolled",
    "read_key",
    "write_key",
]

WINDOW = 300
"""Seconds that two clocks may differ."""

_CONTEXT = "fedtune body call, version 1"
_FIELDS = ("fedtune-client", "fedtune-time", "fedtune-nonce", "fedtune-signature-bin")
_NONCES = 1 << 17
"""Calls of one client that are remembered: 218 a second, all through two windows."""

Private = ec.EllipticCurvePrivateKey
Public = ec.EllipticCurvePublicKey


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
        File with a line ``NAME ecdsa-sha2-nistp384 KEY`` for each client; read again
        when it changes.
    server : str
        The name that clients must have signed for.
    """

    enrolled: Path
    server: str
    _keys: dict[str, tuple[tuple[int, int], dict[str, Public]]]
    _nonces: OrderedDict[tuple[str, str], float]
    _counts: Counter[str]
    _lock: threading.Lock

    @classmethod
    def at(cls, enrolled: Path, server: str) -> Gate:
        """Return the door for an enrolment file, which must be readable now."""
        gate = cls(enrolled, server, {}, OrderedDict(), Counter(), threading.Lock())
        gate.keys()
        return gate

    def keys(self) -> dict[str, Public]:
        """Return the enrolled clients, as the file says now."""
        with self._lock:
            try:
                stat = self.enrolled.stat()
            except OSError as error:
                raise _unreadable(self.enrolled, error) from error
            stamp = (stat.st_mtime_ns, stat.st_size)
            if "now" not in self._keys or self._keys["now"][0] != stamp:
                self._keys["now"] = (stamp, read_enrolled(self.enrolled))
            return self._keys["now"][1]

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


def new_key() -> Private:
    """Return a fresh private key."""
    return ec.generate_private_key(ec.SECP384R1())


def public_line(key: Private | Public) -> str:
    """Return a public key as OpenSSH writes it, without a comment.

    Examples
    --------
    >>> public_line(new_key()).split()[0]
    'ecdsa-sha2-nistp384'
    """
    public = key.public_key() if isinstance(key, Private) else key
    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return public.public_bytes(*form).decode()


def write_key(path: Path, key: Private) -> None:
    """Write a private key that only its owner can read, and ``PATH.pub`` beside it."""
    data = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )  # fmt: skip
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
    except FileExistsError as error:
        raise FedtuneError(
            f"'{path}' exists", hint="choose another name, or remove it", code=ExitCode.SIGNATURE
        ) from error
    path.with_name(path.name + ".pub").write_text(public_line(key) + "\n", encoding="ascii")


def read_key(path: Path) -> Private:
    """Read a private key without a password, in OpenSSH or PEM format.

    Raises
    ------
    FedtuneError
        It cannot be read, or is not on the curve P-384.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        openssh = b"OPENSSH PRIVATE KEY" in data
        key = (
            serialization.load_ssh_private_key(data, None) if openssh
            else serialization.load_pem_private_key(data, None)
        )  # fmt: skip
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _no_key(str(path)) from error
    if not isinstance(key, Private) or not isinstance(key.curve, ec.SECP384R1):
        raise _no_key(str(path))
    return key


def read_enrolled(path: Path) -> dict[str, Public]:
    """Read an enrolment file: ``NAME ssh-public-key``, lines with ``#`` apart.

    Raises
    ------
    FedtuneError
        It cannot be read, a name is there twice, or a key is not ECDSA P-384.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    found: dict[str, Public] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, key = line.strip().partition(" ")
        where = f"{path}: line {number}"
        if name in found:
            raise FedtuneError(
                f"{where}: '{name}' is there twice", hint="one line for a client",
                code=ExitCode.SIGNATURE,
            )  # fmt: skip
        try:
            public = serialization.load_ssh_public_key(key.strip().encode())
        except (ValueError, UnsupportedAlgorithm) as error:
            raise _no_key(where) from error
        if not isinstance(public, Public) or not isinstance(public.curve, ec.SECP384R1):
            raise _no_key(where)
        found[name] = public
    return found


def metadata_of(key: Private, claim: Claim) -> tuple[tuple[str, str | bytes], ...]:
    """Return what is sent with a call to prove who calls; each time it is another one."""
    when, nonce = str(int(time.time())), secrets.token_hex(16)
    signature = key.sign(claim.message(when, nonce), ec.ECDSA(hashes.SHA384()))
    return tuple(zip(_FIELDS, (claim.client, when, nonce, signature), strict=True))


def knock(
    gate: Gate, metadata: Iterable[tuple[str, str | bytes]]
) -> tuple[str, str, str, bytes, Public]:
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


def _unreadable(path: Path, error: Exception) -> FedtuneError:
    return FedtuneError(
        f"'{path}' cannot be read: {error}", hint="give the path of a readable file",
        code=ExitCode.SIGNATURE,
    )  # fmt: skip


def _no_key(where: str) -> FedtuneError:
    return FedtuneError(
        f"{where}: not an ECDSA P-384 key without a password",
        hint="make one with: ssh-keygen -t ecdsa -b 384 -N '' -f FILE",
        code=ExitCode.SIGNATURE,
    )
