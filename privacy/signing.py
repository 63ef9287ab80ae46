"""Signatures on reports: Ed25519 (RFC 8032) over bytes that exist in one form only.

A report travels as an *envelope*: JSON that holds the report and the signature over
its canonical form. A page holds such an envelope and, in its last line, a second
signature over every byte of itself, so that what is read is what was signed. There
is no unsigned report: without a signature, checking fails.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedtune.errors import FedtuneError
from fedtune.privacy.signing_keys import (
    Signer,
    default_key,
    fingerprint,
    read_public,
    read_signer,
    refused,
)

__all__ = [
    "ALGORITHM",
    "Signed",
    "Signer",
    "canonical",
    "default_key",
    "embedded",
    "fingerprint",
    "read_public",
    "read_signer",
    "readable",
    "seal",
    "seal_page",
    "unseal",
    "unseal_page",
]

ALGORITHM = "Ed25519"
_REPORT, _PAGE = b"fedtune report 1\n", b"fedtune page 1\n"
_HEX = re.compile(r"[0-9a-f]+")
_LAST_LINE = "<!-- fedtune page signature: {} -->\n"
_NOTHING = "0" * 128
_INSIDE = re.compile(rb'<script type="application/json" id="report">(.*?)</script>', re.DOTALL)
_SLOT = re.compile(rb"<!-- fedtune page signature: ([0-9a-f]{128}) -->\n\Z")


@dataclass(frozen=True)
class Signed:
    """What a checked envelope holds.

    Attributes
    ----------
    report : dict
    public : str
        Key that signed it, 64 hexadecimal digits. Whose it is, is for the reader to know.
    sha256 : str
        Of the report's canonical JSON.
    value : str
        The signature, 128 hexadecimal digits.
    """

    report: dict[str, Any]
    public: str
    sha256: str
    value: str


def canonical(value: Mapping[str, Any]) -> bytes:
    r"""Return the one form of a report that is signed: sorted keys, no blanks, ASCII.

    Examples
    --------
    >>> canonical({"b": 1.0, "a": "ε"})
    b'{"a":"\\u03b5","b":1.0}'
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def readable(envelope: Mapping[str, Any]) -> bytes:
    """Return an envelope as its file has it: indented, sorted, one newline at the end."""
    text = json.dumps(envelope, sort_keys=True, indent=1, allow_nan=False)
    return f"{text}\n".encode("ascii")


def seal(report: Mapping[str, Any], signer: Signer) -> dict[str, Any]:
    """Return the envelope: the report and the signature over its canonical JSON."""
    data = canonical(report)
    return {
        "report": dict(report),
        "signature": {
            "algorithm": ALGORITHM,
            "public_key": signer.public,
            "sha256": hashlib.sha256(data).hexdigest(),
            "value": signer.sign(_REPORT + data),
        },
    }


def unseal(data: bytes, required: str | None = None) -> Signed:
    """Return what a report file holds, once every byte of it has been checked.

    Parameters
    ----------
    data : bytes
        As ``readable`` wrote it.
    required : str, optional
        Public key that must have signed it.

    Raises
    ------
    FedtuneError
        ``ExitCode.SIGNATURE`` when anything was changed, is missing, or another key signed.
    """
    try:
        envelope = json.loads(data)
        same = isinstance(envelope, dict) and readable(envelope) == data
    except (ValueError, RecursionError):
        same = False
    if not same:
        raise _changed("it is not in the form in which it was written")
    return _opened(envelope, required)


def _opened(envelope: Mapping[str, Any], required: str | None) -> Signed:
    signature, report = envelope.get("signature"), envelope.get("report")
    if envelope.keys() != {"report", "signature"} or not isinstance(report, dict):
        raise _changed("it is no report")
    wanted = {"algorithm", "public_key", "sha256", "value"}
    if not isinstance(signature, dict) or signature.keys() != wanted:
        raise _changed("it has no signature")
    public, value = _hex(signature["public_key"], 64), _hex(signature["value"], 128)
    if signature["algorithm"] != ALGORITHM:
        raise _changed(f"its signature is not {ALGORITHM}")
    message = canonical(report)
    digest = hashlib.sha256(message).hexdigest()
    if signature["sha256"] != digest:
        raise _changed("its SHA-256 is another")
    _check(public, value, _REPORT + message, required)
    return Signed(report, public, digest, value)


def seal_page(page: str, signer: Signer) -> bytes:
    """Return a page with a last line that signs every byte of it."""
    blank = (page + _LAST_LINE.format(_NOTHING)).encode()
    return (page + _LAST_LINE.format(signer.sign(_PAGE + blank))).encode()


def embedded(envelope: Mapping[str, Any]) -> str:
    """Return an envelope as text for an inert element of a page: no tag can end in it."""
    text = json.dumps(envelope, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def unseal_page(data: bytes, required: str | None = None) -> Signed:
    """Return the report inside a page, once the page and the report have been checked.

    Raises
    ------
    FedtuneError
        As ``unseal``.
    """
    slot = _SLOT.search(data)
    found = _INSIDE.findall(data)
    if slot is None or len(found) != 1:
        raise _changed("it is no signed page")
    try:
        envelope = json.loads(found[0])
        same = isinstance(envelope, dict) and embedded(envelope).encode() == found[0]
    except (ValueError, RecursionError):
        same = False
    if not same:
        raise _changed("the report inside it cannot be read")
    signed = _opened(envelope, required)
    blank = data[: slot.start(1)] + _NOTHING.encode() + data[slot.end(1) :]
    _check(signed.public, slot.group(1).decode(), _PAGE + blank, required)
    return signed


def _check(public: str, value: str, message: bytes, required: str | None) -> None:
    if required is not None and public != required:
        raise refused(
            f"signed with key {fingerprint(public)}, not with {fingerprint(required)}",
            "ask who gave you the report for their public key",
        )
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        key.verify(bytes.fromhex(value), message)
    except (InvalidSignature, ValueError):
        raise _changed("its signature does not fit") from None


def _hex(value: Any, length: int) -> str:
    if not isinstance(value, str) or len(value) != length or not _HEX.fullmatch(value):
        raise _changed("its signature cannot be read")
    return value


def _changed(why: str) -> FedtuneError:
    return refused(
        f"this is not the report that was signed: {why}",
        "ask for the original file, byte for byte; editors and mail programs change files",
    )
