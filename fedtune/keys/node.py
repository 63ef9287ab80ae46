"""A node's identity: one file with two private keys, and one line that others may see.

ECDSA P-384 is what Flower's nodes log in with; Ed25519 signs in secure aggregation. Both
are in OpenSSH's format, ECDSA first, so that ``ssh-keygen`` and Flower's own node read the
file too; a last line holds the name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from fedtune.errors import FedtuneError
from fedtune.keys.files import absent, place, read_bytes, read_private, refused, wrong
from fedtune.privacy.signing_keys import fingerprint

__all__ = [
    "Identity",
    "Login",
    "LoginPublic",
    "Public",
    "check_name",
    "fingerprint_of",
    "line_of",
    "new_identity",
    "new_key",
    "parse_line",
    "public_line",
    "public_of",
    "read_enrolled",
    "read_identity",
    "read_key",
    "read_public",
    "write_identity",
]

Login = ec.EllipticCurvePrivateKey
LoginPublic = ec.EllipticCurvePublicKey

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_BLOCK = (
    r"-----BEGIN OPENSSH PRIVATE KEY-----\n[A-Za-z0-9+/=\n]+\n-----END OPENSSH PRIVATE KEY-----\n"
)
_FILE = re.compile(rf"({_BLOCK})({_BLOCK})# fedtune node ({_NAME.pattern})\n?")
_MOST_LINE = 1024
_MOST_ENROLLED = 1 << 24
_OPENSSH = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
_UNREADABLE = (
    ValueError, TypeError, UnsupportedAlgorithm, NotImplementedError, IndexError,
)  # fmt: skip
"""What the library raises for keys; the last two for points that are compressed or empty."""
_MAKE = "make one with: fedtune keys node NAME"
_ASK = "ask the node for the file NAME.pub that 'fedtune keys node' made"


@dataclass(frozen=True)
class Identity:
    """What a node is: its name and its private keys.

    Attributes
    ----------
    name : str
    login : Login
        ECDSA P-384, for Flower's node authentication and for calls of the body server.
    signer : Ed25519PrivateKey
        Signs in secure aggregation.
    """

    name: str
    login: Login = field(repr=False)
    signer: Ed25519PrivateKey = field(repr=False)


@dataclass(frozen=True)
class Public:
    """What others know of a node."""

    name: str
    login: LoginPublic
    signer: Ed25519PublicKey


def check_name(name: str) -> str:
    """Return a node's name, which is a file's name too.

    Raises
    ------
    FedtuneError
        ``CONFIG``: not 1 to 64 letters, digits, dots, underscores and hyphens, the first
        one a letter or a digit.

    Examples
    --------
    >>> check_name("ward-7")
    'ward-7'
    """
    if not _NAME.fullmatch(name):
        raise wrong(
            f"{name[:80]!r} is no name for a node",
            "1 to 64 of A-Z a-z 0-9 . _ - and a letter or digit first",
        )
    return name


def new_identity(name: str) -> Identity:
    """Return fresh keys under a name."""
    return Identity(check_name(name), new_key(), Ed25519PrivateKey.generate())


def public_of(identity: Identity) -> Public:
    """Return what others may know."""
    return Public(identity.name, identity.login.public_key(), identity.signer.public_key())


def write_identity(path: Path, identity: Identity) -> Path:
    """Write a node's keys for its owner alone (0600), and its public line beside them.

    Parameters
    ----------
    path : Path
        ``NAME.key``; the line goes to ``NAME.pub``. Neither may be there.
    identity : Identity

    Returns
    -------
    Path
        Of the public line.

    Raises
    ------
    FedtuneError
        ``CONFIG`` when one of the files is there, ``STORAGE`` when the disk refuses.
    """
    beside = path.with_suffix(".pub") if path.suffix == ".key" else Path(f"{path}.pub")
    absent(path, beside)
    blocks = b"".join(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
        for key in (identity.login, identity.signer)
    )
    name = check_name(identity.name)
    place(path, blocks + f"# fedtune node {name}\n".encode("ascii"))
    try:
        place(beside, (line_of(public_of(identity)) + "\n").encode("ascii"), 0o644)
    except BaseException:
        # Half of it would stand in the way of the next try.
        path.unlink()
        raise
    return beside


def read_identity(path: Path) -> Identity:
    """Read what :func:`write_identity` wrote.

    Raises
    ------
    FedtuneError
        ``SIGNATURE``: missing, not such a file, or others can read it.
    """
    data = read_private(path, _MAKE)
    try:
        found = _FILE.fullmatch(data.decode("ascii").replace("\r\n", "\n"))
    except UnicodeDecodeError:
        found = None
    if found is None:
        raise refused(f"'{path}' does not hold a node's two keys and its name", _MAKE)
    try:
        login, signer = (
            serialization.load_ssh_private_key(block.encode("ascii"), None)
            for block in found.groups()[:2]
        )
    except _UNREADABLE as error:
        raise refused(f"'{path}' has a key that is damaged or has a password", _MAKE) from error
    if (
        not isinstance(login, Login) or not isinstance(login.curve, ec.SECP384R1)
        or not isinstance(signer, Ed25519PrivateKey)
    ):  # fmt: skip
        raise refused(f"'{path}': the keys are not ECDSA P-384 and Ed25519, in this order", _MAKE)
    return Identity(found[3], login, signer)


def line_of(public: Public) -> str:
    """Return the one line that others may know, without an end of line.

    Examples
    --------
    >>> line_of(public_of(new_identity("ann"))).split()[::2]
    ['ann', 'AAAA...', 'AAAA...']
    """
    signer = public.signer.public_bytes(*_OPENSSH).decode("ascii")
    return f"{public.name} {public_line(public.login)} {signer}"


def parse_line(line: str) -> Public:
    """Read one line; anything but what :func:`line_of` writes is refused.

    Raises
    ------
    FedtuneError
        ``SIGNATURE``.
    """
    given = line[: _MOST_LINE + 1].strip(" \r\n")
    parts = given.split(" ")
    if len(given) > _MOST_LINE or not given.isascii() or len(parts) != 5:
        raise _no_line("not one line with a name and two keys")
    if not _NAME.fullmatch(parts[0]):
        raise _no_line(f"{parts[0][:80]!r} is no name for a node")
    try:
        login, signer = (
            serialization.load_ssh_public_key(" ".join(parts[at : at + 2]).encode("ascii"))
            for at in (1, 3)
        )
    except _UNREADABLE as error:
        raise _no_line(f"a key of '{parts[0]}' is damaged") from error
    if (
        not isinstance(login, LoginPublic) or not isinstance(login.curve, ec.SECP384R1)
        or not isinstance(signer, Ed25519PublicKey)
    ):  # fmt: skip
        raise _no_line(f"the keys of '{parts[0]}' are not ECDSA P-384 and Ed25519, in this order")
    public = Public(parts[0], login, signer)
    if line_of(public) != given:
        # Two spellings of a key would be two fingerprints of one node.
        raise _no_line(f"a key of '{parts[0]}' is written in an unusual way")
    return public


def read_public(path: Path) -> Public:
    """Read the line in a file ``NAME.pub``.

    Raises
    ------
    FedtuneError
        ``SIGNATURE``: missing, or not one such line.
    """
    try:
        text = read_bytes(path, _ASK).decode("ascii")
    except UnicodeDecodeError as error:
        raise refused(f"'{path}' is not a node's public line", _ASK) from error
    try:
        return parse_line(text)
    except FedtuneError as error:
        raise refused(f"'{path}': {error}", _ASK) from error


def fingerprint_of(public: Public) -> str:
    """Return 128 bits of the SHA-256 of a node's line, for people to compare by phone.

    Examples
    --------
    >>> len(fingerprint_of(public_of(new_identity("ann"))).split())
    8
    """
    return fingerprint(line_of(public).encode("ascii").hex())


def new_key() -> Login:
    """Return a fresh private key to log in with."""
    return ec.generate_private_key(ec.SECP384R1())


def public_line(key: Login | LoginPublic) -> str:
    """Return a public key as OpenSSH writes it, without a comment.

    Examples
    --------
    >>> public_line(new_key()).split()[0]
    'ecdsa-sha2-nistp384'
    """
    public = key.public_key() if isinstance(key, Login) else key
    return public.public_bytes(*_OPENSSH).decode("ascii")


def read_key(path: Path) -> Login:
    """Read the key that a node logs in with: from ``NAME.key``, or alone in OpenSSH or PEM.

    Raises
    ------
    FedtuneError
        ``SIGNATURE``: it cannot be read, others can read it, it has a password, or it is
        not on the curve P-384.
    """
    data = read_private(path, _MAKE)
    try:
        openssh = b"OPENSSH PRIVATE KEY" in data
        key = (
            serialization.load_ssh_private_key(data, None) if openssh
            else serialization.load_pem_private_key(data, None)
        )  # fmt: skip
    except _UNREADABLE as error:
        raise _no_key(str(path)) from error
    if not isinstance(key, Login) or not isinstance(key.curve, ec.SECP384R1):
        raise _no_key(str(path))
    return key


def read_enrolled(path: Path) -> dict[str, LoginPublic]:
    """Read a body server's enrolment file.

    Parameters
    ----------
    path : Path
        Lines ``NAME ecdsa-sha2-nistp384 KEY``; what follows is a comment or a second key,
        so a node's ``NAME.pub`` is such a line. Lines with ``#`` are left out.

    Raises
    ------
    FedtuneError
        ``SIGNATURE``: it cannot be read, a name is there twice, or a key is not ECDSA P-384.
    """
    try:
        text = read_bytes(path, "give the path of a readable file", _MOST_ENROLLED).decode()
    except UnicodeDecodeError as error:
        raise refused(f"'{path}' cannot be read: {error}", "it is no text") from error
    found: dict[str, LoginPublic] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, key = line.strip().partition(" ")
        where = f"{path}: line {number}"
        if name in found:
            raise refused(f"{where}: {name[:80]!r} is there twice", "one line for a client")
        try:
            public = serialization.load_ssh_public_key(key.strip().encode())
        except _UNREADABLE as error:
            raise _no_key(where) from error
        if not isinstance(public, LoginPublic) or not isinstance(public.curve, ec.SECP384R1):
            raise _no_key(where)
        found[name] = public
    return found


def _no_line(message: str) -> FedtuneError:
    return refused(message, _ASK)


def _no_key(where: str) -> FedtuneError:
    return refused(f"{where}: not an ECDSA P-384 key without a password", _MAKE)
