"""X.509: a private CA of one level, server certificates under it, and what is wrong with one."""

from __future__ import annotations

import datetime as dt
import hashlib
import ipaddress
import re
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedtune.keys.files import read_bytes, read_private, refused, wrong

__all__ = [
    "ca_key_of",
    "common_name",
    "days_left",
    "federation_id",
    "federation_of",
    "hosts_of",
    "issue_authority",
    "issue_server",
    "new_server_key",
    "pem_of",
    "read_ca",
    "read_pem_key",
    "sans_of",
    "secret_of",
    "signed_by",
    "timely",
    "to_certificate",
]

CLOCKS = dt.timedelta(hours=1)
"""A certificate counts from so much before it was made: clocks differ."""
_CA_KEY = ec.SECP384R1
_SERVER_KEY = ec.SECP256R1
"""Hundreds of nodes that come back at once wait for signatures of this key."""
_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")
_ODD = (
    ValueError, x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType,
)  # fmt: skip
_COPY = "copy ca.pem from whoever set the federation up"


def federation_id(key: ec.EllipticCurvePublicKey) -> str:
    """Return the federation's id: 128 bits of the SHA-256 of its CA's public key, in hex."""
    form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(*form)).hexdigest()[:32]


def federation_of(ca_pem: bytes) -> str:
    """Return the id of the federation that a CA's certificate stands for.

    Raises
    ------
    FedtuneError
        ``SIGNATURE``: it is not a CA's certificate.
    """
    return federation_id(ca_key_of(ca_pem))


def ca_key_of(ca_pem: bytes) -> ec.EllipticCurvePublicKey:
    """Return the public key of a CA's certificate.

    Raises
    ------
    FedtuneError
        ``SIGNATURE``: no certificate, not a CA's, or not ECDSA P-384.
    """
    try:
        key = _ca(to_certificate(ca_pem, "ca.pem"), "ca.pem").public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise refused("ca.pem: the key cannot be read", _COPY) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _CA_KEY):
        raise refused("ca.pem: the key is not ECDSA P-384", _COPY)
    return key


def read_ca(path: Path, now: dt.datetime | None = None) -> bytes:
    """Read a federation's CA certificate, as a node has it.

    Returns
    -------
    bytes
        PEM, with this certificate and nothing else that a TLS library might trust.

    Raises
    ------
    FedtuneError
        ``SIGNATURE``: missing, not a certificate, not a CA's, expired or not yet valid.
    """
    certificate = _ca(to_certificate(read_bytes(path, _COPY), str(path)), str(path))
    timely(certificate, str(path), "a new federation is needed: ask who set it up", now)
    pem = pem_of(certificate)
    ca_key_of(pem)
    return pem


def to_certificate(data: bytes, where: str) -> x509.Certificate:
    """Read one certificate in PEM.

    Raises
    ------
    FedtuneError
        ``SIGNATURE``.
    """
    if data.count(b"-----BEGIN") > 1:
        # TLS would trust them all; the federation is one.
        raise refused(f"'{where}' holds more than one certificate", "give one alone")
    try:
        return x509.load_pem_x509_certificate(data)
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        hint = _COPY
        if b"PRIVATE KEY-----" in data:
            hint = "this is a private key: keep it, and give the certificate that belongs to it"
        raise refused(f"'{where}' is no certificate", hint) from error


def read_pem_key(path: Path, hint: str) -> ec.EllipticCurvePrivateKey:
    """Read a private key in PEM that nobody but its owner may read.

    Raises
    ------
    FedtuneError
        ``SIGNATURE``: missing, open to others, with a password, or no elliptic curve key.
    """
    data = read_private(path, hint)
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise refused(f"'{path}' is no private key without a password", hint) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise refused(f"'{path}' is no ECDSA key", hint)
    return key


def new_server_key() -> ec.EllipticCurvePrivateKey:
    """Return a fresh key for a server's certificate."""
    return ec.generate_private_key(_SERVER_KEY())


def secret_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key in PEM (PKCS 8, no password)."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def pem_of(certificate: x509.Certificate) -> bytes:
    """Return a certificate in PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def issue_authority(
    key: ec.EllipticCurvePrivateKey, name: str, days: int, now: dt.datetime
) -> x509.Certificate:
    """Return a CA's certificate, signed by itself; it may sign no other CA.

    Parameters
    ----------
    key : EllipticCurvePrivateKey
        P-384.
    name : str
        Shown to people: 1 to 64 characters that can be printed.
    days : int
        How long it is valid, 1 to 36500.
    now : datetime
        With its time zone.

    Raises
    ------
    FedtuneError
        ``CONFIG``: a name or a number of days that will not do.
    """
    if not 1 <= len(name) <= 64 or not name.isprintable() or name != name.strip():
        raise wrong(f"--name {name[:80]!r}", "1 to 64 characters that can be printed")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    public = key.public_key()
    return (
        _builder(subject, subject, public, now, now + dt.timedelta(days=_days(days)))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=False, certifies=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, hashes.SHA384())
    )


def issue_server(
    ca: x509.Certificate, ca_key: ec.EllipticCurvePrivateKey, key: ec.EllipticCurvePublicKey,
    hosts: Sequence[str], days: int, now: dt.datetime,
) -> x509.Certificate:  # fmt: skip
    """Return a server's certificate under a CA; it ends no later than the CA's own.

    Parameters
    ----------
    ca : Certificate
    ca_key : EllipticCurvePrivateKey
    key : EllipticCurvePublicKey
        The server's.
    hosts : sequence of str
        DNS names and IP addresses that nodes will use for it.
    days : int
        1 to 36500.
    now : datetime

    Raises
    ------
    FedtuneError
        ``CONFIG``: no host, one that is neither a DNS name nor an IP address, wrong days.
    """
    names = sans_of(hosts)
    until = min(now + dt.timedelta(days=_days(days)), ca.not_valid_after_utc)
    title = next((host for host in hosts if len(host) <= 64), "fedtune server")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, title)])
    issuer_id = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    authority = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_id)
    return (
        _builder(subject, ca.subject, key, now, until)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=True, certifies=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(authority, critical=False)
        .sign(ca_key, hashes.SHA384())
    )


def sans_of(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """Return hosts as a certificate names them: DNS names and IP addresses.

    Raises
    ------
    FedtuneError
        ``CONFIG``: none, too many, or not a host.

    Examples
    --------
    >>> [type(one).__name__ for one in sans_of(["fl.example.org", "127.0.0.1", "::1"])]
    ['DNSName', 'IPAddress', 'IPAddress']
    """
    if not 1 <= len(hosts) <= 100:
        raise wrong(f"{len(hosts)} hosts", "name the hosts that nodes will use, at most 100")
    found: list[x509.GeneralName] = []
    for host in hosts:
        try:
            one: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            labels = host.split(".")
            # An address that is mistyped, such as 10.0.0.256, would pass as a name.
            if len(host) > 253 or not all(map(_LABEL.fullmatch, labels)) or labels[-1].isdigit():
                raise wrong(
                    f"{host[:80]!r} is neither a host name nor an IP address",
                    "such as fl.example.org or 10.0.0.5: no port, no https://, no wildcard",
                ) from None
            one = x509.DNSName(host.lower())
        if one not in found:
            found.append(one)
    return found


def hosts_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """Return the DNS names and IP addresses that a certificate is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except _ODD:
        return ()
    return (
        *names.get_values_for_type(x509.DNSName),
        *map(str, names.get_values_for_type(x509.IPAddress)),
    )


def common_name(name: x509.Name) -> str:
    """Return a name as people see it."""
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else name.rfc4514_string()


def signed_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    """Say whether a CA signed a certificate."""
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def timely(
    certificate: x509.Certificate, where: str, hint: str, now: dt.datetime | None = None
) -> dt.datetime:
    """Return until when a certificate is valid.

    Raises
    ------
    FedtuneError
        ``SIGNATURE``: expired, or not yet valid; the clock is named.
    """
    now = now or dt.datetime.now(dt.UTC)
    until = certificate.not_valid_after_utc
    if now > until:
        raise refused(f"'{where}' expired on {until:%Y-%m-%d %H:%M} UTC (now {now:%F %R})", hint)
    if now < certificate.not_valid_before_utc:
        since = certificate.not_valid_before_utc
        raise refused(
            f"'{where}' is not valid before {since:%Y-%m-%d %H:%M} UTC (now {now:%F %R})",
            "set this machine's clock",
        )
    return until


def days_left(until: dt.datetime, now: dt.datetime) -> int:
    """Return whole days until then, below zero when it has passed.

    Examples
    --------
    >>> days_left(dt.datetime(2030, 1, 11, 9), dt.datetime(2030, 1, 1, 12))
    9
    """
    return (until - now).days


def _ca(certificate: x509.Certificate, where: str) -> x509.Certificate:
    try:
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except _ODD:
        basic = None
    if basic is None or not basic.ca:
        raise refused(f"'{where}' is a certificate, but not a CA's", _COPY)
    return certificate


def _days(days: int) -> int:
    if not 1 <= days <= 36500:
        raise wrong(f"--days {days}", "1 to 36500")
    return days


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey,
    now: dt.datetime, until: dt.datetime,
) -> x509.CertificateBuilder:  # fmt: skip
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCKS)
        .not_valid_after(until)
    )


def _usage(*, signs: bool, certifies: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=signs, key_cert_sign=certifies, crl_sign=certifies,
        content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
