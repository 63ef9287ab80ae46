"""Certificates: what is in them, what is refused, and what OpenSSL says."""

from __future__ import annotations

import datetime as dt
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import ExitCode, FedtuneError
from fedtune.keys import certificates as x5
from fedtune.keys.certificates import federation_of, read_ca
from tests.keys.kit import FUZZ, NOW, attempt, fails, federation
from tests.needed import need_program


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return federation(tmp_path_factory.mktemp("certificates") / "keys")


def _read(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_the_ca_may_sign_servers_and_nothing_else(place: Path) -> None:
    ca = _read(place / "ca.pem")
    basic = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage)
    assert basic.critical
    assert usage.critical
    assert (basic.value.ca, basic.value.path_length) == (True, 0)
    assert usage.value.key_cert_sign
    assert not usage.value.digital_signature
    key = ca.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert isinstance(key.curve, ec.SECP384R1)


def test_the_server_may_serve_and_nothing_else(place: Path) -> None:
    ca, server = _read(place / "ca.pem"), _read(place / "server.pem")
    find = server.extensions.get_extension_for_class
    assert find(x509.BasicConstraints).value.ca is False
    assert list(find(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert not find(x509.KeyUsage).value.key_cert_sign
    own = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    assert find(x509.AuthorityKeyIdentifier).value.key_identifier == own.digest
    assert x5.hosts_of(server) == ("localhost", "127.0.0.1")
    assert x5.signed_by(server, ca)
    assert not x5.signed_by(ca, server)


def test_openssl_agrees(place: Path, tmp_path: Path) -> None:
    need_program("openssl")
    other = federation(tmp_path / "other")

    def verify(root: Path, *more: str) -> subprocess.CompletedProcess[str]:
        words = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", root]
        return subprocess.run([*words, *more, place / "server.pem"], capture_output=True, text=True)

    done = verify(place / "ca.pem", "-verify_hostname", "localhost")
    assert done.returncode == 0, done.stderr
    assert verify(place / "ca.pem", "-verify_ip", "127.0.0.1").returncode == 0
    assert verify(place / "ca.pem", "-verify_hostname", "example.org").returncode != 0
    assert verify(other / "ca.pem").returncode != 0
    for name in ("ca.key", "server.key"):
        words = ["openssl", "pkey", "-check", "-noout", "-in", place / name]
        assert subprocess.run(words, capture_output=True).returncode == 0


def test_a_federation_is_its_cas_key(place: Path, tmp_path: Path) -> None:
    other = federation(tmp_path / "other")
    mine, theirs = (federation_of((one / "ca.pem").read_bytes()) for one in (place, other))
    assert len(mine) == len(theirs) == 32
    assert mine != theirs
    fails(lambda: federation_of((place / "server.pem").read_bytes()), "not a CA's")
    # The same key under a new certificate is the same federation.
    key = x5.read_pem_key(place / "ca.key", "hint")
    again = x5.issue_authority(key, "later", 10, NOW)
    assert federation_of(x5.pem_of(again)) == mine


def _authority(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "elsewhere")])
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).serial_number(1)
        .public_key(key.public_key()).not_valid_before(NOW)
        .not_valid_after(NOW + dt.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    return made.public_bytes(serialization.Encoding.PEM)


def test_a_node_is_told_what_is_wrong_with_its_ca(place: Path, tmp_path: Path) -> None:
    good = (place / "ca.pem").read_bytes()
    assert federation_of(read_ca(place / "ca.pem")) == federation_of(good)
    path = tmp_path / "ca.pem"
    fails(lambda: read_ca(path), "is not there")
    for data, words, hint in (
        ((place / "server.pem").read_bytes(), "but not a CA's", "copy ca.pem"),
        ((place / "server.key").read_bytes(), "is no certificate", "private key: keep it"),
        (good + (place / "server.pem").read_bytes(), "more than one certificate", "alone"),
        (b"", "is no certificate", "copy ca.pem"),
        (good[:300], "is no certificate", "copy ca.pem"),
        (_authority(rsa.generate_private_key(65537, 2048)), "not ECDSA P-384", "copy ca.pem"),
        (_authority(ec.generate_private_key(ec.SECP256R1())), "not ECDSA P-384", "copy ca.pem"),
    ):
        path.write_bytes(data)
        assert hint in fails(lambda: read_ca(path), words).hint
    later, before = NOW + dt.timedelta(days=3651), NOW - dt.timedelta(hours=2)
    fails(lambda: read_ca(place / "ca.pem", later), "ca.pem' expired on")
    assert "clock" in fails(lambda: read_ca(place / "ca.pem", before), "not valid before").hint
    # A clock that is half an hour behind does not lock a node out of a new federation.
    read_ca(place / "ca.pem", NOW - dt.timedelta(minutes=30))


def test_words_around_a_certificate_do_not_reach_tls(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    path.write_bytes(b"from: the study\n" + (place / "ca.pem").read_bytes() + b"\nbye\n")
    assert read_ca(path) == (place / "ca.pem").read_bytes()


@pytest.mark.parametrize(
    "host",
    ["", "a b", "https://x.org", "x.org:9092", "*.x.org", "a..b", "-a.org", "10.0.0.256",
     "x" * 64 + ".org", ".".join(["a" * 60] * 5), "é.org", "a\n", "[::1]", "x_y.org", "a\0b"],
)  # fmt: skip
def test_hosts_that_are_refused(host: str) -> None:
    fails(lambda: x5.sans_of([host]), "neither a host name", ExitCode.CONFIG)


def test_hosts_that_are_fine() -> None:
    names = x5.sans_of(["FL.Example.org", "fl.example.org", "x", "xn--9ca.org", "::1", "0::1"])
    found = [str(one.value) for one in names]
    assert found == ["fl.example.org", "x", "xn--9ca.org", "::1"]
    fails(lambda: x5.sans_of([]), "0 hosts", ExitCode.CONFIG)
    fails(lambda: x5.sans_of(["a"] * 101), "101 hosts", ExitCode.CONFIG)


@pytest.mark.parametrize("name", ["", " x", "x" * 65, "a\nb", "a\x1b[31mb", "\u202eb"])
def test_names_that_are_refused(name: str) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    fails(lambda: x5.issue_authority(key, name, 1, NOW), "--name", ExitCode.CONFIG)


@pytest.mark.parametrize("days", [0, -1, 36501])
def test_days_that_are_refused(days: int) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    fails(lambda: x5.issue_authority(key, "x", days, NOW), "--days", ExitCode.CONFIG)


@FUZZ
@given(
    at=st.integers(0, 700), put=st.binary(max_size=8), cut=st.integers(0, 300),
    flip=st.integers(0, 449), bit=st.integers(0, 7), inside=st.booleans(),
)  # fmt: skip
def test_any_certificate_is_read_or_refused(
    place: Path, at: int, put: bytes, cut: int, flip: int, bit: int, inside: bool
) -> None:
    good = (place / "ca.pem").read_bytes()
    if inside:
        # Whole PEM around a damaged certificate.
        der = bytearray(_read(place / "ca.pem").public_bytes(serialization.Encoding.DER))
        der[flip % len(der)] ^= 1 << bit
        import base64

        body = base64.encodebytes(bytes(der))
        given_ = b"-----BEGIN CERTIFICATE-----\n" + body + b"-----END CERTIFICATE-----\n"
    else:
        given_ = good[:at] + put + good[at + cut :]
    found = attempt(lambda: federation_of(given_))
    assert isinstance(found, FedtuneError) or len(found) == 32
    path = place.parent / "fuzz.pem"
    path.write_bytes(given_)
    attempt(lambda: read_ca(path))
