"""Files of keys: modes whatever the umask, links that are not followed, full disks."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.errors import ExitCode
from fedtune.keys import files
from tests.keys.kit import fails, mode


@pytest.fixture(params=[0o000, 0o022, 0o777])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_modes_do_not_depend_on_the_umask(tmp_path: Path, umask: int) -> None:
    files.place(tmp_path / "a.key", b"secret")
    files.place(tmp_path / "a.pub", b"public", 0o644)
    files.private_folder(tmp_path / "keys")
    with files.locked(tmp_path / "keys"):
        files.replace(tmp_path / "keys" / "roster", b"list")
    assert (mode(tmp_path / "a.key"), mode(tmp_path / "a.pub")) == (0o600, 0o644)
    assert (mode(tmp_path / "keys"), mode(tmp_path / "keys" / ".lock")) == (0o700, 0o600)
    assert mode(tmp_path / "keys" / "roster") == 0o644


@pytest.mark.parametrize("target", ["there", "missing"])
def test_a_link_in_the_place_of_a_file_is_not_followed(tmp_path: Path, target: str) -> None:
    (tmp_path / "there").write_text("mine")
    (tmp_path / "a.key").symlink_to(tmp_path / target)
    fails(lambda: files.place(tmp_path / "a.key", b"secret"), "there already", ExitCode.CONFIG)
    fails(lambda: files.absent(tmp_path / "a.key"), "there already", ExitCode.CONFIG)
    assert (tmp_path / "there").read_text() == "mine"
    assert not (tmp_path / "missing").exists()
    # The next version of a public file takes the place of the link itself.
    files.replace(tmp_path / "a.key", b"new")
    assert not (tmp_path / "a.key").is_symlink()
    assert (tmp_path / "there").read_text() == "mine"


def test_nothing_is_overwritten_and_nothing_is_left_behind(tmp_path: Path) -> None:
    files.place(tmp_path / "a.key", b"first")
    fails(lambda: files.place(tmp_path / "a.key", b"second"), "there already", ExitCode.CONFIG)
    assert (tmp_path / "a.key").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a.key"]


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys; from pathlib import Path; from fedtune.keys import files;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10));"
        "files.place(Path(sys.argv[1]) / 'a.key', b'x' * 100)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert "cannot write" in found.stderr
    assert "FedtuneError" in found.stderr
    assert os.listdir(tmp_path) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 10


def test_a_private_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.key"
    files.place(path, b"secret")
    assert files.read_private(path, "hint") == b"secret"
    for bits in (0o640, 0o604, 0o620, 0o601):
        path.chmod(bits)
        error = fails(lambda: files.read_private(path, "hint"), f"mode {bits:04o}")
        assert f"chmod 600 {path}" in error.hint
    path.chmod(0o400)
    assert files.read_private(path, "hint") == b"secret"


@pytest.mark.timeout(20)
def test_what_is_no_small_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    fails(lambda: files.read_bytes(tmp_path / "pipe", "hint"), "no file")
    fails(lambda: files.read_bytes(tmp_path, "hint"), "cannot be read|no file")
    fails(lambda: files.read_bytes(tmp_path / "none", "hint"), "not there")
    fails(lambda: files.read_bytes(Path("a\0b"), "hint"), "cannot be read")
    fails(lambda: files.read_bytes(Path("/dev/zero"), "hint"), "no file")
    (tmp_path / "long").write_bytes(b"x" * 101)
    fails(lambda: files.read_bytes(tmp_path / "long", "hint", 100), "more than 100 bytes")
    assert len(files.read_bytes(tmp_path / "long", "hint", 101)) == 101


def test_a_folder_of_others_things_stays_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o755)
    (folder / "notes.txt").write_text("notes")
    fails(lambda: files.private_folder(folder), "open to others", ExitCode.CONFIG)
    assert mode(folder) == 0o755
    folder.chmod(0o700)
    files.private_folder(folder)
    (tmp_path / "empty").mkdir(mode=0o755)
    files.private_folder(tmp_path / "empty")
    assert mode(tmp_path / "empty") == 0o700
    fails(lambda: files.private_folder(folder / "notes.txt"), "no folder", ExitCode.CONFIG)


def test_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    taken, over = threading.Event(), threading.Event()

    def hold() -> None:
        with files.locked(tmp_path):
            taken.set()
            over.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    assert taken.wait(20)

    def enter() -> None:
        with files.locked(tmp_path):
            pass

    try:
        fails(enter, "being changed", ExitCode.STORAGE)
    finally:
        over.set()
        holder.join()
    enter()


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")

    def enter() -> None:
        with files.locked(tmp_path):
            pass

    fails(enter, "cannot write", ExitCode.STORAGE)
    assert not (tmp_path / "elsewhere").exists()
