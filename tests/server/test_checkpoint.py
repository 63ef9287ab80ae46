from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.adapters import Tensors
from fedtune.errors import ExitCode, FedtuneError
from fedtune.server.checkpoint import State, latest, store
from fedtune.server.optimizer import Moments
from fedtune.server.run_folder import RunFolder


def state(number: int) -> State:
    rng = np.random.default_rng(number)

    def made(*names: str) -> Tensors:
        return {n: rng.standard_normal((3, 2)).astype(np.float32) for n in names}

    left, right = rng.standard_normal((2, 4, 4)).astype(np.float32)
    moments = Moments(made("x.a", "y:b"), made("x.a", "y:b"))
    return State(number, made("x.a", "y:b"), "f" * 64, {"x": (left, right)}, moments)


def test_a_state_comes_back_whole(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert latest(folder, "f" * 64) is None
    store(folder, state(7), keep=2)
    found, wanted = latest(folder, "f" * 64), state(7)
    assert found is not None
    assert (found.round, found.fingerprint) == (7, wanted.fingerprint)
    pairs = [
        (found.adapter, wanted.adapter),
        (found.moments.first, wanted.moments.first),
        (found.moments.second, wanted.moments.second),
        (found.tensors(), wanted.tensors()),
    ]
    for one, other in pairs:
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[n], other[n]) for n in one)
    assert all(np.array_equal(*ab) for ab in itertools.chain(
        zip(found.residual["x"], wanted.residual["x"], strict=True)))  # fmt: skip
    plain = State(8, wanted.adapter, "f" * 64)
    store(folder, plain, keep=2)
    again = latest(folder, "f" * 64)
    assert again is not None
    assert (again.round, again.residual, again.moments) == (8, {}, Moments())


def test_what_policies_remember_comes_back_whole(tmp_path: Path) -> None:
    """Numbers without a place, strided arrays and nothing at all among them."""
    kept: dict[str, Any] = {
        "one": np.array(1 / 3), "turned": np.arange(6.0).reshape(2, 3).T,
        "none": np.zeros((0, 4), np.float32), "a:b": np.arange(3, dtype=np.int64),
        "bytes": np.arange(5, dtype=np.uint8),
    }  # fmt: skip
    folder = RunFolder(tmp_path)
    store(folder, State(1, {}, "f" * 64, policy=kept, learner=kept | {"more": kept["one"]}), 2)
    found = latest(folder, "f" * 64)
    assert found is not None
    assert found.learner.keys() == {*kept, "more"}
    for part in (found.policy, found.learner):
        for name, value in kept.items():
            assert (part[name].shape, part[name].dtype) == (value.shape, value.dtype)
            assert np.array_equal(part[name], value)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for number in (0, 1, 2, 3, 1_000_000):
        store(folder, state(number), keep=2)
    names = sorted(path.name for path in folder.checkpoints.iterdir())
    assert names == ["round-000003.safetensors", "round-1000000.safetensors"]
    found = latest(folder, "f" * 64)
    assert found is not None
    assert found.round == 1_000_000


def test_a_half_written_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    store(folder, state(1), keep=2)
    (folder.checkpoints / ".round-000002.safetensors.abc123").write_bytes(b"half")
    (folder.checkpoints / "round-000009.safetensors.tmp").write_bytes(b"half")
    found = latest(folder, "f" * 64)
    assert found is not None
    assert found.round == 1


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    store(folder, state(1), keep=2)
    with pytest.raises(FedtuneError, match="ffffffffffff, here eeeeeeeeeeee") as caught:
        latest(folder, "e" * 64)
    assert caught.value.code == ExitCode.RESUME_REFUSED


def test_a_damaged_checkpoint_says_how_to_go_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    store(folder, state(1), keep=2)
    store(folder, state(2), keep=2)
    newest = folder.checkpoints / "round-000002.safetensors"
    newest.write_bytes(newest.read_bytes()[:-3])
    with pytest.raises(FedtuneError, match=r"round-000002.*cannot be read") as caught:
        latest(folder, "f" * 64)
    assert caught.value.code == ExitCode.STORAGE
    newest.unlink()
    found = latest(folder, "f" * 64)
    assert found is not None
    assert found.round == 1
