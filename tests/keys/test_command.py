"""``fedtune keys``: what people type, in processes of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedtune.cli.keys import keys
from fedtune.keys.authority import check_server
from fedtune.keys.node import read_identity
from fedtune.keys.roster import read_roster
from tests.keys.kit import mode


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*words: str) -> Result:
    return CliRunner().invoke(keys, words)


def answer(*words: str, ok: bool = True) -> dict[str, Any]:
    """Run a command with --json and return its result or its error."""
    result = command(*words, "--json")
    (line,) = result.stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    assert (found["schema"], found["command"]) == (1, f"keys {words[0]}")
    assert found["ok"] is ok is (result.exit_code == 0), result.output
    value: dict[str, Any] = found["result" if ok else "error"]
    return value


def test_a_federation_as_people_make_it(tmp_path: Path) -> None:
    """The whole set-up through the real command, from ca to a node that is let in."""

    def run(*words: str) -> tuple[str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "fedtune", "keys", *words],
            cwd=tmp_path, capture_output=True, text=True, umask=0,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    said, hint = run("ca", "--name", "the study")
    assert "the study" in said
    assert "next: fedtune keys server HOST\n" in hint
    said, hint = run("server", "localhost", "127.0.0.1")
    assert "localhost, 127.0.0.1, until 20" in said
    assert "next: at each node: fedtune keys node NAME" in hint
    said, hint = run("node", "ann", "--folder", "nodes")
    (print_,) = re.findall(r"ann  ((?:[0-9a-f]{4} ?){8})", said)
    assert "next: send nodes/ann.pub" in hint
    said, hint = run("enrol", "nodes/ann.pub")
    assert print_ in said
    assert "by phone" in hint
    said, _ = run("show")
    assert f"ann  enrolled  {print_}" in said
    assert "824 days left" in said
    assert mode(tmp_path / "keys") == 0o700
    modes = {path.name: mode(path) for path in (tmp_path / "nodes").iterdir()}
    assert modes == {"ann.key": 0o600, "ann.pub": 0o644}
    assert read_identity(tmp_path / "nodes" / "ann.key").name == "ann"
    assert check_server(tmp_path / "keys").hosts == ("localhost", "127.0.0.1")


def test_every_command_speaks_json(here: Path) -> None:
    made = answer("ca", "--name", "study", "--folder", "fed", "--days", "1000")
    assert (made["name"], made["folder"], made["days_left"]) == ("study", "fed", 999)
    server = answer("server", "fl.example.org", "--folder", "fed", "--days", "40")
    assert (server["hosts"], server["days_left"]) == (["fl.example.org"], 39)
    ann, bob = answer("node", "ann"), answer("node", "bob")
    assert (ann["key"], ann["public"]) == ("ann.key", "ann.pub")
    found = answer("enrol", "ann.pub", "bob.pub", "--folder", "fed")
    assert (found["serial"], found["nodes"]) == (2, 2)
    assert [one["fingerprint"] for one in found["enrolled"]] == [
        ann["fingerprint"], bob["fingerprint"],
    ]  # fmt: skip
    assert answer("revoke", "bob", "--folder", "fed")["serial"] == 3
    shown = answer("show", "--folder", "fed")
    assert shown["federation"] == made["federation"] == server["federation"]
    assert [one["name"] for one in shown["nodes"]] == ["ann"]
    assert shown["revoked"] == [{"name": "bob", "fingerprint": bob["fingerprint"]}]
    renewed = answer("server", "--renew", "--days", "20", "--folder", "fed")
    assert renewed["hosts"] == ["fl.example.org"]
    assert "19 days" in renewed["warnings"][0]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("server", "localhost"), 33, "fedtune keys ca"),
        (("show",), 33, "fedtune keys ca"),
        (("enrol", "none.pub"), 33, "NAME.pub"),
        (("revoke", "ann"), 33, "fedtune keys ca"),
        (("node", "../ann"), 10, "A-Z"),
        (("node", "a\nb"), 10, "A-Z"),
        (("node", "--", "-rf"), 10, "A-Z"),
        (("ca", "--name", ""), 10, "64 characters"),
        (("ca", "--days", "0"), 10, "36500"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(here: Path, words: tuple[str, ...], code: int, says: str) -> None:
    result = command(*words)
    assert result.exit_code == code
    assert "error: " in result.stderr
    assert says in result.stderr.split("hint:")[1]
    assert not [path for path in here.rglob("*") if path.suffix in (".key", ".pem", ".pub")]


def test_one_bad_line_lets_nobody_in(here: Path) -> None:
    answer("ca")
    answer("node", "ann")
    (here / "eve.pub").write_text((here / "ann.pub").read_text().replace("ann", "eve"))
    (here / "bad.pub").write_text("bad ssh-ed25519 AAAA\n")
    assert answer("enrol", "ann.pub", "bad.pub", ok=False)["code"] == 33
    assert "a key of 'ann'" in answer("enrol", "ann.pub", "eve.pub", ok=False)["message"]
    assert read_roster(here / "keys").serial == 1
    answer("enrol", "ann.pub")
    answer("revoke", "ann")
    assert "'ann' was revoked" in answer("enrol", "ann.pub", ok=False)["message"]
    answer("node", "ann", "--folder", "again")
    assert "'ann' was revoked" in answer("enrol", "again/ann.pub", ok=False)["message"]


def test_a_key_is_never_overwritten(here: Path) -> None:
    answer("node", "ann")
    before = (here / "ann.key").read_bytes()
    assert answer("node", "ann", ok=False)["code"] == 10
    (here / "bob.key").symlink_to(here / "elsewhere")
    assert answer("node", "bob", ok=False)["code"] == 10
    assert (here / "ann.key").read_bytes() == before
    assert not (here / "elsewhere").exists()
    assert not (here / "bob.pub").exists()


def test_the_cas_key_can_be_kept_elsewhere(here: Path) -> None:
    answer("ca", "--folder", "safe")
    answer("server", "localhost", "--folder", "safe")
    answer("node", "ann")
    answer("enrol", "ann.pub", "--folder", "safe")
    (here / "keys").mkdir(mode=0o700)
    for name in ("ca.pem", "server.pem", "server.key", "roster"):
        os.rename(here / "safe" / name, here / "keys" / name)
    found = answer("show")
    assert (found["ca_key"], found["problems"]) == (False, [])
    assert "kept elsewhere" in command("show").stdout
    assert "where the CA's key is" in answer("revoke", "ann", ok=False)["hint"]
    assert [one["name"] for one in found["nodes"]] == ["ann"]


def test_show_says_what_is_wrong(here: Path) -> None:
    answer("ca")
    assert "server  none" in command("show").stdout
    assert "nodes  none" in command("show").stdout
    answer("server", "localhost", "--days", "5")
    assert "note: the server's certificate ends in 4 days" in command("show").stderr
    (here / "keys" / "server.key").chmod(0o644)
    result = command("show")
    assert "problem: key 'keys/server.key' is open to others (mode 0644)" in result.stderr
    assert "hint: chmod 600 keys/server.key" in result.stderr
