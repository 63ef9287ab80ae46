from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedtune.errors import ExitCode, FedtuneError
from fedtune.files import (
    Fresh,
    append,
    numbered,
    numbered_name,
    read_tensors,
    same_text,
    try_lock,
    write_atomic,
    write_json,
)

_WRITE = """
import json, resource, signal, sys
from pathlib import Path
from fedtune.errors import FedtuneError
from fedtune.files import write_atomic
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomic(Path(sys.argv[1]), b"n" * 5000)
    print(json.dumps(None))
except FedtuneError as error:
    print(json.dumps([str(error), error.hint, int(error.code)]))
"""


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state.bin"
    path.write_bytes(b"old")
    ran = subprocess.run(
        [sys.executable, "-c", _WRITE, str(path)], capture_output=True, text=True, check=True
    )
    message, hint, code = json.loads(ran.stdout)
    assert code == ExitCode.STORAGE
    assert message.startswith(f"cannot write '{path}': ")
    assert "free some space" in hint
    assert "--resume" in hint
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["state.bin"]


def test_a_file_is_replaced_and_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "state.bin"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["state.bin"]


def test_a_place_that_is_no_folder_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FedtuneError, match="cannot write") as caught:
        write_atomic(tmp_path / "file" / "state.bin", b"x")
    assert caught.value.code == ExitCode.STORAGE


def test_what_is_appended_comes_after_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append(path, b"one\n", 0o600)
    append(path, b"two\n", 0o644)
    assert path.read_bytes() == b"one\ntwo\n"
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_cannot_be_made_durable_is_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedtune.files.os.fsync", full)
    with pytest.raises(FedtuneError, match="No space left") as caught:
        append(tmp_path / "log", b"one\n")
    assert caught.value.code == ExitCode.STORAGE


def test_a_lock_keeps_others_out_until_its_file_is_closed(tmp_path: Path) -> None:
    """Two open files are as two processes here."""
    path = tmp_path / ".lock"
    with path.open("w") as mine, path.open("w") as other:
        assert try_lock(mine)
        assert try_lock(mine)
        assert not try_lock(other)
        assert not try_lock(other.fileno())
        mine.close()
        assert try_lock(other.fileno())


def test_a_file_is_read_again_when_it_changes_and_only_then(tmp_path: Path) -> None:
    path, reads = tmp_path / "list", []

    def read() -> list[str]:
        reads.append(path.read_text())
        if not reads[-1]:
            raise FedtuneError("nothing in it")
        return [reads[-1]]

    file = Fresh(path, read)
    with pytest.raises(FileNotFoundError):
        file.now()
    write_atomic(path, b"one")
    first = file.now()
    assert file.now() is first == ["one"]
    # As long, and as old: another file it is.
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    write_atomic(path, b"two")
    os.utime(path, ns=times)
    assert file.now() == ["two"]
    path.write_text("")
    for _ in range(2):
        with pytest.raises(FedtuneError, match="nothing in it"):
            file.now()
    path.unlink()
    with pytest.raises(FileNotFoundError):
        file.now()
    assert reads == ["one", "two", "", ""]


def test_json_is_readable_and_sorted(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"b": 1, "a": [2]})
    text = (tmp_path / "x.json").read_text()
    assert text.endswith("}\n")
    assert list(json.loads(text)) == ["a", "b"]


def test_tensors_and_notes_are_read_back(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    save_file({"x": array}, tmp_path / "x.safetensors", {"round": "3"})
    found, note = read_tensors(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(found["x"], array)
    assert (list(found), note) == (["x"], {"round": "3"})


@pytest.mark.parametrize("damage", ["cut", "header", "empty", "missing", "folder"])
def test_a_damaged_file_is_a_storage_error(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": np.ones(100, np.float32)}, path)
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-7])
    elif damage == "header":
        path.write_bytes(data[:8] + b"\xff" * 20 + data[28:])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    if damage == "folder":
        path.mkdir()
    with pytest.raises(FedtuneError, match=r"'.*x\.safetensors' cannot be read") as caught:
        read_tensors(path)
    assert caught.value.code == ExitCode.STORAGE
    assert caught.value.hint


def test_private_text_under_another_name_is_not_public(tmp_path: Path) -> None:
    private = tmp_path / "notes" / "all.jsonl"
    private.parent.mkdir()
    private.write_text("{}")
    (tmp_path / "link.jsonl").symlink_to(private)
    for name in (private, private.parent, tmp_path / "notes" / ".." / "notes" / "all.jsonl",
                 tmp_path / "link.jsonl"):  # fmt: skip
        assert same_text(str(name), str(private))
        assert same_text(str(private), str(name))
    assert not same_text(str(tmp_path / "other.jsonl"), str(private))
    assert same_text("hub:x", "hub:x:plain")
    assert not same_text("hub:y", "hub:x")


def test_files_by_round_are_found_in_their_order(tmp_path: Path) -> None:
    for name in ("round-000010", "round-000009", "policy-000011", "round-1000000", "round-x"):
        (tmp_path / f"{name}.safetensors").touch()
    (tmp_path / ".round-000012.safetensors.half").touch()
    found = numbered(tmp_path, "round")
    assert list(found) == [9, 10, 1_000_000]
    assert all(path.name == numbered_name("round", number) for number, path in found.items())
    assert numbered(tmp_path / "nowhere", "round") == {}
