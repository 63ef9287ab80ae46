"""Where the engine lives: its folder, its port, its certificates, and nobody beside it."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from fedtune.errors import ExitCode, FedtuneError
from fedtune.files import storage, try_lock, write_atomic

__all__ = ["Place", "check_certificate", "check_port", "free_port", "loopback_certificate", "take"]

_PATIENCE = 3.0
"""Children of a server that was killed are gone after half a second."""


@dataclass(frozen=True)
class Place:
    """Where a server keeps its state and how nodes reach it.

    Attributes
    ----------
    home : Path
        Folder of this server alone; made if it is not there.
    address : str
        ``HOST:PORT`` or ``[IPv6]:PORT`` that nodes connect to; 0.0.0.0 is every network.
    ca, certificate, key : Path
        PEM: the federation's authority, the server's certificate and its private key.
    most_bytes : int
        Longest single call that a node may make. Larger records travel in pieces of 5 MB;
        only one field of bytes (not an array) has to fit whole.
    """

    home: Path
    address: str
    ca: Path
    certificate: Path
    key: Path
    most_bytes: int = 64 << 20

    @property
    def database(self) -> Path:
        """Flower's nodes, runs and messages."""
        return self.home / "state.db"

    @property
    def superlink_log(self) -> Path:
        """What the SuperLink says."""
        return self.home / "superlink.log"

    @property
    def serverapp_log(self) -> Path:
        """What the ServerApp says."""
        return self.home / "serverapp.log"


def take(home: Path) -> int:
    """Make the folder, keep everybody else out, and return the open lock.

    Raises
    ------
    FedtuneError
        ``ExitCode.ENGINE``: another server works in it. ``ExitCode.STORAGE``.
    """
    with storage(home):
        home.mkdir(parents=True, exist_ok=True)
        home.chmod(0o700)
        lock = os.open(home / "engine.lock", os.O_RDWR | os.O_CREAT, 0o600)
    if not _within(_PATIENCE, lambda: try_lock(lock)):
        os.close(lock)
        raise FedtuneError(
            f"a server already runs in '{home}'",
            hint="stop it, or give this one a folder of its own",
            code=ExitCode.ENGINE,
        )
    return lock


def _within(seconds: float, done: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def check_port(address: str) -> None:
    """Make sure that the address can be listened on.

    Raises
    ------
    FedtuneError
        ``ExitCode.ENGINE``: it is taken, not of this machine, not allowed, or no address.
    """
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise FedtuneError(
            f"'{address}' is no address to listen on",
            hint="write HOST:PORT, for example 0.0.0.0:9092 or [::]:9092",
            code=ExitCode.ENGINE,
        )
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
    except OSError as error:
        what, hint = _REFUSALS.get(error.errno or 0, (error.strerror or str(error), "check it"))
        raise FedtuneError(
            f"cannot listen on {address}: {what}", hint=hint, code=ExitCode.ENGINE
        ) from error


_REFUSALS = {
    errno.EADDRINUSE: ("the port is taken", "stop what listens there, or choose another port"),
    errno.EADDRNOTAVAIL: ("this machine has no such address", "use 0.0.0.0 or one of its own"),
    errno.EACCES: ("not allowed", "choose a port above 1023"),
}


def free_port() -> int:
    """Return a loopback port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_certificate(place: Place) -> None:
    """Make sure that the server's certificate can be used with its key, today.

    Raises
    ------
    FedtuneError
        ``ExitCode.SIGNATURE``.
    """
    hint = "make them with: fedtune keys ca, fedtune keys server"
    try:
        x509.load_pem_x509_certificates(place.ca.read_bytes())
        own = x509.load_pem_x509_certificates(place.certificate.read_bytes())[0]
        key = load_pem_private_key(place.key.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise FedtuneError(
            f"the server's certificates cannot be read: {error}", hint=hint, code=ExitCode.SIGNATURE
        ) from error
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    if own.public_key().public_bytes(*form) != key.public_key().public_bytes(*form):
        raise FedtuneError(
            f"'{place.key}' is not the key of '{place.certificate}'",
            hint=hint,
            code=ExitCode.SIGNATURE,
        )
    if not own.not_valid_before_utc <= datetime.now(UTC) <= own.not_valid_after_utc:
        raise FedtuneError(
            f"'{place.certificate}' is valid from {own.not_valid_before_utc:%Y-%m-%d} to "
            f"{own.not_valid_after_utc:%Y-%m-%d}, and this machine's clock says "
            f"{datetime.now(UTC):%Y-%m-%d}",
            hint="renew it with: fedtune keys server; or set the clock",
            code=ExitCode.SIGNATURE,
        )


def loopback_certificate(home: Path) -> tuple[Path, Path]:
    """Write a new certificate and key for 127.0.0.1; return their files.

    The server's own certificate names its public host. This one lets the parts on this
    machine know each other: another account that takes the port while the SuperLink is
    away is shown no token.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedtune loopback")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # A clock that is set while the server runs must not end it.
        .not_valid_before(now - timedelta(days=3650))
        .not_valid_after(now + timedelta(days=3650))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    files = home / "loopback.pem", home / "loopback.key"
    for file, data in zip(
        files,
        (
            certificate.public_bytes(Encoding.PEM),
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        ),
        strict=True,
    ):
        write_atomic(file, data)
    return files
