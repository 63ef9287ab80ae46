"""A keys folder: the federation's CA, and the server's certificate under it."""

from __future__ import annotations

import datetime as dt
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.errors import FedtuneError
from fedtune.keys import certificates as x5
from fedtune.keys import files
from fedtune.keys.certificates import federation_of, read_ca
from fedtune.keys.files import read_bytes, refused, wrong
from fedtune.keys.node import fingerprint_of
from fedtune.keys.roster import ca_key_in, encode, first, read_roster

__all__ = [
    "Authority",
    "ServerFacts",
    "check_server",
    "describe",
    "federation_of",
    "make_authority",
    "make_server",
    "read_ca",
]

SOON = 30
"""Days before its end from which a certificate is warned about."""
_NONE = "make a federation with: fedtune keys ca"
_SERVER = "make one with: fedtune keys server HOST"
_RENEW = "renew it where the CA's key is kept: fedtune keys server --renew"


@dataclass(frozen=True)
class Authority:
    """A federation's CA.

    Attributes
    ----------
    federation : str
        Its id, 32 hexadecimal digits.
    name : str
        For people.
    until : datetime
        End of its certificate.
    days_left : int
    """

    federation: str
    name: str
    until: dt.datetime
    days_left: int


@dataclass(frozen=True)
class ServerFacts:
    """A server's certificate that was checked.

    Attributes
    ----------
    authority : Authority
        Who signed it.
    hosts : tuple of str
        What nodes may call it.
    until : datetime
    days_left : int
    warnings : tuple of str
        What ends within 30 days.
    """

    authority: Authority
    hosts: tuple[str, ...]
    until: dt.datetime
    days_left: int
    warnings: tuple[str, ...]


def make_authority(
    folder: Path, name: str, days: int = 3650, now: dt.datetime | None = None
) -> Authority:
    """Make a federation: ca.key, an empty roster, ca.pem; the folder is its owner's alone.

    Parameters
    ----------
    folder : Path
        New, empty, or its owner's alone already. A ``ca.key`` without ``ca.pem`` is taken
        over: the certificate was lost, or the last try was cut short.
    name : str
        For people; 1 to 64 characters.
    days : int
        1 to 36500.
    now : datetime, optional
        The clock.

    Raises
    ------
    FedtuneError
        ``CONFIG``: there is a federation already, or name, days or folder will not do;
        ``STORAGE``.
    """
    now = now or dt.datetime.now(dt.UTC)
    files.private_folder(folder)
    with files.locked(folder):
        files.absent(folder / "ca.pem")
        key = ec.generate_private_key(ec.SECP384R1())
        held = os.path.lexists(folder / "ca.key")
        if held:
            key = x5.read_pem_key(folder / "ca.key", "remove it, or choose another --folder")
        certificate = x5.issue_authority(key, name, days, now)
        pem = x5.pem_of(certificate)
        x5.ca_key_of(pem)
        if not held:
            files.absent(folder / "roster")
            files.place(folder / "ca.key", x5.secret_of(key))
        if not os.path.lexists(folder / "roster"):
            files.place(folder / "roster", encode(first(key.public_key()), key), 0o644)
        # Last: where it is, the rest is.
        files.place(folder / "ca.pem", pem, 0o644)
    return _authority(pem, certificate, now)


def make_server(
    folder: Path, hosts: Sequence[str], days: int = 825, *, renew: bool = False,
    now: dt.datetime | None = None,
) -> ServerFacts:  # fmt: skip
    """Make a server's key and certificate, or renew the certificate.

    Parameters
    ----------
    folder : Path
        With ca.pem and ca.key.
    hosts : sequence of str
        DNS names and IP addresses that nodes use; with ``renew`` none means: as before.
    days : int
        1 to 36500, no longer than the CA's own certificate.
    renew : bool
        Replace server.pem. server.key is kept; a new one is made when it is not there.
    now : datetime, optional
        The clock.

    Raises
    ------
    FedtuneError
        ``CONFIG``: wrong hosts or days, or there is one already; ``SIGNATURE``: the CA's
        files are missing, expired or do not belong together; ``STORAGE``.
    """
    now = now or dt.datetime.now(dt.UTC)
    ca_pem, ca = _ca(folder, now)
    ca_key = ca_key_in(folder)
    key_path, path = folder / "server.key", folder / "server.pem"
    with files.locked(folder):
        if not renew and os.path.lexists(path):
            raise wrong(f"'{path}' is there already", "replace it with: --renew")
        if renew and not hosts:
            hosts = x5.hosts_of(_certificate(path))
        held = os.path.lexists(key_path)
        key = x5.read_pem_key(key_path, _SERVER) if held else x5.new_server_key()
        made = x5.issue_server(ca, ca_key, key.public_key(), hosts, days, now)
        if not held:
            files.place(key_path, x5.secret_of(key))
        files.replace(path, x5.pem_of(made))
    return _facts(_authority(ca_pem, ca, now), made, now)


def check_server(folder: Path, now: dt.datetime | None = None) -> ServerFacts:
    """Check what a server needs to open its door: ca.pem, server.pem, server.key.

    Raises
    ------
    FedtuneError
        ``SIGNATURE``: something is missing, expired, not yet valid, open to others, or
        does not belong to the rest. The CA's key need not be there.
    """
    now = now or dt.datetime.now(dt.UTC)
    ca_pem, ca = _ca(folder, now)
    path, key_path = folder / "server.pem", folder / "server.key"
    certificate = _certificate(path)
    if not x5.signed_by(certificate, ca):
        raise refused(
            f"'{path}' belongs to another federation: '{x5.common_name(certificate.issuer)}' "
            f"signed it, not the CA '{x5.common_name(ca.subject)}' in '{folder / 'ca.pem'}'",
            "copy server.pem, server.key and ca.pem from one keys folder",
        )
    x5.timely(certificate, str(path), _RENEW, now)
    key = x5.read_pem_key(key_path, _SERVER)
    if key.public_key() != certificate.public_key():
        raise refused(
            f"'{key_path}' does not belong to '{path}'",
            "copy both from one keys folder, or: fedtune keys server --renew",
        )
    facts = _facts(_authority(ca_pem, ca, now), certificate, now)
    if not facts.hosts:
        raise refused(f"'{path}' names no host", _RENEW)
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & 0o022:
        raise refused(
            f"'{folder}' can be changed by others (mode {mode:04o})", f"chmod 700 {folder}"
        )
    if os.path.lexists(folder / "ca.key"):
        ca_key_in(folder)
    return facts


def describe(folder: Path, now: dt.datetime | None = None) -> dict[str, Any]:
    """Return what is in a keys folder, as JSON values; what is wrong with it is in words.

    Returns
    -------
    dict
        ``folder``, ``federation``, ``name``, ``until``, ``days_left``, ``ca_key`` (whether
        it is here), ``server`` (``hosts``, ``until``, ``days_left``, or ``None``),
        ``serial``, ``issued``, ``nodes`` and ``revoked`` (each ``name``,
        ``fingerprint``), ``warnings``, ``problems`` (each ``error``, ``hint``).

    Raises
    ------
    FedtuneError
        ``SIGNATURE``: there is no federation here, or its certificate cannot be read.
    """
    now = now or dt.datetime.now(dt.UTC)
    ca_pem = read_bytes(folder / "ca.pem", _NONE)
    ca = x5.to_certificate(ca_pem, str(folder / "ca.pem"))
    authority = _authority(ca_pem, ca, now)
    problems: list[dict[str, str]] = []
    found: dict[str, Any] = {
        "folder": str(folder), "federation": authority.federation, "name": authority.name,
        "until": _time(authority.until), "days_left": authority.days_left,
        "ca_key": os.path.lexists(folder / "ca.key"), "server": None, "serial": None,
        "issued": None, "nodes": [], "revoked": [], "warnings": [], "problems": problems,
    }  # fmt: skip
    has_server = os.path.lexists(folder / "server.pem")
    try:
        if has_server:
            facts = _facts(authority, _certificate(folder / "server.pem"), now)
            found["server"] = {
                "hosts": list(facts.hosts), "until": _time(facts.until),
                "days_left": facts.days_left,
            }  # fmt: skip
            found["warnings"] = list(check_server(folder, now).warnings)
        else:
            _ca(folder, now)
            if found["ca_key"]:
                ca_key_in(folder)
    except FedtuneError as error:
        problems.append({"error": str(error), "hint": error.hint})
    try:
        roster = read_roster(folder)
    except FedtuneError as error:
        problems.append({"error": str(error), "hint": error.hint})
        return found
    for part, nodes in (("nodes", roster.members), ("revoked", roster.revoked)):
        found[part] = [{"name": one.name, "fingerprint": fingerprint_of(one)} for one in nodes]
    return found | {"serial": roster.serial, "issued": roster.issued}


def _ca(folder: Path, now: dt.datetime) -> tuple[bytes, x509.Certificate]:
    path = folder / "ca.pem"
    read_bytes(path, _NONE)
    data = read_ca(path, now)
    return data, x5.to_certificate(data, str(path))


def _certificate(path: Path) -> x509.Certificate:
    return x5.to_certificate(read_bytes(path, _SERVER), str(path))


def _authority(ca_pem: bytes, ca: x509.Certificate, now: dt.datetime) -> Authority:
    until = ca.not_valid_after_utc
    name = x5.common_name(ca.subject)
    return Authority(federation_of(ca_pem), name, until, x5.days_left(until, now))


def _facts(authority: Authority, certificate: x509.Certificate, now: dt.datetime) -> ServerFacts:
    until = certificate.not_valid_after_utc
    left = x5.days_left(until, now)
    warnings = []
    if authority.days_left < SOON:
        warnings.append(
            f"the CA's certificate ends in {authority.days_left} days: plan a new federation"
        )
    if left < SOON:
        warnings.append(f"the server's certificate ends in {left} days: {_RENEW}")
    return ServerFacts(authority, x5.hosts_of(certificate), until, left, tuple(warnings))


def _time(when: dt.datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")
