"""A node's keys: one file for its owner alone, one line for everybody else."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import ExitCode, FedtuneError
from fedtune.keys import node
from fedtune.keys.node import (
    Identity,
    check_name,
    fingerprint_of,
    line_of,
    new_identity,
    parse_line,
    public_of,
    read_identity,
    read_public,
    write_identity,
)
from tests.keys.kit import FUZZ, attempt, fails, mode
from tests.needed import need_program

SAMPLE = new_identity("ann")
LINE = line_of(public_of(SAMPLE))
OPENSSH = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("node") / "ann.key"
    write_identity(path, SAMPLE)
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        beside = write_identity(tmp_path / "ann.key", SAMPLE)
    finally:
        os.umask(before)
    assert beside == tmp_path / "ann.pub"
    assert (mode(tmp_path / "ann.key"), mode(beside)) == (0o600, 0o644)
    found = read_identity(tmp_path / "ann.key")
    assert line_of(public_of(found)) == LINE
    message = b"a message"
    SAMPLE.signer.public_key().verify(found.signer.sign(message), message)
    assert found.login.private_numbers() == SAMPLE.login.private_numbers()
    assert line_of(read_public(beside)) == LINE == beside.read_text().strip()
    assert beside.read_text().count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["ann.key", "ann.pub"]


def test_keys_are_kept_out_of_words() -> None:
    assert repr(SAMPLE) == "Identity(name='ann')"


@pytest.mark.parametrize("there", ["ann.key", "ann.pub"])
def test_nothing_is_overwritten(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("mine")
    fails(lambda: write_identity(tmp_path / "ann.key", SAMPLE), there, ExitCode.CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "mine"


def test_half_an_identity_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = node.place

    def full(path: Path, data: bytes, bits: int = 0o600) -> None:
        if path.suffix == ".pub":
            raise FedtuneError("full", code=ExitCode.STORAGE)
        real(path, data, bits)

    monkeypatch.setattr(node, "place", full)
    with pytest.raises(FedtuneError, match="full"):
        write_identity(tmp_path / "ann.key", SAMPLE)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["", "../x", "a/b", "-rf", ".hidden", "a b", "a\nb", "a\n", "é", "x" * 65, "a\0", "a:b"]
)
def test_names_that_are_refused(tmp_path: Path, name: str) -> None:
    for make in (check_name, new_identity):
        fails(lambda make=make: make(name), "is no name", ExitCode.CONFIG)  # type: ignore[misc]
    bad = Identity(name, SAMPLE.login, SAMPLE.signer)
    fails(lambda: write_identity(tmp_path / "x.key", bad), "is no name", ExitCode.CONFIG)
    assert os.listdir(tmp_path) == []
    rest = LINE.partition(" ")[2]
    fails(lambda: parse_line(f"{name} {rest}"), "name")


@pytest.mark.parametrize("name", ["a", "0", "A.b_c-9", "x" * 64])
def test_names_that_are_fine(name: str) -> None:
    assert check_name(name) == name


def test_a_file_that_others_can_read_is_refused(written: Path, tmp_path: Path) -> None:
    copy = tmp_path / "ann.key"
    shutil.copyfile(written, copy)
    copy.chmod(0o644)
    assert fails(lambda: read_identity(copy), "open to others").hint.startswith("chmod 600")
    copy.chmod(0o400)
    assert read_identity(copy).name == "ann"


def _block(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> str:
    form = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH
    return key.private_bytes(*form, serialization.NoEncryption()).decode()


def test_a_key_with_a_password_is_refused(tmp_path: Path) -> None:
    need_program("ssh-keygen")
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "a word", "-f", tmp_path / "own"],
        check=True,
    )
    path = tmp_path / "ann.key"
    path.touch(0o600)
    path.write_text((tmp_path / "own").read_text() + _block(SAMPLE.signer) + "# fedtune node ann\n")
    fails(lambda: read_identity(path), "has a password")
    fails(lambda: node.read_key(path), "without a password")


def test_other_files_are_refused(tmp_path: Path, written: Path) -> None:
    login, signer = SAMPLE.login, SAMPLE.signer
    good, name = written.read_text(), "# fedtune node ann\n"
    small = ec.generate_private_key(ec.SECP256R1())
    cases = {
        "empty": "", "one key": _block(login) + name, "no name": _block(login) + _block(signer),
        "swapped": _block(signer) + _block(login) + name,
        "small": _block(small) + _block(signer) + name,
        "twice": _block(login) + _block(login) + name,
        "three": _block(login) + good, "cut": good[:700], "longer": good + "more\n",
        "bad name": good.replace("node ann", "node ../ann"), "huge": good + "#" * (1 << 16),
        "line": LINE, "not ascii": good.replace("ann", "änn"),
    }  # fmt: skip
    for case, text in cases.items():
        path = tmp_path / case
        path.write_text(text)
        path.chmod(0o600)
        assert "fedtune keys node" in fails(lambda path=path: read_identity(path), case).hint  # type: ignore[misc]
    fails(lambda: read_identity(tmp_path / "none"), "is not there")


def test_a_file_that_went_through_windows_is_read(tmp_path: Path, written: Path) -> None:
    for source, name in ((written, "a.key"), (written.with_suffix(".pub"), "a.pub")):
        path = tmp_path / name
        path.write_bytes(source.read_bytes().replace(b"\n", b"\r\n"))
        path.chmod(0o600)
    assert read_identity(tmp_path / "a.key").name == read_public(tmp_path / "a.pub").name == "ann"


def test_other_lines_are_refused(tmp_path: Path) -> None:
    name, kind, key, kind2, key2 = LINE.split()
    small = ec.generate_private_key(ec.SECP256R1()).public_key()
    p256 = small.public_bytes(*OPENSSH).decode()
    cases = [
        "", name, f"{name} {kind} {key}", f"{name} {kind2} {key2} {kind} {key}",
        f"{name} {p256} {kind2} {key2}", f"{LINE} comment", LINE.replace(" ", "  ", 1),
        LINE.replace(" ", "\t"), f"{LINE}\n{LINE}", f"{name} {kind} {key}= {kind2} {key2}",
        f"{name} {kind} {key[:-4]} {kind2} {key2}", LINE + "x" * 1024, LINE.replace("ann", "änn"),
        f"{name} {kind2} {key} {kind} {key2}", f"{name} {kind} {key} {kind} {key}",
    ]  # fmt: skip
    for line in cases:
        fails(lambda line=line: parse_line(line), ".")  # type: ignore[misc]
        (tmp_path / "x.pub").write_text(line, encoding="utf-8")
        assert str(tmp_path) in str(fails(lambda: read_public(tmp_path / "x.pub"), "."))
    assert line_of(parse_line(LINE + "\r\n")) == LINE


def _key(kind: str, *fields: bytes) -> str:
    """Return what OpenSSH's form of a key would be with these fields."""
    raw = b"".join(len(field).to_bytes(4, "big") + field for field in (kind.encode(), *fields))
    return f"{kind} {base64.b64encode(raw).decode()}"


@pytest.mark.parametrize("case", ["compressed", "empty", "short", "other curve"])
def test_odd_points_are_refused(tmp_path: Path, case: str) -> None:
    """The library has errors of its own for some of these, which once went through."""
    form = serialization.PublicFormat.CompressedPoint
    compressed = public_of(SAMPLE).login.public_bytes(serialization.Encoding.X962, form)
    curve = b"nistp256" if case == "other curve" else b"nistp384"
    point = {"compressed": compressed, "short": b"\x04" + b"\1" * 20}.get(case, b"")
    key = _key("ecdsa-sha2-nistp384", curve, point)
    fails(lambda: parse_line(f"ann {key} {LINE.split(' ', 3)[3]}"), "damaged")
    (tmp_path / "enrolled").write_text(f"ann {key}\n")
    fails(lambda: node.read_enrolled(tmp_path / "enrolled"), "line 1")


def test_fingerprints_name_the_name_and_both_keys() -> None:
    public = public_of(SAMPLE)
    found = fingerprint_of(public)
    assert re.fullmatch(r"([0-9a-f]{4} ){7}[0-9a-f]{4}", found)
    assert fingerprint_of(parse_line(LINE)) == found
    other = public_of(new_identity("bob"))
    changed = [
        node.Public("bob", public.login, public.signer),
        node.Public("ann", other.login, public.signer),
        node.Public("ann", public.login, other.signer),
    ]
    assert len({found, *map(fingerprint_of, changed)}) == 4


def test_ssh_keygen_reads_both_files(written: Path) -> None:
    need_program("ssh-keygen")
    prints = set()
    for path in (written, written.with_suffix(".pub")):
        done = subprocess.run(["ssh-keygen", "-l", "-f", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("384 SHA256:")
        prints.add(done.stdout.split()[1])
    assert len(prints) == 1
    public = subprocess.run(["ssh-keygen", "-y", "-f", written], capture_output=True, text=True)
    assert public.stdout.split()[:2] == LINE.split()[1:3]


def test_flowers_own_node_reads_the_key(written: Path) -> None:
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes, uses_nist_ec_curve

    found = serialization.load_ssh_private_key(written.read_bytes(), None)
    assert isinstance(found, ec.EllipticCurvePrivateKey)
    assert uses_nist_ec_curve(found.public_key())
    assert public_key_to_bytes(found.public_key()) == public_key_to_bytes(public_of(SAMPLE).login)


_ANY_KEY = st.builds(
    lambda kind, fields: _key(kind, *fields),
    st.sampled_from(["ecdsa-sha2-nistp384", "ssh-ed25519", "ssh-rsa", "ecdsa-sha2-nistp256"]),
    st.lists(
        st.sampled_from([b"nistp384", b"nistp256", b"", b"\4" + b"\1" * 96])
        | st.binary(max_size=99),
        max_size=3,
    ),
)  # fmt: skip
_ANY_LINE = st.one_of(
    st.builds(lambda a, b: f"ann {a} {b}", _ANY_KEY, st.just(LINE.split(" ", 3)[3]) | _ANY_KEY),
    st.text(max_size=600),
    st.builds(
        lambda at, put, cut: LINE[:at] + put + LINE[at + cut :],
        st.integers(0, len(LINE)), st.text(max_size=8), st.integers(0, 40),
    ),
    st.lists(st.sampled_from([*LINE.split(), "", "\n", "\0"]), max_size=7).map(" ".join),
)  # fmt: skip


@FUZZ
@given(_ANY_LINE)
def test_any_line_is_read_whole_or_refused(line: str) -> None:
    found = attempt(lambda: parse_line(line))
    if not isinstance(found, FedtuneError):
        assert line_of(found) == line.strip(" \r\n")


@FUZZ
@given(
    at=st.integers(0, 1006), put=st.binary(max_size=8), cut=st.integers(0, 600),
    whole=st.one_of(st.none(), st.binary(max_size=400)), inside=st.booleans(),
)  # fmt: skip
def test_any_key_file_is_read_or_refused(
    written: Path, tmp_path: Path, at: int, put: bytes, cut: int,
    whole: bytes | None, inside: bool,
) -> None:  # fmt: skip
    good = written.read_bytes()
    if inside:
        # A good form around a damaged key.
        head, tail = b"-----BEGIN OPENSSH PRIVATE KEY-----\n", b"-----END OPENSSH"
        first = good.split(tail)[0]
        raw = base64.b64decode(first.removeprefix(head))
        raw = raw[:at] + put + raw[at + cut % 9 :]
        good = head + base64.encodebytes(raw) + good[len(first) :]
        at, put, cut = 0, b"", 0
    path = tmp_path / "fuzz.key"
    path.touch(0o600)
    path.write_bytes(good[:at] + put + good[at + cut :] if whole is None else whole)
    found = attempt(lambda: read_identity(path))
    if not isinstance(found, FedtuneError):
        assert check_name(found.name)
    key = attempt(lambda: node.read_key(path))
    assert isinstance(key, FedtuneError) or key.curve.key_size == 384


@FUZZ
@given(st.lists(_ANY_LINE, max_size=3).map("\n".join))
def test_any_enrolment_file_is_read_or_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "enrolled"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    found = attempt(lambda: node.read_enrolled(path))
    assert isinstance(found, FedtuneError) or all(
        key.curve.key_size == 384 for key in found.values()
    )
