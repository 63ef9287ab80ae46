"""Who is enrolled: a list that the CA signs, so that ca.pem alone tells who is who.

The file is JSON in one spelling only. Its signature is ECDSA P-384 with SHA-384 by the CA's
key, over a fixed text and the same JSON without the signature. What the CA signs besides,
certificates, begins with another byte.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedtune.errors import FedtuneError
from fedtune.keys import files
from fedtune.keys.certificates import ca_key_of, federation_id, federation_of, read_pem_key
from fedtune.keys.files import locked, read_bytes, refused, wrong
from fedtune.keys.node import LoginPublic, Public, check_name, line_of, parse_line

__all__ = [
    "MOST_BYTES",
    "MOST_NODES",
    "Roster",
    "ca_key_in",
    "decode",
    "encode",
    "enrol",
    "first",
    "logins",
    "read_roster",
    "revoke",
    "signers",
]

MOST_BYTES = 1 << 22
"""Bytes of a roster's file."""
MOST_NODES = 10_000
"""Nodes in it, revoked ones too."""
_CONTEXT = b"fedtune roster, version 1\n"
_FIELDS = {
    "schema": int, "federation": str, "serial": int, "issued": str, "members": list,
    "revoked": list, "signature": str,
}  # fmt: skip
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_LOST = "restore it from a copy: the server and your backup have one"
_ASK = "get the file again from whoever set the federation up"


@dataclass(frozen=True)
class Roster:
    """The nodes of a federation.

    Attributes
    ----------
    federation : str
        Id of its CA, 32 hexadecimal digits.
    serial : int
        From 1; every change adds one.
    issued : str
        When, in UTC: ``2026-01-02T03:04:05Z``.
    members : tuple of Public
        By name.
    revoked : tuple of Public
        By name; neither the name nor the keys ever come back.
    """

    federation: str
    serial: int
    issued: str
    members: tuple[Public, ...]
    revoked: tuple[Public, ...]


def logins(roster: Roster) -> dict[str, LoginPublic]:
    """Return the keys that members log in with, by name."""
    return {one.name: one.login for one in roster.members}


def signers(roster: Roster) -> dict[str, Ed25519PublicKey]:
    """Return the keys that members sign with in secure aggregation, by name."""
    return {one.name: one.signer for one in roster.members}


def first(ca_key: ec.EllipticCurvePublicKey) -> Roster:
    """Return the roster of a new federation: nobody, serial 1."""
    return Roster(federation_id(ca_key), 1, _now(), (), ())


def enrol(folder: Path, *publics: Public) -> Roster:
    """Add nodes, all or none, and sign the new roster.

    Parameters
    ----------
    folder : Path
        With ca.pem, ca.key and roster.
    *publics : Public
        Who is a member already, with the same keys, stays as it is.

    Returns
    -------
    Roster
        What is in the folder now.

    Raises
    ------
    FedtuneError
        ``SIGNATURE``: a name or key that another node has, or that was revoked; or the
        folder's own files are missing, damaged or of another federation. ``STORAGE``.
    """
    ca_key = ca_key_in(folder)
    with locked(folder):
        old = read_roster(folder)
        members = {one.name: one for one in old.members}
        owners = _owners(old)
        gone = {one.name for one in old.revoked}
        fresh = []
        for one in publics:
            if one.name in members and line_of(members[one.name]) == line_of(one):
                continue
            if one.name in gone:
                raise refused(f"'{one.name}' was revoked", "choose another name and make new keys")
            if one.name in members:
                raise refused(
                    f"'{one.name}' is enrolled with other keys",
                    "choose another name; a name is never given to other keys",
                )
            for key in _keys(one):
                if key in owners:
                    owner = owners[key]
                    also = ", which was revoked" if owner in gone else ""
                    raise refused(
                        f"'{one.name}' has a key of '{owner}'{also}",
                        "make new keys for it: fedtune keys node NAME",
                    )
            owners |= dict.fromkeys(_keys(one), one.name)
            members[one.name] = one
            fresh.append(one)
        if len(members) + len(gone) > MOST_NODES:
            raise wrong(f"{len(members) + len(gone)} nodes", f"at most {MOST_NODES}")
        return _write(folder, replace(old, members=_sorted(members)), ca_key) if fresh else old


def revoke(folder: Path, name: str) -> Roster:
    """Take a node out for good, and sign the new roster.

    Raises
    ------
    FedtuneError
        ``CONFIG``: no such member; else as :func:`enrol`.
    """
    check_name(name)
    ca_key = ca_key_in(folder)
    with locked(folder):
        old = read_roster(folder)
        members = {one.name: one for one in old.members}
        revoked = {one.name: one for one in old.revoked}
        if name in revoked:
            return old
        if name not in members:
            some = ", ".join(list(members)[:10]) or "nobody"
            raise wrong(f"'{name}' is not enrolled", f"enrolled: {some}")
        revoked[name] = members.pop(name)
        changed = replace(old, members=_sorted(members), revoked=_sorted(revoked))
        return _write(folder, changed, ca_key)


def read_roster(folder: Path) -> Roster:
    """Read a keys folder's roster.

    Raises
    ------
    FedtuneError
        ``SIGNATURE``: as :func:`decode`, or it or ca.pem is missing.
    """
    ca_pem = read_bytes(folder / "ca.pem", "make a federation with: fedtune keys ca")
    data = read_bytes(folder / "roster", _LOST, MOST_BYTES)
    return decode(data, ca_pem)


def ca_key_in(folder: Path) -> ec.EllipticCurvePrivateKey:
    """Return the CA's private key.

    Raises
    ------
    FedtuneError
        ``SIGNATURE``: missing, open to others, or another one than ca.pem's.
    """
    ca_pem = read_bytes(folder / "ca.pem", "make a federation with: fedtune keys ca")
    hint = "run this where the CA's key is kept, then copy 'roster' to the server"
    key = read_pem_key(folder / "ca.key", hint)
    if federation_id(key.public_key()) != federation_of(ca_pem):
        raise refused(
            f"'{folder / 'ca.key'}' belongs to another federation than ca.pem",
            "put together what belongs together: copy ca.key or ca.pem from the backup",
        )
    return key


def encode(roster: Roster, ca_key: ec.EllipticCurvePrivateKey) -> bytes:
    """Sign a roster.

    Returns
    -------
    bytes
        What :func:`decode` reads, at most ``MOST_BYTES``.
    """
    fields = {
        "schema": 1, "federation": roster.federation, "serial": roster.serial,
        "issued": roster.issued, "members": [line_of(one) for one in roster.members],
        "revoked": [line_of(one) for one in roster.revoked],
    }  # fmt: skip
    signature = ca_key.sign(_CONTEXT + _text(fields), ec.ECDSA(hashes.SHA384()))
    return _text(fields | {"signature": signature.hex()})


def decode(data: bytes, ca_pem: bytes, least_serial: int = 0) -> Roster:
    """Read a roster that came from anywhere.

    Parameters
    ----------
    data : bytes
        What :func:`encode` made; nothing in it is believed before the signature holds.
    ca_pem : bytes
        The CA's certificate that the reader trusts.
    least_serial : int
        The highest serial that the reader has seen: an older list would bring back who was
        revoked.

    Raises
    ------
    FedtuneError
        ``SIGNATURE``: too long, not in this form, of another federation, not signed by
        the CA, older than what was seen, or a name or key is there twice.
    """
    fields = _fields(data)
    federation = federation_of(ca_pem)
    if fields["federation"] != federation:
        other = str(fields["federation"])[:32]
        raise refused(f"the roster is of federation {other!r}, not of {federation}", _ASK)
    signed = {name: value for name, value in fields.items() if name != "signature"}
    try:
        signature = bytes.fromhex(fields["signature"])
        if signature.hex() != fields["signature"]:
            raise ValueError("another spelling")
        ca_key_of(ca_pem).verify(signature, _CONTEXT + _text(signed), ec.ECDSA(hashes.SHA384()))
    except (ValueError, InvalidSignature) as error:
        raise refused("the roster is not signed by this federation's CA", _ASK) from error
    if fields["serial"] < least_serial:
        raise refused(
            f"the roster is an old one: serial {fields['serial']}, and {least_serial} was seen",
            "get the newest from whoever holds the CA's key",
        )
    return _roster(fields)


def _fields(data: bytes) -> dict[str, Any]:
    if len(data) > MOST_BYTES:
        raise refused(f"the roster has {len(data)} bytes, at most {MOST_BYTES} are read", _ASK)
    try:
        found = json.loads(data.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise _damaged("not JSON") from error
    if not isinstance(found, dict) or list(found) != list(_FIELDS):
        raise _damaged("other fields than it should have")
    for name, kind in _FIELDS.items():
        if type(found[name]) is not kind:
            raise _damaged(f"'{name}' is not of type {kind.__name__}")
    lines = found["members"] + found["revoked"]
    if len(lines) > MOST_NODES or not all(type(line) is str for line in lines):
        raise _damaged(f"members and revoked are not at most {MOST_NODES} lines")
    if found["schema"] != 1:
        raise refused(f"the roster has schema {found['schema']}", "update fedtune")
    if not 1 <= found["serial"] < 1 << 53:
        raise _damaged("a serial below 1 or far too large")
    # One spelling: nothing unsigned hides in spaces, escapes or names that come twice.
    if _text(found) != data:
        raise _damaged("written in an unusual way")
    return found


def _roster(fields: Mapping[str, Any]) -> Roster:
    try:
        issued = dt.datetime.strptime(fields["issued"], _TIME).replace(tzinfo=dt.UTC)
    except ValueError as error:
        raise _damaged("'issued' is no time in UTC") from error
    if issued.strftime(_TIME) != fields["issued"]:
        raise _damaged("'issued' is written in an unusual way")
    members, revoked = (
        tuple(parse_line(line) for line in fields[part]) for part in ("members", "revoked")
    )
    roster = Roster(fields["federation"], fields["serial"], fields["issued"], members, revoked)
    everybody = members + revoked
    if len({one.name for one in everybody}) < len(everybody):
        raise _damaged("a name is there twice")
    if len({key for one in everybody for key in _keys(one)}) < 2 * len(everybody):
        raise _damaged("a key is there twice")
    for part in (members, revoked):
        if part != _sorted({one.name: one for one in part}):
            raise _damaged("not in order")
    return roster


def _write(folder: Path, changed: Roster, ca_key: ec.EllipticCurvePrivateKey) -> Roster:
    roster = replace(changed, serial=changed.serial + 1, issued=_now())
    data = encode(roster, ca_key)
    if len(data) > MOST_BYTES:
        raise wrong(f"a roster of {len(data)} bytes", f"at most {MOST_BYTES}: shorter names")
    files.replace(folder / "roster", data)
    return roster


def _keys(one: Public) -> tuple[str, str]:
    words = line_of(one).split(" ")
    return words[2], words[4]


def _owners(roster: Roster) -> dict[str, str]:
    return {key: one.name for one in roster.members + roster.revoked for key in _keys(one)}


def _sorted(nodes: Mapping[str, Public]) -> tuple[Public, ...]:
    return tuple(nodes[name] for name in sorted(nodes))


def _now() -> str:
    return dt.datetime.now(dt.UTC).strftime(_TIME)


def _text(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, indent=1) + "\n").encode("ascii")


def _damaged(what: str) -> FedtuneError:
    return refused(f"the roster is damaged: {what}", _ASK)
