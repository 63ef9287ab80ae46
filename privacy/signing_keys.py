"""Keys for signing reports: Ed25519 in PEM, the private one for its owner's eyes only."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from fedtune.errors import ExitCode, FedtuneError

__all__ = ["Signer", "default_key", "fingerprint", "read_public", "read_signer", "refused"]


@dataclass(frozen=True)
class Signer:
    """A private key and its public name.

    Attributes
    ----------
    public : str
        Public key, 64 hexadecimal digits.
    """

    public: str
    _private: Ed25519PrivateKey = field(repr=False)

    def sign(self, message: bytes) -> str:
        """Return the signature, 128 hexadecimal digits."""
        return self._private.sign(message).hex()


def fingerprint(public: str) -> str:
    """Return the name of a public key, for people to compare.

    Examples
    --------
    >>> fingerprint("00" * 32)
    '6668 7aad f862 bd77 6c8f c18b 8e9f 8e20'
    """
    digest = hashlib.sha256(bytes.fromhex(public)).hexdigest()[:32]
    return " ".join(digest[i : i + 4] for i in range(0, 32, 4))


def default_key() -> Path:
    """Return where the key is kept when nobody names another: the user's configuration."""
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(home).expanduser() / "fedtune" / "report.key"


def read_signer(path: Path | None, say: Callable[[str], None]) -> Signer:
    """Return the key to sign with.

    Parameters
    ----------
    path : Path or None
        A private key in PEM. ``None``: the one that FEDTUNE_SIGNING_KEY names, else
        the default one, which is made on first use, readable by its owner only.
    say : callable
        Told when a key is made.

    Raises
    ------
    FedtuneError
        ``ExitCode.SIGNATURE`` when it cannot be read, is no Ed25519 key, or others can read it.
    """
    named = path or (Path(os.environ["FEDTUNE_SIGNING_KEY"]).expanduser()
                     if os.environ.get("FEDTUNE_SIGNING_KEY") else None)  # fmt: skip
    if named is None:
        named = default_key()
        if not named.exists():
            _make(named, say)
    data = _read(named)
    mode = stat.S_IMODE(named.stat().st_mode)
    if mode & 0o077:
        raise refused(
            f"key '{named}' can be read by others (mode {mode:04o})", f"chmod 600 {named}"
        )
    try:
        private = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _no_key(named) from error
    if not isinstance(private, Ed25519PrivateKey):
        raise _no_key(named)
    return Signer(_raw(private.public_key()), private)


def read_public(path: Path) -> str:
    """Return the public key in a file: PEM, OpenSSH, or the private key's own public half.

    Raises
    ------
    FedtuneError
        ``ExitCode.SIGNATURE`` when there is none.
    """
    data = _read(path)
    loaders: tuple[Callable[[bytes], Any], ...] = (
        serialization.load_pem_public_key,
        serialization.load_ssh_public_key,
        lambda given: serialization.load_pem_private_key(given, password=None).public_key(),
    )
    for load in loaders:
        try:
            found = load(data)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            continue
        if isinstance(found, Ed25519PublicKey):
            return _raw(found)
    raise _no_key(path)


def _raw(public: Ed25519PublicKey) -> str:
    return public.public_bytes_raw().hex()


def _make(path: Path, say: Callable[[str], None]) -> None:
    """Make a key; when two processes do so at once, one key wins."""
    private = Ed25519PrivateKey.generate()
    secret = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    try:
        if not _placed(path, secret):
            return
        path.with_suffix(".pub").write_bytes(public)
    except OSError as error:
        raise refused(
            f"no signing key can be made at '{path}': {error.strerror or error}",
            "name one with --key or FEDTUNE_SIGNING_KEY",
        ) from error
    say(
        f"made a signing key: '{path}' (keep it), '{path.with_suffix('.pub')}' (give it to who "
        f"checks reports); fingerprint {fingerprint(_raw(private.public_key()))}"
    )


def _placed(path: Path, secret: bytes) -> bool:
    """Put a whole key in place, mode 0600, unless somebody else just did."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".report.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secret)
            file.flush()
            os.fsync(file.fileno())
        os.link(name, path)
    except FileExistsError:
        return False
    finally:
        Path(name).unlink(missing_ok=True)
    return True


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise refused(
            f"key '{path}' cannot be read: {error.strerror or error}",
            "make one with: openssl genpkey -algorithm ed25519 -out FILE",
        ) from error


def _no_key(path: Path) -> FedtuneError:
    return refused(
        f"'{path}' is no Ed25519 key without a password",
        "make one with: openssl genpkey -algorithm ed25519 -out FILE",
    )


def refused(message: str, hint: str) -> FedtuneError:
    """Return the error of a key or a signature that will not do."""
    return FedtuneError(message, hint=hint, code=ExitCode.SIGNATURE)
