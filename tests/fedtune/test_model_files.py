"""A base model is known by the bytes of its weights, as sha256sum says them."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from fedtune.errors import ExitCode, FedtuneError
from fedtune.model_files import weights_digest


def test_one_file_is_what_sha256sum_says(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(range(256)) * 40_000)  # more than is read at a time
    said = subprocess.run(["sha256sum", file], capture_output=True, text=True, check=True).stdout
    assert weights_digest(str(tmp_path)) == said.split()[0]


def test_several_files_are_what_sha256sum_says_of_its_own_words(tmp_path: Path) -> None:
    for number in (2, 1, 3):
        (tmp_path / f"model-0000{number}.safetensors").write_bytes(b"x" * number)
    names = sorted(path.name for path in tmp_path.iterdir())
    listed = subprocess.run(
        ["sha256sum", *names], capture_output=True, check=True, cwd=tmp_path
    ).stdout
    assert weights_digest(str(tmp_path)) == hashlib.sha256(listed).hexdigest()


def test_every_bit_and_every_file_counts(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    found = set()
    for data in (b"", b"\0", b"\1", b"\0\0"):
        file.write_bytes(data)
        found.add(weights_digest(str(tmp_path)))
    (tmp_path / "more.safetensors").write_bytes(b"")
    found.add(weights_digest(str(tmp_path)))
    assert len(found) == 5
    (tmp_path / "README.md").write_text("not weights")
    assert weights_digest(str(tmp_path)) in found


@pytest.mark.parametrize("place", ["", "nowhere", "model.safetensors"])
def test_without_weights_there_is_no_digest(tmp_path: Path, place: str) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(FedtuneError) as caught:
        weights_digest(str(tmp_path / place))
    assert caught.value.code == ExitCode.MODEL
