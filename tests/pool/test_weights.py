"""Weights as a function of coefficients: the same bits for everybody, whenever they joined."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedtune.client.epochs import Epochs
from fedtune.config import TuningConfig
from fedtune.errors import FedtuneError
from fedtune.pool.chain import Chain, broadcast, read_broadcast, read_chain, same, write_chain
from fedtune.pool.codec import pack
from fedtune.pool.groups import Groups
from fedtune.pool.weights import PoolWeights

KEY, SIZE = bytes(range(32)), 64


def tuning(kind: str = "hadamard") -> TuningConfig:
    return TuningConfig.model_validate(
        {"method": "seedpool", "adapter": "full", "pool": {"size": SIZE, "kind": kind}}
    )


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(70, 40), nn.Linear(40, 3)).to(dtype)


def vectors(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [(1e-3 * rng.standard_normal(SIZE)).astype(np.float32) for _ in range(count)]


def chains(rounds: int, refresh: int) -> list[Chain]:
    """What a server with a new vector each round would broadcast."""
    made, total = [Chain(KEY, (), pack(np.zeros(SIZE), 16))], np.zeros(SIZE)
    for number, step in enumerate(vectors(rounds), 1):
        total, last = total + step, made[-1]
        if number % refresh:
            made.append(replace(last, running=pack(total, 16)))
        else:
            made.append(Chain(KEY, (*last.finished, pack(total, 16)), pack(np.zeros(SIZE), 16)))
            total = np.zeros(SIZE)
    return made


@pytest.mark.parametrize("kind", ["hadamard", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fifty_rounds_give_one_hash_to_early_late_and_resumed(
    kind: str, dtype: torch.dtype
) -> None:
    course = chains(50, 7)
    early, late, resumed = (PoolWeights(net(dtype), tuning(kind)) for _ in range(3))
    for number, chain in enumerate(course):
        early.put(chain)
        if number == 20:
            resumed.put(chain)
        if number == 33:  # another process: only what is on disk is left
            resumed = PoolWeights(net(dtype), tuning(kind), threads=2)
        if number > 45:
            resumed.put(chain)
    late.put(course[-1])
    assert early.arena.root() == late.arena.root() == resumed.arena.root()
    start = PoolWeights(net(dtype), tuning(kind))
    assert start.arena.root() != early.arena.root()


def test_going_back_gives_what_was() -> None:
    course = chains(10, 3)
    weights = PoolWeights(net(), tuning())
    weights.put(course[5])
    root = weights.arena.root()
    weights.put(course[9])
    assert weights.arena.root() != root
    weights.put(course[5])
    assert weights.arena.root() == root


def test_a_walk_by_a_client_leaves_no_trace() -> None:
    course = chains(4, 9)
    for kind in ("hadamard", "gaussian"):
        weights = PoolWeights(net(), tuning(kind))
        weights.put(course[3])
        root = weights.arena.root()
        weights.pool.perturb(weights.arena.flat, [(3, 0.1)])
        assert weights.arena.root() != root
        weights.put(course[3])
        assert weights.arena.root() == root


def sent(weights: PoolWeights, chain: Chain, known: int = 0):  # type: ignore[no-untyped-def]
    weights.put(chain)
    return read_broadcast(broadcast(chain, *weights.hashes(), known), SIZE)


def test_a_mismatch_names_the_tensor() -> None:
    course = chains(3, 9)
    server, client = PoolWeights(net(), tuning()), PoolWeights(net(), tuning())
    found = sent(server, course[2])
    client.put(course[2])
    client.require(found)
    with torch.no_grad():
        client.model[1].bias[0] += 1e-7  # type: ignore[index,operator]
    with pytest.raises(FedtuneError, match=r"tensor '1\.bias' and 0 more"):
        client.require(found)


def test_another_base_is_found_out() -> None:
    course = chains(1, 9)
    found = sent(PoolWeights(net(), tuning()), course[1])
    torch.manual_seed(6)
    other = PoolWeights(nn.Sequential(nn.Linear(70, 40), nn.Linear(40, 3)), tuning())
    other.put(course[1])
    with pytest.raises(FedtuneError, match="and 3 more"):
        other.require(found)


def test_who_was_away_catches_up_with_one_vector_for_each_epoch(tmp_path) -> None:  # type: ignore[no-untyped-def]
    course = chains(10, 2)
    server = PoolWeights(net(), tuning())
    client = Epochs(tmp_path, SIZE)
    assert client.merge(sent(server, course[4])).epoch == 2
    again = Epochs(tmp_path, SIZE)
    assert len(again.finished) == 2
    task = sent(server, course[10], known=2)
    assert len(task.past) == 3
    chain = again.merge(task)
    assert all(map(same, chain.finished, course[10].finished))
    with pytest.raises(FedtuneError, match="holds 0 pool epochs, the task begins at 5"):
        Epochs(None, SIZE).merge(sent(server, course[10], known=5))
    with pytest.raises(FedtuneError, match="not the one that was agreed"):
        again.merge(replace(task, key=bytes(32)))


def test_a_chain_survives_the_file() -> None:
    chain = chains(9, 2)[9]
    again = read_chain(write_chain(chain), SIZE)
    assert again.key == chain.key
    assert all(map(same, again.finished, chain.finished))
    assert same(again.running, chain.running)


@pytest.mark.parametrize(
    "change",
    [
        {"head": np.zeros(67, np.uint8)}, {"head": np.zeros(68, np.uint8)},
        {"head": np.zeros(68, np.int8)}, {"head": np.full(68, 255, np.uint8)},
        {"past_scale": np.zeros(1, np.float32)}, {"marks": np.zeros(4, np.int64)},
        {"odds": np.full(SIZE, np.nan, np.float16)}, {"more": np.zeros(1, np.uint8)},
    ],
)  # fmt: skip
def test_a_broadcast_is_not_believed(change: dict[str, np.ndarray]) -> None:
    weights, chain = PoolWeights(net(), tuning()), chains(9, 3)[9]
    weights.put(chain)
    good = broadcast(chain, *weights.hashes(), 0)
    read_broadcast(good, SIZE)
    with pytest.raises(FedtuneError):
        read_broadcast(good | change, SIZE)


def test_groups_share_out_the_pool_and_go_round_it() -> None:
    groups = Groups(groups=3, directions=5, size=40)
    for number in range(1, 9):
        parts = [set(groups.columns(g, number)) for g in range(3)]
        assert len(set.union(*parts)) == 15
        assert set(groups.used(number)) == set.union(*parts)
    seen = {int(k) for number in range(1, 9) for k in groups.used(number)}
    assert seen == set(range(40))
    names = [groups.of(f"client {i}", KEY) for i in range(300)]
    assert min(names.count(g) for g in range(3)) > 70


def test_large_weights_wait_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedtune.pool import weights as room

    course = chains(9, 4)
    plain = PoolWeights(net(), tuning())
    plain.put(course[9])
    monkeypatch.setattr(room, "_ON_DISK", 0)
    mapped = PoolWeights(net(), tuning())
    mapped.put(course[9])
    assert mapped.arena.root() == plain.arena.root()
    assert mapped.base.data_ptr() != mapped.arena.flat.data_ptr()
