"""Keys, and signatures that any change breaks."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.signing import (
    canonical,
    default_key,
    embedded,
    fingerprint,
    read_public,
    read_signer,
    readable,
    seal,
    seal_page,
    unseal,
    unseal_page,
)
from fedtune.privacy.signing_keys import Signer

REPORT = {"name": "a <b> & c", "epsilon": 1.5, "nothing": None, "list": [1, 2.5e-7, "ε\u202e"]}
GROUP_ORDER = 2**252 + 27742317777372353535851937790883648493


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("FEDTUNE_SIGNING_KEY", raising=False)
    return tmp_path


@pytest.fixture
def signer(home: Path) -> Signer:
    return read_signer(None, lambda _: None)


def other_signer(folder: Path) -> tuple[Path, Signer]:
    path = folder / "other.key"
    path.write_bytes(
        Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    path.chmod(0o600)
    return path, read_signer(path, lambda _: None)


def page(signer: Signer) -> bytes:
    inside = embedded(seal(REPORT, signer))
    return seal_page(
        "<!doctype html>\n<p>Epsilon 1.5</p>\n"
        f'<script type="application/json" id="report">{inside}</script>\n',
        signer,
    )


def refused(data: bytes, required: str | None = None, *, as_page: bool = False) -> str:
    with pytest.raises(FedtuneError) as caught:
        (unseal_page if as_page else unseal)(data, required)
    assert caught.value.code is ExitCode.SIGNATURE
    assert caught.value.hint
    return str(caught.value)


# ---------------------------------------------------------------- keys


def test_the_first_use_makes_a_key_and_says_so_once(home: Path) -> None:
    said: list[str] = []
    first = read_signer(None, said.append)
    again = read_signer(None, said.append)
    assert first.public == again.public
    assert len(said) == 1
    key = default_key()
    assert key == home / "config" / "fedtune" / "report.key"
    assert str(key) in said[0]
    assert fingerprint(first.public) in said[0]
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(key.parent.stat().st_mode) & 0o077 == 0
    assert read_public(key.with_suffix(".pub")) == read_public(key) == first.public
    assert sorted(path.name for path in key.parent.iterdir()) == ["report.key", "report.pub"]
    assert "private" not in repr(first).lower()


def test_two_first_uses_at_once_agree(home: Path) -> None:
    found: list[str] = []
    start = threading.Barrier(8)

    def use() -> None:
        start.wait()
        found.append(read_signer(None, lambda _: None).public)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert set(found) == {read_public(default_key())}


def test_the_environment_names_a_key(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = other_signer(home)
    monkeypatch.setenv("FEDTUNE_SIGNING_KEY", str(path))
    assert read_signer(None, lambda _: None).public == other.public
    assert not default_key().exists()
    monkeypatch.setenv("FEDTUNE_SIGNING_KEY", str(home / "absent.key"))
    with pytest.raises(FedtuneError, match=r"absent\.key"):
        read_signer(None, lambda _: None)


def test_a_key_that_will_not_do_is_refused(home: Path) -> None:
    path, _ = other_signer(home)
    path.chmod(0o640)
    with pytest.raises(FedtuneError, match="read by others") as caught:
        read_signer(path, lambda _: None)
    assert "chmod 600" in caught.value.hint
    wrong = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    locked = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"word"),
    )
    for content in (b"", b"nothing", wrong, locked):
        path.write_bytes(content)
        path.chmod(0o600)
        for read in (lambda: read_signer(path, lambda _: None), lambda: read_public(path)):
            with pytest.raises(FedtuneError, match="no Ed25519 key") as caught:
                read()
            assert caught.value.code is ExitCode.SIGNATURE
    with pytest.raises(FedtuneError, match="cannot be read"):
        read_signer(home / "absent", lambda _: None)
    assert not (home / "absent").exists(), "a key is made in the default place only"


def test_a_place_that_cannot_be_written_says_what_to_do(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "file"))
    with pytest.raises(FedtuneError, match="no signing key can be made") as caught:
        read_signer(None, lambda _: None)
    assert "--key" in caught.value.hint


def test_public_keys_are_read_in_the_usual_forms(home: Path, signer: Signer) -> None:
    key = serialization.load_pem_private_key(default_key().read_bytes(), None).public_key()
    ssh = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (home / "ssh.pub").write_bytes(ssh + b" somebody@somewhere\n")
    assert read_public(home / "ssh.pub") == signer.public


# ---------------------------------------------------------------- envelopes


def test_what_was_sealed_is_what_is_read(signer: Signer) -> None:
    data = readable(seal(REPORT, signer))
    signed = unseal(data)
    assert (signed.report, signed.public) == (REPORT, signer.public)
    assert unseal(data, signer.public) == signed
    assert data.isascii()


def test_any_changed_byte_of_a_report_is_found(signer: Signer) -> None:
    data = readable(seal(REPORT, signer))
    for place, byte in enumerate(data):
        for flipped in {byte ^ 1, byte ^ 0x20, ord(" ")} - {byte}:
            refused(data[:place] + bytes([flipped]) + data[place + 1 :])
    for place in range(0, len(data), 7):
        refused(data[:place] + data[place + 1 :])
        refused(data[:place] + b" " + data[place:])


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"{}\n"])
def test_what_is_no_report_is_refused(data: bytes) -> None:
    refused(data)
    refused(data, as_page=True)


def test_nothing_is_accepted_without_a_signature(signer: Signer) -> None:
    whole = seal(REPORT, signer)
    for change in (
        {"algorithm": "none"}, {"value": "0" * 128}, {"value": ""}, {"value": None},
        {"public_key": "0" * 64}, {"public_key": ""}, {"sha256": "0" * 64},
        {"value": whole["signature"]["value"].upper()},
    ):  # fmt: skip
        refused(readable(whole | {"signature": whole["signature"] | change}))
    refused(readable({"report": REPORT}))
    refused(readable({"report": REPORT, "signature": None}))
    refused(readable(whole | {"more": 1}))
    refused(readable(whole | {"report": REPORT | {"epsilon": 0.1}}))
    doubled = readable(whole).replace(b'"name"', b'"name": "x",\n  "name"', 1)
    refused(doubled)


def test_the_second_form_of_a_signature_is_refused(signer: Signer) -> None:
    whole = seal(REPORT, signer)
    value = bytes.fromhex(whole["signature"]["value"])
    grown = int.from_bytes(value[32:], "little") + GROUP_ORDER
    twin = (value[:32] + grown.to_bytes(32, "little")).hex()
    refused(readable(whole | {"signature": whole["signature"] | {"value": twin}}))


def test_another_key_is_told_apart(home: Path, signer: Signer) -> None:
    _, other = other_signer(home)
    data = readable(seal(REPORT, other))
    assert unseal(data).public == other.public
    message = refused(data, signer.public)
    assert fingerprint(other.public) in message
    assert fingerprint(signer.public) in message
    refused(page(other), signer.public, as_page=True)


def test_only_finite_numbers_can_be_signed(signer: Signer) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical({"epsilon": float("nan")})


# ---------------------------------------------------------------- pages


def test_any_changed_byte_of_a_page_is_found(signer: Signer) -> None:
    data = page(signer)
    assert unseal_page(data).report == REPORT
    for place, byte in enumerate(data):
        refused(data[:place] + bytes([byte ^ 1]) + data[place + 1 :], as_page=True)
    for changed in (
        data + b" ", data + b"\n", b" " + data, data[:-1], data + data,
        data.replace(b"1.5", b"0.5", 1), data.replace(b"\n", b"\r\n"),
    ):  # fmt: skip
        refused(changed, as_page=True)


def test_a_page_signed_by_one_and_a_report_by_another_is_refused(
    home: Path, signer: Signer
) -> None:
    _, other = other_signer(home)
    inside = embedded(seal(REPORT, signer))
    mixed = seal_page(
        f'<p>mine</p><script type="application/json" id="report">{inside}</script>\n', other
    )
    refused(mixed, as_page=True)
    twice = f'<script type="application/json" id="report">{inside}</script>\n' * 2
    refused(seal_page(twice, signer), as_page=True)


def test_a_report_inside_a_page_cannot_end_its_element(signer: Signer) -> None:
    inside = embedded(seal({"name": "</script><script>alert(1)</script><!-- & -->"}, signer))
    assert not set("<>&") & set(inside)
    assert json.loads(inside)["report"]["name"].startswith("</script>")


def test_a_signature_of_a_page_is_none_of_a_report(signer: Signer) -> None:
    whole = seal(REPORT, signer)
    message = b"fedtune page 1\n" + canonical(REPORT)
    refused(readable(whole | {"signature": whole["signature"] | {"value": signer.sign(message)}}))


def test_the_umask_does_not_open_the_key(home: Path) -> None:
    before = os.umask(0)
    try:
        read_signer(None, lambda _: None)
    finally:
        os.umask(before)
    assert stat.S_IMODE(default_key().stat().st_mode) == 0o600
