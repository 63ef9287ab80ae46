"""The list of nodes: signed, in one spelling, never older, nobody twice."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import ExitCode, FedtuneError
from fedtune.keys import roster as module
from fedtune.keys.node import Public, line_of
from fedtune.keys.roster import (
    Roster,
    ca_key_in,
    decode,
    encode,
    enrol,
    logins,
    read_roster,
    revoke,
    signers,
)
from tests.keys.kit import FUZZ, attempt, fails, federation, mode, public

ANN, BOB, CARL = public("ann"), public("bob"), public("carl")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return federation(tmp_path / "keys")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation with ann enrolled and bob revoked, which no test changes."""
    made = federation(tmp_path_factory.mktemp("roster") / "keys")
    enrol(made, ANN, BOB)
    revoke(made, "bob")
    return made


def _names(roster: Roster) -> tuple[list[str], list[str]]:
    return [one.name for one in roster.members], [one.name for one in roster.revoked]


def test_nodes_come_and_go(folder: Path) -> None:
    assert read_roster(folder).serial == 1
    assert _names(read_roster(folder)) == ([], [])
    roster = enrol(folder, CARL, ANN)
    assert (roster.serial, *_names(roster)) == (2, ["ann", "carl"], [])
    roster = enrol(folder, BOB)
    assert (roster.serial, *_names(roster)) == (3, ["ann", "bob", "carl"], [])
    roster = revoke(folder, "carl")
    assert (roster.serial, *_names(roster)) == (4, ["ann", "bob"], ["carl"])
    assert mode(folder / "roster") == 0o644
    data, ca_pem = (folder / "roster").read_bytes(), (folder / "ca.pem").read_bytes()
    found = decode(data, ca_pem, least_serial=4)
    assert list(map(line_of, found.members)) == list(map(line_of, (ANN, BOB)))
    assert list(map(line_of, found.revoked)) == [line_of(CARL)]
    assert found == roster == read_roster(folder)
    assert logins(found) == {"ann": ANN.login, "bob": BOB.login}
    assert signers(found) == {"ann": ANN.signer, "bob": BOB.signer}


def test_twice_the_same_changes_nothing(folder: Path) -> None:
    enrol(folder, ANN)
    revoke(folder, "ann")
    enrol(folder, BOB)
    before = (folder / "roster").read_bytes()
    assert enrol(folder, BOB).serial == 4
    assert revoke(folder, "ann").serial == 4
    assert (folder / "roster").read_bytes() == before


def test_names_and_keys_are_nobody_elses(folder: Path) -> None:
    enrol(folder, ANN, BOB)
    revoke(folder, "bob")
    before = (folder / "roster").read_bytes()
    fresh = public("dora")
    cases: list[tuple[Public, str]] = [
        (BOB, "'bob' was revoked"),
        (replace(fresh, name="bob"), "'bob' was revoked"),
        (replace(fresh, name="ann"), "'ann' is enrolled with other keys"),
        (replace(ANN, signer=fresh.signer), "'ann' is enrolled with other keys"),
        (replace(ANN, name="eve"), "'eve' has a key of 'ann'"),
        (replace(fresh, login=ANN.login), "'dora' has a key of 'ann'"),
        (replace(fresh, signer=ANN.signer), "'dora' has a key of 'ann'"),
        (replace(fresh, login=BOB.login), "a key of 'bob', which was revoked"),
        (replace(fresh, signer=BOB.signer), "a key of 'bob', which was revoked"),
    ]
    for wrong, words in cases:
        # Nobody gets in beside one who does not.
        fails(lambda wrong=wrong: enrol(folder, CARL, wrong), words)  # type: ignore[misc]
    fails(lambda: enrol(folder, fresh, replace(fresh, name="eve")), "'eve' has a key of 'dora'")
    assert (folder / "roster").read_bytes() == before
    assert (
        "enrolled: ann"
        in fails(lambda: revoke(folder, "carl"), "'carl' is not enrolled", ExitCode.CONFIG).hint
    )
    fails(lambda: revoke(folder, "../ann"), "is no name", ExitCode.CONFIG)


def test_a_roster_of_before_is_refused(place: Path) -> None:
    data, ca_pem = (place / "roster").read_bytes(), (place / "ca.pem").read_bytes()
    assert decode(data, ca_pem, least_serial=3).serial == 3
    fails(lambda: decode(data, ca_pem, least_serial=4), "an old one: serial 3, and 4 was seen")


def test_a_roster_of_others_is_refused(place: Path, tmp_path: Path) -> None:
    other = federation(tmp_path / "other")
    data, ca_pem = (place / "roster").read_bytes(), (other / "ca.pem").read_bytes()
    theirs = read_roster(other).federation
    fails(lambda: decode(data, ca_pem), f"of federation .*, not of {theirs}")
    # With its name changed, it is not signed.
    renamed = data.replace(read_roster(place).federation.encode(), theirs.encode())
    fails(lambda: decode(renamed, ca_pem), "not signed by this federation's CA")
    # Nor is one that another CA signed in this one's name.
    forged = encode(read_roster(place), ca_key_in(other))
    fails(lambda: decode(forged, (place / "ca.pem").read_bytes()), "not signed")
    (other / "roster").write_bytes(data)
    fails(lambda: read_roster(other), "of federation")
    fails(lambda: enrol(other, CARL), "of federation")


def test_a_signature_is_for_rosters_alone(place: Path) -> None:
    """What the CA signed without the context is no roster."""
    fields = json.loads((place / "roster").read_text())
    fields.pop("signature")
    text = module._text(fields)
    bare = ca_key_in(place).sign(text, ec.ECDSA(hashes.SHA384())).hex()
    data = module._text(fields | {"signature": bare})
    fails(lambda: decode(data, (place / "ca.pem").read_bytes()), "not signed")


def test_every_byte_counts(place: Path) -> None:
    data, ca_pem = (place / "roster").read_bytes(), (place / "ca.pem").read_bytes()
    for at in range(0, len(data), 7):
        changed = bytearray(data)
        changed[at] ^= 1
        fails(lambda changed=changed: decode(bytes(changed), ca_pem), "roster")  # type: ignore[misc]


def test_other_spellings_are_refused(place: Path) -> None:
    data, ca_pem = (place / "roster").read_bytes(), (place / "ca.pem").read_bytes()
    fields = json.loads(data)
    swapped = dict(sorted(fields.items()))
    cases = [
        b"", b"{}", b"[]", b"null", b"1" * 5000, b"[" * 100_000, b"\xff", data + b" ", data[:-1],
        json.dumps(fields).encode(), json.dumps(swapped, indent=1).encode() + b"\n",
        data.replace(b'"schema": 1', b'"schema": 1,\n "schema": 1'),
        data.replace(b'"ann ', b'"\\u0061nn '),
    ]  # fmt: skip
    for name, value in (
        ("schema", 2), ("schema", True), ("serial", 0), ("serial", -1), ("serial", 1 << 60),
        ("serial", 3.0), ("serial", "3"), ("issued", 5), ("members", {}), ("members", [1]),
        ("members", None), ("revoked", [["x"]]), ("signature", None), ("federation", None),
        ("more", 1),
    ):  # fmt: skip
        cases.append(module._text(fields | {name: value}))
    cases += [
        module._text({key: one for key, one in fields.items() if key != name}) for name in fields
    ]
    for case in cases:
        error = fails(lambda case=case: decode(case, ca_pem), "the roster")  # type: ignore[misc]
        assert len(str(error)) < 200


def _signed(place: Path, **changes: Any) -> bytes:
    """Return what the CA would sign if it were told to."""
    return encode(replace(read_roster(place), **changes), ca_key_in(place))


def test_a_ca_that_signs_nonsense_is_not_believed(place: Path) -> None:
    ca_pem = (place / "ca.pem").read_bytes()
    members = read_roster(place).members
    eve = replace(public("eve"), login=ANN.login)
    for changes, words in (
        ({"members": (*members, *members)}, "a name is there twice"),
        ({"revoked": members}, "a name is there twice"),
        ({"members": (*members, eve)}, "a key is there twice"),
        ({"members": (CARL, ANN)}, "not in order"),
        ({"issued": "yesterday"}, "no time"),
        ({"issued": "2026-1-2T3:4:5Z"}, "unusual"),
        ({"members": (replace(ANN, name="../ann"),)}, "no name"),
    ):
        data = _signed(place, **changes)
        fails(lambda data=data: decode(data, ca_pem), words)  # type: ignore[misc]
    assert decode(_signed(place, serial=9), ca_pem).serial == 9


def test_limits(place: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ca_pem = (place / "ca.pem").read_bytes()
    fails(lambda: decode(b" " * (module.MOST_BYTES + 1), ca_pem), "at most")
    monkeypatch.setattr(module, "MOST_NODES", 2)
    enrol(folder, ANN, BOB)
    revoke(folder, "bob")
    fails(lambda: enrol(folder, CARL), "3 nodes", ExitCode.CONFIG)
    monkeypatch.setattr(module, "MOST_NODES", 1)
    fails(lambda: decode((place / "roster").read_bytes(), ca_pem), "at most 1 lines")
    monkeypatch.undo()
    monkeypatch.setattr(module, "MOST_BYTES", 1800)
    fails(lambda: enrol(folder, CARL, public("dora"), public("emil")), "bytes", ExitCode.CONFIG)
    (folder / "roster").write_bytes(b" " * 1801)
    fails(lambda: read_roster(folder), "more than 1800 bytes")


def test_files_that_are_missing_or_open(folder: Path, tmp_path: Path) -> None:
    other = federation(tmp_path / "other")
    (folder / "ca.key").chmod(0o640)
    fails(lambda: enrol(folder, ANN), "open to others")
    (folder / "ca.key").unlink()
    assert "where the CA's key is" in fails(lambda: enrol(folder, ANN), "ca.key' is not there").hint
    # Without the CA's key it can still be read.
    assert read_roster(folder).serial == 1
    (folder / "ca.key").write_bytes((other / "ca.key").read_bytes())
    (folder / "ca.key").chmod(0o600)
    fails(lambda: revoke(folder, "ann"), "another federation than ca.pem")
    (folder / "ca.key").write_bytes((other / "server.pem").read_bytes())
    fails(lambda: enrol(folder, ANN), "no private key")
    (other / "roster").unlink()
    assert "from a copy" in fails(lambda: enrol(other, ANN), "roster' is not there").hint
    (other / "ca.pem").unlink()
    assert "fedtune keys ca" in fails(lambda: read_roster(other), "ca.pem' is not there").hint


def test_a_disk_that_refuses_leaves_the_old_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enrol(folder, ANN)
    before = (folder / "roster").read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedtune.files.os.fsync", full)
    error = fails(lambda: enrol(folder, BOB), "No space left", ExitCode.STORAGE)
    assert "nothing was changed" in error.hint
    assert (folder / "roster").read_bytes() == before
    assert {path.name for path in folder.iterdir()} == {
        ".lock", "ca.key", "ca.pem", "roster", "server.key", "server.pem",
    }  # fmt: skip


def test_many_at_once_lose_nobody(folder: Path, tmp_path: Path) -> None:
    """Four processes enrol five nodes each; the serial counts every step."""
    code = (
        "import sys; from pathlib import Path; from fedtune.keys.roster import enrol;"
        "from fedtune.keys.node import new_identity, public_of;"
        "[enrol(Path(sys.argv[1]), public_of(new_identity(f'{sys.argv[2]}-{i}')))"
        " for i in range(5)]"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(folder), name]) for name in "abcd"]
    assert [one.wait(60) for one in running] == [0] * 4
    roster = read_roster(folder)
    assert roster.serial == 21
    assert _names(roster)[0] == sorted(f"{name}-{i}" for name in "abcd" for i in range(5))


@FUZZ
@given(st.data())
def test_any_roster_is_read_whole_or_refused(place: Path, data: st.DataObject) -> None:
    good, ca_pem = (place / "roster").read_bytes(), (place / "ca.pem").read_bytes()
    kind = data.draw(st.sampled_from(["bytes", "edit", "json", "signed"]))
    if kind == "bytes":
        given_ = data.draw(st.binary(max_size=400))
    elif kind == "edit":
        at, cut = data.draw(st.integers(0, len(good))), data.draw(st.integers(0, 200))
        given_ = good[:at] + data.draw(st.binary(max_size=20)) + good[at + cut :]
    elif kind == "json":
        value = st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
            lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner),
        )
        field = data.draw(st.sampled_from(list(module._FIELDS)))
        given_ = module._text(json.loads(good) | {field: data.draw(value)})
    else:
        # Past the signature: what a careless CA might sign.
        fields = json.loads(good)
        fields.pop("signature")
        fields |= data.draw(
            st.fixed_dictionaries({}, optional={
                "serial": st.integers(-5, 1 << 60), "issued": st.text(max_size=30),
                "members": st.lists(st.text(max_size=60) | st.just(line_of(ANN)), max_size=3),
                "revoked": st.lists(st.text(max_size=60) | st.just(line_of(BOB)), max_size=3),
            })
        )  # fmt: skip
        text = module._CONTEXT + module._text(fields)
        signature = ca_key_in(place).sign(text, ec.ECDSA(hashes.SHA384())).hex()
        given_ = module._text(fields | {"signature": signature})
    found = attempt(lambda: decode(given_, ca_pem))
    if not isinstance(found, FedtuneError):
        assert kind == "signed" or given_ == good
        assert len({line_of(one) for one in found.members + found.revoked}) == len(
            found.members + found.revoked
        )
